"""The network of training: RMSNorm, rotary grouped-query attention and SwiGLU, scanned over layers.

`Transformer` is an immutable pytree under plain `jax.jit` and `jax.grad`; `decoder.Decoder`, which
is made from it, samples.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from stepwiser_jax.model.attention import Attention, attention_for, save_attention
from stepwiser_jax.model.block import (
    Block,
    ClassifierHead,
    parameter,
    replace,
    rms_norm,
    rope_angles,
)
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.linear import output_logits, pair_logits, product
from stepwiser_jax.model.lora import Adapter


class Transformer(nnx.Module):
    """A causal language model, or a classifier of two classes (`config.classifier`)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        compute_dtype: Any = jnp.float32,
        attention: Attention | None = None,
    ):
        """Makes a model with random weights.

        Args:
            config: sizes and switches.
            rngs: the source of the weights.
            param_dtype: the type of the weights.
            compute_dtype: the type of activations and of the operands of products.
            attention: how attention is computed; None: as suits jax's default device.
        """
        V, D, std = config.vocab_size, config.hidden_size, config.initializer_range
        self.config = config
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.attention = attention or attention_for(
            jax.devices()[0], compute_dtype, config.head_dim
        )
        self.embed = parameter(rngs, (V, D), ("vocab", "embed"), std, param_dtype)
        self.blocks = Block(config, config.num_layers, rngs, param_dtype)
        self.norm = parameter(rngs, (D,), ("norm",), 1.0, param_dtype)
        has_head = not config.classifier and not config.tie_embeddings
        score = ClassifierHead(config, rngs, param_dtype) if config.classifier else None
        head = parameter(rngs, (V, D), ("vocab", "embed"), std, param_dtype) if has_head else None
        self.score: ClassifierHead | None = nnx.data(score)
        self.head: nnx.Param | None = nnx.data(head)

    @property
    def head_VD(self) -> jax.Array:
        """The output matrix: the embedding itself if they are tied."""
        return (self.embed if self.head is None else self.head)[...]

    @property
    def unknown_ids(self) -> tuple[range, ...]:
        """The ids without a token, see `ModelConfig`."""
        return self.config.unknown_ids

    @property
    def adapters(self) -> nnx.Dict[Adapter]:
        """Adapters by the name of their matrix."""
        return self.blocks.adapters

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Returns logits (B, T, V), float32; those at t predict token t + 1."""
        return self.logits(self.hidden(tokens_BT, positions_BT, segment_ids_BT))

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        *,
        remat: bool = False,
    ) -> jax.Array:
        """Returns the residual stream after the final norm, (B, T, D).

        Args:
            tokens_BT: token ids.
            positions_BT: rotary positions; None counts from 0.
            segment_ids_BT: which tokens see one another (`packing`); None: one document a row.
            remat: whether the backward pass computes each block again, except its attention.
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        config = self.config
        cos, sin = rope_angles(config, positions_BT)
        mask = self.attention.mask(segment_ids_BT)

        def layer(x_BTD: jax.Array, block: Block) -> tuple[jax.Array, None]:
            with jax.named_scope("attention"):
                q, k, v = block.qkv(config, x_BTD, cos, sin)
                attended_BTNH = self.attention.attend(q, k, v, mask)
            return block.finish(config, x_BTD, attended_BTNH), None

        if remat:
            # XLA cannot merge the two passes, which are two loops.
            layer = jax.checkpoint(layer, policy=save_attention, prevent_cse=False)
        x_BTD = self.embed[...][tokens_BT].astype(self.compute_dtype)
        x_BTD, _ = jax.lax.scan(layer, x_BTD, self.blocks)
        return rms_norm(x_BTD, self.norm[...], config.rms_norm_eps)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns logits (..., V), float32, of hidden states (..., D)."""
        return output_logits(hidden, self.head_VD, self.unknown_ids)

    def pair_logits(self, hidden_BTD: jax.Array, pair: tuple[int, int]) -> jax.Array:
        """Returns logits (B, T, 2), float32, of the two tokens of `pair`; of a classifier, those of
        right and wrong, whatever `pair` is."""
        if self.score is None:
            return pair_logits(hidden_BTD, self.head_VD, pair)
        rows_2D, bias_2 = self.score.weight[...][::-1], self.score.bias[...][::-1]
        logits_BT2 = product(hidden_BTD, rows_2D.astype(hidden_BTD.dtype), (2, 1))
        return logits_BT2 + bias_2.astype(jnp.float32)[None, None]

    def as_classifier(self, score: ClassifierHead) -> Transformer:
        """Returns a classifier with the same arrays and this head."""
        config = dataclasses.replace(self.config, classifier=True)
        return replace(self, config=config, score=score, head=None)

"""The network of sampling: prefill, decode steps, and the layout of weights that suits them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import qwix

from stepwiser_jax.model.attention import Attention
from stepwiser_jax.model.attention.decoding import cache_attention, shared_prefix_attention
from stepwiser_jax.model.block import Block, rms_norm, rope_angles
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.kv_cache import KVCache, SharedPrefix, SuffixCache
from stepwiser_jax.model.linear import output_logits, pair_logits, quantize
from stepwiser_jax.model.lora import merge_block
from stepwiser_jax.model.transformer import Transformer

Weights = Literal["model", "int8"]
"""`model`: the compute type. `int8`: the blocks' matrices are 8-bit integers with one scale for
each output, and are multiplied in the compute type; all other weights have the compute type."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoder:
    """A language model that samples.

    Blocks stand one by one, with adapters merged, every leaf transposed (matrices are (in, out)),
    and in the type they are multiplied in. Slices, casts or transposes inside a decode loop would
    copy all weights at every step.
    """

    embed_VD: jax.Array
    blocks: tuple[Block, ...]
    norm_D: jax.Array
    untied_head_VD: jax.Array | None
    """None: the embedding is the output matrix."""
    config: ModelConfig = dataclasses.field(metadata={"static": True})
    compute_dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    attention: Attention = dataclasses.field(metadata={"static": True})
    weights: Weights = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_transformer(cls, model: Transformer, weights: Weights = "model") -> Decoder:
        """Converts a model layer by layer: so little else is in memory beside the result."""
        dtype, layers = model.compute_dtype, range(model.config.num_layers)
        return cls(
            embed_VD=model.embed[...].astype(dtype),
            blocks=tuple(convert_layer(model.blocks, layer, dtype, weights) for layer in layers),
            norm_D=model.norm[...].astype(dtype),
            untied_head_VD=None if model.head is None else model.head[...].astype(dtype),
            config=model.config,
            compute_dtype=dtype,
            attention=model.attention,
            weights=weights,
        )

    @property
    def suffix_dtype(self) -> jnp.dtype:
        """The type of the suffix cache."""
        return jnp.dtype(self.attention.suffix_dtype or self.compute_dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns logits (..., V), float32, of hidden states (..., D)."""
        return output_logits(hidden, self._head_VD, self.config.unknown_ids)

    def pair_logits(self, hidden: jax.Array, pair: tuple[int, int]) -> jax.Array:
        """Returns logits (..., 2), float32, of the two tokens of `pair`."""
        return pair_logits(hidden, self._head_VD, pair)

    @property
    def _head_VD(self) -> jax.Array:
        return self.embed_VD if self.untied_head_VD is None else self.untied_head_VD

    def prefill(self, tokens_BT: jax.Array) -> tuple[jax.Array, KVCache]:
        """Reads right-padded prompts with the attention of training.

        What the caller does not use is not computed: for the cache alone, the last layer stops at
        its keys and values.

        Returns:
            Hidden states (B, T, D), and the keys and values of all T tokens.
        """
        B, T = tokens_BT.shape
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        mask = self.attention.mask(jnp.ones_like(tokens_BT))
        keys, values = [], []

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            keys.append(k.astype(self.compute_dtype).swapaxes(1, 2))
            values.append(v.astype(self.compute_dtype).swapaxes(1, 2))
            return self.attention.attend(q, k, v, mask)

        hidden_BTD = self._run_blocks(tokens_BT, positions_BT, attend)
        return hidden_BTD, KVCache(tuple(keys), tuple(values), jnp.full((B,), T, jnp.int32))

    def decode_step(
        self,
        tokens_B: jax.Array,
        is_running_B: jax.Array,
        prefix: SharedPrefix,
        suffix: SuffixCache,
    ) -> tuple[jax.Array, SuffixCache]:
        """Feeds one token to each row, after its shared prefix and its suffix.

        Returns:
            Hidden states (B, D), and the suffix cache, which has grown in rows that are running.
        """
        positions_B = prefix.length_B + suffix.length_B
        prefix_mask_BS = jnp.arange(prefix.cache.capacity)[None] < prefix.length_B[:, None]
        suffix_mask_BC = suffix.visible_BC
        keys, values = [], []

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            keys.append(suffix.write(suffix.keys[layer], k))
            values.append(suffix.write(suffix.values[layer], v))
            of_prefix = (prefix.cache.keys[layer], prefix.cache.values[layer], prefix_mask_BS)
            of_row = (keys[-1], values[-1], suffix_mask_BC)
            attended_BNH = shared_prefix_attention(
                q[:, 0], of_prefix, of_row, self.attention.scores
            )
            return attended_BNH[:, None]

        hidden_B1D = self._run_blocks(tokens_B[:, None], positions_B[:, None], attend)
        return hidden_B1D[:, 0], suffix.step(keys, values, is_running_B.astype(jnp.int32))

    def append(
        self, tokens_BT: jax.Array, counts_B: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Feeds the first `counts_B[b]` <= T right-padded tokens of each row to its cache.

        What lies past a row's new length is masked, and overwritten by what comes next. The chunk
        sampler both prefills (an empty cache) and decodes (T = 1) with this.

        Returns:
            Hidden states (B, T, D), and the cache.
        """
        start_B, T = cache.length_B, tokens_BT.shape[1]
        positions_BT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
        mask_BTS = jnp.arange(cache.capacity)[None, None] <= positions_BT[:, :, None]
        keys, values = [], []

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            keys.append(cache.write(cache.keys[layer], k))
            values.append(cache.write(cache.values[layer], v))
            return cache_attention(q, keys[-1], values[-1], mask_BTS, self.attention.scores)

        hidden_BTD = self._run_blocks(tokens_BT, positions_BT, attend)
        return hidden_BTD, KVCache(tuple(keys), tuple(values), start_B + counts_B)

    def _run_blocks(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        attend: Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array],
    ) -> jax.Array:
        """Returns the residual stream (B, T, D) after the final norm; `attend(layer, q, k, v)`."""
        config = self.config
        cos, sin = rope_angles(config, positions_BT)
        # Without the barrier XLA's CPU backend casts the whole table before a decode loop.
        embed_VD, tokens_BT = jax.lax.optimization_barrier((self.embed_VD, tokens_BT))
        x_BTD = embed_VD[tokens_BT]
        for layer, transposed in enumerate(self.blocks):
            block = jax.tree.map(lambda x: x.T, transposed)  # XLA folds it into the products
            with jax.named_scope("attention"):
                attended_BTNH = attend(layer, *block.qkv(config, x_BTD, cos, sin))
            x_BTD = block.finish(config, x_BTD, attended_BTNH)
        return rms_norm(x_BTD, self.norm_D, config.rms_norm_eps)


@functools.partial(jax.jit, static_argnames=("dtype", "weights"))
def convert_layer(blocks: Block, layer: int, dtype: jnp.dtype, weights: Weights) -> Block:
    """Returns one of the stacked blocks in the layout of `Decoder`."""

    def convert(x: jax.Array) -> jax.Array | qwix.QArray:
        x = x.T
        return quantize(x) if weights == "int8" and x.ndim == 2 else x.astype(dtype)

    return jax.tree.map(convert, merge_block(jax.tree.map(lambda x_L: x_L[layer], blocks)))

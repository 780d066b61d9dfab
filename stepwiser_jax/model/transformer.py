"""The decoder: RMSNorm, rotary grouped-query attention, SwiGLU, blocks stacked over layers.

Modules are `flax.nnx` objects used as immutable pytrees under plain `jax.jit` and `jax.grad`.
Weights are stored as Hugging Face stores them, (out, in). Each parameter states its shape, its
logical axes and its initialiser in one line; `distributed/mesh.py` maps the axes to a device mesh.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import qwix
from flax import nnx

from stepwiser_jax.model.attention import (
    XLA,
    Attention,
    attention,
    save_attention,
    shared_prefix_attention,
)
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.kv_cache import KVCache, SharedPrefix, SuffixCache, write
from stepwiser_jax.model.linear import linear, output_logits, product, quantise
from stepwiser_jax.model.lora import Adapter, merge_layer


def _parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], scale: float, dtype: Any
) -> nnx.Param:
    """A normal of standard deviation `scale`; 0 gives zeros, 1 gives ones (norms)."""
    assert len(shape) == len(axes), (shape, axes)
    if scale in (0.0, 1.0):
        return nnx.Param(jnp.full(shape, scale, dtype), axes=axes)
    # The barrier keeps the two factors apart: the same bits, whatever program this is part of.
    normal = jax.lax.optimization_barrier(jax.random.normal(rngs.params(), shape, jnp.float32))
    return nnx.Param((scale * normal).astype(dtype), axes=axes)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Normalised in float32, as every implementation of these models does."""
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    normed = x32 * jax.lax.rsqrt(variance + jnp.float32(eps))
    return normed.astype(x.dtype) * weight.astype(x.dtype)[(None,) * (x.ndim - 1)]


def take_rows(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Embeddings (B, T, D), not differentiable. As integers where they are 16 bits wide: XLA's CPU
    backend turns a whole table of bfloat16 to float32 before it takes a row."""
    if table_VD.dtype.itemsize != 2:
        return table_VD[tokens_BT]
    bits_VD = jax.lax.bitcast_convert_type(table_VD, jnp.uint16)
    return jax.lax.bitcast_convert_type(bits_VD[tokens_BT], table_VD.dtype)


def rope_angles(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines (B, T, 1, H/2), float32: bfloat16 cannot tell position 256 from 257."""
    half = config.head_dim // 2
    frequencies = [config.rope_theta ** (-i / half) for i in range(half)]
    if config.rope_scaling is not None:
        frequencies = [config.rope_scaling.scale(frequency) for frequency in frequencies]
    angles_BTH = positions_BT.astype(jnp.float32)[:, :, None] * jnp.array(
        frequencies, jnp.float32
    ).reshape(1, 1, half)
    return jnp.cos(angles_BTH)[:, :, None], jnp.sin(angles_BTH)[:, :, None]


def apply_rope(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs (i, i + H/2) of every head."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


class Block(nnx.Module):
    """One layer, or all layers stacked: every parameter has a leading axis of `layers`."""

    def __init__(self, config: ModelConfig, layers: int, rngs: nnx.Rngs, dtype: Any):
        D, F, L = config.hidden_size, config.intermediate_size, layers
        NH, KH = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        std = config.initializer_range

        def weight(*shape_and_axes: tuple[int, str], scale: float = std) -> nnx.Param:
            shape = (L, *(size for size, _ in shape_and_axes))
            axes = ("layers", *(axis for _, axis in shape_and_axes))
            return _parameter(rngs, shape, axes, scale, dtype)

        self.attention_norm = weight((D, "norm"), scale=1.0)
        self.q = weight((NH, "heads"), (D, "embed"))
        self.k = weight((KH, "kv_heads"), (D, "embed"))
        self.v = weight((KH, "kv_heads"), (D, "embed"))
        self.o = weight((D, "embed"), (NH, "heads"))
        if config.qkv_bias:
            self.q_bias = weight((NH, "heads"), scale=0.0)
            self.k_bias = weight((KH, "kv_heads"), scale=0.0)
            self.v_bias = weight((KH, "kv_heads"), scale=0.0)
        if config.qk_norm:
            self.q_norm = weight((config.head_dim, "norm"), scale=1.0)
            self.k_norm = weight((config.head_dim, "norm"), scale=1.0)
        self.mlp_norm = weight((D, "norm"), scale=1.0)
        self.gate = weight((F, "mlp"), (D, "embed"))
        self.up = weight((F, "mlp"), (D, "embed"))
        self.down = weight((D, "embed"), (F, "mlp"))
        self.adapters: nnx.Dict[Adapter] = nnx.Dict()  # by the name of their matrix

    def project(self, x: jax.Array, name: str) -> jax.Array:
        """x (..., in) times one of the matrices (out, in), and through its adapter if it has one,
        in the type of x."""
        y = linear(x, getattr(self, name)[...])
        return y + self.adapters[name](x) if name in self.adapters else y


def qkv(
    block: Block, config: ModelConfig, x_BTD: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated queries (B, T, N, H) and keys (B, K, H, T), and values (B, K, T, H), of one block."""
    B, T, _ = x_BTD.shape
    x_BTD = rms_norm(x_BTD, block.attention_norm[...], config.rms_norm_eps)
    q, k, v = (block.project(x_BTD, name) for name in ("q", "k", "v"))
    if config.qkv_bias:
        biases = (block.q_bias, block.k_bias, block.v_bias)
        q, k, v = (
            x + bias[...].astype(x.dtype)[None, None]
            for x, bias in zip((q, k, v), biases, strict=True)
        )
    q_BTNH = q.reshape(B, T, config.num_heads, config.head_dim)
    k_BTKH = k.reshape(B, T, config.num_kv_heads, config.head_dim)
    v_BTKH = v.reshape(B, T, config.num_kv_heads, config.head_dim)
    if config.qk_norm:
        q_BTNH = rms_norm(q_BTNH, block.q_norm[...], config.rms_norm_eps)
        k_BTKH = rms_norm(k_BTKH, block.k_norm[...], config.rms_norm_eps)
    k_BTKH = apply_rope(k_BTKH, cos, sin)
    return apply_rope(q_BTNH, cos, sin), k_BTKH.transpose(0, 2, 3, 1), v_BTKH.swapaxes(1, 2)


def finish_block(
    block: Block, config: ModelConfig, x_BTD: jax.Array, attended_BTNH: jax.Array
) -> jax.Array:
    """Output projection and MLP, each added to the residual stream."""
    B, T, _ = x_BTD.shape
    x_BTD = x_BTD + block.project(attended_BTNH.reshape(B, T, -1), "o")
    with jax.named_scope("mlp"):
        y_BTD = rms_norm(x_BTD, block.mlp_norm[...], config.rms_norm_eps)
        hidden = jax.nn.silu(block.project(y_BTD, "gate")) * block.project(y_BTD, "up")
        return x_BTD + block.project(hidden, "down")


class Score(nnx.Module):
    """Logits of two classes, wrong and right, from the hidden state of a token."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: Any):
        shape, std = (2, config.hidden_size), config.initializer_range
        self.weight = _parameter(rngs, shape, ("classes", "embed"), std, dtype)
        self.bias = _parameter(rngs, (2,), ("classes",), 0.0, dtype)


class Transformer(nnx.Module):
    """A causal language model, or one that scores two classes at each token (`config.classifier`).
    See `hidden` for the mask, `extend` for the cache."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        compute_dtype: Any = jnp.float32,
        attention: Attention = XLA,
    ):
        V, D, std = config.vocab_size, config.hidden_size, config.initializer_range
        self.config = config
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.attention = attention
        self.embed = _parameter(rngs, (V, D), ("vocab", "embed"), std, param_dtype)
        self.blocks: Block | nnx.List[Block] = Block(config, config.num_layers, rngs, param_dtype)
        self.norm = _parameter(rngs, (D,), ("norm",), 1.0, param_dtype)
        if config.classifier:
            self.score = Score(config, rngs, param_dtype)
        elif not config.tie_embeddings:
            self.head = _parameter(rngs, (V, D), ("vocab", "embed"), std, param_dtype)

    @property
    def head_VD(self) -> jax.Array:
        """The output matrix; tied at call time, never a second copy."""
        return self.embed[...] if self.config.tie_embeddings else self.head[...]

    @property
    def unknown_ids(self) -> tuple[range, ...]:
        """Of no token, see `ModelConfig`."""
        return self.config.unknown_ids

    @property
    def adapters(self) -> nnx.Dict[Adapter]:
        """By the name of their matrix; none in a model for_decoding, where they are merged."""
        return self.blocks.adapters if isinstance(self.blocks, Block) else nnx.Dict()

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Logits (B, T, V), float32; those at t are of token t + 1."""
        return self.logits(self.hidden(tokens_BT, positions_BT, segment_ids_BT))

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        *,
        remat: bool = False,
    ) -> jax.Array:
        """The residual stream after the final norm (B, T, D).

        Without `positions_BT` positions count from 0; without `segment_ids_BT` the mask is causal,
        else see `attention.segment_mask`. `remat` recomputes each block in the backward pass,
        all but its attention.
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        config = self.config
        assert isinstance(self.blocks, Block), "hidden is not for a model for_decoding"
        cos, sin = rope_angles(config, positions_BT)
        mask = self.attention.mask(segment_ids_BT)

        def layer(x_BTD: jax.Array, block: Block) -> tuple[jax.Array, None]:
            with jax.named_scope("attention"):
                q, k, v = qkv(block, config, x_BTD, cos, sin)
                attended = self.attention.attend(q, k, v, mask)
            return finish_block(block, config, x_BTD, attended), None

        if remat:
            # XLA cannot merge the passes, which are two loops.
            layer = jax.checkpoint(layer, policy=save_attention, prevent_cse=False)
        x_BTD = self.embed[...][tokens_BT].astype(self.compute_dtype)
        x_BTD, _ = jax.lax.scan(layer, x_BTD, self.blocks)
        return rms_norm(x_BTD, self.norm[...], config.rms_norm_eps)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """(..., D) -> (..., V): accumulated and returned in float32; see `output_logits`."""
        return output_logits(hidden, self.head_VD, self.unknown_ids)

    def pair_logits(self, hidden_BTD: jax.Array, pair: tuple[int, int]) -> jax.Array:
        """Logits (B, T, 2), float32, of two tokens alone; of a classifier, of right and wrong,
        whichever they are."""
        if self.config.classifier:
            rows_2D, bias_2 = self.score.weight[...][::-1], self.score.bias[...][::-1]
            logits_BT2 = product(hidden_BTD, rows_2D.astype(hidden_BTD.dtype), (2, 1))
            return logits_BT2 + bias_2.astype(jnp.float32)[None, None]
        rows_2D = self.head_VD[jnp.array(pair)].astype(hidden_BTD.dtype)
        return product(hidden_BTD, rows_2D, (2, 1))

    def with_score(self, score: Score) -> Transformer:
        """The same model, and the same arrays, as a classifier."""
        model = copy.copy(self)
        model.config = dataclasses.replace(self.config, classifier=True)
        model.score = score
        if not self.config.tie_embeddings:
            del model.head
        return model

    @property
    def is_for_decoding(self) -> bool:
        return not isinstance(self.blocks, Block)

    def for_decoding(self, weights: Literal["model", "int8"] = "model") -> Transformer:
        """The layout of `extend`: blocks one by one, their matrices transposed, and every weight in
        the compute dtype. Slices, casts and transposes in a decode loop, or before it, would copy
        all weights at every step, or at every call.

        `int8`: the blocks' matrices are 8-bit integers, each output with a scale of its own, and
        are multiplied in the compute dtype. Embeddings, head, norms and biases stay as they are.
        """
        model = copy.copy(self)
        dtype, layers = self.compute_dtype, range(self.config.num_layers)
        model.blocks = nnx.List(
            [layer_for_decoding(self.blocks, layer, dtype, weights) for layer in layers]
        )
        names = ("embed", "norm") if self.config.tie_embeddings else ("embed", "norm", "head")
        for name in names:
            setattr(model, name, jax.tree.map(lambda x: x.astype(dtype), getattr(self, name)))
        return model

    def read(self, tokens_BT: jax.Array) -> tuple[jax.Array, KVCache]:
        """(hidden_BTD, keys and values) of right-padded prompts, a slot for each token. Of a model
        `for_decoding`.

        As `extend` of an empty cache, with the attention of packed rows: no array grows with T^2
        where that has none. What the caller leaves is not computed: of the last layer, for the
        cache alone, no more than its keys and values.
        """
        B, T = tokens_BT.shape
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        mask = self.attention.mask(jnp.ones_like(tokens_BT))
        keys, values = [], []

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            keys.append(k.astype(self.compute_dtype))
            values.append(v.astype(self.compute_dtype))
            return self.attention.attend(q, k, v, mask)

        hidden_BTD = self._layers(tokens_BT, positions_BT, attend)
        return hidden_BTD, KVCache(tuple(keys), tuple(values), jnp.full((B,), T, jnp.int32))

    def extend(
        self, tokens_BT: jax.Array, num_tokens_B: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Append `num_tokens_B[b]` <= T right-padded tokens to each row; returns (hidden_BTD,
        cache). Of a model `for_decoding`.

        Reads a prompt (empty cache) and decodes (T = 1) alike. A token's position is its slot. What
        lies past a row's new length is masked, and overwritten by what comes next.
        """
        start_B, T = cache.length_B, tokens_BT.shape[1]
        positions_BT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
        mask_BTS = jnp.arange(cache.slots)[None, None] <= positions_BT[:, :, None]
        keys, values = [], []

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            keys.append(write(cache.keys[layer], k, start_B, slot_axis=3))
            values.append(write(cache.values[layer], v, start_B, slot_axis=2))
            return attention(q, keys[-1], values[-1], mask_BTS)

        hidden_BTD = self._layers(tokens_BT, positions_BT, attend)
        return hidden_BTD, KVCache(tuple(keys), tuple(values), start_B + num_tokens_B)

    def extend_shared(
        self, token_B: jax.Array, running_B: jax.Array, prefix: SharedPrefix, own: SuffixCache
    ) -> tuple[jax.Array, SuffixCache]:
        """One more token for each row, after its shared prefix and what it has fed since; it
        counts for rows that are running. Returns (hidden_BD, own). Of a model `for_decoding`."""
        position_B = prefix.length_B + own.length_B
        prefix_mask_BS = jnp.arange(prefix.cache.slots)[None] < prefix.length_B[:, None]
        own_mask_BC = own.visible_BC
        keys, values = [], []

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            key, value = own.write(layer, k, v)
            keys.append(key)
            values.append(value)
            shared = (prefix.cache.keys[layer], prefix.cache.values[layer], prefix_mask_BS)
            return shared_prefix_attention(q, shared, (key, value, own_mask_BC))

        hidden_B1D = self._layers(token_B[:, None], position_B[:, None], attend)
        return hidden_B1D[:, 0], own.step(keys, values, running_B.astype(jnp.int32))

    def _layers(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        attend: Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array],
    ) -> jax.Array:
        """The residual stream after the final norm, block by block; `attend(layer, q, k, v)`."""
        config = self.config
        assert not isinstance(self.blocks, Block), "the model is not for_decoding"
        cos, sin = rope_angles(config, positions_BT)
        x_BTD = take_rows(self.embed[...], tokens_BT)
        for layer, transposed in enumerate(self.blocks):
            block = jax.tree.map(lambda x: x.T, transposed)  # XLA folds it into the products
            with jax.named_scope("attention"):
                attended = attend(layer, *qkv(block, config, x_BTD, cos, sin))
            x_BTD = finish_block(block, config, x_BTD, attended)
        return rms_norm(x_BTD, self.norm[...], config.rms_norm_eps)


@functools.partial(jax.jit, static_argnames=("dtype", "weights"))
def layer_for_decoding(
    blocks: Block, layer: int, dtype: jnp.dtype, weights: Literal["model", "int8"]
) -> Block:
    """A program for one layer, and not for all: so little is in memory besides the result."""

    def convert(x: jax.Array) -> jax.Array | qwix.QArray:
        x = x.T
        return quantise(x) if weights == "int8" and x.ndim == 2 else x.astype(dtype)

    return jax.tree.map(convert, merge_layer(jax.tree.map(lambda x_L: x_L[layer], blocks)))

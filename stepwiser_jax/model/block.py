"""One layer of the network, and its mathematics: what training and decoding share.

Parameters are `flax.nnx` variables. Weights have the layout of Hugging Face, (out, in). Each
parameter states its shape, its logical axes and its initialiser in one line; `distributed/mesh.py`
maps the axes to a device mesh.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.linear import linear

if TYPE_CHECKING:
    from stepwiser_jax.model.lora import Adapter

Module = TypeVar("Module", bound=nnx.Module)


def replace(module: Module, **changes: Any) -> Module:
    """Returns a module with other attributes. It shares all arrays; `module` stays as it is."""
    changed = nnx.merge(*nnx.split(module))
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], scale: float, dtype: Any
) -> nnx.Param:
    """Returns a normal parameter of standard deviation `scale`; 0 gives zeros, 1 gives ones."""
    assert len(shape) == len(axes), (shape, axes)
    if scale in (0.0, 1.0):
        return nnx.Param(jnp.full(shape, scale, dtype), axes=axes)
    # The barrier keeps XLA from fusing the factors: the bits are the same in every program.
    normal = jax.lax.optimization_barrier(jax.random.normal(rngs.params(), shape, jnp.float32))
    return nnx.Param((scale * normal).astype(dtype), axes=axes)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Normalizes the last axis in float32; the result has the type of x."""
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    normed = x32 * jax.lax.rsqrt(variance + jnp.float32(eps))
    return normed.astype(x.dtype) * weight.astype(x.dtype)[(None,) * (x.ndim - 1)]


def rope_angles(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines (B, T, 1, H/2) in float32: bfloat16 rounds position 257 to 256."""
    half = config.head_dim // 2
    frequencies = [config.rope_theta ** (-i / half) for i in range(half)]
    if config.rope_scaling is not None:
        frequencies = [config.rope_scaling.scale(frequency) for frequency in frequencies]
    angles_BTH = positions_BT.astype(jnp.float32)[:, :, None] * jnp.array(
        frequencies, jnp.float32
    ).reshape(1, 1, half)
    return jnp.cos(angles_BTH)[:, :, None], jnp.sin(angles_BTH)[:, :, None]


def apply_rope(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of every head."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


class Block(nnx.Module):
    """One layer, or all layers stacked: then every parameter has a leading axis of layers."""

    def __init__(self, config: ModelConfig, layers: int, rngs: nnx.Rngs, dtype: Any):
        D, F, L = config.hidden_size, config.intermediate_size, layers
        NH, KH = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        std = config.initializer_range

        def weight(*shape_and_axes: tuple[int, str], scale: float = std) -> nnx.Param:
            shape = (L, *(size for size, _ in shape_and_axes))
            axes = ("layers", *(axis for _, axis in shape_and_axes))
            return parameter(rngs, shape, axes, scale, dtype)

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
        """Returns x (..., in) times the matrix `name` (out, in), plus what its adapter gives."""
        y = linear(x, getattr(self, name)[...])
        return y + self.adapters[name](x) if name in self.adapters else y

    def qkv(
        self, config: ModelConfig, x_BTD: jax.Array, cos: jax.Array, sin: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns rotated queries (B, T, N, H) and keys (B, T, K, H), and values (B, T, K, H)."""
        x_BTD = rms_norm(x_BTD, self.attention_norm[...], config.rms_norm_eps)
        q, k, v = (self.project(x_BTD, name) for name in ("q", "k", "v"))
        if config.qkv_bias:
            biases = (self.q_bias, self.k_bias, self.v_bias)
            q, k, v = (
                x + bias[...].astype(x.dtype)[None, None]
                for x, bias in zip((q, k, v), biases, strict=True)
            )
        q, k, v = (x.reshape(*x.shape[:2], -1, config.head_dim) for x in (q, k, v))
        if config.qk_norm:
            q = rms_norm(q, self.q_norm[...], config.rms_norm_eps)
            k = rms_norm(k, self.k_norm[...], config.rms_norm_eps)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def finish(self, config: ModelConfig, x_BTD: jax.Array, attended_BTNH: jax.Array) -> jax.Array:
        """Adds the output projection of attention, then the MLP, to the residual stream."""
        x_BTD = x_BTD + self.project(attended_BTNH.reshape(*x_BTD.shape[:2], -1), "o")
        with jax.named_scope("mlp"):
            y_BTD = rms_norm(x_BTD, self.mlp_norm[...], config.rms_norm_eps)
            gated = jax.nn.silu(self.project(y_BTD, "gate")) * self.project(y_BTD, "up")
            return x_BTD + self.project(gated, "down")


class ClassifierHead(nnx.Module):
    """Logits of two classes, 0 for wrong and 1 for right, from the hidden state of a token."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: Any):
        shape, std = (2, config.hidden_size), config.initializer_range
        self.weight = parameter(rngs, shape, ("classes", "embed"), std, dtype)
        self.bias = parameter(rngs, (2,), ("classes",), 0.0, dtype)

"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685), which are trained in place of the weights.

    y = W x + (alpha / rank) B A x        W (out, in), frozen; A (rank, in) normal, B (out, rank) 0

Adapters are float32, whatever the type of W, and stacked over layers like their matrices. They are
merged into them, W + (alpha / rank) B A, whenever a model leaves training: to sample, to export.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from stepwiser_jax.model.block import Block, replace
from stepwiser_jax.model.linear import linear


class Adapter(nnx.Module):
    """The adapter of one matrix, in one layer or in all of them, stacked."""

    def __init__(self, weight: nnx.Variable, rank: int, alpha: float, rngs: nnx.Rngs):
        layers, out, width = weight.get_value().shape
        _, out_axis, width_axis = weight.get_metadata("axes")
        normal = jax.random.normal(rngs.params(), (layers, rank, width), jnp.float32)
        self.a = nnx.LoRAParam(normal * width**-0.5, axes=("layers", "rank", width_axis))
        zeros = jnp.zeros((layers, out, rank), jnp.float32)
        self.b = nnx.LoRAParam(zeros, axes=("layers", out_axis, "rank"))
        self.scale = alpha / rank

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns what is added to W x: (..., in) -> (..., out), in the type of x."""
        return linear(self.scale * linear(x, self.a[...]), self.b[...])

    def merge(self, weight: jax.Array) -> jax.Array:
        """Returns W (..., out, in) with the adapter in it, float32."""
        change = jnp.matmul(self.b[...], self.a[...], precision=jax.lax.Precision.HIGHEST)
        return weight.astype(jnp.float32) + self.scale * change


def make_adapters(
    blocks: Block, *, rank: int, alpha: float, targets: Sequence[str], seed: int
) -> nnx.Dict[Adapter]:
    """Returns an adapter, which changes nothing yet, for each matrix that `targets` names."""
    # Another key than that of the base, so that they do not share random numbers.
    rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(seed), 2**31))
    return nnx.Dict({name: Adapter(getattr(blocks, name), rank, alpha, rngs) for name in targets})


def with_adapters(model: Any, adapters: nnx.Dict[Adapter]) -> Any:
    """Returns a `Transformer` with the same arrays and these adapters."""
    return replace(model, blocks=replace(model.blocks, adapters=adapters))


def base_of(model: Any) -> Any:
    """Returns the model without its adapters, as it was before training; it copies nothing."""
    return with_adapters(model, nnx.Dict())


def merge_block(block: Block) -> Block:
    """Returns a block of one layer with its adapters merged into its matrices, in float32."""
    merged = {}
    for name, adapter in block.adapters.items():
        weight = getattr(block, name)
        merged[name] = weight.replace(adapter.merge(weight[...]))
    return replace(block, adapters=nnx.Dict(), **merged)


@functools.partial(jax.jit, static_argnames="dtype")
def merge(model: Any, dtype: jnp.dtype) -> Any:
    """Returns the model with every parameter in `dtype`, and its adapters merged."""

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    if not model.adapters:
        return cast(model)
    # Layer by layer: one of them is in float32 at a time.
    blocks = jax.lax.map(lambda block: cast(merge_block(block)), model.blocks)
    return replace(cast(base_of(model)), blocks=blocks)


# --- what is trained ----------------------------------------------------------------------------


def trainable(model: Any) -> Any:
    """Returns what training changes: the adapters if the model has any, else all of it."""
    adapters = nnx.state(model, nnx.LoRAParam)
    return adapters if jax.tree.leaves(adapters) else model


def with_trainable(model: Any, trained: Any) -> Any:
    """Returns the model with another `trainable`."""
    if not isinstance(trained, nnx.State):
        return trained
    graphdef, _, frozen = nnx.split(model, nnx.LoRAParam, ...)
    return nnx.merge(graphdef, trained, frozen)

"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685): trained where the model's own weights stay
as they are.

    y = W x + (alpha / rank) B A x        W (out, in), frozen; A (rank, in) normal, B (out, rank) 0

They are float32 whatever the type of W, stacked over layers like the matrices they belong to, and
merged into them, W + (alpha / rank) B A, wherever a model leaves training: to sample, to export.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from stepwiser_jax.model.linear import linear


class Adapter(nnx.Module):
    """Of one matrix, in one layer or in all of them, stacked."""

    def __init__(self, weight: nnx.Variable, rank: int, alpha: float, rngs: nnx.Rngs):
        layers, out, width = weight.get_value().shape
        _, out_axis, width_axis = weight.get_metadata("axes")
        normal = jax.random.normal(rngs.params(), (layers, rank, width), jnp.float32)
        self.a = nnx.LoRAParam(normal * width**-0.5, axes=("layers", "rank", width_axis))
        zeros = jnp.zeros((layers, out, rank), jnp.float32)
        self.b = nnx.LoRAParam(zeros, axes=("layers", out_axis, "rank"))
        self.scale = alpha / rank

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., in) -> (..., out), what is to be added to W x, in the type of x."""
        return linear(self.scale * linear(x, self.a[...]), self.b[...])

    def merge(self, weight: jax.Array) -> jax.Array:
        """W (..., out, in), of a layer or of all, with the adapter in it; float32."""
        change = jnp.matmul(self.b[...], self.a[...], precision=jax.lax.Precision.HIGHEST)
        return weight.astype(jnp.float32) + self.scale * change


def make_adapters(
    blocks: Any, *, rank: int, alpha: float, targets: Sequence[str], seed: int
) -> nnx.Dict[Adapter]:
    """An adapter, which changes nothing yet, for each matrix of the blocks that `targets` names."""
    rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(seed), 2**31))  # not the draws of the base
    return nnx.Dict({name: Adapter(getattr(blocks, name), rank, alpha, rngs) for name in targets})


def with_adapters(model: Any, adapters: nnx.Dict[Adapter]) -> Any:
    """The same model, and the same arrays, with these adapters; with none it is the base."""
    model, blocks = copy.copy(model), copy.copy(model.blocks)
    blocks.adapters, model.blocks = adapters, blocks
    return model


def base_of(model: Any) -> Any:
    """The model without its adapters: what it was before training, and no copy of it."""
    return with_adapters(model, nnx.Dict())


def merge_layer(block: Any) -> Any:
    """A block of one layer with its adapters in its matrices, which are float32 then."""
    merged = copy.copy(block)
    for name, adapter in block.adapters.items():
        weight = getattr(block, name)
        setattr(merged, name, weight.replace(adapter.merge(weight[...])))
    merged.adapters = nnx.Dict()
    return merged


# --- what is trained ----------------------------------------------------------------------------


def trained_part(model: Any) -> Any:
    """What training changes: the adapters where the model has any, else all of it."""
    adapters = nnx.state(model, nnx.LoRAParam)
    return adapters if jax.tree.leaves(adapters) else model


def with_trained(model: Any, trained: Any) -> Any:
    """The model with another `trained_part`."""
    if not isinstance(trained, nnx.State):
        return trained
    graphdef, _, frozen = nnx.split(model, nnx.LoRAParam, ...)
    return nnx.merge(graphdef, trained, frozen)

"""Models and batches that are only shapes: trees of `jax.ShapeDtypeStruct`, each with the sharding
that a run would give the array. Nothing here allocates or computes.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stepwiser_jax.distributed.loading import sharding_of, shardings_of
from stepwiser_jax.distributed.mesh import batch_sharding, replicated
from stepwiser_jax.model.attention import Attention
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.lora import make_adapters, with_adapters
from stepwiser_jax.model.transformer import Transformer


def placed(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array that lies on the devices like this."""
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)


def abstract_rows(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns the shapes of what `mesh.shard_batch` makes of a batch."""
    return jax.tree.map(
        lambda leaf: placed(leaf, batch_sharding(mesh) if np.ndim(leaf) else replicated(mesh)),
        batch,
    )


def abstract_model(
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    attention: Attention,
    *,
    param_dtype: str = "float32",
    compute_dtype: str = "bfloat16",
    decoding: bool = False,
    lora: dict[str, Any] | None = None,
) -> Transformer:
    """Returns the shapes of the model that `load_model` or `load_for_training` returns."""
    model = nnx.eval_shape(
        lambda: Transformer(
            config,
            rngs=nnx.Rngs(0),
            param_dtype=jnp.dtype(param_dtype),
            compute_dtype=jnp.dtype(compute_dtype),
            attention=attention,
        )
    )
    if lora is not None:
        create = functools.partial(make_adapters, model.blocks, seed=0, **lora)
        model = with_adapters(model, nnx.eval_shape(create))
    shardings = shardings_of(model, sharding_of(config, mesh, decoding=decoding))
    return jax.tree.map(placed, model, shardings)


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes that arrays of these shapes take on each device, without padding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )

"""What XLA's CPU backend alone needs."""

from __future__ import annotations

import jax.numpy as jnp


def suffix_dtype(platform: str, compute_dtype: jnp.dtype) -> jnp.dtype:
    """Returns the type of the suffix cache. XLA's CPU backend casts a whole bfloat16 cache to
    float32 and back at every write into it."""
    return jnp.dtype("float32") if platform == "cpu" else compute_dtype

"""Sums over the bits of arrays: they tell parameters apart, and find damaged ones."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def param_hash(model: Any) -> str:
    """Returns a hash of the bits of all parameters, 12 hex digits, the same on every mesh.

    All processes must call it.
    """
    return hashlib.sha256(np.asarray(sums_of_bits(model)).tobytes()).hexdigest()[:12]


@jax.jit
def sums_of_bits(tree: Any) -> jax.Array:
    """Returns one uint32 for each array of a tree, the same on every mesh.

    It is a sum of integers, which does not depend on their order. Each element is mixed with its
    position before it is added. A change of one element always changes the sum; any other change
    does so except in one case of 2^32.
    """

    def sum_of(array: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
        position, stride = jnp.uint32(0), 1
        for axis in reversed(range(array.ndim)):
            index = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
            position += index * jnp.uint32(stride % 2**32)
            stride *= array.shape[axis]
        return jnp.sum(_mix(bits + position * jnp.uint32(0x9E3779B9)), dtype=jnp.uint32)

    return jnp.stack([sum_of(leaf) for leaf in jax.tree.leaves(tree)])


def _mix(x: jax.Array) -> jax.Array:
    """Applies the last step of MurmurHash3, which is one to one on 32 bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

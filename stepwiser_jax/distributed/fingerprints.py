"""Sums over the bits of arrays: what tells two sets of parameters apart, or a damaged one."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def fingerprint(model: Any) -> str:
    """12 hex digits of the bits of all parameters: the same on every mesh, others after any update.
    All processes must call this."""
    return hashlib.sha256(np.asarray(sums_of_bits(model)).tobytes()).hexdigest()[:12]


@jax.jit
def sums_of_bits(tree: Any) -> jax.Array:
    """One uint32 for each array of a tree, on every mesh the same: sums of integers do not depend
    on their order. Each element is mixed with its place, one to one, before it is added: a change
    of one element always changes the sum, and any other change does but for one case in 2^32."""

    def sum_of(array: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
        place, stride = jnp.uint32(0), 1
        for axis in reversed(range(array.ndim)):
            index = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
            place += index * jnp.uint32(stride % 2**32)
            stride *= array.shape[axis]
        return jnp.sum(_mixed(bits + place * jnp.uint32(0x9E3779B9)), dtype=jnp.uint32)

    return jnp.stack([sum_of(leaf) for leaf in jax.tree.leaves(tree)])


def _mixed(x: jax.Array) -> jax.Array:
    """The last step of MurmurHash3, which is one to one on 32 bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

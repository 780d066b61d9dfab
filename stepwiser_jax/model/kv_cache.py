"""Caches of keys and values: `KVCache` for prompts, `SuffixCache` for what rows sample.

All arrays of keys and values are (rows, K, capacity, H), one for each layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from stepwiser_jax.model.config import ModelConfig

Layers = tuple[jax.Array, ...]


def _zeros(config: ModelConfig, rows: int, capacity: int, dtype: jnp.dtype) -> Layers:
    shape = (rows, config.num_kv_heads, capacity, config.head_dim)
    return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Rows of different lengths: a token lies at its position in the row.

    Attributes:
        keys: (B, K, S, H) per layer.
        values: (B, K, S, H) per layer.
        length_B: the number of tokens of each row. What lies past it is masked, and overwritten
            later.
    """

    keys: Layers
    values: Layers
    length_B: jax.Array

    @classmethod
    def create(cls, config: ModelConfig, rows: int, capacity: int, dtype: jnp.dtype) -> KVCache:
        """Returns an empty cache of B = `rows` and S = `capacity`."""
        zeros = _zeros(config, rows, capacity, dtype), _zeros(config, rows, capacity, dtype)
        return cls(*zeros, jnp.zeros((rows,), jnp.int32))

    @property
    def capacity(self) -> int:
        """The most tokens that a row may have."""
        return self.values[0].shape[2]

    def write(self, cached_BKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        """Returns keys or values of a layer with T new tokens after each row's length."""

        def write_row(cached_KSH: jax.Array, new_KTH: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(cached_KSH, new_KTH, start, axis=1)

        new_BKTH = new_BTKH.swapaxes(1, 2).astype(cached_BKSH.dtype)
        return jax.vmap(write_row)(cached_BKSH, new_BKTH, self.length_B)

    def rewind(self, length_B: jax.Array) -> KVCache:
        """Returns the cache of the first `length_B` tokens of each row."""
        return dataclasses.replace(self, length_B=length_B)

    def take(self, rows_B: jax.Array) -> KVCache:
        """Returns copies of the given rows."""
        return jax.tree.map(lambda x: jnp.take(x, rows_B, axis=0), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedPrefix:
    """Prefixes that rows share: row b of B = Q * R rows continues prefix b // R.

    Attributes:
        cache: the Q prefixes; how much of each is seen, `length_B` says, and not its own lengths.
        length_B: how many tokens of its prefix each row sees.
    """

    cache: KVCache
    length_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SuffixCache:
    """The last C decode steps of all rows, in a ring.

    A step writes at the same index for all rows at once, in place. Writes at an index of each row's
    own would be scatters, which cost ten times as much as the attention over them.

    Attributes:
        keys: (B, K, C, H) per layer.
        values: (B, K, C, H) per layer.
        cursor: the index that the next step writes.
        length_B: how many of the latest steps belong to each row.
    """

    keys: Layers
    values: Layers
    cursor: jax.Array
    length_B: jax.Array

    @classmethod
    def create(cls, config: ModelConfig, rows: int, capacity: int, dtype: jnp.dtype) -> SuffixCache:
        """Returns an empty cache of B = `rows` and C = `capacity`."""
        zeros = _zeros(config, rows, capacity, dtype), _zeros(config, rows, capacity, dtype)
        return cls(*zeros, jnp.int32(0), jnp.zeros((rows,), jnp.int32))

    @property
    def visible_BC(self) -> jax.Array:
        """Which entries each row sees once the current step is written."""
        capacity = self.values[0].shape[2]
        age_C = (self.cursor - jnp.arange(capacity, dtype=jnp.int32)) % capacity
        return age_C[None] <= self.length_B[:, None]

    def write(self, cached_BKCH: jax.Array, new_B1KH: jax.Array) -> jax.Array:
        """Returns keys or values of a layer with those of the current step."""
        new_BK1H = new_B1KH.swapaxes(1, 2).astype(cached_BKCH.dtype)
        return jax.lax.dynamic_update_slice_in_dim(cached_BKCH, new_BK1H, self.cursor, axis=2)

    def step(
        self, keys: Sequence[jax.Array], values: Sequence[jax.Array], counts_B: jax.Array
    ) -> SuffixCache:
        """Returns the cache after a step, which counts for rows whose `counts_B` is 1."""
        cursor = (self.cursor + 1) % self.values[0].shape[2]
        return SuffixCache(tuple(keys), tuple(values), cursor, self.length_B + counts_B)

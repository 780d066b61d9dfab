"""Keys and values of what rows have read so far, with a write position of each row's own.

Rejecting a chunk is a rewind: `length_B` goes back, the slots past it are masked and later
overwritten. Forking is a gather of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from stepwiser_jax.model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Per layer keys (B, K, H, S) and values (B, K, S, H); row b holds `length_B[b]` tokens."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length_B: jax.Array

    @classmethod
    def create(cls, config: ModelConfig, rows: int, slots: int, dtype: jnp.dtype) -> KVCache:
        B, K, S, H = rows, config.num_kv_heads, slots, config.head_dim
        layers = range(config.num_layers)
        return cls(
            keys=tuple(jnp.zeros((B, K, H, S), dtype) for _ in layers),
            values=tuple(jnp.zeros((B, K, S, H), dtype) for _ in layers),
            length_B=jnp.zeros((rows,), jnp.int32),
        )

    @property
    def slots(self) -> int:
        return self.values[0].shape[2]

    def rewind(self, length_B: jax.Array) -> KVCache:
        """Forget what came after the first `length_B` tokens of each row."""
        return dataclasses.replace(self, length_B=length_B)

    def take(self, rows_B: jax.Array) -> KVCache:
        """Copies of the named rows: a fork."""
        return jax.tree.map(lambda x: jnp.take(x, rows_B, axis=0), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedPrefix:
    """P stored sequences that rows go on from, B / P rows each: row b sees the first `length_B[b]`
    tokens of sequence b // (B / P)."""

    cache: KVCache
    length_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SuffixCache:
    """Keys (B, K, H, C) and values (B, K, C, H) of the last C decode steps of all rows.

    Every step writes one slot, `slot`, for all rows together: in place, whereas writes at a place
    of each row's own are scatters, which cost ten times as much as the attention over them. Row b
    counts its latest `length_B[b]` slots, going back from `slot` and around the end."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    slot: jax.Array
    length_B: jax.Array

    @classmethod
    def create(cls, config: ModelConfig, rows: int, slots: int, dtype: jnp.dtype) -> SuffixCache:
        cache = KVCache.create(config, rows, slots, dtype)
        return cls(cache.keys, cache.values, jnp.int32(0), cache.length_B)

    @property
    def visible_BC(self) -> jax.Array:
        """Which slots each row sees once the current step is written."""
        slots = self.values[0].shape[2]
        age_C = (self.slot - jnp.arange(slots, dtype=jnp.int32)) % slots
        return age_C[None] <= self.length_B[:, None]

    def write(self, layer: int, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of a layer with the current step's (B, K, H, 1) and (B, K, 1, H)."""
        keys, values = self.keys[layer], self.values[layer]
        put = jax.lax.dynamic_update_slice_in_dim
        return (
            put(keys, key.astype(keys.dtype), self.slot, axis=3),
            put(values, value.astype(values.dtype), self.slot, axis=2),
        )

    def step(
        self, keys: Sequence[jax.Array], values: Sequence[jax.Array], counts_B: jax.Array
    ) -> SuffixCache:
        """After a step was written in all layers; it counts for rows where `counts_B` is 1."""
        slot = (self.slot + 1) % self.values[0].shape[2]
        return SuffixCache(tuple(keys), tuple(values), slot, self.length_B + counts_B)


def write(cache: jax.Array, new: jax.Array, start_B: jax.Array, slot_axis: int) -> jax.Array:
    """Put row b's T new entries at slots start_B[b], start_B[b] + 1, ... (start + T <= S)."""

    def write_row(row: jax.Array, new_row: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(row, new_row, start, slot_axis - 1)

    return jax.vmap(write_row)(cache, new.astype(cache.dtype), start_B)

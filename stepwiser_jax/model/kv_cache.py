"""Keys and values of what rows have read so far, with a write position of each row's own.

Rejecting a chunk is a rewind: `length_B` goes back, the slots past it are masked and later
overwritten. Forking is a gather of rows.
"""

from __future__ import annotations

import dataclasses

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


def write(cache: jax.Array, new: jax.Array, start_B: jax.Array, slot_axis: int) -> jax.Array:
    """Put row b's T new entries at slots start_B[b], start_B[b] + 1, ... (start + T <= S)."""

    def write_row(row: jax.Array, new_row: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(row, new_row, start, slot_axis - 1)

    return jax.vmap(write_row)(cache, new.astype(cache.dtype), start_B)

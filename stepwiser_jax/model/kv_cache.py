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
    """Per layer keys and values (B, K, S, H); row b holds `length_B[b]` tokens."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length_B: jax.Array

    @classmethod
    def create(cls, config: ModelConfig, rows: int, slots: int, dtype: jnp.dtype) -> KVCache:
        shape = (rows, config.num_kv_heads, slots, config.head_dim)
        return cls(
            keys=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
            values=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
            length_B=jnp.zeros((rows,), jnp.int32),
        )

    @property
    def slots(self) -> int:
        return self.keys[0].shape[2]

    def rewind(self, length_B: jax.Array) -> KVCache:
        """Forget what came after the first `length_B` tokens of each row."""
        return dataclasses.replace(self, length_B=length_B)

    def take(self, rows_B: jax.Array) -> KVCache:
        """Copies of the named rows: a fork."""
        return jax.tree.map(lambda x: jnp.take(x, rows_B, axis=0), self)


def write(cache_BKSH: jax.Array, new_BKTH: jax.Array, start_B: jax.Array) -> jax.Array:
    """Put row b's T new entries at slots start_B[b], start_B[b] + 1, ... (start + T <= S)."""

    def write_row(row_KSH: jax.Array, new_KTH: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(row_KSH, new_KTH, (0, start, 0))

    return jax.vmap(write_row)(cache_BKSH, new_BKTH, start_B)

"""Which tokens of a packed row see one another, as one int32 per token.

    0                       padding
    1 .. 65535              a document: it sees itself
    group << 16 | index     groups 1, 2, ...: index 0 is the prompt, which the whole group sees;
                            1, 2, ... are completions, which also see themselves

So the prompt of a GRPO group is stored and computed once, and short groups share a row.
"""

from __future__ import annotations

import jax


def packing_id(group: int, index: int) -> int:
    """Returns the id of the prompt (`index` 0) or of a completion (from 1) of a group (from 1)."""
    return group << 16 | index


def group_of(segment_ids: jax.Array) -> jax.Array:
    """Returns the group of each token; 0 for documents and padding."""
    return segment_ids >> 16


def is_prompt(segment_ids: jax.Array) -> jax.Array:
    """Returns whether tokens belong to the prompt of a group."""
    return (segment_ids & 0xFFFF == 0) & (segment_ids != 0)


def sees(query: jax.Array, key: jax.Array) -> jax.Array:
    """Returns whether tokens of segment `query` see those of segment `key`, if they are earlier."""
    is_own_prompt = is_prompt(key) & (group_of(query) == group_of(key))
    return (key != 0) & ((query == key) | is_own_prompt)

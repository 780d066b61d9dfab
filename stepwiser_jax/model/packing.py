"""Which tokens of a packed row see one another: one int32 per token says it all.

    0                       padding
    1 .. 65535              a document: it sees itself
    group << 16 | member    of groups 1, 2, ...: member 0 is the prompt, which all of its group see;
                            members 1, 2, ... are completions, which see themselves besides

So the prompt of a GRPO group is stored and computed once, and short groups share a row.
"""

from __future__ import annotations

import jax


def member(group: int, index: int) -> int:
    """The segment of the prompt (`index` 0) or of a completion (from 1) of a group (from 1)."""
    return group << 16 | index


def group_of(segment_ids: jax.Array) -> jax.Array:
    """0 for documents and padding."""
    return segment_ids >> 16


def is_prefix(segment_ids: jax.Array) -> jax.Array:
    """Whether tokens belong to the prompt of a group."""
    return (segment_ids & 0xFFFF == 0) & (segment_ids != 0)


def sees(query: jax.Array, key: jax.Array) -> jax.Array:
    """Whether tokens of segment `query` see those of segment `key`, their order aside."""
    is_own_prefix = is_prefix(key) & (group_of(query) == group_of(key))
    return (key != 0) & ((query == key) | is_own_prefix)

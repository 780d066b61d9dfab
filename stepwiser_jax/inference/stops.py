"""Finds the end of a row: a stop id, or a stop string across its tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stepwiser_jax.inference.params import StopReason
from stepwiser_jax.text.chunks import TokenMatcher
from stepwiser_jax.text.tokenizer import Tokenizer


class StopTables:
    """The automata that find stop strings in token ids, one for each set, built when needed."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._tables: dict[tuple[str, ...], jax.Array] = {}

    def __getitem__(self, stop_strings: tuple[str, ...]) -> jax.Array | None:
        """Returns the table (A, V) of the next state for each state and token, or None for no stop
        strings. State 0 is the start, the last state is the end of a stop string."""
        if not stop_strings:
            return None
        if self._tokenizer is None:
            raise ValueError("stop_strings need a tokenizer: Engine(model, tokenizer, ...)")
        if stop_strings not in self._tables:
            matcher = TokenMatcher.build(self._tokenizer.token_bytes(), stop_strings)
            self._tables[stop_strings] = jnp.asarray(matcher.table_AV)
        return self._tables[stop_strings]


def find_stops(
    token_B: jax.Array, state_B: jax.Array, stop_ids: jax.Array, table_AV: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Decides which rows end with the token that they sampled last.

    A row's automaton begins in state 0 after its prefix: a stop string that begins in the prefix
    and ends in the completion is not found.

    Args:
        token_B: The sampled tokens.
        state_B: The states of the rows' automata before these tokens.
        stop_ids: Tokens that end a row.
        table_AV: The automaton of `StopTables`; None if there are no stop strings.

    Returns:
        Whether each row ends; its `StopReason` if so; the states after the tokens. All are (B,).
    """
    is_id_B = jnp.any(token_B[:, None] == stop_ids[None], axis=-1)
    is_string_B = jnp.zeros_like(is_id_B)
    if table_AV is not None:
        state_B = table_AV[state_B, token_B].astype(jnp.int32)
        is_string_B = state_B == table_AV.shape[0] - 1
    reason_B = jnp.where(is_string_B, int(StopReason.STOP_STRING), int(StopReason.LENGTH))
    reason_B = jnp.where(is_id_B, int(StopReason.STOP_ID), reason_B)
    return is_id_B | is_string_B, reason_B, state_B

"""What sampler and engine share: settings, results, shapes, and when a row ends."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from stepwiser_jax.errors import UserError
from stepwiser_jax.model.decoder import Decoder, Weights
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.text.chunks import TokenMatcher
from stepwiser_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """`temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch truncation off. A row ends after a
    token of `stop_ids`, or after the token that completes one of `stop_strings`."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")


class StopReason(enum.IntEnum):
    LENGTH = 0
    STOP_ID = 1
    STOP_STRING = 2


@dataclasses.dataclass(frozen=True)
class SampleOutput:
    """Host arrays; row b's completion is its first `length_B[b]` tokens, end token included."""

    tokens_BC: np.ndarray
    logprobs_BC: np.ndarray
    length_B: np.ndarray
    stop_reason_B: np.ndarray

    @classmethod
    def empty(cls, rows: int, row_ids: Sequence[str], max_new_tokens: int) -> SampleOutput:
        """Room for the rows named. Raises ValueError unless there are `rows` different names."""
        if len(row_ids) != rows or len(set(row_ids)) != rows:
            raise ValueError(f"expected {rows} different row_ids, found {len(set(row_ids))}")
        return cls(
            np.zeros((rows, max_new_tokens), np.int32),
            np.zeros((rows, max_new_tokens), np.float32),
            np.zeros((rows,), np.int32),
            np.zeros((rows,), np.int32),
        )

    def ids(self, b: int) -> list[int]:
        return self.tokens_BC[b, : self.length_B[b]].tolist()

    def logprobs(self, b: int) -> list[float]:
        return shortest_decimals(self.logprobs_BC[b, : self.length_B[b]])


def shortest_decimals(values: np.ndarray) -> list[float]:
    """Shortest decimals that give the float32 values back."""
    return [float(str(x)) for x in values]


def probabilities(log_odds: np.ndarray) -> list[float]:
    """Of what is that much likelier than its alternative; in 64 bits, in which those near 1
    differ."""
    return (1 / (1 + np.exp(-log_odds.astype(np.float64)))).tolist()


class Shapes:
    """The allowed numbers of rows and of slots, ascending; the last bucket is the context."""

    def __init__(self, rows: Sequence[int], buckets: Sequence[int], max_length: int):
        """Raises UserError if the largest bucket exceeds `max_length`, the model's context."""
        self.rows, self.buckets = tuple(rows), tuple(buckets)
        if self.max_length > max_length:
            raise UserError(
                f"engine.buckets go up to {self.max_length} tokens, the model's context is "
                f"{max_length}: lower the largest bucket"
            )

    @property
    def max_rows(self) -> int:
        return self.rows[-1]

    @property
    def max_length(self) -> int:
        return self.buckets[-1]

    def bucket(self, length: int) -> int:
        """The smallest allowed number of slots that holds `length` tokens."""
        for bucket in self.buckets:
            if length <= bucket:
                return bucket
        raise UserError(
            f"{length} tokens exceed the context of {self.max_length} (the largest of "
            "engine.buckets): raise it, or shorten the prompt"
        )

    def rows_for(self, count: int) -> int:
        """The smallest allowed number of rows that holds `count`."""
        for rows in self.rows:
            if count <= rows:
                return rows
        raise ValueError(f"{count} rows exceed the largest batch of {self.max_rows}")


def decoding_layout(model: Transformer | Decoder, weights: Weights = "model") -> Decoder:
    """Returns a decoder of the model; itself if it is one. Raises ValueError if it is one with
    other weights."""
    if not isinstance(model, Decoder):
        return Decoder.from_transformer(model, weights)
    if model.weights != weights:
        raise ValueError(
            f"expected a model with weights {weights!r}, found one with {model.weights!r}"
        )
    return model


class StopTables:
    """The automata of sets of stop strings over token ids, built once each."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._tables: dict[tuple[str, ...], jax.Array] = {}

    def __getitem__(self, stop_strings: tuple[str, ...]) -> jax.Array | None:
        """The table (states, V) whose last state is the end of a stop string; None for none."""
        if not stop_strings:
            return None
        if self._tokenizer is None:
            raise ValueError("stop_strings need a tokenizer: Sampler(model, tokenizer, ...)")
        if stop_strings not in self._tables:
            matcher = TokenMatcher.build(self._tokenizer.token_bytes(), stop_strings)
            self._tables[stop_strings] = jnp.asarray(matcher.table_AV)
        return self._tables[stop_strings]


def find_stops(
    token_B: jax.Array, match_B: jax.Array, stop_ids: jax.Array, table_SV: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(does the row end with this token, why, the automaton's state after it), each (B,)."""
    is_id_B = jnp.any(token_B[:, None] == stop_ids[None], axis=-1)
    is_string_B = jnp.zeros_like(is_id_B)
    if table_SV is not None:
        match_B = table_SV[match_B, token_B].astype(jnp.int32)
        is_string_B = match_B == table_SV.shape[0] - 1
    reason_B = jnp.where(is_string_B, int(StopReason.STOP_STRING), int(StopReason.LENGTH))
    reason_B = jnp.where(is_id_B, int(StopReason.STOP_ID), reason_B)
    return is_id_B | is_string_B, reason_B, match_B

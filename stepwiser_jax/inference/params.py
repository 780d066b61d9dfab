"""What goes into the engine and comes out: settings, requests and completions. Then what the engine
is made of: shapes, counts, and the tests whether a row ends."""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from stepwiser_jax.errors import UserError
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.decoder import Decoder, Weights
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.runs.compilation import compiling
from stepwiser_jax.text.chunks import TokenMatcher
from stepwiser_jax.text.tokenizer import Tokenizer, unknown_ids


@dataclass(frozen=True)
class SamplingParams:
    """How a row is sampled, and when it ends.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch truncation off. A row ends after a
    token of `stop_ids`, after a token that completes one of `stop_strings`, or after
    `max_new_tokens` tokens."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")


@dataclass(frozen=True)
class SampleRequest:
    """One sample: it continues the first `num_tokens` tokens of its prefix by at most
    `max_new_tokens` tokens. `row_id` seeds its noise."""

    row_id: str
    num_tokens: int
    max_new_tokens: int


@dataclass(frozen=True)
class Prefix:
    """A token sequence that is prefilled once, and the samples that continue it."""

    ids: Sequence[int]
    samples: Sequence[SampleRequest]

    @property
    def num_tokens(self) -> int:
        """The number of tokens that its samples continue at most; the rest is not prefilled."""
        return max(sample.num_tokens for sample in self.samples)


class StopReason(enum.IntEnum):
    LENGTH = 0
    STOP_ID = 1
    STOP_STRING = 2


@dataclass(frozen=True, eq=False)
class Completion:
    """What one row sampled: `tokens` (int32), the end token included, and the log-prob of each
    (float32) under the distribution that it was sampled from."""

    row_id: str
    tokens: np.ndarray
    logprobs: np.ndarray
    stop_reason: StopReason


def check_row_ids(row_ids: Sequence[str], count: int) -> None:
    """Raises ValueError unless there are `count` different row ids."""
    if len(row_ids) != count or len(set(row_ids)) != count:
        raise ValueError(f"expected {count} different row_ids, found {len(set(row_ids))}")


def probabilities(log_odds: np.ndarray) -> list[float]:
    """Returns the sigmoid of log-odds, in float64, so that values near 1 stay distinct."""
    return (1 / (1 + np.exp(-log_odds.astype(np.float64)))).tolist()


# --- what the engine is made of -------------------------------------------------------------------


class Shapes:
    """The numbers of rows and of tokens that may be compiled, ascending. The largest number of
    tokens is the context.

    Raises:
        UserError: The context is longer than that of the model, `max_length`.
    """

    def __init__(self, rows: Sequence[int], buckets: Sequence[int], max_length: int):
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
        """Returns the smallest allowed length that holds `length` tokens."""
        for bucket in self.buckets:
            if length <= bucket:
                return bucket
        raise UserError(
            f"{length} tokens exceed the context of {self.max_length} (the largest of "
            "engine.buckets): raise it, or shorten the prompt"
        )

    def rows_for(self, count: int) -> int:
        """Returns the smallest allowed number of rows that holds `count`."""
        for rows in self.rows:
            if count <= rows:
                return rows
        raise ValueError(f"{count} rows exceed the largest batch of {self.max_rows}")

    def check_length(self, num_tokens: int, max_new_tokens: int, name: str) -> None:
        """Raises UserError, with the prompt's name, if a prompt of `num_tokens` tokens is empty or
        does not fit the context together with its completion."""
        if num_tokens < 1:
            raise UserError(f"{name}: expected a prompt of at least one token, found none")
        if num_tokens + max_new_tokens > self.max_length:
            raise UserError(
                f"{name}: prompt of {num_tokens} tokens + max_new_tokens {max_new_tokens} exceeds "
                f"the context of {self.max_length} (the largest of engine.buckets): raise it, "
                "lower max_new_tokens, or leave the item out"
            )


@dataclass
class Usage:
    """What was done so far: calls by compiled shape, and tokens sampled."""

    compiled_shapes: Counter[str] = dataclasses.field(default_factory=Counter)
    sampled_tokens: int = 0

    def calling(self, shape: str) -> AbstractContextManager[None]:
        """Returns a context for the call of a program that is compiled once for `shape`."""
        self.compiled_shapes[shape] += 1
        return compiling(shape)


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Raises ValueError if a model would sample ids that the tokenizer does not know."""
    if tokenizer is None:
        return
    unknown = unknown_ids(tokenizer, config.vocab_size)
    if unknown != config.unknown_ids:
        raise ValueError(
            f"expected a model that knows the ids without a token, {unknown}, found one with "
            f"{config.unknown_ids}: load it with load_hf(path, tokenizer=tokenizer)"
        )


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

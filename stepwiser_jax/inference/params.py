"""What goes into the engine and comes out: settings, requests and completions."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stepwiser_jax.model.flops import NOTHING, Spent


@dataclass(frozen=True)
class SamplingParams:
    """How a row is sampled, and when it ends.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch truncation off. A row ends after a
    token of `stop_ids`, after a token that completes one of `stop_strings`, or after
    `max_new_tokens` tokens. `compared` are two tokens whose log-odds the engine records;
    the chunk sampler and a server record none."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    compared: tuple[int, int] | None = None

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
    (float32) under the distribution that it was sampled from. With `SamplingParams.compared` (a, b)
    it has the `log_odds` at each token, log P(a) - log P(b) (float32), of the model itself: neither
    temperature nor truncation changes them. `spent` is what it cost; the first sample of a prefix
    pays for reading it."""

    row_id: str
    tokens: np.ndarray
    logprobs: np.ndarray
    stop_reason: StopReason
    log_odds: np.ndarray | None = None
    spent: Spent = NOTHING


def check_row_ids(row_ids: Sequence[str], count: int) -> None:
    """Raises ValueError unless there are `count` different row ids."""
    if len(row_ids) != count or len(set(row_ids)) != count:
        raise ValueError(f"expected {count} different row_ids, found {len(set(row_ids))}")


def probabilities(log_odds: np.ndarray) -> list[float]:
    """Returns the sigmoid of log-odds, in float64, so that values near 1 stay distinct."""
    return (1 / (1 + np.exp(-log_odds.astype(np.float64)))).tolist()

"""The shapes that the engine's programs may be compiled for, and how often each ran."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from stepwiser_jax.errors import UserError
from stepwiser_jax.model.flops import NOTHING, Spent
from stepwiser_jax.runs.compilation import compiling


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
    """What was done so far: calls by compiled shape, and tokens and FLOPs."""

    compiled_shapes: Counter[str] = dataclasses.field(default_factory=Counter)
    spent: Spent = NOTHING

    def calling(self, shape: str) -> AbstractContextManager[None]:
        """Returns a context for the call of a program that is compiled once for `shape`."""
        self.compiled_shapes[shape] += 1
        return compiling(shape)

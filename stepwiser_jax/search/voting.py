"""Chooses one solution, or one answer, of several by the scores of their chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "mean": fmean,
    "last": lambda scores: scores[-1],
    "product": math.prod,
}
"""Functions from the scores of a solution's chunks, at least one, to its score (Lightman et al.
2023; Snell et al. 2024)."""


def best(scores: Sequence[float]) -> int:
    """Returns the index of the highest score, the first of equals."""
    return max(range(len(scores)), key=scores.__getitem__)


def vote(answers: Sequence[str], weights: Sequence[float] | None = None) -> str:
    """Returns the answer with the largest sum of weights (1 each by default), the first of equals.
    An empty answer has no vote; if all are empty, so is the result."""
    votes: dict[str, float] = {}
    for answer, weight in zip(answers, weights or [1.0] * len(answers), strict=True):
        if answer:
            votes[answer] = votes.get(answer, 0.0) + weight
    return max(votes, key=votes.__getitem__, default="")

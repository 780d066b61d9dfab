"""One solution, or one answer, of several: by what a judge thought of their chunks."""

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
"""The score of a solution, from those of its chunks, which are at least one (Lightman et al. 2023;
Snell et al. 2024)."""


def best(scores: Sequence[float]) -> int:
    """Index of the highest, the earliest of equals."""
    return max(range(len(scores)), key=scores.__getitem__)


def vote(answers: Sequence[str], weights: Sequence[float] | None = None) -> str:
    """The answer with the largest sum of weights (each 1 by default), the earliest of equals. An
    empty answer has no vote; empty where all are."""
    votes: dict[str, float] = {}
    for answer, weight in zip(answers, weights or [1.0] * len(answers), strict=True):
        if answer:
            votes[answer] = votes.get(answer, 0.0) + weight
    return max(votes, key=votes.__getitem__, default="")

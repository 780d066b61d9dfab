"""The items that each number of the comparison is made of, and the number that they give.

A number is named `<kind>/<row>`. Its items are resampled by how often each is drawn, so that the
same draws serve both sides of a claim:

    judge, greedy    a solution: (has an error, the first error is found)      -> official F1
    auc              a solution: P(Positive) of its right steps, and of its first error
                                                                               -> area under the ROC
    labels           a problem: wrong chunks, those of them with a negative label, right chunks,
                     those of them with a positive one                         -> balanced accuracy
    reward           an iteration: its mean reward                             -> mean
    search, selection    a problem: the share of right answers                 -> mean
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stepwiser_jax.evaluation.auc import auc
from stepwiser_jax.evaluation.processbench import harmonic_mean
from stepwiser_jax.evaluation.statistics import multiplicities

Statistic = Callable[[np.ndarray], np.ndarray]
"""How often each item is drawn (resamples, items) -> the number of each resample."""


def statistic_of(name: str, items: Sequence[Any]) -> Statistic:
    """Returns the statistic of a number's items."""
    return STATISTICS[name.split("/")[0]](items)


def value_of(name: str, items: Sequence[Any]) -> float:
    """Returns a number from its items."""
    return float(statistic_of(name, items)(np.ones((1, len(items)), int))[0])


def interval_of(name: str, items: Sequence[Any], samples: int = 1000) -> list[float]:
    """Returns the 95% bootstrap interval of a number over its items."""
    draws = multiplicities(len(items), samples, np.random.default_rng(0))
    return np.quantile(statistic_of(name, items)(draws), [0.025, 0.975]).tolist()


def mean(items: Sequence[float]) -> Statistic:
    values = np.asarray(items, float)
    return lambda draws: draws @ values / draws.sum(axis=1)


def f1(items: Sequence[Sequence[bool]]) -> Statistic:
    """Returns ProcessBench's F1: the harmonic mean of the accuracies on solutions with an error and
    on those without. That of no solution is 0."""
    has_error, is_found = np.asarray(items, bool).T

    def accuracy(draws: np.ndarray, of: np.ndarray) -> np.ndarray:
        return draws @ (of & is_found) / np.maximum(1, draws @ of)

    return lambda draws: harmonic_mean(accuracy(draws, has_error), accuracy(draws, ~has_error))


def balanced_accuracy(items: Sequence[Sequence[int]]) -> Statistic:
    """Returns the mean of the accuracies on right and on wrong chunks. That of no chunk is 0."""

    def accuracy(draws: np.ndarray) -> np.ndarray:
        wrong, caught, right, kept = (draws @ np.asarray(items)).T
        return (caught / np.maximum(1, wrong) + kept / np.maximum(1, right)) / 2

    return accuracy


def step_auc(items: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Statistic:
    """Returns the AUC of steps, see `evaluation.auc`."""
    steps = [
        (number, p, is_right)
        for number, item in enumerate(items)
        for is_right, of_kind in zip((True, False), item, strict=True)
        for p in of_kind
    ]
    item_of_step, scores, is_right = map(np.array, zip(*steps, strict=True))
    return lambda draws: auc(scores, is_right, draws[:, item_of_step])


STATISTICS: dict[str, Callable[[Any], Statistic]] = {
    "judge": f1,
    "greedy": f1,
    "auc": step_auc,
    "labels": balanced_accuracy,
    "reward": mean,
    "search": mean,
    "selection": mean,
}
"""The statistic of each kind of number."""

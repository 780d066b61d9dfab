"""How well scores tell wrong steps from right ones, whatever the threshold: the area under the ROC.

AUC is the probability that a first error has a lower score than a right step, both drawn at random;
equal scores count half. Steps after a first error are neither. PRMBench says of each step whether
it is wrong, so all its steps count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stepwiser_jax.evaluation.statistics import bootstrap_interval
from stepwiser_jax.records import BenchmarkItem, ProcessBenchItem

CHANCE = 0.5
"""AUC of scores that say nothing, and where there are no errors or no right steps."""


def wrong_steps(item: BenchmarkItem) -> Sequence[int]:
    """Returns the steps that count as wrong."""
    if not isinstance(item, ProcessBenchItem):
        return item.wrong_steps
    return () if item.first_error == -1 else (item.first_error,)


def make_auc(
    items: Sequence[BenchmarkItem], scores: Sequence[Sequence[float]], groups: np.ndarray
) -> Callable[[np.ndarray], float]:
    """Returns a function from rows, some of them maybe several times, to the AUC of these items: an
    average over groups.

    Args:
        items: Solutions with their wrong steps.
        scores: The score of each step, [item][step].
        groups: The group of each item.
    """
    counted = [
        (row, score, step in wrong_steps(item))
        for row, (item, of_item) in enumerate(zip(items, scores, strict=True))
        for step, score in enumerate(of_item)
        if item.is_right(step) or step in wrong_steps(item)
    ]
    columns = [np.array(column) for column in zip(*counted, strict=True)] or [np.zeros(0)] * 3
    row, score, is_wrong = columns[0].astype(int), columns[1], columns[2].astype(bool)
    _, level = np.unique(score, return_inverse=True)

    def auc(rows: np.ndarray) -> float:
        weight = np.bincount(rows, minlength=len(items))[row]
        found = []
        for group in np.unique(groups[rows]):
            is_counted = groups[row] == group
            errors, right = (
                np.bincount(level[chosen], weight[chosen], minlength=1 + level.max(initial=0))
                for chosen in (is_counted & is_wrong, is_counted & ~is_wrong)
            )
            pairs = errors.sum() * right.sum()
            ordered = right @ (np.cumsum(errors) - errors / 2)
            found.append(ordered / pairs if pairs else CHANCE)
        return float(np.mean(found))

    return auc


def score_auc(
    items: Sequence[BenchmarkItem],
    scores: Sequence[Sequence[float]],
    groups: np.ndarray,
    *,
    seed: int,
    strata: np.ndarray | None = None,
) -> dict[str, Any]:
    """Returns `auc`, an average over groups, with its 95% interval over items, see `make_auc`. Each
    stratum, by default a group, keeps its size in every resample."""
    auc, rows = make_auc(items, scores, groups), np.arange(len(items))
    interval = bootstrap_interval(rows, auc, seed=seed, strata=groups if strata is None else strata)
    return {"auc": auc(rows), "auc_interval": interval}

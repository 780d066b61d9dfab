"""How well scores tell wrong steps from right ones, whatever the threshold: the area under the ROC.

Of a benchmark's steps the first errors are wrong; steps after a first error are neither wrong nor
right. PRMBench says of each step whether it is wrong, so all its steps count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from stepwiser_jax.evaluation.statistics import bootstrap_interval
from stepwiser_jax.records import BenchmarkItem, ProcessBenchItem

CHANCE = 0.5
"""AUC of scores that say nothing, and where there are no errors or no right steps."""


def auc(scores: ArrayLike, is_right: ArrayLike, times: ArrayLike = 1) -> np.ndarray:
    """Returns the probability that a wrong step, drawn at random, has a lower score than a right
    one; equal scores count half. It is `CHANCE` without steps of both kinds, and NaN if a score is.

    Args:
        scores: The score of each step, (steps,).
        is_right: Whether each step is right, (steps,).
        times: How often each step counts, (..., steps): once, or as often as each of several
            resamples has it.

    Returns:
        An AUC for each resample, (...).
    """
    scores, is_right = np.asarray(scores, float), np.asarray(is_right, bool)
    times = np.broadcast_to(times, (*np.shape(times)[:-1], len(scores)))
    wrong = np.flatnonzero(~is_right)
    wrong = wrong[np.argsort(scores[wrong])]
    # How often the n wrong steps with the lowest scores count together, for each n.
    lowest = np.cumsum(np.insert(times[..., wrong], 0, 0, axis=-1), axis=-1)
    below, up_to = (
        lowest[..., np.searchsorted(scores[wrong], scores[is_right], side)]
        for side in ("left", "right")
    )
    right = times[..., is_right]
    ordered = np.sum(right * (below + up_to), axis=-1) / 2
    pairs = right.sum(axis=-1) * lowest[..., -1]
    known = np.where(pairs > 0, ordered / np.maximum(1, pairs), CHANCE)
    return np.where(np.isnan(scores).any(), np.nan, known)


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
        (row, score, step not in wrong_steps(item))
        for row, (item, of_item) in enumerate(zip(items, scores, strict=True))
        for step, score in enumerate(of_item)
        if item.is_right(step) or step in wrong_steps(item)
    ]
    columns = [np.array(column) for column in zip(*counted, strict=True)] or [np.zeros(0)] * 3
    row, score, is_right = columns[0].astype(int), columns[1], columns[2].astype(bool)
    of_group = {group: np.flatnonzero(groups[row] == group) for group in np.unique(groups)}

    def of_rows(rows: np.ndarray) -> float:
        times = np.bincount(rows, minlength=len(items))[row]
        steps = [of_group[group] for group in np.unique(groups[rows])]
        return float(np.mean([auc(score[s], is_right[s], times[s]) for s in steps]))

    return of_rows


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
    of_rows, rows = make_auc(items, scores, groups), np.arange(len(items))
    strata = groups if strata is None else strata
    interval = bootstrap_interval(rows, of_rows, seed=seed, strata=strata)
    return {"auc": of_rows(rows), "auc_interval": interval}

"""How well scores tell wrong steps from right ones, whatever the threshold: the area under the ROC.

Of a benchmark's steps the first errors are wrong; steps after a first error are neither wrong nor
right. PRMBench says of each step whether it is wrong, so all its steps count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from stepwiser_jax.evaluation.statistics import Statistic, bootstrap_interval, observed
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


def scores_by_truth(
    items: Sequence[BenchmarkItem], scores: Sequence[Sequence[float]]
) -> list[tuple[list[float], list[float]]]:
    """Returns for each item the scores of its right steps, and of its wrong ones, from the score of
    each step, [item][step]."""
    return [
        (
            [score for step, score in enumerate(of_item) if item.is_right(step)],
            [score for step, score in enumerate(of_item) if step in wrong_steps(item)],
        )
        for item, of_item in zip(items, scores, strict=True)
    ]


def step_auc(
    scores: Sequence[tuple[Sequence[float], Sequence[float]]], groups: np.ndarray
) -> Statistic:
    """Returns the AUC of items' steps, an average over groups.

    Args:
        scores: For each item the scores of its right steps, and of its wrong ones.
        groups: The group of each item, (items,).
    """
    steps = [
        (number, score, is_right)
        for number, item in enumerate(scores)
        for is_right, of_kind in zip((True, False), item, strict=True)
        for score in of_kind
    ]
    item_of_step, score, is_right = np.reshape(steps, (-1, 3)).T
    rows = item_of_step.astype(int)
    of_groups = [np.flatnonzero(groups[rows] == group) for group in np.unique(groups)]
    return lambda times: np.mean(
        [auc(score[s], is_right[s], times[:, rows[s]]) for s in of_groups], axis=0
    )


def score_auc(
    items: Sequence[BenchmarkItem],
    scores: Sequence[Sequence[float]],
    groups: np.ndarray,
    *,
    seed: int,
    strata: np.ndarray | None = None,
) -> dict[str, Any]:
    """Returns the AUC of `step_auc`, with its 95% interval over items. Each stratum, by default a
    group, keeps its size in every resample."""
    statistic = step_auc(scores_by_truth(items, scores), groups)
    interval = bootstrap_interval(statistic, groups if strata is None else strata, seed=seed)
    return {"auc": observed(statistic, len(items)), "auc_interval": interval}

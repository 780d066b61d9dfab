"""Scores of judgments of whole solutions, as in ThinkPRM's tables.

Solutions without an error are the positive class. The paper does not name its class, but its random
baselines (39.1 on OlympiadBench and 32.7 on Omni-MATH, of which about 34% and 24% are correct) are
those of this one. This F1 is binary, unlike ProcessBench's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stepwiser_jax.evaluation.processbench import (
    average_over_subsets,
    harmonic_mean,
    subset_indices,
    subset_names,
)
from stepwiser_jax.evaluation.statistics import Statistic, bootstrap_interval, observed
from stepwiser_jax.records import ProcessBenchItem

OUTCOME = np.dtype([("subset", int), ("is_correct", bool), ("is_accepted", bool)])
SCORES = ("binary_f1", "precision", "recall", "accuracy")


def solution_scores(outcomes: np.ndarray) -> Statistic:
    """Returns `SCORES`, (resamples, 4), of an array of `OUTCOME`, averaged over subsets. Undefined
    ones are 0."""

    def scores(counts: np.ndarray) -> list[np.ndarray]:
        hits = counts[..., 1, 1]
        precision = hits / np.maximum(1, counts[..., 1].sum(axis=-1))
        recall = hits / np.maximum(1, counts[..., 1, :].sum(axis=-1))
        accuracy = (counts[..., 0, 0] + hits) / np.maximum(1, counts.sum(axis=(-2, -1)))
        return [harmonic_mean(precision, recall), precision, recall, accuracy]

    return average_over_subsets(outcomes, scores)


def solutions_by_subset(
    items: Sequence[ProcessBenchItem],
    p_correct: Sequence[float],
    bad_outputs: Sequence[float],
    *,
    seed: int,
) -> dict[str, Any]:
    """Returns the scores of each subset and their plain average, with 95% intervals.

    Args:
        items: Solutions with their first errors.
        p_correct: The probability that each solution is right; it is accepted from 1/2 on.
        bad_outputs: The share of bad outputs about each solution.
        seed: Seeds the bootstrap.
    """
    subset = subset_indices(items)
    outcomes = np.zeros(len(items), OUTCOME)
    outcomes["subset"] = subset
    outcomes["is_correct"] = [item.first_error == -1 for item in items]
    outcomes["is_accepted"] = np.asarray(p_correct) >= 0.5
    bad = np.asarray(bad_outputs)

    def scores(rows: np.ndarray) -> dict[str, Any]:
        statistic, strata = solution_scores(outcomes[rows]), subset[rows]
        values = observed(statistic, len(rows))
        bad_of_subset = [bad[rows][strata == s].mean() for s in np.unique(strata)]
        intervals = bootstrap_interval(statistic, strata, seed=seed)
        return {
            **dict(zip(SCORES, values, strict=True)),
            "bad_outputs": float(np.mean(bad_of_subset)),
            "binary_f1_interval": intervals[SCORES.index("binary_f1")],
            "accuracy_interval": intervals[SCORES.index("accuracy")],
        }

    return {
        "subsets": {
            name: scores(np.flatnonzero(subset == s)) for s, name in enumerate(subset_names(items))
        },
        "average": scores(np.arange(len(items))),
    }

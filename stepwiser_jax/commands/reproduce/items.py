"""The items that each number of the comparison is made of, and the number that they give.

A number is named `<kind>/<row>`. Its items are resampled by how often each is drawn, so that the
same draws serve both sides of a claim:

    judge, greedy    a solution: (has an error, the first error is found)      -> official F1
    auc              a solution: P(Positive) of its right steps, and of its first error
                                                                               -> area under the ROC
    labels           a problem: wrong chunks, those of them with a negative label, right chunks,
                     those of them with a positive one                         -> balanced accuracy
    search, selection    a problem: the share of right answers                 -> mean
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stepwiser_jax.evaluation.auc import step_auc
from stepwiser_jax.evaluation.processbench import OUTCOME, f1_scores
from stepwiser_jax.evaluation.statistics import (
    Statistic,
    bootstrap_interval,
    first,
    label_scores,
    mean,
    observed,
)


def statistic_of(name: str, items: Sequence[Any]) -> Statistic:
    """Returns the statistic of a number's items."""
    return STATISTICS[name.split("/")[0]](items)


def value_of(name: str, items: Sequence[Any]) -> float:
    """Returns a number from its items."""
    return observed(statistic_of(name, items), len(items))


def interval_of(name: str, items: Sequence[Any]) -> list[float]:
    """Returns the 95% bootstrap interval of a number over its items."""
    return bootstrap_interval(statistic_of(name, items), np.zeros(len(items)), seed=0)


def f1(items: Sequence[Sequence[bool]]) -> Statistic:
    """Returns ProcessBench's F1."""
    return first(f1_scores(np.array([(0, *item) for item in items], OUTCOME)))


STATISTICS: dict[str, Callable[[Any], Statistic]] = {
    "judge": f1,
    "greedy": f1,
    "auc": lambda items: step_auc(items, np.zeros(len(items))),
    "labels": lambda items: first(label_scores(items)),
    "search": mean,
    "selection": mean,
}
"""The statistic of each kind of number."""

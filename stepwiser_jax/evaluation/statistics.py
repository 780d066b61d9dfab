"""Confidence intervals, paired tests, and the shares that they are computed from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from stepwiser_jax.records import Trajectory, natural_key


def bootstrap_interval(
    items: Sequence[Any] | np.ndarray,
    statistic: Callable[[Any], Any],
    *,
    seed: int,
    strata: Sequence[Any] | np.ndarray | None = None,
    samples: int = 1000,
    level: float = 0.95,
) -> list[Any]:
    """Returns the percentile bootstrap interval [low, high] of a statistic.

    `scipy.stats.bootstrap` refuses a stratum of one item, which small benchmarks have.

    Args:
        items: One entry per item; a resample is an array if this is one, else a list.
        statistic: Function of a resample. If it returns n values, there are n intervals.
        seed: Seeds the resamples.
        strata: The stratum of each item. Each stratum keeps its size in every resample.
        samples: Number of resamples.
        level: Confidence level.
    """

    def take(rows: np.ndarray) -> Any:
        return items[rows] if isinstance(items, np.ndarray) else [items[i] for i in rows]

    values = [statistic(take(rows)) for rows in _resamples(len(items), strata, samples, seed)]
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0).T.tolist()


def _resamples(
    count: int, strata: Sequence[Any] | np.ndarray | None, samples: int, seed: int
) -> Iterator[np.ndarray]:
    """Yields the row indices of each resample."""
    rng = np.random.default_rng(seed)
    stratum_of_row = np.zeros(count, int) if strata is None else np.asarray(strata)
    members = [np.flatnonzero(stratum_of_row == s) for s in np.unique(stratum_of_row)]
    for _ in range(samples):
        yield np.concatenate([rng.choice(rows, len(rows)) for rows in members])


@dataclass(frozen=True)
class Difference:
    """A difference, its percentile interval, and the two-sided p-value of no difference."""

    value: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    a: np.ndarray,
    b: np.ndarray,
    statistic: Callable[[np.ndarray], float],
    *,
    seed: int,
    strata: np.ndarray | None = None,
    samples: int = 10_000,
    level: float = 0.95,
) -> Difference:
    """Returns `statistic(b) - statistic(a)` with a bootstrap over pairs.

    Row i of `a` and `b` is the same item, and every resample draws the same items for both. p is
    the smallest level at which the interval touches 0: twice the smaller share of resampled
    differences on either side of 0. A difference of 0 counts on both sides, and the observed one
    counts as one more, so that p is never 0.
    """
    differences = np.array(
        [
            statistic(b[rows]) - statistic(a[rows])
            for rows in _resamples(len(a), strata, samples, seed)
        ]
    )
    return _difference(float(statistic(b) - statistic(a)), differences, level)


def _difference(value: float, resampled: np.ndarray, level: float) -> Difference:
    """Returns an observed difference with what its resamples say of it."""
    tail = int(min(np.sum(resampled <= 0), np.sum(resampled >= 0)))
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    p = min(1.0, 2 * (1 + tail) / (1 + len(resampled)))
    return Difference(value, float(low), float(high), p)


def multiplicities(items: int, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Returns how often each item is in each resample of as many items: (samples, items)."""
    drawn = rng.integers(items, size=(samples, items)) + items * np.arange(samples)[:, None]
    return np.bincount(drawn.ravel(), minlength=samples * items).reshape(samples, items)


def hierarchical_bootstrap(
    differences: Sequence[Callable[[np.ndarray], np.ndarray]],
    items: Sequence[int],
    *,
    seed: int,
    samples: int = 10_000,
    level: float = 0.95,
) -> Difference:
    """Returns the mean over seeds of a paired difference, with a bootstrap over seeds and items.

    A resample draws as many seeds as there are, with replacement, and within each of them its
    items, so that the noise of trainings and that of test items are both in the interval and in p.
    p is that of `paired_bootstrap`.

    Args:
        differences: For each seed, a function of how often each item is in each resample
            (resamples, items). It returns each resample's difference.
        items: The number of items of each seed.
        seed: Seeds the resamples.
        samples: Number of resamples.
        level: Confidence level.
    """
    rng, count = np.random.default_rng(seed), len(differences)
    drawn = rng.integers(count, size=(samples, count))
    found = np.zeros((samples, count))
    for s, (difference, size) in enumerate(zip(differences, items, strict=True)):
        found[drawn == s] = difference(multiplicities(size, int(np.sum(drawn == s)), rng))
    resampled = found.mean(axis=1)
    observed = [
        float(difference(np.ones((1, size), int))[0])
        for difference, size in zip(differences, items, strict=True)
    ]
    return _difference(float(np.mean(observed)), resampled, level)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values as Holm's step-down method corrects them for being several: a claim
    whose corrected p is below 0.05 is wrong with a probability of 0.05 for all claims together."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def mcnemar(only_a: int, only_b: int) -> float:
    """Returns the exact two-sided p-value of McNemar's test, from the numbers of items on which
    one judge alone is right."""
    return float(binomtest(only_a, max(1, only_a + only_b)).pvalue)


def accuracy(right: Sequence[float], *, seed: int) -> dict[str, Any]:
    """Returns the mean of each problem's share of right answers, with its 95% interval over
    problems."""
    return {
        "accuracy": float(np.mean(right)),
        "accuracy_interval": bootstrap_interval(np.asarray(right), np.mean, seed=seed),
    }


def right_by_problem(trajectories: Sequence[Trajectory]) -> list[float]:
    """Returns each problem's share of right trajectories, ordered by id, so that the order does
    not depend on which worker wrote which part."""
    right: dict[str, list[bool]] = defaultdict(list)
    for trajectory in sorted(trajectories, key=lambda t: natural_key(t.trajectory_id)):
        right[trajectory.problem_id].append(trajectory.is_correct)
    return [sum(found) / len(found) for found in right.values()]


def balanced_accuracy(labels: Sequence[bool], truths: Sequence[bool]) -> dict[str, float]:
    """Returns the mean of the accuracies on right and on wrong chunks, with precision and recall
    of the negative labels. A fraction of no chunks is 0."""
    pairs = list(zip(labels, truths, strict=True))
    caught = pairs.count((False, False))
    wrong = sum(not truth for _, truth in pairs)
    recall = caught / max(1, wrong)
    right_accuracy = pairs.count((True, True)) / max(1, len(pairs) - wrong)
    return {
        "balanced_accuracy": (recall + right_accuracy) / 2,
        "negative_precision": caught / max(1, sum(not label for label, _ in pairs)),
        "negative_recall": recall,
    }

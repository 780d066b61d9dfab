"""Confidence intervals, paired tests, and the shares that they are computed from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, ttest_1samp

from stepwiser_jax.records import Trajectory, natural_key

Statistic = Callable[[np.ndarray], np.ndarray]
"""A function of how often each item is drawn, (resamples, items). It returns the value of each
resample, (resamples,), or its values, (resamples, n)."""

RESAMPLES_AT_ONCE = 100
"""Resamples of a benchmark's 80,000 steps, that many at a time, take 64 MB."""


def observed(statistic: Statistic, items: int) -> Any:
    """Returns the value, or the list of n values, of the items themselves: each counts once."""
    return statistic(np.ones((1, items), int))[0].tolist()


def mean(values: ArrayLike) -> Statistic:
    """Returns the mean of the items' values, (items,)."""
    column = np.asarray(values, float)
    return lambda times: times @ column / times.sum(axis=1)


def sums(values: np.ndarray, groups: np.ndarray) -> Statistic:
    """Returns the sums over each group, (resamples, groups, ...), of the items' values,
    (items, ...). Groups are in ascending order of the items' `groups`, (items,)."""
    is_in_group = (groups[:, None] == np.unique(groups)).astype(float)
    values_of_group = np.einsum("ig,i...->ig...", is_in_group, values)
    return lambda times: np.tensordot(times, values_of_group, 1)


def first(statistic: Statistic) -> Statistic:
    """Returns the first value of a statistic of several."""
    return lambda times: statistic(times)[:, 0]


def multiplicities(strata: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Returns how often each item is in each resample, (samples, items), in which each stratum of
    items, (items,), keeps its size."""
    times = np.empty((samples, len(strata)), int)
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        drawn = rng.integers(len(rows), size=(samples, len(rows)))
        drawn += len(rows) * np.arange(samples)[:, None]
        times[:, rows] = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
    return times


def _resampled(
    statistic: Statistic, strata: np.ndarray, samples: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns the statistic of each resample, (samples,) or (samples, n)."""
    sizes = [min(RESAMPLES_AT_ONCE, samples - i) for i in range(0, samples, RESAMPLES_AT_ONCE)]
    return np.concatenate([statistic(multiplicities(strata, size, rng)) for size in sizes])


def _interval(resampled: np.ndarray) -> list[Any]:
    return np.quantile(resampled, [0.025, 0.975], axis=0).T.tolist()


def bootstrap_interval(
    statistic: Statistic, strata: np.ndarray, *, seed: int, samples: int = 1000
) -> list[Any]:
    """Returns the 95% percentile bootstrap interval [low, high] of a statistic, or one for each of
    its values, [n][2].

    `scipy.stats.bootstrap` refuses a stratum of one item, which small benchmarks have.

    Args:
        statistic: Function of how often each item is drawn, see `Statistic`.
        strata: The stratum of each item, (items,). Each stratum keeps its size in every resample.
        seed: Seeds the resamples.
        samples: Number of resamples.
    """
    return _interval(_resampled(statistic, strata, samples, np.random.default_rng(seed)))


@dataclass(frozen=True)
class Difference:
    """A difference, its 95% percentile interval, and the two-sided p-value of no difference."""

    value: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    a: Statistic, b: Statistic, strata: np.ndarray, *, seed: int, samples: int = 10_000
) -> Difference:
    """Returns `b - a` with a bootstrap over pairs.

    Both are statistics of the same items, and every resample draws the same items for both. p is
    the smallest level at which the interval touches 0: twice the smaller share of resampled
    differences on either side of 0. A difference of 0 counts on both sides, and the observed one
    counts as one more, so that p is never 0. The other arguments are those of `bootstrap_interval`.
    """
    value = observed(b, len(strata)) - observed(a, len(strata))
    rng = np.random.default_rng(seed)
    return _difference(value, _resampled(lambda x: b(x) - a(x), strata, samples, rng))


def _difference(value: float, resampled: np.ndarray) -> Difference:
    """Returns an observed difference with what its resamples, (samples,), say of it."""
    tail = int(min(np.sum(resampled <= 0), np.sum(resampled >= 0)))
    p = min(1.0, 2 * (1 + tail) / (1 + len(resampled)))
    low, high = _interval(resampled)
    return Difference(value, low, high, p)


def hierarchical_bootstrap(
    differences: Sequence[Statistic], items: Sequence[int], *, seed: int, samples: int = 10_000
) -> Difference:
    """Returns the mean over seeds of a paired difference, with a bootstrap over seeds and items.

    A resample draws as many seeds as there are, with replacement, and within each of them its
    items, so that the noise of trainings and that of test items are both in the interval and in p.
    p is that of `paired_bootstrap`.

    Args:
        differences: The difference of each seed, a statistic of its items.
        items: The number of items of each seed.
        seed: Seeds the resamples.
        samples: Number of resamples.
    """
    rng, count = np.random.default_rng(seed), len(differences)
    drawn = rng.integers(count, size=(samples, count))
    resampled = np.zeros((samples, count))
    for s in np.unique(drawn):
        is_s, strata = drawn == s, np.zeros(items[s])
        resampled[is_s] = _resampled(differences[s], strata, int(is_s.sum()), rng)
    found = [observed(difference, n) for difference, n in zip(differences, items, strict=True)]
    return _difference(float(np.mean(found)), resampled.mean(axis=1))


def between_seeds(differences: Sequence[float]) -> float:
    """Returns the two-sided p-value of no mean difference by a t-test over seeds, 1 for one seed.

    A bootstrap of few seeds is too sure: if they have the same sign, its p is the smallest possible
    one, however far they are apart.
    """
    if len(differences) < 2:
        return 1.0
    if np.ptp(differences) == 0:
        return float(differences[0] == 0)
    found: Any = ttest_1samp(differences, 0)  # scipy's types do not know what it has
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values as Holm's step-down method corrects them for being several: if each is
    right for its own claim, the probability that any true null is rejected at 0.05 is at most
    0.05."""
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
    statistic = mean(right)
    return {
        "accuracy": observed(statistic, len(right)),
        "accuracy_interval": bootstrap_interval(statistic, np.zeros(len(right)), seed=seed),
    }


def right_by_problem(trajectories: Sequence[Trajectory]) -> list[float]:
    """Returns each problem's share of right trajectories, ordered by id, so that the order does
    not depend on which worker wrote which part."""
    right: dict[str, list[bool]] = defaultdict(list)
    for trajectory in sorted(trajectories, key=lambda t: natural_key(t.trajectory_id)):
        right[trajectory.problem_id].append(trajectory.is_correct)
    return [sum(found) / len(found) for found in right.values()]


LabelsAndTruths = list[tuple[bool, bool]]
"""For each chunk: its label, and whether it is right."""

LABEL_SCORES = ("balanced_accuracy", "negative_precision", "negative_recall")


def count_labels(pairs: LabelsAndTruths) -> tuple[int, int, int, int]:
    """Returns the numbers of wrong chunks, of those of them with a negative label, of right chunks,
    and of those of them with a positive label."""
    wrong = sum(not truth for _, truth in pairs)
    return wrong, pairs.count((False, False)), len(pairs) - wrong, pairs.count((True, True))


def label_scores(counts: Sequence[Sequence[int]]) -> Statistic:
    """Returns `LABEL_SCORES`, (resamples, 3), of items' `count_labels`, [item][4]: the mean of the
    accuracies on right and on wrong chunks, with precision and recall of the negative labels. A
    fraction of no chunks is 0."""
    table = np.asarray(counts, float)

    def scores(times: np.ndarray) -> np.ndarray:
        wrong, caught, right, kept = (times @ table).T
        recall = caught / np.maximum(1, wrong)
        balanced = (recall + kept / np.maximum(1, right)) / 2
        precision = caught / np.maximum(1, caught + right - kept)
        return np.stack([balanced, precision, recall], axis=1)

    return scores

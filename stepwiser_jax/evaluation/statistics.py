"""How sure a number is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def bootstrap_interval(
    items: Sequence[Any],
    statistic: Callable[[list[Any]], Any],
    *,
    seed: int,
    strata: Sequence[Any] | None = None,
    samples: int = 1000,
    level: float = 0.95,
) -> list[Any]:
    """Percentile interval [low, high] of `statistic` over resamples of the items, of each of the
    `strata` (one an item) as many as it has; of a statistic of n numbers n intervals."""
    values = [
        statistic([items[i] for i in rows])
        for rows in _resamples(len(items), strata, samples, seed)
    ]
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0).T.tolist()


def _resamples(
    count: int, strata: Sequence[Any] | np.ndarray | None, samples: int, seed: int
) -> Iterator[np.ndarray]:
    """Rows of each resample."""
    rng = np.random.default_rng(seed)
    of_row = np.zeros(count, int) if strata is None else np.asarray(strata)
    members = [np.flatnonzero(of_row == stratum) for stratum in np.unique(of_row)]
    for _ in range(samples):
        yield np.concatenate([rng.choice(of_one, len(of_one)) for of_one in members])


def accuracy(right: Sequence[float], *, seed: int) -> dict[str, Any]:
    """Mean of what is right of each problem, a fraction, with its 95% interval over problems."""
    return {
        "accuracy": float(np.mean(right)),
        "accuracy_interval": bootstrap_interval(right, np.mean, seed=seed),
    }


@dataclass(frozen=True)
class Difference:
    """A difference with its percentile interval, and the two-sided p of no difference."""

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
    """`statistic(b) - statistic(a)`, where row i of both is of the same item: each resample draws
    items, the same ones for both, and of each of the `strata` (one an item) as many as it has. p is
    the least level at which the interval reaches 0: twice the smaller share of resampled
    differences on either side of 0, equality counted on both, and the observed one as one more (so
    that p is never 0)."""
    differences = np.array(
        [
            statistic(b[rows]) - statistic(a[rows])
            for rows in _resamples(len(a), strata, samples, seed)
        ]
    )
    tail = min(np.sum(differences <= 0), np.sum(differences >= 0))
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return Difference(
        value=float(statistic(b) - statistic(a)),
        low=float(low),
        high=float(high),
        p=min(1.0, 2 * (1 + int(tail)) / (1 + samples)),
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p that two judges are right equally often, from the numbers of items on which
    one alone is right: the share of all ways to deal these out by coin that are as uneven."""
    discordant, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(discordant, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**discordant)


def balanced_accuracy(labels: Sequence[bool], truths: Sequence[bool]) -> dict[str, float]:
    """Mean of the accuracies on right and on wrong chunks, with precision and recall of the
    negatives, fractions; an undefined one is 0."""
    pairs = list(zip(labels, truths, strict=True))
    caught = sum(not label and not truth for label, truth in pairs)
    wrong = sum(not truth for _, truth in pairs)
    called_wrong = sum(not label for label, _ in pairs)
    kept = sum(label and truth for label, truth in pairs)
    recall = caught / max(1, wrong)
    right_accuracy = kept / max(1, len(pairs) - wrong)
    return {
        "balanced_accuracy": (recall + right_accuracy) / 2,
        "negative_precision": caught / max(1, called_wrong),
        "negative_recall": recall,
    }

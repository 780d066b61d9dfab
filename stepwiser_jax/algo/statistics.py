"""How sure a number is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def bootstrap_interval(
    items: Sequence[Any],
    statistic: Callable[[list[Any]], float],
    *,
    seed: int,
    samples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of `statistic` over resamples of the items."""
    rng = np.random.default_rng(seed)
    values = [
        float(statistic([items[i] for i in rng.integers(len(items), size=len(items))]))
        for _ in range(samples)
    ]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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

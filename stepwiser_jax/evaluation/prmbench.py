"""PRMBench scores (arXiv 2501.03124), from verdicts on steps.

Each step is right or wrong by itself. F1 is computed on right steps (a step judged Positive is
called right) and negative F1 on wrong ones, both over the steps of all solutions together. PRMScore
is their mean; in the class `multi_solutions`, which has no wrong steps, it is F1 alone. A
category's PRMScore is the plain mean over its classes. Original solutions (`correct`) count in no
total.

Two things differ from the official scorer. An undefined score is 0, not -1. A judgment without a
verdict counts as `unparsed_as` says, while the official scorer leaves out the whole solution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stepwiser_jax.evaluation.auc import score_auc
from stepwiser_jax.evaluation.statistics import bootstrap_interval, observed, sums
from stepwiser_jax.evaluation.verdicts import UnparsedAs, accepts, verdict_rates
from stepwiser_jax.records import PrmBenchItem, Verdict

CATEGORIES = {
    "simplicity": ("redundency", "circular"),
    "soundness": ("counterfactual", "step_contradiction", "domain_inconsistency", "confidence"),
    "sensitivity": ("missing_condition", "deception", "multi_solutions"),
}
"""The benchmark's classes of error, in its spelling."""

WITHOUT_ERRORS = "multi_solutions"
ORIGINAL = "correct"


def score_prmbench(
    items: Sequence[PrmBenchItem],
    verdicts: Sequence[Sequence[Verdict]],
    p_positive: Sequence[Sequence[float]] | None = None,
    *,
    seed: int,
    unparsed_as: UnparsedAs = "negative",
) -> dict[str, Any]:
    """Returns the PRMScore in total, of each category whose classes are all there, and of each
    class. They are fractions with 95% intervals over solutions.

    Args:
        items: Solutions with their wrong steps.
        verdicts: The verdict on each step, [item][step].
        p_positive: The probability that each step is right, [item][step]; with it the total has an
            AUC, of the steps of all solutions together.
        seed: Seeds the bootstrap, in which each class keeps its size.
        unparsed_as: How a step without a verdict counts.
    """
    class_names = sorted({item.subset for item in items})
    class_of_item = np.array([class_names.index(item.subset) for item in items])
    counts = np.array(
        [count_steps(item, row, unparsed_as) for item, row in zip(items, verdicts, strict=True)]
    )
    categories = [name for name, of in CATEGORIES.items() if set(of) <= set(class_names)]

    count_by_class = sums(counts, class_of_item)
    counts_of_classes = observed(count_by_class, len(items))

    def prm_scores(times: np.ndarray) -> np.ndarray:
        """Returns the PRMScores of the total, the categories and the classes: (resamples, n)."""
        counted = count_by_class(times)
        total = counted[:, [name != ORIGINAL for name in class_names]].sum(axis=1)
        by_class = {name: prm_score(counted[:, c], name) for c, name in enumerate(class_names)}
        by_category = [
            sum(by_class[n] for n in CATEGORIES[name]) / len(CATEGORIES[name])
            for name in categories
        ]
        return np.stack([prm_score(total), *by_category, *by_class.values()], axis=1)

    values = observed(prm_scores, len(items))
    intervals = bootstrap_interval(prm_scores, class_of_item, seed=seed)
    scores = [
        {"prm_score": value, "prm_score_interval": interval}
        for value, interval in zip(values, intervals, strict=True)
    ]
    of_class = dict(zip(class_names, scores[1 + len(categories) :], strict=True))
    rows = [row for row, item in enumerate(items) if item.subset != ORIGINAL]
    if p_positive is not None and rows:
        of_rows = [items[r] for r in rows], [p_positive[r] for r in rows]
        together = np.zeros(len(rows), int)
        scores[0] |= score_auc(*of_rows, together, seed=seed, strata=class_of_item[rows])
    return {
        "total": scores[0],
        "categories": dict(zip(categories, scores[1:], strict=False)),
        "classes": {
            name: {"items": int(np.sum(class_of_item == c))} | of_class[name] | step_rates(counts)
            for c, (name, counts) in enumerate(zip(class_names, counts_of_classes, strict=True))
        },
        **verdict_rates(verdicts),
    }


def count_steps(
    item: PrmBenchItem, verdicts: Sequence[Verdict], unparsed_as: UnparsedAs
) -> tuple[int, int, int, int]:
    """Returns the numbers of an item's steps that are (right and called right, wrong and called
    right, right and called wrong, wrong and called wrong)."""
    pairs = [(item.is_right(step), accepts(v, unparsed_as)) for step, v in enumerate(verdicts)]
    cells = [(True, True), (False, True), (True, False), (False, False)]
    found = [pairs.count(cell) for cell in cells]
    return found[0], found[1], found[2], found[3]


def prm_score(counts: np.ndarray, name: str = "") -> np.ndarray:
    """Returns the PRMScore of the class `name`, (...), from counts (..., 4) in the order of
    `count_steps`."""
    f1, negative_f1 = f1_scores(counts)
    return f1 if name == WITHOUT_ERRORS else (f1 + negative_f1) / 2


def f1_scores(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns F1 of the right steps and of the wrong ones, each (...), from counts (..., 4); 0 if
    there are none."""
    kept, missed, refused, caught = np.moveaxis(counts, -1, 0)
    f1, negative_f1 = (
        2 * hits / np.maximum(1, 2 * hits + missed + refused) for hits in (kept, caught)
    )
    return f1, negative_f1


def step_rates(counts: Sequence[float]) -> dict[str, float]:
    """Returns both F1, and the accuracies on right and on wrong steps, from counts [4]; 0 over no
    steps."""
    kept, missed, refused, caught = counts
    f1, negative_f1 = f1_scores(np.array(counts))
    return {
        "f1": float(f1),
        "negative_f1": float(negative_f1),
        "right_step_accuracy": kept / max(1, kept + refused),
        "wrong_step_accuracy": caught / max(1, caught + missed),
    }

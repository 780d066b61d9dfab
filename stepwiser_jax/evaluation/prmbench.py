"""PRMBench scores (arXiv 2501.03124), from verdicts on steps.

Every step is right or wrong on its own. F1 is of the right steps (a step judged Positive is called
right), negative F1 of the wrong ones, both over the steps of all solutions together; PRMScore is
their mean. In the class `multi_solutions`, which has no wrong steps, it is F1 alone. A category's
PRMScore is the plain mean of its classes'. Original solutions (`correct`) count in no total.

Two things differ from the official scorer: what is undefined is 0, not -1, and a judgment that
gives no verdict counts as `unparsed_as` says, while the scorer leaves out the whole solution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from stepwiser_jax.evaluation.statistics import bootstrap_interval
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
    *,
    seed: int,
    unparsed_as: Literal["negative", "positive"] = "negative",
) -> dict[str, Any]:
    """Returns PRMScore in total, of each category whose classes are all there, and of each class,
    as fractions with their 95% intervals over solutions (each class keeps its size in a resample).

    Args:
        items: solutions with their wrong steps.
        verdicts: what was judged of each step, [item][step].
        seed: of the bootstrap.
        unparsed_as: how a judgment counts that gives no verdict.
    """
    class_names = sorted({item.subset for item in items})
    class_of_item = np.array([class_names.index(item.subset) for item in items])
    counts = np.array(
        [count_steps(item, row, unparsed_as) for item, row in zip(items, verdicts, strict=True)]
    )
    categories = [name for name, of in CATEGORIES.items() if set(of) <= set(class_names)]

    def of_classes(rows: Sequence[int]) -> np.ndarray:
        """Counts [classes, 4] over these items."""
        sums = np.zeros((len(class_names), 4))
        np.add.at(sums, class_of_item[rows], counts[rows])
        return sums

    def prm_scores(rows: Sequence[int]) -> np.ndarray:
        """PRMScores of the total, the categories and the classes."""
        sums = of_classes(rows)
        total = sums[[name != ORIGINAL for name in class_names]].sum(axis=0)
        by_class = {name: prm_score(sums[c], name) for c, name in enumerate(class_names)}
        by_category = [np.mean([by_class[n] for n in CATEGORIES[name]]) for name in categories]
        return np.array([prm_score(total), *by_category, *by_class.values()])

    everything = list(range(len(items)))
    values = prm_scores(everything).tolist()
    intervals = bootstrap_interval(everything, prm_scores, seed=seed, strata=class_of_item.tolist())
    scores = [
        {"prm_score": value, "prm_score_interval": interval}
        for value, interval in zip(values, intervals, strict=True)
    ]
    of_class = dict(zip(class_names, scores[1 + len(categories) :], strict=True))
    flat = [verdict for row in verdicts for verdict in row]
    return {
        "total": scores[0],
        "categories": dict(zip(categories, scores[1:], strict=False)),
        "classes": {
            name: {"items": int(np.sum(class_of_item == c))} | of_class[name] | rates(sums)
            for c, (name, sums) in enumerate(zip(class_names, of_classes(everything), strict=True))
        },
        "unparsed_rate": sum(not verdict.is_given for verdict in flat) / len(flat),
        "other_box_rate": flat.count(Verdict.OTHER) / len(flat),
        "positive_share": flat.count(Verdict.POSITIVE) / len(flat),
    }


def count_steps(
    item: PrmBenchItem, verdicts: Sequence[Verdict], unparsed_as: Literal["negative", "positive"]
) -> tuple[int, int, int, int]:
    """Returns the numbers of an item's steps that are (right and called right, wrong and called
    right, right and called wrong, wrong and called wrong)."""
    undecided = unparsed_as == "positive"
    accepted = [v is Verdict.POSITIVE if v.is_given else undecided for v in verdicts]
    pairs = [(item.is_right(step), accepts) for step, accepts in enumerate(accepted)]
    cells = [(True, True), (False, True), (True, False), (False, False)]
    found = [pairs.count(cell) for cell in cells]
    return found[0], found[1], found[2], found[3]


def prm_score(counts: np.ndarray, name: str = "") -> float:
    """Returns PRMScore of counts [4], as `count_steps` gives them, of the class `name`."""
    f1, negative_f1 = f1_scores(counts)
    return f1 if name == WITHOUT_ERRORS else (f1 + negative_f1) / 2


def f1_scores(counts: np.ndarray) -> tuple[float, float]:
    """Returns F1 of the right steps and of the wrong ones; 0 if there are none."""
    kept, missed, refused, caught = counts.tolist()
    errors = missed + refused
    return 2 * kept / max(1, 2 * kept + errors), 2 * caught / max(1, 2 * caught + errors)


def rates(counts: np.ndarray) -> dict[str, float]:
    """Returns both F1, and the accuracies on right and on wrong steps; 0 over no steps."""
    kept, missed, refused, caught = counts.tolist()
    f1, negative_f1 = f1_scores(counts)
    return {
        "f1": f1,
        "negative_f1": negative_f1,
        "right_step_accuracy": kept / max(1, kept + refused),
        "wrong_step_accuracy": caught / max(1, caught + missed),
    }

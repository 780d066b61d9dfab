"""ProcessBench scores (arXiv 2412.06559), from verdicts on steps.

    verdicts -> first predicted error -> outcome of the item -> accuracies with and without an error
             -> F1, their harmonic mean -> average over subsets

The official split asks whether the item has an error. StepWiser's numbers split by the final answer
instead (eq 4). Both are reported, as fractions; the official scorer prints percent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.auc import score_auc
from stepwiser_jax.evaluation.statistics import Statistic, bootstrap_interval, observed, sums
from stepwiser_jax.evaluation.verdicts import UnparsedAs, first_predicted_error, verdict_rates
from stepwiser_jax.records import BenchmarkItem, ProcessBenchItem, Verdict

OUTCOME = np.dtype([("subset", int), ("has_error", bool), ("is_found", bool)])
"""What F1 needs of an item. `is_found` says whether the predicted first error is the label."""

SCORES = ("f1", "acc_error", "acc_correct")


def item_outcomes(
    items: Sequence[ProcessBenchItem], predictions: Sequence[int], *, by_final_answer: bool = False
) -> np.ndarray:
    """Returns the items' outcomes, an array of `OUTCOME`."""
    outcomes = np.zeros(len(items), OUTCOME)
    outcomes["subset"] = subset_indices(items)
    outcomes["has_error"] = [
        not item.final_answer_correct if by_final_answer else item.first_error != -1
        for item in items
    ]
    outcomes["is_found"] = [
        item.first_error == prediction for item, prediction in zip(items, predictions, strict=True)
    ]
    return outcomes


def subset_indices(items: Sequence[BenchmarkItem]) -> np.ndarray:
    """Returns each item's subset as an index, in order of first occurrence."""
    index_of: dict[str, int] = {}
    return np.array([index_of.setdefault(item.subset, len(index_of)) for item in items], int)


def subset_names(items: Sequence[BenchmarkItem]) -> list[str]:
    """Returns the names that `subset_indices` counts."""
    return list(dict.fromkeys(item.subset for item in items))


def average_over_subsets(
    outcomes: np.ndarray, scores: Callable[[np.ndarray], Sequence[np.ndarray]]
) -> Statistic:
    """Returns n scores, (resamples, n), averaged over subsets, of items with a `subset` and two
    flags, (items,). `scores` makes n arrays (resamples, subsets) of the numbers of items by these
    flags, (resamples, subsets, 2, 2)."""
    one, other = (outcomes[name].astype(int) for name in (outcomes.dtype.names or ())[1:])
    count = sums(np.eye(4)[2 * one + other].reshape(-1, 2, 2), outcomes["subset"])
    subsets = max(1, len(np.unique(outcomes["subset"])))
    return lambda times: np.sum(scores(count(times)), axis=2).T / subsets


def f1_scores(outcomes: np.ndarray) -> Statistic:
    """Returns `SCORES`, (resamples, 3), averaged over subsets: the harmonic mean of the accuracies
    on items with an error and on those without, and both accuracies. An undefined one is 0
    (officially: nan)."""

    def scores(counts: np.ndarray) -> list[np.ndarray]:
        accuracies = counts[..., 1] / np.maximum(1, counts.sum(axis=-1))
        acc_correct, acc_error = np.moveaxis(accuracies, -1, 0)
        return [harmonic_mean(acc_error, acc_correct), acc_error, acc_correct]

    return average_over_subsets(outcomes, scores)


def harmonic_mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the harmonic mean, 0 for two zeros."""
    total = a + b
    return 2 * a * b / np.where(total > 0, total, 1)


def processbench_f1(predictions: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """Returns the official scores of predicted first errors (-1: none), from 0 to 1.

    Of the two solutions with an error this judge finds one, and it accepts the right one:

    >>> processbench_f1(predictions=[1, -1, -1], labels=[1, 0, -1])
    {'f1': 0.6666666666666666, 'acc_error': 0.5, 'acc_correct': 1.0}

    Raises:
        UserError: There is not one label for each prediction.
    """
    return _scores(predictions, labels, [label != -1 for label in labels])


def processbench_f1_by_final_answer(
    predictions: Sequence[int], labels: Sequence[int], final_answer_correct: Sequence[bool]
) -> dict[str, float]:
    """Returns the same scores with items split by their final answer (StepWiser eq 4)."""
    return _scores(predictions, labels, [not correct for correct in final_answer_correct])


def _scores(
    predictions: Sequence[int], labels: Sequence[int], has_error: Sequence[bool]
) -> dict[str, float]:
    if not len(predictions) == len(labels) == len(has_error):
        raise UserError(
            f"expected a label for each prediction, found {len(predictions)} predictions, "
            f"{len(labels)} labels and {len(has_error)} items"
        )
    outcomes = np.zeros(len(labels), OUTCOME)
    outcomes["has_error"], outcomes["is_found"] = has_error, np.equal(predictions, labels)
    return dict(zip(SCORES, observed(f1_scores(outcomes), len(outcomes)), strict=True))


# --- a benchmark of several subsets -------------------------------------------------------------


def score_by_subset(
    items: Sequence[ProcessBenchItem],
    verdicts: Sequence[Sequence[Verdict]],
    p_positive: Sequence[Sequence[float]] | None = None,
    *,
    seed: int,
    unparsed_as: UnparsedAs = "negative",
) -> dict[str, Any]:
    """Returns the scores of each subset and their plain average, as ProcessBench reports it.

    Args:
        items: Solutions with their first errors.
        verdicts: The verdict on each step, [item][step].
        p_positive: The probability that each step is right, [item][step]; with it there is an AUC.
        seed: Seeds the bootstrap of the 95% intervals, in which each subset keeps its size.
        unparsed_as: How a step without a verdict counts.
    """
    predictions = [first_predicted_error(v, unparsed_as=unparsed_as) for v in verdicts]
    outcomes = {
        "official": item_outcomes(items, predictions),
        "by_final_answer": item_outcomes(items, predictions, by_final_answer=True),
    }

    subset_of_item = subset_indices(items)

    def scores(rows: list[int]) -> dict[str, Any]:
        found, strata = {}, subset_of_item[rows]
        if p_positive is not None:
            of_rows = [items[r] for r in rows], [p_positive[r] for r in rows]
            found |= score_auc(*of_rows, strata, seed=seed)
        for split, of_split in outcomes.items():
            statistic = f1_scores(of_split[rows])
            found[split] = dict(zip(SCORES, observed(statistic, len(rows)), strict=True))
            intervals = bootstrap_interval(statistic, strata, seed=seed)
            for name, interval in zip(SCORES, intervals, strict=True):
                found[f"{split}_{name}_interval"] = interval
        return found

    subsets = {}
    for s, subset in enumerate(subset_names(items)):
        rows = np.flatnonzero(subset_of_item == s).tolist()
        verdicts_of_rows = [verdicts[r] for r in rows]
        subsets[subset] = {
            "items": len(rows),
            **scores(rows),
            **verdict_rates(verdicts_of_rows),
            "steps_right": step_accuracy([items[r] for r in rows], verdicts_of_rows),
        }
    return {"subsets": subsets, "average": scores(list(range(len(items))))}


def step_accuracy(
    items: Sequence[ProcessBenchItem], verdicts: Sequence[Sequence[Verdict]]
) -> dict[str, float]:
    """Returns the shares of right verdicts on steps before the first error, and on that error."""
    right: dict[str, list[bool]] = {"before_error": [], "first_error": []}
    for item, of_item in zip(items, verdicts, strict=True):
        for step, verdict in enumerate(of_item):
            if item.first_error == -1 or step < item.first_error:
                right["before_error"].append(verdict is Verdict.POSITIVE)
            elif step == item.first_error:
                right["first_error"].append(verdict is Verdict.NEGATIVE)
    return {name: float(np.mean(values)) if values else 0.0 for name, values in right.items()}


def best_threshold(p_positive: Sequence[Sequence[float]], labels: Sequence[int]) -> float:
    """Returns the threshold on P(+) with the best official F1, among equals the nearest to 1/2.

    Candidates are 1/2, the midpoints of neighbouring probabilities, and a value beyond the last
    probability on either side.

    Args:
        p_positive: P(+) of each step, [item][step].
        labels: The first error of each item, or -1.
    """
    ends = np.unique(np.concatenate([[0.0, 1.0], *p_positive]))
    candidates = np.append((ends[1:] + ends[:-1]) / 2, 0.5)
    right: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for probabilities, label in zip(p_positive, labels, strict=True):
        # The first step below a threshold is the first whose running minimum is below it.
        lowest = np.minimum.accumulate(probabilities)
        first = np.searchsorted(-lowest, -candidates, side="right")
        predictions = np.where(first == len(lowest), -1, first)
        right[label != -1].append(predictions == label)
    acc_error, acc_correct = (
        np.mean(right[error], axis=0) if right[error] else np.zeros(len(candidates))
        for error in (True, False)
    )
    f1 = harmonic_mean(acc_error, acc_correct)
    best = candidates[f1 == np.max(f1)]
    return float(best[np.argmin(np.abs(best - 0.5))])

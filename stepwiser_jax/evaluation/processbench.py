"""ProcessBench scores (arXiv 2412.06559), from verdicts on steps.

The official split is by the label: has the item an error or not? StepWiser's numbers follow the
split by the final answer; both are here, as fractions between 0 and 1 (the official scorer prints
percent).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.statistics import bootstrap_interval, mcnemar, paired_bootstrap
from stepwiser_jax.records import BenchmarkItem, ProcessBenchItem, Verdict


def first_predicted_error(
    verdicts: Sequence[Verdict], *, unparsed_as: Literal["negative", "positive"] = "negative"
) -> int:
    """Index of the first step judged Negative, -1 where there is none. `unparsed_as` says how a
    judgment counts that gives no verdict; it shifts the balance between the two accuracies."""

    def rejects(verdict: Verdict) -> bool:
        return verdict is Verdict.NEGATIVE or (unparsed_as == "negative" and not verdict.is_given)

    return next((i for i, verdict in enumerate(verdicts) if rejects(verdict)), -1)


def majority_verdict(votes: Sequence[Verdict]) -> Verdict:
    """The more frequent of Positive and Negative among the votes that give a verdict; a tie is
    Negative (a step that half of the votes reject is not accepted). Where no vote gives one, it is
    Other if a vote is, else Unparsed."""
    positive, negative = votes.count(Verdict.POSITIVE), votes.count(Verdict.NEGATIVE)
    if positive == negative == 0:
        return Verdict.OTHER if Verdict.OTHER in votes else Verdict.UNPARSED
    return Verdict.POSITIVE if positive > negative else Verdict.NEGATIVE


def processbench_f1(predictions: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """Official: harmonic mean of the exact-match accuracy on items with an error and on those
    without, all between 0 and 1. An accuracy over no items, and the F1 of two zeros, is 0 (the
    official script: nan). Raises UserError unless there is one label for each prediction."""
    return _f1(predictions, labels, [label != -1 for label in labels])


def processbench_f1_by_final_answer(
    predictions: Sequence[int], labels: Sequence[int], final_answer_correct: Sequence[bool]
) -> dict[str, float]:
    """The same with the items split by their final answer (StepWiser eq 4)."""
    return _f1(predictions, labels, [not correct for correct in final_answer_correct])


def _f1(
    predictions: Sequence[int], labels: Sequence[int], is_error: Sequence[bool]
) -> dict[str, float]:
    if not len(predictions) == len(labels) == len(is_error):
        raise UserError(
            f"expected a label for each prediction, found {len(predictions)} predictions, "
            f"{len(labels)} labels and {len(is_error)} items"
        )
    matches: dict[bool, list[bool]] = {True: [], False: []}
    for prediction, label, error in zip(predictions, labels, is_error, strict=True):
        matches[error].append(prediction == label)
    acc_error, acc_correct = (
        sum(matches[error]) / max(1, len(matches[error])) for error in (True, False)
    )
    total = acc_error + acc_correct
    f1 = 2 * acc_error * acc_correct / total if total else 0.0
    return {"f1": f1, "acc_error": acc_error, "acc_correct": acc_correct}


# --- of a classifier ----------------------------------------------------------------------------


def verdicts_at(threshold: float, p_positive: Sequence[float]) -> list[Verdict]:
    """Negative where P(+) is below the threshold."""
    return [Verdict.NEGATIVE if p < threshold else Verdict.POSITIVE for p in p_positive]


def best_threshold(p_positive: Sequence[Sequence[float]], labels: Sequence[int]) -> float:
    """The threshold of the best official F1 for each item's P(+) of its steps; among equals the one
    nearest to 1/2. Candidates are 1/2, and half-way between any two probabilities that are next to
    one another, and past the last at either end.
    """
    ends = np.unique(np.concatenate([[0.0, 1.0], *p_positive]))
    candidates = np.append((ends[1:] + ends[:-1]) / 2, 0.5)
    right: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for probabilities, label in zip(p_positive, labels, strict=True):
        # The first step below a threshold is the first at which the lowest so far is.
        lowest = np.minimum.accumulate(probabilities)
        first = np.searchsorted(-lowest, -candidates, side="right")
        predictions = np.where(first == len(lowest), -1, first)
        right[label != -1].append(predictions == label)
    acc_error, acc_correct = (
        np.mean(right[error], axis=0) if right[error] else np.zeros(len(candidates))
        for error in (True, False)
    )
    total = acc_error + acc_correct
    f1 = 2 * acc_error * acc_correct / np.where(total > 0, total, 1)
    best = candidates[f1 == np.max(f1)]
    return float(best[np.argmin(np.abs(best - 0.5))])


# --- of whole solutions -------------------------------------------------------------------------


def solution_scores(
    p_correct: Sequence[float], is_correct: Sequence[bool], *, threshold: float = 0.5
) -> dict[str, float]:
    """How well solutions without an error are told from those with one, in fractions. They are the
    positive class, and predicted where the probability is at least the threshold. A precision or
    recall over nothing is 0, as is the F1 of two zeros.

    This is the F1 of ThinkPRM's tables, another quantity than ProcessBench's. The paper does not
    name the positive class; its random baselines (39.1 of OlympiadBench, 32.7 of Omni-MATH, of
    which about 34% and 24% are correct) are those of this one.
    """
    predicted = [p >= threshold for p in p_correct]
    pairs = list(zip(predicted, is_correct, strict=True))
    hits = pairs.count((True, True))
    precision = hits / max(1, sum(predicted))
    recall = hits / max(1, sum(is_correct))
    total = precision + recall
    return {
        "binary_f1": 2 * precision * recall / total if total else 0.0,
        "precision": precision,
        "recall": recall,
        "accuracy": sum(a == b for a, b in pairs) / max(1, len(pairs)),
    }


# --- of all subsets -----------------------------------------------------------------------------


def rows_of_subsets(items: Sequence[BenchmarkItem]) -> dict[str, list[int]]:
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, item in enumerate(items):
        rows_of[item.subset].append(row)
    return rows_of


def solutions_by_subset(
    items: Sequence[BenchmarkItem],
    p_correct: Sequence[float],
    bad_outputs: Sequence[float],
    *,
    seed: int,
) -> dict[str, Any]:
    """Scores of whole solutions per subset, and their plain average, with the 95% intervals of F1
    and accuracy. `bad_outputs`: the share of each one's outputs that are bad."""
    rows_of = rows_of_subsets(items)
    scores = {}
    for subset, rows in rows_of.items():
        is_correct = [items[r].first_error == -1 for r in rows]
        bad = sum(bad_outputs[r] for r in rows) / len(rows)
        scores[subset] = solution_scores([p_correct[r] for r in rows], is_correct)
        scores[subset]["bad_outputs"] = bad
    names = next(iter(scores.values()))
    average = {n: float(np.mean([score[n] for score in scores.values()])) for n in names}

    def intervals(rows: Sequence[int]) -> dict[str, list[float]]:
        outcomes = [(items[r].subset, p_correct[r], items[r].first_error == -1) for r in rows]
        strata = [subset for subset, _, _ in outcomes]
        found = bootstrap_interval(outcomes, _mean_solution_scores, seed=seed, strata=strata)
        return dict(zip(("binary_f1_interval", "accuracy_interval"), found, strict=True))

    return {
        "subsets": {name: score | intervals(rows_of[name]) for name, score in scores.items()},
        "average": average | intervals(range(len(items))),
    }


def _mean_solution_scores(outcomes: Sequence[tuple[str, float, bool]]) -> np.ndarray:
    """F1 and accuracy [2] of (subset, p_correct, is correct), averaged over subsets."""
    of_subset: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    for subset, p_correct, is_correct in outcomes:
        of_subset[subset].append((p_correct, is_correct))
    found = [solution_scores(*zip(*pairs, strict=True)) for pairs in of_subset.values()]
    return np.mean([(scores["binary_f1"], scores["accuracy"]) for scores in found], axis=0)


def score_by_subset(
    items: Sequence[ProcessBenchItem],
    verdicts: Sequence[Sequence[Verdict]],
    *,
    seed: int,
    unparsed_as: Literal["negative", "positive"] = "negative",
) -> dict[str, Any]:
    """Scores per subset, and their plain average as ProcessBench reports it, with their 95%
    intervals."""
    rows_of = rows_of_subsets(items)
    scores = {
        subset: score_items(
            [items[r] for r in rows],
            [verdicts[r] for r in rows],
            seed=seed,
            unparsed_as=unparsed_as,
        )
        for subset, rows in rows_of.items()
    }
    average: dict[str, Any] = {
        split: {
            name: float(np.mean([score[split][name] for score in scores.values()]))
            for name in ("f1", "acc_error", "acc_correct")
        }
        for split in ("official", "by_final_answer")
    }
    predictions = [first_predicted_error(v, unparsed_as=unparsed_as) for v in verdicts]
    return {"subsets": scores, "average": average | score_intervals(items, predictions, seed=seed)}


def score_items(
    items: Sequence[ProcessBenchItem],
    verdicts: Sequence[Sequence[Verdict]],
    *,
    seed: int,
    unparsed_as: Literal["negative", "positive"],
) -> dict[str, Any]:
    """Fractions between 0 and 1. `seed` is of the bootstrap interval. `unparsed_rate` is of steps
    without a verdict, `other_box_rate` of those among them whose last box holds something else."""
    predictions = [first_predicted_error(v, unparsed_as=unparsed_as) for v in verdicts]
    labels = [item.first_error for item in items]
    final_correct = [item.final_answer_correct for item in items]
    flat = [verdict for row in verdicts for verdict in row]
    return {
        "items": len(items),
        "official": processbench_f1(predictions, labels),
        "by_final_answer": processbench_f1_by_final_answer(predictions, labels, final_correct),
        **score_intervals(items, predictions, seed=seed),
        "unparsed_rate": sum(not verdict.is_given for verdict in flat) / len(flat),
        "other_box_rate": flat.count(Verdict.OTHER) / len(flat),
        "positive_share": flat.count(Verdict.POSITIVE) / len(flat),
        "steps_right": step_accuracy(items, verdicts),
    }


def score_intervals(
    items: Sequence[ProcessBenchItem], predictions: Sequence[int], *, seed: int
) -> dict[str, list[float]]:
    """95% intervals of both F1 and of their accuracies, averaged over subsets, which keep their
    sizes in a resample."""
    rows_of = rows_of_subsets(items)
    subset_of = {subset: s for s, subset in enumerate(rows_of)}
    subsets = np.array([subset_of[item.subset] for item in items])
    found = np.array(predictions) == np.array([item.first_error for item in items])
    is_error = {
        "official": np.array([item.first_error != -1 for item in items]),
        "by_final_answer": np.array([not item.final_answer_correct for item in items]),
    }
    intervals = {
        split: bootstrap_interval(
            (4 * subsets + 2 * error + found).tolist(),
            partial(_mean_scores, subsets=len(rows_of)),
            seed=seed,
            strata=subsets.tolist(),
        )
        for split, error in is_error.items()
    }
    return {
        f"{split}_{name}_interval": interval
        for split, of_split in intervals.items()
        for name, interval in zip(("f1", "acc_error", "acc_correct"), of_split, strict=True)
    }


def step_accuracy(
    items: Sequence[ProcessBenchItem], verdicts: Sequence[Sequence[Verdict]]
) -> dict[str, float]:
    """Share of right verdicts on steps before the first error, and on the first error itself."""
    right: dict[str, list[bool]] = {"before_error": [], "first_error": []}
    for item, row in zip(items, verdicts, strict=True):
        for step, verdict in enumerate(row):
            if item.first_error == -1 or step < item.first_error:
                right["before_error"].append(verdict is Verdict.POSITIVE)
            elif step == item.first_error:
                right["first_error"].append(verdict is Verdict.NEGATIVE)
    return {name: float(np.mean(values)) if values else 0.0 for name, values in right.items()}


# --- of two judges ------------------------------------------------------------------------------


def contrast(
    items: Sequence[ProcessBenchItem],
    predictions_a: Sequence[int],
    predictions_b: Sequence[int],
    *,
    seed: int,
) -> dict[str, Any]:
    """What judge b has over judge a on the same items, by the official split, per subset and for
    the average of the subsets' F1: both F1, and their difference with its interval and p (paired
    bootstrap, within each subset); the numbers of items that one of them alone gets exactly right,
    with the p of McNemar's test. Fractions between 0 and 1. `seed` is of the bootstrap."""
    rows_of = rows_of_subsets(items)
    subset_of = {subset: s for s, subset in enumerate(rows_of)}
    subsets = np.array([subset_of[item.subset] for item in items])
    labels = np.array([item.first_error for item in items])
    # What F1 knows of an item: its subset, whether it has an error, and whether it is found.
    a, b = (
        4 * subsets + 2 * (labels != -1) + (np.array(predictions) == labels)
        for predictions in (predictions_a, predictions_b)
    )
    return {
        "subsets": {
            subset: _contrast(a[rows] % 4, b[rows] % 4, subsets=1, seed=seed)
            for subset, rows in rows_of.items()
        },
        "average": _contrast(a, b, subsets=len(rows_of), seed=seed),
    }


def _contrast(a: np.ndarray, b: np.ndarray, *, subsets: int, seed: int) -> dict[str, Any]:

    def mean_f1(outcomes: np.ndarray) -> float:
        return float(_mean_scores(outcomes, subsets=subsets)[0])

    difference = paired_bootstrap(a, b, mean_f1, seed=seed, strata=a // 4)
    only_a, only_b = (int(np.sum(better % 2 > worse % 2)) for better, worse in ((a, b), (b, a)))
    return {
        "items": len(a),
        "f1_a": mean_f1(a),
        "f1_b": mean_f1(b),
        "difference": difference.value,
        "difference_interval": [difference.low, difference.high],
        "difference_p": difference.p,
        "right_by_a_alone": only_a,
        "right_by_b_alone": only_b,
        "mcnemar_p": mcnemar(only_a, only_b),
    }


def _mean_scores(outcomes: Sequence[int] | np.ndarray, *, subsets: int) -> np.ndarray:
    """F1, acc_error and acc_correct [3], averaged over subsets, of items that are 4 * subset + 2 *
    has an error + right; as in `processbench_f1`, what is undefined is 0."""
    wrong_and_right = np.bincount(outcomes, minlength=4 * subsets).reshape(subsets, 2, 2)
    accuracies = wrong_and_right[..., 1] / np.maximum(1, wrong_and_right.sum(axis=-1))
    acc_correct, acc_error = accuracies.T
    total = acc_correct + acc_error
    f1 = 2 * acc_correct * acc_error / np.where(total > 0, total, 1)
    return np.array([f1, acc_error, acc_correct]).mean(axis=1)

"""ProcessBench scores (arXiv 2412.06559), from verdicts on steps.

The official split is by the label: has the item an error or not? StepWiser's numbers follow the
split by the final answer; both are here. Percentages, as the official scorer prints them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from stepwiser_jax.records import Verdict


def first_predicted_error(
    verdicts: Sequence[Verdict], *, unparsed_as: Literal["negative", "positive"] = "negative"
) -> int:
    """Index of the first step judged Negative, -1 where there is none. `unparsed_as` says how a
    judgment counts that cannot be parsed; it shifts the balance between the two accuracies."""
    rejecting = {Verdict.NEGATIVE} | ({Verdict.UNPARSED} if unparsed_as == "negative" else set())
    return next((i for i, verdict in enumerate(verdicts) if verdict in rejecting), -1)


def majority_verdict(votes: Sequence[Verdict]) -> Verdict:
    """The more frequent of Positive and Negative among the votes that could be parsed; a tie is
    Negative (a step that half of the votes reject is not accepted), no parsed vote is Unparsed."""
    positive, negative = votes.count(Verdict.POSITIVE), votes.count(Verdict.NEGATIVE)
    if positive == negative == 0:
        return Verdict.UNPARSED
    return Verdict.POSITIVE if positive > negative else Verdict.NEGATIVE


def processbench_f1(predictions: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """Official: harmonic mean of the exact-match accuracy on items with an error and on those
    without. An accuracy over no items, and the F1 of two zeros, is 0 (the official script: nan)."""
    return _f1(predictions, labels, [label != -1 for label in labels])


def processbench_f1_by_final_answer(
    predictions: Sequence[int], labels: Sequence[int], final_answer_correct: Sequence[bool]
) -> dict[str, float]:
    """The same with the items split by their final answer (StepWiser eq 4)."""
    return _f1(predictions, labels, [not correct for correct in final_answer_correct])


def _f1(
    predictions: Sequence[int], labels: Sequence[int], is_error: Sequence[bool]
) -> dict[str, float]:
    matches: dict[bool, list[bool]] = {True: [], False: []}
    for prediction, label, error in zip(predictions, labels, is_error, strict=True):
        matches[error].append(prediction == label)
    acc_error, acc_correct = (
        100 * sum(matches[error]) / max(1, len(matches[error])) for error in (True, False)
    )
    total = acc_error + acc_correct
    f1 = 2 * acc_error * acc_correct / total if total else 0.0
    return {"f1": f1, "acc_error": acc_error, "acc_correct": acc_correct}

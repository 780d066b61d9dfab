"""Verdicts on the steps of a solution: from votes or probabilities, and the error they predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from stepwiser_jax.records import Verdict

UnparsedAs = Literal["negative", "positive"]
"""How a judgment without a verdict counts. It shifts the balance between the accuracies on items
with and without an error."""


def majority_verdict(votes: Sequence[Verdict]) -> Verdict:
    """Returns the more frequent of Positive and Negative; a tie is Negative, since a step that half
    of the votes reject is not accepted. If no vote gives a verdict, returns Other if any vote is
    Other, else Unparsed."""
    positive, negative = votes.count(Verdict.POSITIVE), votes.count(Verdict.NEGATIVE)
    if positive == negative == 0:
        return Verdict.OTHER if Verdict.OTHER in votes else Verdict.UNPARSED
    return Verdict.POSITIVE if positive > negative else Verdict.NEGATIVE


def verdict_at(threshold: float, p_positive: float) -> Verdict:
    """Returns Negative if P(+) is below the threshold, else Positive."""
    return Verdict.NEGATIVE if p_positive < threshold else Verdict.POSITIVE


def accepts(verdict: Verdict, unparsed_as: UnparsedAs) -> bool:
    """Returns whether a step with this verdict counts as right."""
    return verdict is Verdict.POSITIVE if verdict.is_given else unparsed_as == "positive"


def first_predicted_error(
    verdicts: Sequence[Verdict], *, unparsed_as: UnparsedAs = "negative"
) -> int:
    """Returns the index of the first step that is not accepted, or -1."""
    rejected = (i for i, verdict in enumerate(verdicts) if not accepts(verdict, unparsed_as))
    return next(rejected, -1)


def verdict_rates(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, float]:
    """Returns the shares of steps without a verdict, with something else in the box, and judged
    Positive."""
    flat = [verdict for of_item in verdicts for verdict in of_item]
    return {
        "unparsed_rate": sum(not verdict.is_given for verdict in flat) / len(flat),
        "other_box_rate": flat.count(Verdict.OTHER) / len(flat),
        "positive_share": flat.count(Verdict.POSITIVE) / len(flat),
    }

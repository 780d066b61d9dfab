"""Decides whether a judgment becomes training data, and if not, why."""

from __future__ import annotations

import enum

from stepwiser_jax.records import Verdict
from stepwiser_jax.text.prompts import parse_verdict


class RationaleOutcome(enum.Enum):
    """Why a rationale is kept, or is not."""

    KEPT = "kept"
    UNFINISHED = "unfinished"
    UNPARSED = "unparsed"
    OTHER_BOX = "other_box"
    DISAGREES = "disagrees"
    TOO_LONG = "too_long"
    REPEATED = "repeated"


def judgment_outcome(text: str, finished: bool, is_positive: bool) -> RationaleOutcome:
    """Returns the outcome of a judgment of one chunk: its verdict must be the label (A.1,
    RS-FT)."""
    verdict = parse_verdict(text)
    if not finished:
        return RationaleOutcome.UNFINISHED
    if not verdict.is_given:
        return RationaleOutcome.OTHER_BOX if verdict is Verdict.OTHER else RationaleOutcome.UNPARSED
    agrees = verdict is (Verdict.POSITIVE if is_positive else Verdict.NEGATIVE)
    return RationaleOutcome.KEPT if agrees else RationaleOutcome.DISAGREES

"""What a judgment earns (StepWiser 3.3)."""

from __future__ import annotations

from stepwiser_jax.records import Verdict


def judge_reward(verdict: Verdict, is_positive: bool) -> float:
    """1 where the verdict is the label, else 0; a judgment that cannot be parsed earns 0."""
    return float(verdict is (Verdict.POSITIVE if is_positive else Verdict.NEGATIVE))

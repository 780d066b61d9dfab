"""What a judgment earns (StepWiser 3.3)."""

from __future__ import annotations

from stepwiser_jax.records import Verdict


def judge_reward(
    verdict: Verdict, is_positive: bool, *, format_penalty: float = 0.0, in_format: bool = True
) -> float:
    """1 where the verdict is the label, else 0; a judgment that gives no verdict earns 0. With a
    penalty (the ablation of the chain of thought, A.1) one that is not `in_format` earns
    its negative, whatever its verdict."""
    if format_penalty and not in_format:
        return -format_penalty
    return float(verdict is (Verdict.POSITIVE if is_positive else Verdict.NEGATIVE))

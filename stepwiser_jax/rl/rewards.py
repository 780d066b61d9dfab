"""Rewards of completions. A config's `reward` is a name of `REWARDS` or a user's `module:function`,
and `reward_args` are its keyword arguments.

A reward is a function of (example, completion text, completion tokens). It returns a number, or a
dict of named terms: their sum is the reward, and each is the metric `reward_<name>`. It must depend
on its arguments alone, since all processes compute it, and a run that resumes computes it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stepwiser_jax.records import JudgeExample, Verdict
from stepwiser_jax.text.prompts import is_bare_verdict, parse_verdict

Reward = Callable[..., float | dict[str, float]]


def verdict_reward(
    example: JudgeExample, text: str, tokens: Any, *, format_penalty: float = 0.0
) -> float | dict[str, float]:
    """Returns 1 if the verdict of a judgment is the label, else 0; a judgment without a verdict
    earns 0 (StepWiser 3.3). With `format_penalty` (the ablation of the chain of thought, A.1) a
    judgment that is more than its verdict earns minus the penalty, right or wrong."""
    is_right = judge_reward(parse_verdict(text), example.is_positive)
    if not format_penalty:
        return is_right
    if is_bare_verdict(text):
        return {"verdict": is_right, "format": 0.0}
    return {"verdict": 0.0, "format": -format_penalty}


REWARDS: dict[str, Reward] = {"verdict": verdict_reward}


def judge_reward(verdict: Verdict, is_positive: bool) -> float:
    """Returns 1 if the verdict is the label, else 0."""
    return float(verdict is (Verdict.POSITIVE if is_positive else Verdict.NEGATIVE))


def verdict_metrics(texts: Sequence[str], *, bare: bool) -> dict[str, float]:
    """Returns shares of judgments: those that say Positive, those without a verdict
    (`unparsed_rate`), and those among them whose last box holds something else (`other_box_rate`).
    With `bare` also the share of those that are nothing but a verdict."""
    verdicts = [parse_verdict(text) for text in texts]
    shares = {
        "verdict_positive_share": verdicts.count(Verdict.POSITIVE) / len(verdicts),
        "unparsed_rate": sum(not verdict.is_given for verdict in verdicts) / len(verdicts),
        "other_box_rate": verdicts.count(Verdict.OTHER) / len(verdicts),
    }
    if bare:
        shares["in_format_share"] = sum(map(is_bare_verdict, texts)) / len(texts)
    return shares

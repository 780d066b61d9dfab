"""Rewards of completions, and what rollouts leave in the metrics.

A config's `reward` is a name of `REWARDS` or a user's `module:function`. `reward_args` are its
keyword arguments: give a reward another one, and it is a setting. Document it at `reward_args` in
`config.py`.

A reward is a function of (example, completion text, completion tokens). It returns a number, or a
dict of named terms: their sum is the reward, and each is the metric `reward_<name>`. It must depend
on its arguments alone, since all processes compute it, and a run that resumes computes it again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stepwiser_jax.errors import UserError
from stepwiser_jax.records import JudgeExample, Verdict
from stepwiser_jax.text.prompts import is_bare_verdict, parse_verdict

if TYPE_CHECKING:
    from stepwiser_jax.rl.rollouts import RolloutGroup

Reward = Callable[..., float | dict[str, float]]


def verdict_reward(
    example: JudgeExample, text: str, tokens: Any, *, format_penalty: float = 0.0
) -> dict[str, float]:
    """Returns what a judgment earns: `verdict` 1 if its verdict is the label, else 0; a judgment
    without a verdict earns 0 (StepWiser 3.3).

    With `format_penalty` (the ablation of the chain of thought, A.1) a judgment that is more than
    its verdict earns minus the penalty, right or wrong.
    """
    earned = {"verdict": verdict_score(parse_verdict(text), example.is_positive)}
    if not format_penalty:
        return earned
    if is_bare_verdict(text):
        return earned | {"format": 0.0}
    return {"verdict": 0.0, "format": -format_penalty}


def verdict_score(verdict: Verdict, is_positive: bool) -> float:
    """Returns 1 if the verdict is the label, else 0."""
    return float(verdict is (Verdict.POSITIVE if is_positive else Verdict.NEGATIVE))


REWARDS: dict[str, Reward] = {"verdict": verdict_reward}


def add_rewards(groups: Sequence[RolloutGroup], reward: Reward) -> list[RolloutGroup]:
    """Returns the groups with what each completion earns."""

    def terms(group: RolloutGroup, text: str, tokens: np.ndarray) -> dict[str, float]:
        found = reward(group.example, text, tokens)
        found = found if isinstance(found, dict) else {"": found}
        for name, value in found.items():
            is_number = isinstance(value, int | float | np.number)  # pyright: ignore[reportUnnecessaryIsInstance]
            if not is_number or not math.isfinite(value):
                raise UserError(
                    f"expected a reward that is a finite number, or a dict of such numbers, found "
                    f"{value!r}{f' as {name!r}' if name else ''} for {group.group_id}"
                )
        return {name: float(value) for name, value in found.items()}

    return [
        dataclasses.replace(
            group,
            reward_terms_G=[
                terms(group, text, tokens)
                for text, tokens in zip(group.texts_G, group.completions_G, strict=True)
            ],
        )
        for group in groups
    ]


# --- metrics ------------------------------------------------------------------------------------


def rollout_metrics(sampled: Sequence[RolloutGroup]) -> dict[str, float]:
    """Returns metrics over all completions sampled, learned from or not: the mean reward and its
    named terms, the share of groups with differing rewards, and lengths in tokens."""
    lengths = [len(tokens) for group in sampled for tokens in group.completions_G]
    terms = [terms for group in sampled for terms in group.reward_terms_G]
    names = sorted({name for named in terms for name in named if name})
    return {
        "reward": float(np.mean([group.rewards_G for group in sampled])),
        **{f"reward_{n}": float(np.mean([t.get(n, 0.0) for t in terms])) for n in names},
        "groups_sampled": len(sampled),
        "groups_with_signal_share": float(np.mean([group.has_signal for group in sampled])),
        "response_tokens": float(np.mean(lengths)),
        "response_tokens_max": float(np.max(lengths)),
    }


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

"""Scores a run's judgments of benchmark items: one verdict per step, then the benchmark's scores.

judgments `<item>/<step>` and `<item>/<step>/vote<k>` -> a verdict on each step -> scores
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepwiser_jax.config import Evaluate
from stepwiser_jax.evaluation.prmbench import score_prmbench
from stepwiser_jax.evaluation.processbench import score_by_subset
from stepwiser_jax.evaluation.verdicts import UnparsedAs, majority_verdict, verdict_at
from stepwiser_jax.evaluation.whole_solutions import solutions_by_subset
from stepwiser_jax.records import BenchmarkItem, Judgment, PrmBenchItem, ProcessBenchItem, Verdict

GREEDY = ("",)
"""The suffix of greedy judgments."""


@dataclass(frozen=True)
class VotingRule:
    """How the judgments of a step become one verdict: by the majority, or by the mean P(right) at a
    `threshold`, as for GenPRM and classifiers. `unparsed_as` is how a step counts that no judgment
    gives a verdict on."""

    threshold: float | None = None
    unparsed_as: UnparsedAs = "negative"

    @classmethod
    def of_run(cls, config: Evaluate) -> VotingRule:
        """Returns the rule by which a run of `evaluate` counts. GenPRM has P(right), which is 1/2
        without a verdict."""
        if config.genprm is None:
            return cls(unparsed_as=config.unparsed_as)
        threshold = config.genprm.threshold
        return cls(threshold, "negative" if threshold > 0.5 else "positive")

    @property
    def name(self) -> str:
        return "majority" if self.threshold is None else "mean"

    def verdict(self, votes: Sequence[Judgment]) -> Verdict:
        verdict = majority_verdict([vote.verdict for vote in votes])
        if self.threshold is None or not verdict.is_given:
            return verdict
        return verdict_at(self.threshold, sum(vote.p_positive for vote in votes) / len(votes))

    def verdicts(
        self,
        item: BenchmarkItem,
        judgments: Mapping[str, Judgment],
        suffixes: Sequence[str] = GREEDY,
    ) -> list[Verdict]:
        """Returns the verdict on each step by the judgments `<item>/<step><suffix>` together."""
        return [
            self.verdict([judgments[f"{item.item_id}/{step}{suffix}"] for suffix in suffixes])
            for step in range(len(item.steps))
        ]


def vote_suffixes(votes: int) -> list[str]:
    """Returns the suffixes that tell the sampled judgments of a step apart."""
    return [f"/vote{k}" for k in range(votes)]


def voters(rule_name: str, votes: int) -> dict[str, Sequence[str]]:
    """Returns the suffixes of the judgments that are scored together, by the score's name: `greedy`
    and, with votes, for example `majority_8`."""
    sampled = {f"{rule_name}_{votes}": vote_suffixes(votes)} if votes else {}
    return {"greedy": GREEDY, **sampled}


def score_judgments(
    items: Sequence[BenchmarkItem],
    judgments: Mapping[str, Judgment],
    rule: VotingRule,
    *,
    votes: int,
    seed: int,
) -> dict[str, Any]:
    """Returns the scores of the greedy judgments and, with votes, of all sampled ones together.

    Args:
        items: All of ProcessBench, or all of PRMBench.
        judgments: By id.
        rule: How judgments of a step become a verdict.
        votes: Number of sampled judgments of each step.
        seed: Of the bootstrap intervals.
    """
    score: Any = score_prmbench if isinstance(items[0], PrmBenchItem) else score_by_subset
    summary: dict[str, Any] = {"items": len(items), "unparsed_as": rule.unparsed_as}
    for name, suffixes in voters(rule.name, votes).items():
        verdicts = [rule.verdicts(item, judgments, suffixes) for item in items]
        summary[name] = score(items, verdicts, seed=seed, unparsed_as=rule.unparsed_as)
    return summary


def score_whole_solutions(
    items: Sequence[ProcessBenchItem],
    judgments: Mapping[str, Judgment],
    *,
    votes: int,
    seed: int,
) -> dict[str, Any]:
    """Returns the scores of the judgments `<item>/solution`: of the greedy chain and, with votes,
    of the mean probability of the sampled ones. An output is bad if it lacks the verdict on a step
    up to its first incorrect one."""

    def p_correct(item: BenchmarkItem, suffix: str) -> float:
        return judgments[f"{item.item_id}/solution{suffix}"].p_positive

    def is_bad(item: BenchmarkItem, suffix: str) -> bool:
        steps = range(len(item.steps))
        return Verdict.UNPARSED in {judgments[f"{item.item_id}/{s}{suffix}"].verdict for s in steps}

    return {
        name: solutions_by_subset(
            items,
            [float(np.mean([p_correct(item, x) for x in suffixes])) for item in items],
            [float(np.mean([is_bad(item, x) for x in suffixes])) for item in items],
            seed=seed,
        )
        for name, suffixes in voters("mean", votes).items()
    }

"""Scores a run's judgments of benchmark items: one verdict per step, then the benchmark's scores.

judgments `<item>/<step>` and `<item>/<step>/vote<k>` -> a verdict on each step -> scores
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepwiser_jax.config import (
    ClassifierJudge,
    Evaluate,
    GenPrmJudge,
    Judge,
    OwnJudge,
    ThinkPrmJudge,
)
from stepwiser_jax.evaluation.prmbench import score_prmbench
from stepwiser_jax.evaluation.processbench import best_threshold, score_by_subset
from stepwiser_jax.evaluation.verdicts import UnparsedAs, majority_verdict, verdict_at
from stepwiser_jax.evaluation.whole_solutions import solutions_by_subset
from stepwiser_jax.judges.base import ChunkJudgment, SolutionJudgment, vote_suffixes
from stepwiser_jax.records import BenchmarkItem, Judgment, PrmBenchItem, ProcessBenchItem, Verdict
from stepwiser_jax.rl.rewards import verdict_score

GREEDY = ("",)
"""The suffix of greedy judgments."""


def votes_of(judge: Judge) -> int:
    """Returns the number of judgments of a step that are sampled in addition to the greedy one."""
    return 0 if isinstance(judge, ClassifierJudge | OwnJudge) else judge.votes


def passes_of(judge: Judge) -> list[tuple[Sequence[str], dict[str, Any]]]:
    """Returns the suffixes of the judgments of a solution, and how they are drawn: first the greedy
    one, then the votes if there are any."""
    passes: list[tuple[Sequence[str], dict[str, Any]]] = [(GREEDY, {"temperature": 0.0})]
    if suffixes := vote_suffixes(votes_of(judge)):
        assert not isinstance(judge, ClassifierJudge | OwnJudge)
        passes.append((suffixes, judge.sampling.drawing))
    return passes


def voters(rule_name: str, votes: int) -> dict[str, Sequence[str]]:
    """Returns the suffixes of the judgments that are scored together, by the score's name: `greedy`
    and, with votes, for example `majority_8`."""
    sampled = {f"{rule_name}_{votes}": vote_suffixes(votes)} if votes else {}
    return {"greedy": GREEDY, **sampled}


# --- records ------------------------------------------------------------------------------------


def judgment_ids(
    items: Sequence[BenchmarkItem], suffixes: Sequence[str], *, whole: bool = False
) -> list[str]:
    """Returns the ids `<item>/<step><suffix>` of the judgments of items; with `whole` also
    `<item>/solution<suffix>`."""
    ends = ["solution"] if whole else []
    ids = [f"{item.item_id}/{part}" for item in items for part in [*range(len(item.steps)), *ends]]
    return [f"{judgment_id}{suffix}" for suffix in suffixes for judgment_id in ids]


def judgment_records(
    item: BenchmarkItem, found: SolutionJudgment, judge_id: str, suffix: str = ""
) -> list[Judgment]:
    """Returns the records `<item>/<step><suffix>`, and `<item>/solution<suffix>` if the judge gave
    a judgment of the whole solution. Each has its reward by the item's label."""

    def record(part: int | str, judgment: ChunkJudgment, is_right: bool) -> Judgment:
        return Judgment(
            example_id=f"{item.item_id}/{part}{suffix}",
            judge_id=judge_id,
            completion=judgment.completion,
            verdict=judgment.verdict,
            p_positive=judgment.p_positive,
            reward=verdict_score(judgment.verdict, is_right),
        )

    records = [record(step, j, item.is_right(step)) for step, j in enumerate(found.chunks)]
    if found.whole is not None:
        records.append(record("solution", found.whole, item.first_error == -1))
    return records


def describe_judgment(item: BenchmarkItem, step: int, judgment: Judgment) -> dict[str, str]:
    """Returns a judgment of a step, with the step, the steps before it, and the truth."""
    truth = Verdict.POSITIVE if item.is_right(step) else Verdict.NEGATIVE
    return {
        "question": item.question,
        "history": " ".join(item.steps[:step]),
        "step": item.steps[step],
        "judge": judgment.completion,
        "verdict": judgment.verdict.value,
        "truth": truth.value,
    }


def example_judgments(
    items: Sequence[BenchmarkItem], judgments: Mapping[str, Judgment]
) -> list[dict[str, str]]:
    """Returns descriptions of the first right and the first wrong greedy judgment. Judgments of
    first errors come before those of right steps."""
    errors = [(item, item.first_error) for item in items if item.first_error >= 0]
    steps = errors + [(item, 0) for item in items if item.first_error != 0]
    found: dict[bool, dict[str, str]] = {}
    for item, step in steps:
        described = describe_judgment(item, step, judgments[f"{item.item_id}/{step}"])
        found.setdefault(described["verdict"] == described["truth"], described)
    return [found[is_right] for is_right in (True, False) if is_right in found]


# --- scores -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VotingRule:
    """How the judgments of a step become one verdict: by the majority of what is written, or with a
    `threshold` by the mean probability that the step is right."""

    threshold: float | None = None

    @property
    def name(self) -> str:
        return "majority" if self.threshold is None else "mean"

    @property
    def unparsed_as(self) -> UnparsedAs:
        """How a step without a verdict counts. With a threshold its probability is 1/2."""
        return "negative" if self.threshold is None or self.threshold > 0.5 else "positive"

    def verdict(self, votes: Sequence[Judgment] | Sequence[ChunkJudgment]) -> Verdict:
        """Returns the verdict on one step."""
        verdict = majority_verdict([vote.verdict for vote in votes])
        if self.threshold is None or not verdict.is_given:
            return verdict
        return verdict_at(self.threshold, mean_probability(votes))

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


def mean_probability(votes: Sequence[Judgment] | Sequence[ChunkJudgment]) -> float:
    return sum(vote.p_positive for vote in votes) / len(votes)


def probabilities_of(
    item: BenchmarkItem, judgments: Mapping[str, Judgment], suffixes: Sequence[str] = GREEDY
) -> list[float]:
    """Returns the probability that each step is right, by the judgments `<item>/<step><suffix>`
    together."""
    return [
        mean_probability([judgments[f"{item.item_id}/{step}{suffix}"] for suffix in suffixes])
        for step in range(len(item.steps))
    ]


def threshold_of(
    config: Evaluate, items: Sequence[BenchmarkItem], judgments: Mapping[str, Judgment]
) -> float | None:
    """Returns the probability below which a step is wrong: that of the settings, or the one with
    which the greedy judgments have the best F1 on `threshold_subset`. It is None if what the judge
    writes counts as it is."""
    if config.threshold_subset is not None:
        chosen_on = [item for item in items if item.subset == config.threshold_subset]
        p_positive = [probabilities_of(item, judgments) for item in chosen_on]
        return best_threshold(p_positive, [item.first_error for item in chosen_on])
    return own_threshold(config.judge)


def own_threshold(judge: Judge) -> float | None:
    """Returns the probability below which a step is wrong by a judge's settings, None if what it
    writes counts as it is."""
    if isinstance(judge, GenPrmJudge | ClassifierJudge):
        return 0.5 if judge.threshold is None else judge.threshold
    return None if isinstance(judge, ThinkPrmJudge | OwnJudge) else judge.threshold


def rules_of(config: Evaluate, threshold: float | None) -> dict[str, VotingRule]:
    """Returns the rules that judgments are scored by. The key ends the score's name.

    A classifier and GenPRM have a threshold, and other judges write verdicts. So the rule "" is the
    threshold or the written verdict; `_at_half` is the threshold 1/2, and `_at_threshold` is that
    of a judge that writes verdicts. ThinkPRM gives steps no probability.
    """
    if isinstance(config.judge, ThinkPrmJudge):
        return {"": VotingRule()}
    half = {"_at_half": VotingRule(0.5)}
    if isinstance(config.judge, ClassifierJudge | GenPrmJudge):
        return {"": VotingRule(threshold)} | ({} if threshold == 0.5 else half)
    chosen = {} if threshold is None else {"_at_threshold": VotingRule(threshold)}
    return {"": VotingRule()} | half | chosen


def score_judgments(
    items: Sequence[BenchmarkItem],
    judgments: Mapping[str, Judgment],
    rules: Mapping[str, VotingRule],
    *,
    votes: int,
    seed: int,
) -> dict[str, Any]:
    """Returns the scores of the greedy judgments and, with votes, of all sampled ones together, by
    every rule. AUC, which no rule changes, is with those of the first.

    Args:
        items: All of ProcessBench, or all of PRMBench.
        judgments: By id.
        rules: How judgments of a step become a verdict, see `rules_of`.
        votes: Number of sampled judgments of each step.
        seed: Seeds the bootstrap intervals.
    """
    score: Any = score_prmbench if isinstance(items[0], PrmBenchItem) else score_by_subset
    summary: dict[str, Any] = {"items": len(items), "unparsed_as": rules[""].unparsed_as}
    for ending, rule in rules.items():
        for name, suffixes in voters(rule.name, votes).items():
            verdicts = [rule.verdicts(item, judgments, suffixes) for item in items]
            p_positive = [probabilities_of(item, judgments, suffixes) for item in items]
            summary[f"{name}{ending}"] = score(
                items,
                verdicts,
                None if ending else p_positive,
                seed=seed,
                unparsed_as=rule.unparsed_as,
            )
    return summary


def score_whole_solutions(
    items: Sequence[ProcessBenchItem],
    judgments: Mapping[str, Judgment],
    *,
    votes: int,
    seed: int,
) -> dict[str, Any]:
    """Returns the scores of the judgments `<item>/solution`: those of the greedy chain and, with
    votes, those of the mean probability of the sampled ones. An output is bad if it lacks the
    verdict on a step up to its first incorrect one."""

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

"""Scores a judge on ProcessBench (StepWiser 4.2) or PRMBench.

    item -> one judge prompt per step -> verdicts -> the first Negative is the predicted error,
                                                     -1 if there is none

ProcessBench is scored twice: by the official split of items (does the item have an error?), and by
the split that the paper follows (is the final answer right?). Every step is judged, not only those
up to the first rejection, so that the steps of all items run together. PRMBench has its own scores
(`evaluation/prmbench.py`).

A classifier reads all steps of an item in one pass. Its threshold is a setting, or is the one with
the best official F1 on one subset, which is then used for all, as ProcessBench does with gsm8k. On
that subset the score is then the best that any threshold gives: `summary.json` names the subset.

GenPRM's judgments of an item are a conversation (`judges/genprm.py`). A step is wrong if its
P(right), or its mean over the sampled paths, is below the threshold; without a verdict it has 1/2.

ThinkPRM's judgments of an item are one chain. It also writes `<item>/solution`, a judgment of the
whole solution. How well that tells right solutions from wrong ones is scored in `solution`; this F1
is binary, and not ProcessBench's.

Reads `judge` and `benchmark`. Writes judgments: `<item>/<step>` is the greedy one,
`<item>/<step>/vote<k>` are sampled. A classifier's verdict is the likelier sign, whatever the
threshold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stepwiser_jax.config import ClassifierJudge, Evaluate, GenPrmJudge, ThinkPrmJudge
from stepwiser_jax.data.problems import load_items
from stepwiser_jax.distributed.hosts import WHOLE, Shard
from stepwiser_jax.distributed.loading import load_tokenizer_of
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.prmbench import score_prmbench
from stepwiser_jax.evaluation.processbench import (
    best_threshold,
    majority_verdict,
    score_by_subset,
    solutions_by_subset,
    verdicts_at,
)
from stepwiser_jax.judges.classifier import Scorer
from stepwiser_jax.judges.load import load_judge
from stepwiser_jax.judges.stepwiser import (
    ChunkJudgment,
    Solution,
    a_right_and_a_wrong_one,
    judgment_of,
)
from stepwiser_jax.judges.thinkprm import Verification
from stepwiser_jax.records import BenchmarkItem, Judgment, PrmBenchItem, Verdict
from stepwiser_jax.rl.rewards import judge_reward
from stepwiser_jax.runs.blocks import Session, Work, run_blocks
from stepwiser_jax.runs.directory import per_item

def run(config: Evaluate, run_dir: str | Path, shard: Shard = WHOLE) -> dict[str, Any]:
    """Judges the items of a benchmark, block after block."""

    def prepare() -> Work[BenchmarkItem, Judgment]:
        dropped: Counter[str] = Counter()
        items = load_items(
            config.benchmark.source,
            load_tokenizer_of(config.judge.path),
            split=config.benchmark.split,
            limit=config.benchmark.limit,
            on_malformed=config.benchmark.on_malformed,
            dropped=dropped,
        )
        check_subset(config, items)

        def scores(found: Sequence[Judgment]) -> dict[str, Any]:
            judgments = {judgment.example_id: judgment for judgment in found}
            examples = {"judgments": a_right_and_a_wrong_one(items, judgments)}
            return summarize(config, items, judgments) | {"dropped": dict(dropped)} | examples

        return Work(
            items=items,
            record_type=Judgment,
            ids_of=lambda block: judgment_ids(config, block),
            begin=lambda session: begin(config, session, items),
            summarize=scores,
            unit="judgment",
        )

    return run_blocks("evaluate", config, run_dir, shard, prepare)


def check_subset(config: Evaluate, items: Sequence[BenchmarkItem]) -> None:
    """Raises UserError if the threshold is to be chosen on a subset that is not there."""
    subset, source = config.threshold_subset, config.benchmark.source
    if subset is None:
        return
    if isinstance(items[0], PrmBenchItem):
        raise UserError(
            f"threshold_subset {subset!r} is for ProcessBench, whose F1 chooses the threshold; "
            f"{source} is of PRMBench: set judge.threshold, and threshold_subset to null"
        )
    subsets = sorted({item.subset for item in items})
    if subset not in subsets:
        raise UserError(
            f"expected threshold_subset among the subsets of {source}, which are {subsets}, found "
            f"{subset!r}"
        )


def begin(
    config: Evaluate, session: Session, items: Sequence[BenchmarkItem]
) -> Callable[[Sequence[BenchmarkItem]], list[Judgment]]:
    """Returns the function that judges a block. Raises UserError for an item that is too long."""
    settings = config.judge
    if isinstance(settings, ClassifierJudge):
        # Records say the likelier sign, whatever the threshold that the summary uses.
        settings = settings.model_copy(update={"threshold": None})
    judge = load_judge(settings, mesh=session.mesh, seed=config.seed, name="evaluate")
    judge.check_lengths([Solution.of_item(item) for item in items])
    session.compiled["judge"] = judge.compiled_shapes
    if isinstance(settings, ClassifierJudge):
        return lambda block: classify_block(judge, block)
    session.measures.append(
        lambda made: {"tokens_per_judgment": per_item(judge.engine.sampled_tokens, made)}
    )
    if isinstance(settings, GenPrmJudge):
        session.measures.append(lambda made: judge.writer.measured)
    return lambda block: judge_block(config, judge, block)


def votes_of(config: Evaluate) -> int:
    """Returns the number of judgments of a step that are sampled beside the greedy one."""
    return 0 if isinstance(config.judge, ClassifierJudge) else config.judge.votes


def judgment_ids(config: Evaluate, block: Sequence[BenchmarkItem]) -> list[str]:
    """Returns the ids of a block's judgments."""
    whole = ["solution"] if isinstance(config.judge, ThinkPrmJudge) else []
    ids = [f"{i.item_id}/{part}" for i in block for part in [*range(len(i.steps)), *whole]]
    return ids + [f"{i}/vote{k}" for i in ids for k in range(votes_of(config))]


def classify_block(judge: Scorer, block: Sequence[BenchmarkItem]) -> list[Judgment]:
    """Returns a classifier's judgments of all steps of these items."""
    found = judge([Solution.of_item(item) for item in block])
    return [
        judgment
        for item, said in zip(block, found, strict=True)
        for judgment in judgments_of(item, said, judge.loaded.model_id, "")
    ]


def judge_block(config: Evaluate, judge: Any, block: Sequence[BenchmarkItem]) -> list[Judgment]:
    """Returns judgments of all steps of these items, greedy and sampled."""
    solutions = [Solution.of_item(item) for item in block]
    passes = [([""], judge.sample(solutions, 0.0, [""]))]
    assert not isinstance(config.judge, ClassifierJudge)
    if config.judge.votes:
        suffixes = [f"/vote{k}" for k in range(config.judge.votes)]
        sampling = config.judge.sampling
        truncation = {"top_k": sampling.top_k, "top_p": sampling.top_p}
        sampled = judge.sample(solutions, sampling.temperature, suffixes, **truncation)
        passes.append((suffixes, sampled))
    return [
        judgment
        for suffixes, found_of in passes
        for item, found in zip(block, found_of, strict=True)
        for suffix, said in zip(suffixes, found, strict=True)
        for judgment in judgments_of(item, said, judge.loaded.model_id, suffix)
    ]


def judgments_of(
    item: BenchmarkItem, said: list[ChunkJudgment] | Verification, judge_id: str, suffix: str
) -> list[Judgment]:
    """Returns the records of a judge's word on an item's steps and, if it gave one, on all of it."""
    if isinstance(said, Verification):
        whole = said.solution
        of_solution = Judgment(
            example_id=f"{item.item_id}/solution{suffix}",
            judge_id=judge_id,
            completion=whole.completion,
            verdict=whole.verdict,
            p_positive=whole.p_positive,
            reward=judge_reward(whole.verdict, item.first_error == -1),
        )
        return [*judgments_of(item, said.steps, judge_id, suffix), of_solution]
    return [judgment_of(item, step, opinion, judge_id, suffix) for step, opinion in enumerate(said)]


# --- scores -------------------------------------------------------------------------------------


def summarize(
    config: Evaluate, items: Sequence[BenchmarkItem], judgments: dict[str, Judgment]
) -> dict[str, Any]:
    """Returns the scores of the greedy judgments and, with votes, of the sampled ones; fractions
    between 0 and 1."""
    score: Any = score_prmbench if isinstance(items[0], PrmBenchItem) else score_by_subset
    threshold = threshold_of(config, items, judgments)
    unparsed_as = counts_unparsed_as(threshold)
    summary: dict[str, Any] = {"items": len(items), "unparsed_as": unparsed_as}
    if isinstance(config.judge, ClassifierJudge):
        summary |= {"threshold": threshold, "threshold_chosen_on": config.threshold_subset}
    for name, suffixes in voters_of(config).items():
        verdicts = [verdicts_of(threshold, item, judgments, suffixes) for item in items]
        summary[name] = score(items, verdicts, seed=config.seed, unparsed_as=unparsed_as)
    if isinstance(config.judge, ThinkPrmJudge) and score is score_by_subset:
        summary["solution"] = score_solutions(config, items, judgments)
    return summary


def threshold_of(
    config: Evaluate, items: Sequence[BenchmarkItem], judgments: dict[str, Judgment]
) -> float | None:
    """Returns the probability below which a step is wrong: that of the settings, or the one with
    the best F1 on `threshold_subset`. None for a judge whose verdicts count as they are."""
    judge = config.judge
    if isinstance(judge, GenPrmJudge):
        return judge.threshold
    if not isinstance(judge, ClassifierJudge):
        return None
    if config.threshold_subset is None:
        return 0.5 if judge.threshold is None else judge.threshold
    chosen_on = [item for item in items if item.subset == config.threshold_subset]
    p_positive = [
        [judgments[f"{item.item_id}/{step}"].p_positive for step in range(len(item.steps))]
        for item in chosen_on
    ]
    return best_threshold(p_positive, [item.first_error for item in chosen_on])


def verdicts_of(
    threshold: float | None,
    item: BenchmarkItem,
    judgments: dict[str, Judgment],
    suffixes: Sequence[str],
) -> list[Verdict]:
    """Returns what the judgments of each step with these suffixes say together: the majority or,
    with a threshold, the mean probability if any of them has a verdict."""
    verdicts = []
    for step in range(len(item.steps)):
        votes = [judgments[f"{item.item_id}/{step}{suffix}"] for suffix in suffixes]
        verdict = majority_verdict([vote.verdict for vote in votes])
        if threshold is not None and verdict.is_given:
            mean = sum(vote.p_positive for vote in votes) / len(votes)
            (verdict,) = verdicts_at(threshold, [mean])
        verdicts.append(verdict)
    return verdicts


def counts_unparsed_as(threshold: float | None) -> Literal["negative", "positive"]:
    """Returns how a step without a verdict counts; with a threshold it has the probability 1/2."""
    return "negative" if threshold is None or threshold > 0.5 else "positive"


def voters_of(config: Evaluate, together: str | None = None) -> dict[str, list[str]]:
    """Returns the suffixes of the judgments that are scored together, by name: `greedy`, and how
    votes become one, with their number."""
    together = together or ("mean" if isinstance(config.judge, GenPrmJudge) else "majority")
    voters = {"greedy": [""]}
    if votes := votes_of(config):
        voters[f"{together}_{votes}"] = [f"/vote{k}" for k in range(votes)]
    return voters


def score_solutions(
    config: Evaluate, items: Sequence[BenchmarkItem], judgments: dict[str, Judgment]
) -> dict[str, Any]:
    """Returns how well P(right) of a whole solution tells right solutions from wrong ones: of the
    greedy chain and, with votes, of the mean of the sampled ones. An output is bad if it lacks the
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
            seed=config.seed,
        )
        for name, suffixes in voters_of(config, "mean").items()
    }

"""Scores a judge on ProcessBench (StepWiser 4.2) or PRMBench.

    item -> one judge prompt per step -> verdicts -> the first Negative is the predicted error,
                                                     -1 if there is none

ProcessBench is scored twice: by the official split of items (does the item have an error?), and by
the split that the paper follows (is the final answer right?). Every step is judged, not only those
up to the first rejection, so that the steps of all items run together. PRMBench has its own scores.

Every judge gives a step a probability to be right, P (`ChunkJudgment`). AUC says how well P tells
first errors from right steps. A step is wrong if P is below a threshold: 1/2, a setting, or the one
with the best official F1 on one subset, which is then used for all, as ProcessBench does with
gsm8k. On that subset the score is then the best that any threshold gives: `summary.json` names the
subset. A judge that writes verdicts is scored by these first (`greedy`), then by P at 1/2
(`greedy_at_half`), and at a threshold if there is one (`greedy_at_threshold`).

A classifier reads all steps of an item in one pass.

GenPRM's judgments of an item are a conversation (`judges/genprm/judge.py`). A step is wrong if its
P(right), or the mean of it over the sampled paths, is below the threshold. Without a verdict
P(right) is 1/2.

ThinkPRM's judgments of an item are one chain. It also writes `<item>/solution`, a judgment of the
whole solution. `solution` in the summary says how well that tells right solutions from wrong ones;
its F1 is binary, and not ProcessBench's. P of a step is 1 or 0, as the chain says.

Reads `judge` and `benchmark`. Writes judgments: `<item>/<step>` is the greedy one,
`<item>/<step>/vote<k>` are sampled. Their verdict is the one that is written, and for a classifier
the likelier sign, whatever the threshold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stepwiser_jax.config import ClassifierJudge, Evaluate, ThinkPrmJudge
from stepwiser_jax.data.problems import read_items
from stepwiser_jax.distributed.hosts import NO_SHARD, Shard
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.judgments import (
    GREEDY,
    example_judgments,
    judgment_ids,
    judgment_records,
    passes_of,
    rules_of,
    score_judgments,
    score_whole_solutions,
    threshold_of,
    votes_of,
)
from stepwiser_jax.judges.base import Judge, Solution, vote_suffixes
from stepwiser_jax.judges.load import load_judge
from stepwiser_jax.records import BenchmarkItem, Judgment, PrmBenchItem, ProcessBenchItem
from stepwiser_jax.runs.blocks import Session, Work, run_blocks


def run(config: Evaluate, run_dir: str | Path, shard: Shard = NO_SHARD) -> dict[str, Any]:
    """Judges the items of a benchmark, block after block."""

    def prepare() -> Work[BenchmarkItem, Judgment]:
        dropped: Counter[str] = Counter()
        items = read_items(config, dropped)
        check_subset(config, items)

        def scores(found: Sequence[Judgment]) -> dict[str, Any]:
            judgments = {judgment.example_id: judgment for judgment in found}
            examples = example_judgments(items, judgments)
            more = {"dropped": dict(dropped), "judgments": examples}
            return summarize(config, items, judgments) | more

        return Work(
            items=items,
            record_type=Judgment,
            ids_of=lambda block: judgment_ids(
                block,
                [*GREEDY, *vote_suffixes(votes_of(config.judge))],
                whole=isinstance(config.judge, ThinkPrmJudge),
            ),
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
    session.measures.append(judge.measured)
    return lambda block: judge_block(config, judge, block)


def judge_block(config: Evaluate, judge: Judge, block: Sequence[BenchmarkItem]) -> list[Judgment]:
    """Returns judgments of all steps of these items, greedy and sampled."""
    solutions = [Solution.of_item(item) for item in block]
    return [
        record
        for suffixes, drawing in passes_of(config.judge)
        for item, found in zip(block, judge.sample(solutions, suffixes, **drawing), strict=True)
        for suffix, judgment in zip(suffixes, found, strict=True)
        for record in judgment_records(item, judgment, judge.judge_id, suffix)
    ]


def summarize(
    config: Evaluate, items: Sequence[BenchmarkItem], judgments: dict[str, Judgment]
) -> dict[str, Any]:
    """Returns the scores of the greedy judgments and, with votes, of the sampled ones; fractions
    between 0 and 1."""
    threshold = threshold_of(config, items, judgments)
    how = {"votes": votes_of(config.judge), "seed": config.seed}
    summary = score_judgments(items, judgments, rules_of(config, threshold), **how)
    if threshold is not None:
        summary |= {"threshold": threshold, "threshold_chosen_on": config.threshold_subset}
    whole = [item for item in items if isinstance(item, ProcessBenchItem)]
    if isinstance(config.judge, ThinkPrmJudge) and whole:
        summary["solution"] = score_whole_solutions(whole, judgments, **how)
    return summary

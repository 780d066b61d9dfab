"""ProcessBench: find the first wrong step of a solution with the judge (StepWiser 4.2). PRMBench:
say of every step whether it is wrong.

    item -> one judge prompt per step -> verdicts -> first Negative is the predicted error, else -1

Both ways to split the items are scored: the official one (has the item an error?) and the one by
final answer, which the paper's numbers follow. Every step is judged, not only those up to the first
rejection, so that the steps of all items run together and per-step rates can be reported. Items of
PRMBench have its own scores in place of these (`evaluation/prmbench.py`).

With `genprm` a path of judgments is a conversation about the item (`judges/genprm.py`); a step is
wrong whose P(right), or its mean over the sampled paths, is below a threshold. A step without a
verdict has 1/2.

With `thinkprm` a path is one chain about all steps of the item, and `<item>/solution` is a judgment
too: of the whole solution, with the probability that it is right. How well that tells right
solutions from wrong ones is scored apart, in `solution`: its F1 is binary, and not ProcessBench's.

Reads `judge` and `items`. Writes judgments: `<item>/<step>` is the greedy one,
`<item>/<step>/vote<k>` the sampled ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from stepwiser_jax.config import Evaluate
from stepwiser_jax.data.problems import load_items
from stepwiser_jax.distributed.hosts import NO_SHARD, Shard
from stepwiser_jax.distributed.loading import Loaded, load_for_decoding, load_tokenizer_of
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.evaluation.prmbench import score_prmbench
from stepwiser_jax.evaluation.processbench import (
    majority_verdict,
    score_by_subset,
    solutions_by_subset,
    verdicts_at,
)
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.judges.genprm import GenPrmJudge
from stepwiser_jax.judges.stepwiser import (
    ChunkJudge,
    ChunkJudgment,
    Solution,
    a_right_and_a_wrong_one,
    judgment_of,
)
from stepwiser_jax.judges.thinkprm import ThinkPrmJudge, Verification
from stepwiser_jax.records import BenchmarkItem, Judgment, PrmBenchItem, Verdict
from stepwiser_jax.rl.rewards import judge_reward
from stepwiser_jax.runs.directory import RunDirectory, blocks, per_item

AnyJudge = ChunkJudge | GenPrmJudge | ThinkPrmJudge


def run(config: Evaluate, run_dir: str | Path, shard: Shard = NO_SHARD) -> dict[str, Any]:
    """Judge block after block; a restarted run repeats the block it was killed in."""
    directory = RunDirectory(run_dir, "evaluate", config, shard)
    if directory.finished:
        return directory.summary()
    directory.begin()
    tokenizer = load_tokenizer_of(config.judge.path)
    dropped: Counter[str] = Counter()
    items = load_items(
        config.items,
        tokenizer,
        split=config.split,
        limit=config.limit,
        on_malformed=config.on_malformed,
        dropped=dropped,
    )
    work = blocks(items, config.items_per_block)
    work = directory.pending(work, Judgment, lambda block: judgment_ids(config, block))
    measured = judge_blocks(config, directory, items, work) if work else {}
    writer = directory.writer(Judgment)

    def scores() -> dict[str, Any]:
        judgments = {judgment.example_id: judgment for judgment in writer.read()}
        counts = {"dropped": dict(dropped)}
        examples = {"judgments": a_right_and_a_wrong_one(items, judgments)}
        return summarize(config, items, judgments) | counts | measured | examples

    return directory.finish(scores)


def judge_blocks(
    config: Evaluate,
    directory: RunDirectory,
    items: Sequence[BenchmarkItem],
    work: Sequence[Sequence[BenchmarkItem]],
) -> dict[str, Any]:
    """Judgments of these blocks, written; returns what was measured. Checks all items first: every
    worker must refuse what one would."""
    mesh = make_mesh(**config.mesh.model_dump(), devices=jax.local_devices())
    loaded = load_for_decoding(
        **config.judge.model_dump(), weights=config.engine.weights, mesh=mesh, seed=config.seed
    )
    engine = Engine(loaded.model, loaded.tokenizer, mesh=mesh, **config.engine.model_dump())
    judge = make_judge(config, loaded, engine)
    judge.check_lengths([Solution.of_item(item) for item in items])
    seconds, judged = directory.write_blocks(
        work, Judgment, lambda block: judge_block(config, judge, block)
    )
    return {
        "seconds_per_judgment": per_item(seconds, judged),
        "tokens_per_judgment": per_item(engine.sampled_tokens, judged),
        "compiled": engine.compiled_shapes,
    } | (judge.writer.measured if isinstance(judge, GenPrmJudge) else {})


def make_judge(config: Evaluate, loaded: Loaded, engine: Engine) -> AnyJudge:
    settings: dict[str, Any] = {
        "name": "evaluate",
        "prompt_style": config.prompt_style,
        "max_new_tokens": config.max_new_tokens,
        "key": jax.random.key(config.seed),
    }
    if config.genprm is not None:
        return GenPrmJudge(loaded, engine, genprm=config.genprm, **settings)
    if config.thinkprm is not None:
        return ThinkPrmJudge(loaded, engine, rounds=config.thinkprm.rounds, **settings)
    return ChunkJudge(loaded, engine, **settings)


def judgment_ids(config: Evaluate, block: Sequence[BenchmarkItem]) -> list[str]:
    whole = [] if config.thinkprm is None else ["solution"]
    ids = [f"{i.item_id}/{part}" for i in block for part in [*range(len(i.steps)), *whole]]
    return ids + [f"{i}/vote{k}" for i in ids for k in range(config.votes)]


def judge_block(
    config: Evaluate, judge: AnyJudge, block: Sequence[BenchmarkItem]
) -> list[Judgment]:
    """Judgments of all steps of these items, greedy and sampled."""
    solutions = [Solution.of_item(item) for item in block]
    passes = [([""], judge.sample(solutions, 0.0, [""]))]
    if config.votes:
        suffixes = [f"/vote{k}" for k in range(config.votes)]
        truncation: dict[str, Any] = {"top_k": config.vote_top_k, "top_p": config.vote_top_p}
        sampled = judge.sample(solutions, config.vote_temperature, suffixes, **truncation)
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
    """Records of what was said of an item's steps and, if it was, of all of it."""
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
    """Scores of the greedy judge and, with votes, of all of these; fractions between 0 and 1."""
    score: Any = score_prmbench if isinstance(items[0], PrmBenchItem) else score_by_subset
    unparsed_as = counts_unparsed_as(config)
    summary: dict[str, Any] = {"items": len(items), "unparsed_as": unparsed_as}
    for name, suffixes in voters_of(config).items():
        verdicts = [verdicts_of(config, item, judgments, suffixes) for item in items]
        summary[name] = score(items, verdicts, seed=config.seed, unparsed_as=unparsed_as)
    if config.thinkprm is not None and score is score_by_subset:
        summary["solution"] = score_solutions(config, items, judgments)
    return summary


def verdicts_of(
    config: Evaluate,
    item: BenchmarkItem,
    judgments: dict[str, Judgment],
    suffixes: Sequence[str],
) -> list[Verdict]:
    """On every step what its judgments with these suffixes say together: the majority, or, of a
    judge in GenPRM's form, the mean of P(right) where any of them has a verdict."""
    verdicts = []
    for step in range(len(item.steps)):
        votes = [judgments[f"{item.item_id}/{step}{suffix}"] for suffix in suffixes]
        verdict = majority_verdict([vote.verdict for vote in votes])
        if config.genprm is not None and verdict.is_given:
            mean = sum(vote.p_positive for vote in votes) / len(votes)
            (verdict,) = verdicts_at(config.genprm.threshold, [mean])
        verdicts.append(verdict)
    return verdicts


def counts_unparsed_as(config: Evaluate) -> Literal["negative", "positive"]:
    """How a step without a verdict counts: of a judge in GenPRM's form it has 1/2."""
    if config.genprm is None:
        return config.unparsed_as
    return "negative" if config.genprm.threshold > 0.5 else "positive"


def voters_of(config: Evaluate, together: str | None = None) -> dict[str, list[str]]:
    """The suffixes of the judgments that are scored together, by name: `greedy`, and how votes
    become one, with their number."""
    together = together or ("majority" if config.genprm is None else "mean")
    voters = {"greedy": [""]}
    if config.votes:
        voters[f"{together}_{config.votes}"] = [f"/vote{k}" for k in range(config.votes)]
    return voters


def score_solutions(
    config: Evaluate, items: Sequence[BenchmarkItem], judgments: dict[str, Judgment]
) -> dict[str, Any]:
    """Of the greedy chain and, with votes, of the mean of the sampled ones' probabilities. An
    output is bad that lacks the verdict on a step up to its first incorrect one."""

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

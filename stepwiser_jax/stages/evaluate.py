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
from typing import Any

import jax

from stepwiser_jax.config import Evaluate
from stepwiser_jax.data.problems import load_items
from stepwiser_jax.distributed.hosts import NO_SHARD, Shard
from stepwiser_jax.distributed.loading import Loaded, load_for_decoding, load_tokenizer_of
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.evaluation.judgments import (
    VotingRule,
    score_judgments,
    score_whole_solutions,
    vote_suffixes,
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
from stepwiser_jax.records import BenchmarkItem, Judgment, ProcessBenchItem
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
    return ids + [f"{i}{suffix}" for i in ids for suffix in vote_suffixes(config.votes)]


def judge_block(
    config: Evaluate, judge: AnyJudge, block: Sequence[BenchmarkItem]
) -> list[Judgment]:
    """Judgments of all steps of these items, greedy and sampled."""
    solutions = [Solution.of_item(item) for item in block]
    passes = [([""], judge.sample(solutions, 0.0, [""]))]
    if config.votes:
        suffixes = vote_suffixes(config.votes)
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


def summarize(
    config: Evaluate, items: Sequence[BenchmarkItem], judgments: dict[str, Judgment]
) -> dict[str, Any]:
    """Returns the scores of the greedy judge and, with votes, of all of these; fractions."""
    rule, settings = VotingRule.of_run(config), {"votes": config.votes, "seed": config.seed}
    summary = score_judgments(items, judgments, rule, **settings)
    whole = [item for item in items if isinstance(item, ProcessBenchItem)]
    if config.thinkprm is not None and whole:
        summary["solution"] = score_whole_solutions(whole, judgments, **settings)
    return summary

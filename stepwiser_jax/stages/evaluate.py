"""ProcessBench: find the first wrong step of a solution with the judge (StepWiser 4.2).

    item -> one judge prompt per step -> verdicts -> first Negative is the predicted error, else -1

Both ways to split the items are scored: the official one (has the item an error?) and the one by
final answer, which the paper's numbers follow. Every step is judged, not only those up to the first
rejection, so that the steps of all items run together and per-step rates can be reported.

Reads `judge` and `items`. Writes judgments: `<item>/<step>` is the greedy one,
`<item>/<step>/vote<k>` the sampled ones.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from stepwiser_jax.algo.processbench import majority_verdict, score_by_subset
from stepwiser_jax.config import Evaluate
from stepwiser_jax.records import Judgment, ProcessBenchItem, Verdict
from stepwiser_jax.runtime import compilation
from stepwiser_jax.runtime.engine import Engine
from stepwiser_jax.runtime.hosts import WHOLE, Shard
from stepwiser_jax.runtime.judging import ChunkJudge, Solution, judgment_of
from stepwiser_jax.runtime.loading import load_for_decoding, load_tokenizer_of
from stepwiser_jax.runtime.mesh import make_mesh
from stepwiser_jax.runtime.problems import load_items
from stepwiser_jax.runtime.run import RunDirectory, blocks, per_item, progress, stop


def run(config: Evaluate, run_dir: str | Path, shard: Shard = WHOLE) -> dict[str, Any]:
    """Judge block after block; a restarted run repeats the block it was killed in."""
    directory = RunDirectory(run_dir, "evaluate", config, shard)
    if directory.finished:
        return directory.summary()
    compilation.start(config.compilation_cache)
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
        return summarize(config, items, judgments) | {"dropped": dict(dropped)} | measured

    return directory.finish(scores)


def judge_blocks(
    config: Evaluate,
    directory: RunDirectory,
    items: Sequence[ProcessBenchItem],
    work: Sequence[Sequence[ProcessBenchItem]],
) -> dict[str, Any]:
    """Judgments of these blocks, written; returns what was measured. Checks all items first: every
    worker must refuse what one would."""
    mesh = make_mesh(**config.mesh.model_dump(), devices=jax.local_devices())
    loaded = load_for_decoding(
        **config.judge.model_dump(), weights=config.engine.weights, mesh=mesh, seed=config.seed
    )
    engine = Engine(loaded.model, loaded.tokenizer, mesh=mesh, **config.engine.model_dump())
    judge = ChunkJudge(
        loaded,
        engine,
        name="evaluate",
        prompt_style=config.prompt_style,
        max_new_tokens=config.max_new_tokens,
        key=jax.random.key(config.seed),
    )
    judge.check_lengths([Solution.of_item(item) for item in items])
    writer = directory.writer(Judgment)
    start, judged = time.perf_counter(), 0
    with progress("evaluate", len(work)) as advance:
        for block in work:
            judgments = judge_block(config, judge, block)
            writer.append(judgments)
            judged += len(judgments)
            advance(1)
            stop.check()
    return {
        "seconds_per_judgment": per_item(time.perf_counter() - start, judged),
        "compiled": engine.compiled_shapes,
    }


def judgment_ids(config: Evaluate, block: Sequence[ProcessBenchItem]) -> list[str]:
    ids = [f"{item.item_id}/{step}" for item in block for step in range(len(item.steps))]
    return ids + [f"{i}/vote{k}" for i in ids for k in range(config.votes)]


def judge_block(
    config: Evaluate, judge: ChunkJudge, block: Sequence[ProcessBenchItem]
) -> list[Judgment]:
    """Judgments of all steps of these items, greedy and sampled."""
    solutions = [Solution.of_item(item) for item in block]
    passes = [(0.0, [""])]
    if config.votes:
        passes.append((config.vote_temperature, [f"/vote{k}" for k in range(config.votes)]))
    return [
        judgment_of(item, step, opinion, judge.loaded.model_id, suffix)
        for temperature, suffixes in passes
        for item, found in zip(block, judge.sample(solutions, temperature, suffixes), strict=True)
        for suffix, opinions in zip(suffixes, found, strict=True)
        for step, opinion in enumerate(opinions)
    ]


# --- scores -------------------------------------------------------------------------------------


def summarize(
    config: Evaluate, items: Sequence[ProcessBenchItem], judgments: dict[str, Judgment]
) -> dict[str, Any]:
    """Scores of the greedy judge and, with votes, of the majority; fractions between 0 and 1."""

    def greedy(item: ProcessBenchItem, step: int) -> Verdict:
        return judgments[f"{item.item_id}/{step}"].verdict

    def majority(item: ProcessBenchItem, step: int) -> Verdict:
        votes = range(config.votes)
        return majority_verdict(
            [judgments[f"{item.item_id}/{step}/vote{k}"].verdict for k in votes]
        )

    voters = {"greedy": greedy} | ({f"majority_{config.votes}": majority} if config.votes else {})
    summary: dict[str, Any] = {"items": len(items), "unparsed_as": config.unparsed_as}
    for name, verdict_of in voters.items():
        verdicts = [[verdict_of(item, s) for s in range(len(item.steps))] for item in items]
        summary[name] = score_by_subset(
            items, verdicts, seed=config.seed, unparsed_as=config.unparsed_as
        )
    return summary

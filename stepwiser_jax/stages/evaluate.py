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
from stepwiser_jax.algo.rewards import judge_reward
from stepwiser_jax.config import Evaluate
from stepwiser_jax.records import Judgment, ProcessBenchItem, Verdict
from stepwiser_jax.runtime import compilation
from stepwiser_jax.runtime.engine import Engine
from stepwiser_jax.runtime.hosts import WHOLE, Shard
from stepwiser_jax.runtime.loading import Loaded, load_for_decoding, load_tokenizer_of
from stepwiser_jax.runtime.mesh import make_mesh
from stepwiser_jax.runtime.problems import load_items
from stepwiser_jax.runtime.run import RunDirectory, blocks, per_item, progress, stop
from stepwiser_jax.runtime.sampling import SamplingParams
from stepwiser_jax.text.prompts import encode_judge_prompt, parse_verdict
from stepwiser_jax.text.tokenizer import completion_text


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
    judge = ItemJudge(config, loaded, mesh)
    judge.check_lengths(items)
    writer = directory.writer(Judgment)
    start, judged = time.perf_counter(), 0
    with progress("evaluate", len(work)) as advance:
        for block in work:
            judgments = judge(block)
            writer.append(judgments)
            judged += len(judgments)
            advance(1)
            stop.check()
    return {
        "seconds_per_judgment": per_item(time.perf_counter() - start, judged),
        "compiled": judge.engine.compiled_shapes,
    }


def judgment_ids(config: Evaluate, block: Sequence[ProcessBenchItem]) -> list[str]:
    ids = [f"{item.item_id}/{step}" for item in block for step in range(len(item.steps))]
    return ids + [f"{i}/vote{k}" for i in ids for k in range(config.votes)]


class ItemJudge:
    """Items of one block -> judgments of all their steps, greedy and sampled."""

    def __init__(self, config: Evaluate, loaded: Loaded, mesh: jax.sharding.Mesh):
        self.config, self.loaded = config, loaded
        self.engine = Engine(
            loaded.model, loaded.tokenizer, mesh=mesh, **config.engine.model_dump()
        )
        self.key = jax.random.key(config.seed)

    def params(self, temperature: float) -> SamplingParams:
        return SamplingParams(
            temperature=temperature,
            max_new_tokens=self.config.max_new_tokens,
            stop_ids=self.loaded.tokenizer.eos_ids,
        )

    def prompt_ids(self, item: ProcessBenchItem, step: int) -> list[int]:
        separator = " " if self.config.prompt_style == "bare" else "\n\n"
        history = separator.join(item.steps[:step])
        return encode_judge_prompt(
            self.loaded.tokenizer,
            item.question,
            history,
            item.steps[step],
            self.config.prompt_style,
        )

    def check_lengths(self, items: Sequence[ProcessBenchItem]) -> None:
        for item in items:
            last = len(item.steps) - 1
            prompt = self.prompt_ids(item, last)
            self.engine.check_length(
                len(prompt), self.config.max_new_tokens, f"{item.item_id}, step {last}"
            )

    def __call__(self, block: Sequence[ProcessBenchItem]) -> list[Judgment]:
        steps = [(item, step) for item in block for step in range(len(item.steps))]
        prompts = [self.prompt_ids(item, step) for item, step in steps]
        greedy = self.sample(steps, prompts, self.params(0.0), [""])
        if not self.config.votes:
            return greedy
        suffixes = [f"/vote{k}" for k in range(self.config.votes)]
        return greedy + self.sample(
            steps, prompts, self.params(self.config.vote_temperature), suffixes
        )

    def sample(
        self,
        steps: Sequence[tuple[ProcessBenchItem, int]],
        prompts: Sequence[list[int]],
        params: SamplingParams,
        suffixes: Sequence[str],
    ) -> list[Judgment]:
        ids_B = [f"{item.item_id}/{step}{suffix}" for item, step in steps for suffix in suffixes]
        output = self.engine.generate(
            prompts,
            params,
            key=self.key,
            row_ids=[f"evaluate/{judgment_id}" for judgment_id in ids_B],
            group_size=len(suffixes),
        )
        judgments = []
        for b, judgment_id in enumerate(ids_B):
            item, step = steps[b // len(suffixes)]
            text = completion_text(self.loaded.tokenizer, output.ids(b))
            verdict = parse_verdict(text)
            is_positive = item.first_error == -1 or step < item.first_error
            judgments.append(
                Judgment(
                    example_id=judgment_id,
                    judge_id=self.loaded.model_id,
                    completion=text,
                    verdict=verdict,
                    p_positive=float(verdict is Verdict.POSITIVE),
                    reward=judge_reward(verdict, is_positive),
                )
            )
        return judgments


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

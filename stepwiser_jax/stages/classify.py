"""ProcessBench and PRMBench with a classifier: P(+) of every step from one pass (StepWiser 4.2).

    item -> one conversation -> P(+) of every step -> the first below the threshold is the predicted
                                                      error, else -1

The threshold is a setting, or is chosen for the best official F1 on one subset and used for all, as
ProcessBench does on gsm8k. On the subset itself the score then is the best that a threshold can
give: `summary.json` says on which it was chosen. Items of PRMBench have its own scores, at a
threshold that is given.

Reads `classifier` and `items`. Writes judgments `<item>/<step>`: the verdict is the likelier sign,
whatever the threshold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from stepwiser_jax.config import Classify
from stepwiser_jax.data.problems import load_items
from stepwiser_jax.distributed.hosts import NO_SHARD, Shard
from stepwiser_jax.distributed.loading import load_model, load_tokenizer_of
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.prmbench import score_prmbench
from stepwiser_jax.evaluation.processbench import best_threshold, score_by_subset
from stepwiser_jax.evaluation.verdicts import verdict_at
from stepwiser_jax.judges.classifier import Scorer
from stepwiser_jax.judges.stepwiser import Solution, judgment_of
from stepwiser_jax.records import BenchmarkItem, Judgment, PrmBenchItem
from stepwiser_jax.runs.directory import RunDirectory, blocks, per_item


def run(config: Classify, run_dir: str | Path, shard: Shard = NO_SHARD) -> dict[str, Any]:
    """Score block after block; a restarted run repeats the block it was killed in."""
    directory = RunDirectory(run_dir, "classify", config, shard)
    if directory.finished:
        return directory.summary()
    directory.begin()
    tokenizer = load_tokenizer_of(config.classifier.path)
    dropped: Counter[str] = Counter()
    items = load_items(
        config.items,
        tokenizer,
        split=config.split,
        limit=config.limit,
        on_malformed=config.on_malformed,
        dropped=dropped,
    )
    check_subset(config, items)
    work = directory.pending(blocks(items, config.items_per_block), Judgment, judgment_ids)
    measured = score_blocks(config, directory, items, work) if work else {}
    writer = directory.writer(Judgment)

    def scores() -> dict[str, Any]:
        judgments = {judgment.example_id: judgment for judgment in writer.read()}
        return summarize(config, items, judgments) | {"dropped": dict(dropped)} | measured

    return directory.finish(scores)


def check_subset(config: Classify, items: Sequence[BenchmarkItem]) -> None:
    if config.threshold_subset is not None and isinstance(items[0], PrmBenchItem):
        raise UserError(
            f"threshold_subset {config.threshold_subset!r} is for ProcessBench, whose F1 chooses "
            f"the threshold; {config.items} is of PRMBench: set threshold, and threshold_subset "
            "to null"
        )
    subsets = sorted({item.subset for item in items})
    if config.threshold_subset is not None and config.threshold_subset not in subsets:
        raise UserError(
            f"expected threshold_subset among the subsets of {config.items}, which are {subsets}, "
            f"found {config.threshold_subset!r}"
        )


def judgment_ids(block: Sequence[BenchmarkItem]) -> list[str]:
    return [f"{item.item_id}/{step}" for item in block for step in range(len(item.steps))]


def score_blocks(
    config: Classify,
    directory: RunDirectory,
    items: Sequence[BenchmarkItem],
    work: Sequence[Sequence[BenchmarkItem]],
) -> dict[str, Any]:
    """Judgments of these blocks, written; returns what was measured. Checks all items first: every
    worker must refuse what one would."""
    mesh = make_mesh(**config.mesh.model_dump(), devices=jax.local_devices())
    settings = config.classifier.model_dump()
    loaded = load_model(**settings, mesh=mesh, seed=config.seed, classifier=True)
    scorer = Scorer(
        loaded,
        mesh,
        rows=config.rows,
        max_length=config.max_length,
        prompt_style=config.prompt_style,
    )
    scorer.check_lengths([Solution.of_item(item) for item in items])

    def judgments_of(block: Sequence[BenchmarkItem]) -> list[Judgment]:
        found = scorer([Solution.of_item(item) for item in block])
        return [
            judgment_of(item, step, opinion, loaded.model_id)
            for item, opinions in zip(block, found, strict=True)
            for step, opinion in enumerate(opinions)
        ]

    seconds, _ = directory.write_blocks(work, Judgment, judgments_of)
    return {"seconds_per_item": per_item(seconds, sum(map(len, work)))}


def summarize(
    config: Classify, items: Sequence[BenchmarkItem], judgments: dict[str, Judgment]
) -> dict[str, Any]:
    """The threshold and the scores with it; fractions between 0 and 1."""
    p_positive = [
        [judgments[f"{item.item_id}/{step}"].p_positive for step in range(len(item.steps))]
        for item in items
    ]
    threshold = config.threshold
    if threshold is None:
        chosen_on = [i for i, item in enumerate(items) if item.subset == config.threshold_subset]
        threshold = best_threshold(
            [p_positive[i] for i in chosen_on], [items[i].first_error for i in chosen_on]
        )
    score: Any = score_prmbench if isinstance(items[0], PrmBenchItem) else score_by_subset
    verdicts = [[verdict_at(threshold, p) for p in p_of_steps] for p_of_steps in p_positive]
    return {
        "items": len(items),
        "threshold": threshold,
        "threshold_chosen_on": config.threshold_subset,
        **score(items, verdicts, seed=config.seed),
    }

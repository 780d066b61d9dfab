"""Two judges on the same items: `stepwiser compare-judges RUN_A RUN_B`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stepwiser_jax.config import ClassifierJudge, Evaluate, read_run_settings, validate
from stepwiser_jax.data.problems import load_items
from stepwiser_jax.distributed.loading import load_tokenizer_of
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.processbench import contrast, first_predicted_error
from stepwiser_jax.record_io import read_manifest, read_records
from stepwiser_jax.records import Judgment, ProcessBenchItem
from stepwiser_jax.stages.evaluate import (
    counts_unparsed_as,
    threshold_of,
    verdicts_of,
    voters_of,
    votes_of,
)

SEED = 0
"""Of the bootstrap: the same two runs give the same numbers."""


@dataclass(frozen=True)
class Judged:
    """A run: its items, the first error that its judge found in each, what of it counts, and the
    number of votes that it has."""

    items: list[ProcessBenchItem]
    predictions: list[int]
    counted: str
    votes: int


def contrast_runs(run_a: Path, run_b: Path, *, votes: bool) -> dict[str, Any]:
    """Returns `evaluation.processbench.contrast` of two finished runs, and what of each was
    `counted`. Raises UserError for runs of other stages, unfinished ones, different items, and
    `votes` if neither has any."""
    a, b = (read_judged(run, votes=votes) for run in (run_a, run_b))
    check_same_items(run_a, a.items, run_b, b.items)
    if votes and not a.votes and not b.votes:
        raise UserError(
            f"--votes: expected an evaluate run with votes, found {run_a} ({a.counted}) and "
            f"{run_b} ({b.counted}); leave --votes out, or evaluate with `votes`"
        )
    counted = {"counted_a": a.counted, "counted_b": b.counted}
    return counted | contrast(a.items, a.predictions, b.predictions, seed=SEED)


def read_judged(run: Path, *, votes: bool) -> Judged:
    """A run, counted as it counted itself: with its `unparsed_as`, or its threshold. Of one with
    votes the greedy judgments, or what `votes` say together."""
    stage = read_manifest(run)["stage"]
    if stage != "evaluate":
        raise UserError(f"expected a run of evaluate, found one of {stage} in {run}")
    file = run / "config.yaml"
    judgments = {j.example_id: j for j in read_records(run, Judgment)}
    config = validate(Evaluate, read_run_settings(run), str(file))
    items = items_of(config)
    counted, suffixes = list(voters_of(config).items())[-1 if votes else 0]
    check_judged(run, judgments, items, suffixes)
    threshold = threshold_of(config, items, judgments)
    if isinstance(config.judge, ClassifierJudge):
        counted = f"threshold {threshold:.3g}"
    unparsed_as = counts_unparsed_as(threshold)
    verdicts = [verdicts_of(threshold, item, judgments, suffixes) for item in items]
    found = [first_predicted_error(of_item, unparsed_as=unparsed_as) for of_item in verdicts]
    return Judged(items, found, counted, votes_of(config))


def items_of(config: Evaluate) -> list[ProcessBenchItem]:
    benchmark = config.benchmark
    items = load_items(
        benchmark.source,
        load_tokenizer_of(config.judge.path),
        split=benchmark.split,
        limit=benchmark.limit,
        on_malformed=benchmark.on_malformed,
    )
    found = [item for item in items if isinstance(item, ProcessBenchItem)]
    if len(found) < len(items):
        raise UserError(
            f"two judges are compared by ProcessBench's F1: expected its items, found those of "
            f"PRMBench in {benchmark.source}: compare the prm_score of both in their summary.json"
        )
    return found


def step_ids(item: ProcessBenchItem, suffix: str) -> list[str]:
    return [f"{item.item_id}/{step}{suffix}" for step in range(len(item.steps))]


def check_judged(
    run: Path,
    judgments: dict[str, Judgment],
    items: Sequence[ProcessBenchItem],
    suffixes: Sequence[str],
) -> None:
    """Raises UserError where a step has none of these judgments."""
    for item in items:
        for judgment_id in [i for suffix in suffixes for i in step_ids(item, suffix)]:
            if judgment_id not in judgments:
                raise UserError(
                    f"{run} has no judgment {judgment_id}: the items that its config.yaml names "
                    "are not those it has judged; put them back"
                )


def check_same_items(
    run_a: Path,
    items_a: Sequence[ProcessBenchItem],
    run_b: Path,
    items_b: Sequence[ProcessBenchItem],
) -> None:
    for number, (a, b) in enumerate(zip(items_a, items_b, strict=False), 1):
        if a != b:
            differing = [name for name, value in vars(a).items() if value != vars(b)[name]]
            raise UserError(
                f"two judges are compared on the same items: item {number} is {a.item_id} in "
                f"{run_a} and {b.item_id} in {run_b}, which differ in {', '.join(differing)}"
            )
    if len(items_a) != len(items_b):
        longer, items = max((run_a, items_a), (run_b, items_b), key=lambda pair: len(pair[1]))
        first = items[min(len(items_a), len(items_b))].item_id
        raise UserError(
            f"two judges are compared on the same items: {run_a} has {len(items_a)} and {run_b} "
            f"{len(items_b)}; the first that {longer} alone has is {first}"
        )


def print_contrast(run_a: Path, run_b: Path, *, votes: bool, as_json: bool) -> None:
    """The command itself."""
    found = contrast_runs(run_a, run_b, votes=votes)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print(f"A: {run_a} ({found['counted_a']})\nB: {run_b} ({found['counted_b']})")
        Console().print(contrast_table(found))


def contrast_table(found: dict[str, Any]) -> Table:
    """F1 in percent. A column a subset, and the average where there are several."""
    columns = found["subsets"] | (
        {"average": found["average"]} if len(found["subsets"]) > 1 else {}
    )
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "items": lambda c: str(c["items"]),
        "F1 of A": lambda c: f"{100 * c['f1_a']:.1f}",
        "F1 of B": lambda c: f"{100 * c['f1_b']:.1f}",
        "B - A": lambda c: f"{100 * c['difference']:+.1f}",
        "95% from": lambda c: f"{100 * c['difference_interval'][0]:+.1f}",
        "to": lambda c: f"{100 * c['difference_interval'][1]:+.1f}",
        "p, bootstrap": lambda c: f"{c['difference_p']:.2g}",
        "only A right": lambda c: str(c["right_by_a_alone"]),
        "only B right": lambda c: str(c["right_by_b_alone"]),
        "p, McNemar": lambda c: f"{c['mcnemar_p']:.2g}",
    }
    table = Table()
    table.add_column("", justify="right")
    for name in columns:
        table.add_column(name, justify="right")
    for title, cell in rows.items():
        last = title in ("items", "F1 of B", "p, bootstrap")
        table.add_row(title, *map(cell, columns.values()), end_section=last)
    return table

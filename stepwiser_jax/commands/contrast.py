"""Two judges on the same items: `stepwiser contrast RUN_A RUN_B`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stepwiser_jax.algo.processbench import contrast, first_predicted_error, verdicts_at
from stepwiser_jax.config import Classify, Evaluate
from stepwiser_jax.records import Judgment, ProcessBenchItem, UserError, read_manifest, read_records
from stepwiser_jax.runtime.loading import load_tokenizer_of
from stepwiser_jax.runtime.problems import load_items
from stepwiser_jax.settings import read_settings, validate

SEED = 0
"""Of the bootstrap: the same two runs give the same numbers."""


def contrast_runs(run_a: Path, run_b: Path) -> dict[str, Any]:
    """`algo.processbench.contrast` of two finished runs. Raises UserError for runs of other stages,
    unfinished ones, and different items."""
    (items_a, predictions_a), (items_b, predictions_b) = map(read_predictions, (run_a, run_b))
    check_same_items(run_a, items_a, run_b, items_b)
    return contrast(items_a, predictions_a, predictions_b, seed=SEED)


def read_predictions(run: Path) -> tuple[list[ProcessBenchItem], list[int]]:
    """The items of a run, and the first error that its judge found in each, counted as it counted:
    with the run's `unparsed_as`, or its threshold."""
    stage = read_manifest(run)["stage"]
    if stage not in ("evaluate", "classify"):
        raise UserError(f"expected a run of evaluate or classify, found one of {stage} in {run}")
    file = run / "config.yaml"
    judgments = {j.example_id: j for j in read_records(run, Judgment)}
    if stage == "evaluate":
        config = validate(Evaluate, read_settings(file), str(file))
        items = items_of(config, config.judge.path)
        if config.genprm is None:
            return items, [
                first_predicted_error(
                    [j.verdict for j in of_item(run, judgments, item)],
                    unparsed_as=config.unparsed_as,
                )
                for item in items
            ]
        threshold = config.genprm.threshold
    else:
        config = validate(Classify, read_settings(file), str(file))
        items = items_of(config, config.classifier.path)
        threshold = json.loads((run / "summary.json").read_text(encoding="utf-8"))["threshold"]
    return items, [
        first_predicted_error(
            verdicts_at(threshold, [j.p_positive for j in of_item(run, judgments, item)])
        )
        for item in items
    ]


def items_of(config: Evaluate | Classify, model: str) -> list[ProcessBenchItem]:
    return load_items(
        config.items,
        load_tokenizer_of(model),
        split=config.split,
        limit=config.limit,
        on_malformed=config.on_malformed,
    )


def of_item(run: Path, judgments: dict[str, Judgment], item: ProcessBenchItem) -> list[Judgment]:
    """Of every step; of a judge, the greedy ones."""
    ids = [f"{item.item_id}/{step}" for step in range(len(item.steps))]
    missing = [judgment_id for judgment_id in ids if judgment_id not in judgments]
    if missing:
        raise UserError(
            f"{run} has no judgment {missing[0]}: the items that its config.yaml names are not "
            "those it has judged; put them back"
        )
    return [judgments[judgment_id] for judgment_id in ids]


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


def print_contrast(run_a: Path, run_b: Path, *, as_json: bool) -> None:
    """The command itself."""
    found = contrast_runs(run_a, run_b)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print(f"A: {run_a}\nB: {run_b}")
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

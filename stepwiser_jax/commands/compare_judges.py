"""Prints how two judges differ on the same items: `stepwiser compare-judges RUN_A RUN_B`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stepwiser_jax.evaluation.paired import compare_runs


def print_comparison(run_a: Path, run_b: Path, *, votes: bool, as_json: bool) -> None:
    """Prints the comparison of two runs, as a table or as JSON."""
    found = compare_runs(run_a, run_b, votes=votes)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print(f"A: {run_a} ({found['counted_a']})\nB: {run_b} ({found['counted_b']})")
        Console().print(comparison_table(found))


def comparison_table(found: dict[str, Any]) -> Table:
    """Returns a table with a column per subset, and the average of several. F1 is in percent."""
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
        "AUC of A": lambda c: f"{c['auc_a']:.3f}",
        "AUC of B": lambda c: f"{c['auc_b']:.3f}",
        "AUC, B - A": lambda c: f"{c['auc_b'] - c['auc_a']:+.3f}",
        "AUC, 95% from": lambda c: f"{c['auc_difference_interval'][0]:+.3f}",
        "AUC, to": lambda c: f"{c['auc_difference_interval'][1]:+.3f}",
    }
    table = Table()
    table.add_column("", justify="right")
    for name in columns:
        table.add_column(name, justify="right")
    for title, cell in rows.items():
        last = title in ("items", "F1 of B", "p, bootstrap", "p, McNemar", "AUC of B")
        table.add_row(title, *map(cell, columns.values()), end_section=last)
    return table

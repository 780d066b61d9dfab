"""Prints the table of docs/quickstart.md from finished runs of the quickstart.

python docs/make_quickstart_table.py quickstart-0 quickstart-1 ...
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

LABELS = {
    "abs_q": "Abs-Q",
    "rel_effective": "Rel-Effective",
    "rel_ratio": "Rel-Ratio",
    "relative_progress": "relative progress",
}


Row = tuple[float, dict[str, Any] | None]
"""A fraction, and the row of a search in summary.json, which has its costs."""


def rows_of(summary: dict[str, Any]) -> dict[str, Row]:
    """Returns the rows of one run, by title."""
    judge, search = summary["judge"], summary["search"]
    rows: dict[str, Row] = {
        f"labels, {title}: balanced accuracy": (summary["labels"][rule]["balanced_accuracy"], None)
        for rule, title in LABELS.items()
    }
    for key, title in (("f1", "judge F1"), ("auc", "judge AUC")):
        for name, when in (("cold_start", "cold start"), ("grpo", "after GRPO")):
            rows[f"{title}, {when}"] = judge[name][key], None
    methods = {"greedy decoding": search["greedy"], "plain sampling": search["plain"]}
    methods |= {f"majority of {k}": row for k, row in search["majority"].items()}
    methods |= {
        "chunk-reset search": search["chunk_reset"],
        "the largest majority at most at its FLOPs": search["majority_at_equal_flops"]["at_most"],
        "the smallest majority above its FLOPs": search["majority_at_equal_flops"]["next"],
    }
    return rows | {title: (row["accuracy"], row) for title, row in methods.items() if row}


def cost(rows: list[dict[str, Any]]) -> str:
    """Returns the means over runs of the tokens that policy + judge write, and read, and of the
    FLOPs; nothing if there are no searches."""
    if not rows:
        return " | | "

    def mean(key: str) -> float:
        return statistics.mean(row[key] for row in rows)

    written = f"{mean('policy_tokens'):.0f} + {mean('judge_tokens'):.0f}"
    read = f"{mean('policy_read_tokens'):.0f} + {mean('judge_read_tokens'):.0f}"
    return f"{written} | {read} | {mean('flops') / 1e6:.0f}"


def main(directories: list[str]) -> None:
    summaries = [json.loads((Path(d) / "summary.json").read_text()) for d in directories]
    runs = [rows_of(summary) for summary in summaries]
    seeds = " | ".join(Path(d).name.rpartition("-")[2] for d in directories)
    print(f"| seed | {seeds} | mean ± sd | written | read | MFLOP |")
    print("|---" * (len(runs) + 5) + "|")
    for title in runs[0]:
        if not all(title in run for run in runs):
            continue  # no majority of so many was drawn
        values = [100 * run[title][0] for run in runs]
        spread = f"**{statistics.mean(values):.1f}** ± {statistics.stdev(values):.1f}"
        searches = [row for _, row in (run[title] for run in runs) if row is not None]
        cells = " | ".join(f"{value:.1f}" for value in values)
        print(f"| {title} | {cells} | {spread} | {cost(searches)} |")
    minutes = ", ".join(f"{sum(s['seconds'].values()) / 60:.1f}" for s in summaries)
    print(f"\nMinutes: {minutes}.")


if __name__ == "__main__":
    main(sys.argv[1:])

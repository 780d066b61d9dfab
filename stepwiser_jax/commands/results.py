"""Prints the numbers that matter at the end of a stage, and what a judge said, on stdout.

summary.json holds all numbers; shares are percent here and fractions there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml

NOT_PRINTED = ("compiled", "warm_up", "judgments")
"""Parts of the summary that are not printed, or not as YAML."""


def print_summary(summary: dict[str, Any], run_dir: Path) -> None:
    """Prints a line for each score of ProcessBench, the rest as YAML, and some judgments."""
    voters = {name: part for name, part in summary.items() if _has_scores(part)}
    if "subsets" in summary and _has_scores(summary):  # a classifier has them
        voters = {"F1": summary}
    for name, scores in voters.items():
        for line in score_lines(name, scores):
            typer.echo(line)
    left_out = {*NOT_PRINTED, *voters, *(("subsets", "average") if "F1" in voters else ())}
    rest = {name: value for name, value in summary.items() if name not in left_out}
    typer.echo(yaml.safe_dump(rest, sort_keys=False), nl=False)
    for judgment in summary.get("judgments", ()):
        typer.echo(judgment_text(judgment))
    typer.echo(f"all numbers: {run_dir / 'summary.json'}")


def _has_scores(part: Any) -> bool:
    return isinstance(part, dict) and "official" in part.get("average", {})


def score_lines(name: str, scores: dict[str, Any]) -> Iterator[str]:
    """Yields a line for each subset, and one for their average if there are several."""
    rows = dict(scores["subsets"])
    if len(rows) > 1:
        rows["average"] = scores["average"]
    for subset, row in rows.items():
        official = row["official"]
        low, high = (f"{100 * end:.1f}" for end in row["official_f1_interval"])
        line = (
            f"{name}, {subset}: F1 {100 * official['f1']:.1f}% [{low}, {high}]; first errors found "
            f"{100 * official['acc_error']:.1f}%, right solutions accepted "
            f"{100 * official['acc_correct']:.1f}%"
        )
        if "items" in row:
            line += f"; {row['items']} items, {100 * row['unparsed_rate']:.1f}% without verdict"
        yield line


def judgment_text(judgment: dict[str, str]) -> str:
    """Returns a judgment (`evaluation.judgments.describe_judgment`), one line for each part."""
    parts = {name: " ".join(text.split()) for name, text in judgment.items() if text}
    return "\n" + "\n".join(f"  {name:<9} {text}" for name, text in parts.items())

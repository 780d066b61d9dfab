"""Makes the charts and tables of a report: plain data, which the page draws.

A chart is `{kind, title, x, y, format, series}`, and each of its series `{name, x, y}`; a series of
a `points` chart also has `low`, `high` and `names`. A table is `{title, columns, rows, note}`. A
column is `[name, format]` with the format `text`, `number`, `percent`,
`points` or `p`; a cell is a text, a
number, `[value, low, high]`, or None.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Chart = dict[str, Any]
Table = dict[str, Any]

MAX_POINTS = 300
"""Points of a line. Of a longer training, each point is the mean of several steps."""

CURVES: tuple[tuple[str, str, str], ...] = (
    ("Reward", r"reward(_.+)?", "number"),
    ("Loss", r"loss|policy_loss|validation/loss", "number"),
    ("Accuracy, held out", r"validation/(balanced_)?accuracy(_(posi|nega)tive)?", "percent"),
    ("Accuracy by position, held out", r"validation/accuracy_(at|from)_\d+", "percent"),
    ("AUC, held out", r"validation/auc", "number"),
    ("Accuracy", r"accuracy", "percent"),
    ("Judgments without a verdict", r"(validation/)?(unparsed_rate|other_box_rate)", "percent"),
    ("Judgments that say Positive", r"(validation/)?verdict_positive_share", "percent"),
    ("Entropy", r"entropy", "number"),
    ("Length of judgments, tokens", r"(validation/)?response_tokens(_max)?", "number"),
    ("Clip fractions", r"clip_fraction_\w+", "percent"),
    ("Gap of log-probs between sampler and trainer", r"logprob_gap(_max)?", "number"),
    ("Groups with signal", r"groups_with_signal_share", "percent"),
    ("KL from the reference", r"kl", "number"),
    ("Gradient norm", r"grad_norm", "number"),
    ("Learning rate", r"learning_rate", "number"),
    ("Skipped updates", r"skipped", "number"),
    ("Seconds a step", r"seconds", "number"),
)  # fmt: skip
"""The charts of a training: title, the metrics that it shows, and their format."""


def finite(value: Any) -> float | None:
    """Returns the number, None if it is none or not finite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


# --- charts -------------------------------------------------------------------------------------


def training_charts(metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Returns the charts of a training, those of `CURVES` first, then one for each other metric."""
    names = list(dict.fromkeys(name for line in metrics for name in line))
    names = [name for name in names if name not in ("step", "time")]
    groups = [
        (title, [name for name in names if re.fullmatch(pattern, name)], form)
        for title, pattern, form in CURVES
    ]
    known = {name for _, found, _ in groups for name in found}
    groups += [(name, [name], "number") for name in names if name not in known]
    charts = []
    for title, found, form in groups:
        series = [line for name in found if (line := line_of(metrics, name))]
        if series:
            charts.append(chart("line", title, "step", "", form, series))
    return charts


def line_of(metrics: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any] | None:
    """Returns a metric along the steps, as at most `MAX_POINTS` means; None if it has no value."""
    pairs = [(line["step"], finite(line.get(name))) for line in metrics]
    found = [(step, value) for step, value in pairs if value is not None]
    if not found:
        return None
    parts = np.array_split(np.array(found, float), min(MAX_POINTS, len(found)))
    points = [part.mean(axis=0).tolist() for part in parts]
    return {"name": name, "x": [x for x, _ in points], "y": [y for _, y in points]}


def chart(kind: str, title: str, x: str, y: str, form: str, series: list[dict[str, Any]]) -> Chart:
    return {"kind": kind, "title": title, "x": x, "y": y, "format": form, "series": series}


def histogram(
    title: str, x: str, values: Mapping[str, Sequence[float]], edges: Sequence[float]
) -> Chart:
    """Returns a chart of the shares of values in each bin; a series for each name. Values at the
    upper edge are in the last bin."""
    labels = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)]
    series = []
    for name, found in values.items():
        if len(found):
            counts = np.histogram(found, edges)[0]
            shares = (counts / len(found)).tolist()
            series.append({"name": f"{name} ({len(found)})", "x": labels, "y": shares})
    return chart("bars", title, x, "share", "percent", series)


def means_by(title: str, x: str, y: str, pairs: Iterable[tuple[int, float]], last: int) -> Chart:
    """Returns a chart of the mean of values by a count. Counts from `last` on are one."""
    found: dict[int, list[float]] = {}
    for count, value in pairs:
        found.setdefault(min(count, last), []).append(value)
    counts = sorted(found)
    labels = [f"{count} and later" if count == last else str(count) for count in counts]
    means = [float(np.mean(found[count])) for count in counts]
    return chart("bars", title, x, y, "percent", [{"name": y, "x": labels, "y": means}])


# --- tables -------------------------------------------------------------------------------------

NAMES = {
    "official.f1": "F1",
    "official.acc_error": "first errors found",
    "official.acc_correct": "right solutions accepted",
    "auc": "AUC",
    "accuracy": "right",
    "unparsed_rate": "without verdict",
    "policy_tokens": "policy wrote",
    "judge_tokens": "judge wrote",
    "rejected_tokens": "rejected",
    "policy_read_tokens": "policy read",
    "judge_read_tokens": "judge read",
    "forced_chunks": "forced chunks",
    "flops": "FLOPs",
    "balanced_accuracy": "balanced accuracy",
    "negative_precision": "precision of negatives",
    "negative_recall": "recall of negatives",
    "prm_score": "PRMScore",
}
"""How columns are called; others have their own name."""

NOT_SHARES = re.compile(r"(auc$|.*(tokens|flops|items|chunks|samples|problems|seconds|counts?)$)")


def measures(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the numbers of a part of a summary by their dotted names, each with its interval if
    there is one (`official.f1` has `official_f1_interval`)."""
    found: dict[str, Any] = {}
    for name, value in flat(row):
        interval = row.get(f"{name.replace('.', '_')}_interval")
        ends = [finite(end) for end in interval] if isinstance(interval, list) else []
        found[name] = [value, *ends] if len(ends) == 2 and None not in ends else value
    return found


def flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers of nested mappings by their dotted names."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif (number := finite(value)) is not None:
            yield f"{prefix}{key}", number


def table_of(
    title: str, rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str], note: str = ""
) -> Table:
    """Returns a table with a row for each part of a summary, and those of the columns that any
    has."""
    found = {name: measures(row) for name, row in rows.items()}
    kept = [column for column in columns if any(column in row for row in found.values())]
    formats = ["number" if NOT_SHARES.match(column) else "percent" for column in kept]
    named = [[NAMES.get(c, c), form] for c, form in zip(kept, formats, strict=True)]
    return {
        "title": title,
        "columns": [["", "text"], *named],
        "rows": [[name, *(row.get(column) for column in kept)] for name, row in found.items()],
        "note": note,
    }


EVALUATED = ("items", "official.f1", "official.acc_error", "official.acc_correct", "auc",
             "unparsed_rate", "prm_score")  # fmt: skip
SEARCHED = ("accuracy", "policy_tokens", "judge_tokens", "rejected_tokens", "policy_read_tokens",
            "judge_read_tokens", "samples", "forced_chunks", "flops")  # fmt: skip
LABELLED = ("chunks", "balanced_accuracy", "negative_precision", "negative_recall")


def evaluate_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Returns the scores of a run of `evaluate`: a row for each rule and subset."""
    rows: dict[str, Mapping[str, Any]] = {}
    for rule, scores in summary.items():
        subsets = scores.get("subsets") if isinstance(scores, dict) else None
        if isinstance(subsets, dict):
            rows |= {f"{rule}, {subset}": row for subset, row in subsets.items()}
            if len(subsets) > 1:
                rows[f"{rule}, average"] = scores["average"]
        elif isinstance(scores, dict) and "total" in scores:  # PRMBench
            total = scores["total"]
            rows[rule] = total if isinstance(total, dict) else scores
    if not rows:
        return []
    columns = [c for c in EVALUATED if any(c in measures(row) for row in rows.values())]
    if len(columns) <= 2:  # another benchmark's scores
        columns = list(dict.fromkeys(name for row in rows.values() for name in measures(row)))
    note = "Percent, with 95% intervals over items. F1 is ProcessBench's official one."
    return [table_of("Scores", rows, columns, note)]


def search_figures(summary: Mapping[str, Any]) -> tuple[list[Table], list[Chart]]:
    """Returns what each method of a search solves and costs: a table, and a chart of right answers
    against FLOPs."""
    rows = dict(_methods(summary))
    if not rows:
        return [], []
    note = (
        "Tokens and FLOPs are means per problem, of policy and judge together. The rows at equal "
        "FLOPs are the largest vote that costs no more than chunk-reset search, and the next one."
    )
    found = {name: measures(row) for name, row in rows.items()}
    points = [(n, m["flops"] / 1e6, m["accuracy"]) for n, m in found.items() if m.get("flops")]
    ends = [a if isinstance(a, list) else [a, a, a] for _, _, a in points]
    series = {
        "name": "method",
        "x": [flops for _, flops, _ in points],
        "y": [value for value, _, _ in ends],
        "low": [low for _, low, _ in ends],
        "high": [high for _, _, high in ends],
        "names": [name for name, _, _ in points],
    }
    title = "Right answers against their cost"
    at_cost = chart("points", title, "MFLOP per problem", "right answers", "percent", [series])
    return [table_of("Methods", rows, SEARCHED, note)], [at_cost] if points else []


AT_EQUAL_FLOPS = {"at_most": "at most its FLOPs", "next": "the next above"}


def _methods(summary: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, row in summary.items():
        if isinstance(row, dict) and "accuracy" in row:
            if name in AT_EQUAL_FLOPS:
                yield f"majority of {row['samples']:.0f}, {AT_EQUAL_FLOPS[name]}", row
            else:
                yield f"{prefix}{name}".replace("_", " "), row
        elif isinstance(row, dict):
            yield from _methods(row, f"{prefix}{name} ")

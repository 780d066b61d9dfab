"""Measures adaptive rollouts: tokens as a share of fixed M, and how good the labels are.

    python benchmarks/adaptive.py --quickstart DIR [--limit 256] [--output FILE.json]

DIR is a finished `stepwiser quickstart`. Its trajectories are annotated again, with all M rollouts
and adaptively, for every rule and confidence. Balanced accuracy compares labels with the exact
truth of the embedded task. It counts chunks up to and including a solution's first error whose
prefix has a value above 0 among all M rollouts: the same chunks in every row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import finished_quickstart

from stepwiser_jax.config import Annotate
from stepwiser_jax.evaluation.statistics import count_labels, first, label_scores, observed
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import PrefixValue, Problem, Trajectory
from stepwiser_jax.rl.adaptive import LabelTable
from stepwiser_jax.rl.labels import LABEL_RULES, Rule, load_rule
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.stages import annotate
from stepwiser_jax.tasks import arithmetic
from stepwiser_jax.text.chunks import chunk_texts

CONFIDENCES = (1.0, 0.99, 0.95, 0.9)
DEAD_PREFIX = "drop"
"""As the quickstart has it."""


def run(config: dict[str, Any], directory: Path) -> tuple[dict[str, list[PrefixValue]], int]:
    """Returns the values of every trajectory in order, and the number of tokens sampled."""
    summary = annotate.run(Annotate.model_validate(config), directory)
    values = defaultdict(list)
    for value in read_records(directory, PrefixValue):
        values[value.trajectory_id].append(value)
    return values, summary["sampled_tokens"]


def labels(values: dict[str, list[PrefixValue]], rule: Rule) -> dict[str, list[bool | None]]:
    table = LabelTable(rule, next(iter(values.values()))[0].max_rollouts, DEAD_PREFIX)
    return {
        name: [table.likeliest(q.counts, v.counts) for v, q in itertools.pairwise(some)]
        for name, some in values.items()
    }


def truths(quickstart: Path) -> dict[str, list[bool]]:
    questions = {p.problem_id: p.question for p in read_records(quickstart / "rollouts", Problem)}
    tokenizer = load_tokenizer_of(str(quickstart / "policy"))
    return {
        t.trajectory_id: arithmetic.chunk_truth(
            questions[t.problem_id], chunk_texts(tokenizer, t.completion_ids, t.chunk_ends)
        )
        for t in read_records(quickstart / "rollouts", Trajectory)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=finished_quickstart, required=True)
    parser.add_argument("--limit", type=int, default=256)
    parser.add_argument("--output")
    args = parser.parse_args()
    config = yaml.safe_load((args.quickstart / "values" / "config.yaml").read_text())
    for name in ("policy", "rollouts"):
        path = str(args.quickstart / name)
        config[name] = {**config[name], "path": path} if name == "policy" else path
    config |= {"limit": args.limit, "adaptive": None}
    truth, rows = truths(args.quickstart), []
    with tempfile.TemporaryDirectory() as scratch:
        fixed, all_tokens = run(config, Path(scratch) / "fixed")
        scope = [
            (name, j)
            for name, some in fixed.items()
            for j in range(len(some) - 1)
            if some[j].value > 0 and all(truth[name][:j])
        ]

        def accuracy(given: dict[str, list[bool | None]]) -> float:
            pairs = [(bool(given[name][j]), truth[name][j]) for name, j in scope]
            return observed(first(label_scores([count_labels(pairs)])), 1)

        print(
            f"{len(fixed)} trajectories, {len(scope)} chunks\n\n"
            "| rule | confidence | tokens | labels as with all | balanced accuracy | with all |\n"
            "|---|---|---|---|---|---|"
        )
        for name in LABEL_RULES:
            rule = load_rule(name)
            expected = labels(fixed, rule)
            for confidence in CONFIDENCES:
                adaptive = {"rule": name, "dead_prefix": DEAD_PREFIX, "confidence": confidence}
                directory = Path(scratch) / f"{name}-{confidence}"
                values, tokens = run(config | {"adaptive": adaptive}, directory)
                given = labels(values, rule)
                same = [a == b for t in given for a, b in zip(given[t], expected[t], strict=True)]
                row = {
                    "rule": name,
                    "confidence": confidence,
                    "tokens": tokens / all_tokens,
                    "same_labels": float(np.mean(same)),
                    "balanced_accuracy": accuracy(given),
                    "balanced_accuracy_of_all": accuracy(expected),
                }
                rows.append(row)
                print(
                    f"| {name} | {confidence} | {row['tokens']:.1%} | {row['same_labels']:.2%} | "
                    f"{row['balanced_accuracy']:.1%} | {row['balanced_accuracy_of_all']:.1%} |",
                    flush=True,
                )
    if args.output:
        Path(args.output).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Compares two judges on the same ProcessBench items, item by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepwiser_jax.config import ClassifierJudge, Evaluate, read_run_settings, validate
from stepwiser_jax.data.problems import load_items
from stepwiser_jax.distributed.loading import load_tokenizer_of
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.judgments import (
    GREEDY,
    VotingRule,
    threshold_of,
    voters,
    votes_of,
)
from stepwiser_jax.evaluation.processbench import f1_scores, item_outcomes, subset_names
from stepwiser_jax.evaluation.statistics import mcnemar, paired_bootstrap
from stepwiser_jax.evaluation.verdicts import first_predicted_error
from stepwiser_jax.manifest import read_manifest
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import Judgment, ProcessBenchItem


def paired_comparison(
    items: Sequence[ProcessBenchItem],
    predictions_a: Sequence[int],
    predictions_b: Sequence[int],
    *,
    seed: int,
) -> dict[str, Any]:
    """Returns what judge b gains over judge a, per subset and for the average of the subsets.

    It has both official F1, as fractions, and their difference with its interval and p-value (by a
    paired bootstrap within each subset). It also has the numbers of items on which only one judge
    is exactly right, with the p-value of McNemar's test.

    Args:
        items: Solutions with their first errors.
        predictions_a: First errors that judge a predicts, or -1.
        predictions_b: The same for judge b.
        seed: Seeds the bootstrap.
    """
    a, b = (item_outcomes(items, predictions) for predictions in (predictions_a, predictions_b))
    subsets = {
        subset: _compare(a[a["subset"] == s], b[a["subset"] == s], seed=seed)
        for s, subset in enumerate(subset_names(items))
    }
    return {"subsets": subsets, "average": _compare(a, b, seed=seed)}


def _compare(a: np.ndarray, b: np.ndarray, *, seed: int) -> dict[str, Any]:
    def f1(outcomes: np.ndarray) -> float:
        return float(f1_scores(outcomes)[0])

    difference = paired_bootstrap(a, b, f1, seed=seed, strata=a["subset"])
    only_a = int(np.sum(a["is_found"] & ~b["is_found"]))
    only_b = int(np.sum(b["is_found"] & ~a["is_found"]))
    return {
        "items": len(a),
        "f1_a": f1(a),
        "f1_b": f1(b),
        "difference": difference.value,
        "difference_interval": [difference.low, difference.high],
        "difference_p": difference.p,
        "right_by_a_alone": only_a,
        "right_by_b_alone": only_b,
        "mcnemar_p": mcnemar(only_a, only_b),
    }


# --- two runs -----------------------------------------------------------------------------------


def compare_runs(run_a: Path, run_b: Path, *, votes: bool) -> dict[str, Any]:
    """Returns the `paired_comparison` of two finished runs, and which judgments of each `counted`.
    The bootstrap has a fixed seed, so that the same runs give the same numbers.

    Raises:
        UserError: A run is of another stage or not finished, the items differ, or `votes` is set
            and neither run has any.
    """
    a, b = (read_judged_run(run, votes=votes) for run in (run_a, run_b))
    check_same_items(run_a, a.items, run_b, b.items)
    if votes and not a.has_votes and not b.has_votes:
        raise UserError(
            f"--votes: expected an evaluate run with votes, found {run_a} ({a.counted}) and "
            f"{run_b} ({b.counted}); leave --votes out, or evaluate with `votes`"
        )
    counted = {"counted_a": a.counted, "counted_b": b.counted}
    return counted | paired_comparison(a.items, a.predictions, b.predictions, seed=0)


@dataclass(frozen=True)
class JudgedRun:
    """A run's items, the first error that its judge predicts in each, and the name of the judgments
    that `counted`."""

    items: list[ProcessBenchItem]
    predictions: list[int]
    counted: str
    has_votes: bool


def read_judged_run(run: Path, *, votes: bool) -> JudgedRun:
    """Reads a run, and predicts first errors by the rule that the run itself used.

    Args:
        run: A finished run of `evaluate`.
        votes: Whether the sampled judgments count in place of the greedy ones, if the run has any.
    """
    stage = read_manifest(run)["stage"]
    if stage != "evaluate":
        raise UserError(f"expected a run of evaluate, found one of {stage} in {run}")
    config = validate(Evaluate, read_run_settings(run), str(run / "config.yaml"))
    items = read_items(config)
    judgments = {j.example_id: j for j in read_records(run, Judgment)}
    check_complete(run, judgments, items, GREEDY)
    threshold = threshold_of(config, items, judgments)
    rule = VotingRule(threshold)
    counted, suffixes = list(voters(rule.name, votes_of(config)).items())[-1 if votes else 0]
    check_complete(run, judgments, items, suffixes)
    if isinstance(config.judge, ClassifierJudge):
        counted = f"threshold {threshold:.3g}"
    predictions = [
        first_predicted_error(
            rule.verdicts(item, judgments, suffixes), unparsed_as=rule.unparsed_as
        )
        for item in items
    ]
    return JudgedRun(items, predictions, counted, votes_of(config) > 0)


def read_items(config: Evaluate) -> list[ProcessBenchItem]:
    """Reads the items that a run judged. Raises UserError if they are PRMBench's."""
    items = load_items(
        config.benchmark.source,
        load_tokenizer_of(config.judge.path),
        split=config.benchmark.split,
        limit=config.benchmark.limit,
        on_malformed=config.benchmark.on_malformed,
    )
    found = [item for item in items if isinstance(item, ProcessBenchItem)]
    if len(found) < len(items):
        raise UserError(
            f"two judges are compared by ProcessBench's F1: expected its items, found those of "
            f"PRMBench in {config.benchmark.source}: compare the prm_score of both in their "
            "summary.json"
        )
    return found


def check_complete(
    run: Path,
    judgments: Mapping[str, Judgment],
    items: Sequence[ProcessBenchItem],
    suffixes: Sequence[str],
) -> None:
    """Raises UserError if a step lacks one of these judgments."""
    for item in items:
        for step in range(len(item.steps)):
            for judgment_id in (f"{item.item_id}/{step}{suffix}" for suffix in suffixes):
                if judgment_id not in judgments:
                    raise UserError(
                        f"{run} has no judgment {judgment_id}: the items that its config.yaml "
                        "names are not those it has judged; put them back"
                    )


def check_same_items(
    run_a: Path,
    items_a: Sequence[ProcessBenchItem],
    run_b: Path,
    items_b: Sequence[ProcessBenchItem],
) -> None:
    """Raises UserError, naming the first difference, unless both runs have the same items."""
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

"""Compares two judges on the same ProcessBench items, item by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepwiser_jax.config import ClassifierJudge, Evaluate, GenPrmJudge
from stepwiser_jax.config_files import read_run_settings, validate
from stepwiser_jax.data.problems import read_items
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.auc import scores_by_truth, step_auc
from stepwiser_jax.evaluation.judgments import (
    GREEDY,
    VotingRule,
    judgment_ids,
    probabilities_of,
    threshold_of,
    voters,
    votes_of,
)
from stepwiser_jax.evaluation.processbench import (
    f1_scores,
    item_outcomes,
    subset_indices,
    subset_names,
)
from stepwiser_jax.evaluation.statistics import first, mcnemar, observed, paired_bootstrap
from stepwiser_jax.evaluation.verdicts import first_predicted_error
from stepwiser_jax.judges.base import vote_suffixes
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
    f1_a, f1_b = (first(f1_scores(outcomes)) for outcomes in (a, b))
    difference = paired_bootstrap(f1_a, f1_b, a["subset"], seed=seed)
    only_a = int(np.sum(a["is_found"] & ~b["is_found"]))
    only_b = int(np.sum(b["is_found"] & ~a["is_found"]))
    return {
        "items": len(a),
        "f1_a": observed(f1_a, len(a)),
        "f1_b": observed(f1_b, len(b)),
        "difference": difference.value,
        "difference_interval": [difference.low, difference.high],
        "difference_p": difference.p,
        "right_by_a_alone": only_a,
        "right_by_b_alone": only_b,
        "mcnemar_p": mcnemar(only_a, only_b),
    }


def paired_auc(
    items: Sequence[ProcessBenchItem],
    p_positive_a: Sequence[Sequence[float]],
    p_positive_b: Sequence[Sequence[float]],
    *,
    seed: int,
) -> dict[str, Any]:
    """Returns the AUC of both judges (`evaluation.auc`), an average over subsets, and the 95%
    interval of `auc_b - auc_a` by a paired bootstrap within each subset."""
    subset = subset_indices(items)
    a, b = (step_auc(scores_by_truth(items, p), subset) for p in (p_positive_a, p_positive_b))
    auc_a, auc_b = (observed(statistic, len(items)) for statistic in (a, b))
    found = paired_bootstrap(a, b, subset, seed=seed, samples=1000)
    return {"auc_a": auc_a, "auc_b": auc_b, "auc_difference_interval": [found.low, found.high]}


# --- two runs -----------------------------------------------------------------------------------


def compare_runs(run_a: Path, run_b: Path, *, votes: bool) -> dict[str, Any]:
    """Returns the `paired_comparison` of two finished runs with the `paired_auc` of each part, and
    which judgments of each `counted`. The bootstrap has a fixed seed, so that the same runs give
    the same numbers.

    Raises:
        UserError: A run is of another stage or not finished, the items differ, or `votes` is set
            and neither run has any.
    """
    a, b = (read_judged_run(run, votes=votes) for run in (run_a, run_b))
    check_same_items(a, b)
    if votes and not a.has_votes and not b.has_votes:
        raise UserError(
            f"--votes: expected an evaluate run with votes, found {run_a} ({a.counted}) and "
            f"{run_b} ({b.counted}); leave --votes out, or evaluate with `votes`"
        )
    return {"counted_a": a.counted, "counted_b": b.counted} | compare_judged(a, b)


def compare_judged(a: JudgedRun, b: JudgedRun) -> dict[str, Any]:
    """Returns the `paired_comparison` of two runs on the same items, with the `paired_auc` of each
    part."""
    found = paired_comparison(a.items, a.predictions, b.predictions, seed=0)
    subset = subset_indices(a.items)
    parts = [(np.flatnonzero(subset == s), x) for s, x in enumerate(found["subsets"].values())]
    for rows, part in [*parts, (range(len(a.items)), found["average"])]:
        p_a, p_b = ([run.p_positive[r] for r in rows] for run in (a, b))
        part |= paired_auc([a.items[r] for r in rows], p_a, p_b, seed=0)
    return found


@dataclass(frozen=True)
class JudgedRun:
    """A run's items, the first error that its judge predicts in each, the probability that each
    step is right, [item][step], and the name of the judgments that `counted`."""

    path: Path
    items: list[ProcessBenchItem]
    predictions: list[int]
    p_positive: list[list[float]]
    counted: str
    has_votes: bool


def read_judgments(
    run: Path, *, votes: bool
) -> tuple[Evaluate, list[ProcessBenchItem], dict[str, Judgment]]:
    """Returns the settings of a finished run of `evaluate`, its items, and its judgments by id.
    They hold all greedy judgments, and with `votes` all sampled ones.

    Raises:
        UserError: It is a run of another stage, or on PRMBench, or lacks a judgment.
    """
    stage = read_manifest(run)["stage"]
    if stage != "evaluate":
        raise UserError(f"expected a run of evaluate, found one of {stage} in {run}")
    config = validate(Evaluate, read_run_settings(run), str(run / "config.yaml"))
    found = read_items(config)
    items = [item for item in found if isinstance(item, ProcessBenchItem)]
    if len(items) < len(found):
        raise UserError(
            f"two judges are compared by ProcessBench's F1: expected its items, found those of "
            f"PRMBench in {config.benchmark.source}: compare the prm_score of both in their "
            "summary.json"
        )
    judgments = {j.example_id: j for j in read_records(run, Judgment)}
    needed = [*GREEDY, *vote_suffixes(votes_of(config.judge) if votes else 0)]
    for judgment_id in judgment_ids(items, needed):
        if judgment_id not in judgments:
            raise UserError(
                f"{run} has no judgment {judgment_id}: the items that its config.yaml names are "
                "not those it has judged; put them back"
            )
    return config, items, judgments


def read_judged_run(run: Path, *, votes: bool) -> JudgedRun:
    """Reads a run, and predicts first errors by the rule that the run itself used.

    Args:
        run: A finished run of `evaluate`.
        votes: Whether the sampled judgments count in place of the greedy ones, if the run has any.

    Raises:
        UserError: See `read_judgments`.
    """
    return judged_run(run, *read_judgments(run, votes=votes), votes=votes)


def judged_run(
    run: Path,
    config: Evaluate,
    items: list[ProcessBenchItem],
    judgments: Mapping[str, Judgment],
    *,
    votes: bool,
) -> JudgedRun:
    """Returns what `read_judged_run` does, of a run that `read_judgments` has read."""
    threshold = threshold_of(config, items, judgments)
    rule = VotingRule(threshold)
    counted, suffixes = list(voters(rule.name, votes_of(config.judge)).items())[-1 if votes else 0]
    if isinstance(config.judge, ClassifierJudge):
        counted = f"threshold {threshold:.3g}"
    elif threshold is not None and not isinstance(config.judge, GenPrmJudge):
        counted += f" at threshold {threshold:.3g}"
    if config.threshold_subset is not None:  # as the benchmark's authors do; the reader must know
        counted += f", chosen on {config.threshold_subset}, one of these subsets"
    predictions = [
        first_predicted_error(
            rule.verdicts(item, judgments, suffixes), unparsed_as=rule.unparsed_as
        )
        for item in items
    ]
    p_positive = [probabilities_of(item, judgments, suffixes) for item in items]
    return JudgedRun(run, items, predictions, p_positive, counted, votes_of(config.judge) > 0)


def check_same_items(a: JudgedRun, b: JudgedRun) -> None:
    """Raises UserError, naming the first difference, unless both runs have the same items."""
    for number, (of_a, of_b) in enumerate(zip(a.items, b.items, strict=False), 1):
        if of_a != of_b:
            differing = [name for name, x in vars(of_a).items() if x != vars(of_b)[name]]
            raise UserError(
                f"two judges are compared on the same items: item {number} is {of_a.item_id} in "
                f"{a.path} and {of_b.item_id} in {b.path}, which differ in {', '.join(differing)}"
            )
    shorter, longer = sorted((a, b), key=lambda run: len(run.items))
    if len(shorter.items) < len(longer.items):
        raise UserError(
            f"two judges are compared on the same items: {a.path} has {len(a.items)} and {b.path} "
            f"{len(b.items)}; the first that {longer.path} alone has is "
            f"{longer.items[len(shorter.items)].item_id}"
        )

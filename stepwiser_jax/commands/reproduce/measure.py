"""Runs the experiments of one seed, and reads their numbers from the finished runs.

`experiments` says what is trained, `items` what a number is made of. The learning rates of judges
are tuned with the same budget: `tune` trains each judge with every factor for half of its steps,
with a separate seed, and measures F1 on solutions of the development split. While the best factor
is at the edge of those tried, the next one is tried too. After a stop, the same command resumes.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from stepwiser_jax.commands.quickstart import labels_and_truths, timed
from stepwiser_jax.commands.reproduce.experiments import SELECTIONS, base, every_stage
from stepwiser_jax.commands.reproduce.items import interval_of, value_of
from stepwiser_jax.commands.reproduce.judges import FACTORS, JUDGES, MOST_FACTORS, judges
from stepwiser_jax.commands.reproduce.seed_runs import EXAMPLES, SeedRuns, Stage
from stepwiser_jax.config import STAGE_CONFIGS, Search
from stepwiser_jax.config_files import read_run_settings, validate
from stepwiser_jax.evaluation.auc import scores_by_truth
from stepwiser_jax.evaluation.paired import read_judgments
from stepwiser_jax.evaluation.processbench import best_threshold
from stepwiser_jax.evaluation.statistics import count_labels, right_by_problem
from stepwiser_jax.evaluation.verdicts import first_predicted_error, verdict_at
from stepwiser_jax.files import atomic_write
from stepwiser_jax.record_io import read_records
from stepwiser_jax.record_lines import write_records
from stepwiser_jax.records import Judgment, ProcessBenchItem, SearchResult, Trajectory
from stepwiser_jax.search.report import solved_by_method
from stepwiser_jax.stages import stage_module
from stepwiser_jax.tasks.arithmetic import MOD_10

TUNING_SEED = 1000

AT_MOST = "majority_at_equal_flops/at_most"

METHODS = {
    "plain": ("search", "plain"),
    "greedy": ("search", "greedy"),
    "majority": ("search", "majority/8"),
    "majority_at_equal_flops": ("search", AT_MOST),
    "best_of": ("search", "best_of/mean/8"),
    "weighted_majority": ("search", "weighted_majority/product/8"),
    "beam": ("search", "beam"),
    "dvts": ("search", "dvts"),
    "chunk_reset": ("search", "chunk_reset"),
    "chunk_reset_sampled": ("search_sampled", "chunk_reset"),
    "chunk_reset_classifier": ("search_classifier", "chunk_reset"),
}
"""The searches that are compared: a run, and a method in its summary."""
FOR_JUDGED_SAMPLES = ("best_of", "weighted_majority", "beam", "dvts")
"""Those that the second task does not have."""


def run_stages(runs: SeedRuns, stages: Sequence[Stage], console: Console) -> None:
    """Runs stages in order; a finished one is only read."""
    for number, (name, stage, settings) in enumerate(stages, 1):
        position = f"stage {number} of {len(stages)}"
        console.print(f"[bold]{runs.run_dir.name}/{name}[/bold] ({stage}), {position}")
        if stage == EXAMPLES:
            if not (runs.run_dir / name).is_file():
                write_records(runs.run_dir / name, settings())
            continue
        config = validate(STAGE_CONFIGS[stage], settings(), f"reproduce {name}")
        timed(runs.run_dir / name, stage_module(stage).run, config)


def run_seed(runs: SeedRuns, console: Console) -> dict[str, Any]:
    """Runs every experiment of one seed and task.

    Returns:
        `numbers` by name, fractions between 0 and 1; their 95% `intervals` over items; the `items`
        of each (`items` says which). Details of judges (`judges`), label sets (`labels`) and
        searches (`costs`), and the `seconds` of each stage.
    """
    stages = every_stage(runs)
    run_stages(runs, stages, console)
    read = {name: read_judge(runs, name) for name in judges(runs)}
    is_first = runs.task is MOD_10
    methods = [name for name in METHODS if is_first or name not in FOR_JUDGED_SAMPLES]
    items = {
        f"{kind}/{name}": of_kind
        for name, judge in read.items()
        for kind, of_kind in judge.items.items()
    }
    found = labels_and_truths(runs.run_dir)
    items |= {f"labels/{rule}": list(map(count_labels, some)) for rule, some in found.items()}
    items |= {f"search/{name}": solved_by_problem(runs, f"search/{name}") for name in methods}
    if runs.task is MOD_10:
        selections = [f"selection/{name}" for name in ("before", *SELECTIONS)]
        items |= {number: solved_by_problem(runs, number) for number in selections}
    searches = {name: search_summary(runs, name) for name in methods}
    costs = ("policy_tokens", "judge_tokens", "rejected_tokens", "flops")
    finished = [name for name, stage, _ in stages if stage != EXAMPLES]
    return {
        "numbers": {name: value_of(name, of_number) for name, of_number in items.items()},
        "intervals": {name: interval_of(name, of_number) for name, of_number in items.items()},
        "items": items,
        "judges": {name: judge.details for name, judge in read.items()},
        "labels": {name: label_set(runs, name) for name, stage, _ in stages if stage == "label"},
        "costs": {name: {key: row[key] for key in costs} for name, row in searches.items()},
        "seconds": {
            name: json.loads((runs.run_dir / name / "seconds.json").read_text())
            for name in finished
        },
    }


# --- judges -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadJudge:
    """The items of a judge's numbers, by kind, and its details: the `threshold` that was chosen on
    the development split; `acc_error` and `acc_correct` with it and without it (`greedy_`); the
    number of `examples` that it was trained on last."""

    items: dict[str, list[Any]]
    details: dict[str, Any]


def read_judge(runs: SeedRuns, name: str) -> ReadJudge:
    """Returns what a judge makes of the held-out solutions.

    `judge` is by a threshold on P(Positive), as best on the development split. `greedy` is by the
    verdicts themselves; a classifier's is the likelier sign. `auc` needs no threshold.
    """
    dev, of_dev = p_of_steps(runs, f"{name}_dev")
    threshold = best_threshold(of_dev, [item.first_error for item in dev])
    _, solutions, judgments = read_judgments(runs.run_dir / f"{name}_score", votes=False)
    found: dict[str, list[Any]] = {"judge": [], "greedy": [], "auc": []}
    for item in solutions:
        steps = judgments_of(item, judgments)
        verdicts = {
            "judge": [verdict_at(threshold, step.p_positive) for step in steps],
            "greedy": [step.verdict for step in steps],
        }
        for kind, of_kind in verdicts.items():
            is_found = first_predicted_error(of_kind) == item.first_error
            found[kind].append((item.first_error != -1, is_found))
        found["auc"] += scores_by_truth([item], [[step.p_positive for step in steps]])
    details = {"threshold": threshold, "examples": num_examples(runs, name)}
    for prefix, kind in (("", "judge"), ("greedy_", "greedy")):
        for side, has_error in (("error", True), ("correct", False)):
            of_side = [is_found for error, is_found in found[kind] if error == has_error]
            details[f"{prefix}acc_{side}"] = float(np.mean(of_side)) if of_side else 0.0
    return ReadJudge(found, details)


def judgments_of(item: ProcessBenchItem, judgments: dict[str, Judgment]) -> list[Judgment]:
    """Returns the greedy judgments of an item's steps."""
    return [judgments[f"{item.item_id}/{step}"] for step in range(len(item.steps))]


def p_of_steps(runs: SeedRuns, name: str) -> tuple[list[ProcessBenchItem], list[list[float]]]:
    """Returns a run's items, and P(Positive) of each of their steps."""
    _, items, judgments = read_judgments(runs.run_dir / name, votes=False)
    return items, [[step.p_positive for step in judgments_of(i, judgments)] for i in items]


def num_examples(runs: SeedRuns, name: str) -> int:
    """Returns how many examples a judge was trained on: labelled chunks, or kept judgments."""
    summary = runs.summary(name)
    return summary["labels"] if "labels" in summary else summary["examples"]


# --- labels -----------------------------------------------------------------------


def label_set(runs: SeedRuns, name: str) -> dict[str, Any]:
    """Returns the size of a set of labels, its share of positive ones, and the judge examples that
    are left after the filters and the balancing."""
    summary = runs.summary(name)
    return {key: summary[key] for key in ("labels", "positive_share", "judge_examples")}


# --- searches and selections --------------------------------------------------------------------


def search_summary(runs: SeedRuns, name: str) -> dict[str, Any]:
    """Returns a method's accuracy with its interval, and its tokens per problem."""
    run, path = METHODS[name]
    return functools.reduce(operator.getitem, path.split("/"), runs.summary(run))


def solved_by_problem(runs: SeedRuns, number: str) -> list[float]:
    """Returns how right the answer to every problem is, 0 to 1, in the order of their ids.

    `number` is `search/` with a method, or `selection/` with a policy.
    """
    kind, name = number.split("/")
    if kind == "selection":
        policy = "policy" if name == "before" else f"selected_{name}"
        return right_by_problem(read_records(runs.run_dir / f"{policy}_solves", Trajectory))
    run, method = runs.run_dir / METHODS[name][0], METHODS[name][1]
    if method == AT_MOST:
        method = f"majority/{search_summary(runs, name)['samples']:.0f}"
    config = validate(Search, read_run_settings(run), str(run))
    solved = solved_by_method(config, read_records(run, SearchResult))[method]
    return [float(problem.right) for problem in solved]


# --- learning rates -----------------------------------------------------------------------------


def tune(run_dir: Path) -> dict[str, Any]:
    """Tunes the learning rate of every judge; writes tuning.json and returns its content.

    A judge's `scores` are its F1 on the development split for each factor of its first guess, after
    half of its steps. The best factor, the first of equals, is what `CHOSEN` should hold.
    """
    console = Console()
    runs = SeedRuns(run_dir / "tuning", TUNING_SEED, split="dev", share_of_steps=0.5)
    run_stages(runs, base(runs), console)

    def f1_of(name: str, factor: float) -> float:
        row, rate = JUDGES[name]
        run = f"{name}_x{factor:g}"
        run_stages(runs, row(runs, run, rate * factor), console)
        return value_of("judge/", read_judge(runs, run).items["judge"])

    scores = {name: search_factors(functools.partial(f1_of, name)) for name in JUDGES}
    finished = sorted(runs.run_dir.glob("*/seconds.json"))
    result = {
        "scores": {name: {f"{f:g}": s for f, s in of.items()} for name, of in scores.items()},
        "chosen": {name: best_factor(of) for name, of in scores.items()},
        "seconds": sum(json.loads(file.read_text()) for file in finished),
    }
    atomic_write(run_dir / "tuning.json", json.dumps(result, indent=2) + "\n")
    console.print(result)
    return result


def search_factors(score: Callable[[float], float]) -> dict[float, float]:
    """Returns the score of every factor that is tried, ascending: `FACTORS`, and half the smallest
    or twice the largest while the best is at that edge and fewer than `MOST_FACTORS` are tried."""
    scores = {factor: score(factor) for factor in FACTORS}
    while len(scores) < MOST_FACTORS:
        best = best_factor(scores)
        if best not in (min(scores), max(scores)):
            break
        further = best / 2 if best == min(scores) else best * 2
        scores[further] = score(further)
    return dict(sorted(scores.items()))


def best_factor(scores: dict[float, float]) -> float:
    """Returns the factor with the best score, the smallest of equals."""
    return max(sorted(scores), key=scores.__getitem__)

"""Runs the experiments of one seed, and reads their numbers from the finished runs.

`experiments` says what is trained. The learning rates of all judges are tuned with the same budget:
`tune` trains each judge with every factor for half of its steps, with a separate seed, and
measures F1 on the solutions of the development split. After a stop, the same command resumes. Seeds
may be run one by one; a command that names them all then only reads them.
"""

from __future__ import annotations

import functools
import importlib
import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from stepwiser_jax.commands.quickstart import label_quality, timed
from stepwiser_jax.commands.reproduce.claims import CLAIMS, CLIP_PAIR, Claim
from stepwiser_jax.commands.reproduce.experiments import (
    FACTORS,
    FEWER_LABELS,
    JUDGES,
    SELECTIONS,
    STARTS,
    SeedRuns,
    Stage,
    base,
    every_stage,
)
from stepwiser_jax.config import STAGE_CONFIGS, Search
from stepwiser_jax.config_files import read_run_settings, validate
from stepwiser_jax.evaluation.paired import compare_runs
from stepwiser_jax.evaluation.statistics import paired_bootstrap, right_by_problem
from stepwiser_jax.files import atomic_write
from stepwiser_jax.manifest import check_run_file
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import SearchResult, Trajectory
from stepwiser_jax.runs.metrics import read_metrics
from stepwiser_jax.search.report import solved_by_method
from stepwiser_jax.tasks import arithmetic

TUNING_SEED = 1000

METHODS = {
    "plain": ("search", "plain"),
    "greedy": ("search", "greedy"),
    "majority": ("search", "majority/8"),
    "best_of": ("search", "best_of/mean/8"),
    "weighted_majority": ("search", "weighted_majority/product/8"),
    "beam": ("search", "beam"),
    "dvts": ("search", "dvts"),
    "chunk_reset": ("search", "chunk_reset"),
    "chunk_reset_classifier": ("search_classifier", "chunk_reset"),
}
"""The searches that are compared: a run, and a method in its summary."""


def run_stages(runs: SeedRuns, stages: Sequence[Stage], console: Console) -> None:
    """Runs stages in order; a finished one is only read."""
    for number, (name, stage, settings) in enumerate(stages, 1):
        position = f"stage {number} of {len(stages)}"
        console.print(f"[bold]{runs.run_dir.name}/{name}[/bold] ({stage}), {position}")
        config = validate(STAGE_CONFIGS[stage], settings(), f"reproduce {name}")
        module = importlib.import_module(f"stepwiser_jax.stages.{stage.replace('-', '_')}")
        timed(runs.run_dir / name, module.run, config)


def run_seed(runs: SeedRuns, console: Console) -> dict[str, Any]:
    """Runs every experiment of one seed.

    Returns:
        `numbers` by name, fractions between 0 and 1, and their 95% `intervals` over solutions or
        problems; details of judges (`scores`) and searches (`tokens`); for the two trainings that
        differ in their clip, the share `clipped_from_above`; `paired_p` by claim; and the `seconds`
        of each stage.
    """
    stages = every_stage(runs)
    run_stages(runs, stages, console)
    scores = {name: judge_score(runs, name) for name in (*STARTS, *JUDGES, *FEWER_LABELS)}
    searches = {name: search_summary(runs, name) for name in METHODS}
    policies = {name: runs.summary(f"selected_{name}_solves") for name in SELECTIONS}
    policies = {"before": runs.summary("policy_solves")} | policies
    trainings = {name: training_metrics(runs, name) for name in CLIP_PAIR}
    tables = (
        ("labels", "balanced_accuracy", label_quality(runs.run_dir)),
        ("judge", "f1", scores),
        ("reward", "reward", trainings),
        ("search", "accuracy", searches),
        ("selection", "accuracy", policies),
    )
    costs = ("policy_tokens", "judge_tokens", "rejected_tokens")
    return {
        "numbers": {
            f"{kind}/{name}": row[key] for kind, key, rows in tables for name, row in rows.items()
        },
        "intervals": {
            f"{kind}/{name}": row[f"{key}_interval"]
            for kind, key, rows in tables
            for name, row in rows.items()
            if f"{key}_interval" in row
        },
        "scores": scores,
        "tokens": {name: {key: row[key] for key in costs} for name, row in searches.items()},
        "clipped_from_above": {name: t["clipped_from_above"] for name, t in trainings.items()},
        "paired_p": {claim.says: paired_p(runs, claim) for claim in CLAIMS if claim.is_paired},
        "seconds": {
            name: json.loads((runs.run_dir / name / "seconds.json").read_text())
            for name, _, _ in stages
        },
    }


def judge_score(runs: SeedRuns, name: str) -> dict[str, Any]:
    """Returns a judge's official F1 with its interval, `acc_error` and `acc_correct`.

    Judgments are greedy; a classifier's follow its threshold.
    """
    summary = runs.summary(f"{name}_score")
    subset = summary["greedy"]["subsets"][arithmetic.MOD_10.name]
    return subset["official"] | {"f1_interval": subset["official_f1_interval"]}


def training_metrics(runs: SeedRuns, name: str) -> dict[str, float]:
    """Returns the mean share of tokens whose ratio was clipped from above in a training by GRPO,
    and the mean reward of its last ten iterations."""
    check_run_file(runs.run_dir / name, "metrics.jsonl")
    metrics = read_metrics(runs.run_dir / name / "metrics.jsonl")
    return {
        "clipped_from_above": float(np.mean([m["clip_fraction_high"] for m in metrics])),
        "reward": float(np.mean([m["reward"] for m in metrics[-10:]])),
    }


def search_summary(runs: SeedRuns, name: str) -> dict[str, Any]:
    """Returns a method's accuracy with its interval, and its tokens per problem."""
    run, path = METHODS[name]
    return functools.reduce(operator.getitem, path.split("/"), runs.summary(run))


def solved_by_problem(runs: SeedRuns, number: str) -> np.ndarray:
    """Returns how right the answer to every problem is, 0 to 1, in the order of their ids.

    `number` is `search/` with a method, or `selection/` with a policy.
    """
    kind, name = number.split("/")
    if kind == "selection":
        run = runs.run_dir / f"selected_{name}_solves"
        return np.array(right_by_problem(read_records(run, Trajectory)))
    run, method = runs.run_dir / METHODS[name][0], METHODS[name][1]
    config = validate(Search, read_run_settings(run), str(run))
    solved = solved_by_method(config, read_records(run, SearchResult))[method]
    return np.array([problem.right for problem in solved])


def paired_p(runs: SeedRuns, claim: Claim) -> float:
    """Returns the p-value of no difference, by paired bootstrap.

    The difference is in F1 on the same solutions, or in accuracy on the same problems.
    """
    if not claim.better.startswith("judge/"):
        worse, better = (solved_by_problem(runs, number) for number in (claim.worse, claim.better))
        return paired_bootstrap(worse, better, np.mean, seed=0).p
    names = (name.removeprefix("judge/") for name in (claim.worse, claim.better))
    worse, better = (runs.run_dir / f"{name}_score" for name in names)
    return compare_runs(worse, better, votes=False)["average"]["difference_p"]


def tune(run_dir: Path) -> dict[str, Any]:
    """Tunes the learning rate of every judge; writes tuning.json and returns its content.

    A judge's `scores` are its F1 on the development split for each factor of its first guess, after
    half of its steps. The best factor, the first of equals, is what `CHOSEN` should hold.
    """
    console = Console()
    runs = SeedRuns(run_dir / "tuning", TUNING_SEED, split="dev", share_of_steps=0.5)
    run_stages(runs, base(runs), console)
    scores: dict[str, dict[str, float]] = {}
    for name, (stages_of, rate) in JUDGES.items():
        scores[name] = {}
        for factor in FACTORS:
            run = f"{name}_x{factor:g}"
            run_stages(runs, stages_of(runs, run, rate * factor), console)
            scores[name][f"{factor:g}"] = judge_score(runs, run)["f1"]
    finished = sorted(runs.run_dir.glob("*/seconds.json"))
    result = {
        "scores": scores,
        "chosen": {name: float(max(of, key=of.__getitem__)) for name, of in scores.items()},
        "seconds": sum(json.loads(file.read_text()) for file in finished),
    }
    atomic_write(run_dir / "tuning.json", json.dumps(result, indent=2) + "\n")
    console.print(result)
    return result

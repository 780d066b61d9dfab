"""Runs the whole method on the embedded arithmetic task, with a tiny model, on a laptop.

    policy (sft) -> rollout -> annotate -> label -> judge cold start (sft) -> judge (GRPO)
    held-out rollouts -> evaluate both judges -> search

Every stage is the one that a real run uses, with its own run directory; the settings below are the
whole recipe. After a stop, the same command goes on.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from stepwiser_jax.commands.results import judgment_text
from stepwiser_jax.config import STAGE_CONFIGS
from stepwiser_jax.config_files import validate
from stepwiser_jax.data.problems import load_items
from stepwiser_jax.evaluation.judgments import describe_judgment, example_judgments
from stepwiser_jax.evaluation.statistics import (
    LABEL_SCORES,
    LabelsAndTruths,
    bootstrap_interval,
    count_labels,
    first,
    label_scores,
    observed,
)
from stepwiser_jax.files import atomic_write
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import Judgment, PrefixValue, Problem, Trajectory
from stepwiser_jax.rl.labels import LABEL_RULES, label_chunks
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.stages import stage_module
from stepwiser_jax.tasks import arithmetic
from stepwiser_jax.text.chunks import chunk_texts

Stage = tuple[str, str, dict[str, Any]]
"""(directory, stage, settings)."""

SOLVE = {"temperature": 1.0, "max_new_tokens": 112}
SEARCH_SAMPLING = SOLVE | {"temperature": 0.5}
"""Of 0.3, 0.5, 0.7, 1 and 1.3 the best on the development split, for the mean of chunk-reset search
and a vote of 4 (docs/quickstart.md)."""
POLICY_ENGINE = {"rows": [32, 256], "buckets": [32, 160]}
JUDGE_ENGINE = {"rows": [32, 256], "buckets": [192]}
JUDGE = {"prompt_style": "bare", "sampling": {"max_new_tokens": 32}, "engine": JUDGE_ENGINE}


def judge_at(run_dir: Path) -> dict[str, Any]:
    """Returns the settings of a judge that a run has trained."""
    return JUDGE | {"path": str(run_dir)}


def recipe(run_dir: Path, seed: int, *, problems: int = 512, split: str = "test") -> list[Stage]:
    """Returns every stage in order. `problems` is the number of those evaluated, on `split`."""
    held_out = {"source": "arithmetic", "split": split, "limit": problems, "seed": seed}
    stages = [
        *policy_and_labels(run_dir, seed),
        *judge_training(run_dir, seed),
        *evaluation(run_dir, held_out),
    ]
    return [(name, stage, shared_settings(stage, seed) | tree) for name, stage, tree in stages]


def shared_settings(stage: str, seed: int) -> dict[str, Any]:
    """Returns the settings that all stages share, as far as this stage has them."""
    shared = {"seed": seed, "prompt_style": "bare"}
    return {key: x for key, x in shared.items() if key in STAGE_CONFIGS[stage].model_fields}


def optimizer(peak: float, warmup: int, end_fraction: float) -> dict[str, Any]:
    return {
        "learning_rate": peak,
        "warmup_steps": warmup,
        "schedule": "cosine",
        "end_fraction": end_fraction,
        "weight_decay": 0.0,
        "b2": 0.98,
    }


def fine_tuning(data: str, count: int, seed: int, steps: int) -> dict[str, Any]:
    """Returns the settings that train fresh weights on generated demonstrations."""
    return {
        "model": {"path": "arithmetic"},
        "examples": {"source": data, "limit": count, "seed": seed},
        "batch_size": 5,
        "max_length": 160,
        "steps": steps,
        "training": {"optimizer": optimizer(1e-3, 30, 0.1), "checkpoint_every": 200},
    }


def policy_and_labels(run_dir: Path, seed: int) -> list[Stage]:
    """Returns the stages that make a policy, its solutions of new problems, and their labels."""
    policy, rollouts, values = (str(run_dir / n) for n in ("policy", "rollouts", "values"))
    problems = {"source": "arithmetic", "split": "rollout", "limit": 448, "seed": seed}
    sample = {"policy": {"path": policy}, "sampling": SOLVE, "engine": POLICY_ENGINE}
    annotate = {
        "rollouts": rollouts,
        "num_rollouts": 16,
        "max_trajectories_per_problem": 3,
        "limit": 1000,
        "block_size": 250,
    }
    label = {
        "values": values,
        "rollouts": rollouts,
        "tokenizer": policy,
        "rule": "rel_effective",
        # Ours, not the paper's: right chunks after an error would be called negative, and values
        # near 0 are mostly chance.
        "dead_prefix": "drop",
        "min_prefix_value": 0.2,
        "max_prompt_tokens": 160,
    }
    return [
        ("policy", "sft", fine_tuning("arithmetic-policy", 12000, seed, 1300)),
        ("rollouts", "rollout", sample | {"problems": problems, "group_size": 4}),
        ("values", "annotate", sample | annotate),
        ("labels", "label", label),
    ]


def judge_training(run_dir: Path, seed: int) -> list[Stage]:
    """Returns the stages that teach a judge the form of a judgment, then train it by GRPO."""
    judge = {
        "model": {"path": str(run_dir / "cold_start")},
        "examples": {"source": str(run_dir / "labels")},
        "iterations": 100,
        "prompts_per_iteration": 32,
        "group_size": 8,
        "max_prompt_tokens": 160,
        "row_lengths": [256, 320, 416],
        "sampling": {"temperature": 1.0, "max_new_tokens": 32},
        "engine": JUDGE_ENGINE,
        "grpo": {
            "drop_zero_variance": True,
            "denominator": "kept",
            "max_resamples": 1,
            "kl_coef": 0.2,
        },
        "training": {"optimizer": optimizer(2e-4, 8, 0.2), "checkpoint_every": 20},
    }
    return [
        ("cold_start", "sft", fine_tuning("arithmetic-judge", 16000, seed, 2200)),
        ("judge", "train-judge", judge),
    ]


def evaluation(run_dir: Path, problems: dict[str, Any]) -> list[Stage]:
    """Returns the stages that score both judges, and search with the trained one."""
    policy = {"path": str(run_dir / "policy")}
    rollout = {
        "policy": policy,
        "problems": problems,
        "group_size": 1,
        "sampling": SOLVE,
        "engine": POLICY_ENGINE,
        "block_size": 256,
    }
    evaluate = {"benchmark": {"source": str(run_dir / "heldout")}, "block_size": 256}
    search = {
        "policy": policy,
        "judge": judge_at(run_dir / "judge"),
        "problems": problems,
        "majority": [2, 4, 8],
        "sampling": SEARCH_SAMPLING,
        "first_attempt": "greedy",
        "max_chunk_tokens": 24,
        "engine": POLICY_ENGINE,
        "block_size": 256,
    }
    return [
        ("heldout", "rollout", rollout),
        *(
            (
                f"evaluate_{name}",
                "evaluate",
                evaluate | {"judge": judge_at(run_dir / name)},
            )
            for name in ("cold_start", "judge")
        ),
        ("search", "search", search),
    ]


def run_quickstart(
    run_dir: Path, seed: int, *, problems: int = 512, split: str = "test"
) -> dict[str, Any]:
    """Runs every stage that is not finished, prints the table and a few judgments, and writes
    summary.json."""
    console = Console()
    summaries: dict[str, dict[str, Any]] = {}
    stages = recipe(run_dir, seed, problems=problems, split=split)
    for number, (name, stage, tree) in enumerate(stages, 1):
        config = validate(STAGE_CONFIGS[stage], tree, f"quickstart {name}")
        console.print(f"[bold]{name}[/bold] ({stage}), stage {number} of {len(stages)}")
        summaries[name] = timed(run_dir / name, stage_module(stage).run, config)
    summary = summarize(run_dir, summaries)
    atomic_write(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    console.print(results_table(summary))
    print_judgments(console, run_dir)
    console.print(f"\nAll numbers: {run_dir / 'summary.json'}")
    return summary


def timed(directory: Path, run: Any, config: Any) -> dict[str, Any]:
    """Runs a stage. Its wall seconds, restarts added up, are kept beside it in seconds.json."""
    file = directory / "seconds.json"
    seconds = json.loads(file.read_text()) if file.is_file() else 0.0
    is_finished = (directory / "manifest.json").is_file()
    start = time.perf_counter()
    try:
        summary = run(config, directory)
    finally:
        if not is_finished:
            seconds += time.perf_counter() - start
        if directory.is_dir():
            atomic_write(file, json.dumps(seconds))
    return summary | {"seconds": seconds}


# --- results ------------------------------------------------------------------------------------


def summarize(run_dir: Path, summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the numbers of the table; accuracies and F1 are fractions between 0 and 1."""
    search = summaries["search"]
    names = ("plain", "greedy", "majority", "chunk_reset", "majority_at_equal_flops")
    methods = {name: search[name] for name in names}

    def judge_scores(name: str) -> dict[str, Any]:
        scores = summaries[name]["greedy"]["subsets"][arithmetic.MOD_10.name]
        return {
            "f1": scores["official"]["f1"],
            "f1_interval": scores["official_f1_interval"],
            "auc": scores["auc"],
            "auc_interval": scores["auc_interval"],
            "acc_error": scores["official"]["acc_error"],
            "acc_correct": scores["official"]["acc_correct"],
            "unparsed_rate": scores["unparsed_rate"],
        }

    return {
        "policy": {
            "accuracy_sampled": search["plain"]["accuracy"],
            "accuracy_greedy": search["greedy"]["accuracy"],
        },
        "labels": label_quality(run_dir),
        "judge": {
            "cold_start": judge_scores("evaluate_cold_start"),
            "grpo": judge_scores("evaluate_judge"),
        },
        "search": methods,
        "problems": search["problems"],
        "seconds": {name: summary["seconds"] for name, summary in summaries.items()},
    }


def label_quality(run_dir: Path) -> dict[str, Any]:
    """Returns the scores of every label rule against the exact truth, and the number of chunks, on
    those of `labels_and_truths`. Intervals are 95%, over problems."""
    quality = {}
    for rule, of_problems in labels_and_truths(run_dir).items():
        scores, problems = label_scores(list(map(count_labels, of_problems))), len(of_problems)
        interval = bootstrap_interval(first(scores), np.zeros(problems), seed=0)
        quality[rule] = {
            **dict(zip(LABEL_SCORES, observed(scores, problems), strict=True)),
            "balanced_accuracy_interval": interval,
            "chunks": sum(map(len, of_problems)),
        }
    return quality


def labels_and_truths(run_dir: Path) -> dict[str, list[LabelsAndTruths]]:
    """Returns what each label rule says of every problem's chunks, beside the exact truth.

    All rules have the same chunks: those up to and including a trajectory's first error whose
    prefix has a value above 0. So `dead_prefix` makes no difference here, and nothing is said of
    labels after an error or after a prefix worth 0. Parameters are the defaults: the paper's for 7B
    (4.1), and GenPRM's.
    """
    problems = {p.problem_id: p for p in read_records(run_dir / "rollouts", Problem)}
    trajectories = {t.trajectory_id: t for t in read_records(run_dir / "rollouts", Trajectory)}
    values: dict[str, list[float]] = {}
    for value in read_records(run_dir / "values", PrefixValue):
        values.setdefault(value.trajectory_id, []).append(value.value)
    tokenizer = load_tokenizer_of(str(run_dir / "policy"))
    found: dict[str, dict[str, LabelsAndTruths]] = {rule: {} for rule in LABEL_RULES}
    for trajectory_id, q in values.items():
        trajectory = trajectories[trajectory_id]
        texts = chunk_texts(tokenizer, trajectory.completion_ids, trajectory.chunk_ends)
        question = problems[trajectory.problem_id].question
        truth = arithmetic.chunk_truth(question, texts)
        end = truth.index(False) + 1 if False in truth else len(truth)
        scope = [j for j in range(end) if q[j] > 0]
        for rule in LABEL_RULES:
            given = label_chunks(q, rule)
            of_problem = found[rule].setdefault(trajectory.problem_id, [])
            of_problem += [(bool(given[j]), truth[j]) for j in scope]
    return {rule: list(of_rule.values()) for rule, of_rule in found.items()}


def results_table(summary: dict[str, Any]) -> Table:
    title = "StepWiser on compound mod-10 arithmetic (tokens of policy + judge)"
    table = Table(title=title, title_justify="left")
    table.add_column("what", min_width=21)
    for column in ("value", "written", "read", "MFLOP"):
        table.add_column(column)

    def percent(value: float, interval: list[float] | None = None) -> str:
        text = f"{100 * value:.1f}%"
        return (
            text
            if interval is None
            else f"{text}  [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
        )

    policy, judge, search = summary["policy"], summary["judge"], summary["search"]
    table.add_row("policy accuracy, sampled", percent(policy["accuracy_sampled"]))
    table.add_row("policy accuracy, greedy", percent(policy["accuracy_greedy"]), end_section=True)
    for rule, quality in summary["labels"].items():
        accuracy = percent(quality["balanced_accuracy"], quality["balanced_accuracy_interval"])
        table.add_row(f"labels, {rule}: balanced accuracy", accuracy)
    table.add_section()
    for name, title in (("cold_start", "judge F1, cold start"), ("grpo", "judge F1, after GRPO")):
        scores = judge[name]
        table.add_row(title, percent(scores["f1"], scores["f1_interval"]))
    for name, title in (("cold_start", "judge AUC, cold start"), ("grpo", "judge AUC, after GRPO")):
        auc, (low, high) = judge[name]["auc"], judge[name]["auc_interval"]
        table.add_row(title, f"{auc:.3f}  [{low:.3f}, {high:.3f}]")
    table.add_section()
    rows = [("greedy decoding", search["greedy"]), ("plain sampling", search["plain"])]
    rows += [(f"majority of {k}", row) for k, row in search["majority"].items()]
    rows += [("chunk-reset search", search["chunk_reset"])]
    for where, title in (("at_most", "at most its FLOPs"), ("next", "the next above")):
        if row := search["majority_at_equal_flops"][where]:
            rows.append((f"majority of {row['samples']:.0f}, {title}", row))
    for title, row in rows:
        written = f"{row['policy_tokens']:.0f} + {row['judge_tokens']:.0f}"
        read = f"{row['policy_read_tokens']:.0f} + {row['judge_read_tokens']:.0f}"
        right = percent(row["accuracy"], row["accuracy_interval"])
        table.add_row(title, right, written, read, f"{row['flops'] / 1e6:.0f}")
    return table


def print_judgments(console: Console, run_dir: Path, count: int = 4) -> None:
    """Prints a few chains of thought of the trained judge, on first errors and on right chunks, and
    one that ends in a wrong verdict."""
    judgments = {j.example_id: j for j in read_records(run_dir / "evaluate_judge", Judgment)}
    items = load_items(str(run_dir / "heldout"), load_tokenizer_of(str(run_dir / "policy")))
    console.print("\n[bold]The judge at work[/bold] (held-out solutions)")
    wrong = [(item, item.first_error) for item in items if item.first_error >= 0]
    right = [(item, 0) for item in items if item.first_error != 0]
    chosen = wrong[: count // 2] + right[: count - count // 2]
    shown = [
        describe_judgment(item, step, judgments[f"{item.item_id}/{step}"]) for item, step in chosen
    ]
    misjudged = example_judgments(items, judgments)[-1]
    for words in [*shown, *([misjudged] if misjudged not in shown else [])]:
        console.print(judgment_text(words), markup=False, highlight=False, soft_wrap=True)

"""The paper's claims on the embedded arithmetic task: one row beside another, seed by seed.

`compare_rows` says what the rows are. Every judge has the same budget for its learning rate:
`tune` trains it with each of `FACTORS` for half of its steps, with a seed of its own, and takes
its F1 on the solutions of the development split. Run again after a stop, both go on where they
were. Seeds may be run one by one: named together afterwards, they are only read.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from stepwiser_jax.commands.quickstart import label_quality, stage_module, timed
from stepwiser_jax.commands.reproduce.rows import (
    CHOSEN,
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
from stepwiser_jax.config import STAGE_CONFIGS, Search, read_run_settings, validate
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.paired import compare_runs
from stepwiser_jax.evaluation.statistics import paired_bootstrap, right_by_problem
from stepwiser_jax.record_io import atomic_write, check_run_file, read_records
from stepwiser_jax.records import SearchResult, Trajectory
from stepwiser_jax.runs.directory import read_metrics
from stepwiser_jax.search.report import solved_by_method
from stepwiser_jax.tasks import arithmetic

TUNING_SEED = 1000


# --- one seed -----------------------------------------------------------------------------------


def run_stages(runs: SeedRuns, stages: Sequence[Stage], console: Console) -> None:
    for number, (name, stage, settings) in enumerate(stages, 1):
        place = f"stage {number} of {len(stages)}"
        console.print(f"[bold]{runs.run_dir.name}/{name}[/bold] ({stage}), {place}")
        config = validate(STAGE_CONFIGS[stage], settings(), f"compare {name}")
        timed(runs.run_dir / name, stage_module(stage).run, config)


def score_of(runs: SeedRuns, name: str) -> dict[str, Any]:
    """Official F1 with its interval, acc_error and acc_correct: of greedy judgments, or of a
    classifier's threshold."""
    summary = runs.summary(f"{name}_score")
    subset = summary["greedy"]["subsets"][arithmetic.SUBSET]
    return subset["official"] | {"f1_interval": subset["official_f1_interval"]}


def training_of(runs: SeedRuns, name: str) -> dict[str, float]:
    """Of a training by GRPO: the share of tokens whose ratio was clipped from above, the mean over
    iterations; and the mean reward of the last ten."""
    check_run_file(runs.run_dir / name, "metrics.jsonl")
    metrics = read_metrics(runs.run_dir / name / "metrics.jsonl")
    return {
        "clipped_from_above": float(np.mean([m["clip_fraction_high"] for m in metrics])),
        "reward": float(np.mean([m["reward"] for m in metrics[-10:]])),
    }


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
"""Of the two searches, what is compared: a run, and a method of `search.solved_by_method`."""


def method_of(runs: SeedRuns, name: str) -> dict[str, Any]:
    """Accuracy with its interval, and tokens a problem."""
    run, path = METHODS[name]
    return functools.reduce(operator.getitem, path.split("/"), runs.summary(run))


def right_of(runs: SeedRuns, number: str) -> np.ndarray:
    """How right every problem's answer is, 0 to 1, by `search/` a method or by the policy of
    `selection/`."""
    kind, name = number.split("/")
    if kind == "selection":
        run = runs.run_dir / f"selected_{name}_solves"
        return np.array(right_by_problem(read_records(run, Trajectory)))
    run, method = runs.run_dir / METHODS[name][0], METHODS[name][1]
    config = validate(Search, read_run_settings(run), str(run))
    solved = solved_by_method(config, read_records(run, SearchResult))[method]
    return np.array([problem.right for problem in solved])


def seconds_of(runs: SeedRuns, stages: Sequence[Stage]) -> dict[str, float]:
    files = {name: runs.run_dir / name / "seconds.json" for name, _, _ in stages}
    return {name: json.loads(file.read_text()) for name, file in files.items()}


def run_seed(runs: SeedRuns, console: Console) -> dict[str, Any]:
    """Every row of one seed; returns its numbers, fractions between 0 and 1, with 95% intervals
    over solutions or problems, and the seconds of its stages."""
    stages = every_stage(runs)
    run_stages(runs, stages, console)
    scores = {name: score_of(runs, name) for name in (*STARTS, *JUDGES, *FEWER_LABELS)}
    methods = {name: method_of(runs, name) for name in METHODS}
    solves = {name: runs.summary(f"selected_{name}_solves") for name in SELECTIONS}
    clip_pair = {name: training_of(runs, name) for name in CLIP_PAIR}
    labels = label_quality(runs.run_dir)
    numbers = {
        **{f"labels/{rule}": quality["balanced_accuracy"] for rule, quality in labels.items()},
        **{f"judge/{name}": score["f1"] for name, score in scores.items()},
        **{f"reward/{name}": training["reward"] for name, training in clip_pair.items()},
        **{f"search/{name}": method["accuracy"] for name, method in methods.items()},
        "selection/before": runs.summary("policy_solves")["accuracy"],
        **{f"selection/{name}": summary["accuracy"] for name, summary in solves.items()},
    }
    intervals = {
        **{f"labels/{rule}": q["balanced_accuracy_interval"] for rule, q in labels.items()},
        **{f"judge/{name}": score["f1_interval"] for name, score in scores.items()},
        **{f"search/{name}": method["accuracy_interval"] for name, method in methods.items()},
        "selection/before": runs.summary("policy_solves")["accuracy_interval"],
        **{f"selection/{name}": summary["accuracy_interval"] for name, summary in solves.items()},
    }
    costs = ("policy_tokens", "judge_tokens", "rejected_tokens")
    return {
        "numbers": numbers,
        "intervals": intervals,
        "scores": scores,
        "tokens": {name: {key: row[key] for key in costs} for name, row in methods.items()},
        "clipped_from_above": {name: t["clipped_from_above"] for name, t in clip_pair.items()},
        "paired_p": {claim.says: paired_p(runs, claim) for claim in CLAIMS if claim.is_paired},
        "seconds": seconds_of(runs, stages),
    }


# --- the claims ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """That one number is above another; `paper`: what the paper has for the two. Paired: of the
    same solutions, or problems."""

    says: str
    better: str
    worse: str
    paper: str

    @property
    def is_paired(self) -> bool:
        return self.better.startswith(("judge/", "search/", "selection/"))


CLIP_PAIR = ("clip_higher", "clip")
CLAIMS = (
    Claim("relative > absolute labels: judge", "judge/stepwiser", "judge/absolute_labels",
          "7B 61.9, 53.8; 1.5B 34.8, 36.1 (table 5)"),
    Claim("relative > absolute labels: against the truth", "labels/rel_effective", "labels/abs_q",
          "not measured"),
    Claim("chunks > lines, as many rollouts, both judge chunks", "judge/stepwiser", "judge/lines",
          "1.5B Rel-Ratio 36.2, 31.0 (table 9)"),
    Claim("RL > offline", "judge/stepwiser", "judge/offline", "1.5B 36.2, 23.1 (table 6)"),
    Claim("offline > classifier", "judge/offline", "judge/classifier",
          "1.5B 23.1, 24.1: fails there (table 6)"),
    Claim("RL > classifier", "judge/stepwiser", "judge/classifier",
          "7B 61.9, 39.7; 1.5B 34.8, 29.2 (table 5)"),
    Claim("reasoning > verdicts alone", "judge/stepwiser", "judge/no_reasoning",
          "7B 60.5, 47.9; 1.5B 36.2, 34.3 (table 6)"),
    Claim("balanced > unbalanced prompts", "judge/stepwiser", "judge/unbalanced",
          "7B 61.9, 49.4 (table 10)"),
    Claim("clip-higher > clip, 4 updates: judge", "judge/clip_higher", "judge/clip", "no number"),
    Claim("clip-higher > clip, 4 updates: last reward", "reward/clip_higher", "reward/clip",
          "7B Rel-Ratio: higher (figure 4)"),
    Claim("chunk-reset > plain", "search/chunk_reset", "search/plain",
          "1.5B 36.7, 31.2; 7B 63.2, 57.4 (table 7)"),
    Claim("chunk-reset > greedy, which costs less", "search/chunk_reset", "search/greedy",
          "not measured"),
    Claim("chunk-reset > majority, same budget", "search/chunk_reset", "search/majority",
          "not measured"),
    Claim("chunk-reset: judge > classifier", "search/chunk_reset",
          "search/chunk_reset_classifier", "1.5B 36.7, 33.5; 7B 63.2, 61.5 (table 7)"),
    Claim("selection: judge > outcome", "selection/stepwiser", "selection/outcome",
          "7B 63.0, 60.9 (table 8)"),
    Claim("selection: judge > classifier", "selection/stepwiser", "selection/classifier",
          "7B 63.0, 61.7 (table 8)"),
    Claim("selection: judge without answers > random", "selection/stepwiser_alone",
          "selection/random", "not measured"),
    Claim("GenPRM on all labels > classifier on all", "judge/genprm", "judge/classifier",
          "GenPRM 7B 75.2, Qwen2.5-Math-PRM-7B 73.5"),
    Claim("GenPRM on 10% > classifier on all", "judge/genprm_10", "judge/classifier",
          "no number"),
    Claim("GenPRM on 1% > classifier on all", "judge/genprm_1", "judge/classifier", "no number"),
    Claim("ThinkPRM on all labels > classifier on all", "judge/thinkprm", "judge/classifier",
          "another metric"),
    Claim("ThinkPRM on 10% > classifier on all", "judge/thinkprm_10", "judge/classifier",
          "another metric"),
    Claim("ThinkPRM on 1% > classifier on all", "judge/thinkprm_1", "judge/classifier",
          "another metric; its claim is 1% of PRM800K"),
)  # fmt: skip


def paired_p(runs: SeedRuns, claim: Claim) -> float:
    """Of no difference in F1 on the same solutions, or in accuracy on the same problems (paired
    bootstrap)."""
    if not claim.better.startswith("judge/"):
        worse, better = (right_of(runs, number) for number in (claim.worse, claim.better))
        return paired_bootstrap(worse, better, np.mean, seed=0).p
    names = (name.removeprefix("judge/") for name in (claim.worse, claim.better))
    worse, better = (runs.run_dir / f"{name}_score" for name in names)
    return compare_runs(worse, better, votes=False)["average"]["difference_p"]


VERDICTS = {frozenset({1}): "holds", frozenset({-1}): "fails", frozenset({0}): "not told apart"}


def told_by(claim: Claim, seed: dict[str, Any]) -> int:
    """1 where the claim holds in this seed, -1 where its contrary does; 0 for a difference that the
    choice of solutions, or problems, may have made (p of 0.05 or more)."""
    if seed["paired_p"].get(claim.says, 0.0) >= 0.05:
        return 0
    return int(np.sign(seed["numbers"][claim.better] - seed["numbers"][claim.worse]))


def verdict_on(claim: Claim, seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A claim holds where it does in every seed, and fails where its contrary does. A seed does not
    test the clip where both of the pair were clipped alike."""
    is_of_clip = claim.better.endswith("/clip_higher")
    tested = [s for s in seeds if not is_of_clip or len(set(s["clipped_from_above"].values())) > 1]
    better = [seed["numbers"][claim.better] for seed in seeds]
    worse = [seed["numbers"][claim.worse] for seed in seeds]
    told = [told_by(claim, seed) for seed in tested]
    differences = np.subtract(better, worse)
    return {
        "claim": claim.says,
        "better": better,
        "worse": worse,
        "difference": float(np.mean(differences)),
        "spread": float(np.std(differences, ddof=1)) if len(seeds) > 1 else None,
        "holds_in": told.count(1),
        "tested_in": len(tested),
        "paired_p": [seed["paired_p"][claim.says] for seed in seeds if claim.is_paired],
        "verdict": "not tested" if not tested else VERDICTS.get(frozenset(told), "mixed"),
        "paper": claim.paper,
    }


# --- the command --------------------------------------------------------------------------------


def run_compare(run_dir: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """These seeds, one after another; writes compare.json and compare.md. Raises UserError for the
    seed that rates were searched for with."""
    if TUNING_SEED in seeds:
        raise UserError(f"--seed {TUNING_SEED} is the one that --tune has used: choose another")
    console = Console()
    found = {seed: run_seed(SeedRuns(run_dir / f"seed-{seed}", seed), console) for seed in seeds}
    result = {
        "command": "stepwiser reproduce " + " ".join(f"--seed {seed}" for seed in found),
        "chosen_factors": CHOSEN,
        "seeds": found,
        "claims": [verdict_on(claim, list(found.values())) for claim in CLAIMS],
    }
    atomic_write(run_dir / "compare.json", json.dumps(result, indent=2) + "\n")
    atomic_write(run_dir / "compare.md", tables(result))
    print(tables(result))
    return result


def tables(result: dict[str, Any]) -> str:
    """Markdown: the claims, every number of every seed, and what they took."""
    seeds = list(result["seeds"].values())
    clipped = [
        ", ".join(f"{100 * seed['clipped_from_above'][name]:.3f}%" for seed in seeds)
        for name in CLIP_PAIR
    ]
    minutes = ", ".join(f"{sum(seed['seconds'].values()) / 60:.0f}" for seed in seeds)
    return "\n".join(
        [
            *claims_table(result["claims"]),
            "",
            "Percent, means over the seeds; the difference with its standard deviation. p: of no",
            "difference in F1 on the same solutions, or in accuracy on the same problems: paired",
            "bootstrap, two-sided, seed by seed. A claim holds in a seed where the difference has",
            "its sign and p, if there is one, is below 0.05, and as a whole where it does in all.",
            "",
            *numbers_table(result["seeds"]),
            "",
            "Percent: balanced accuracy of labels; F1 of judges (and how many solutions are right",
            "of those with an error, of those without); mean reward of the last ten iterations;",
            "accuracy; but for the reward with 95% intervals over solutions or problems. Of a",
            "search: tokens of policy and judge a problem; and those rejected.",
            "",
            f"Tokens clipped from above: {clipped[0]} with clip-higher, {clipped[1]} without.",
            f"Minutes: {minutes}.",
            "",
        ]
    )


def claims_table(claims: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| claim | here | difference | holds | p | the paper's |",
        "|---|---|---|---|---|---|",
    ]
    for claim in claims:
        better, worse = (100 * float(np.mean(claim[key])) for key in ("better", "worse"))
        spread = "" if claim["spread"] is None else f" ± {100 * claim['spread']:.1f}"
        p = ", ".join(f"{p:.2g}" for p in claim["paired_p"])
        verdict = f"{claim['verdict']}: {claim['holds_in']} of {claim['tested_in']}"
        lines.append(
            f"| {claim['claim']} | {better:.1f}, {worse:.1f} | "
            f"{100 * claim['difference']:+.1f}{spread} | "
            f"{verdict} | {p} | {claim['paper']} |"
        )
    return lines


def numbers_table(seeds: dict[int, dict[str, Any]]) -> list[str]:
    heads = " | ".join(f"seed {seed}" for seed in seeds)
    lines = [f"| | {heads} | mean | sd | |", "|---" * (len(seeds) + 4) + "|"]
    found = list(seeds.values())
    for name in found[0]["numbers"]:
        values = np.array([100 * seed["numbers"][name] for seed in found])
        sd = f"{values.std(ddof=1):.1f}" if len(values) > 1 else ""
        cells = " | ".join(
            " ".join([f"{value:.1f}", *interval_of(name, seed)])
            for value, seed in zip(values, found, strict=True)
        )
        lines.append(
            f"| {name} | {cells} | {values.mean():.1f} | {sd} | {details_of(name, found)} |"
        )
    return lines


def interval_of(name: str, seed: dict[str, Any]) -> list[str]:
    if name not in seed["intervals"]:
        return []
    low, high = (100 * end for end in seed["intervals"][name])
    return [f"[{low:.1f}, {high:.1f}]"]


def details_of(name: str, seeds: Sequence[dict[str, Any]]) -> str:
    """What stands behind a number, means over the seeds."""
    kind, row = name.split("/")

    def mean(table: str, key: str) -> float:
        return float(np.mean([seed[table][row][key] for seed in seeds]))

    if kind == "judge":
        error, correct = (100 * mean("scores", f"acc_{side}") for side in ("error", "correct"))
        return f"({error:.1f}, {correct:.1f})"
    if kind == "search":
        policy, judge = mean("tokens", "policy_tokens"), mean("tokens", "judge_tokens")
        return f"({policy:.0f} + {judge:.0f}; {mean('tokens', 'rejected_tokens'):.0f})"
    return ""


def tune(run_dir: Path) -> dict[str, Any]:
    """For every judge, its F1 on the development split at each factor times the first guess, behind
    half of its steps; the best, the earliest of equals, is what `CHOSEN` should hold. Writes
    tuning.json."""
    console = Console()
    runs = SeedRuns(run_dir / "tuning", TUNING_SEED, split="dev", share_of_steps=0.5)
    run_stages(runs, base(runs), console)
    scores: dict[str, dict[str, float]] = {}
    for name, (row, rate) in JUDGES.items():
        scores[name] = {}
        for factor in FACTORS:
            run = f"{name}_x{factor:g}"
            run_stages(runs, row(runs, run, rate * factor), console)
            scores[name][f"{factor:g}"] = score_of(runs, run)["f1"]
    finished = runs.run_dir.glob("*/seconds.json")
    result = {
        "scores": scores,
        "chosen": {name: float(max(of, key=of.__getitem__)) for name, of in scores.items()},
        "seconds": sum(json.loads(file.read_text()) for file in sorted(finished)),
    }
    atomic_write(run_dir / "tuning.json", json.dumps(result, indent=2) + "\n")
    console.print(result)
    return result

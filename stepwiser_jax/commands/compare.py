"""The paper's claims on the embedded arithmetic task: one row beside another, seed by seed.

`compare_rows` says what the rows are. Every judge has the same budget for its learning rate:
`tune` trains it with each of `FACTORS` for half of its steps, with a seed of its own, and takes
its F1 on the solutions of the development split. Run again after a stop, both go on where they
were; seeds may run side by side, and the table of all of them is then made from what is finished.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from stepwiser_jax.commands.compare_rows import (
    CHOSEN,
    FACTORS,
    FEWER_LABELS,
    JUDGES,
    SELECTIONS,
    Side,
    Stage,
    base,
    every_stage,
)
from stepwiser_jax.commands.contrast import contrast_runs
from stepwiser_jax.commands.quickstart import label_quality, timed
from stepwiser_jax.config import STAGE_CONFIGS
from stepwiser_jax.record_files import atomic_write
from stepwiser_jax.settings import validate
from stepwiser_jax.tasks import arithmetic

TUNING_SEED = 1000


# --- one seed -----------------------------------------------------------------------------------


def run_stages(side: Side, stages: Sequence[Stage], console: Console) -> None:
    for name, stage, settings in stages:
        console.print(f"[bold]{side.run_dir.name}/{name}[/bold] ({stage})")
        config = validate(STAGE_CONFIGS[stage], settings(), f"compare {name}")
        module = importlib.import_module(f"stepwiser_jax.stages.{stage}")
        timed(side.run_dir / name, module.run, config)


def f1_of(side: Side, name: str) -> float:
    """Official F1 of a judge's greedy judgments, or of a classifier at its threshold."""
    summary = side.summary(f"{name}_score")
    subsets = summary.get("greedy", summary)["subsets"]
    return subsets[arithmetic.SUBSET]["official"]["f1"]


def clip_share(side: Side, name: str) -> float:
    """Share of tokens whose ratio was clipped from above, the mean over iterations."""
    lines = (side.run_dir / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return float(np.mean([json.loads(line)["clip_fraction_high"] for line in lines]))


def seconds_of(side: Side, stages: Sequence[Stage]) -> float:
    runs = {name for name, _, _ in stages}
    return sum(json.loads((side.run_dir / run / "seconds.json").read_text()) for run in runs)


def run_seed(side: Side, console: Console) -> dict[str, Any]:
    """Every row of one seed; returns its numbers, fractions between 0 and 1, and its seconds."""
    stages = every_stage(side)
    run_stages(side, stages, console)
    search, with_classifier = side.summary("search"), side.summary("search_classifier")
    methods = {
        "plain": search["plain"],
        "greedy": search["greedy"],
        "majority": search["majority"]["8"],
        "best_of": search["best_of"]["mean"]["8"],
        "weighted_majority": search["weighted_majority"]["mean"]["8"],
        "beam": search["beam"],
        "dvts": search["dvts"],
        "chunk_reset": search["chunk_reset"],
        "chunk_reset_classifier": with_classifier["chunk_reset"],
    }
    judges = ("cold_start", *JUDGES, *FEWER_LABELS)
    numbers = {f"judge/{name}": f1_of(side, name) for name in judges}
    for rule, quality in label_quality(side.run_dir).items():
        numbers[f"labels/{rule}"] = quality["balanced_accuracy"]
    for name, row in methods.items():
        numbers[f"search/{name}"] = row["accuracy"]
    numbers["selection/before"] = side.summary("policy_solves")["accuracy"]
    for name in SELECTIONS:
        numbers[f"selection/{name}"] = side.summary(f"selected_{name}_solves")["accuracy"]
    costs = ("policy_tokens", "judge_tokens", "rejected_tokens")
    return {
        "numbers": numbers,
        "paired_p": {claim.says: paired_p(side, claim) for claim in CLAIMS if claim.is_of_judges},
        "tokens": {name: {key: row[key] for key in costs} for name, row in methods.items()},
        "clipped_from_above": {name: clip_share(side, name) for name in ("clip_higher", "clip")},
        "seconds": seconds_of(side, stages),
    }


# --- the claims ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """That one number is above another; `paper`: what the paper has for the two."""

    says: str
    better: str
    worse: str
    paper: str

    @property
    def is_of_judges(self) -> bool:
        return self.better.startswith("judge/") and self.worse.startswith("judge/")


CLAIMS = (
    Claim("relative > absolute labels: judge", "judge/stepwiser", "judge/absolute_labels",
          "7B 61.9, 53.8; 1.5B 34.8, 36.1 (table 5)"),
    Claim("relative > absolute labels: against the truth", "labels/rel_effective", "labels/abs_q",
          "not measured"),
    Claim("chunks > lines", "judge/stepwiser", "judge/lines",
          "1.5B Rel-Ratio 36.2, 31.0 (table 9)"),
    Claim("RL > offline", "judge/stepwiser", "judge/offline", "1.5B 36.2, 23.1 (table 6)"),
    Claim("offline > classifier", "judge/offline", "judge/classifier",
          "1.5B 23.1, 24.1 (table 6)"),
    Claim("RL > classifier", "judge/stepwiser", "judge/classifier",
          "7B 61.9, 39.7; 1.5B 34.8, 29.2 (table 5)"),
    Claim("reasoning > verdicts alone", "judge/stepwiser", "judge/no_reasoning",
          "7B 60.5, 47.9; 1.5B 36.2, 34.3 (table 6)"),
    Claim("balanced > unbalanced prompts", "judge/stepwiser", "judge/unbalanced",
          "7B 61.9, 49.4 (table 10)"),
    Claim("clip-higher > clip, 4 updates", "judge/clip_higher", "judge/clip", "figure 4"),
    Claim("chunk-reset > plain", "search/chunk_reset", "search/plain",
          "1.5B 36.7, 31.2; 7B 63.2, 57.4 (table 7)"),
    Claim("chunk-reset > greedy", "search/chunk_reset", "search/greedy", "not measured"),
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
          "GenPRM 7B 75.2, 60.0 without reasoning"),
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


def paired_p(side: Side, claim: Claim) -> float:
    """Of no difference in F1 on the same solutions (paired bootstrap)."""
    names = (name.removeprefix("judge/") for name in (claim.worse, claim.better))
    runs = (side.run_dir / f"{name}_score" for name in names)
    return contrast_runs(*runs, votes=False)["average"]["difference_p"]


def verdict_on(claim: Claim, seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A claim holds where it does in every seed, fails where it does in none."""
    better = [seed["numbers"][claim.better] for seed in seeds]
    worse = [seed["numbers"][claim.worse] for seed in seeds]
    differences = np.subtract(better, worse)
    holds = int(np.sum(differences > 0))
    verdict = {len(seeds): "holds", 0: "fails"}.get(holds, "mixed")
    if claim.worse == "judge/clip" and not any(s["clipped_from_above"]["clip"] for s in seeds):
        verdict = "not tested"
    return {
        "claim": claim.says,
        "better": better,
        "worse": worse,
        "difference": float(np.mean(differences)),
        "spread": float(np.std(differences, ddof=1)) if len(seeds) > 1 else None,
        "holds_in": holds,
        "paired_p": [seed["paired_p"][claim.says] for seed in seeds if claim.is_of_judges],
        "verdict": verdict,
        "paper": claim.paper,
    }


# --- the command --------------------------------------------------------------------------------


def run_compare(run_dir: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """These seeds, one after another; writes compare.json and compare.md."""
    console = Console()
    found = {seed: run_seed(Side(run_dir / f"seed-{seed}", seed), console) for seed in seeds}
    result = {
        "command": "stepwiser compare " + " ".join(f"--seed {seed}" for seed in seeds),
        "chosen_factors": CHOSEN,
        "seeds": found,
        "claims": [verdict_on(claim, list(found.values())) for claim in CLAIMS],
    }
    atomic_write(run_dir / "compare.json", json.dumps(result, indent=2) + "\n")
    atomic_write(run_dir / "compare.md", tables(result))
    console.print((run_dir / "compare.md").read_text(encoding="utf-8"), markup=False)
    return result


def tables(result: dict[str, Any]) -> str:
    """Markdown, percent: the claims, and every number with its seeds."""
    seeds = list(result["seeds"].values())
    lines = [
        "| claim | here | difference | holds | p of each seed | the paper's |",
        "|---|---|---|---|---|---|",
    ]
    for claim in result["claims"]:
        better, worse = (100 * float(np.mean(claim[side])) for side in ("better", "worse"))
        spread = "" if claim["spread"] is None else f" ± {100 * claim['spread']:.1f}"
        lines.append(
            f"| {claim['claim']} | {better:.1f}, {worse:.1f} | "
            f"{100 * claim['difference']:+.1f}{spread} | {claim['verdict']}: "
            f"{claim['holds_in']} of {len(seeds)} | "
            f"{', '.join(f'{p:.2g}' for p in claim['paired_p'])} | {claim['paper']} |"
        )
    numbers = [f"seed {seed}" for seed in result["seeds"]]
    lines += ["", f"| | {' | '.join(numbers)} | mean | sd |", "|---" * (len(seeds) + 3) + "|"]
    for name in seeds[0]["numbers"]:
        values = np.array([100 * seed["numbers"][name] for seed in seeds])
        sd = f"{values.std(ddof=1):.1f}" if len(values) > 1 else ""
        cells = " | ".join(f"{value:.1f}" for value in values)
        tokens = [seed["tokens"].get(name.removeprefix("search/")) for seed in seeds]
        if name.startswith("search/"):
            policy, judge, rejected = (
                float(np.mean([of_seed[key] for of_seed in tokens]))
                for key in ("policy_tokens", "judge_tokens", "rejected_tokens")
            )
            name += f" ({policy:.0f} + {judge:.0f}, {rejected:.0f} rejected)"
        lines.append(f"| {name} | {cells} | {values.mean():.1f} | {sd} |")
    minutes = ", ".join(f"{seed['seconds'] / 60:.0f}" for seed in seeds)
    clipped = [seed["clipped_from_above"]["clip"] for seed in seeds]
    shares = ", ".join(f"{100 * share:.2f}%" for share in clipped)
    lines += [
        "",
        f"Minutes a seed: {minutes}. Tokens clipped from above without clip-higher: {shares}.",
    ]
    return "\n".join(lines) + "\n"


def tune(run_dir: Path) -> dict[str, Any]:
    """For every judge, its F1 on the development split at each factor times the first guess, behind
    half of its steps; the best, the earliest of equals, is what `CHOSEN` should hold. Writes
    tuning.json."""
    console = Console()
    side = Side(run_dir / "tuning", TUNING_SEED, split="dev", length=0.5)
    run_stages(side, base(side), console)
    scores: dict[str, dict[str, float]] = {}
    for name, (row, rate) in JUDGES.items():
        scores[name] = {}
        for factor in FACTORS:
            run = f"{name}_x{factor:g}"
            run_stages(side, row(side, run, rate * factor), console)
            scores[name][f"{factor:g}"] = f1_of(side, run)
    runs = sorted(side.run_dir.glob("*/seconds.json"))
    result = {
        "scores": scores,
        "chosen": {name: float(max(of, key=of.__getitem__)) for name, of in scores.items()},
        "seconds": sum(json.loads(file.read_text()) for file in runs),
    }
    atomic_write(run_dir / "tuning.json", json.dumps(result, indent=2) + "\n")
    console.print(result)
    return result

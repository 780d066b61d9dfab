"""`stepwiser reproduce`: runs seeds, and writes compare.json and compare.md of finished ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from stepwiser_jax.commands.reproduce.claims import decide
from stepwiser_jax.commands.reproduce.judges import CHOSEN
from stepwiser_jax.commands.reproduce.measure import TUNING_SEED, run_seed
from stepwiser_jax.commands.reproduce.seed_runs import SeedRuns
from stepwiser_jax.errors import UserError
from stepwiser_jax.files import atomic_write
from stepwiser_jax.tasks.arithmetic import MOD_7, MOD_10

DIRECTORIES = ((MOD_10, "seed-{}"), (MOD_7, "seed-{}-mod-7"))
"""Each task, and where its runs of a seed are."""


def reproduce(run_dir: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Runs these seeds one after another, on both tasks, and writes seed-<n>/results.json of each;
    returns what `join` makes of all seeds there.

    Raises UserError for the seed that learning rates were tuned with.
    """
    if TUNING_SEED in seeds:
        raise UserError(f"--seed {TUNING_SEED} is the one that --tune has used: choose another")
    for seed in seeds:
        found = {
            task.name: run_seed(SeedRuns(run_dir / directory.format(seed), seed, task), Console())
            for task, directory in DIRECTORIES
        }
        result = {"seed": seed, "chosen_factors": CHOSEN, "tasks": found}
        atomic_write(run_dir / f"seed-{seed}" / "results.json", json.dumps(result) + "\n")
    return join(run_dir)


def join(run_dir: Path) -> dict[str, Any]:
    """Writes compare.json and compare.md from every seed-<n>/results.json, wherever that was made;
    returns what compare.json holds: all but the items.

    Raises UserError if there is none, or if one was made at other learning rates.
    """
    files = sorted(run_dir.glob("seed-*/results.json"))
    if not files:
        raise UserError(
            f"expected results of seeds in {run_dir}/seed-*/results.json, found none: run "
            "`stepwiser reproduce` with --seed first"
        )
    found = {file: json.loads(file.read_text()) for file in files}
    for file, result in found.items():
        if result["chosen_factors"] != CHOSEN:
            raise UserError(
                f"expected results at the learning rates of this version, found others in {file}: "
                "run that seed again in a new directory"
            )
    seeds = {result["seed"]: result["tasks"] for result in found.values()}
    seeds = dict(sorted(seeds.items()))
    claims = decide(list(seeds.values()))
    without_items = {
        seed: {
            task: {key: table for key, table in of_task.items() if key != "items"}
            for task, of_task in tasks.items()
        }
        for seed, tasks in seeds.items()
    }
    result = {
        "command": "stepwiser reproduce " + " ".join(f"--seed {seed}" for seed in seeds),
        "chosen_factors": CHOSEN,
        "seeds": without_items,
        "claims": claims,
    }
    atomic_write(run_dir / "compare.json", json.dumps(result, indent=2) + "\n")
    atomic_write(run_dir / "compare.md", as_markdown(result))
    print(as_markdown(result))
    return result


def as_markdown(result: dict[str, Any]) -> str:
    """Returns the tables: the claims, and every number of every seed, task after task."""
    seeds = result["seeds"]
    lines = []
    for task in next(iter(seeds.values())):
        found = {seed: tasks[task] for seed, tasks in seeds.items()}
        claims = [claim for claim in result["claims"] if claim["task"] == task]
        lines += [f"## {task}", "", *_claims_table(claims), ""]
        lines += [*_judges_table(found), "", *_labels_table(found), "", *_numbers_table(found), ""]
    minutes = ", ".join(
        f"{sum(sum(of['seconds'].values()) for of in tasks.values()) / 60:.0f}"
        for tasks in seeds.values()
    )
    return "\n".join(
        [
            *lines,
            "Percent, means over the seeds. A difference has its standard deviation over seeds,",
            "and its 95% interval by a bootstrap over seeds and, within each, over items; p of no",
            "difference: by the same bootstrap; by a t-test over seeds; and the larger of the two,",
            f"corrected for {len(result['claims'])} claims (Holm). A claim holds if the difference",
            "is above 0 and the last p below 0.05, and fails if the difference is below 0.",
            "",
            "F1 of a judge is at the threshold on P(Positive) that is best on the development",
            "split (in brackets the accuracy on solutions with an error, and on those without);",
            "greedy F1 is by the verdicts themselves. AUC: first errors against right steps.",
            "Examples: labelled chunks, or kept judgments, of the last training. Labels: balanced",
            "accuracy. Intervals of a seed are over solutions or problems. For a search, in",
            "brackets, per problem: tokens that policy + judge write; those rejected; MFLOP of",
            "both.",
            "",
            f"Minutes: {minutes}.",
            "",
        ]
    )


def _claims_table(claims: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| claim | here | difference | 95% | p | verdict | the paper's |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim in claims:
        better, worse = (100 * float(np.mean(claim[key])) for key in ("better", "worse"))
        spread = "" if claim["spread"] is None else f" ± {100 * claim['spread']:.1f}"
        low, high = (100 * end for end in claim["interval"])
        p = "; ".join(f"{claim[key]:.2g}" for key in ("p", "p_between_seeds", "corrected_p"))
        lines.append(
            f"| {claim['claim']} | {better:.1f}, {worse:.1f} | "
            f"{100 * claim['difference']:+.1f}{spread} | [{low:+.1f}, {high:+.1f}] | {p} | "
            f"{claim['verdict']} | {claim['paper']} |"
        )
    return lines


def _judges_table(seeds: dict[int, dict[str, Any]]) -> list[str]:
    """Returns a row for each judge: its means over the seeds, and F1 of each seed."""
    found = list(seeds.values())
    heads = " | ".join(f"F1, seed {seed}" for seed in seeds)
    lines = [
        "| judge | examples | AUC | F1 | (error, correct) | greedy F1 | (error, correct) | "
        f"{heads} |",
        "|---" * (len(seeds) + 7) + "|",
    ]

    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    for name in found[0]["judges"]:
        details = [seed["judges"][name] for seed in found]
        auc, f1, greedy = (
            f"{100 * mean([seed['numbers'][f'{kind}/{name}'] for seed in found]):.1f}"
            for kind in ("auc", "judge", "greedy")
        )
        at_threshold, by_verdict = (
            ", ".join(
                f"{100 * mean([of[f'{prefix}acc_{side}'] for of in details]):.1f}"
                for side in ("error", "correct")
            )
            for prefix in ("", "greedy_")
        )
        examples = mean([of["examples"] for of in details])
        cells = " | ".join(_with_interval(f"judge/{name}", seed) for seed in found)
        lines.append(
            f"| {name} | {examples:.0f} | {auc} | {f1} | ({at_threshold}) | {greedy} | "
            f"({by_verdict}) | {cells} |"
        )
    return lines


def _labels_table(seeds: dict[int, dict[str, Any]]) -> list[str]:
    """Returns a row for each set of labels: how many, the share of positive ones, and the examples
    for a judge, seed by seed."""
    heads = " | ".join(f"seed {seed}" for seed in seeds)
    lines = [f"| labels: positive; judge examples | {heads} |", "|---" * (len(seeds) + 1) + "|"]
    found = list(seeds.values())
    for name in found[0]["labels"]:
        cells = " | ".join(
            f"{of['labels']}: {100 * of['positive_share']:.1f}%; {of['judge_examples']}"
            for of in (seed["labels"][name] for seed in found)
        )
        lines.append(f"| {name} | {cells} |")
    return lines


def _numbers_table(seeds: dict[int, dict[str, Any]]) -> list[str]:
    """Returns a row for every number but those of judges."""
    heads = " | ".join(f"seed {seed}" for seed in seeds)
    lines = [f"| | {heads} | mean | sd | |", "|---" * (len(seeds) + 4) + "|"]
    found = list(seeds.values())
    for name in found[0]["numbers"]:
        if name.split("/")[0] in ("judge", "greedy", "auc"):
            continue
        values = np.array([100 * seed["numbers"][name] for seed in found])
        sd = f"{values.std(ddof=1):.1f}" if len(values) > 1 else ""
        cells = " | ".join(_with_interval(name, seed) for seed in found)
        lines.append(f"| {name} | {cells} | {values.mean():.1f} | {sd} | {_costs(name, found)} |")
    return lines


def _with_interval(name: str, seed: dict[str, Any]) -> str:
    low, high = (100 * end for end in seed["intervals"][name])
    return f"{100 * seed['numbers'][name]:.1f} [{low:.1f}, {high:.1f}]"


def _costs(name: str, seeds: Sequence[dict[str, Any]]) -> str:
    """Returns the tokens and FLOPs of a search, means over the seeds."""
    kind, method = name.split("/")
    if kind != "search":
        return ""
    policy, judge, rejected, flops = (
        float(np.mean([seed["costs"][method][key] for seed in seeds]))
        for key in ("policy_tokens", "judge_tokens", "rejected_tokens", "flops")
    )
    return f"({policy:.0f} + {judge:.0f}; {rejected:.0f}; {flops / 1e6:.0f})"

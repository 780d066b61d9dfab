"""`stepwiser reproduce`: runs all seeds, and writes compare.json and compare.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from stepwiser_jax.commands.reproduce.claims import CLAIMS, CLIP_PAIR, decide
from stepwiser_jax.commands.reproduce.experiments import CHOSEN, SeedRuns
from stepwiser_jax.commands.reproduce.measure import TUNING_SEED, run_seed
from stepwiser_jax.errors import UserError
from stepwiser_jax.files import atomic_write


def reproduce(run_dir: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Runs these seeds one after another; returns what compare.json holds.

    Raises UserError for the seed that learning rates were tuned with.
    """
    if TUNING_SEED in seeds:
        raise UserError(f"--seed {TUNING_SEED} is the one that --tune has used: choose another")
    console = Console()
    found = {seed: run_seed(SeedRuns(run_dir / f"seed-{seed}", seed), console) for seed in seeds}
    result = {
        "command": "stepwiser reproduce " + " ".join(f"--seed {seed}" for seed in found),
        "chosen_factors": CHOSEN,
        "seeds": found,
        "claims": [decide(claim, list(found.values())) for claim in CLAIMS],
    }
    atomic_write(run_dir / "compare.json", json.dumps(result, indent=2) + "\n")
    atomic_write(run_dir / "compare.md", as_markdown(result))
    print(as_markdown(result))
    return result


def as_markdown(result: dict[str, Any]) -> str:
    """Returns the tables: the claims, and every number of every seed."""
    seeds = list(result["seeds"].values())
    clipped = [
        ", ".join(f"{100 * seed['clipped_from_above'][name]:.3f}%" for seed in seeds)
        for name in CLIP_PAIR
    ]
    minutes = ", ".join(f"{sum(seed['seconds'].values()) / 60:.0f}" for seed in seeds)
    return "\n".join(
        [
            *_claims_table(result["claims"]),
            "",
            "Percent, means over the seeds; the difference with its standard deviation. p: of no",
            "difference in F1 on the same solutions, or in accuracy on the same problems: paired",
            "bootstrap, two-sided, seed by seed. A claim holds in a seed if the difference has its",
            "sign and p, if there is one, is below 0.05; it holds as a whole if it does in all.",
            "",
            *_numbers_table(result["seeds"]),
            "",
            "Percent: balanced accuracy of labels; F1 of judges (in brackets the accuracy on",
            "solutions with an error, and on those without); mean reward of the last ten",
            "iterations; accuracy. 95% intervals are over solutions or problems.",
            "For a search, in brackets: tokens per problem of policy + judge; those rejected.",
            "",
            f"Tokens clipped from above: {clipped[0]} with clip-higher, {clipped[1]} without.",
            f"Minutes: {minutes}.",
            "",
        ]
    )


def _claims_table(claims: Sequence[dict[str, Any]]) -> list[str]:
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


def _numbers_table(seeds: dict[int, dict[str, Any]]) -> list[str]:
    heads = " | ".join(f"seed {seed}" for seed in seeds)
    lines = [f"| | {heads} | mean | sd | |", "|---" * (len(seeds) + 4) + "|"]
    found = list(seeds.values())
    for name in found[0]["numbers"]:
        values = np.array([100 * seed["numbers"][name] for seed in found])
        sd = f"{values.std(ddof=1):.1f}" if len(values) > 1 else ""
        cells = " | ".join(
            f"{value:.1f}{_interval(name, seed)}" for value, seed in zip(values, found, strict=True)
        )
        lines.append(f"| {name} | {cells} | {values.mean():.1f} | {sd} | {_details(name, found)} |")
    return lines


def _interval(name: str, seed: dict[str, Any]) -> str:
    if name not in seed["intervals"]:
        return ""
    low, high = (100 * end for end in seed["intervals"][name])
    return f" [{low:.1f}, {high:.1f}]"


def _details(name: str, seeds: Sequence[dict[str, Any]]) -> str:
    """Returns what the last column says beside a number, means over the seeds."""
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

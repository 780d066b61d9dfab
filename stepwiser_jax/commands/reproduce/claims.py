"""The claims that `stepwiser reproduce` tests, and the one rule by which seeds decide about them.

The difference of a claim is the mean over seeds. It has two p-values of no difference: by a
hierarchical bootstrap, over seeds and over the items within each, and by a t-test over seeds
(`evaluation.statistics`). The larger one counts, corrected for the number of claims (Holm), those
of both tasks together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepwiser_jax.commands.reproduce.items import statistic_of
from stepwiser_jax.evaluation.statistics import (
    Difference,
    between_seeds,
    hierarchical_bootstrap,
    holm,
)


@dataclass(frozen=True)
class Claim:
    """One number is above another.

    Attributes:
        says: The claim.
        better: The name of the number that is said to be above the other, such as
            `judge/stepwiser`.
        worse: That of the other. Both have the same items.
        paper: The paper's own values of the two.
    """

    says: str
    better: str
    worse: str
    paper: str = "not measured"


CLAIMS = (
    Claim("GRPO > its start: AUC", "auc/stepwiser", "auc/cold_start"),
    Claim("GRPO > its start", "judge/stepwiser", "judge/cold_start"),
    Claim("labels > the same labels shuffled: AUC", "auc/stepwiser", "auc/shuffled_labels"),
    Claim("labels > the same labels shuffled", "judge/stepwiser", "judge/shuffled_labels"),
    Claim("shuffled labels > the start: AUC", "auc/shuffled_labels", "auc/cold_start"),
    Claim("relative > absolute labels: judge", "judge/stepwiser", "judge/absolute_labels",
          "7B 61.9, 53.8; 1.5B 34.8, 36.1 (table 5)"),
    Claim("relative > as many absolute labels: judge", "judge/as_many_as_absolute",
          "judge/absolute_labels"),
    Claim("relative > as many absolute labels: AUC", "auc/as_many_as_absolute",
          "auc/absolute_labels"),
    Claim("relative > absolute, labels as printed: judge", "judge/printed_labels",
          "judge/printed_absolute_labels", "7B 61.9, 53.8; 1.5B 34.8, 36.1 (table 5)"),
    Claim("dead prefixes dropped, floor 0.2 > labels as printed: judge", "judge/stepwiser",
          "judge/printed_labels"),
    Claim("relative > absolute labels: against the truth", "labels/rel_effective", "labels/abs_q"),
    Claim("RL > offline", "judge/stepwiser", "judge/offline", "1.5B 36.2, 23.1 (table 6)"),
    Claim("offline > classifier", "judge/offline", "judge/classifier",
          "1.5B 23.1, 24.1: fails there (table 6)"),
    Claim("RL > classifier", "judge/stepwiser", "judge/classifier",
          "7B 61.9, 39.7; 1.5B 34.8, 29.2 (table 5)"),
    Claim("RL > classifier: AUC", "auc/stepwiser", "auc/classifier"),
    Claim("RL > classifier from the policy", "judge/stepwiser", "judge/classifier_policy"),
    Claim("RL > classifier with the demonstrations", "judge/stepwiser",
          "judge/classifier_demonstrations"),
    Claim("RL > classifier with the demonstrations: AUC", "auc/stepwiser",
          "auc/classifier_demonstrations"),
    Claim("reasoning > verdicts alone", "judge/stepwiser", "judge/no_reasoning",
          "7B 60.5, 47.9; 1.5B 36.2, 34.3 (table 6)"),
    Claim("reasoning > verdicts alone: AUC", "auc/stepwiser", "auc/no_reasoning"),
    Claim("balanced > unbalanced prompts", "judge/stepwiser", "judge/unbalanced",
          "7B 61.9, 49.4 (table 10)"),
    Claim("chunk-reset > plain", "search/chunk_reset", "search/plain",
          "1.5B 36.7, 31.2; 7B 63.2, 57.4 (table 7)"),
    Claim("chunk-reset > greedy, which costs less", "search/chunk_reset", "search/greedy"),
    Claim("chunk-reset > the largest majority at no more FLOPs", "search/chunk_reset",
          "search/majority_at_equal_flops"),
    Claim("chunk-reset: likeliest chunk first > sampled, as in the paper", "search/chunk_reset",
          "search/chunk_reset_sampled"),
    Claim("chunk-reset: judge > classifier", "search/chunk_reset",
          "search/chunk_reset_classifier", "1.5B 36.7, 33.5; 7B 63.2, 61.5 (table 7)"),
    Claim("selection: judge > outcome", "selection/stepwiser", "selection/outcome",
          "7B 63.0, 60.9 (table 8)"),
    Claim("selection: judge > classifier", "selection/stepwiser", "selection/classifier",
          "7B 63.0, 61.7 (table 8)"),
    Claim("selection: judge without answers > random", "selection/stepwiser_alone",
          "selection/random"),
    Claim("own rationales in GenPRM's form > classifier", "judge/genprm_form", "judge/classifier",
          "GenPRM 7B 75.2, Qwen2.5-Math-PRM-7B 73.5"),
    Claim("own rationales in ThinkPRM's form > classifier", "judge/thinkprm_form",
          "judge/classifier", "another metric"),
)  # fmt: skip

LEVEL = 0.05
"""A claim holds, or fails, if its corrected p-value is below this."""


def decide(seeds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what the seeds say about every claim, task after task.

    A claim `holds` if the difference is above 0 and its corrected p below `LEVEL`, and `fails` if
    it is below 0; else the two are `not told apart`. A task has the claims whose numbers it has.

    Args:
        seeds: For each seed the results of `measure.run_seed`, by task.
    """
    decisions = []
    for task in seeds[0]:
        found = [seed[task] for seed in seeds]
        for claim in CLAIMS:
            if not {claim.better, claim.worse} <= set(found[0]["items"]):
                continue
            difference = difference_of(claim, found)
            better, worse = (
                [seed["numbers"][name] for seed in found] for name in (claim.better, claim.worse)
            )
            of_seeds = np.subtract(better, worse)
            spread = np.std(of_seeds, ddof=1) if len(seeds) > 1 else None
            decisions.append(
                {
                    "task": task,
                    "claim": claim.says,
                    "better": better,
                    "worse": worse,
                    "difference": difference.value,
                    "interval": [difference.low, difference.high],
                    "spread": None if spread is None else float(spread),
                    "p": difference.p,
                    "p_between_seeds": between_seeds(of_seeds.tolist()),
                    "paper": claim.paper,
                }
            )
    larger = [max(d["p"], d["p_between_seeds"]) for d in decisions]
    for decision, p in zip(decisions, holm(larger), strict=True):
        decision["corrected_p"] = p
        decision["verdict"] = verdict(decision["difference"], p)
    return decisions


def difference_of(claim: Claim, seeds: Sequence[dict[str, Any]]) -> Difference:
    """Returns the mean difference between a claim's two numbers, on the same items of each seed."""
    differences, sizes = [], []
    for seed in seeds:
        better, worse = seed["items"][claim.better], seed["items"][claim.worse]
        assert len(better) == len(worse), f"{claim.says}: both numbers have the same items"
        of_better, of_worse = statistic_of(claim.better, better), statistic_of(claim.worse, worse)
        differences.append(lambda draws, a=of_worse, b=of_better: b(draws) - a(draws))
        sizes.append(len(better))
    return hierarchical_bootstrap(differences, sizes, seed=0)


def verdict(difference: float, p: float) -> str:
    """Returns what a difference and its corrected p-value say of a claim."""
    if p >= LEVEL:
        return "not told apart"
    return "holds" if difference > 0 else "fails"

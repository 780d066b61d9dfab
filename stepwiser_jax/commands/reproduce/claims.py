"""The claims of the paper that `stepwiser reproduce` tests, and how seeds decide about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Claim:
    """One number is above another.

    `better` and `worse` name numbers of a seed, such as `judge/stepwiser`. `paper` holds the
    paper's own values of the two.
    """

    says: str
    better: str
    worse: str
    paper: str

    @property
    def is_paired(self) -> bool:
        """Whether both numbers come from the same solutions or problems."""
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

VERDICTS = {frozenset({1}): "holds", frozenset({-1}): "fails", frozenset({0}): "not told apart"}


def direction(claim: Claim, seed: dict[str, Any]) -> int:
    """Returns 1 if the claim holds in this seed, -1 if its contrary does.

    Returns 0 if chance may have made the difference: if its paired p is 0.05 or more.
    """
    if seed["paired_p"].get(claim.says, 0.0) >= 0.05:
        return 0
    return int(np.sign(seed["numbers"][claim.better] - seed["numbers"][claim.worse]))


def decide(claim: Claim, seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns what the seeds say about a claim.

    A claim holds if it does in every seed, and fails if its contrary does. A seed tests a claim
    about clip-higher only if the clip was reached more often on one side than on the other.
    """
    is_of_clip = claim.better.endswith("/clip_higher")
    tested = [s for s in seeds if not is_of_clip or len(set(s["clipped_from_above"].values())) > 1]
    better = [seed["numbers"][claim.better] for seed in seeds]
    worse = [seed["numbers"][claim.worse] for seed in seeds]
    directions = [direction(claim, seed) for seed in tested]
    differences = np.subtract(better, worse)
    return {
        "claim": claim.says,
        "better": better,
        "worse": worse,
        "difference": float(np.mean(differences)),
        "spread": float(np.std(differences, ddof=1)) if len(seeds) > 1 else None,
        "holds_in": directions.count(1),
        "tested_in": len(tested),
        "paired_p": [seed["paired_p"][claim.says] for seed in seeds if claim.is_paired],
        "verdict": "not tested" if not tested else VERDICTS.get(frozenset(directions), "mixed"),
        "paper": claim.paper,
    }

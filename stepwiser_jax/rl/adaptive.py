"""Decides when a chunk's label is known, mostly before all M rollouts of the prefixes around it.

If c of the first n rollouts are right, the final count of right ones among M has a Beta-binomial
distribution (with Jeffreys prior):

    final count ~ c + BetaBinomial(M - n, c + 1/2, n - c + 1/2)

The rule gives a label to each pair of final counts, that of the prefix with the chunk and that of
the prefix before it. So each label has a probability. Confidence 1 is stricter than a probability
that rounds to 1: no way to finish the rollouts may give another label. So the labels are exactly
those of M rollouts.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from stepwiser_jax.rl.labels import DeadPrefix, Label, Rule, label_chunks

LABELS: tuple[Label, ...] = (False, True, None)


class LabelTable:
    """The labels of a rule for all final counts 0..M, and their probabilities by partial counts.

    A partial count is (right, sampled), with sampled <= M.
    """

    def __init__(self, rule: Rule, num_rollouts: int, dead_prefix: DeadPrefix = "negative"):
        M = self.num_rollouts = num_rollouts
        counts = range(M + 1)

        def label(v: int, q: int) -> Label:
            return label_chunks([v / M, q / M], rule, dead_prefix=dead_prefix)[0]

        self._index_VQ = np.array([[LABELS.index(label(v, q)) for q in counts] for v in counts])
        self._probabilities = functools.lru_cache(None)(self._label_probabilities)

    def likeliest(self, q: tuple[int, int], v: tuple[int, int]) -> Label:
        """Returns the label of the chunk between partial counts v (before it) and q (with it)."""
        probabilities = self._probabilities(q, v)
        return LABELS[probabilities.index(max(probabilities))]

    def is_known(self, q: tuple[int, int], v: tuple[int, int], confidence: float) -> bool:
        """Returns whether one label has at least this probability, or at confidence 1, whether no
        other one is possible."""
        probabilities = self._probabilities(q, v)
        if confidence == 1:
            return sum(p > 0 for p in probabilities) == 1
        return max(probabilities) >= confidence

    def _label_probabilities(self, q: tuple[int, int], v: tuple[int, int]) -> tuple[float, ...]:
        joint_VQ = np.outer(
            final_counts(*v, self.num_rollouts), final_counts(*q, self.num_rollouts)
        )
        return tuple(float(joint_VQ[self._index_VQ == i].sum()) for i in range(len(LABELS)))


@functools.lru_cache(None)
def final_counts(right: int, sampled: int, num_rollouts: int) -> np.ndarray:
    """Returns the probabilities (M + 1,) of the number of right rollouts among M, given the first
    ones."""
    left, a, b = num_rollouts - sampled, right + 0.5, sampled - right + 0.5

    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    probabilities = np.zeros(num_rollouts + 1)
    for k in range(left + 1):
        log_p = math.log(math.comb(left, k)) + log_beta(a + k, b + left - k) - log_beta(a, b)
        probabilities[right + k] = math.exp(log_p)
    return probabilities

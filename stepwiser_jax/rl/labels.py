"""Prefix values -> chunk labels (StepWiser eqs 1-3; GenPRM's relative progress).

`values` = [Q_0 .. Q_J] of a trajectory with J chunks: Q_0 of the bare problem, Q_j with j chunks,
Q_J the outcome. Chunk j (from 0) is judged by v = Q_j before it and q = Q_{j+1} with it.

Decided where the paper is silent or ambiguous:

1. q = 0 is negative under every rule.
2. v = 0: nothing that follows can be told apart by Monte Carlo values, so the chunk teaches nothing
   (None) under every rule, whatever its own q: a ratio has no denominator, and what looks like a
   recovery is mostly luck. This holds for Q_0 = 0 too. (GenPRM calls what follows a value of 0
   wrong. Its critiques end with the first wrong step, so that it makes no difference to them.)
3. Rel-Effective is positive iff q + alpha * A > 0, negative iff <= 0: the printed "= 0" cannot be
   meant, since the value can be negative.
4. Rel-Ratio is positive iff q / v > gamma, relative progress iff q / v >= epsilon.
5. The last chunk is labelled like any other, with q = the outcome.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np


class Labelled(Protocol):
    @property
    def is_positive(self) -> bool: ...


L = TypeVar("L", bound=Labelled)


def abs_q(q: float, v: float) -> bool:
    """StepWiser eq 1, and Math-Shepherd's hard label: some continuation is right."""
    return q > 0


def rel_effective(q: float, v: float, *, alpha: float = 0.8, n: float = 4) -> bool:
    """StepWiser eq 2: q + alpha * (Q^mu_i - Q^mu_{i-1}) > 0 with mu = best of n, whose value is
    Q^mu = 1 - (1 - Q)^n."""
    return q > 0 and q + alpha * ((1 - v) ** n - (1 - q) ** n) > 0


def rel_ratio(q: float, v: float, *, gamma: float = 0.7) -> bool:
    """StepWiser eq 3: q / v > gamma."""
    return q > gamma * v


def relative_progress(q: float, v: float, *, epsilon: float = 0.8) -> bool:
    """GenPRM's relative progress estimation: q / v >= epsilon (arXiv 2504.00891)."""
    return q > 0 and q >= epsilon * v


LABEL_RULES: dict[str, Callable[..., bool]] = {
    "abs_q": abs_q,
    "rel_effective": rel_effective,
    "rel_ratio": rel_ratio,
    "relative_progress": relative_progress,
}


def label_chunks(values: Sequence[float], rule: str, **params: float) -> list[bool | None]:
    """One entry per chunk: positive, negative, or None: teaches nothing, to be dropped.

    Raises ValueError for an unknown rule, values outside of [0, 1], or fewer than two values.
    """
    if rule not in LABEL_RULES:
        raise ValueError(f"expected a rule of {sorted(LABEL_RULES)}, found {rule!r}")
    if len(values) < 2 or not all(0 <= value <= 1 for value in values):
        raise ValueError(f"expected at least two values in [0, 1], found {list(values)}")
    positive = LABEL_RULES[rule]
    return [None if v == 0 else positive(q, v, **params) for v, q in itertools.pairwise(values)]


def balanced(examples: Sequence[L], seed: int) -> list[L]:
    """Down-sample the larger class over the whole set (paper 4.1), in the order given."""
    of_class = {
        positive: [i for i, example in enumerate(examples) if example.is_positive is positive]
        for positive in (True, False)
    }
    size = min(map(len, of_class.values()))
    rng = np.random.default_rng(seed)
    chosen = np.concatenate(
        [rng.choice(np.array(rows, int), size, replace=False) for rows in of_class.values()]
    )
    return [examples[i] for i in sorted(chosen)]

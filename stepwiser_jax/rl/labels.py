"""Turns prefix values into chunk labels (StepWiser eqs 1-3; GenPRM's relative progress).

A trajectory with J chunks has the values [Q_0 .. Q_J]: Q_0 is that of the bare problem, Q_j that of
the first j chunks, and Q_J is the outcome. Chunk j (from 0) is judged by v = Q_j before it and
q = Q_{j+1} with it.

The paper is silent or ambiguous on these points:

1. q = 0 is negative under each of these rules.
2. A chunk after a prefix worth 0 (v = 0, Q_0 included) is labelled like any other: eq 1 does not
   ask for v. A ratio with v = 0 counts as infinite if q > 0, and 0 / 0 is negative. So with v = 0
   every rule here is eq 1: positive iff q > 0. The paper does not say that it keeps these chunks,
   but the class shares that it prints are out of reach without them: by eq 1 a wrong solution
   would hardly have more than one negative. `dead_prefix: drop` gives them no label (None). That
   is ours, and the quickstart's: Monte Carlo values cannot tell good chunks from bad ones there,
   and right chunks after an error are called negative.
3. Rel-Effective is positive iff q + alpha * A > 0, negative iff <= 0. The printed "= 0" cannot be
   meant, since the value can be negative.
4. Rel-Ratio is positive iff q / v > gamma, relative progress iff q / v >= epsilon.
5. The last chunk is labelled like any other; its q is the outcome.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from stepwiser_jax import plugins

Label = bool | None
"""Positive, negative, or None: the chunk teaches nothing."""

Rule = Callable[[float, float], Label]
"""(q, v) -> label; v is the value before the chunk, and is never 0 under `dead_prefix: drop`."""

TOLERANCE = 1e-9
"""A difference of values and their multiples that counts as none. Shares of M rollouts and decimal
fractions are rounded in floats, so that 14/30 > 0.7 * 20/30 is true of them; real differences are
larger: at least 1 / (10 M) with a ratio of one decimal."""

DeadPrefix = Literal["negative", "drop"]
"""What becomes of a chunk after a prefix worth 0: the rule labels it, or it teaches nothing."""


def abs_q(q: float, v: float) -> bool:
    """Returns whether some continuation is right (StepWiser eq 1; Math-Shepherd's hard label)."""
    return q > 0


def rel_effective(q: float, v: float, *, alpha: float = 0.8, n: float = 4) -> bool:
    """Returns whether q + alpha * (Q^mu_i - Q^mu_{i-1}) > 0 (StepWiser eq 2). Here mu is best of n,
    whose value is Q^mu = 1 - (1 - Q)^n."""
    return q > 0 and q + alpha * ((1 - v) ** n - (1 - q) ** n) > 0


def rel_ratio(q: float, v: float, *, gamma: float = 0.7) -> bool:
    """Returns whether q / v > gamma (StepWiser eq 3)."""
    return q - gamma * v > TOLERANCE


def relative_progress(q: float, v: float, *, epsilon: float = 0.8) -> bool:
    """Returns whether q / v >= epsilon (GenPRM's relative progress, arXiv 2504.00891)."""
    return q > 0 and q - epsilon * v >= -TOLERANCE


LABEL_RULES: dict[str, Callable[..., Label]] = {
    "abs_q": abs_q,
    "rel_effective": rel_effective,
    "rel_ratio": rel_ratio,
    "relative_progress": relative_progress,
}


def load_rule(name: str, arguments: Mapping[str, float] | None = None) -> Rule:
    """Returns a rule of `LABEL_RULES`, or a user's own as `module:function`, with arguments bound.
    Raises UserError if there is none, or if it does not take the arguments."""
    return plugins.load(name, "a label rule", LABEL_RULES, arguments)


def label_chunks(
    values: Sequence[float],
    rule: str | Rule,
    *,
    dead_prefix: DeadPrefix = "negative",
    **arguments: float,
) -> list[Label]:
    """Labels the chunks of a solution.

    >>> label_chunks([0.5, 0.5, 0.06], "rel_effective", alpha=0.8)
    [True, False]
    >>> label_chunks([0.5, 0.75, 0.5], lambda q, v: q >= v)  # a rule of one's own
    [True, False]

    Args:
        values: [Q_0 .. Q_J], from 0 to 1.
        rule: A name as for `load_rule`, or a function of (q, v).
        dead_prefix: What becomes of chunks after a prefix worth 0. `negative` labels them by the
            rule, and our own rules call them negative unless q > 0. `drop` gives them None, and
            does not call the rule.
        **arguments: Arguments of a rule given by name, such as `alpha=0.4`. The defaults are those
            of the configs.

    Returns:
        A label for each of the J chunks.

    Raises:
        ValueError: There is no such rule or `dead_prefix`, a value is outside of [0, 1], or there
            are fewer than two values.
    """
    if isinstance(rule, str):
        rule = load_rule(rule, arguments)
    if len(values) < 2 or not all(0 <= value <= 1 for value in values):
        raise ValueError(f"expected at least two values in [0, 1], found {list(values)}")
    if dead_prefix not in get_args(DeadPrefix):
        raise ValueError(f"expected dead_prefix negative or drop, found {dead_prefix!r}")
    drops = dead_prefix == "drop"
    labels = [None if drops and v == 0 else rule(q, v) for v, q in itertools.pairwise(values)]
    return [None if label is None else bool(label) for label in labels]

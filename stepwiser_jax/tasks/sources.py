"""The data that comes with the package, by the short names that configs use.

A config may name a user's function instead, as `module:function` (docs/extending.md):

    problems     (*, split, limit, seed) -> iterable of Problem records or of rows (dicts)
    examples     (*, count, seed, style) -> list of SftExample or Dialogue records
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from stepwiser_jax.errors import UserError
from stepwiser_jax.records import Dialogue, Problem, ProcessBenchItem, SftExample
from stepwiser_jax.tasks import arithmetic
from stepwiser_jax.tasks import arithmetic_demonstrations as demonstrations
from stepwiser_jax.text.prompts import PromptStyle

Examples = list[SftExample] | list[Dialogue]


def _demonstrate(
    make: Callable[..., Examples],
    *,
    count: int | None,
    seed: int,
    style: PromptStyle,
    styled: bool = False,
) -> Examples:
    """Returns demonstrations of `count` problems. Raises UserError without a count."""
    if count is None:
        raise UserError("examples.limit must say how many examples of the task to generate")
    problems = arithmetic.generate_problems(count, seed, "train")
    return make(problems, seed, style) if styled else make(problems, seed)


PROBLEMS: dict[str, Callable[..., Iterable[Problem | dict[str, Any]]]] = {
    "arithmetic": arithmetic.problems,
}
EXAMPLES: dict[str, Callable[..., Examples]] = {
    f"arithmetic-{name}": functools.partial(_demonstrate, make, styled=styled)
    for name, make, styled in (
        ("policy", demonstrations.policy_demonstrations, False),
        ("untagged", demonstrations.untagged_demonstrations, False),
        ("segmenter", demonstrations.segmenter_demonstrations, False),
        ("judge", demonstrations.judge_demonstrations, False),
        ("verdicts", demonstrations.verdict_demonstrations, False),
        ("genprm", demonstrations.genprm_demonstrations, True),
        ("thinkprm", demonstrations.thinkprm_demonstrations, True),
    )
}
MODELS: dict[str, Callable[[str | Path], None]] = {"arithmetic": arithmetic.write_model}
"""Functions that write the config.json and tokenizer of a model that gets fresh weights."""

TRUTH: dict[str, Callable[..., ProcessBenchItem]] = {
    arithmetic.SUBSET: arithmetic.processbench_item,
}
"""Tasks that know which chunks are correct, by the `source` of their problems."""


def is_function(source: str, known: Iterable[str] = ()) -> bool:
    """Returns whether a config's `source` names a function, not a file, run or hub id."""
    return source in known or re.fullmatch(r"[\w.]+:\w+", source) is not None

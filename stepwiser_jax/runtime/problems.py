"""The `problems` setting -> Problem records: a data set, or the embedded task's generator."""

from __future__ import annotations

from stepwiser_jax.config import Problems
from stepwiser_jax.records import Problem, UserError
from stepwiser_jax.tasks import arithmetic
from stepwiser_jax.text.datasets import load_problems


def read_problems(problems: Problems) -> list[Problem]:
    """Raises UserError for an empty set, or a problem without an answer."""
    if problems.source != "arithmetic":
        return load_problems(
            problems.source, split=problems.split, subset=problems.subset, limit=problems.limit
        )
    if problems.limit is None or problems.split is None:
        raise UserError(
            "problems.limit and problems.split must say how many problems of which split to "
            "generate when problems.source is 'arithmetic'"
        )
    return arithmetic.generate_problems(problems.limit, problems.seed, problems.split)

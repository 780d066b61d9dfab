"""The `problems` setting -> Problem records: a data set, or the embedded task's generator."""

from __future__ import annotations

from collections import Counter

from stepwiser_jax.config import Problems
from stepwiser_jax.records import Problem, UserError
from stepwiser_jax.tasks import arithmetic
from stepwiser_jax.text.contamination import drop_held_out, held_out_questions
from stepwiser_jax.text.datasets import load_problems


def read_problems(problems: Problems, dropped: Counter[str] | None = None) -> list[Problem]:
    """What is left out is counted in `dropped`. Raises UserError for an empty set, and for a
    malformed row unless those are left out."""
    if problems.source != "arithmetic":
        found = load_problems(
            problems.source,
            split=problems.split,
            subset=problems.subset,
            limit=problems.limit,
            on_malformed=problems.on_malformed,
            dropped=dropped,
        )
    elif problems.limit is None or problems.split is None:
        raise UserError(
            "problems.limit and problems.split must say how many problems of which split to "
            "generate when problems.source is 'arithmetic'"
        )
    else:
        found = arithmetic.generate_problems(problems.limit, problems.seed, problems.split)
    return drop_held_out(found, held_out_questions(problems.exclude), dropped)

"""The problems and models that come with the package, by the short names that configs use.

A config may name a user's source of problems instead, as `module:function` (docs/extending.md):

    (*, split, limit, seed) -> iterable of Problem records or of rows (dicts)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from stepwiser_jax.records import Problem, ProcessBenchItem
from stepwiser_jax.tasks import arithmetic

PROBLEMS: dict[str, Callable[..., Iterable[Problem | dict[str, Any]]]] = {
    task.name: functools.partial(arithmetic.problems, task=task) for task in arithmetic.TASKS
}
MODELS: dict[str, Callable[[str | Path], None]] = {"arithmetic": arithmetic.write_model}
"""Functions that write the config.json and tokenizer of a model that gets fresh weights."""

TRUTH: dict[str, Callable[..., ProcessBenchItem]] = {
    task.name: arithmetic.processbench_item for task in arithmetic.TASKS
}
"""Tasks that know which chunks are correct, by the `source` of their problems."""


def is_function(source: str, known: Iterable[str] = ()) -> bool:
    """Returns whether a config's `source` names a function, not a file, run or hub id."""
    return source in known or re.fullmatch(r"[\w.]+:\w+", source) is not None

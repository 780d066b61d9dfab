"""Sends the metrics of a training to an experiment tracker as well, if STEPWISER_TRACKER names one.

    STEPWISER_TRACKER=wandb stepwiser train-judge ...      or trackio, swanlab, a module of yours

That is any module with wandb's `init`, `log` and `finish`. It is a variable and no setting, since
it changes nothing of a run. Keys and addresses are the tracker's own variables, such as
WANDB_API_KEY. A tracker that fails is told of once, and the run goes on without it.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stepwiser_jax.errors import UserError

VARIABLE = "STEPWISER_TRACKER"

PROJECT = "stepwiser"


class Tracker:
    """What a module of `init`, `log` and `finish` gets of one run."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]):
        """Begins the run there, or goes on with it, if the variable names a module.

        Raises:
            UserError: There is no such module, or it lacks a function.
        """
        self._module: Any = None
        name = os.environ.get(VARIABLE, "")
        if not name:
            return
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"{VARIABLE}: expected a module that can be imported, found {name} ({error}): "
                f"install it, or unset {VARIABLE}"
            ) from None
        if missing := [each for each in ("init", "log", "finish") if not hasattr(module, each)]:
            raise UserError(
                f"{VARIABLE}: expected a module with init, log and finish, found {name} without "
                f"{', '.join(missing)}"
            )
        self._module = module
        path = str(run_dir.resolve())
        offered = {
            "project": PROJECT,
            "name": run_dir.name,
            "config": dict(settings),
            # The same directory is the same run, after a restart too.
            "id": hashlib.sha256(path.encode()).hexdigest()[:16],
            "resume": "allow",
            "dir": path,
        }
        taken = inspect.signature(module.init).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        self._call(module.init, **{k: x for k, x in offered.items() if takes_all or k in taken})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._module is not None:
            self._call(self._module.log, dict(values), step=step)

    def finish(self) -> None:
        if self._module is not None:
            self._call(self._module.finish)

    def _call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        try:
            function(*arguments, **named)
        except Exception as error:  # a training is worth more than its curves
            print(
                f"{self._module.__name__} fails ({type(error).__name__}: {error}): the run goes on "
                "without it; metrics.jsonl has all metrics",
                file=sys.stderr,
            )
            self._module = None

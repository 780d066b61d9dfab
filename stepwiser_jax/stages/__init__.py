"""One file per pipeline step, each `run(config, run_dir) -> summary`. Stages meet on disk only."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from stepwiser_jax.config import STAGE_CONFIGS
from stepwiser_jax.config_files import validate
from stepwiser_jax.errors import UserError


def stage_module(stage: str) -> ModuleType:
    """Returns the module of a stage, which has `run`."""
    return importlib.import_module(f"stepwiser_jax.stages.{stage.replace('-', '_')}")


def run_stage(stage: str, settings: Mapping[str, Any], run_dir: str | Path) -> dict[str, Any]:
    """Runs a stage as its command does, and returns its summary. A run that was stopped goes on;
    of one that has finished, the summary is read.

    Args:
        stage: The name of its command, such as `train-judge`.
        settings: What its config file would hold (docs/settings.md).
        run_dir: Where it writes.

    Raises:
        UserError: There is no such stage, or a setting is wrong.
    """
    if stage not in STAGE_CONFIGS:
        raise UserError(f"expected a stage, one of {', '.join(STAGE_CONFIGS)}, found {stage!r}")
    config = validate(STAGE_CONFIGS[stage], dict(settings), stage)
    return stage_module(stage).run(config, Path(run_dir))

"""Finds how a judge is asked: from the run that trained it, a run that used it, or its export.

train-judge, train-classifier               the model of the run, asked as in its training
evaluate, search, select-responses, refine  the judge that the run used, as it used it
a model that `convert` exported             `stepwiser_judge.yaml` beside its weights
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from stepwiser_jax.config import Config, Judge
from stepwiser_jax.config_files import apply_override, read_run_settings, validate
from stepwiser_jax.data.hub import local_directory
from stepwiser_jax.errors import UserError
from stepwiser_jax.files import nothing_at
from stepwiser_jax.manifest import read_manifest, read_run_json
from stepwiser_jax.runs.checkpoint_paths import is_hub_id
from stepwiser_jax.yaml_files import read_mapping

KEPT = "stepwiser_judge.yaml"
"""The file of an exported judge that says how it is asked: `judge` of a config, without `path`."""

TRAINED = {
    "grpo": ("stepwiser", ("prompt_style", "sampling", "engine")),
    "head": ("classifier", ("prompt_style", "max_length")),
}
"""For a setting that only one stage has, train-judge and train-classifier: the kind of judge that
the stage trains, and its settings that say how the judge is asked."""

JUDGING = ("evaluate", "search", "select-responses", "refine")
"""The stages that use a judge."""


class _JudgePart(Config):
    """The part of a config that has the judge."""

    judge: Judge
    """The judge."""


def judge_settings(path: str | Path, overrides: Sequence[str] = ()) -> Judge:
    """Returns the settings of the judge at `path`, for `judges.load.load_judge`.

    Args:
        path: A finished run, an exported model, or the hub id of one.
        overrides: Settings to change, as `--set` of `evaluate` takes them: `judge.a.b=value`.

    Raises:
        UserError: There is no judge at `path`, it is not said how to ask it, or a setting is wrong.
    """
    named, path = str(path), Path(path)
    if is_hub_id(named):
        path = local_directory(named, ["config.json", KEPT])
    if path.name == "model" and (path.parent / "config.yaml").is_file():
        path = path.parent
    if (path / "config.yaml").is_file():
        tree = {"judge": _of_run(path)}
    elif (path / KEPT).is_file():
        tree = read_mapping(path / KEPT, "settings")
        if isinstance(tree.get("judge"), dict):
            tree["judge"]["path"] = named
    elif (path / "config.json").is_file():
        raise UserError(
            f"{named} is a model that does not say how it is asked (it has no {KEPT}): name the "
            "run that trained it, a run of evaluate that judged with it, or export it with "
            "`stepwiser convert`"
        )
    else:
        found = f"neither a config.yaml nor a {KEPT} in {path}" if path.is_dir() else None
        raise UserError(
            "expected a finished run that trained or used a judge, an exported judge, or its hub "
            "id, found "
            f"{found or nothing_at(path)}"
        )
    for override in overrides:
        apply_override(tree, override)
    return validate(_JudgePart, tree, str(path)).judge


def _of_run(run_dir: Path) -> dict[str, Any]:
    stage, settings = read_manifest(run_dir)["stage"], read_run_settings(run_dir)
    trained = _trained_judge(settings)
    if trained is not None:
        return trained | {"path": str(run_dir)}
    judge = settings.get("judge") if stage in JUDGING else None
    if judge is None:
        raise UserError(
            "expected a run that trained a judge (train-judge, train-classifier) or used one "
            f"({', '.join(JUDGING)}), found one of {stage} at {run_dir}. A model that was "
            "fine-tuned to judge does not say how it is asked: name a run of evaluate that scored "
            "it"
        )
    if settings.get("threshold_subset") is not None:
        judge["threshold"] = read_run_json(run_dir, "summary.json")["threshold"]
    return judge


def _trained_judge(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Returns how the judge is asked that a run with these settings trains, without `path`; None if
    it trains none. The prompts are with the model."""
    for only_there, (kind, fields) in TRAINED.items():
        if only_there in settings:
            asked = {name: settings[name] for name in fields}
            return {"kind": kind, **asked, "dtype": settings["model"].get("dtype", "float32")}
    return None


def exported_settings(settings: dict[str, Any]) -> str | None:
    """Returns the text of `stepwiser_judge.yaml` for the model of a training run with these
    settings; None if the run trains no judge."""
    judge = _trained_judge(settings)
    return None if judge is None else yaml.safe_dump({"judge": judge}, sort_keys=False)

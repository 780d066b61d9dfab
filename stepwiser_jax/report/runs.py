"""Finds run directories, finished or not, and reads what they hold."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from stepwiser_jax.config import STAGE_CONFIGS
from stepwiser_jax.config_files import read_run_settings, validate
from stepwiser_jax.errors import UserError
from stepwiser_jax.files import nothing_at
from stepwiser_jax.manifest import MANIFEST, check_run_file, read_manifest, read_run_json
from stepwiser_jax.record_io import KIND, stream_records, stream_written
from stepwiser_jax.records import Record
from stepwiser_jax.runs.metric_lines import read_metrics

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Run:
    """A run directory: how the report calls it, its stage, and its settings as they are written."""

    path: Path
    name: str
    stage: str
    is_finished: bool
    settings: dict[str, Any]

    def setting(self, name: str) -> Any:
        """Returns the setting `a.b`, None if there is none."""
        found: Any = self.settings
        for key in name.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def holds(self, record_type: type[Record]) -> bool:
        """Returns whether the run has written records of a type."""
        return any((self.path / "records" / KIND[record_type]).glob("part-*.jsonl"))

    def records(self, record_type: type[R]) -> Iterator[R]:
        """Yields the records of a type that the run has written so far, none if it has none."""
        if self.holds(record_type):
            read = stream_records if self.is_finished else stream_written
            yield from read(self.path, record_type)

    def summary(self) -> dict[str, Any]:
        """Returns summary.json, {} if the run is not finished."""
        return read_run_json(self.path, "summary.json") if self.is_finished else {}

    def metrics(self) -> list[dict[str, float]]:
        """Returns the lines of metrics.jsonl, none if there is no such file."""
        check_run_file(self.path, "metrics.jsonl")
        file = self.path / "metrics.jsonl"
        return read_metrics(file) if file.is_file() else []

    def located(self, path: str) -> Path:
        """Returns where a run that the settings name is now: there, or beside this run, to which it
        was moved together with this one."""
        beside = self.path.resolve().parent / Path(path).name
        return beside if not Path(path).exists() and beside.exists() else Path(path)


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Returns the runs at these paths: each is a run directory, or holds some, at most two folders
    down. They are in the order of the paths, and within one in that of the stages.

    Raises UserError if there is none at a path.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        inside = [path] if (path / "config.yaml").is_file() else _runs_below(path)
        if not inside:
            what = f"{path}, which holds neither" if path.is_dir() else nothing_at(path)
            raise UserError(
                f"expected a run directory (it has a config.yaml), or a directory that holds some, "
                f"found {what}"
            )
        runs = [read_run(run, _name(run, path, paths)) for run in inside]
        runs.sort(key=lambda run: list(STAGE_CONFIGS).index(run.stage))
        found |= {run.path.resolve(): run for run in runs}
    return list(found.values())


def _runs_below(path: Path) -> list[Path]:
    configs = [*path.glob("*/config.yaml"), *path.glob("*/*/config.yaml")]
    return sorted(file.parent for file in configs)


def _name(run: Path, path: Path, paths: Sequence[Path]) -> str:
    """Returns the shortest name of a run that tells it from those at other paths."""
    if run == path:
        names = [other.resolve().name for other in paths]
        name = path.resolve().name
        return name if names.count(name) == 1 else f"{path.resolve().parent.name}/{name}"
    inside = run.relative_to(path).as_posix()
    return inside if len(paths) == 1 else f"{path.resolve().name}/{inside}"


def read_run(path: Path, name: str) -> Run:
    """Returns the run in a directory. Raises UserError if its config or its manifest is damaged."""
    settings = read_run_settings(path)
    is_finished = (path / MANIFEST).is_file()
    stage = read_manifest(path)["stage"] if is_finished else _stage_of(settings, path)
    if stage not in STAGE_CONFIGS:
        raise UserError(
            f"expected a run of {', '.join(STAGE_CONFIGS)}, found one of {stage!r} in {path}"
        )
    return Run(path, name, stage, is_finished, settings)


def _stage_of(settings: dict[str, Any], path: Path) -> str:
    """Returns the stage whose settings these are: a run that is not finished does not name it."""
    for stage, config_type in STAGE_CONFIGS.items():
        try:
            validate(config_type, settings, "")
        except UserError:
            continue
        return stage
    raise UserError(
        f"expected the settings of a stage in {path / 'config.yaml'}, found others: another "
        "version of stepwiser wrote them; make the report with that one"
    )


def seconds_of(run: Run, metrics: Sequence[dict[str, float]]) -> float | None:
    """Returns how long a run took: as quickstart and reproduce noted it, or by its metrics; None if
    nothing says so."""
    file = run.path / "seconds.json"
    try:
        return float(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        noted = [line["seconds"] for line in metrics if "seconds" in line]
        return sum(noted) if noted else None

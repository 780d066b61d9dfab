"""Keeps how far a run has come, for `stepwiser status`: <run_dir>/progress/<worker>.json.

Each command that works on a run has its own file there, since shards run at any time and place. The
command that finishes the run removes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from stepwiser_jax.files import atomic_write

FOLDER = "progress"


@dataclass(frozen=True)
class Progress:
    """How far a command has come, `done` of `total` units of work such as steps.

    Attributes:
        unit: What is counted.
        done: The units that are done.
        total: All units of this command.
        rows: The rows of the current unit that are sampled, and all of them; None if nothing is.
        numbers: What is measured, by its name.
        seconds_each: The seconds of a unit, a mean over the last ones; None before the first.
        ended: Why the command has ended before it was done; None if it has not said so.
        began: When it began (UTC).
        written: When this was written (UTC).
        host: The name of its machine.
        pid: The id of its process there.
    """

    unit: str
    done: int
    total: int
    rows: tuple[int, int] | None = None
    numbers: dict[str, float] | None = None
    seconds_each: float | None = None
    ended: str | None = None
    began: str = ""
    written: str = ""
    host: str = ""
    pid: int = 0


def timestamp() -> str:
    """Returns the time now (UTC)."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def write_progress(run_dir: Path, worker: int, progress: Progress) -> None:
    """Replaces the file of a worker. A file that cannot be written ends no run."""
    file = run_dir / FOLDER / f"{worker:05d}.json"
    progress = replace(progress, written=timestamp(), host=socket.gethostname(), pid=os.getpid())
    with contextlib.suppress(OSError):
        file.parent.mkdir(exist_ok=True)
        atomic_write(file, json.dumps(asdict(progress)) + "\n")


def read_progress(run_dir: Path) -> list[Progress]:
    """Returns what the workers of a run have written, in their order; none of a finished run. A
    file that cannot be read is left out."""
    names = {field.name for field in fields(Progress)}
    found = []
    for file in sorted((run_dir / FOLDER).glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            tree = json.loads(file.read_bytes())
            if isinstance(tree, dict) and set(tree) == names:
                found.append(Progress(**tree))
    return found

"""`stepwiser status`: says of runs whether they are running, how far they are, and how well.

run directory -> finished, running or stopped -> its progress, its two numbers, its health

It reads what the run has written, and asks whether a process holds the run's lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.live import Live
from rich.text import Text

from stepwiser_jax.errors import UserError
from stepwiser_jax.report.figures import flat
from stepwiser_jax.report.runs import Run, find_runs, seconds_of
from stepwiser_jax.runs.progress_file import Progress, read_progress

SILENT_SECONDS = 600
"""After so long without a word, a run on a file system without locks is taken to have stopped."""

SHOWN = {
    "sft": ("loss", "grad_norm"),
    "train-classifier": ("loss", "accuracy"),
    "train-judge": ("reward", "verdict_positive_share"),
    "rollout": ("accuracy", "stopped_by_length"),
    "chunk-solutions": ("cut", "agreement"),
    "annotate": ("prefixes", "mean_value"),
    "label": ("judge_examples", "positive_share"),
    "rejection-sample": ("kept_positive_share",),
    "evaluate": ("greedy.average.official.f1", "greedy.average.auc"),
    "search": ("greedy.accuracy", "chunk_reset.accuracy"),
}
"""The two numbers of a run that matter most: of the last metrics, or of the summary."""

HEALTH = ("unparsed_rate", "logprob_gap_max", "clip_fraction_high", "entropy")
"""Metrics of a training that show early that something is wrong."""

COLOURS = {"finished": "green", "running": "bold cyan", "stopped": "yellow"}

State = Literal["finished", "running", "stopped"]


@dataclass(frozen=True)
class RunStatus:
    """What is known of a run.

    Attributes:
        path: Its directory.
        name: How the output calls it.
        stage: Its stage.
        state: Whether it runs.
        workers: How far each command that works on it has come.
        numbers: The two numbers that matter, as they were last.
        checkpoint: The step of the last checkpoint, None if there is none.
        health: Skipped updates of the whole run, the last `HEALTH`, and bytes of memory.
        seconds: How long the run has taken, None if nothing says so.
        resume: The command that goes on with it; None if it is finished or runs.
    """

    path: Path
    name: str
    stage: str
    state: State
    workers: list[Progress]
    numbers: dict[str, float]
    checkpoint: int | None
    health: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    resume: str | None = None

    def to_fields(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


def status_of(run: Run) -> RunStatus:
    """Returns what is known of a run."""
    workers = read_progress(run.path)
    state: State = "finished"
    if not run.is_finished:
        held = is_locked(run.path)
        if held is None:
            held = any(w.ended is None and age(w) < SILENT_SECONDS for w in workers)
        state = "running" if held else "stopped"
    metrics = run.metrics()
    last = metrics[-1] if metrics else {}
    known = dict(flat(run.summary())) | last
    numbers = {name: known[name] for name in SHOWN.get(run.stage, ()) if name in known}
    if not numbers and workers:
        numbers = dict(workers[-1].numbers or {})
    health = {name: last[name] for name in HEALTH if name in last}
    if metrics:
        health = {"skipped_updates": sum(line.get("skipped", 0.0) for line in metrics)} | health
    memory = [memory_of(worker) for worker in workers] if state == "running" else []
    if any(memory):
        health["memory_bytes"] = float(sum(memory))
    return RunStatus(
        run.path,
        run.name,
        run.stage,
        state,
        workers,
        numbers,
        last_checkpoint(run.path),
        health,
        seconds_of(run, metrics),
        _resume_command(run) if state == "stopped" else None,
    )


def is_locked(run_dir: Path) -> bool | None:
    """Returns whether a process works in a run directory; None if the file system cannot tell."""
    try:
        with open(run_dir / "lock", "rb") as file:
            try:
                # A worker has locked a byte of its own for itself, so a shared lock is refused.
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return True
            fcntl.lockf(file, fcntl.LOCK_UN)
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return None


def age(progress: Progress) -> float:
    """Returns the seconds since a worker's last word."""
    written = datetime.fromisoformat(progress.written)
    return (datetime.now(UTC) - written).total_seconds()


def memory_of(progress: Progress) -> int:
    """Returns the bytes of memory of a worker on this machine, 0 of one elsewhere."""
    if progress.host != socket.gethostname():
        return 0
    try:
        pages = int(Path(f"/proc/{progress.pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def last_checkpoint(run_dir: Path) -> int | None:
    folder = run_dir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=None)


def _resume_command(run: Run) -> str:
    path = shlex.quote(str(run.path))
    config = shlex.quote(str(run.path / "config.yaml"))
    return f"stepwiser {run.stage} --config {config} --run-dir {path}"


# --- printing -------------------------------------------------------------------------------------


def print_status(run_dirs: Sequence[Path], *, watch: float | None, as_json: bool) -> None:
    """Prints the status of these runs, or of those that directories hold. With `watch` it does so
    again after that many seconds, until all are finished or somebody stops it.

    Raises UserError if there is no run.
    """
    if watch is not None and as_json:
        raise UserError("expected --watch or --json, found both: ask for --json again and again")
    found = [status_of(run) for run in find_runs(run_dirs)]
    if as_json:
        print(json.dumps([status.to_fields() for status in found], indent=2))
        return
    console = Console(highlight=False)
    if watch is None:
        console.print(text_of(found), soft_wrap=True)
        return
    try:
        with Live(text_of(found), console=console, auto_refresh=False) as live:
            while any(status.state != "finished" for status in found):
                time.sleep(watch)
                found = [status_of(run) for run in find_runs(run_dirs)]
                live.update(text_of(found), refresh=True)
    except KeyboardInterrupt:
        pass


def text_of(found: Sequence[RunStatus]) -> Text:
    """Returns the lines that are printed."""
    text = Text()
    width = max(len(status.name) for status in found)
    for status in found:
        text.append(f"{status.name:{width}}  {status.stage:17}")
        text.append(f"{status.state:9}", style=COLOURS[status.state])
        if status.seconds is not None and status.state == "finished":
            text.append(f"after {timedelta(seconds=round(status.seconds))}")
        text.append("\n")
        for line in _lines(status):
            text.append(f"  {line}\n")
    return text


def _lines(status: RunStatus) -> list[str]:
    lines = [_progress_line(worker, status.state) for worker in status.workers]
    if status.numbers:
        lines.append(", ".join(f"{name} {number(x)}" for name, x in status.numbers.items()))
    if status.state == "finished":
        return lines
    health = [f"checkpoint of step {status.checkpoint}"] if status.checkpoint is not None else []
    for name, value in status.health.items():
        is_memory = name == "memory_bytes"
        shown = f"memory {value / 2**30:.1f} GiB" if is_memory else f"{name} {number(value)}"
        health.append(shown)
    if health:
        lines.append(", ".join(health))
    if status.resume is not None:
        lines.append(f"go on with: {status.resume}")
    return lines


def _progress_line(worker: Progress, state: State) -> str:
    parts = [f"{worker.unit} {worker.done} of {worker.total}"]
    if worker.rows is not None:
        parts.append("{} of {} rows of the next".format(*worker.rows))
    if worker.seconds_each is not None:
        left = timedelta(seconds=round(worker.seconds_each * (worker.total - worker.done)))
        parts += [f"{worker.seconds_each:.3g} s each", f"{left} left"]
    seconds = timedelta(seconds=round(age(worker)))
    parts.append(f"process {worker.pid} on {worker.host}, {seconds} ago")
    if worker.ended is not None:
        parts.append(f"ended: {worker.ended}")
    elif state == "stopped":
        parts.append("ended without a word: it was killed, or its machine was lost")
    return ", ".join(parts)


def number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"

"""Shows the progress of a run: a bar on a terminal, lines elsewhere (SLURM, GKE, a file).

    10:29:30 train-judge: iteration 12 of 800, reward 0.61, kl 0.002, 41.2 s each, 9:02:00 left

All of it goes to stderr; stdout carries results. With several processes only the primary speaks.
It also keeps what it shows in a file (`progress_file`).
"""

from __future__ import annotations

import datetime
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from stepwiser_jax.distributed import hosts
from stepwiser_jax.records import (
    ChunkedSolution,
    Judgment,
    PrefixValue,
    Rationale,
    Record,
    SearchResult,
    Selection,
    Trajectory,
)
from stepwiser_jax.runs.progress_file import Progress, timestamp
from stepwiser_jax.runs.signals import Interrupted

LINE_SECONDS, ROWS_SECONDS = 10.0, 60.0
"""The least time between two lines about units of work, and about rows within a unit."""

SPEED_WINDOW = 20
"""Seconds per unit are the mean over this number of units, so that compilation soon drops out."""

BLOCK_MEANS: dict[type[Record], tuple[str, Callable[[Any], float]]] = {
    Trajectory: ("right", lambda trajectory: trajectory.is_correct),
    ChunkedSolution: ("cut", lambda solution: bool(solution.chunks)),
    PrefixValue: ("value", lambda value: value.value),
    Rationale: ("kept", lambda rationale: rationale.outcome == "kept"),
    Judgment: ("right", lambda judgment: judgment.reward),
    SearchResult: ("right", lambda result: result.is_correct),
    Selection: ("right", lambda selection: selection.is_correct),
}
"""The number whose mean over a block of records is shown, and its name."""

Keep = Callable[[Progress], None]
"""Keeps how far a stage has come."""

_console = Console(stderr=True)


def say(text: str) -> None:
    """Prints a line that begins with the time of day."""
    if hosts.is_primary():
        _console.print(
            f"{time.strftime('%H:%M:%S')} {text}", markup=False, highlight=False, soft_wrap=True
        )


def printable(text: str) -> str:
    """Returns a text without what would steer a terminal, such as escape sequences."""
    return "".join(x if x in "\n\t" or x.isprintable() else "\ufffd" for x in text)


class Report:
    """How far a stage has come: `done` of `total` units of work, such as steps. `keep` is called
    with what `stepwiser status` shows of it."""

    def __init__(self, stage: str, unit: str, total: int, done: int, keep: Keep | None):
        self.stage, self.unit, self.total, self.done = stage, unit, total, done
        self._keep = keep if hosts.is_primary() else None
        self._kept_at = float("-inf")
        self._numbers: dict[str, float] = {}
        self._began = timestamp()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{unit}s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rows]}{task.fields[note]}"),
        )
        on_terminal = _console.is_terminal and hosts.is_primary()
        self.bar = Bar(*columns, console=_console, disable=not on_terminal)
        self.task = self.bar.add_task(stage, total=total, completed=done, rows="", note="")
        self._ends = deque([time.monotonic()], maxlen=SPEED_WINDOW + 1)
        self._last_line = float("-inf")
        self._tokens = 0

    def advance(self, **numbers: float) -> None:
        """Counts one more unit as done and shows these numbers.

        The unit's time runs from the end of the unit before it.
        """
        self.done += 1
        now = time.monotonic()
        if self._tokens:
            numbers["tokens/s"] = self._tokens / (now - self._ends[-1])
        self._ends.append(now)
        self._tokens = 0
        self._numbers = numbers
        note = ", ".join(f"{name} {_short(value)}" for name, value in numbers.items())
        self.bar.update(self.task, advance=1, rows="", note=note)
        is_due = now - self._last_line >= LINE_SECONDS or self.done == self.total
        if is_due and self.bar.disable:
            self._last_line = now
            each = self._seconds_each
            assert each is not None
            left = datetime.timedelta(seconds=round(each * (self.total - self.done)))
            parts = [f"{self.unit} {self.done} of {self.total}", note]
            parts += [f"{each:.3g} s each", f"{left} left"]
            say(f"{self.stage}: {', '.join(filter(None, parts))}")
        self.keep()

    @property
    def _seconds_each(self) -> float | None:
        """The seconds of a unit, None before the first."""
        units = len(self._ends) - 1
        return (self._ends[-1] - self._ends[0]) / units if units else None

    def keep(self, *, rows: tuple[int, int] | None = None, ended: str | None = None) -> None:
        """Keeps how far the stage has come, if the last time is long ago or the stage has ended."""
        is_due = ended is not None or time.monotonic() - self._kept_at >= LINE_SECONDS
        if self._keep is None or not is_due:
            return
        self._kept_at = time.monotonic()
        self._keep(
            Progress(
                self.unit,
                self.done,
                self.total,
                rows,
                {k: float(value) for k, value in self._numbers.items() if math.isfinite(value)},
                self._seconds_each,
                ended,
                self._began,
            )
        )

    def rows_done(self, done: int, total: int, tokens: int) -> None:
        """Shows rows within the current unit, and counts tokens sampled since the last call."""
        self._tokens += tokens
        rows = f"{done} of {total} rows"
        self.bar.update(self.task, rows=f"{rows}, ")
        self.keep(rows=(done, total))
        now = time.monotonic()
        if self.bar.disable and now - max(self._last_line, self._ends[-1]) >= ROWS_SECONDS:
            self._last_line = now
            speed = self._tokens / (now - self._ends[-1])
            say(
                f"{self.stage}: in {self.unit} {self.done + 1} of {self.total}, {rows}, "
                f"tokens/s {_short(speed)}"
            )


_current: Report | None = None


@contextmanager
def progress(
    stage: str, unit: str, total: int, done: int = 0, keep: Keep | None = None
) -> Iterator[Report]:
    """Yields a report for a loop over `total` units, of which `done` are done already. What it
    shows is kept by `keep`."""
    global _current
    report = Report(stage, unit, total, done, keep)
    outer, _current = _current, report
    try:
        report.keep()
        with report.bar:
            yield report
    except (Interrupted, KeyboardInterrupt):
        report.keep(ended="it was asked to stop")
        raise
    except Exception as error:
        report.keep(ended=f"{type(error).__name__}: {error}"[:500])
        raise
    finally:
        _current = outer


def rows_done(done: int, total: int, tokens: int) -> None:
    """Shows in the current report, if any, that `done` of `total` rows are sampled.

    `tokens` were sampled since the last call.
    """
    if _current is not None:
        _current.rows_done(done, total, tokens)


def block_means(records: Sequence[Record]) -> dict[str, float]:
    """Returns the number of records, and the mean that says how good they are."""
    if not records or type(records[0]) not in BLOCK_MEANS:
        return {"rows": len(records)}
    name, number = BLOCK_MEANS[type(records[0])]
    return {"rows": len(records), name: sum(map(number, records)) / len(records)}


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"

"""What a run says while it works: a bar on a terminal, lines elsewhere (SLURM, GKE, a file).

    10:29:30 judge: iteration 12 of 800, reward 0.61, unparsed_rate 0.01, 41.2 s each, 9:02:00 left

All of it goes to stderr: stdout carries results. If there are several processes, the first one
speaks.
"""

from __future__ import annotations

import datetime
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from stepwiser_jax.distributed import hosts

LINE_SECONDS, ROWS_SECONDS = 10.0, 60.0
"""The least time between two lines about units of work, and about rows within a unit."""

SPEED_OVER = 20
"""The seconds of a unit are the mean of the last ones, at most this number of them: compilation
soon counts no more."""

_console = Console(stderr=True)


def say(text: str) -> None:
    """Prints a line that begins with the time of day."""
    if hosts.is_first():
        _console.print(
            f"{time.strftime('%H:%M:%S')} {text}", markup=False, highlight=False, soft_wrap=True
        )


class Told:
    """How far the work has come: `total` units of it, such as steps, of which `done` are done."""

    def __init__(self, stage: str, unit: str, total: int, done: int):
        self.stage, self.unit, self.total, self.done = stage, unit, total, done
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
        on_terminal = _console.is_terminal and hosts.is_first()
        self.bar = Progress(*columns, console=_console, disable=not on_terminal)
        self.task = self.bar.add_task(stage, total=total, completed=done, rows="", note="")
        self._ends = deque([time.monotonic()], maxlen=SPEED_OVER + 1)
        self._last_line = float("-inf")
        self._tokens = 0

    def advance(self, **numbers: float) -> None:
        """Tells of one more unit that is done, with the numbers that matter.

        The time from the end of the unit before it counts as its own.
        """
        self.done += 1
        now = time.monotonic()
        if self._tokens:
            numbers["tokens/s"] = self._tokens / (now - self._ends[-1])
        self._ends.append(now)
        self._tokens = 0
        note = ", ".join(f"{name} {_short(value)}" for name, value in numbers.items())
        self.bar.update(self.task, advance=1, rows="", note=note)
        is_due = now - self._last_line >= LINE_SECONDS or self.done == self.total
        if is_due and self.bar.disable:
            self._last_line = now
            each = (now - self._ends[0]) / (len(self._ends) - 1)
            left = datetime.timedelta(seconds=round(each * (self.total - self.done)))
            parts = [f"{self.unit} {self.done} of {self.total}", note]
            parts += [f"{each:.3g} s each", f"{left} left"]
            say(f"{self.stage}: {', '.join(filter(None, parts))}")

    def move(self, done: int, total: int, tokens: int) -> None:
        """Tells of rows that are done within the unit, and of tokens that were sampled for them."""
        self._tokens += tokens
        rows = f"{done} of {total} rows"
        self.bar.update(self.task, rows=f"{rows}, ")
        now = time.monotonic()
        if self.bar.disable and now - max(self._last_line, self._ends[-1]) >= ROWS_SECONDS:
            self._last_line = now
            speed = self._tokens / (now - self._ends[-1])
            say(
                f"{self.stage}: in {self.unit} {self.done + 1} of {self.total}, {rows}, "
                f"tokens/s {_short(speed)}"
            )


_now: Told | None = None
"""The work that is being done."""


@contextmanager
def progress(stage: str, unit: str, total: int, done: int = 0) -> Iterator[Told]:
    """Around a loop: yields what is to be told after each of its units."""
    global _now
    told = Told(stage, unit, total, done)
    outer, _now = _now, told
    try:
        with told.bar:
            yield told
    finally:
        _now = outer


def rows_done(done: int, total: int, tokens: int) -> None:
    """Tells whoever follows the work that `done` of `total` rows are sampled, and the number of
    tokens since it was told before."""
    if _now is not None:
        _now.move(done, total, tokens)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"

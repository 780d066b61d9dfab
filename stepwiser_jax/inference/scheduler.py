"""Continuous batching: decides which samples run in which rows of the decoding grid. Needs no jax.

    slot     holds one prefix; the grid has Q slots
    row      continues the prefix of its slot; each slot has R rows, and row b is in slot b // R
    sample   one continuation of a prefix; it occupies a row until it ends

`Engine` calls the scheduler once per burst, which is a stretch of decoding on the device:

    admit_prefixes    free slots take waiting prefixes
    start_samples     free rows take waiting samples of their slot's prefix
    exit_at           the burst ends when this many rows are left
    finish            rows whose samples have ended become free
    shrink            when nothing waits, the remaining rows move to a smaller grid
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepwiser_jax.inference.params import Prefix, SampleRequest

SAMPLES_PER_PREFIX = 16
"""How many samples of one prefix run at the same time while other prefixes wait. With more, each
read of the prefix's keys and values serves more rows; with fewer, a slot waits less long for its
last row before it takes the next prefix."""

REFILL_FRACTION = 1 / 8
"""While samples wait, a burst ends when this fraction of the running rows has ended. Smaller values
leave fewer rows idle, and stop the device more often."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Q slots of R rows each."""

    slots: int
    rows_per_slot: int

    def __str__(self) -> str:
        return f"{self.slots}x{self.rows_per_slot}"

    @property
    def rows(self) -> int:
        return self.slots * self.rows_per_slot

    def num_busy(self, num_prefixes: int, num_samples: int) -> int:
        """Returns how many rows can run at once if each prefix has `num_samples` samples."""
        return min(num_prefixes, self.slots) * min(num_samples, self.rows_per_slot)


def choose_grid(
    allowed_rows: Sequence[int],
    num_prefixes: int,
    num_samples: int,
    samples_per_prefix: int = SAMPLES_PER_PREFIX,
    shards: int = 1,
) -> Grid:
    """Returns the smallest grid that runs all samples at once, or else the largest grid.

    The rows of a slot are a power of two, so that few shapes are compiled, unless that leaves more
    rows idle. With 64 rows and 9 samples of each prefix, 4 slots of 16 rows would keep 36 rows
    busy; 7 slots of 9 rows keep 63 busy and are chosen.

    Args:
        allowed_rows: The numbers of rows that may be compiled, ascending.
        num_prefixes: The number of prefixes.
        num_samples: The largest number of samples of one prefix.
        samples_per_prefix: See `SAMPLES_PER_PREFIX`. It is exceeded if rows would be idle.
        shards: The number of devices that rows are split over; each holds whole slots.
    """
    grid = Grid(0, 0)
    for rows in allowed_rows:
        at_once = min(num_samples, max(samples_per_prefix, rows // num_prefixes))
        candidates = []
        for rows_per_slot in (1 << (at_once - 1).bit_length(), at_once):
            rows_per_slot = min(rows_per_slot, rows // shards)
            candidates.append(Grid(rows // rows_per_slot // shards * shards, rows_per_slot))
        grid = max(candidates, key=lambda grid: grid.num_busy(num_prefixes, num_samples))
        if grid.num_busy(num_prefixes, num_samples) >= num_prefixes * num_samples:
            break
    return grid


@dataclasses.dataclass
class Slot:
    """The prefix that a slot holds, and the samples of it that have not started."""

    prefix: Prefix | None = None
    waiting: deque[SampleRequest] = dataclasses.field(default_factory=deque)


class Scheduler:
    """Assigns prefixes to slots and samples to rows, in the order in which they were given.

    Args:
        prefixes: What is sampled, at least one prefix, each with at least one sample.
        allowed_rows: The numbers of rows that may be compiled, ascending.
        shards: The number of devices that rows are split over.
        samples_per_prefix: See `SAMPLES_PER_PREFIX`.
        is_needed: Decides when a sample is about to start; if False, the sample is left out.
    """

    def __init__(
        self,
        prefixes: Sequence[Prefix],
        allowed_rows: Sequence[int],
        *,
        shards: int = 1,
        samples_per_prefix: int = SAMPLES_PER_PREFIX,
        is_needed: Callable[[SampleRequest], bool] | None = None,
    ):
        most = max(len(prefix.samples) for prefix in prefixes)
        self.grid = choose_grid(allowed_rows, len(prefixes), most, samples_per_prefix, shards)
        self.running: dict[int, SampleRequest] = {}  # by row, in the order of their start
        self._allowed_rows = allowed_rows
        self._is_needed = is_needed
        self._waiting_prefixes = deque(prefixes)
        self._slots = [Slot() for _ in range(self.grid.slots)]

    @property
    def has_waiting(self) -> bool:
        """Whether a sample has not started."""
        return bool(self._waiting_prefixes) or any(slot.waiting for slot in self._slots)

    @property
    def has_work(self) -> bool:
        """Whether a sample has not ended."""
        return bool(self.running) or self.has_waiting

    def admit_prefixes(self) -> list[tuple[int, Prefix]]:
        """Puts waiting prefixes into free slots, whose samples have all ended.

        Returns:
            The slots that have a new prefix, and their prefixes.
        """
        busy = {row // self.grid.rows_per_slot for row in self.running}
        admitted = []
        for q, slot in enumerate(self._slots):
            if self._waiting_prefixes and q not in busy and not slot.waiting:
                prefix = self._waiting_prefixes.popleft()
                self._slots[q] = Slot(prefix, deque(prefix.samples))
                admitted.append((q, prefix))
        return admitted

    def start_samples(self) -> list[tuple[int, Prefix, SampleRequest]]:
        """Starts waiting samples in the free rows of their slot.

        Returns:
            The rows that start, each with the prefix of its slot and its sample.
        """
        started = []
        for row in range(self.grid.rows):
            slot = self._slots[row // self.grid.rows_per_slot]
            sample = None if row in self.running else self._next_sample(slot)
            if sample is not None:
                assert slot.prefix is not None
                self.running[row] = sample
                started.append((row, slot.prefix, sample))
        return started

    def _next_sample(self, slot: Slot) -> SampleRequest | None:
        while slot.waiting:
            sample = slot.waiting.popleft()
            if self._is_needed is None or self._is_needed(sample):
                return sample
        return None

    def exit_at(self) -> int:
        """Returns how many rows may still run when the burst ends.

        By then enough rows have ended to start waiting samples, or the rest may fit a smaller grid.
        """
        running = len(self.running)
        after_refill = running - max(1, int(running * REFILL_FRACTION))
        if self.has_waiting:
            return after_refill
        smaller = [rows for rows in self._allowed_rows if rows < self.grid.rows]
        if not smaller:
            return 0
        return smaller[-1] if smaller[-1] < running else after_refill

    def finish(self, rows: Iterable[int]) -> list[SampleRequest]:
        """Frees rows whose samples have ended, and returns these samples."""
        return [self.running.pop(row) for row in rows]

    def shrink(self) -> list[int] | None:
        """Moves the running rows to the smallest grid that holds them, one to a slot.

        One row to a slot gives one shape for each allowed number of rows, wherever the rows were.

        Returns:
            The rows that move, in the order of their new slots; None if samples wait, if nothing
            runs, or if no smaller grid holds the running rows.
        """
        rows = sorted(self.running)
        slots = next(n for n in self._allowed_rows if n >= len(rows))
        if not rows or self.has_waiting or slots >= self.grid.rows:
            return None
        self.grid = Grid(slots, 1)
        self._slots = [Slot() for _ in range(slots)]
        self.running = {slot: self.running[row] for slot, row in enumerate(rows)}
        return rows

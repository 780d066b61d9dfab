"""The metrics of a run: metrics.jsonl, TensorBoard events and a tracker side by side."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stepwiser_jax.distributed import hosts
from stepwiser_jax.errors import UserError
from stepwiser_jax.files import atomic_write
from stepwiser_jax.runs.metric_lines import TIMING_FIELDS, read_metrics
from stepwiser_jax.runs.tracker import Tracker


class Metrics:
    """The writer of a run's metrics. Only the primary process writes."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]):
        self._path = run_dir / "metrics.jsonl"
        self._tensorboard, self._last_line = None, time.perf_counter()
        if hosts.is_primary():
            # tensorboardX.SummaryWriter will not do: if the disk is full, its thread dies, and the
            # next call that adds to its queue waits for ever.
            from tensorboardX.event_file_writer import EventsWriter

            folder = run_dir / "tensorboard"
            folder.mkdir(exist_ok=True)
            self._tensorboard = EventsWriter(str(folder / "events"))
            self._tracker = Tracker(run_dir, settings)

    def resume_at(self, step: int) -> dict[str, float]:
        """Removes what a killed run logged after the checkpoint of `step`.

        Returns the last values up to `step`. Raises UserError if lines before it are missing.
        """
        lines = read_metrics(self._path) if self._path.exists() else []
        kept = [line for line in lines if line["step"] <= step]
        last = kept[-1] if kept else {}
        last_step = last.get("step", 0)
        if last_step < step:
            raise UserError(
                f"{self._path} ends at step {last_step}, but the checkpoint to resume from is of "
                f"step {step}: put the file back, or delete the checkpoints after step {last_step}"
            )
        if self._tensorboard is not None:
            atomic_write(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        return {k: value for k, value in last.items() if k not in ("step", *TIMING_FIELDS)}

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends a line, and the same values as a TensorBoard event."""
        if self._tensorboard is None:
            return
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        now = time.perf_counter()
        values = {name: float(value) for name, value in values.items()}
        values["seconds"], self._last_line = round(now - self._last_line, 3), now
        line = {"step": step, **values, "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        event = Event(wall_time=time.time(), step=step)
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._tensorboard.write_event(event)
        self._tensorboard.flush()
        self._tracker.log(step, values)

    def sync(self) -> None:
        """Waits until all lines are on disk. Call it before a checkpoint that relies on them."""
        if self._tensorboard is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tracker.finish()

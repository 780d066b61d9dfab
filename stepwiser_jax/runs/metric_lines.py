"""Reads the lines of a metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

from stepwiser_jax.errors import UserError

TIMING_FIELDS = ("time", "seconds")
"""Fields of a line of metrics.jsonl that differ when a run is repeated: when the line was written
(UTC), and the seconds since the line before it."""


def read_metrics(file: Path) -> list[dict[str, float]]:
    """Returns the lines of a metrics.jsonl, without a last one that a kill cut short.

    Raises UserError if another line is damaged.
    """
    lines: list[dict[str, float]] = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        before = lines[-1]["step"] if lines else -1  # a measurement before step 1 is of step 0
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            fields = None
        if isinstance(fields, dict) and type(fields.get("step")) is int and fields["step"] > before:
            lines.append(fields)
        elif line.endswith(b"\n"):
            raise UserError(
                f"{file}, line {number} is damaged ({line[:80]!r}): put the file back, or delete "
                "that line; the training itself does not depend on it"
            )
    return lines

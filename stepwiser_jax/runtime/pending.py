"""Groups that are sampled but not yet part of a checkpoint: a killed run reads them again.

    <run_dir>/pending/000012-draw0-9f86d081884c.jsonl
    <run_dir>/pending/000012-draw1-9f86d081884c.rows.jsonl

A run that is asked to stop leaves the finished rows of the draw in progress, as the second file;
when it goes on it samples the other rows alone, and their company is another. So they are what they
would have been but for rounding: log-probs in the last digits, a token if its draw lay that close
to another one. A run that is killed leaves whole draws only, and the same bytes.

The name of a draw says for which iteration it was sampled, and by which parameters: its groups are
used again only by the same parameters, to the bit, however a run came back to them. All processes
hold the groups of a draw; the first of them writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepwiser_jax.record_files import read_jsonl, write_records
from stepwiser_jax.records import Judged, SampledRow
from stepwiser_jax.runtime import hosts


class PendingGroups:
    """The groups of iterations behind the last complete checkpoint."""

    def __init__(self, directory: Path):
        self._directory = directory

    def read(self, iteration: int, draw: int, sampled_by: str) -> list[Judged] | None:
        """Those of a draw that the parameters with this fingerprint sampled; None without any."""
        file = self._file(iteration, draw, sampled_by)
        return list(read_jsonl(file, Judged)) if file.is_file() else None

    def write(self, iteration: int, draw: int, sampled_by: str, groups: list[Judged]) -> None:
        """A draw, whole or not at all."""
        if hosts.is_first():
            write_records(self._file(iteration, draw, sampled_by), groups)
            self._file(iteration, draw, sampled_by, ".rows").unlink(missing_ok=True)

    def read_rows(self, iteration: int, draw: int, sampled_by: str) -> dict[str, SampledRow]:
        """Returns the finished rows of a draw that was stopped, by their ids; empty without any."""
        file = self._file(iteration, draw, sampled_by, ".rows")
        return {row.row_id: row for row in read_jsonl(file, SampledRow)} if file.is_file() else {}

    def write_rows(
        self, iteration: int, draw: int, sampled_by: str, rows: Iterable[SampledRow]
    ) -> None:
        """Writes the finished rows of a draw that is stopped, whole or not at all."""
        if hosts.is_first():
            write_records(self._file(iteration, draw, sampled_by, ".rows"), rows)

    def forget_before(self, iteration: int) -> None:
        """Remove what a checkpoint of this step has made part of the parameters."""
        for file in self._directory.glob("*-draw*.jsonl") if hosts.is_first() else ():
            if int(file.name.partition("-")[0]) < iteration:
                file.unlink()

    def _file(self, iteration: int, draw: int, sampled_by: str, part: str = "") -> Path:
        return self._directory / f"{iteration:06d}-draw{draw}-{sampled_by}{part}.jsonl"


def fingerprint(model: Any) -> str:
    """12 hex digits of the bits of all parameters: the same on every mesh, others after any update.
    All processes must call this."""
    return hashlib.sha256(np.asarray(_sums_of_bits(model)).tobytes()).hexdigest()[:12]


@jax.jit
def _sums_of_bits(model: Any) -> jax.Array:
    """One uint32 for each array; sums of integers do not depend on their order."""

    def sum_of(array: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(array, unsigned)
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    return jnp.stack([sum_of(leaf) for leaf in jax.tree.leaves(model)])

"""Groups that are sampled but not yet part of a checkpoint: a killed run reads them again.

    <run_dir>/pending/000012-draw0-9f86d081884c-60303ae22b99.jsonl
    <run_dir>/pending/000012-draw1-9f86d081884c.rows-0b5e3d2a7c41.jsonl

A run that is asked to stop leaves the finished rows of the draw in progress, as the second file;
when it goes on it samples the other rows alone, and their company is another. So they are what they
would have been but for rounding: log-probs in the last digits, a token if its draw lay that close
to another one. A run that is killed leaves whole draws only, and the same bytes.

The name of a draw says for which iteration it was sampled, and by which parameters: its groups are
used again only by the same parameters, to the bit, however a run came back to them. The end of the
name is a checksum of the file: a damaged draw counts as none, and is sampled again. All processes
hold the groups of a draw; the first of them writes.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from stepwiser_jax.checksums import sha256_of
from stepwiser_jax.distributed import hosts
from stepwiser_jax.record_io import atomic_write, read_jsonl, to_json
from stepwiser_jax.records import Record, RolloutGroup, SampledRow

R = TypeVar("R", bound=Record)


class RolloutCache:
    """Keeps the groups of iterations after the last complete checkpoint."""

    def __init__(self, directory: Path):
        self._directory = directory

    def read(self, iteration: int, draw: int, sampled_by: str) -> list[RolloutGroup] | None:
        """Those of a draw that the parameters with this fingerprint sampled; None without any."""
        return self._read(_name(iteration, draw, sampled_by), RolloutGroup)

    def write(self, iteration: int, draw: int, sampled_by: str, groups: list[RolloutGroup]) -> None:
        """A draw, whole or not at all."""
        if hosts.is_primary():
            name = _name(iteration, draw, sampled_by)
            self._write(name, groups)
            self._remove(f"{name}.rows")

    def read_rows(self, iteration: int, draw: int, sampled_by: str) -> dict[str, SampledRow]:
        """Returns the finished rows of a draw that was stopped, by their ids; empty without any."""
        rows = self._read(f"{_name(iteration, draw, sampled_by)}.rows", SampledRow)
        return {row.row_id: row for row in rows or ()}

    def write_rows(
        self, iteration: int, draw: int, sampled_by: str, rows: Iterable[SampledRow]
    ) -> None:
        """Writes the finished rows of a draw that is stopped, whole or not at all."""
        if hosts.is_primary():
            self._write(f"{_name(iteration, draw, sampled_by)}.rows", rows)

    def forget_before(self, iteration: int) -> None:
        """Remove what a checkpoint of this step has made part of the parameters."""
        for file in self._directory.glob("*-draw*.jsonl") if hosts.is_primary() else ():
            if int(file.name.partition("-")[0]) < iteration:
                file.unlink()

    def _read(self, name: str, record_type: type[R]) -> list[R] | None:
        for file in self._directory.glob(f"{name}-*.jsonl"):
            if file.stem.endswith(f"-{sha256_of(file)[:12]}"):
                return read_jsonl(file, record_type)
            print(f"{file} is damaged: its judgments are sampled again", file=sys.stderr)
        return None

    def _write(self, name: str, records: Iterable[Record]) -> None:
        text = "".join(to_json(record) + "\n" for record in records)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        self._remove(name)
        atomic_write(self._directory / f"{name}-{digest}.jsonl", text)

    def _remove(self, name: str) -> None:
        for file in self._directory.glob(f"{name}-*.jsonl"):
            file.unlink()


def _name(iteration: int, draw: int, sampled_by: str) -> str:
    return f"{iteration:06d}-draw{draw}-{sampled_by}"

"""Groups that are sampled but not yet part of a checkpoint: a killed run reads them again.

    <run_dir>/pending/000012-draw0-9f86d081884c-60303ae22b99.jsonl

The name of a draw says for which iteration it was sampled, and by which parameters: its groups are
used again only by the same parameters, to the bit, however a run came back to them. The end of the
name is a checksum of the file: a damaged draw counts as none, and is sampled again. All processes
hold the groups of a draw; the first of them writes.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from stepwiser_jax.checksums import sha256_of
from stepwiser_jax.record_files import atomic_write, read_jsonl, to_json
from stepwiser_jax.records import Judged
from stepwiser_jax.runtime import hosts


class PendingGroups:
    """The groups of iterations behind the last complete checkpoint."""

    def __init__(self, directory: Path):
        self._directory = directory

    def read(self, iteration: int, draw: int, sampled_by: str) -> list[Judged] | None:
        """Those of a draw that the parameters with this fingerprint sampled; None without any."""
        for file in self._directory.glob(f"{_name(iteration, draw, sampled_by)}-*.jsonl"):
            if file.stem.endswith(f"-{sha256_of(file)[:12]}"):
                return read_jsonl(file, Judged)
            print(f"{file} is damaged: its judgments are sampled again", file=sys.stderr)
        return None

    def write(self, iteration: int, draw: int, sampled_by: str, groups: list[Judged]) -> None:
        """A draw, whole or not at all."""
        if hosts.is_first():
            text = "".join(to_json(group) + "\n" for group in groups)
            digest = hashlib.sha256(text.encode()).hexdigest()[:12]
            name = f"{_name(iteration, draw, sampled_by)}-{digest}.jsonl"
            atomic_write(self._directory / name, text)

    def forget_before(self, iteration: int) -> None:
        """Remove what a checkpoint of this step has made part of the parameters."""
        for file in self._directory.glob("*-draw*.jsonl") if hosts.is_first() else ():
            if int(file.name.partition("-")[0]) < iteration:
                file.unlink()


def _name(iteration: int, draw: int, sampled_by: str) -> str:
    return f"{iteration:06d}-draw{draw}-{sampled_by}"

"""Rollouts that are sampled but in no checkpoint yet. A killed run reads them when it resumes.

    <run_dir>/rollout_cache/000012-draw0-9f86d081884c-60303ae22b99.npz
                            iteration, draw, param hash, checksum of the file

Rollouts are used again only if the parameters equal those that sampled them in every bit. A file
with another checksum is damaged and counts as missing. A killed run leaves whole files, and resumes
to the same bytes. A run that is asked to stop leaves the rows that have ended. When it resumes, it
samples the other rows in other batches. So their log-probs may differ in the last digits, and so
may a token whose draw was that close to another one.

All processes hold all rows; the primary process writes.
"""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stepwiser_jax.checksums import sha256_of
from stepwiser_jax.distributed import hosts
from stepwiser_jax.record_io import replacing


class SampledRow(NamedTuple):
    """What one row sampled: token ids, end token included, and their log-probs."""

    tokens: np.ndarray
    logprobs: np.ndarray


class RolloutCache:
    """The files with the rows of iterations after the last complete checkpoint."""

    def __init__(self, directory: Path):
        self._directory = directory

    def read(self, iteration: int, draw: int, param_hash: str) -> dict[str, SampledRow]:
        """Returns the rows that the parameters with this hash sampled, by id; {} if there are
        none."""
        for file in self._directory.glob(f"{_name(iteration, draw, param_hash)}-*.npz"):
            if not file.stem.endswith(f"-{sha256_of(file)[:12]}"):
                print(f"{file} is damaged: its rollouts are sampled again", file=sys.stderr)
                continue
            with np.load(file) as arrays:
                ends = np.cumsum(arrays["lengths"])[:-1]
                tokens, logprobs = (np.split(arrays[n], ends) for n in ("tokens", "logprobs"))
                ids = arrays["row_ids"].tolist()
            return dict(zip(ids, map(SampledRow, tokens, logprobs), strict=True))
        return {}

    def write(
        self, iteration: int, draw: int, param_hash: str, rows: dict[str, SampledRow]
    ) -> None:
        """Writes these rows in place of those of the same name, whole or not at all."""
        if not rows or not hosts.is_primary():
            return
        name, ids = _name(iteration, draw, param_hash), sorted(rows)
        buffer = io.BytesIO()
        np.savez(
            buffer,
            row_ids=np.array(ids),
            lengths=np.array([len(rows[row_id].tokens) for row_id in ids], np.int32),
            tokens=np.concatenate([rows[row_id].tokens for row_id in ids]),
            logprobs=np.concatenate([rows[row_id].logprobs for row_id in ids]),
        )
        content = buffer.getvalue()
        old = list(self._directory.glob(f"{name}-*.npz"))
        new = self._directory / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}.npz"
        with replacing(new) as file:
            file.write(content)
        for file in old:
            if file != new:
                file.unlink()

    def forget_before(self, iteration: int) -> None:
        """Removes the rows that a checkpoint after `iteration` iterations has learned from, and
        half-written files."""
        for file in self._directory.glob("*-draw*") if hosts.is_primary() else ():
            if file.suffix == ".tmp" or int(file.name.partition("-")[0]) < iteration:
                file.unlink()


def _name(iteration: int, draw: int, param_hash: str) -> str:
    return f"{iteration:06d}-draw{draw}-{param_hash}"

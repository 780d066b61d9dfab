"""Groups that are sampled but not yet part of a checkpoint: a killed run reads them again.

    <run_dir>/pending/000012-draw0-9f86d081884c-share1of4.jsonl

A share is what one process samples of a draw. Its name says for which iteration it was sampled, and
by which parameters: those of a file are used again only by the same parameters, to the bit, however
a run came back to them. Every process looks for itself, since none needs another to sample.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepwiser_jax.records import Judged, read_jsonl, write_records


class PendingGroups:
    """The groups of iterations behind the last complete checkpoint."""

    def __init__(self, directory: Path):
        self._directory = directory

    def read(self, iteration: int, draw: int, sampled_by: str) -> dict[str, Judged]:
        """By id, those of a draw that the parameters with this fingerprint sampled."""
        shares = self._directory.glob(f"{_name(iteration, draw, sampled_by)}-share*.jsonl")
        return {group.group_id: group for share in shares for group in read_jsonl(share, Judged)}

    def write(self, iteration: int, draw: int, sampled_by: str, groups: list[Judged]) -> None:
        """This process's share of a draw, whole or not at all."""
        share = f"share{jax.process_index()}of{jax.process_count()}"
        name = f"{_name(iteration, draw, sampled_by)}-{share}.jsonl"
        write_records(self._directory / name, groups)

    def forget_before(self, iteration: int) -> None:
        """Remove what a checkpoint of this step has made part of the parameters."""
        for share in self._directory.glob("*-draw*-share*.jsonl"):
            if int(share.name.partition("-")[0]) < iteration:
                share.unlink(missing_ok=True)  # another process may have been first


def _name(iteration: int, draw: int, sampled_by: str) -> str:
    return f"{iteration:06d}-draw{draw}-{sampled_by}"


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

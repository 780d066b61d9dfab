"""Saves train state, loader position and counters together, as Orbax checkpoints.

The last ones are kept, and the one that is named as the best.

A save is finished or absent. If a model has adapters, only these are saved: the base does not
change.

Orbax and tensorstore have checksums over their own metadata, but not over arrays. So a checksum of
each array is saved too, and compared with that of the array that was read. It is a sum on the
devices that hold the array: it costs one pass over their memory, reads nothing twice, and is the
same on every mesh, so every process checks what all of them have read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from stepwiser_jax.checksums import seal_fits, sealed
from stepwiser_jax.distributed.fingerprints import sums_of_bits
from stepwiser_jax.errors import UserError
from stepwiser_jax.model.lora import trainable, with_trainable
from stepwiser_jax.training.step import TrainState

HOST_STATE = ("loader", "validation")
"""What a checkpoint may hold beside arrays."""


@dataclasses.dataclass
class _LastAndBest:
    """What Orbax asks which checkpoints to keep: the last ones and the best one."""

    last: int
    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        return [step in steps[-self.last :] or step == self.best for step in steps]


class Checkpointer:
    """The checkpoints of a run, saved in the background. After a kill each is complete or
    absent."""

    def __init__(self, directory: Path, *, keep: int = 2):
        self._directory, self._kept = directory, _LastAndBest(keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=self._kept)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def complete_step(self) -> int | None:
        """Returns the newest step that is on disk as a whole: a save gets its name last."""
        names = (path.name for path in self._directory.iterdir())
        return max((int(name) for name in names if name.isdigit()), default=None)

    def save(
        self, step: int, state: TrainState, host_state: dict[str, Any], *, best: int | None = None
    ) -> None:
        """Saves a step. Older ones go when it is on disk, but not the step `best`.

        `host_state` is JSON: the loader's position as `loader`, and, if the training is validated,
        `validation`."""
        self._kept.best = best
        parts = {
            "model": trainable(state.model),
            "rest": (state.opt_state, state.step, state.skipped),
        }
        sums = {name: checksums_of(tree) for name, tree in parts.items()}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                host=ocp.args.JsonSave(sealed(host_state | {"sums": sums})),
                **{name: ocp.args.StandardSave(tree) for name, tree in parts.items()},
            ),
        )

    def restore(self, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the newest save, bit for bit, with the shapes and shardings of `template`.

        Raises UserError if a part of it is missing, cannot be read, or is not what was saved.
        """
        step = self._manager.latest_step()
        rest = (template.opt_state, template.step, template.skipped)
        host = self._restore_host(step)
        model = self._restore_tree(step, "model", trainable(template.model), host)
        rest = self._restore_tree(step, "rest", rest, host)
        host_state = {name: host[name] for name in host if name in HOST_STATE}
        return TrainState(with_trainable(template.model, model), *rest), host_state

    def restore_model(self, template: Any, step: int | None = None) -> Any:
        """Returns the parameters of one save, by default the newest.

        `template` is an abstract or real model. If it has adapters, their base is the template's.

        Raises UserError if there is no such save, or its model is not what was saved.
        """
        steps = sorted(self._manager.all_steps())
        wanted = step if step is not None else self._manager.latest_step()
        if wanted not in steps:
            raise UserError(
                f"expected checkpoint {'of any step' if step is None else step} in "
                f"{self._directory}, found the steps {steps}"
            )
        host = self._restore_host(wanted)
        restored = self._restore_tree(wanted, "model", trainable(template), host)
        return with_trainable(template, restored)

    def _restore_host(self, step: int | None) -> dict[str, Any]:
        host = self._restore(step, "host", ocp.args.JsonRestore())
        names = set(host) - {"sums", "sha256"}
        if "loader" not in names or not names <= set(HOST_STATE):  # or a bit of a name was flipped
            raise self._damaged(step, "host", f"expected the loader's state, found {sorted(names)}")
        if not seal_fits(host):
            raise self._damaged(step, "host", "it is not what was saved")
        return host

    def _restore_tree(self, step: int | None, part: str, like: Any, host: dict[str, Any]) -> Any:
        tree = self._restore(step, part, ocp.args.StandardRestore(_abstract(like)))
        saved = host["sums"][part] if "sums" in host else None  # older saves have none
        if saved is not None and (found := checksums_of(tree)) != saved:
            names = [name for name in found if saved.get(name) != found[name]]
            raise self._damaged(step, part, f"not what was saved: {', '.join(names)}")
        return tree

    def _restore(self, step: int | None, part: str, how: Any) -> Any:
        try:
            args = ocp.args.Composite(**{part: how})
            return self._manager.restore(step, args=args)[part]
        except Exception as error:  # Orbax raises many types for what it cannot read
            raise self._damaged(step, part, str(error)) from error

    def _damaged(self, step: int | None, part: str, reason: str) -> UserError:
        before = [found for found in sorted(self._manager.all_steps()) if found != step]
        go_on = f"go on from step {before[-1]}" if before else "begin again: there is no other step"
        return UserError(
            f"the part {part!r} of the checkpoint {self._directory / str(step)} cannot be read "
            f"({' '.join(reason.split())[:200]}): where it is missing or damaged put it back, or "
            f"delete that directory to {go_on}"
        )

    def wait(self) -> None:
        """Waits until every save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()


def checksums_of(tree: Any) -> dict[str, int]:
    """Returns a sum of bits for each array of a tree, by name. All processes must call it."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)]
    return dict(zip(names, np.asarray(sums_of_bits(tree)).tolist(), strict=True))


def _abstract(tree: Any) -> Any:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)

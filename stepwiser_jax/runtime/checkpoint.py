"""Orbax checkpoints: train state, loader position and counters in one save, finished or absent. Of
a model with adapters these are saved, and not the base, which stays what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from stepwiser_jax.model.lora import trained_part, with_trained
from stepwiser_jax.records import UserError
from stepwiser_jax.runtime.trainer import TrainState


class Checkpointer:
    """Saves in the background; after a kill a save is either complete or not there."""

    def __init__(self, directory: Path, *, keep: int = 2):
        self._directory = directory
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def complete_step(self) -> int | None:
        """The newest step that is on disk as a whole: a save gets its name last."""
        names = (path.name for path in self._directory.iterdir())
        return max((int(name) for name in names if name.isdigit()), default=None)

    def save(self, step: int, state: TrainState, host_state: dict[str, Any]) -> None:
        """`host_state` is JSON, with the loader's position as `loader`."""
        rest = (state.opt_state, state.step, state.skipped)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(trained_part(state.model)),
                rest=ocp.args.StandardSave(rest),
                host=ocp.args.JsonSave(host_state),
            ),
        )

    def restore(self, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest save, bit for bit, with the shapes and shardings of `template`.

        Raises UserError where a part of it is missing or cannot be read.
        """
        step = self._manager.latest_step()
        rest = (template.opt_state, template.step, template.skipped)
        host = self._restore(step, "host", ocp.args.JsonRestore())
        if "loader" not in host:
            raise self._damaged(step, "host", f"expected the loader's state, found {sorted(host)}")
        trained = _abstract(trained_part(template.model))
        model = self._restore(step, "model", ocp.args.StandardRestore(trained))
        rest = self._restore(step, "rest", ocp.args.StandardRestore(_abstract(rest)))
        return TrainState(with_trained(template.model, model), *rest), host

    def restore_model(self, template: Any, step: int | None = None) -> Any:
        """The parameters of one save (the newest by default). `template`: abstract or real model;
        with adapters, their base is the template's.

        Raises UserError where there is no such save.
        """
        steps = sorted(self._manager.all_steps())
        wanted = step if step is not None else self._manager.latest_step()
        if wanted not in steps:
            raise UserError(
                f"expected checkpoint {'of any step' if step is None else step} in "
                f"{self._directory}, found the steps {steps}"
            )
        trained = _abstract(trained_part(template))
        restored = self._restore(wanted, "model", ocp.args.StandardRestore(trained))
        return with_trained(template, restored)

    def _restore(self, step: int | None, part: str, how: Any) -> Any:
        try:
            args = ocp.args.Composite(**{part: how})
            return self._manager.restore(step, args=args)[part]
        except Exception as error:  # Orbax has no type of its own for what it cannot read
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
        """Until every save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _abstract(tree: Any) -> Any:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)

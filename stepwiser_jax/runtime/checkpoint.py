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

    def save(self, step: int, state: TrainState, host_state: dict[str, Any]) -> None:
        """`host_state` is JSON: loader position and counters."""
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
        """The newest save, bit for bit, with the shapes and shardings of `template`."""
        rest = (template.opt_state, template.step, template.skipped)
        restored = self._manager.restore(
            self._manager.latest_step(),
            args=ocp.args.Composite(
                model=ocp.args.StandardRestore(_abstract(trained_part(template.model))),
                rest=ocp.args.StandardRestore(_abstract(rest)),
                host=ocp.args.JsonRestore(),
            ),
        )
        model = with_trained(template.model, restored["model"])
        return TrainState(model, *restored["rest"]), restored["host"]

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
        restored = self._manager.restore(
            wanted,
            args=ocp.args.Composite(
                model=ocp.args.StandardRestore(_abstract(trained_part(template)))
            ),
        )
        return with_trained(template, restored["model"])

    def wait(self) -> None:
        """Until every save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _abstract(tree: Any) -> Any:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)

"""Runs a training: starts or resumes it, logs, checkpoints, stops, and exports the model.

<run_dir>/template/       see `training.template`
<run_dir>/checkpoints/    train state and loader position, together (Orbax)
<run_dir>/model/          the finished model as a Hugging Face directory
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax

from stepwiser_jax.config import Training
from stepwiser_jax.distributed import hosts
from stepwiser_jax.distributed.loading import Loaded
from stepwiser_jax.distributed.mesh import shard_batch
from stepwiser_jax.errors import UserError
from stepwiser_jax.model.hf import non_finite, save_hf
from stepwiser_jax.runs import compilation
from stepwiser_jax.runs.directory import RunDirectory, per_item
from stepwiser_jax.runs.progress import progress, say
from stepwiser_jax.runs.signals import Interrupted, install_signal_handlers, stop
from stepwiser_jax.training.batches import Loader
from stepwiser_jax.training.checkpoint import Checkpointer
from stepwiser_jax.training.optimizer import make_optimizer, make_schedule
from stepwiser_jax.training.step import Loss, Metrics, create_train_state, make_train_step
from stepwiser_jax.training.template import write_template
from stepwiser_jax.training.validation import Measurements

MAX_SKIPPED_IN_A_ROW = 5
"""A run ends after this number of iterations in a row whose updates were all skipped."""

KEEP_CHECKPOINTS = 2


class TrainingRun:
    """The state of a training stage, and what happens to it between two iterations.

    An iteration of RL samples rollouts and makes updates on them; elsewhere it is one update. The
    loop is `fit`, or a stage's own inside `with run:`, which saves the state after the last
    iteration when the run is asked to stop.
    """

    def __init__(
        self,
        directory: RunDirectory,
        loaded: Loaded,
        mesh: jax.sharding.Mesh,
        settings: Training,
        *,
        total_updates: int,
        loader: Loader[Any],
        loss_fn: Loss,
        normalizer_fn: Callable[[Any], Any],
        validation: Measurements | None = None,
    ):
        """Starts at iteration 0, or resumes from the last checkpoint.

        Args:
            directory: The directory of the run.
            loaded: The model to train, whose arrays the first update consumes.
            mesh: The devices that train.
            settings: The settings that all training stages share.
            total_updates: The length of the learning rate's schedule.
            loader: Gives the data of the iterations; its position is saved.
            loss_fn: See `step.make_train_step`.
            normalizer_fn: See `step.make_train_step`.
            validation: Measures the model while it trains; what it knows is saved.

        Raises:
            UserError: The adapters of a checkpoint belong to another model, or it is damaged.
        """
        self.settings, self.loader, self.mesh, self._loaded = settings, loader, mesh, loaded
        schedule = make_schedule(settings.optimizer, total_updates)
        optimizer = make_optimizer(settings.optimizer, schedule)
        self.state = create_train_state(loaded.model, optimizer, mesh)
        self._train_step = make_train_step(
            loss_fn,
            normalizer_fn,
            optimizer,
            schedule,
            micro_batches=settings.micro_batches,
            like=self.state,
        )
        self._directory = directory
        write_template(directory.create() / "template", loaded)
        install_signal_handlers()
        self._checkpointer = Checkpointer(directory.path / "checkpoints", keep=KEEP_CHECKPOINTS)
        self._validation = validation
        self.iteration = 0
        self._unlogged: tuple[int, dict[str, Any]] | None = None
        self._restore()
        self._loader_state = loader.get_state()
        self._metrics = directory.metrics()
        logged = self.iteration - 1 if self._awaits_validation else self.iteration
        self.last_metrics = self._metrics.resume_at(logged)
        self._skipped_in_a_row = 0

    def _restore(self) -> None:
        latest = self._checkpointer.latest_step()
        if latest is not None:
            self.state, host_state = self._checkpointer.restore(self.state)
            self.loader.set_state(host_state["loader"])
            self.iteration = latest
            if self._validation is not None:
                state = host_state["validation"]
                self._validation.set_state(state)
                self._unlogged = None if state["unlogged"] is None else (latest, state["unlogged"])
            say(f"{self._directory.stage}: goes on from the checkpoint of step {latest}")

    # --- the loop -------------------------------------------------------------------------------

    @property
    def _awaits_validation(self) -> bool:
        """Whether a measurement is still to be added to the metrics of the last iteration."""
        return self._validation is not None and self._validation.is_due(self.iteration)

    def validate(self) -> None:
        """Measures the model on held-out examples, if that is due. If it is the best so far, it is
        saved. Call it before the first iteration; `finish_iteration` does it after the others.

        Raises:
            Interrupted: The run was asked to stop. It goes on with this measurement.
        """
        if self._validation is None or not self._awaits_validation:
            return
        metrics = self._validation.metrics_of(self.state.model, self.iteration)
        _, of_iteration = self._unlogged or (0, {})
        self._unlogged = (self.iteration, of_iteration | metrics)
        if self._validation.best_iteration == self.iteration:
            self.save()

    def fit(self, steps: int) -> float | None:
        """Makes an update with each batch of the loader, up to step `steps`. Returns seconds per
        step, None if no step was left."""
        start, began = self.iteration, time.perf_counter()
        stage, keep = self._directory.stage, self._directory.keep
        with jax.set_mesh(self.mesh), self, progress(stage, "step", steps, start, keep) as bar:
            self.validate()
            for step in range(start, steps):
                metrics = self.update(shard_batch(next(self.loader), self.mesh))
                self.finish_iteration(step + 1, metrics)
                named = [n for n in ("loss", "accuracy", "grad_norm") if n in self.last_metrics]
                bar.advance(**{name: self.last_metrics[name] for name in named[:2]})
        self.log_last()
        return per_item(time.perf_counter() - began, steps - start)

    def update(self, batch: Any) -> Metrics:
        """Updates the state with one batch that is on the mesh. Returns metrics on the device."""
        rows, length = batch.tokens_BT.shape
        with compilation.compiling(f"train step {rows}x{length}"):
            self.state, metrics = self._train_step(self.state, batch)
        return metrics

    def finish_iteration(self, iteration: int, metrics: dict[str, Any]) -> None:
        """Logs the iteration before this one, measures the model and saves it when that is due, and
        stops if asked.

        Metrics are logged one iteration later, when they are on the host, so the host never waits
        for the device.

        Raises:
            Interrupted: The run was asked to stop.
            UserError: Too many updates in a row were skipped.
        """
        self.log_last()
        self._unlogged = (iteration, metrics)
        self.iteration, self._loader_state = iteration, self.loader.get_state()
        self.validate()
        if iteration % self.settings.checkpoint_every == 0:
            self.save()
        if hosts.all_stop_here(stop.requested):
            raise Interrupted

    def __enter__(self) -> None:
        pass

    def __exit__(self, error_type: type[BaseException] | None, *_: Any) -> None:
        if error_type is Interrupted:
            self.save(wait=True)
            hosts.barrier("the run is stopped")  # a process that left looks like one that died

    def save(self, *, wait: bool = False) -> None:
        """Saves the last state, unless that is done. With `wait` it waits for the disk."""
        if not self._awaits_validation:
            self.log_last()
        if self._checkpointer.latest_step() != self.iteration:
            self._metrics.sync()
            host_state: dict[str, Any] = {"loader": self._loader_state}
            best = None
            if self._validation is not None:
                unlogged = None if self._unlogged is None else _on_host(self._unlogged[1])
                host_state["validation"] = {**self._validation.get_state(), "unlogged": unlogged}
                best = self._validation.best_iteration
            self._checkpointer.save(self.iteration, self.state, host_state, best=best)
            say(f"{self._directory.stage}: checkpoint of step {self.iteration}")
        if wait:
            self._checkpointer.wait()

    @property
    def saved_iteration(self) -> int:
        """Returns the iteration of the newest checkpoint that is on disk as a whole."""
        return self._checkpointer.complete_step() or 0

    def log_last(self) -> None:
        """Fetches and logs the metrics that `finish_iteration` got last."""
        if self._unlogged is None:
            return
        (iteration, metrics), self._unlogged = self._unlogged, None
        self.last_metrics = _on_host(metrics)
        self._metrics.write(iteration, self.last_metrics)
        skipped = int(self.last_metrics.get("skipped", 0))
        all_skipped = skipped == self.last_metrics.get("updates", 1)  # RL makes several, or none
        self._skipped_in_a_row = self._skipped_in_a_row + skipped if all_skipped else 0
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"{self._skipped_in_a_row} updates in a row had non-finite gradients (last at step "
                f"{iteration}); the parameters are those before them: lower the learning rate"
            )

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Saves the last state, exports its model or the best one, and finishes the run.

        Raises:
            UserError: A parameter is not finite.
        """
        self.log_last()
        if names := non_finite(self.state.model):
            raise UserError(
                f"expected finite parameters after step {self.iteration}, found others in "
                f"{', '.join(names)}: lower "
                "training.optimizer.learning_rate, in a new run directory"
            )
        self.save(wait=True)
        model = self.state.model
        if self._validation is not None:
            iteration = self._validation.exported_at(self.iteration)
            if iteration != self.iteration:
                model = self._checkpointer.restore_model(model, iteration)
            summary = summary | {"validation": self._validation.summary(iteration)}
        self._checkpointer.close()
        self._metrics.close()
        exported = self._directory.path / "model"
        save_hf(model, self._loaded.tokenizer, str(exported))
        say(f"{self._directory.stage}: exported {exported}")
        return self._directory.finish(lambda: summary)


def _on_host(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(metrics).items()}


def say_length(stage: str, epochs: int | None, examples: int, length: str) -> None:
    """Prints how long `epochs` of this many examples are, if the training is given in epochs."""
    if epochs is not None:
        say(f"{stage}: {epochs} epochs of {examples} examples are {length}")


def say_held_out(stage: str, held_out: int, left_out: int) -> None:
    """Prints how many examples validate, if there are any, and what that costs the training."""
    if held_out:
        say(
            f"{stage}: {held_out} examples validate; {left_out} examples of their problems are "
            "left out of the training"
        )

"""What stages that train share around their loops: start or resume, log, checkpoint, stop, export.

<run_dir>/template/       config.json and tokenizer: what `stepwiser convert` needs beside weights;
                          with adapters, base.json: the model that they belong to
<run_dir>/checkpoints/    train state and loader position, together (Orbax)
<run_dir>/pending/        what a judge has sampled since the last of them
<run_dir>/model/          the finished model as a Hugging Face directory
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jax
import optax

from stepwiser_jax.checksums import check_files, read_checksums, write_checksums
from stepwiser_jax.config import Training
from stepwiser_jax.distributed import hosts
from stepwiser_jax.distributed.loading import Loaded
from stepwiser_jax.distributed.mesh import shard_batch
from stepwiser_jax.errors import UserError
from stepwiser_jax.model.hf import non_finite, save_hf
from stepwiser_jax.record_io import atomic_write
from stepwiser_jax.rl.rollout_cache import RolloutCache
from stepwiser_jax.runs import compilation
from stepwiser_jax.runs.directory import RunDirectory, per_item
from stepwiser_jax.runs.progress import progress, say
from stepwiser_jax.runs.signals import Interrupted, install_signal_handlers, stop
from stepwiser_jax.training.checkpoint import Checkpointer
from stepwiser_jax.training.step import create_train_state, make_optimizer, make_schedule

KEEP_CHECKPOINTS = 2
MAX_SKIPPED_IN_A_ROW = 5
"""Updates in a row with gradients that are not finite after which training stops."""


class Loader(Protocol):
    """A Grain iterator: its state is saved with every checkpoint."""

    def __next__(self) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


def optimizer_of(
    settings: Training, total_updates: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The learning rate's schedule, and the optimizer that follows it."""
    optimizer = settings.optimizer
    schedule = make_schedule(
        learning_rate=optimizer.learning_rate,
        schedule=optimizer.schedule,
        warmup_steps=optimizer.warmup_steps,
        end_fraction=optimizer.end_fraction,
        total_steps=total_updates,
    )
    return schedule, make_optimizer(
        schedule,
        weight_decay=optimizer.weight_decay,
        clip_norm=1.0,
        b1=0.9,
        b2=optimizer.b2,
    )


def tell_length(stage: str, epochs: int | None, examples: int, length: str) -> None:
    """Says what `epochs` of this many examples have become, if the training is given in epochs."""
    if epochs is not None:
        say(f"{stage}: {epochs} epochs of {examples} examples are {length}")


def check_base(template: Path, model_id: str) -> None:
    """Adapters fit the model that they were trained on. Raises UserError where a run's are of one
    with another id."""
    file = template / "base.json"
    if not file.is_file():
        return
    sums = read_checksums(template)
    check_files(template, {file.name} & sums.keys(), sums)
    found = json.loads(file.read_text(encoding="utf-8"))["model_id"]
    if found != model_id:
        raise UserError(
            f"the adapters of {template.parent} were trained on {found}, model.path now holds "
            f"{model_id}: put that model back, or name a new run directory"
        )


class TrainingRun:
    """The state of a training stage and everything that happens to it between two steps."""

    def __init__(
        self,
        directory: RunDirectory,
        loaded: Loaded,
        mesh: jax.sharding.Mesh,
        settings: Training,
        *,
        total_updates: int,
        loader: Loader,
    ):
        self.settings, self.loader, self._loaded = settings, loader, loaded
        self.schedule, self.optimizer = optimizer_of(settings, total_updates)
        self.state = create_train_state(loaded.model, self.optimizer, mesh)
        self._directory = directory
        self._write_template()
        install_signal_handlers()
        self._checkpointer = Checkpointer(directory.path / "checkpoints", keep=KEEP_CHECKPOINTS)
        self.pending = RolloutCache(directory.path / "pending")
        self.step = 0
        self._restore()
        self._loader_state = loader.get_state()
        self._metrics = directory.metrics()
        self.last_metrics = self._metrics.resume_at(self.step)
        self._unlogged: tuple[int, dict[str, Any]] | None = None
        self._skipped_in_a_row = 0

    def _write_template(self) -> None:
        template = self._directory.create() / "template"
        if self._loaded.model.adapters:
            check_base(template, self._loaded.model_id)
        if not hosts.is_primary():
            return
        config = self._loaded.model.config.to_hf()
        atomic_write(template / "config.json", json.dumps(config, indent=2) + "\n")
        self._loaded.tokenizer.save(str(template))
        if self._loaded.model.adapters:
            base = {"model_id": self._loaded.model_id}
            atomic_write(template / "base.json", json.dumps(base) + "\n")
        write_checksums(template)

    def _restore(self) -> None:
        latest = self._checkpointer.latest_step()
        if latest is not None:
            self.state, host_state = self._checkpointer.restore(self.state)
            self.loader.set_state(host_state["loader"])
            self.step = latest
            say(f"{self._directory.stage}: goes on from the checkpoint of step {latest}")

    def fit(self, train_step: Any, steps: int, mesh: jax.sharding.Mesh, shape: str) -> float | None:
        """One update for each batch of the loader, up to step `steps`; returns seconds a step, None
        where all were done. `shape` names the program that is compiled."""
        start, began = self.step, time.perf_counter()
        with jax.set_mesh(mesh), progress(self._directory.stage, "step", steps, start) as told:
            for step in range(start, steps):
                batch = shard_batch(next(self.loader), mesh)
                with compilation.compiling(f"train step {shape}"):
                    self.state, metrics = train_step(self.state, batch)
                self.finish_step(step + 1, metrics)
                told.advance(**self.newest("loss", "accuracy", "grad_norm"))
        self.flush()
        return per_item(time.perf_counter() - began, steps - start)

    def finish_step(self, step: int, metrics: dict[str, Any]) -> None:
        """Log the step before this one (its values are on the host by now), then save when due."""
        self.flush()
        self._unlogged = (step, metrics)
        self.step, self._loader_state = step, self.loader.get_state()
        if step % self.settings.checkpoint_every == 0:
            self.save()
        self.stop_if_asked()
        self._forget_pending()

    def stop_if_asked(self) -> None:
        """Stop, if all processes stop here. They must call this at the same points."""
        if hosts.all_stop_here(stop.requested):
            self.stop()

    def stop(self) -> NoReturn:
        """Save the state after the last step and raise Interrupted."""
        self.save()
        self._checkpointer.wait()
        hosts.barrier("the run is stopped")  # one that has left would look like one that died
        raise Interrupted

    def save(self) -> None:
        """Save the state after the last step, unless that is done."""
        self.flush()
        if self._checkpointer.latest_step() != self.step:
            self._metrics.sync()
            self._checkpointer.save(self.step, self.state, {"loader": self._loader_state})
            say(f"{self._directory.stage}: checkpoint of step {self.step}")

    def _forget_pending(self) -> None:
        self.pending.forget_before(self._checkpointer.complete_step() or 0)

    def flush(self) -> None:
        """Fetch and log the metrics of the last dispatched step."""
        if self._unlogged is None:
            return
        step, metrics = self._unlogged
        self._unlogged = None
        self.last_metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._metrics.write(step, self.last_metrics)
        skipped = int(self.last_metrics.get("skipped", 0))
        if skipped == self.last_metrics.get("updates", 1):  # of a judge's iteration: none, or some
            self._skipped_in_a_row += skipped
        else:
            self._skipped_in_a_row = 0
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"{self._skipped_in_a_row} updates in a row had non-finite gradients (last at step "
                f"{step}); the parameters are those before them. Lower the learning rate, or raise "
                "training.max_skipped_in_a_row"
            )

    def last(self, name: str) -> float:
        """The newest logged value of a metric; nan before the first."""
        return self.last_metrics.get(name, float("nan"))

    def newest(self, *names: str) -> dict[str, float]:
        """The first two of these metrics that there are, of the newest step that is logged."""
        found = {name: self.last_metrics[name] for name in names if name in self.last_metrics}
        return dict(list(found.items())[:2])

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Save the last state, export the model, and finish the run. Raises UserError where a
        parameter is not finite."""
        self.flush()
        if names := non_finite(self.state.model):
            raise UserError(
                f"expected finite parameters after step {self.step}, found others in "
                f"{', '.join(names)}: lower "
                "training.optimizer.learning_rate, in a new run directory"
            )
        self.save()
        self._checkpointer.close()
        self._forget_pending()
        self._metrics.close()
        exported = self._directory.path / "model"
        save_hf(self.state.model, self._loaded.tokenizer, str(exported))
        say(f"{self._directory.stage}: exported {exported}")
        return self._directory.finish(lambda: summary)

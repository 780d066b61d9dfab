"""Measures a model in training on held-out examples, and remembers which measurement was the best.

The metrics of a measurement stand beside those of the iteration that it follows, as
`validation/<name>`. They depend on the parameters alone, so a run that resumes measures the same.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stepwiser_jax import config
from stepwiser_jax.distributed.mesh import shard_batch
from stepwiser_jax.training.batches import Document, TokenBatch, first_fit, pack_documents
from stepwiser_jax.training.step import Loss


@dataclasses.dataclass
class Measurements:
    """The measurements of a run: before its first iteration, after every `every` of them, and after
    the last.

    Attributes:
        settings: When to measure, and which model to export.
        last: The last iteration.
        measure: Returns the metrics of a model.
        criterion: The metric that says which measurement is the best: the lowest loss, the highest
            value of any other. The earliest of equal ones is the best. A measurement without it,
            or with one that is not finite, is never the best.
        examples: Counts of the examples, for the summary.
        measured: The iteration of the newest measurement.
        best_iteration: That of the best one.
        best: Its value of the criterion.
    """

    settings: config.Validation
    last: int
    measure: Callable[[Any], dict[str, float]]
    criterion: str
    examples: dict[str, Any]
    measured: int | None = None
    best_iteration: int | None = None
    best: float | None = None

    def is_due(self, iteration: int) -> bool:
        """Returns whether the measurement after this iteration is still to be made."""
        wanted = iteration % self.settings.every == 0 or iteration == self.last
        return wanted and self.measured != iteration

    def metrics_of(self, model: Any, iteration: int) -> dict[str, float]:
        """Measures the model after an iteration. Returns metrics by their full names."""
        metrics = self.measure(model)
        value, sign = metrics.get(self.criterion, math.nan), -1 if self.criterion == "loss" else 1
        self.measured = iteration
        if math.isfinite(value) and (self.best is None or sign * value > sign * self.best):
            self.best_iteration, self.best = iteration, value
        return {f"validation/{name}": metric for name, metric in metrics.items()}

    def get_state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds of the measurements so far."""
        return {name: getattr(self, name) for name in ("measured", "best_iteration", "best")}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from the measurements that a checkpoint knows of."""
        for name in self.get_state():
            setattr(self, name, state[name])

    def exported_at(self, last: int) -> int:
        """Returns the iteration whose model is exported after the `last` one: that, or the best."""
        if self.settings.export == "last" or self.best_iteration is None:
            return last
        return self.best_iteration

    def summary(self, exported: int) -> dict[str, Any]:
        """Returns what the summary says of a run that exported the model after an iteration."""
        best = {"best_iteration": self.best_iteration, f"best_{self.criterion}": self.best}
        return self.examples | best | {"exported_iteration": exported}


def packed_batches(
    documents: Sequence[Document], num_rows: int, row_length: int
) -> list[TokenBatch]:
    """Returns batches that hold every document once, in order."""
    blocks = first_fit(documents, lambda d: len(d.tokens_T), row_length, num_rows)
    return [pack_documents(rows, num_rows, row_length) for rows in blocks]


def mean_loss(
    model: Any, batches: Sequence[TokenBatch], loss_fn: Loss, mesh: jax.sharding.Mesh
) -> float:
    """Returns the mean loss of all learned tokens, on each of which it is a sum in float64."""
    with jax.set_mesh(mesh):
        sums = [float(_loss_sum(model, shard_batch(batch, mesh), loss_fn)) for batch in batches]
    return math.fsum(sums) / sum(int(batch.target_mask_BT.sum()) for batch in batches)


@functools.partial(jax.jit, static_argnums=2)
def _loss_sum(model: Any, batch: TokenBatch, loss_fn: Loss) -> jax.Array:
    return loss_fn(model, batch, jnp.float32(1))[0]

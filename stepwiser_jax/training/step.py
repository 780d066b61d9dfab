"""The train step: a pure function (state, batch) -> (state, metrics), one dispatch per update.

Gradients, loss and metrics of micro-batches are sums over a normalizer taken from the whole batch,
so they add up exactly, however the batch is cut. An update whose gradients are not finite is
skipped and counted: parameters, moments and the schedule's step stay as they were. If the model has
adapters, gradients, moments and updates are theirs alone (`lora.trainable`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stepwiser_jax.distributed.mesh import put, replicated
from stepwiser_jax.model.lora import trainable, with_trainable

Metrics = dict[str, jax.Array]
Loss = Callable[[Any, Any, Any], tuple[jax.Array, Metrics]]
"""(model, micro-batch, normalizer of the whole batch) -> (loss, metrics)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update changes. `step` counts updates, `skipped` the non-finite ones."""

    model: Any
    opt_state: Any
    step: jax.Array
    skipped: jax.Array


def create_train_state(
    model: Any, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """Returns the state before the first update. Moments are created with the sharding of their
    parameters, never whole on one device."""
    whole, shardings = replicated(mesh), moment_shardings(model, optimizer, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(trainable(model))
    return TrainState(model, opt_state, put(np.int32(0), whole), put(np.int32(0), whole))


def moment_shardings(
    model: Any, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> Any:
    """Returns the optimizer's state with a sharding for each array: that of its parameter."""
    trained = trainable(model)
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, trained),
        jax.tree.map(lambda leaf: leaf.sharding, trained),
        transform_non_params=lambda _: replicated(mesh),
    )


def make_train_step(
    loss_fn: Loss,
    normalizer_fn: Callable[[Any], Any],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    micro_batches: int,
    like: TrainState | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Returns a jitted update that consumes its state.

    Args:
        loss_fn: The loss and metrics of a micro-batch.
        normalizer_fn: What sums are divided by, from the whole batch.
        optimizer: The optimizer, made for `schedule`.
        schedule: The learning rate, for the metrics.
        micro_batches: The number of parts that a batch is cut into, see `split_rows`.
        like: The state, whose shardings the next one has. On a mesh it must be given: otherwise XLA
            splits what is replicated, and the second update is compiled anew.

    Returns:
        (state, batch) -> (state, metrics). Metrics are those of `loss_fn`, summed over
        micro-batches (the largest, if named `*_max`), with `loss`, `grad_norm`, `learning_rate` and
        `skipped` (1 if the update was).
    """
    shardings = None if like is None else jax.tree.map(lambda leaf: leaf.sharding, like)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        grads, metrics = accumulate(loss_fn, normalizer_fn, state.model, batch, micro_batches)
        norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(jnp.asarray(norm))
        trained = trainable(state.model)

        def update() -> tuple[Any, Any]:
            updates, opt_state = optimizer.update(grads, state.opt_state, trained)
            return optax.apply_updates(trained, updates), opt_state

        # The parameters are updated inside the branch: `optax.apply_if_finite` would hold all
        # updates beside them.
        updated, opt_state = jax.lax.cond(is_finite, update, lambda: (trained, state.opt_state))
        skipped = 1 - is_finite.astype(jnp.int32)
        metrics |= {
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
            "skipped": skipped,
        }
        model = with_trainable(state.model, updated)
        return TrainState(model, opt_state, state.step + 1, state.skipped + skipped), metrics

    return train_step


def accumulate(
    loss_fn: Loss,
    normalizer_fn: Callable[[Any], Any],
    model: Any,
    batch: Any,
    micro_batches: int,
) -> tuple[Any, Metrics]:
    """Returns the gradients of what is trained and the metrics of the whole batch.

    It takes one micro-batch at a time; those at the end that are padding take no time. Metrics
    named `*_max` must not be negative.
    """
    normalizer, trained = normalizer_fn(batch), trainable(model)

    def loss_of(trained: Any, rows: Any) -> tuple[jax.Array, Metrics]:
        return loss_fn(with_trainable(model, trained), rows, normalizer)

    if micro_batches == 1:
        (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(trained, batch)
        return grads, metrics | {"loss": loss}
    stacked_U = split_rows(batch, micro_batches)
    # The backward pass adds to these layer by layer. Gradients of one micro-batch, held whole
    # until they are added, took 405 of 1475 MiB beside the state (SmolLM2-135M, float32).
    sums = jax.tree.map(lambda x: jax.new_ref(jnp.zeros(x.shape, x.dtype)), trained)

    def add(u: jax.Array, total: Metrics) -> Metrics:
        rows = jax.tree.map(lambda x: x[u], stacked_U)
        loss, backward, metrics = jax.vjp(
            lambda trained: loss_of(trained, rows), trained, has_aux=True
        )
        backward.with_refs(sums)(jnp.ones_like(loss))
        return _add_metrics(total, metrics | {"loss": loss})

    loss, metrics = jax.eval_shape(loss_of, trained, jax.tree.map(lambda x: x[0], stacked_U))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics | {"loss": loss})
    metrics = jax.lax.fori_loop(0, used_micro_batches(stacked_U), add, zeros)
    return jax.tree.map(jax.freeze, sums), metrics


def used_micro_batches(stacked_U: Any) -> jax.Array:
    """Returns the number of micro-batches that hold tokens. Those after them are padding."""
    is_used_U = jnp.any(stacked_U.segment_ids_BT != 0, axis=(1, 2))
    return jnp.max(jnp.where(is_used_U, jnp.arange(1, is_used_U.shape[0] + 1), 0))


def split_rows(batch: Any, parts: int) -> Any:
    """Reshapes (B, ...) to (parts, B / parts, ...), strided, so that rows stay on their devices."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def join_rows(parts: jax.Array) -> jax.Array:
    """Inverts `split_rows` for one array."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])


def mean_metrics(updates: Sequence[Metrics]) -> Metrics:
    """Returns the means over several updates, the largest of metrics named `*_max`, the sum of
    `skipped`, and the number of `updates`."""
    merged = functools.reduce(_add_metrics, updates) if updates else {}
    mean = {
        name: value if name == "skipped" or name.endswith("_max") else value / len(updates)
        for name, value in merged.items()
    }
    return mean | {"updates": jnp.float32(len(updates))}


def _add_metrics(a: Metrics, b: Metrics) -> Metrics:
    return {
        name: jnp.maximum(a[name], b[name]) if name.endswith("_max") else a[name] + b[name]
        for name in a
    }

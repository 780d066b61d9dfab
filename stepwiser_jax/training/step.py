"""The train step: a pure function (state, batch) -> (state, metrics), one dispatch per update.

Gradients, loss and metrics of micro-batches are sums over a denominator taken from the whole batch,
so they add up exactly, however the batch is cut. An update whose gradients are not finite is
skipped and counted: parameters, moments and the schedule's step stay as they were. Where the model
has adapters, gradients, moments and updates are theirs alone (`lora.trainable`).
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

Loss = Callable[[Any, Any, Any], tuple[jax.Array, dict[str, jax.Array]]]
"""(model, micro-batch, denominator of the whole batch) -> (loss, metrics)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update changes. `skipped` counts non-finite updates."""

    model: Any
    opt_state: Any
    step: jax.Array
    skipped: jax.Array


def make_schedule(
    *, learning_rate: float, schedule: str, warmup_steps: int, total_steps: int, end_fraction: float
) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then constant or a cosine to `end_fraction` of it."""
    if schedule == "constant":
        after = optax.constant_schedule(learning_rate)
    else:
        after = optax.cosine_decay_schedule(
            learning_rate, max(1, total_steps - warmup_steps), alpha=end_fraction
        )
    warmup = optax.linear_schedule(
        learning_rate / max(1, warmup_steps), learning_rate, warmup_steps
    )
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    schedule: optax.Schedule, *, weight_decay: float, clip_norm: float, b1: float, b2: float
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) after clipping by global norm; no weight decay on norms and biases.
    Gradients that are not finite change nothing.

    Clipping, and skipping, are in the scalars of one formula. `optax.chain` of clipping and adamw,
    and a choice between new and old parameters, took 1286 MiB beside the state instead of 1070
    (XLA on CPU, SmolLM2-135M in float32, whose parameters are 513).
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, Any]:
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(jnp.asarray(norm))
        scale = clip_norm / jnp.maximum(norm, clip_norm)
        keep1, keep2 = jnp.where(finite, b1, 1.0), jnp.where(finite, b2, 1.0)
        rate = jnp.where(finite, schedule(state.count), 0.0)
        step = jnp.asarray(state.count + 1, jnp.float32)
        correct1, correct2 = 1 - b1**step, 1 - b2**step

        grads = jax.tree.map(lambda g: jnp.where(finite, g * scale, 0), grads)
        mu = jax.tree.map(lambda m, g: keep1 * m + (1 - keep1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: keep2 * v + (1 - keep2) * g * g, state.nu, grads)

        def delta(m: jax.Array, v: jax.Array, p: jax.Array, decayed: bool) -> jax.Array:
            direction = m / correct1 / (jnp.sqrt(v / correct2) + 1e-8)
            return -rate * (direction + weight_decay * p if decayed else direction)

        updates = jax.tree.map(delta, mu, nu, params, _decayed(params))
        count = state.count + finite.astype(jnp.int32)
        cast = functools.partial(jax.tree.map, lambda new, old: new.astype(old.dtype))
        return updates, optax.ScaleByAdamState(count, cast(mu, state.mu), cast(nu, state.nu))

    return optax.GradientTransformation(init, update)  # pyright: ignore


def _decayed(params: Any) -> Any:
    """True for matrices. The blocks' parameters have a leading axis of layers besides."""

    def is_matrix(path: Any, leaf: jax.Array) -> bool:
        return leaf.ndim - ("blocks" in jax.tree_util.keystr(path)) == 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def create_train_state(
    model: Any, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """Moments are created with the sharding of their parameters, never whole on one device."""
    whole, trained = replicated(mesh), trainable(model)
    shardings = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, trained),
        jax.tree.map(lambda leaf: leaf.sharding, trained),
        transform_non_params=lambda _: whole,
    )
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(trained)
    return TrainState(model, opt_state, put(np.int32(0), whole), put(np.int32(0), whole))


def make_train_step(
    loss_fn: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    micro_batches: int,
    denominator_fn: Callable[[Any], Any],
    like: TrainState | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted optimizer step that consumes its state, and leaves the new one where `like` is. On a
    mesh it must be given: XLA would split what is replicated, and the second step be compiled anew.

    The batch is cut into `micro_batches` along its rows (strided, so that rows stay on their
    devices). Metrics add up over micro-batches, those named `*_max` are maximised. The step adds
    `loss`, `grad_norm`, `learning_rate` and `skipped` (1 where the update was).
    """

    placed = None if like is None else jax.tree.map(lambda leaf: leaf.sharding, like)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(placed, None))
    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, metrics = accumulate(loss_fn, state.model, batch, micro_batches, denominator_fn)
        norm = optax.tree.norm(grads)
        trained = trainable(state.model)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        skipped = 1 - jnp.isfinite(jnp.asarray(norm)).astype(jnp.int32)
        metrics |= {
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
            "skipped": skipped,
        }
        state = TrainState(
            model=with_trainable(state.model, optax.apply_updates(trained, updates)),
            opt_state=opt_state,
            step=state.step + 1,
            skipped=state.skipped + skipped,
        )
        return state, metrics

    return train_step


def accumulate(
    loss_fn: Loss,
    model: Any,
    batch: Any,
    micro_batches: int,
    denominator_fn: Callable[[Any], Any],
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradients of what is trained, and metrics, of the whole batch, one micro-batch at a time;
    those at its end that are padding take no time. Metrics must not be negative where they are
    maximised."""
    denominator, trained = denominator_fn(batch), trainable(model)

    def loss_of(trained: Any, rows: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return loss_fn(with_trainable(model, trained), rows, denominator)

    if micro_batches == 1:
        (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(trained, batch)
        return grads, metrics | {"loss": loss}
    stacked = split_rows(batch, micro_batches)
    # The backward pass adds to these layer by layer. Gradients of one micro-batch, held whole
    # until they are added, took 405 of 1475 MiB beside the state (SmolLM2-135M, float32).
    sums = jax.tree.map(lambda x: jax.new_ref(jnp.zeros(x.shape, x.dtype)), trained)

    def add(i: jax.Array, total: dict[str, jax.Array]) -> dict[str, jax.Array]:
        rows = jax.tree.map(lambda x: x[i], stacked)
        loss, backward, metrics = jax.vjp(
            lambda trained: loss_of(trained, rows), trained, has_aux=True
        )
        backward.with_refs(sums)(jnp.ones_like(loss))
        return _merge(total, metrics | {"loss": loss})

    loss, metrics = jax.eval_shape(loss_of, trained, jax.tree.map(lambda x: x[0], stacked))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics | {"loss": loss})
    metrics = jax.lax.fori_loop(0, used_micro_batches(stacked), add, zeros)
    return jax.tree.map(jax.freeze, sums), metrics


def used_micro_batches(stacked: Any) -> jax.Array:
    """How many of the micro-batches, from the first, hold all tokens: the others are padding."""
    is_used_M = jnp.any(stacked.segment_ids_BT != 0, axis=(1, 2))
    return jnp.max(jnp.where(is_used_M, jnp.arange(1, is_used_M.shape[0] + 1), 0))


def split_rows(batch: Any, parts: int) -> Any:
    """(B, ...) -> (parts, B / parts, ...), strided, so that rows stay on their devices."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def join_rows(parts: jax.Array) -> jax.Array:
    """The inverse of `split_rows` for one array."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])


def mean_metrics(updates: Sequence[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Of several updates: their means, the largest of those named `*_max`, the sum of `skipped`;
    and `updates`, how many they are."""
    merged = {"updates": jnp.float32(len(updates))}
    for name in updates[0] if updates else {}:
        values = [metrics[name] for metrics in updates]
        if name.endswith("_max"):
            merged[name] = functools.reduce(jnp.maximum, values)
        else:
            total = sum(values[1:], values[0])
            merged[name] = total if name == "skipped" else total / len(values)
    return merged


def _merge(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {
        name: jnp.maximum(a[name], b[name]) if name.endswith("_max") else a[name] + b[name]
        for name in a
    }

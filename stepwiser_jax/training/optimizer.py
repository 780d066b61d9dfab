"""AdamW and its learning rate, from optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from stepwiser_jax.config import Optimizer

CLIP_NORM, B1 = 1.0, 0.9
"""The largest global norm of gradients, and the decay of the first moment."""


def make_schedule(settings: Optimizer, total_updates: int) -> optax.Schedule:
    """Returns the learning rate by update: a linear warm-up, then constant or a cosine."""
    if settings.schedule == "constant":
        after = optax.constant_schedule(settings.learning_rate)
    else:
        after = optax.cosine_decay_schedule(
            settings.learning_rate,
            max(1, total_updates - settings.warmup_steps),
            alpha=settings.end_fraction,
        )
    first = settings.learning_rate / max(1, settings.warmup_steps)
    warmup = optax.linear_schedule(first, settings.learning_rate, settings.warmup_steps)
    return optax.join_schedules([warmup, after], [settings.warmup_steps])


def make_optimizer(
    settings: Optimizer, schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW (arXiv 1711.05101) after clipping by the global norm; only matrices decay.

    An update takes 894 MiB beside the state (XLA on CPU; SmolLM2-135M in float32, 513 MiB of
    parameters; 4 micro-batches of 512 tokens), as with one formula for all of it.
    """
    return optax.chain(
        optax.stateless(clip_by_norm),
        optax.adamw(
            schedule,
            b1=B1,
            b2=settings.b2,
            weight_decay=settings.weight_decay,
            mask=decay_mask,
        ),
    )


def clip_by_norm(grads: Any, params: Any = None) -> Any:
    """Scales gradients down to the global norm `CLIP_NORM`, if theirs is larger.

    It multiplies by one number. `optax.clip_by_global_norm` divides each gradient; XLA, which
    repeats no division, then writes all clipped gradients to memory, and AdamW takes twice as long.
    """
    scale = CLIP_NORM / jnp.maximum(optax.tree.norm(grads), CLIP_NORM)
    return jax.tree.map(lambda grad: (grad * scale).astype(grad.dtype), grads)


def decay_mask(params: Any) -> Any:
    """Returns a tree that is True for matrices and False for norms and biases.

    A matrix has two axes besides that of the layers; parameters name their axes.
    """

    def is_matrix(variable: nnx.Variable) -> nnx.Variable:
        axes = [axis for axis in variable.get_metadata("axes") if axis != "layers"]
        return variable.replace(len(axes) == 2)

    return jax.tree.map(is_matrix, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))

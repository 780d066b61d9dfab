"""What an update of a policy minimises: the GRPO loss of packed rollouts, and the old and reference
log-probs that it compares with. The update itself is `training/step.py`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from stepwiser_jax.config import Grpo
from stepwiser_jax.rl.grpo import (
    MAX_IMPORTANCE_WEIGHT,
    Aggregation,
    Correction,
    grpo_loss,
    loss_normalizer,
    truncated_importance_weights,
)
from stepwiser_jax.rl.logprobs import LanguageModel, token_logprobs, token_logprobs_and_entropy
from stepwiser_jax.runs import compilation
from stepwiser_jax.training.batches import RolloutBatch
from stepwiser_jax.training.step import Loss, Metrics, join_rows, split_rows, used_micro_batches

# --- log-probs before the update ----------------------------------------------------------------


def add_old_and_reference_logprobs(
    batch: RolloutBatch,
    policy: LanguageModel | None,
    reference: LanguageModel | None,
    temperature: float,
    *,
    micro_batches: int,
) -> RolloutBatch:
    """Returns the batch with the log-probs that the loss needs of other parameters than those that
    the update changes.

    Args:
        batch: On the mesh.
        policy: The policy before the first of several updates. None: there is one update, whose own
            log-probs are the old ones.
        reference: The model that the KL term pulls to; None without the term.
        temperature: Of sampling.
        micro_batches: See `split_rows`.
    """
    rows, length = batch.tokens_BT.shape
    compute = functools.partial(
        completion_logprobs, batch=batch, temperature=temperature, micro_batches=micro_batches
    )
    with compilation.compiling(f"log-probs {rows}x{length}"):
        return dataclasses.replace(
            batch,
            old_logprobs_BT=None if policy is None else compute(policy),
            reference_logprobs_BT=None if reference is None else compute(reference),
        )


@functools.partial(jax.jit, static_argnames=("micro_batches",))
def completion_logprobs(
    model: LanguageModel, batch: RolloutBatch, temperature: float, *, micro_batches: int
) -> jax.Array:
    """Returns log-probs (B, T) of a batch's completions under `model`, 0 elsewhere; computes one
    micro-batch at a time."""
    stacked = split_rows(batch, micro_batches)

    def put(u: jax.Array, logprobs: jax.Array) -> jax.Array:
        rows = jax.tree.map(lambda x: x[u], stacked)
        logprobs_BT = token_logprobs(
            model,
            rows.tokens_BT,
            rows.positions_BT,
            rows.segment_ids_BT,
            predictor_BT=rows.predictor_BT,
            target_mask_BT=rows.target_mask_BT,
            temperature=temperature,
        )
        return logprobs.at[u].set(logprobs_BT)

    zeros = jnp.zeros(stacked.tokens_BT.shape, jnp.float32)
    return join_rows(jax.lax.fori_loop(0, used_micro_batches(stacked), put, zeros))


# --- the loss -----------------------------------------------------------------------------------


DUAL_CLIP = 3.0
"""Bounds the loss of a token with a negative advantage, as in verl."""

AGGREGATION: Aggregation = "token_mean"
"""The losses of all tokens are averaged, as verl does by default."""


def make_objective(
    grpo: Grpo, *, correction: Correction, temperature: float, remat: bool
) -> tuple[Loss, Callable[[RolloutBatch], dict[str, jax.Array]]]:
    """Returns `policy_loss` and `policy_normalizers` with these settings, for `make_train_step`.

    Args:
        grpo: Settings of the loss.
        correction: At which level importance weights correct for the sampler, if at all.
        temperature: Of sampling.
        remat: Whether the backward pass computes the layers again.
    """
    loss_fn = functools.partial(
        policy_loss, grpo=grpo, correction=correction, temperature=temperature, remat=remat
    )
    return loss_fn, policy_normalizers


def policy_normalizers(batch: RolloutBatch) -> dict[str, jax.Array]:
    """Returns what sums over the whole batch are divided by, for all of its micro-batches: the loss
    by `loss`, metrics by `tokens`."""
    mask_BT = batch.target_mask_BT
    return {
        "loss": loss_normalizer(mask_BT, batch.segment_ids_BT, AGGREGATION),
        "tokens": jnp.maximum(jnp.sum(mask_BT, dtype=jnp.float32), 1.0),
    }


def policy_loss(
    model: LanguageModel,
    batch: RolloutBatch,
    normalizers: dict[str, jax.Array],
    *,
    grpo: Grpo,
    correction: Correction,
    temperature: float,
    remat: bool,
) -> tuple[jax.Array, Metrics]:
    """Returns the GRPO loss of a micro-batch and its metrics: those of `grpo_loss`, the policy's
    entropy, and how far the sampler's log-probs are from its own."""
    mask_BT = batch.target_mask_BT
    logprobs_BT, entropy_BT = token_logprobs_and_entropy(
        model,
        batch.tokens_BT,
        batch.positions_BT,
        batch.segment_ids_BT,
        predictor_BT=batch.predictor_BT,
        target_mask_BT=mask_BT,
        temperature=temperature,
        remat=remat,
    )
    old_BT = batch.old_logprobs_BT
    if old_BT is None:
        old_BT = jax.lax.stop_gradient(logprobs_BT)

    def mean(values_BT: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask_BT, values_BT, 0)) / normalizers["tokens"]

    weights_BT = None
    if correction != "none":
        weights_BT = truncated_importance_weights(
            old_BT, batch.sampler_logprobs_BT, mask_BT, batch.segment_ids_BT, level=correction
        )
    loss, metrics = grpo_loss(
        logprobs_BT,
        old_BT,
        batch.advantages_BT,
        mask_BT,
        clip_eps_low=grpo.clip_eps_low,
        clip_eps_high=grpo.clip_eps_high,
        dual_clip=DUAL_CLIP,
        kl_coef=grpo.kl_coef,
        reference_logprobs_BT=batch.reference_logprobs_BT,
        importance_weights_BT=weights_BT,
        segment_ids_BT=batch.segment_ids_BT,
        aggregation=AGGREGATION,
        normalizer=normalizers["loss"],
    )
    if weights_BT is not None:
        metrics["importance_weight_mean"] = mean(weights_BT)
        metrics["importance_truncated_share"] = mean(weights_BT >= MAX_IMPORTANCE_WEIGHT)
    gap_BT = jnp.where(mask_BT, jnp.abs(old_BT - batch.sampler_logprobs_BT), 0)
    metrics |= {
        "entropy": mean(entropy_BT),
        "logprob_gap": mean(gap_BT),
        "logprob_gap_max": jnp.max(gap_BT),
    }
    return loss, metrics

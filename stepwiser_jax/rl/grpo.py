"""GRPO: advantages, the log-probs that an update compares with, and the clipped loss.

    A_g = (r_g - mean_g r) / (std_g r + 1e-6)                          one number per completion
    rho_t = exp(logprob_t - old_logprob_t)
    L_t = -min(rho_t A, clip(rho_t, 1 - eps_low, 1 + eps_high) A)      clip-higher: high > low
    L_t = min(L_t, -c A) if A < 0                                      dual clip
    loss = aggregate(w_t L_t + kl_coef * k3_t)                         mean of tokens or sequences
    w_t = min(exp(old_logprob_t - sampler_logprob_t), cap)             or of sums over a sequence

Sources: GRPO (arXiv 2402.03300), clip-higher and the token mean (DAPO, 2503.14476), dual clip
(1912.09729), k3 (Schulman, "Approximating KL Divergence"), truncated importance weights against a
sampler that differs slightly from the policy (Yao et al. 2025, "Your Efficient RL Framework
Secretly Brings You Off-Policy RL Training"). StepWiser 4.1 gives eps_low = 0.2, eps_high = 0.28;
the rest follows verl's defaults.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from stepwiser_jax.config import Grpo
from stepwiser_jax.rl.logprobs import token_logprobs_and_entropy
from stepwiser_jax.runs import compilation
from stepwiser_jax.training.step import Loss, Metrics, join_rows, split_rows, used_micro_batches

if TYPE_CHECKING:
    from stepwiser_jax.model.transformer import Transformer
    from stepwiser_jax.rl.rollouts import RolloutBatch, RolloutGroup

Aggregation = Literal["token_mean", "sequence_mean"]
"""A mean over tokens, or over sequences of the mean of each (verl: seq-mean-token-mean)."""
Correction = Literal["none", "token", "sequence"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clipped to this, as in verl: beyond it, the gradient of exp is only noise."""

MAX_IMPORTANCE_WEIGHT = 2.0
"""The cap of importance weights against the sampler, as in verl's example."""

DUAL_CLIP = 3.0
"""Bounds the loss of a token with a negative advantage, as in verl."""


def group_advantages(rewards_PG: jax.typing.ArrayLike) -> jax.Array:
    """Returns (P, G) advantages: rewards less the group's mean, over its sample standard deviation
    + 1e-6 (as verl). They are 0 if all rewards of a group are equal.

    Raises:
        ValueError: The groups have one completion.
    """
    rewards_PG = jnp.asarray(rewards_PG, jnp.float32)
    if rewards_PG.shape[1] < 2:
        raise ValueError(f"a group needs at least 2 completions, found {rewards_PG.shape[1]}")
    is_equal_P1 = jnp.all(rewards_PG == rewards_PG[:, :1], axis=1, keepdims=True)
    centred_PG = rewards_PG - jnp.mean(rewards_PG, axis=1, keepdims=True)
    deviation_P1 = jnp.std(rewards_PG, axis=1, ddof=1, keepdims=True)
    return jnp.where(is_equal_P1, 0.0, centred_PG / (deviation_P1 + 1e-6))


def denominator_share(
    groups: Sequence[RolloutGroup], left_out: Sequence[RolloutGroup], aggregation: Aggregation
) -> float:
    """Returns the share of these groups in a denominator in which groups that were left out count.

    Losses are proportional to advantages: times this share, their mean over these groups is their
    sum over the larger denominator. The KL term stays a mean, since all groups would add to it.
    """

    def size(some: Sequence[RolloutGroup]) -> int:
        lengths = [len(tokens) for group in some for tokens in group.completions_G]
        return sum(lengths) if aggregation == "token_mean" else len(lengths)

    return size(groups) / (size(groups) + size(left_out))


# --- log-probs before the update ----------------------------------------------------------------


def add_old_and_reference_logprobs(
    batch: RolloutBatch,
    policy: Transformer | None,
    reference: Transformer | None,
    temperature: float,
    *,
    micro_batches: int,
) -> RolloutBatch:
    """Returns the batch with the log-probs of the old policy and the reference that the loss needs.

    Args:
        batch: Is on the mesh.
        policy: The policy before the first of several updates. None: there is one update, whose own
            log-probs are the old ones.
        reference: The model that the KL term pulls to; None without the term.
        temperature: The temperature of sampling.
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
    model: Transformer, batch: RolloutBatch, temperature: float, *, micro_batches: int
) -> jax.Array:
    """Returns log-probs (B, T) of a batch's completions under `model`, 0 elsewhere; computes one
    micro-batch at a time."""
    stacked_U = split_rows(batch, micro_batches)

    def put(u: jax.Array, logprobs: jax.Array) -> jax.Array:
        rows = jax.tree.map(lambda x: x[u], stacked_U)
        logprobs_BT, _ = _logprobs_and_entropy(model, rows, temperature)
        return logprobs.at[u].set(logprobs_BT)

    zeros = jnp.zeros(stacked_U.tokens_BT.shape, jnp.float32)
    return join_rows(jax.lax.fori_loop(0, used_micro_batches(stacked_U), put, zeros))


def _logprobs_and_entropy(
    model: Transformer, batch: RolloutBatch, temperature: float, *, remat: bool = False
) -> tuple[jax.Array, jax.Array]:
    return token_logprobs_and_entropy(
        model,
        batch.tokens_BT,
        batch.positions_BT,
        batch.segment_ids_BT,
        predictor_BT=batch.predictor_BT,
        target_mask_BT=batch.target_mask_BT,
        temperature=temperature,
        remat=remat,
    )


# --- the loss of a batch ------------------------------------------------------------------------


def make_objective(
    grpo: Grpo, *, correction: Correction, temperature: float, remat: bool
) -> tuple[Loss, Callable[[RolloutBatch], dict[str, jax.Array]]]:
    """Returns `policy_loss` and `policy_normalizers` with these settings, for `make_train_step`.

    Args:
        grpo: Settings of the loss.
        correction: At which level importance weights correct for the sampler, if at all.
        temperature: The temperature of sampling.
        remat: Whether the backward pass computes the layers again.
    """
    loss_fn = functools.partial(
        policy_loss, grpo=grpo, correction=correction, temperature=temperature, remat=remat
    )
    return loss_fn, functools.partial(policy_normalizers, aggregation=grpo.aggregation)


def policy_normalizers(batch: RolloutBatch, aggregation: Aggregation) -> dict[str, jax.Array]:
    """Returns the divisors of the whole batch, which all its micro-batches use: `loss` divides the
    loss, `tokens` divides metrics."""
    mask_BT = batch.target_mask_BT
    return {
        "loss": loss_normalizer(mask_BT, batch.segment_ids_BT, aggregation),
        "tokens": jnp.maximum(jnp.sum(mask_BT, dtype=jnp.float32), 1.0),
    }


def policy_loss(
    model: Transformer,
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
    logprobs_BT, entropy_BT = _logprobs_and_entropy(model, batch, temperature, remat=remat)
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
        aggregation=grpo.aggregation,
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


# --- the loss of arrays -------------------------------------------------------------------------


def grpo_loss(
    logprobs_BT: jax.Array,
    old_logprobs_BT: jax.Array,
    advantages: jax.Array,
    target_mask_BT: jax.Array,
    *,
    clip_eps_low: float,
    clip_eps_high: float,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    reference_logprobs_BT: jax.Array | None = None,
    importance_weights_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    aggregation: Aggregation = "token_mean",
    normalizer: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the clipped loss and its metrics.

    Args:
        logprobs_BT: Log-probs of the tokens under the policy.
        old_logprobs_BT: The same under the policy before the first update on these completions.
        advantages: (B,) or (B, T).
        target_mask_BT: True for tokens of completions.
        clip_eps_low: The ratio is clipped below at 1 minus this.
        clip_eps_high: The ratio is clipped above at 1 plus this.
        dual_clip: Bounds the loss at a negative advantage to this many times its size; None: no
            bound.
        kl_coef: Weight of the k3 estimate of KL(policy || reference).
        reference_logprobs_BT: The same under the reference; the KL term needs them.
        importance_weights_BT: Factors of the policy's loss, not of the KL term; constants for the
            gradient.
        segment_ids_BT: Packing ids; None: a row is one completion.
        aggregation: A mean over tokens, or a mean over sequences of the mean of each.
        normalizer: Divides the sum, from `loss_normalizer`; by default this batch's.

    Raises:
        ValueError: There is a KL term but no reference.
    """
    mask_BT = target_mask_BT
    if kl_coef and reference_logprobs_BT is None:
        raise ValueError("kl_coef needs reference_logprobs_BT")
    if normalizer is None:
        normalizer = loss_normalizer(mask_BT, segment_ids_BT, aggregation)
    advantages_BT = advantages if advantages.ndim == 2 else advantages[:, None]
    log_ratio_BT = jnp.where(mask_BT, logprobs_BT - old_logprobs_BT, 0.0)
    ratio_BT = jnp.exp(jnp.clip(log_ratio_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped_BT = jnp.clip(ratio_BT, 1 - clip_eps_low, 1 + clip_eps_high)
    loss_BT = -jnp.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    is_negative_BT, is_dual_BT = advantages_BT < 0, jnp.zeros_like(mask_BT)
    if dual_clip is not None:
        is_dual_BT = is_negative_BT & (ratio_BT > dual_clip)
        bounded_BT = jnp.minimum(loss_BT, -dual_clip * advantages_BT)
        loss_BT = jnp.where(is_negative_BT, bounded_BT, loss_BT)
    if importance_weights_BT is not None:
        loss_BT = loss_BT * jax.lax.stop_gradient(importance_weights_BT)

    def mean(values_BT: jax.Array) -> jax.Array:
        values_BT = values_BT.astype(jnp.float32)
        return aggregate(values_BT, mask_BT, aggregation, normalizer, segment_ids_BT)

    loss = mean(loss_BT)
    metrics = {
        "policy_loss": loss,
        "ratio_mean": mean(ratio_BT),
        "clip_fraction_low": mean(is_negative_BT & (ratio_BT < 1 - clip_eps_low)),
        "clip_fraction_high": mean((advantages_BT > 0) & (ratio_BT > 1 + clip_eps_high)),
        "clip_fraction_dual": mean(is_dual_BT),
    }
    if reference_logprobs_BT is not None:
        metrics["kl"] = mean(k3(logprobs_BT, reference_logprobs_BT, mask_BT))
        loss = loss + kl_coef * metrics["kl"]
    return loss, metrics


def k3(logprobs_BT: jax.Array, reference_logprobs_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Returns Schulman's unbiased, non-negative estimate of KL(policy || reference) per token."""
    difference_BT = jnp.where(mask_BT, reference_logprobs_BT - logprobs_BT, 0.0)
    difference_BT = jnp.clip(difference_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.exp(difference_BT) - difference_BT - 1


def truncated_importance_weights(
    logprobs_BT: jax.Array,
    sampler_logprobs_BT: jax.Array,
    mask_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    *,
    level: Literal["token", "sequence"],
    cap: float = MAX_IMPORTANCE_WEIGHT,
) -> jax.Array:
    """Returns the policy's probability of what was sampled, divided by the sampler's: (B, T),
    float32, at most `cap`, and 1 outside the mask.

    `logprobs_BT` are the policy's from before the update. `sequence` weighs every token of a
    completion by the ratio of the whole. Without a cap the gradient is then that of samples from
    the policy itself, but its variance grows with the length. `token` weighs each token by its own
    ratio. That has little variance, but is biased for completions of several tokens.
    """
    log_ratio_BT = jnp.where(mask_BT, logprobs_BT - sampler_logprobs_BT, 0.0)
    if level == "sequence":
        log_ratio_BT = jnp.where(mask_BT, _sequence_sums(log_ratio_BT, segment_ids_BT), 0.0)
    return jnp.where(mask_BT, jnp.minimum(jnp.exp(log_ratio_BT), cap), 1.0)


# --- sums over tokens and sequences -------------------------------------------------------------


def loss_normalizer(
    mask_BT: jax.Array, segment_ids_BT: jax.Array | None, aggregation: Aggregation
) -> jax.Array:
    """Returns the number of completion tokens, or of sequences, of a whole batch; at least 1."""
    counts_BT = jnp.ones(mask_BT.shape, jnp.float32)
    if aggregation == "sequence_mean":
        counts_BT = 1.0 / _sequence_lengths(mask_BT, segment_ids_BT)
    return jnp.maximum(jnp.sum(jnp.where(mask_BT, counts_BT, 0.0)), 1.0)


def aggregate(
    values_BT: jax.Array,
    mask_BT: jax.Array,
    aggregation: Aggregation,
    normalizer: jax.Array,
    segment_ids_BT: jax.Array | None = None,
) -> jax.Array:
    """Returns the sum of the masked values over `normalizer`. With `sequence_mean` the values of
    each sequence are averaged first. The results of micro-batches add up to the whole batch's."""
    if aggregation == "sequence_mean":
        values_BT = values_BT / _sequence_lengths(mask_BT, segment_ids_BT)
    return jnp.sum(jnp.where(mask_BT, values_BT, 0.0)) / normalizer


def _sequence_lengths(mask_BT: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """Returns, for every token, the number of completion tokens of its sequence, at least 1."""
    return jnp.maximum(_sequence_sums(mask_BT.astype(jnp.float32), segment_ids_BT), 1.0)


def _sequence_sums(values_BT: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """Returns, for every token, the sum of the values of its sequence: a run of equal ids."""
    if segment_ids_BT is None:
        return jnp.broadcast_to(jnp.sum(values_BT, axis=1, keepdims=True), values_BT.shape)

    def of_row(values_T: jax.Array, segment_ids_T: jax.Array) -> jax.Array:
        changes_T = segment_ids_T[1:] != segment_ids_T[:-1]
        run_T = jnp.pad(jnp.cumsum(changes_T, dtype=jnp.int32), (1, 0))
        return jax.ops.segment_sum(values_T, run_T, len(values_T), indices_are_sorted=True)[run_T]

    return jax.vmap(of_row)(values_BT, segment_ids_BT)

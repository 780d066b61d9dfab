"""Group-relative policy optimisation: advantages, and the clipped loss with its variants.

    A_g = (r_g - mean_g r) / (std_g r + 1e-6)                          one number per completion
    rho_t = exp(logprob_t - old_logprob_t)
    L_t = -min(rho_t A, clip(rho_t, 1 - eps_low, 1 + eps_high) A)      clip-higher: high > low
    L_t = min(L_t, -c A) where A < 0                                   dual clip
    loss = aggregate(w_t L_t + kl_coef * k3_t)
    w_t = min(exp(old_logprob_t - sampler_logprob_t), cap)            or of sums over a sequence

Sources: GRPO (arXiv 2402.03300), clip-higher and the token mean (DAPO, 2503.14476), the constant
denominator (Dr. GRPO, 2503.20783), dual clip (1912.09729), k3 (Schulman), truncated
importance weights against a sampler that is not quite the policy (Yao et al. 2025, "Your Efficient
RL Framework Secretly Brings You Off-Policy RL Training"). StepWiser 4.1 gives
eps_low = 0.2, eps_high = 0.28; the rest follows verl's defaults.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Aggregation = Literal["token_mean", "sequence_mean", "dr_grpo"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here, as in verl: exp of more is a gradient of nothing but noise."""


def group_advantages(
    rewards_PG: jax.typing.ArrayLike, *, normalize: Literal["std", "none"] = "std"
) -> jax.Array:
    """(P, G) rewards -> (P, G) advantages; sample standard deviation + 1e-6, as verl.

    Zero where a group's rewards are equal. Raises ValueError for groups of one.
    """
    rewards_PG = jnp.asarray(rewards_PG, jnp.float32)
    if rewards_PG.shape[1] < 2:
        raise ValueError(f"a group needs at least 2 completions, found {rewards_PG.shape[1]}")
    is_equal_P1 = jnp.all(rewards_PG == rewards_PG[:, :1], axis=1, keepdims=True)
    centred_PG = rewards_PG - jnp.mean(rewards_PG, axis=1, keepdims=True)
    if normalize == "std":
        centred_PG = centred_PG / (jnp.std(rewards_PG, axis=1, ddof=1, keepdims=True) + 1e-6)
    return jnp.where(is_equal_P1, 0.0, centred_PG)


def loss_denominator(
    mask_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    *,
    aggregation: Aggregation,
    max_completion_tokens: int,
) -> jax.Array:
    """What the sums over a whole batch are divided by (at least 1): its completion tokens, its
    sequences, or Dr. GRPO's constant: sequences times the longest completion allowed."""
    tokens = jnp.sum(mask_BT, dtype=jnp.float32)
    if aggregation == "token_mean":
        return jnp.maximum(tokens, 1.0)
    lengths_BT = _sequence_lengths(mask_BT, segment_ids_BT)
    sequences = jnp.sum(jnp.where(mask_BT, 1.0 / jnp.maximum(lengths_BT, 1.0), 0.0))
    scale = 1.0 if aggregation == "sequence_mean" else float(max_completion_tokens)
    return jnp.maximum(sequences, 1.0) * scale


def _sequence_lengths(mask_BT: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """For every token, the number of completion tokens of its sequence: (row, segment)."""
    return _sequence_sums(mask_BT.astype(jnp.float32), segment_ids_BT)


def _sequence_sums(values_BT: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """For every token, the sum of the values of its sequence, a run of equal segment ids."""
    if segment_ids_BT is None:
        return jnp.broadcast_to(jnp.sum(values_BT, axis=1, keepdims=True), values_BT.shape)

    def of_row(values_T: jax.Array, segment_ids_T: jax.Array) -> jax.Array:
        changes_T = segment_ids_T[1:] != segment_ids_T[:-1]
        run_T = jnp.pad(jnp.cumsum(changes_T, dtype=jnp.int32), (1, 0))
        return jax.ops.segment_sum(values_T, run_T, len(values_T), indices_are_sorted=True)[run_T]

    return jax.vmap(of_row)(values_BT, segment_ids_BT)


def aggregate(
    values_BT: jax.Array,
    mask_BT: jax.Array,
    aggregation: Aggregation,
    denominator: jax.Array,
    segment_ids_BT: jax.Array | None = None,
) -> jax.Array:
    """Sum of the masked values, each sequence first averaged for `sequence_mean`, over
    `denominator`; sums over micro-batches are the whole batch's."""
    if aggregation == "sequence_mean":
        lengths_BT = _sequence_lengths(mask_BT, segment_ids_BT)
        values_BT = values_BT / jnp.maximum(lengths_BT, 1.0)
    return jnp.sum(jnp.where(mask_BT, values_BT, 0.0)) / denominator


def truncated_importance_weights(
    logprobs_BT: jax.Array,
    sampler_logprobs_BT: jax.Array,
    mask_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    *,
    level: Literal["token", "sequence"],
    cap: float,
) -> jax.Array:
    """How much likelier the policy makes what the sampler drew, at most `cap`: (B, T), float32.

    `logprobs_BT` are the policy's from before the update. `sequence` weighs every token of a
    completion by the ratio of the whole: without a bound the gradient is then that of samples from
    the policy itself, but its variance grows with the length. `token` weighs each by its own ratio:
    of little variance, and biased where completions have several tokens. 1 outside the mask.
    """
    log_ratio_BT = jnp.where(mask_BT, logprobs_BT - sampler_logprobs_BT, 0.0)
    if level == "sequence":
        log_ratio_BT = jnp.where(mask_BT, _sequence_sums(log_ratio_BT, segment_ids_BT), 0.0)
    return jnp.where(mask_BT, jnp.minimum(jnp.exp(log_ratio_BT), cap), 1.0)


def grpo_loss(
    logprobs_BT: jax.Array,
    old_logprobs_BT: jax.Array,
    advantages: jax.Array,
    completion_mask_BT: jax.Array,
    *,
    clip_eps_low: float,
    clip_eps_high: float,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    ref_logprobs_BT: jax.Array | None = None,
    importance_weights_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    aggregation: Aggregation = "token_mean",
    denominator: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss and its metrics; `advantages` is (B,) or (B, T). `importance_weights_BT` multiply
    the policy's loss, not the KL term, and are constants for the gradient.

    `denominator`: of the whole batch, by default of this one (required for `dr_grpo`). Metrics are
    token sums over the whole batch's token count where `aggregation` is `token_mean`, and are
    weighted like the loss otherwise. Raises ValueError for a KL term without a reference.
    """
    mask_BT = completion_mask_BT
    if kl_coef and ref_logprobs_BT is None:
        raise ValueError("kl_coef needs ref_logprobs_BT")
    if denominator is None:
        if aggregation == "dr_grpo":
            raise ValueError("dr_grpo needs its constant denominator")
        denominator = loss_denominator(
            mask_BT, segment_ids_BT, aggregation=aggregation, max_completion_tokens=1
        )
    advantages_BT = advantages if advantages.ndim == 2 else advantages[:, None]
    log_ratio_BT = jnp.where(mask_BT, logprobs_BT - old_logprobs_BT, 0.0)
    ratio_BT = jnp.exp(jnp.clip(log_ratio_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped_BT = jnp.clip(ratio_BT, 1 - clip_eps_low, 1 + clip_eps_high)
    loss_BT = -jnp.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    is_low_BT = (advantages_BT < 0) & (ratio_BT < 1 - clip_eps_low)
    is_high_BT = (advantages_BT > 0) & (ratio_BT > 1 + clip_eps_high)
    is_dual_BT = jnp.zeros_like(mask_BT)
    if dual_clip is not None:
        is_dual_BT = (advantages_BT < 0) & (ratio_BT > dual_clip)
        loss_BT = jnp.where(
            advantages_BT < 0, jnp.minimum(loss_BT, -dual_clip * advantages_BT), loss_BT
        )

    if importance_weights_BT is not None:
        loss_BT = loss_BT * jax.lax.stop_gradient(importance_weights_BT)

    def mean(values_BT: jax.Array) -> jax.Array:
        values_BT = values_BT.astype(jnp.float32)
        return aggregate(values_BT, mask_BT, aggregation, denominator, segment_ids_BT)

    loss = mean(loss_BT)
    metrics = {
        "policy_loss": loss,
        "ratio_mean": mean(ratio_BT),
        "clip_fraction_low": mean(is_low_BT),
        "clip_fraction_high": mean(is_high_BT),
        "clip_fraction_dual": mean(is_dual_BT),
    }
    if ref_logprobs_BT is not None:
        kl = mean(k3(logprobs_BT, ref_logprobs_BT, mask_BT))
        metrics["kl"] = kl
        loss = loss + kl_coef * kl
    return loss, metrics


def k3(logprobs_BT: jax.Array, ref_logprobs_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Schulman's unbiased, non-negative estimate of KL(policy || reference) per token."""
    difference_BT = jnp.where(mask_BT, ref_logprobs_BT - logprobs_BT, 0.0)
    difference_BT = jnp.clip(difference_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.exp(difference_BT) - difference_BT - 1

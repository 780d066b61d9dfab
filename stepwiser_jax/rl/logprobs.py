"""Log-probabilities of tokens: the one place that knows that logits at t-1 predict token t.

    hidden_BTD -> hidden of each token's predictor -> x head_VD, some positions at a time -> log p

If there are many positions, their logits are never in memory together. A loop over slices of the
positions computes the logits of one slice and reduces them to three numbers per position. The
backward pass computes them again. Positions are sliced, and not the vocabulary, because a mesh
splits the vocabulary (and the rows) but never the positions. Target tokens are moved to the front
of their row first, so that slices without any are left out.

Matmuls take their operands in the type of the hidden states and accumulate in float32; everything
after them, and the gradient of the head, is float32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from stepwiser_jax.model.linear import output_logits, product, product_over_rows
from stepwiser_jax.model.packing import sees

if TYPE_CHECKING:
    from stepwiser_jax.model.transformer import Transformer

Stats = tuple[jax.Array, jax.Array]
Residuals = tuple[jax.Array, ...]

SLICE_ELEMENTS = 1 << 22
"""The most logits in memory together (16 MiB in float32), unless that needs too many slices."""


def token_logprobs(
    model: Transformer,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    **settings: Any,
) -> jax.Array:
    """Returns the log-probs of `token_logprobs_and_entropy`, whose arguments it takes."""
    return token_logprobs_and_entropy(model, tokens_BT, positions_BT, segment_ids_BT, **settings)[0]


def token_logprobs_and_entropy(
    model: Transformer,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    *,
    predictor_BT: jax.Array | None = None,
    target_mask_BT: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
    num_slices: int | None = None,
    remat: bool = False,
) -> Stats:
    """Returns log-probs of tokens, and entropies in nats of the distributions that predict them.

    Args:
        model: Gives hidden states and the output matrix.
        tokens_BT: Token ids.
        positions_BT: Positions for the rotary embedding; None: 0, 1, 2, ...
        segment_ids_BT: Packing ids, see `model.packing`; None: a row is one document.
        predictor_BT: The index of the position whose logits predict a token; None: t - 1. In a row
            that holds a rollout group, the prompt's last token predicts the first token of each
            completion.
        target_mask_BT: The tokens that are asked for; None: all. The others take no time.
        temperature: Above 0; divides the logits, and is a constant for the gradient.
        num_slices: Slices of the positions; None: `default_slices`.
        remat: Whether the backward pass computes the model's layers again.

    Returns:
        Two arrays (B, T), float32, differentiable in the model: log-probs <= 0 and entropies. Both
        are 0 outside the mask and for tokens that nothing predicts: padding, t = 0, and tokens
        whose predictor is not earlier in the row or not visible to them.
    """
    hidden_BTD = model.hidden(tokens_BT, positions_BT, segment_ids_BT, remat=remat)
    head_VD = model.head_VD
    if num_slices is None:
        rows, length = tokens_BT.shape
        num_slices = default_slices(rows, length, head_VD.shape[0])
    index_BT = lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1)
    predictor_BT = index_BT - 1 if predictor_BT is None else predictor_BT
    is_target_BT = _is_predicted(index_BT, predictor_BT, segment_ids_BT)
    if target_mask_BT is not None:
        is_target_BT &= target_mask_BT
    with jax.named_scope("token_logprobs"):
        order_BT, place_BT = _targets_first(is_target_BT)
        predictor_BT = jnp.take_along_axis(jnp.maximum(predictor_BT, 0), order_BT, axis=1)
        logprobs_BT, entropy_BT = _sliced_stats(  # pyright: ignore
            jnp.take_along_axis(hidden_BTD, predictor_BT[:, :, None], axis=1),
            head_VD,
            jnp.take_along_axis(tokens_BT, order_BT, axis=1),
            jnp.asarray(temperature, jnp.float32),
            jnp.max(jnp.sum(is_target_BT, axis=1)),
            num_slices,
            model.unknown_ids,
        )
        logprobs_BT = jnp.take_along_axis(logprobs_BT, place_BT, axis=1)
        entropy_BT = jnp.take_along_axis(entropy_BT, place_BT, axis=1)
    return jnp.where(is_target_BT, logprobs_BT, 0), jnp.where(is_target_BT, entropy_BT, 0)


def token_log_odds(
    model: Transformer,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    pair: tuple[int, int],
    *,
    remat: bool = False,
) -> jax.Array:
    """Returns log-odds (B, T), float32, of the first token of `pair` against the second as token t,
    given the tokens before it. Their sigmoid is a softmax over the two tokens. They are
    differentiable in the model, and 0 if nothing predicts a token."""
    hidden_BTD = model.hidden(tokens_BT, positions_BT, segment_ids_BT, remat=remat)
    with jax.named_scope("token_log_odds"):
        logits_BT2 = model.pair_logits(hidden_BTD, pair)
        next_BT = logits_BT2[:, :, 0] - logits_BT2[:, :, 1]
    index_BT = lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1)
    is_predicted_BT = _is_predicted(index_BT, index_BT - 1, segment_ids_BT)
    return jnp.where(is_predicted_BT, jnp.roll(next_BT, 1, axis=1), 0)


def _is_predicted(
    index_BT: jax.Array, predictor_BT: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    """Returns whether the predictor of a token is before it and visible to it."""
    is_predicted_BT = (predictor_BT >= 0) & (predictor_BT < index_BT)
    if segment_ids_BT is None:
        return is_predicted_BT
    segment_BT = jnp.take_along_axis(segment_ids_BT, jnp.maximum(predictor_BT, 0), axis=1)
    return is_predicted_BT & sees(segment_ids_BT, segment_BT)


def _targets_first(is_target_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the positions of each row, targets first and otherwise in order, and the inverse
    permutation. It does not sort, because the TPU compiler is slow at that."""
    is_target = is_target_BT.astype(jnp.int32)
    num_targets_B1 = jnp.sum(is_target, axis=1, keepdims=True)
    place_of_target_BT = jnp.cumsum(is_target, axis=1) - 1
    place_of_other_BT = num_targets_B1 + jnp.cumsum(1 - is_target, axis=1) - 1
    place_BT = jnp.where(is_target_BT, place_of_target_BT, place_of_other_BT)

    def invert(place_T: jax.Array) -> jax.Array:
        index_T = jnp.arange(place_T.shape[0], dtype=jnp.int32)
        return jnp.zeros_like(place_T).at[place_T].set(index_T, unique_indices=True)

    return jax.vmap(invert)(place_BT), place_BT


def default_slices(rows: int, length: int, vocab_size: int) -> int:
    """Returns the number of slices that keeps the logits of each within `SLICE_ELEMENTS`, but at
    most 8, or one per 512 positions. More would be slow on a mesh: each device's matmul has to stay
    large, and each slice gathers the matrix and adds up its gradient."""
    needed = math.ceil(rows * length * vocab_size / SLICE_ELEMENTS)
    return max(1, min(needed, length, max(8, length // 512)))


# --- logits, a slice at a time ------------------------------------------------------------------


def _split(array: jax.Array, num_slices: int) -> jax.Array:
    """Reshapes (B, T, ...) to (slices, B, C, ...), padded with zeros to slices of one length C."""
    rows, length, *rest = array.shape
    slice_length = math.ceil(length / num_slices)
    padding = [(0, 0), (0, num_slices * slice_length - length), *((0, 0) for _ in rest)]
    padded = jnp.pad(array, padding)
    return jnp.moveaxis(padded.reshape(rows, num_slices, slice_length, *rest), 1, 0)


def _merge(slices: jax.Array, length: int) -> jax.Array:
    """Reshapes (slices, B, C, ...) to (B, T, ...), the inverse of `_split`."""
    num_slices, rows, slice_length, *rest = slices.shape
    joined = jnp.moveaxis(slices, 0, 1).reshape(rows, num_slices * slice_length, *rest)
    return joined[:, :length]


def _is_target(targets_BC: jax.Array, vocab_size: int) -> jax.Array:
    # This compares instead of gathering, since the vocabulary may be split over devices.
    shape = (*targets_BC.shape, vocab_size)
    return lax.broadcasted_iota(targets_BC.dtype, shape, 2) == targets_BC[:, :, None]


def _sliced_stats_forward(
    features_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    temperature: jax.Array,
    num_targets: jax.Array,
    num_slices: int,
    unknown_ids: tuple[range, ...],
) -> tuple[Stats, Residuals]:
    """Returns log-prob of each target and entropy under softmax(features @ head.T / temperature),
    and what the backward pass needs.

    Only the first `num_targets` positions of each row are computed; the others are undefined.
    `unknown_ids` are outside the softmax, and are never targets.
    """
    cast_head_VD = head_VD.astype(features_BTD.dtype)
    features, targets = _split(features_BTD, num_slices), _split(targets_BT, num_slices)

    def stats_of_slice(i: jax.Array, stats: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        logits_BCV = output_logits(features[i], cast_head_VD, unknown_ids) / temperature
        peak_BC1 = jnp.max(logits_BCV, axis=-1, keepdims=True)
        shifted_BCV = logits_BCV - peak_BC1
        weights_BCV = jnp.exp(shifted_BCV)
        total_BC = jnp.sum(weights_BCV, axis=-1)
        mean_shifted_BC = jnp.sum(weights_BCV * shifted_BCV, axis=-1) / total_BC
        is_target_BCV = _is_target(targets[i], head_VD.shape[0])
        target_BC = jnp.sum(jnp.where(is_target_BCV, shifted_BCV, 0), axis=-1)
        log_total_BC = jnp.log(total_BC)
        # Without rounding, both bounds would hold by themselves.
        logprobs_BC = jnp.minimum(target_BC - log_total_BC, 0)
        entropy_BC = jnp.maximum(log_total_BC - mean_shifted_BC, 0)
        log_sum_BC = peak_BC1[:, :, 0] + log_total_BC
        found = (logprobs_BC, entropy_BC, log_sum_BC)
        return tuple(x.at[i].set(y) for x, y in zip(stats, found, strict=True))

    zeros = jnp.zeros(targets.shape, jnp.float32)
    stats = lax.fori_loop(
        0, _used_slices(num_targets, targets), stats_of_slice, (zeros, zeros, zeros)
    )
    logprobs_BT, entropy_BT, log_sum_BT = (_merge(x, targets_BT.shape[1]) for x in stats)
    residuals = (
        features_BTD,
        head_VD,
        targets_BT,
        temperature,
        num_targets,
        entropy_BT,
        log_sum_BT,
    )
    return (logprobs_BT, entropy_BT), residuals


def _used_slices(num_targets: jax.Array, slices: jax.Array) -> jax.Array:
    """Returns how many slices (slices, B, C, ...) hold the first `num_targets` positions."""
    return (num_targets + slices.shape[2] - 1) // slices.shape[2]


def _sliced_stats_backward(
    num_slices: int, unknown_ids: tuple[range, ...], residuals: Residuals, cotangents: Stats
) -> tuple[jax.Array, jax.Array, None, None, None]:
    """Returns the gradients. With p = softmax(z), and z the logits over the temperature, they use

        d log p_target / dz = [target] - p        d entropy / dz = -p (log p + entropy)

    Both are 0 at unknown ids, which have p = 0.
    """
    features_BTD, head_VD, targets_BT, temperature, num_targets, entropy_BT, log_sum_BT = residuals
    cast_head_VD = head_VD.astype(features_BTD.dtype)
    per_position = (features_BTD, targets_BT, entropy_BT, log_sum_BT, *cotangents)
    slices = tuple(_split(x, num_slices) for x in per_position)
    width = head_VD.shape[1]

    def grad_slice(i: jax.Array, grads: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        head_grad_DV, features_grad = grads
        features_BCD, targets_BC, *rest = (x[i] for x in slices)
        entropy_BC1, log_sum_BC1, logprob_grad_BC1, entropy_grad_BC1 = (x[:, :, None] for x in rest)
        logits_BCV = output_logits(features_BCD, cast_head_VD, unknown_ids) / temperature
        logprobs_BCV = logits_BCV - log_sum_BC1
        probs_BCV = jnp.exp(logprobs_BCV)
        from_logprob_BCV = _is_target(targets_BC, head_VD.shape[0]).astype(jnp.float32) - probs_BCV
        from_entropy_BCV = -probs_BCV * (logprobs_BCV + entropy_BC1)
        logits_grad_BCV = (
            logprob_grad_BC1 * from_logprob_BCV + entropy_grad_BC1 * from_entropy_BCV
        ) / temperature
        logits_grad_BCV = logits_grad_BCV.astype(features_BTD.dtype)
        features_grad_BCD = product(logits_grad_BCV, cast_head_VD, (2, 0))
        head_grad_DV += product_over_rows(
            features_BCD.reshape(-1, width), logits_grad_BCV.reshape(-1, head_VD.shape[0])
        )
        return head_grad_DV, features_grad.at[i].set(features_grad_BCD.astype(features_BTD.dtype))

    zeros = (jnp.zeros(head_VD.shape[::-1], jnp.float32), jnp.zeros_like(slices[0]))
    head_grad_DV, features_grad = lax.fori_loop(
        0, _used_slices(num_targets, slices[1]), grad_slice, zeros
    )
    features_grad_BTD = _merge(features_grad, targets_BT.shape[1])
    return features_grad_BTD, head_grad_DV.T.astype(head_VD.dtype), None, None, None


def _stats_alone(*arguments: Any) -> Stats:
    return _sliced_stats_forward(*arguments)[0]


_sliced_stats = jax.custom_vjp(_stats_alone, nondiff_argnums=(5, 6))
_sliced_stats.defvjp(_sliced_stats_forward, _sliced_stats_backward)

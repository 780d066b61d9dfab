"""Log-probabilities of tokens: the one place that knows that logits at t-1 predict token t.

    hidden_BTD -> hidden of each token's predecessor -> x head_VD, some positions at a time -> log p

Logits of all positions are never held at once where they are many, forward or backward: a loop
over slices of the positions computes the logits of one slice, reduces them to three numbers per
position, and the backward pass computes them again. Positions are sliced, and not the vocabulary,
because a mesh splits the vocabulary (and the rows) but never the positions.

Matmuls take their operands in the type of the hidden states and accumulate in float32; everything
after them, and the gradient of the head, is float32.
"""

from __future__ import annotations

import functools
import math
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from stepwiser_jax.model.linear import output_logits, product, product_over_rows
from stepwiser_jax.model.packing import sees

Stats = tuple[jax.Array, jax.Array]
Residuals = tuple[jax.Array, ...]

SLICE_ELEMENTS = 1 << 22
"""Logits that are computed at once without a thought of memory: 16 MiB in float32."""


class LanguageModel(Protocol):
    """What is asked of a model: hidden states after the final norm, the output matrix, which ids no
    token has, and logits of two tokens alone."""

    @property
    def head_VD(self) -> jax.Array: ...

    @property
    def unknown_ids(self) -> tuple[range, ...]: ...

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        *,
        remat: bool = False,
    ) -> jax.Array: ...

    def pair_logits(self, hidden_BTD: jax.Array, pair: tuple[int, int]) -> jax.Array: ...


def token_logprobs(
    model: LanguageModel,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    *,
    previous_BT: jax.Array | None = None,
    wanted_BT: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
    num_slices: int | None = None,
    remat: bool = False,
) -> jax.Array:
    """Log-probs (B, T), float32 and <= 0: entry t is of token t, given what stands before it.

    The arguments are those of `token_logprobs_and_entropy`.
    """
    logprobs_BT, _ = token_logprobs_and_entropy(
        model,
        tokens_BT,
        positions_BT,
        segment_ids_BT,
        previous_BT=previous_BT,
        wanted_BT=wanted_BT,
        temperature=temperature,
        num_slices=num_slices,
        remat=remat,
    )
    return logprobs_BT


def token_logprobs_and_entropy(
    model: LanguageModel,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    *,
    previous_BT: jax.Array | None = None,
    wanted_BT: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
    num_slices: int | None = None,
    remat: bool = False,
) -> Stats:
    """Log-probs (B, T) of the tokens and the entropies (B, T), in nats, of the distributions they
    were predicted by; both float32 and differentiable in the model.

    `previous_BT[b, t]` is the index of the position whose logits predict token t; None means t-1.
    In a row that holds a GRPO group, the first token of every completion points to the last token
    of the prompt. Entries are 0, both of them, for tokens that nothing predicts: t = 0, a
    predecessor that is not earlier in the row, padding, and a predecessor in a segment that the
    token does not see. `wanted_BT` marks the tokens that are asked for, by default all: the others'
    entries are 0 too, and so is their share of the work.

    `temperature` > 0 divides the logits and is a constant for the gradient. `num_slices` scans over
    that many slices of the positions; by default as many as memory asks for (`default_slices`).
    `remat` is the model's.
    """
    hidden_BTD = model.hidden(tokens_BT, positions_BT, segment_ids_BT, remat=remat)
    head_VD = model.head_VD
    if num_slices is None:
        rows, length = tokens_BT.shape
        num_slices = default_slices(rows, length, head_VD.shape[0])
    here_BT = lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1)
    before_BT = here_BT - 1 if previous_BT is None else previous_BT
    scored_BT = _is_predicted(here_BT, before_BT, segment_ids_BT)
    if wanted_BT is not None:
        scored_BT &= wanted_BT
    with jax.named_scope("token_logprobs"):
        # What is scored comes first, and only the slices that hold some of it are computed.
        order_BT, place_BT = _in_front(scored_BT)
        before_BT = jnp.take_along_axis(jnp.maximum(before_BT, 0), order_BT, axis=1)
        logprobs_BT, entropy_BT = _score(  # pyright: ignore
            jnp.take_along_axis(hidden_BTD, before_BT[:, :, None], axis=1),
            head_VD,
            jnp.take_along_axis(tokens_BT, order_BT, axis=1),
            jnp.asarray(temperature, jnp.float32),
            jnp.max(jnp.sum(scored_BT, axis=1)),
            num_slices,
            model.unknown_ids,
        )
        logprobs_BT = jnp.take_along_axis(logprobs_BT, place_BT, axis=1)
        entropy_BT = jnp.take_along_axis(entropy_BT, place_BT, axis=1)
    return jnp.where(scored_BT, logprobs_BT, 0), jnp.where(scored_BT, entropy_BT, 0)


def token_log_odds(
    model: LanguageModel,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    pair: tuple[int, int],
    *,
    remat: bool = False,
) -> jax.Array:
    """Log-odds (B, T), float32, of the first token of `pair` against the second in the place of
    token t, given what stands before it: what a softmax over the two is the sigmoid of.
    Differentiable in the model; 0 where nothing predicts a token."""
    hidden_BTD = model.hidden(tokens_BT, positions_BT, segment_ids_BT, remat=remat)
    with jax.named_scope("token_log_odds"):
        logits_BT2 = model.pair_logits(hidden_BTD, pair)
        next_BT = logits_BT2[:, :, 0] - logits_BT2[:, :, 1]
    here_BT = lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1)
    is_predicted_BT = _is_predicted(here_BT, here_BT - 1, segment_ids_BT)
    return jnp.where(is_predicted_BT, jnp.roll(next_BT, 1, axis=1), 0)


def _in_front(wanted_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the positions of each row, those wanted first, else in order; where each one went). Not by
    sorting, which the TPU compiler takes long to lay out."""
    wanted = wanted_BT.astype(jnp.int32)
    count_B1 = jnp.sum(wanted, axis=1, keepdims=True)
    first_BT = jnp.cumsum(wanted, axis=1) - 1
    then_BT = count_B1 + jnp.cumsum(1 - wanted, axis=1) - 1
    place_BT = jnp.where(wanted_BT, first_BT, then_BT)

    def invert(place_T: jax.Array) -> jax.Array:
        here_T = jnp.arange(place_T.shape[0], dtype=jnp.int32)
        return jnp.zeros_like(place_T).at[place_T].set(here_T, unique_indices=True)

    return jax.vmap(invert)(place_BT), place_BT


def default_slices(rows: int, length: int, vocab_size: int) -> int:
    """Slices that keep the logits of each within `SLICE_ELEMENTS`, but at most 8, or one per 512
    positions: `rows` may be spread over a mesh, where each device's matmul has to stay large, and
    where the matrix is gathered, and its gradient added up, once a slice."""
    needed = math.ceil(rows * length * vocab_size / SLICE_ELEMENTS)
    return max(1, min(needed, length, max(8, length // 512)))


def _is_predicted(
    here_BT: jax.Array, before_BT: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    is_predicted_BT = (before_BT >= 0) & (before_BT < here_BT)
    if segment_ids_BT is None:
        return is_predicted_BT
    before_segment_BT = jnp.take_along_axis(segment_ids_BT, jnp.maximum(before_BT, 0), axis=1)
    return is_predicted_BT & sees(segment_ids_BT, before_segment_BT)


# --- logits, a slice at a time ------------------------------------------------------------------


def _split(array_BT: jax.Array, num_slices: int) -> jax.Array:
    """(B, T, ...) -> (slices, B, C, ...), padded with zeros to slices of one length C."""
    rows, length, *rest = array_BT.shape
    slice_length = math.ceil(length / num_slices)
    padding = [(0, 0), (0, num_slices * slice_length - length), *((0, 0) for _ in rest)]
    padded = jnp.pad(array_BT, padding)
    return jnp.moveaxis(padded.reshape(rows, num_slices, slice_length, *rest), 1, 0)


def _merge(slices: jax.Array, length: int) -> jax.Array:
    """(slices, B, C, ...) -> (B, T, ...), the inverse of `_split`."""
    num_slices, rows, slice_length, *rest = slices.shape
    joined = jnp.moveaxis(slices, 0, 1).reshape(rows, num_slices * slice_length, *rest)
    return joined[:, :length]


def _is_target(targets_BC: jax.Array, vocab_size: int) -> jax.Array:
    # Compared, not gathered: the vocabulary may be split over devices.
    shape = (*targets_BC.shape, vocab_size)
    return lax.broadcasted_iota(targets_BC.dtype, shape, 2) == targets_BC[:, :, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _score(
    features_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    temperature: jax.Array,
    count: jax.Array,
    num_slices: int,
    unknown_ids: tuple[range, ...],
) -> Stats:
    """Log-prob of each target and entropy under softmax(features @ head.T / temperature), of the
    first `count` positions of each row; what the others get is not to be used. `unknown_ids` are
    outside of the softmax, and no targets."""
    stats, _ = _score_forward(
        features_BTD, head_VD, targets_BT, temperature, count, num_slices, unknown_ids
    )
    return stats


def _score_forward(
    features_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    temperature: jax.Array,
    count: jax.Array,
    num_slices: int,
    unknown_ids: tuple[range, ...],
) -> tuple[Stats, Residuals]:
    cast_head_VD = head_VD.astype(features_BTD.dtype)
    features, targets = _split(features_BTD, num_slices), _split(targets_BT, num_slices)

    def score_slice(i: jax.Array, stats: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        logits_BCV = output_logits(features[i], cast_head_VD, unknown_ids) / temperature
        peak_BC1 = jnp.max(logits_BCV, axis=-1, keepdims=True)
        shifted_BCV = logits_BCV - peak_BC1
        weights_BCV = jnp.exp(shifted_BCV)
        total_BC = jnp.sum(weights_BCV, axis=-1)
        mean_shifted_BC = jnp.sum(weights_BCV * shifted_BCV, axis=-1) / total_BC
        is_target_BCV = _is_target(targets[i], head_VD.shape[0])
        target_BC = jnp.sum(jnp.where(is_target_BCV, shifted_BCV, 0), axis=-1)
        log_total_BC = jnp.log(total_BC)
        # Both bounds hold exactly but for rounding.
        logprobs_BC = jnp.minimum(target_BC - log_total_BC, 0)
        entropy_BC = jnp.maximum(log_total_BC - mean_shifted_BC, 0)
        normaliser_BC = peak_BC1[:, :, 0] + log_total_BC
        found = (logprobs_BC, entropy_BC, normaliser_BC)
        return tuple(x.at[i].set(y) for x, y in zip(stats, found, strict=True))

    zeros = jnp.zeros(targets.shape, jnp.float32)
    stats = lax.fori_loop(0, _used(count, targets), score_slice, (zeros, zeros, zeros))
    logprobs_BT, entropy_BT, normaliser_BT = (_merge(x, targets_BT.shape[1]) for x in stats)
    residuals = (features_BTD, head_VD, targets_BT, temperature, count, entropy_BT, normaliser_BT)
    return (logprobs_BT, entropy_BT), residuals


def _used(count: jax.Array, slices: jax.Array) -> jax.Array:
    """How many slices (slices, B, C, ...) hold the first `count` positions."""
    return (count + slices.shape[2] - 1) // slices.shape[2]


def _score_backward(
    num_slices: int, unknown_ids: tuple[range, ...], residuals: Residuals, cotangents: Stats
) -> tuple[jax.Array, jax.Array, None, None, None]:
    """With p = softmax(z), z the logits over the temperature:
    d log p_target / dz = [target] - p,    d entropy / dz = -p (log p + entropy).
    Both are 0 at unknown ids, which have p = 0."""
    features_BTD, head_VD, targets_BT, temperature, count, entropy_BT, normaliser_BT = residuals
    cast_head_VD = head_VD.astype(features_BTD.dtype)
    per_position = (features_BTD, targets_BT, entropy_BT, normaliser_BT, *cotangents)
    slices = tuple(_split(x, num_slices) for x in per_position)
    width = head_VD.shape[1]

    def grad_slice(i: jax.Array, grads: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        head_grad_DV, features_grad = grads
        features_BCD, targets_BC, *rest = (x[i] for x in slices)
        entropy_BC1, normaliser_BC1, logprob_grad_BC1, entropy_grad_BC1 = (
            x[:, :, None] for x in rest
        )
        logits_BCV = output_logits(features_BCD, cast_head_VD, unknown_ids) / temperature
        logprobs_BCV = logits_BCV - normaliser_BC1
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
    head_grad_DV, features_grad = lax.fori_loop(0, _used(count, slices[1]), grad_slice, zeros)
    features_grad_BTD = _merge(features_grad, targets_BT.shape[1])
    return features_grad_BTD, head_grad_DV.T.astype(head_VD.dtype), None, None, None


_score.defvjp(_score_forward, _score_backward)

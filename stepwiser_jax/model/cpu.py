"""Everything that is done otherwise because of XLA's CPU backend, and of glibc.

`CPU` is the attention that `attention.attention_for` chooses on CPU. Long packed rows attend block
by block, forward and backward (FlashAttention 2, arXiv 2307.08691, algorithms 1 and 2), so that no
array grows with T^2. Letters: X positions of a block, Y blocks of a row, Z pairs of blocks, E query
heads of a key/value head, W queries that meet the same keys at once (X * E).
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from stepwiser_jax.model.attention import (
    NOT_SEEN,
    SAVED,
    Attention,
    plain_scores,
    segment_mask,
)
from stepwiser_jax.model.attention.decoding import cache_attention
from stepwiser_jax.model.packing import group_of, is_prompt, sees

F32 = jnp.float32


def keep_freed_memory() -> None:
    """Tells glibc to keep what it frees. By default it maps fresh pages for every large buffer, and
    a step of a small model spends as long in page faults as in arithmetic. Does nothing on other C
    libraries."""
    trim_threshold, mmap_threshold, top_pad = -1, -3, -2
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(mmap_threshold, 1 << 25)  # the most that glibc takes
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(top_pad, 1 << 26)


def product_over_rows(a_TI: jax.Array, b_TO: jax.Array) -> jax.Array:
    """Does what `linear.product_over_rows` does.

    The fast bfloat16 product contracts the last axis of its left operand. Without the padding XLA
    folds the transpose into a product in float32.
    """
    padded_IT = jnp.pad(a_TI.T, ((0, 8), (0, 0)))
    dimensions = (((1,), (0,)), ((), ()))
    product = lax.dot_general(padded_IT, b_TO, dimensions, preferred_element_type=F32)
    return product[: a_TI.shape[1]]


def scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Does what `attention.plain_scores` does.

    In float32 few queries run several times faster if the keys are the left operand. Without the
    padding XLA turns the operands around again; one column is enough, and reads the least.
    """
    if k.dtype != F32:
        return plain_scores(q, k)
    flipped = jnp.einsum("...sh,...wh->...sw", k, q)
    padded = jnp.pad(flipped, [(0, 0)] * (flipped.ndim - 1) + [(0, 1)])
    return padded.swapaxes(-1, -2)[..., : q.shape[-2], :]


# --- packed rows, a visible pair of blocks at a time --------------------------------------------

LONG_ROW = 512
"""Rows of more tokens attend by visible blocks, which short ones are too small for."""

BLOCK = 128
"""Tokens of a block (X). XLA's CPU backend multiplies blocks of 64 half as fast."""


class VisibleBlocks(NamedTuple):
    """Pairs of blocks of which some query may see some key.

    Attributes:
        segment_ids_BYX: the row, cut into blocks.
        queries_BZ, keys_BZ: the two blocks of each pair.
        num_pairs_B: how many pairs of each row count; those after them are ignored.
    """

    segment_ids_BYX: jax.Array
    queries_BZ: jax.Array
    keys_BZ: jax.Array
    num_pairs_B: jax.Array


def visible_blocks(segment_ids_BT: jax.Array) -> VisibleBlocks:
    """Finds the pairs by the range of segments in each block. They are exact if the segments of a
    row ascend, as packing makes them, and otherwise too many."""
    B, T = segment_ids_BT.shape
    Y = math.ceil(T / BLOCK)
    ids_BYX = jnp.pad(segment_ids_BT, ((0, 0), (0, Y * BLOCK - T))).reshape(B, Y, BLOCK)

    def ranges_meet(values_BYX: jax.Array, key_counts_BYX: jax.Array) -> jax.Array:
        def ends(counts_BYX: jax.Array) -> tuple[jax.Array, jax.Array]:
            last = jnp.iinfo(jnp.int32).max
            low_BY = jnp.min(jnp.where(counts_BYX, values_BYX, last), axis=2)
            return low_BY, jnp.max(jnp.where(counts_BYX, values_BYX, -1), axis=2)

        (low_q, high_q), (low_k, high_k) = ends(ids_BYX != 0), ends(key_counts_BYX)
        low_q, high_q, low_k, high_k = (
            low_q[:, :, None],
            high_q[:, :, None],
            low_k[:, None],
            high_k[:, None],
        )
        return (low_q <= high_k) & (low_k <= high_q)

    visible_BYY = ranges_meet(ids_BYX, ids_BYX != 0)
    visible_BYY |= ranges_meet(group_of(ids_BYX), is_prompt(ids_BYX))
    visible_BZ = (visible_BYY & jnp.tril(jnp.ones((1, Y, Y), bool))).reshape(B, -1)
    order_BZ = jnp.argsort(~visible_BZ, axis=1, stable=True).astype(jnp.int32)
    num_pairs_B = jnp.sum(visible_BZ, axis=1, dtype=jnp.int32)
    return VisibleBlocks(ids_BYX, order_BZ // Y, order_BZ % Y, num_pairs_B)


def packed_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, blocks: VisibleBlocks
) -> jax.Array:
    """Returns attention under `segment_mask`, (B, T, N, H), by visible blocks; differentiable.
    Queries on padding get arbitrary values."""
    B, T, N, H = q_BTNH.shape
    K, Y = k_BTKH.shape[2], blocks.segment_ids_BYX.shape[1]

    def cut(x_BTNH: jax.Array) -> jax.Array:
        padded = jnp.pad(x_BTNH, ((0, 0), (0, Y * BLOCK - T), (0, 0), (0, 0)))
        return padded.reshape(B, Y, BLOCK, -1, H).swapaxes(2, 3)

    q_BYKWH = cut(q_BTNH).reshape(B, Y, K, -1, H)
    out_BYKHW = _packed(q_BYKWH, cut(k_BTKH), cut(v_BTKH), blocks)
    out_BYXNH = out_BYKHW.reshape(B, Y, K, H, -1, BLOCK).transpose(0, 1, 5, 2, 4, 3)
    return out_BYXNH.reshape(B, Y * BLOCK, N, H)[:, :T]


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Multiplies (K, ., .) arrays head by head, in float32. The left operand of a fast bfloat16
    product is contracted over its last axis: so scores are (keys, queries)."""
    dimensions = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return lax.dot_general(a, b, dimensions, preferred_element_type=F32)


def _scores(q_KWH: jax.Array, k_KXH: jax.Array, bias_XX: jax.Array) -> jax.Array:
    """Returns the scores (K, X, W) of a block of keys by a block of queries."""
    K, W, H = q_KWH.shape
    scores_KXEX = _dot(k_KXH, q_KWH, (2, 2)).reshape(K, BLOCK, W // BLOCK, BLOCK)
    return (scores_KXEX * F32(H**-0.5) + bias_XX[None, :, None]).reshape(K, BLOCK, W)


def _bias(ids_YX: jax.Array, i: jax.Array, j: jax.Array, is_pair: jax.Array) -> jax.Array:
    """Returns what hides keys of block j from queries of block i: `NOT_SEEN`, or 0."""
    position_X = jnp.arange(BLOCK)
    seen_XX = sees(ids_YX[i][None, :], ids_YX[j][:, None]) & is_pair
    seen_XX &= j * BLOCK + position_X[:, None] <= i * BLOCK + position_X[None, :]
    return jnp.where(seen_XX, 0, F32(NOT_SEEN))


def _over_pairs(body: Any, carry: Any, rows: Any, blocks: VisibleBlocks) -> Any:
    """Runs `carry = body(carry, row, bias_XX, i, j)` over the pairs, one of every row at a time.

    The bias of the next pair is carried too: XLA computes once what a loop carries, and otherwise
    again in every operation that reads it.
    """

    def pair(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        return blocks.queries_BZ[:, z], blocks.keys_BZ[:, z]

    def bias(z: jax.Array) -> jax.Array:
        return jax.vmap(_bias)(blocks.segment_ids_BYX, *pair(z), z < blocks.num_pairs_B)

    def step(z: jax.Array, state: Any) -> Any:
        bias_BXX, carry = state
        return bias(z + 1), jax.vmap(body)(carry, rows, bias_BXX, *pair(z))

    num_pairs = jnp.max(blocks.num_pairs_B)
    return lax.fori_loop(0, num_pairs, step, (bias(jnp.int32(0)), carry))[1]


@jax.custom_vjp
def _packed(
    q_BYKWH: jax.Array, k_BYKXH: jax.Array, v_BYKXH: jax.Array, blocks: VisibleBlocks
) -> jax.Array:
    return _packed_forward(q_BYKWH, k_BYKXH, v_BYKXH, blocks)[0]


def _packed_forward(
    q_BYKWH: jax.Array, k_BYKXH: jax.Array, v_BYKXH: jax.Array, blocks: VisibleBlocks
) -> tuple[jax.Array, tuple[Any, ...]]:
    B, Y, K, W, H = q_BYKWH.shape

    def pair(carry: Any, row: Any, bias_XX: jax.Array, i: jax.Array, j: jax.Array) -> Any:
        peak_YKW, total_YKW, out_YKHW = carry
        q_YKWH, k_YKXH, v_YKHX = row
        scores_KXW = _scores(q_YKWH[i], k_YKXH[j], bias_XX)
        peak_KW = jnp.maximum(peak_YKW[i], jnp.max(scores_KXW, axis=1))
        weights_KXW = jnp.exp(scores_KXW - peak_KW[:, None])
        rescale_KW = jnp.exp(peak_YKW[i] - peak_KW)
        total_KW = rescale_KW * total_YKW[i] + jnp.sum(weights_KXW, axis=1)
        out_KHW = _dot(v_YKHX[j], weights_KXW.astype(v_YKHX.dtype), (2, 1))
        out_KHW += rescale_KW[:, None] * out_YKHW[i]
        updates = (peak_KW, total_KW, out_KHW)
        return tuple(x.at[i].set(y) for x, y in zip(carry, updates, strict=True))

    carry = (
        jnp.full((B, Y, K, W), NOT_SEEN, F32),
        jnp.zeros((B, Y, K, W), F32),
        jnp.zeros((B, Y, K, H, W), F32),
    )
    rows = (q_BYKWH, k_BYKXH, v_BYKXH.swapaxes(3, 4))
    peak, total, out = _over_pairs(pair, carry, rows, blocks)
    total = jnp.maximum(total, 1)  # in blocks of padding it is 0
    out = (out / total[:, :, :, None]).astype(q_BYKWH.dtype)
    log_total = peak + jnp.log(total)
    out, log_total = checkpoint_name((out, log_total), SAVED)
    return out, (q_BYKWH, k_BYKXH, v_BYKXH, blocks, out, log_total)


def _packed_backward(residuals: tuple[Any, ...], out_grad_BYKHW: jax.Array) -> tuple[Any, ...]:
    q, k, v, blocks, out, log_total = residuals
    product_BYKHW = out.astype(F32) * out_grad_BYKHW.astype(F32)
    mean_BYKW = jnp.sum(product_BYKHW, axis=3)  # of the weights' gradient, under the weights

    def pair(carry: Any, row: Any, bias_XX: jax.Array, i: jax.Array, j: jax.Array) -> Any:
        q_grad_YKHW, k_grad_YKXH, v_grad_YKXH = carry
        q_YKWH, k_YKXH, k_YKHX, v_YKXH, out_grad_YKWH, log_total_YKW, mean_YKW = row
        scores_KXW = _scores(q_YKWH[i], k_YKXH[j], bias_XX)
        weights_KXW = jnp.exp(scores_KXW - log_total_YKW[i][:, None])
        out_grad_KWH = out_grad_YKWH[i]
        v_grad_KXH = _dot(weights_KXW.astype(q.dtype), out_grad_KWH, (2, 1))
        weights_grad_KXW = _dot(v_YKXH[j], out_grad_KWH, (2, 2)) - mean_YKW[i][:, None]
        scale = F32(q.shape[-1] ** -0.5)
        scores_grad_KXW = (weights_KXW * weights_grad_KXW * scale).astype(q.dtype)
        return (
            q_grad_YKHW.at[i].add(_dot(k_YKHX[j], scores_grad_KXW, (2, 1))),
            k_grad_YKXH.at[j].add(_dot(scores_grad_KXW, q_YKWH[i], (2, 1))),
            v_grad_YKXH.at[j].add(v_grad_KXH),
        )

    out_grad_BYKWH = out_grad_BYKHW.swapaxes(3, 4)
    rows = (q, k, k.swapaxes(3, 4), v, out_grad_BYKWH, log_total, mean_BYKW)
    carry = (jnp.zeros(out.shape, F32), jnp.zeros(k.shape, F32), jnp.zeros(v.shape, F32))
    q_grad, k_grad, v_grad = _over_pairs(pair, carry, rows, blocks)
    q_grad = q_grad.swapaxes(3, 4).astype(q.dtype)
    return q_grad, k_grad.astype(k.dtype), v_grad.astype(v.dtype), None


_packed.defvjp(_packed_forward, _packed_backward)


def _mask(segment_ids_BT: jax.Array) -> VisibleBlocks | jax.Array:
    is_long = segment_ids_BT.shape[1] > LONG_ROW
    return visible_blocks(segment_ids_BT) if is_long else segment_mask(segment_ids_BT)


def _attend(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask: VisibleBlocks | jax.Array
) -> jax.Array:
    if isinstance(mask, VisibleBlocks):
        return packed_attention(q_BTNH, k_BTKH, v_BTKH, mask)
    # With heads before positions the products run a fifth faster than in `plain_attend`.
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    return cache_attention(q_BTNH, k_BKTH, v_BKTH, mask, plain_scores)


CPU = Attention(_mask, _attend, scores, suffix_dtype="float32")
"""The suffix cache is float32: XLA casts a whole bfloat16 cache and back at every write."""

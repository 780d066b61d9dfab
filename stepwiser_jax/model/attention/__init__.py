"""Attention, run by XLA: of queries over keys under an explicit mask, of decoding rows over the
prefix they share, and, for training, of a packed row over itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from stepwiser_jax.model.packing import group_of, is_prefix, sees

F32 = jnp.float32
NOT_SEEN = -1e30
"""Score of a key that the mask hides. Not -inf: a row that sees nothing must not become NaN."""


SAVED = "attention"
"""How jax.checkpoint calls what attention's forward pass leaves for its backward pass."""


def _is_cudnn_forward(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name == "dot_product_attention_fwd_wrapper"  # jax gives its outputs no name


save_attention = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(SAVED), _is_cudnn_forward
)
"""The policy, for jax.checkpoint, under which a block's attention does not run again."""


@dataclass(frozen=True)
class Attention:
    """How the packed rows of a batch attend: their mask, made once, and what every layer does with
    it."""

    mask: Callable[[jax.Array], Any]
    """Segment ids (B, T) -> a mask; each of its leaves is (B, ...)."""
    attend: Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]
    """Queries (B, T, N, H), keys (B, K, H, T), values (B, K, T, H), mask -> (B, T, N, H)."""


def segment_mask(segment_ids_BT: jax.Array) -> jax.Array:
    """Which key each query of a row sees, (B, T, T) bool: those that are not later in the row,
    of segments that it `sees`."""
    T = segment_ids_BT.shape[1]
    visible_BTT = sees(segment_ids_BT[:, :, None], segment_ids_BT[:, None, :])
    return visible_BTT & jnp.tril(jnp.ones((T, T), bool))[None]


def shared_prefix_attention(
    q_B1NH: jax.Array,
    prefix: tuple[jax.Array, jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array, jax.Array],
) -> jax.Array:
    """Attention of one query a row over a prefix that R = B / P rows share, and over the row's own.

    Each part is keys (., K, H, S), values (., K, S, H) and a mask (B, S); the prefix has P leading
    entries, and row b reads entry b // R. The prefix is multiplied with the queries of all its rows
    at once: it is stored once, and read once.
    """
    B, _, N, H = q_B1NH.shape
    prefix_k, prefix_v, prefix_mask_BS = prefix
    own_k, own_v, own_mask_BC = own
    P, K = prefix_k.shape[:2]
    R, G = B // P, N // K
    q_BKGH = q_B1NH.reshape(B, K, G, H) * jnp.asarray(H**-0.5, q_B1NH.dtype)
    q_PKMH = q_BKGH.reshape(P, R, K, G, H).swapaxes(1, 2).reshape(P, K, R * G, H)
    shared_PKMS = jnp.einsum("pkmh,pkhs->pkms", q_PKMH, prefix_k, preferred_element_type=F32)
    visible_PRS = prefix_mask_BS.reshape(P, R, -1)
    shared_PKRGS = jnp.where(
        visible_PRS[:, None, :, None], shared_PKMS.reshape(P, K, R, G, -1), NOT_SEEN
    )
    own_BKGC = jnp.einsum(
        "bkgh,bkhc->bkgc", q_BKGH.astype(own_k.dtype), own_k, preferred_element_type=F32
    )
    own_BKGC = jnp.where(own_mask_BC[:, None, None], own_BKGC, NOT_SEEN)

    shared_peak_PKRG = jnp.max(shared_PKRGS, axis=-1)
    own_peak_BKG = jnp.max(own_BKGC, axis=-1)
    peak_BKG = jnp.maximum(_by_row(shared_peak_PKRG), own_peak_BKG)
    peak_PKRG = peak_BKG.reshape(P, R, K, G).swapaxes(1, 2)
    shared_PKRGS = jnp.exp(shared_PKRGS - peak_PKRG[..., None])
    own_BKGC = jnp.exp(own_BKGC - peak_BKG[..., None])
    total_BKG = _by_row(jnp.sum(shared_PKRGS, axis=-1)) + jnp.sum(own_BKGC, axis=-1)
    shared_out_PKMH = jnp.einsum(
        "pkms,pksh->pkmh",
        shared_PKRGS.reshape(P, K, R * G, -1).astype(prefix_v.dtype),
        prefix_v,
        preferred_element_type=F32,
    )
    own_out_BKGH = jnp.einsum(
        "bkgc,bkch->bkgh", own_BKGC.astype(own_v.dtype), own_v, preferred_element_type=F32
    )
    out_BKGH = _by_row(shared_out_PKMH.reshape(P, K, R, G, H)) + own_out_BKGH
    out_BKGH = out_BKGH / total_BKG[..., None]
    return out_BKGH.reshape(B, 1, N, H).astype(q_B1NH.dtype)


def _by_row(x_PKRG: jax.Array) -> jax.Array:
    """(P, K, R, ...) -> (P R, K, ...)."""
    P, K, R = x_PKRG.shape[:3]
    return x_PKRG.swapaxes(1, 2).reshape(P * R, K, *x_PKRG.shape[3:])


def attention(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """Grouped-query attention, (B, T, N, H). Keys come with slots last: so both products run along
    the layout that XLA's CPU backend multiplies ten times faster for single queries. Softmax in
    float32; a query that sees nothing gets the mean of the values, which its own mask keeps out of
    every result."""
    B, T, N, H = q_BTNH.shape
    K = k_BKHS.shape[1]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    scores_BKGTS = jnp.einsum(
        "bkgth,bkhs->bkgts", q_BKGTH, k_BKHS, preferred_element_type=jnp.float32
    )
    scores_BKGTS = scores_BKGTS * jnp.float32(H**-0.5)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, F32(NOT_SEEN))
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype)
    out_BKGTH = jnp.einsum("bkgts,bksh->bkgth", weights_BKGTS, v_BKSH)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


# --- packed rows, a visible pair of blocks at a time --------------------------------------------

LONG_ROW = 512
"""Rows of more tokens attend by visible blocks, which short ones are too small for."""

BLOCK = 128
"""Tokens of a block. XLA's CPU backend multiplies blocks of 64 half as fast."""


class VisibleBlocks(NamedTuple):
    """Pairs of blocks of which a query may see a key: query and key block of each (B, pairs), and
    how many pairs each row has; those after them are to be ignored."""

    segment_ids_BnS: jax.Array
    queries_BP: jax.Array
    keys_BP: jax.Array
    count_B: jax.Array


def visible_blocks(segment_ids_BT: jax.Array) -> VisibleBlocks:
    """The pairs, by the ranges of segments in each block: exact where the segments of a row
    ascend, as packing makes them, and too many otherwise."""
    B, T = segment_ids_BT.shape
    blocks = math.ceil(T / BLOCK)
    padded_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, blocks * BLOCK - T)))
    ids_BnS = padded_BT.reshape(B, blocks, BLOCK)

    def meet(query_BnS: jax.Array, key_BnS: jax.Array, key_counts: jax.Array) -> jax.Array:
        last = jnp.iinfo(jnp.int32).max
        low_q = jnp.min(jnp.where(ids_BnS != 0, query_BnS, last), axis=2)[:, :, None]
        high_q = jnp.max(jnp.where(ids_BnS != 0, query_BnS, -1), axis=2)[:, :, None]
        low_k = jnp.min(jnp.where(key_counts, key_BnS, last), axis=2)[:, None, :]
        high_k = jnp.max(jnp.where(key_counts, key_BnS, -1), axis=2)[:, None, :]
        return (low_q <= high_k) & (low_k <= high_q)

    groups_BnS = group_of(ids_BnS)
    visible_Bnn = meet(ids_BnS, ids_BnS, ids_BnS != 0)
    visible_Bnn |= meet(groups_BnS, groups_BnS, is_prefix(ids_BnS))
    visible_BP = (visible_Bnn & jnp.tril(jnp.ones((1, blocks, blocks), bool))).reshape(B, -1)
    order_BP = jnp.argsort(~visible_BP, axis=1, stable=True).astype(jnp.int32)
    count_B = jnp.sum(visible_BP, axis=1, dtype=jnp.int32)
    return VisibleBlocks(ids_BnS, order_BP // blocks, order_BP % blocks, count_B)


def packed_attention(
    q_BTNH: jax.Array, k_BKHT: jax.Array, v_BKTH: jax.Array, blocks: VisibleBlocks
) -> jax.Array:
    """Attention of rows over themselves under `segment_mask`, (B, T, N, H), by visible blocks
    alone: no array grows with T^2, forward or backward (FlashAttention 2, arXiv 2307.08691,
    algorithms 1 and 2). What padding gets is nothing to rely on."""
    B, T, N, H = q_BTNH.shape
    K, n = k_BKHT.shape[1], blocks.segment_ids_BnS.shape[1]
    pad = n * BLOCK - T
    # M: the queries of a block times the query heads of a key/value head.
    q = jnp.pad(q_BTNH, ((0, 0), (0, pad), (0, 0), (0, 0)))
    q = q.reshape(B, n, BLOCK, K, N // K, H).transpose(0, 1, 3, 4, 2, 5)
    k = jnp.pad(k_BKHT, ((0, 0), (0, 0), (0, 0), (0, pad)))
    k = k.reshape(B, K, H, n, BLOCK).transpose(0, 3, 1, 4, 2)
    v = jnp.pad(v_BKTH, ((0, 0), (0, 0), (0, pad), (0, 0)))
    v = v.reshape(B, K, n, BLOCK, H).transpose(0, 2, 1, 3, 4)
    out_BnKHM = _packed(q.reshape(B, n, K, -1, H), k, v, blocks)
    out = out_BnKHM.reshape(B, n, K, H, N // K, BLOCK).transpose(0, 1, 5, 2, 4, 3)
    return out.reshape(B, n * BLOCK, N, H)[:, :T]


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Products of (K, ., .) arrays, head by head, in float32. On CPU the left operand of a
    bfloat16 product has to be contracted over its last axis: hence the transposed scores."""
    dimensions = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return lax.dot_general(a, b, dimensions, preferred_element_type=F32)


def _scores(q_KMH: jax.Array, k_KSH: jax.Array, bias_SS: jax.Array) -> jax.Array:
    """(K, S, M): of the keys of a block by the queries of another."""
    K, M, H = q_KMH.shape
    scores_KSGS = _dot(k_KSH, q_KMH, (2, 2)).reshape(K, BLOCK, M // BLOCK, BLOCK)
    return (scores_KSGS * F32(H**-0.5) + bias_SS[None, :, None]).reshape(K, BLOCK, M)


def _bias(ids_nS: jax.Array, i: jax.Array, j: jax.Array, is_pair: jax.Array) -> jax.Array:
    """What is added to the scores of block j's keys by block i's queries: 0, or hides them."""
    here_S = jnp.arange(BLOCK)
    seen_SS = sees(ids_nS[i][None, :], ids_nS[j][:, None]) & is_pair
    seen_SS &= j * BLOCK + here_S[:, None] <= i * BLOCK + here_S[None, :]
    return jnp.where(seen_SS, 0, F32(NOT_SEEN))


def _over_pairs(body: Any, carry: Any, rows: Any, blocks: VisibleBlocks) -> Any:
    """`carry = body(carry, row, bias_SS, i, j)` for one pair of every row at a time.

    The bias of the next pair is carried too: what a loop carries is computed once, and not again
    in every operation that reads it.
    """

    def pair(p: jax.Array) -> tuple[jax.Array, jax.Array]:
        return blocks.queries_BP[:, p], blocks.keys_BP[:, p]

    def bias(p: jax.Array) -> jax.Array:
        return jax.vmap(_bias)(blocks.segment_ids_BnS, *pair(p), p < blocks.count_B)

    def step(p: jax.Array, state: Any) -> Any:
        bias_BSS, carry = state
        return bias(p + 1), jax.vmap(body)(carry, rows, bias_BSS, *pair(p))

    pairs = jnp.max(blocks.count_B)
    return lax.fori_loop(0, pairs, step, (bias(jnp.int32(0)), carry))[1]


@jax.custom_vjp
def _packed(
    q_BnKMH: jax.Array, k_BnKSH: jax.Array, v_BnKSH: jax.Array, blocks: VisibleBlocks
) -> jax.Array:
    return _packed_forward(q_BnKMH, k_BnKSH, v_BnKSH, blocks)[0]


def _packed_forward(q, k, v, blocks):
    B, n, K, M, H = q.shape

    def pair(carry, row, bias_SS, i, j):
        peak_nKM, total_nKM, out_nKHM = carry
        q_nKMH, k_nKSH, v_nKHS = row
        scores_KSM = _scores(q_nKMH[i], k_nKSH[j], bias_SS)
        peak_KM = jnp.maximum(peak_nKM[i], jnp.max(scores_KSM, axis=1))
        weights_KSM = jnp.exp(scores_KSM - peak_KM[:, None])
        fade_KM = jnp.exp(peak_nKM[i] - peak_KM)
        total_KM = fade_KM * total_nKM[i] + jnp.sum(weights_KSM, axis=1)
        out_KHM = _dot(v_nKHS[j], weights_KSM.astype(v_nKHS.dtype), (2, 1))
        out_KHM += fade_KM[:, None] * out_nKHM[i]
        updates = (peak_KM, total_KM, out_KHM)
        return tuple(x.at[i].set(y) for x, y in zip(carry, updates, strict=True))

    carry = (
        jnp.full((B, n, K, M), NOT_SEEN, F32),
        jnp.zeros((B, n, K, M), F32),
        jnp.zeros((B, n, K, H, M), F32),
    )
    rows = (q, k, v.swapaxes(3, 4))
    peak, total, out = _over_pairs(pair, carry, rows, blocks)
    total = jnp.maximum(total, 1)  # of a block that is padding
    out = (out / total[:, :, :, None]).astype(q.dtype)
    log_total = peak + jnp.log(total)
    out, log_total = checkpoint_name((out, log_total), SAVED)
    return out, (q, k, v, blocks, out, log_total)


def _packed_backward(residuals, out_grad_BnKHM):
    q, k, v, blocks, out, log_total = residuals
    product_BnKHM = out.astype(F32) * out_grad_BnKHM.astype(F32)
    mean_BnKM = jnp.sum(product_BnKHM, axis=3)  # of the weights' gradient, under the weights

    def pair(carry, row, bias_SS, i, j):
        q_grad_nKHM, k_grad_nKSH, v_grad_nKSH = carry
        q_nKMH, k_nKSH, k_nKHS, v_nKSH, out_grad_nKMH, log_total_nKM, mean_nKM = row
        scores_KSM = _scores(q_nKMH[i], k_nKSH[j], bias_SS)
        weights_KSM = jnp.exp(scores_KSM - log_total_nKM[i][:, None])
        out_grad_KMH = out_grad_nKMH[i]
        v_grad_KSH = _dot(weights_KSM.astype(q.dtype), out_grad_KMH, (2, 1))
        weights_grad_KSM = _dot(v_nKSH[j], out_grad_KMH, (2, 2)) - mean_nKM[i][:, None]
        scale = F32(q.shape[-1] ** -0.5)
        scores_grad_KSM = (weights_KSM * weights_grad_KSM * scale).astype(q.dtype)
        return (
            q_grad_nKHM.at[i].add(_dot(k_nKHS[j], scores_grad_KSM, (2, 1))),
            k_grad_nKSH.at[j].add(_dot(scores_grad_KSM, q_nKMH[i], (2, 1))),
            v_grad_nKSH.at[j].add(v_grad_KSH),
        )

    rows = (q, k, k.swapaxes(3, 4), v, out_grad_BnKHM.swapaxes(3, 4), log_total, mean_BnKM)
    carry = (jnp.zeros(out.shape, F32), jnp.zeros(k.shape, F32), jnp.zeros(v.shape, F32))
    q_grad, k_grad, v_grad = _over_pairs(pair, carry, rows, blocks)
    q_grad = q_grad.swapaxes(3, 4).astype(q.dtype)
    return q_grad, k_grad.astype(k.dtype), v_grad.astype(v.dtype), None


_packed.defvjp(_packed_forward, _packed_backward)


# --- either -------------------------------------------------------------------------------------


def _mask(segment_ids_BT: jax.Array) -> VisibleBlocks | jax.Array:
    is_long = segment_ids_BT.shape[1] > LONG_ROW
    return visible_blocks(segment_ids_BT) if is_long else segment_mask(segment_ids_BT)


def _attend(
    q_BTNH: jax.Array, k_BKHT: jax.Array, v_BKTH: jax.Array, mask: VisibleBlocks | jax.Array
) -> jax.Array:
    if isinstance(mask, VisibleBlocks):
        return packed_attention(q_BTNH, k_BKHT, v_BKTH, mask)
    return attention(q_BTNH, k_BKHT, v_BKTH, mask)


XLA = Attention(_mask, _attend)

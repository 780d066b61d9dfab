"""What a segment sees, and attention of queries over keys under an explicit mask, run by XLA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

F32 = jnp.float32
NOT_SEEN = -1e30
"""Score of a key that the mask hides. Not -inf: a row that sees nothing must not become NaN."""


@dataclass(frozen=True)
class Attention:
    """How the rows of a batch attend: their mask, made once, and what every layer does with it."""

    mask: Callable[[jax.Array], Any]
    """Segment ids (B, T), see `segment_mask` -> a mask; each of its leaves is (B, ...)."""
    attend: Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]
    """Queries (B, T, N, H), keys (B, K, H, T), values (B, K, T, H), mask -> (B, T, N, H)."""


def segment_mask(segment_ids_BT: jax.Array) -> jax.Array:
    """Which key each query of a row sees, (B, T, T) bool.

    A key is seen if it is not later in the row, is no padding (segment 0), and is of the query's
    own segment or of its group's prompt. A segment id is the group (from 1 on) in its high 16 bits
    and the member in the low ones, member 0 being the prompt, which is computed once for all; ids
    below 65536 are of no group.
    """
    T = segment_ids_BT.shape[1]
    query_BT1, key_B1T = segment_ids_BT[:, :, None], segment_ids_BT[:, None, :]
    own_BTT = (key_B1T == query_BT1) & (key_B1T != 0)
    prompt_BTT = is_prompt(key_B1T) & (group_of(key_B1T) == group_of(query_BT1))
    return (own_BTT | prompt_BTT) & jnp.tril(jnp.ones((T, T), bool))[None]


def group_of(segment_ids: jax.Array) -> jax.Array:
    """0 for segments of no group, and for padding."""
    return segment_ids >> 16


def is_prompt(segment_ids: jax.Array) -> jax.Array:
    return (segment_ids & 0xFFFF == 0) & (segment_ids != 0)


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


DENSE = Attention(segment_mask, attention)

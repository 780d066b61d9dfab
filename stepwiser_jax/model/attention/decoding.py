"""Attention of decoding rows over their caches.

Letters: W queries that meet the same keys at once, E query heads of a key/value head (N = K * E).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from stepwiser_jax.model.attention import NOT_SEEN

Scores = Callable[[jax.Array, jax.Array], jax.Array]


def cache_attention(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array, scores: Scores
) -> jax.Array:
    """Returns attention (B, T, N, H) of T queries a row over its cache; softmax in float32."""
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BKTEH = q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2)
    scores_BKTES = scores(q_BKTEH.reshape(B, K, -1, H), k_BKSH).reshape(B, K, T, N // K, -1)
    scores_BKTES = scores_BKTES * jnp.float32(H**-0.5)
    scores_BKTES = jnp.where(mask_BTS[:, None, :, None], scores_BKTES, NOT_SEEN)
    weights_BKTES = jax.nn.softmax(scores_BKTES, axis=-1).astype(v_BKSH.dtype)
    out_BKTEH = jnp.einsum("bktes,bksh->bkteh", weights_BKTES, v_BKSH)
    return out_BKTEH.swapaxes(1, 2).reshape(B, T, N, H)


def shared_prefix_attention(
    q_BNH: jax.Array,
    prefix: tuple[jax.Array, jax.Array, jax.Array],
    suffix: tuple[jax.Array, jax.Array, jax.Array],
    scores: Scores,
) -> jax.Array:
    """Returns attention (B, N, H) of one query a row over its shared prefix and its own suffix.

    A prefix is stored once, and read once for the queries of all rows that share it. Softmax runs
    over both parts together, in float32.

    Args:
        q_BNH: queries; row b has the prefix b // R.
        prefix: keys (Q, K, S, H), values (Q, K, S, H) and a mask (B, S).
        suffix: keys (B, K, C, H), values (B, K, C, H) and a mask (B, C).
        scores: the platform's, see `Attention`.
    """
    prefix_k_QKSH, prefix_v_QKSH, prefix_mask_BS = prefix
    suffix_k_BKCH, suffix_v_BKCH, suffix_mask_BC = suffix
    B, N, H = q_BNH.shape
    Q, K = prefix_k_QKSH.shape[:2]
    R, E = B // Q, N // K
    q_BKEH = q_BNH.reshape(B, K, E, H) * jnp.asarray(H**-0.5, q_BNH.dtype)
    q_QKWH = q_BKEH.reshape(Q, R, K, E, H).swapaxes(1, 2).reshape(Q, K, R * E, H)
    prefix_QKRES = scores(q_QKWH, prefix_k_QKSH).reshape(Q, K, R, E, -1)
    prefix_mask_Q1R1S = prefix_mask_BS.reshape(Q, 1, R, 1, -1)
    prefix_QKRES = jnp.where(prefix_mask_Q1R1S, prefix_QKRES, NOT_SEEN)
    suffix_BKEC = scores(q_BKEH.astype(suffix_k_BKCH.dtype), suffix_k_BKCH)
    suffix_BKEC = jnp.where(suffix_mask_BC[:, None, None], suffix_BKEC, NOT_SEEN)

    peak_BKE = jnp.maximum(_by_row(jnp.max(prefix_QKRES, axis=-1)), jnp.max(suffix_BKEC, axis=-1))
    peak_QKRE = peak_BKE.reshape(Q, R, K, E).swapaxes(1, 2)
    prefix_QKRES = jnp.exp(prefix_QKRES - peak_QKRE[..., None])
    suffix_BKEC = jnp.exp(suffix_BKEC - peak_BKE[..., None])
    total_BKE = _by_row(jnp.sum(prefix_QKRES, axis=-1)) + jnp.sum(suffix_BKEC, axis=-1)
    prefix_out_QKWH = jnp.einsum(
        "qkws,qksh->qkwh",
        prefix_QKRES.reshape(Q, K, R * E, -1).astype(prefix_v_QKSH.dtype),
        prefix_v_QKSH,
        preferred_element_type=jnp.float32,
    )
    suffix_out_BKEH = jnp.einsum(
        "bkec,bkch->bkeh",
        suffix_BKEC.astype(suffix_v_BKCH.dtype),
        suffix_v_BKCH,
        preferred_element_type=jnp.float32,
    )
    out_BKEH = _by_row(prefix_out_QKWH.reshape(Q, K, R, E, H)) + suffix_out_BKEH
    return (out_BKEH / total_BKE[..., None]).reshape(B, N, H).astype(q_BNH.dtype)


def _by_row(x: jax.Array) -> jax.Array:
    """(Q, K, R, ...) -> (B, K, ...)."""
    Q, K, R = x.shape[:3]
    return x.swapaxes(1, 2).reshape(Q * R, K, *x.shape[3:])

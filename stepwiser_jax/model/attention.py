"""Attention of queries over keys under an explicit mask: one function, run by XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def segment_mask(segment_ids_BT: jax.Array) -> jax.Array:
    """Which key each query of a row sees, (B, T, T) bool.

    A key is seen if it is not later in the row, is no padding (segment 0), and is of the query's
    own segment or of a shared prefix (a negative segment). A GRPO group is one row: its prompt is
    segment -1, its completions are segments 1..G, so that the prompt is computed once.
    """
    T = segment_ids_BT.shape[1]
    query_BT1, key_B1T = segment_ids_BT[:, :, None], segment_ids_BT[:, None, :]
    visible_BTT = (key_B1T < 0) | ((key_B1T == query_BT1) & (key_B1T != 0))
    return visible_BTT & jnp.tril(jnp.ones((T, T), bool))[None]


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
    # Not -inf: a row that sees nothing must not become NaN.
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.float32(-1e30))
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype)
    out_BKGTH = jnp.einsum("bkgts,bksh->bkgth", weights_BKGTS, v_BKSH)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)

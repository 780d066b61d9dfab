"""Attention, and the one place that chooses how a platform computes it.

__init__   what a choice consists of, and the choice
decoding   attention of decoding rows over caches
splash     packed rows on TPU
cudnn      packed rows on CUDA
../cpu     what XLA's CPU backend needs
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from stepwiser_jax.model.packing import sees

NOT_SEEN = -1e30
"""The score of a key that the mask hides. Not -inf: a row that sees nothing must not become NaN."""


def plain_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Returns the products (..., W, S) of queries (..., W, H) and keys (..., S, H), in float32."""
    return jnp.einsum("...wh,...sh->...ws", q, k, preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class Attention:
    """How a platform computes attention.

    Attributes:
        mask: segment ids (B, T) -> what `attend` gets in every layer; its leaves are (B, ...).
        attend: attention of packed rows over themselves, in training and prefill. Queries
            (B, T, N, H), keys and values (B, T, K, H) and the mask -> (B, T, N, H).
        scores: products of queries and cached keys in decoding, as `plain_scores`.
        suffix_dtype: the type of the suffix cache; None: the compute type.
        is_kernel: whether `attend` is a kernel, which XLA cannot split over devices.
    """

    mask: Callable[[jax.Array], Any]
    attend: Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]
    scores: Callable[[jax.Array, jax.Array], jax.Array] = plain_scores
    suffix_dtype: str | None = None
    is_kernel: bool = False


def attention_for(device: Any, dtype: Any, head_dim: int) -> Attention:
    """Returns the attention for a kind of device.

    Args:
        device: one of the devices, or a description of it, for ahead-of-time compilation.
        dtype: the compute type.
        head_dim: the size of a head.
    """
    if device.platform == "cpu":
        from stepwiser_jax.model.cpu import CPU

        return CPU
    if device.platform == "tpu":
        from stepwiser_jax.model.attention.splash import SPLASH  # Pallas takes 0.3 s to import

        return SPLASH
    from stepwiser_jax.model.attention.cudnn import CUDNN, cudnn_takes

    return CUDNN if cudnn_takes(device, jnp.dtype(dtype), head_dim) else PLAIN


# --- the plain form, which every platform can run -----------------------------------------------


def segment_mask(segment_ids_BT: jax.Array) -> jax.Array:
    """Returns which key each query of a row sees, (B, T, T) bool: earlier ones and itself, of the
    segments that its own `sees`."""
    T = segment_ids_BT.shape[1]
    visible_BTT = sees(segment_ids_BT[:, :, None], segment_ids_BT[:, None, :])
    return visible_BTT & jnp.tril(jnp.ones((T, T), bool))[None]


def plain_attend(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask_BTT: jax.Array
) -> jax.Array:
    """Returns grouped-query attention under `segment_mask`, (B, T, N, H); softmax in float32."""
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=mask_BTT[:, None])


PLAIN = Attention(segment_mask, plain_attend)

# --- rematerialization --------------------------------------------------------------------------

SAVED = "attention"
"""The name, for jax.checkpoint, of what attention's forward pass leaves for its backward pass."""


def _is_cudnn_forward(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name == "dot_product_attention_fwd_wrapper"  # jax gives its outputs no name


save_attention = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(SAVED), _is_cudnn_forward
)
"""The policy, for jax.checkpoint, under which a block's attention does not run again."""

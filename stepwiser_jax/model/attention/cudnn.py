"""Attention on CUDA: cuDNN's flash attention, shown what a segment sees as a mask.

cuDNN takes 16-bit types, and of masks an array over all pairs: (B, 1, T, T), one for all heads and
layers. It is the only array that grows with T^2: of a row of 16,384 tokens 256 MiB of booleans, and
twice that of the bias that jax makes of it while a layer runs (and once more for the gradient of
that bias, which cuDNN computes and nothing reads).
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from stepwiser_jax.model.attention import Attention, segment_mask

MULTIPLE = 8
"""cuDNN reads the bias 16 bytes at a time, and takes no odd number of tokens in training."""


def cudnn_mask(segment_ids_BT: jax.Array) -> jax.Array:
    """`segment_mask` of rows padded to a multiple of `MULTIPLE`."""
    padding = -segment_ids_BT.shape[1] % MULTIPLE
    return segment_mask(jnp.pad(segment_ids_BT, ((0, 0), (0, padding))))


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BKHT: jax.Array,
    v_BKTH: jax.Array,
    mask_BTT: jax.Array,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """As `attention.attention`, (B, T, N, H), under a `cudnn_mask`; differentiable.

    For types and heads that `cudnn_takes`; jax refuses others by name. `implementation`: `xla` is
    the same call without a GPU, for tests.
    """
    T = q_BTNH.shape[1]
    padding = ((0, 0), (0, mask_BTT.shape[1] - T), (0, 0), (0, 0))
    out_BTNH = jax.nn.dot_product_attention(
        jnp.pad(q_BTNH, padding),
        jnp.pad(k_BKHT.transpose(0, 3, 1, 2), padding),
        jnp.pad(v_BKTH.swapaxes(1, 2), padding),
        mask=mask_BTT[:, None],
        implementation=implementation,
    )
    return out_BTNH[:, :T]


CUDNN = Attention(cudnn_mask, cudnn_attention)


def cudnn_takes(device: Any, dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether this device has the kernels for heads of this size: NVIDIA's from Ampere on."""
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    capability = float(device.compute_capability)
    largest = 256 if capability >= 9 else 128
    fits = head_dim % 8 == 0 and head_dim <= largest
    return capability >= 8 and fits and jnp.dtype(dtype).itemsize == 2

"""Attention on CUDA: cuDNN's flash attention, which gets the segments as a mask.

cuDNN takes 16-bit types, and masks as arrays over all pairs, (B, 1, T, T), one for all heads and
layers. It is the only array that grows with T^2: for a row of 16,384 tokens 256 MiB of booleans,
and twice that of the bias that jax makes of it while a layer runs (and once more for the gradient
of that bias, which cuDNN computes and nothing reads).
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from stepwiser_jax.model.attention import Attention, segment_mask

MULTIPLE = 8
"""cuDNN reads the bias 16 bytes at a time, and takes no odd number of tokens in training."""


def cudnn_mask(segment_ids_BT: jax.Array) -> jax.Array:
    """Returns `segment_mask` of rows padded to a multiple of `MULTIPLE`."""
    padding = -segment_ids_BT.shape[1] % MULTIPLE
    return segment_mask(jnp.pad(segment_ids_BT, ((0, 0), (0, padding))))


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    mask: jax.Array,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Returns attention under a `cudnn_mask`, (B, T, N, H); differentiable.

    It takes the types and heads that `cudnn_takes`; jax refuses others by name. `implementation`:
    `xla` is the same call without a GPU, for tests.
    """
    T = q_BTNH.shape[1]
    padding = ((0, 0), (0, mask.shape[1] - T), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, padding) for x in (q_BTNH, k_BTKH, v_BTKH))
    out_BTNH = jax.nn.dot_product_attention(
        q, k, v, mask=mask[:, None], implementation=implementation
    )
    return out_BTNH[:, :T]


CUDNN = Attention(cudnn_mask, cudnn_attention, is_kernel=True)


def cudnn_takes(device: Any, dtype: jnp.dtype, head_dim: int) -> bool:
    """Returns whether this device has the kernels for such heads: NVIDIA's from Ampere on."""
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    capability = float(device.compute_capability)
    largest = 256 if capability >= 9 else 128
    fits = head_dim % 8 == 0 and head_dim <= largest
    return capability >= 8 and fits and jnp.dtype(dtype).itemsize == 2

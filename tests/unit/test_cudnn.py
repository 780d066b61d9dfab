"""Attention by cuDNN: what it computes, by the same call without a GPU; what is compiled for CUDA,
without a GPU either; and on which devices it is chosen."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn
from test_splash import HEADS, KV_HEADS, ROWS, inputs, out_and_gradients

from stepwiser_jax.model.attention import PLAIN, attention_for, cudnn, plain_attend, segment_mask
from stepwiser_jax.model.attention.splash import SPLASH
from stepwiser_jax.model.cpu import CPU


def test_equals_dense_attention():
    segment_ids = jnp.array(list(ROWS.values()), jnp.int32)[:, :397]  # no multiple of 8
    attend = functools.partial(cudnn.cudnn_attention, implementation="xla")
    mask = cudnn.cudnn_mask(segment_ids)
    assert mask.shape == (len(ROWS), 400, 400)
    found = out_and_gradients(attend, mask, segment_ids, 8)
    expected = out_and_gradients(plain_attend, segment_mask(segment_ids), segment_ids, 8)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_forward_and_backward_are_lowered_to_cudnn(monkeypatch):
    """For CUDA, as on a machine with cuDNN 9.10: its kernels and one mask for all heads, and no
    scores outside of them."""
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91000)
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in inputs(2, 397, 64))
    mask = cudnn.cudnn_mask(jnp.ones((2, 397), jnp.int32))

    def loss(q, k, v, mask):
        return jnp.sum(cudnn.cudnn_attention(q, k, v, mask).astype(jnp.float32))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = gradients.trace(q, k, v, mask).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @__cudnn\$fmha(\w+)", text)
    assert sorted(calls) == ["ScaleBiasSoftmax", "ScaleBiasSoftmaxBackward"]
    assert "tensor<2x1x400x400xbf16>" in text  # the mask as a bias
    assert f"tensor<2x{HEADS}x400x400x" not in text
    assert f"tensor<2x400x{KV_HEADS}x64xbf16>" in text  # grouped keys, not a copy for each query


def device(platform="gpu", version="PJRT C API\ncuda 13000", capability="9.0"):
    client = SimpleNamespace(platform_version=version)
    return SimpleNamespace(platform=platform, client=client, compute_capability=capability)


@pytest.mark.parametrize(
    ("found", "dtype", "head_dim", "takes"),
    [
        (device(), "bfloat16", 128, True),
        (device(), "bfloat16", 256, True),
        (device(), "float32", 128, False),
        (device(), "bfloat16", 20, False),
        (device(capability="8.0"), "float16", 128, True),
        (device(capability="8.0"), "bfloat16", 256, False),
        (device(capability="7.5"), "float16", 64, False),
        (device(version="rocm 70000"), "bfloat16", 128, False),
        (device("cpu", "cpu"), "bfloat16", 128, False),
    ],
)
def test_where_it_is_chosen(found, dtype, head_dim, takes):
    assert cudnn.cudnn_takes(found, jnp.dtype(dtype), head_dim) is takes
    assert (attention_for(found, dtype, head_dim) is cudnn.CUDNN) is takes


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (device("cpu", "cpu"), CPU),
        (device("tpu", "tpu"), SPLASH),
        (device(version="rocm 70000"), PLAIN),
    ],
)
def test_every_platform_has_its_attention(found, expected):
    assert attention_for(found, "bfloat16", 128) is expected

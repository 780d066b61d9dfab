"""The decoder: padding, segments, the cache and the shared prefix change nothing that they must
not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.interpreters import partial_eval

from stepwiser_jax.distributed.mesh import make_mesh, split_attention
from stepwiser_jax.model import cpu, transformer
from stepwiser_jax.model.attention import save_attention
from stepwiser_jax.model.attention.cudnn import CUDNN
from stepwiser_jax.model.attention.splash import SPLASH
from stepwiser_jax.model.cpu import LONG_ROW
from stepwiser_jax.model.decoder import Decoder
from stepwiser_jax.model.kv_cache import KVCache
from stepwiser_jax.model.packing import packing_id
from stepwiser_jax.model.transformer import Transformer
from tiny import tiny_config

pytestmark = pytest.mark.usefixtures("strict_dtypes")

FAMILIES = ["llama", "qwen2", "qwen3"]


@pytest.fixture(params=FAMILIES)
def model(request):
    return Transformer(tiny_config(request.param), rngs=nnx.Rngs(3))


one_family = pytest.mark.parametrize("model", ["qwen3"], indirect=True)


def tokens(*shape, seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 0, 64)


logits = jax.jit(Transformer.__call__)


def test_no_token_sees_a_later_one(model):
    """Gradients of an output with respect to the inputs behind it are exactly zero."""
    inputs = tokens(1, 6)

    def outputs(shift_TD):
        embedded = model.embed[...][inputs] + shift_TD[None]
        table = jnp.concatenate([embedded[0], model.embed[...]])
        moved = nnx.merge(*nnx.split(model))
        moved.embed = model.embed.replace(table)
        return jnp.sum(moved.hidden(jnp.arange(6, dtype=jnp.int32)[None])[0], axis=-1)

    grads_TTD = jax.jit(jax.jacrev(outputs))(jnp.zeros((6, 32)))
    of_output_by_input = jnp.abs(grads_TTD).sum(2)
    np.testing.assert_array_equal(of_output_by_input > 0, np.tri(6, dtype=bool))


def test_padding_and_packing_change_nothing(model):
    a, b = tokens(1, 5, seed=1), tokens(1, 4, seed=2)
    row = jnp.concatenate([a, b, jnp.zeros((1, 3), jnp.int32)], axis=1)
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]])
    packed = logits(model, row, positions, segments)
    np.testing.assert_allclose(packed[:, :5], logits(model, a), atol=2e-5)
    np.testing.assert_allclose(packed[:, 5:9], logits(model, b), atol=2e-5)
    assert bool(jnp.isfinite(packed).all())


def test_shared_prefix_equals_separate_rows(model):
    prompt, first, second = tokens(1, 4, seed=1), tokens(1, 3, seed=2), tokens(1, 2, seed=3)
    row = jnp.concatenate([prompt, first, second], axis=1)
    segments = jnp.array([[packing_id(1, 0)] * 4 + [packing_id(1, 1)] * 3 + [packing_id(1, 2)] * 2])
    positions = jnp.array([[0, 1, 2, 3, 4, 5, 6, 4, 5]])
    shared = logits(model, row, positions, segments)
    np.testing.assert_allclose(
        shared[:, 4:7], logits(model, jnp.concatenate([prompt, first], 1))[:, 4:], atol=2e-5
    )
    np.testing.assert_allclose(
        shared[:, 7:], logits(model, jnp.concatenate([prompt, second], 1))[:, 4:], atol=2e-5
    )


def test_extending_a_cache_equals_the_whole_forward(model):
    """Rows of different lengths: read together, then extended by one and by several tokens."""
    rows = [tokens(1, n, seed=n)[0] for n in (3, 7, 5)]
    lengths = jnp.array([3, 7, 5])
    padded = jnp.stack([jnp.pad(row, (0, 8 - len(row)), constant_values=63) for row in rows])
    cache = KVCache.create(model.config, 3, 16, jnp.dtype("float32"))
    decoder = Decoder.from_transformer(model)
    _, cache = decoder.append(padded, lengths, cache)
    for step in (1, 3):
        new = tokens(3, step, seed=10 + step)
        hidden, cache = decoder.append(new, jnp.full((3,), step), cache)
        rows = [jnp.concatenate([row, new[b]]) for b, row in enumerate(rows)]
        for b, row in enumerate(rows):
            expected = logits(model, row[None])[0, -step:]
            np.testing.assert_allclose(model.logits(hidden[b]), expected, atol=2e-5)


def test_reading_equals_extending_an_empty_cache(model):
    """Through the attention of training, by visible blocks too."""
    decoder = Decoder.from_transformer(model)
    for length in (8, LONG_ROW + 20):
        padded = tokens(2, length)
        cache = KVCache.create(model.config, 2, length, jnp.dtype("float32"))
        expected = decoder.append(padded, jnp.full((2,), length), cache)
        found = jax.jit(Decoder.prefill)(decoder, padded)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


# A product of 8 numbers of order 1: rounding of the two types.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_scores_on_cpu_are_the_plain_ones(dtype, tolerance):
    queries, keys = jax.random.split(jax.random.key(0))
    q, k = jax.random.normal(queries, (2, 3, 5, 8)), jax.random.normal(keys, (2, 3, 7, 8))
    found = jax.jit(cpu.scores)(q.astype(dtype), k.astype(dtype))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, jnp.einsum("bkwh,bksh->bkws", q, k), atol=10 * tolerance)


@one_family
def test_a_rewound_row_equals_a_fresh_one(model):
    prompt = tokens(1, 6)
    decoder = Decoder.from_transformer(model)
    cache = KVCache.create(model.config, 1, 12, jnp.dtype("float32"))
    _, cache = decoder.append(prompt, jnp.array([6]), cache)
    cache = cache.rewind(jnp.array([2]))
    new = tokens(1, 3, seed=5)
    hidden, _ = decoder.append(new, jnp.array([3]), cache)
    expected = model(jnp.concatenate([prompt[:, :2], new], 1))[:, 2:]
    np.testing.assert_allclose(model.logits(hidden), expected, atol=2e-5)


@one_family
def test_rematerialisation_is_another_program_with_the_same_gradients(model):
    inputs = tokens(2, 6)

    def loss(m, remat):
        return jnp.sum(jnp.square(m.hidden(inputs, remat=remat)))

    programs = [str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(model, r)) for r in (0, 1)]
    assert "checkpoint" in programs[1] or "remat" in programs[1]
    assert programs[0] != programs[1]
    plain, remat = (jax.grad(loss)(model, flag) for flag in (False, True))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_split", [False, True], ids=["one device", "every device its rows"])
@pytest.mark.parametrize(
    ("attention", "kernel"),
    [
        (SPLASH, r"name=splash_mha_fwd"),
        (CUDNN, r"dot_product_attention_fwd_wrapper\["),
    ],
    ids=["splash", "cudnn"],
)
def test_rematerialisation_runs_no_attention_kernel_again(attention, kernel, is_split, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    config = tiny_config("qwen2", head_dim=64)
    if is_split:
        heads = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads}
        attention = split_attention(attention, make_mesh(2), **heads)
    model = nnx.eval_shape(
        lambda: Transformer(
            config, rngs=nnx.Rngs(0), compute_dtype=jnp.bfloat16, attention=attention
        )
    )

    def kernels(policy):
        def loss(model):
            return jnp.sum(model.hidden(tokens(2, 130), remat=True).astype(jnp.float32))

        monkeypatch.setattr(transformer, "save_attention", policy)
        gradients = jax.make_jaxpr(jax.grad(loss))(model).jaxpr
        used, _ = partial_eval.dce_jaxpr(gradients, [True] * len(gradients.outvars))
        return len(re.findall(kernel, str(used)))

    assert kernels(save_attention) == 1
    assert kernels(jax.checkpoint_policies.nothing_saveable) == 2


def test_bfloat16_compute_returns_float32_logits():
    model = Transformer(tiny_config("qwen3"), rngs=nnx.Rngs(0), compute_dtype=jnp.bfloat16)
    reference = Transformer(tiny_config("qwen3"), rngs=nnx.Rngs(0))
    with jax.numpy_dtype_promotion("standard"):  # jax's own attention promotes
        logits, exact = model(tokens(1, 5)), reference(tokens(1, 5))
    assert logits.dtype == jnp.float32
    assert 0 < float(jnp.abs(logits - exact).max()) < 0.1 * float(jnp.abs(exact).max())


def test_every_parameter_states_its_axes(model):
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        assert len(variable.get_metadata("axes")) == variable.get_value().ndim, path

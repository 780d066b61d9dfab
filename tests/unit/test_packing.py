"""Packed groups: the same loss and gradients as every completion alone with its own prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stepwiser_jax.model.attention import plain_attend, segment_mask
from stepwiser_jax.model.cpu import CPU, visible_blocks
from stepwiser_jax.model.linear import linear
from stepwiser_jax.model.packing import packing_id
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.rl.grpo import grpo_loss, loss_normalizer
from stepwiser_jax.rl.logprobs import token_logprobs
from stepwiser_jax.rl.rollouts import pack_groups
from stepwiser_jax.training.step import accumulate, split_rows, used_micro_batches
from tiny import rollout_group, tiny_config


def make_groups():
    rng = np.random.default_rng(0)

    def ids(n):
        return rng.integers(0, 64, n).tolist()

    return [rollout_group(ids(4 + p), [ids(2 + g + p) for g in range(2)]) for p in range(3)]


ADVANTAGES = np.array([[1.0, -0.5]] * 3)


def loss(model, batch, normalizer):
    logprobs = token_logprobs(
        model,
        batch.tokens_BT,
        batch.positions_BT,
        batch.segment_ids_BT,
        predictor_BT=batch.predictor_BT,
        target_mask_BT=batch.target_mask_BT,
    )
    return grpo_loss(
        logprobs,
        batch.sampler_logprobs_BT,
        batch.advantages_BT,
        batch.target_mask_BT,
        clip_eps_low=10.0,
        clip_eps_high=10.0,
        segment_ids_BT=batch.segment_ids_BT,
        normalizer=normalizer,
    )


def normalizer(batch):
    return loss_normalizer(batch.target_mask_BT, batch.segment_ids_BT, "token_mean")


def on_device(batch):
    return jax.tree.map(jnp.asarray, batch)


def test_packed_groups_equal_completions_alone():
    model = Transformer(tiny_config("llama"), rngs=nnx.Rngs(0))
    groups = make_groups()
    alone = [
        rollout_group(group.prompt_ids, [ids], [logprobs])
        for group in groups
        for ids, logprobs in zip(group.completions_G, group.logprobs_G, strict=True)
    ]
    packed = on_device(
        pack_groups(groups, ADVANTAGES, num_rows=4, row_lengths=[32], micro_batches=4)
    )
    assert int(used_micro_batches(split_rows(packed, 4))) == 2, "three groups share two rows"
    unshared = on_device(
        pack_groups(alone, ADVANTAGES.reshape(6, 1), num_rows=6, row_lengths=[8, 11, 99])
    )
    assert unshared.tokens_BT.shape == (6, 11), "the smallest length that holds all"
    assert bool(jnp.all(jnp.any(unshared.target_mask_BT, axis=1))), "a row each"
    expected, expected_metrics = accumulate(loss, normalizer, model, unshared, 1)
    found, metrics = accumulate(loss, normalizer, model, packed, 4)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.max(jnp.abs(a))))


def test_rows_without_tokens_are_not_computed():
    """What a padding micro-batch holds besides padding reaches nothing: it would be NaN."""
    groups = make_groups()
    batch = on_device(
        pack_groups(groups, ADVANTAGES, num_rows=8, row_lengths=[32], micro_batches=4)
    )
    used = int(used_micro_batches(split_rows(batch, 4)))
    assert used == 1

    def poisoned(model, rows, total):
        is_padding = jnp.all(rows.segment_ids_BT == 0)
        return jnp.where(is_padding, jnp.nan, 1.0) * model["weight"], {}

    model = {"weight": jnp.float32(2.0)}
    grads, metrics = accumulate(poisoned, normalizer, model, batch, 4)
    assert (float(grads["weight"]), float(metrics["loss"])) == (used, 2.0 * used)


@pytest.mark.parametrize("mask_of", [visible_blocks, segment_mask], ids=["long", "short"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_attention_on_cpu_is_the_plain_form(dtype, tolerance, mask_of):
    T, N, K, H = 400, 4, 2, 8
    rows = [
        [packing_id(1, 0)] * 150 + [packing_id(1, 1)] * 60 + [packing_id(1, 2)] * 70 + [0] * 120,
        [packing_id(1, 0)] * 100
        + [packing_id(1, 1)] * 30
        + [packing_id(2, 0)] * 90
        + [packing_id(2, 1)] * 90
        + [packing_id(2, 2)] * 90,
    ]
    segments = jnp.array(rows, jnp.int32)
    num_pairs_B = visible_blocks(segments).num_pairs_B
    assert int(num_pairs_B[0]) < int(num_pairs_B[1]), "the rows have different pairs"
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, T, N, H))
    k, v = (jax.random.normal(key, (2, T, K, H)) for key in keys[1:3])
    weights = jax.random.normal(keys[3], (2, T, N, H)) * (segments != 0)[:, :, None, None]

    def of(attend, inputs):
        def total(q, k, v):
            return jnp.sum(attend(q, k, v).astype(jnp.float32) * weights)

        return jax.value_and_grad(total, (0, 1, 2))(*inputs)

    expected, grads = of(lambda *x: plain_attend(*x, segment_mask(segments)), (q, k, v))
    cast = [x.astype(dtype) for x in (q, k, v)]
    found, found_grads = of(lambda *x: CPU.attend(*x, mask_of(segments)), cast)
    np.testing.assert_allclose(found, expected, rtol=10 * tolerance)
    for a, b in zip(grads, found_grads, strict=True):
        scale = float(jnp.max(jnp.abs(a)))
        np.testing.assert_allclose(b.astype(jnp.float32), a, atol=tolerance * scale)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_gradients_of_a_bfloat16_product(shape):
    outputs, width = shape
    x = jax.random.normal(jax.random.key(0), (2, 9, width))
    weight = jax.random.normal(jax.random.key(1), shape)
    mix = jax.random.normal(jax.random.key(2), (2, 9, outputs))

    def grads(x):
        def total(x, weight):
            return jnp.sum(linear(x, weight).astype(jnp.float32) * mix)

        return jax.grad(total, (0, 1))(x, weight)

    x_grad, weight_grad = grads(x.astype(jnp.bfloat16))
    assert weight_grad.dtype == jnp.float32
    np.testing.assert_allclose(jnp.einsum("bto,oi->bti", mix, weight), grads(x)[0], atol=1e-4)
    np.testing.assert_allclose(jnp.einsum("bto,bti->oi", mix, x), grads(x)[1], atol=1e-4)
    for a, b in zip((x_grad, weight_grad), grads(x), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2e-2 * float(jnp.max(jnp.abs(b))))

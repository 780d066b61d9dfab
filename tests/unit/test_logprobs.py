"""The one shift: entry t is of token t, whatever the packing, and memory stays bounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.rl.logprobs import (
    _targets_first,
    token_logprobs,
    token_logprobs_and_entropy,
)
from stepwiser_jax.rl.rollouts import pack_groups
from stepwiser_jax.training.batches import TokenBatch
from stepwiser_jax.training.sft_loss import cross_entropy_loss, num_target_tokens
from tiny import rollout_group, tiny_config

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.fixture(scope="module")
def model():
    return Transformer(tiny_config("qwen3"), rngs=nnx.Rngs(0))


def tokens(*shape, seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 0, 64)


def slow(model, row, temperature=1.0):
    """One token at a time from a fresh forward of what stands before it (and padding)."""
    out = [0.0]
    forward = jax.jit(type(model).__call__)
    for t in range(1, len(row)):
        before = np.zeros((1, len(row)), np.int32)
        before[0, :t] = row[:t]
        logits = np.asarray(forward(model, before)[0, t - 1], np.float64) / temperature
        out.append(logits[row[t]] - np.log(np.sum(np.exp(logits))))
    return np.array(out)


@pytest.mark.parametrize("num_slices", [None, 1, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_against_one_token_at_a_time(model, num_slices, temperature):
    rows = tokens(2, 7)
    found = token_logprobs(model, rows, temperature=temperature, num_slices=num_slices)
    for b in range(2):
        expected = slow(model, rows[b].tolist(), temperature)
        np.testing.assert_allclose(found[b], expected, atol=1e-4)


def test_entropy_by_definition(model):
    rows = tokens(1, 5)
    _, entropy = token_logprobs_and_entropy(model, rows)
    probs = jax.nn.softmax(model(rows)[0, :-1])
    np.testing.assert_allclose(entropy[0, 1:], -jnp.sum(probs * jnp.log(probs), -1), atol=1e-4)


def test_group_row_equals_separate_rows(model):
    prompt, completions = (
        tokens(5).tolist(),
        [tokens(3, seed=1).tolist(), tokens(4, seed=2).tolist()],
    )
    group = rollout_group(prompt, completions)
    batch = pack_groups([group], [[1.0, -1.0]], num_rows=2, row_lengths=[16])
    found = token_logprobs(
        model,
        jnp.asarray(batch.tokens_BT),
        jnp.asarray(batch.positions_BT),
        jnp.asarray(batch.segment_ids_BT),
        predictor_BT=jnp.asarray(batch.predictor_BT),
    )
    np.testing.assert_allclose(found[0, :5], slow(model, prompt), atol=1e-4)
    np.testing.assert_allclose(found[0, 5:8], slow(model, prompt + completions[0])[5:], atol=1e-4)
    np.testing.assert_allclose(found[0, 8:12], slow(model, prompt + completions[1])[5:], atol=1e-4)
    assert not np.asarray(found[0, 12:]).any()
    assert not np.asarray(found[1]).any()


@pytest.mark.parametrize("num_slices", [1, 4])
def test_gradients_are_those_of_the_plain_formula(model, num_slices):
    rows, weights = tokens(2, 9), jax.random.normal(jax.random.key(5), (2, 8))

    def ours(m):
        logprobs, entropy = token_logprobs_and_entropy(m, rows, num_slices=num_slices)
        return jnp.sum(weights * logprobs[:, 1:]) + jnp.sum(weights * entropy[:, 1:])

    def plain(m):
        logprobs = jax.nn.log_softmax(m(rows)[:, :-1])
        taken = jnp.take_along_axis(logprobs, rows[:, 1:, None], axis=2)[:, :, 0]
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        return jnp.sum(weights * taken) + jnp.sum(weights * entropy)

    for a, b in zip(
        jax.tree.leaves(jax.grad(ours)(model)), jax.tree.leaves(jax.grad(plain)(model)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


def biggest_array(jaxpr):
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [int(np.prod(v.aval.shape)) for v in equation.outvars if hasattr(v.aval, "shape")]
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "jaxpr"):
                    sizes.append(biggest_array(inner.jaxpr))
                elif hasattr(inner, "eqns"):
                    sizes.append(biggest_array(inner))
    return max(sizes)


def test_no_array_of_all_positions_and_the_whole_vocabulary():
    B, T, V = 2, 64, 50_000
    model = nnx.eval_shape(
        lambda: Transformer(tiny_config("qwen2", vocab_size=V), rngs=nnx.Rngs(0))
    )
    rows = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def loss(m, rows):
        return jnp.sum(token_logprobs(m, rows))

    def naive(m, rows):
        return jnp.sum(jax.nn.log_softmax(m(rows)))

    found = biggest_array(jax.make_jaxpr(jax.grad(loss))(model, rows).jaxpr)
    whole = biggest_array(jax.make_jaxpr(jax.grad(naive))(model, rows).jaxpr)
    assert whole >= B * T * V, "the measure does not see what it should"
    assert found < B * T * V


def test_cross_entropy_is_the_mean_over_learned_tokens(model):
    rows = tokens(2, 6)
    mask = jnp.array([[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]], bool)
    positions = jnp.broadcast_to(jnp.arange(6), rows.shape)
    batch = TokenBatch(rows, jnp.ones_like(rows), positions, mask)
    loss, _ = cross_entropy_loss(model, batch, num_target_tokens(batch))
    expected = [-slow(model, rows[b].tolist())[t] for b, t in ((0, 2), (0, 3), (1, 5))]
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-4)


def test_targets_come_first_in_order():
    is_target_BT = np.random.default_rng(0).random((5, 17)) < [[0.0], [0.2], [0.5], [0.9], [1.0]]
    order_BT, place_BT = _targets_first(jnp.asarray(is_target_BT))
    expected_BT = np.argsort(~is_target_BT, axis=1, kind="stable")
    np.testing.assert_array_equal(order_BT, expected_BT)
    np.testing.assert_array_equal(place_BT, np.argsort(expected_BT, axis=1))

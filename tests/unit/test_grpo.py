"""Advantages and the GRPO loss against slow numpy loops, by hand, and by property."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepwiser_jax.model.packing import member
from stepwiser_jax.rl.grpo import (
    _sequence_sums,
    aggregate,
    denominator_share,
    group_advantages,
    grpo_loss,
    k3,
    loss_normalizer,
    truncated_importance_weights,
)
from stepwiser_jax.rl.rollouts import pack_groups
from tiny import rollout_group

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def slow_advantages(rewards):
    out = []
    for group in rewards:
        mean = sum(group) / len(group)
        variance = sum((r - mean) ** 2 for r in group) / (len(group) - 1)
        scale = variance**0.5 + 1e-6
        out.append([0.0 if max(group) == min(group) else (r - mean) / scale for r in group])
    return np.array(out)


def test_advantages():
    rewards = np.random.default_rng(0).integers(0, 2, (6, 4)).astype(np.float32)
    rewards[0] = 1.0
    found = np.asarray(group_advantages(jnp.asarray(rewards)))
    np.testing.assert_allclose(found, slow_advantages(rewards), atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-5)
    assert not found[0].any()


def test_advantages_by_hand():
    found = group_advantages(jnp.array([[1.0, 0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(found, [[1.5, -0.5, -0.5, -0.5]], atol=1e-5)


GROUPS = [
    rollout_group([3, 9], [[5], [6, 7, 8], [4, 11]], rewards=[1, 0, 0], name="a"),
    rollout_group([3], [[5, 6], [7, 12], [13] * 9], rewards=[1, 1, 1], name="no signal"),
    rollout_group([3, 4], [[8, 9, 10, 14], [15], [16]], rewards=[0, 1, 1], name="b"),
    rollout_group([3, 2], [[5], [17], [18]], rewards=[0, 0, 0], name="no signal either"),
]


def slow_loss_of_groups(groups, denominator, how):
    """As verl has it: the sum over all groups that are learned, over what `denominator` holds. The
    log-ratio of a token is 0.4 times the sine of its id."""
    total, size = 0.0, 0
    for group in groups:
        (advantages,) = slow_advantages([group.rewards_G])
        for ids, advantage in zip(group.completions_G, advantages, strict=True):
            ratios = [float(np.exp(0.4 * np.sin(i))) for i in ids]
            gains = [min(r * advantage, min(max(r, 0.8), 1.28) * advantage) for r in ratios]
            total -= sum(gains) / (len(ids) if how == "sequence_mean" else 1)
    for group in denominator:
        size += sum(len(ids) if how == "token_mean" else 1 for ids in group.completions_G)
    return total / size


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean"])
def test_groups_that_are_left_out_count_in_the_denominator_or_do_not(how):
    """With them in the mean it is the loss of all groups, none of which is left out."""
    kept = [group for group in GROUPS if group.has_signal]
    left_out = [group for group in GROUPS if not group.has_signal]

    def loss(groups, counted):
        advantages_PG = group_advantages(np.array([group.rewards_G for group in groups]))
        advantages_PG *= denominator_share(groups, counted, how)
        batch = pack_groups(groups, advantages_PG, num_rows=4, row_lengths=[16, 24])
        old, mask = map(jnp.asarray, (batch.sampler_logprobs_BT, batch.target_mask_BT))
        return grpo_loss(
            old + 0.4 * jnp.sin(jnp.asarray(batch.tokens_BT, jnp.float32)),
            old,
            jnp.asarray(batch.advantages_BT),
            mask,
            clip_eps_low=0.2,
            clip_eps_high=0.28,
            dual_clip=3.0,
            segment_ids_BT=jnp.asarray(batch.segment_ids_BT),
            aggregation=how,
        )[0]

    of_all = slow_loss_of_groups(GROUPS, GROUPS, how)
    assert abs(of_all - slow_loss_of_groups(kept, kept, how)) > 0.01
    np.testing.assert_allclose(loss(GROUPS, []), of_all, rtol=1e-5)
    np.testing.assert_allclose(loss(kept, left_out), of_all, rtol=1e-5)
    np.testing.assert_allclose(loss(kept, []), slow_loss_of_groups(kept, kept, how), rtol=1e-5)


def test_shares_of_a_denominator_by_hand():
    """6 tokens of 6 + 13, 3 completions of 3 + 3."""
    first, second = GROUPS[:1], GROUPS[1:2]
    assert denominator_share(first, second, "token_mean") == 6 / 19
    assert denominator_share(first, second, "sequence_mean") == 3 / 6
    assert denominator_share(first, [], "token_mean") == 1


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(jnp.ones((3, 1)))


def make_case(seed, dtype=np.float32):
    """Packed rows: a prompt, completions 1 and 2 of its group, padding."""
    rng = np.random.default_rng(seed)
    members = np.array([[0, 0, 1, 1, 1, 2, 2, -1], [0, 1, 1, 2, 2, 2, 2, -1]])
    segments = np.where(members >= 0, member(1, 0) + members, 0)
    mask = members > 0
    logprobs = rng.normal(-1, 0.8, segments.shape).astype(dtype)
    old = (logprobs + rng.normal(0, 0.6, segments.shape)).astype(dtype)
    ref = (logprobs + rng.normal(0, 0.3, segments.shape)).astype(dtype)
    advantages = np.where(members == 1, 1.3, -0.7).astype(dtype)
    return logprobs, old, ref, advantages, mask, segments


def slow_loss(case, *, low, high, dual, kl_coef, how):
    logprobs, old, ref, advantages, mask, segments = case
    per_sequence = {}
    for b, t in itertools.product(range(mask.shape[0]), range(mask.shape[1])):
        if not mask[b, t]:
            continue
        ratio, adv = np.exp(logprobs[b, t] - old[b, t]), advantages[b, t]
        gain = min(ratio * adv, min(max(ratio, 1 - low), 1 + high) * adv)
        if dual is not None and adv < 0:
            gain = max(gain, dual * adv)
        difference = ref[b, t] - logprobs[b, t]
        kl = np.exp(difference) - difference - 1
        per_sequence.setdefault((b, segments[b, t]), []).append(-gain + kl_coef * kl)
    tokens = [x for values in per_sequence.values() for x in values]
    if how == "token_mean":
        return sum(tokens) / len(tokens)
    return np.mean([np.mean(values) for values in per_sequence.values()])


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("dual", [None, 1.5])
@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
def test_loss_against_loops(how, dual, kl_coef):
    case = make_case(1)
    logprobs, old, ref, advantages, mask, segments = map(jnp.asarray, case)
    loss, _ = grpo_loss(
        logprobs,
        old,
        advantages,
        mask,
        clip_eps_low=0.2,
        clip_eps_high=0.28,
        dual_clip=dual,
        kl_coef=kl_coef,
        reference_logprobs_BT=ref,
        segment_ids_BT=segments,
        aggregation=how,
    )
    expected = slow_loss(
        case,
        low=0.2,
        high=0.28,
        dual=dual,
        kl_coef=kl_coef,
        how=how,
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.5, 1.0, -1.28),  # clip-higher bounds the gain
        (1.5, -1.0, 1.5),  # a worse action that became likelier is not bounded from above
        (0.5, 1.0, -0.5),
        (0.5, -1.0, 0.8),  # the lower clip
        (9.0, -1.0, 3.0),  # dual clip
    ],
)
def test_clipping_by_hand(ratio, advantage, expected):
    loss, metrics = grpo_loss(
        jnp.log(jnp.array([[ratio]])),
        jnp.zeros((1, 1)),
        jnp.array([advantage]),
        jnp.ones((1, 1), bool),
        clip_eps_low=0.2,
        clip_eps_high=0.28,
        dual_clip=3.0,
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    clipped = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
    clipped += metrics["clip_fraction_dual"]
    is_clipped = (ratio, advantage) in [(1.5, 1.0), (0.5, -1.0), (9.0, -1.0)]
    assert float(clipped) == float(is_clipped)


def test_on_policy_gradient_is_reinforce():
    """At ratio 1 the gradient is that of -A log p, averaged over the tokens."""
    logprobs, _, _, advantages, mask, *_ = map(jnp.asarray, make_case(2))

    def loss(x):
        old = jax.lax.stop_gradient(x)
        return grpo_loss(x, old, advantages, mask, clip_eps_low=0.2, clip_eps_high=0.28)[0]

    expected = jnp.where(mask, -advantages, 0) / jnp.sum(mask).astype(jnp.float32)
    np.testing.assert_allclose(jax.grad(loss)(logprobs), expected, rtol=1e-5)


def test_what_is_masked_does_not_matter():
    case = list(map(jnp.asarray, make_case(3)))
    mask = case[4]
    settings = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}
    first, _ = grpo_loss(case[0], case[1], case[3], mask, **settings)
    noisy = [jnp.where(mask, x, jnp.full_like(x, 1e30)) for x in (case[0], case[1], case[3])]
    second, _ = grpo_loss(*noisy, mask, **settings)
    assert float(first) == float(second)


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean"])
def test_micro_batches_add_up(how):
    logprobs, old, _, advantages, mask, segments = map(jnp.asarray, make_case(4))
    normalizer = loss_normalizer(mask, segments, how)

    def loss(rows):
        return grpo_loss(
            logprobs[rows],
            old[rows],
            advantages[rows],
            mask[rows],
            clip_eps_low=0.2,
            clip_eps_high=0.28,
            segment_ids_BT=segments[rows],
            aggregation=how,
            normalizer=normalizer,
        )

    whole, metrics = loss(slice(None))
    parts = [loss(slice(i, i + 1)) for i in range(2)]
    np.testing.assert_allclose(sum(part[0] for part in parts), whole, rtol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(
            sum(part[1][name] for part in parts), value, rtol=1e-5, atol=1e-7
        )


def test_normalizers_by_hand():
    segments = jnp.array([[member(1, 0), member(1, 1), member(1, 1), member(1, 2), 0]])
    mask = jnp.array([[False, True, True, True, False]])
    found = [float(loss_normalizer(mask, segments, how)) for how in ("token_mean", "sequence_mean")]
    assert found == [3.0, 2.0]
    values = jnp.array([[9.0, 1.0, 3.0, 5.0, 9.0]])
    mean = aggregate(values, mask, "sequence_mean", jnp.float32(2.0), segments)
    assert float(mean) == (2.0 + 5.0) / 2


def test_sums_over_sequences_are_those_of_a_comparison_of_all_pairs():
    """In packed rows, without an array of two axes of positions."""
    rng = np.random.default_rng(0)
    T = 512
    segments = jnp.asarray(np.sort(rng.integers(0, 30, (3, T)))[:, ::-1])
    values = jnp.asarray(rng.normal(0, 1, segments.shape), jnp.float32)
    same = segments[:, :, None] == segments[:, None, :]
    expected = np.sum(np.where(same, np.asarray(values, np.float64)[:, None, :], 0), axis=2)
    np.testing.assert_allclose(_sequence_sums(values, segments), expected, atol=1e-5)
    program = jax.jit(_sequence_sums).lower(values, segments).as_text()
    assert f"{T}x{T}" not in program


def test_k3_is_zero_at_equality_and_never_negative():
    logprobs, _, ref, _, mask, *_ = map(jnp.asarray, make_case(5))
    assert float(jnp.abs(k3(logprobs, logprobs, mask)).max()) == 0
    assert float(k3(logprobs, ref, mask).min()) >= 0


def test_kl_needs_a_reference():
    x, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    settings = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}
    with pytest.raises(ValueError, match="reference_logprobs_BT"):
        grpo_loss(x, x, jnp.ones((1,)), mask, kl_coef=0.1, **settings)


# --- a sampler that is not quite the policy -----------------------------------------------------


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        # of each token: 1.5, 0.5 | 3 -> 2, 1 | 4 -> 2
        ("token", [1.0, 1.5, 0.5, 2.0, 1.0, 2.0, 1.0]),
        # of each sequence: 0.75 | 3 x 1 -> 2 | 4 -> 2
        ("sequence", [1.0, 0.75, 0.75, 2.0, 2.0, 2.0, 1.0]),
    ],
)
def test_importance_weights_by_hand(level, expected):
    """A prompt, completions of 2, 2 and 1 tokens, padding; the rest of the row holds anything."""
    segments = jnp.array([[-1, 1, 1, 2, 2, 3, 0]])
    ratios = jnp.array([[1e30, 1.5, 0.5, 3.0, 1.0, 4.0, 0.0]])
    sampler = jnp.array([[-0.3, -1.0, -0.2, -4.0, -2.0, -0.1, -5.0]])
    found = truncated_importance_weights(
        sampler + jnp.log(ratios), sampler, segments > 0, segments, level=level, cap=2.0
    )
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


def test_one_completion_a_row_needs_no_segments():
    mask = jnp.array([[False, True, True], [True, True, False]])
    found = truncated_importance_weights(
        jnp.log(jnp.array([[9.0, 0.5, 3.0], [0.2, 2.0, 9.0]])),
        jnp.zeros((2, 3)),
        mask,
        level="sequence",
        cap=10.0,
    )
    np.testing.assert_allclose(found, [[1.0, 1.5, 1.5], [0.4, 0.4, 1.0]], rtol=1e-6)


def test_gradients_are_scaled_by_the_weights_and_the_kl_term_is_not():
    logprobs, old, ref, advantages, mask, segments = map(jnp.asarray, make_case(6))
    weights = truncated_importance_weights(
        old, old - 0.4 * jnp.sin(10 * ref), mask, segments, level="token", cap=1.0
    )
    assert 1 < int(jnp.sum((weights == 1) & mask)) < int(jnp.sum(mask)), "it binds for some tokens"

    def gradient(kl_coef, weights=None):
        def loss(x):
            return grpo_loss(
                x,
                old,
                advantages,
                mask,
                clip_eps_low=0.2,
                clip_eps_high=0.28,
                dual_clip=1.5,
                kl_coef=kl_coef,
                reference_logprobs_BT=ref,
                importance_weights_BT=weights,
            )[0]

        return jax.grad(loss)(logprobs)

    np.testing.assert_allclose(gradient(0.0, weights), weights * gradient(0.0), rtol=1e-5)
    kl = gradient(0.5) - gradient(0.0)
    np.testing.assert_allclose(
        gradient(0.5, weights), weights * gradient(0.0) + kl, rtol=1e-4, atol=1e-6
    )


def test_weights_that_depend_on_the_parameters_are_constants():
    logprobs, old, _, advantages, mask, segments = map(jnp.asarray, make_case(7))

    def loss(x, weigh):
        before = jax.lax.stop_gradient(x)
        weights = truncated_importance_weights(
            weigh(x), old, mask, segments, level="sequence", cap=5.0
        )
        return grpo_loss(
            x,
            before,
            advantages,
            mask,
            clip_eps_low=0.2,
            clip_eps_high=0.28,
            importance_weights_BT=weights,
        )[0]

    live, held = (jax.grad(loss)(logprobs, weigh) for weigh in (lambda x: x, jax.lax.stop_gradient))
    np.testing.assert_array_equal(live, held)


@pytest.mark.parametrize("length", [1, 2])
def test_expected_gradients_are_those_of_the_policy(length):
    """All completions of `length` tokens out of 3, each as often as another sampler draws it.

    The policy is 3 logits for each token and the token before it. Weighted by whole sequences the
    expected gradient is that of on-policy samples; by tokens only where there is one; unweighted,
    or where the cap binds, it is not.
    """
    rng = np.random.default_rng(0)
    policy, shift = (jnp.asarray(rng.normal(0, s, (3, 3)), jnp.float32) for s in (1.0, 0.6))
    outcomes = jnp.array(list(itertools.product(range(3), repeat=length)))
    before = jnp.pad(outcomes[:, :-1], ((0, 0), (1, 0)))
    rewards = jnp.asarray(rng.normal(0, 1, len(outcomes)), jnp.float32)
    mask = jnp.ones(outcomes.shape, bool)

    def logprobs_of(logits):
        return jax.nn.log_softmax(logits, axis=-1)[before, outcomes]

    sampler = logprobs_of(policy + shift)

    def expected_gradient(drawn, level=None, cap=100.0):
        share = jnp.exp(jnp.sum(drawn, axis=1))

        def loss(logits):
            logprobs = logprobs_of(logits)
            old = jax.lax.stop_gradient(logprobs)
            weights = None
            if level is not None:
                weights = truncated_importance_weights(old, drawn, mask, level=level, cap=cap)
            return grpo_loss(
                logprobs,
                old,
                share * rewards,
                mask,
                clip_eps_low=0.2,
                clip_eps_high=0.28,
                importance_weights_BT=weights,
                normalizer=jnp.float32(1.0),
            )[0]

        return jax.grad(loss)(policy)

    on_policy = expected_gradient(logprobs_of(policy))

    def is_on_policy(gradient):
        return bool(jnp.allclose(gradient, on_policy, rtol=1e-4, atol=1e-5))

    assert float(jnp.abs(on_policy).max()) > 0.1
    assert is_on_policy(expected_gradient(sampler, "sequence"))
    assert is_on_policy(expected_gradient(sampler, "token")) == (length == 1)
    assert not is_on_policy(expected_gradient(sampler))
    assert not is_on_policy(expected_gradient(sampler, "sequence", cap=1.0))

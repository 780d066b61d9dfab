"""The chunk sampler: what a row gets depends on its id, and on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
from sampled import Reference, assert_sampled, tokens_of

from stepwiser_jax.inference.params import SamplingParams, StopReason
from stepwiser_jax.inference.token_sampler import inverse_cdf, truncate
from stepwiser_jax.rl.logprobs import token_logprobs

KEY = jax.random.key(7)
PROMPTS = [[5, 9, 11], [3], [8, 8, 2, 60, 33], [1, 2, 3, 4, 5, 6, 7]]


def make(model, tokenizer=None, rows=(8,), buckets=(32,)):
    return Reference(model, tokenizer, rows=rows, buckets=buckets)


def ids_of(prompts, group_size=1):
    return [f"p{p}/{g}" for p in range(len(prompts)) for g in range(group_size)]


def test_logprobs_are_those_of_the_trainer(tiny_model):
    params = SamplingParams(max_new_tokens=12, temperature=0.8)
    out = make(tiny_model).generate(PROMPTS, params, key=KEY, row_ids=ids_of(PROMPTS))
    for b, prompt in enumerate(PROMPTS):
        tokens = jnp.array([prompt + tokens_of(out)[b]])
        trained = token_logprobs(tiny_model, tokens, temperature=0.8)[0, len(prompt) :]
        np.testing.assert_allclose(out[b].logprobs, trained, atol=1e-4)


def test_slot_and_neighbours_do_not_matter_to_the_bit(tiny_model):
    params = SamplingParams(max_new_tokens=10)
    sampler = make(tiny_model)
    ids = ids_of(PROMPTS)
    first = sampler.generate(PROMPTS, params, key=KEY, row_ids=ids)
    order = [2, 0, 3, 1]
    moved = sampler.generate(
        [PROMPTS[i] for i in order], params, key=KEY, row_ids=[ids[i] for i in order]
    )
    others = sampler.generate([PROMPTS[2], [7] * 6], params, key=KEY, row_ids=[ids[2], "other"])
    for new, old in enumerate(order):
        assert tokens_of(moved)[new] == tokens_of(first)[old]
        np.testing.assert_array_equal(moved[new].logprobs, first[old].logprobs)
    assert tokens_of(others)[0] == tokens_of(first)[2]
    np.testing.assert_array_equal(others[0].logprobs, first[2].logprobs)


def test_rows_that_are_greedy_leave_the_others_as_they_are(tiny_model):
    sampled, greedy = (SamplingParams(max_new_tokens=10, temperature=t, top_k=9) for t in (1.0, 0))
    ids = ids_of(PROMPTS)
    both = [make(tiny_model).generate(PROMPTS, p, key=KEY, row_ids=ids) for p in (sampled, greedy)]
    sampler, is_greedy_B = make(tiny_model), [True, False, True, False]
    state = sampler.prefill(PROMPTS, 20)
    mixed, _ = sampler.decode(state, sampled, key=KEY, row_ids=ids, greedy_B=is_greedy_B)
    for b, is_greedy in enumerate(is_greedy_B):
        assert tokens_of(mixed)[b] == tokens_of(both[is_greedy])[b]
        assert tokens_of(mixed)[b] != tokens_of(both[not is_greedy])[b], "the case shows nothing"
        np.testing.assert_array_equal(mixed[b].logprobs, both[is_greedy][b].logprobs)


def test_another_batch_size_has_the_same_noise(tiny_model):
    params = SamplingParams(max_new_tokens=10)
    ids = ids_of(PROMPTS, 4)
    prompts_B = [prompt for prompt in PROMPTS for _ in range(4)]
    for rows in (4, 32):
        sampler = make(tiny_model, rows=(rows,))
        found = sampler.generate(PROMPTS, params, key=KEY, row_ids=ids, group_size=4)
        assert_sampled(tiny_model, prompts_B, ids, params, KEY, found)


def test_row_ids_name_the_noise(tiny_model):
    """Five attempts at one fork differ, and so do two iterations on one prompt."""
    params = SamplingParams(max_new_tokens=12)
    ids = [f"c0/a{attempt}" for attempt in range(5)] + ["it0", "it1"]
    out = make(tiny_model).generate([PROMPTS[0]] * 7, params, key=KEY, row_ids=ids)
    assert len({tuple(tokens_of(out)[b]) for b in range(7)}) == 7
    again = make(tiny_model).generate([PROMPTS[0]], params, key=KEY, row_ids=["it1"])
    assert tokens_of(again)[0] == tokens_of(out)[6]


def test_greedy_is_the_argmax_of_the_full_forward(tiny_model):
    params = SamplingParams(max_new_tokens=8, temperature=0.0)
    out = make(tiny_model).generate(PROMPTS, params, key=KEY, row_ids=ids_of(PROMPTS))
    rows = np.zeros((len(PROMPTS), 16), np.int32)
    for b, prompt in enumerate(PROMPTS):
        rows[b, : len(prompt) + 8] = prompt + tokens_of(out)[b]
    best = np.argmax(tiny_model(rows), axis=-1)
    for b, prompt in enumerate(PROMPTS):
        assert tokens_of(out)[b] == best[b, len(prompt) - 1 : len(prompt) + 7].tolist()


def test_rewound_row_equals_a_fresh_one(tiny_model):
    """Reject and resample: after the rewind a row is as if the rejected tokens had never been."""
    sampler = make(tiny_model, rows=(4,))
    params = SamplingParams(max_new_tokens=6)
    state = sampler.prefill(PROMPTS, min_tokens=32)
    _, state = sampler.decode(state, params, key=KEY, row_ids=["a", "b", "c", "d"])
    state = sampler.rewind(state, [len(prompt) for prompt in PROMPTS])
    again, _ = sampler.decode(state, params, key=KEY, row_ids=["e", "f", "g", "h"])
    fresh = sampler.generate(PROMPTS, params, key=KEY, row_ids=["e", "f", "g", "h"])
    for b in range(4):
        assert tokens_of(again)[b] == tokens_of(fresh)[b]
        np.testing.assert_allclose(again[b].logprobs, fresh[b].logprobs, atol=1e-5)


def test_a_branch_that_is_rewound_equals_prefilling_its_tokens(tiny_model):
    sampler = make(tiny_model, rows=(4,))
    params = SamplingParams(max_new_tokens=6)
    state = sampler.prefill([PROMPTS[3]], min_tokens=32)
    state = sampler.rewind(sampler.branch(state, [0, 0, 0]), [2, 5, 7])
    out, _ = sampler.decode(state, params, key=KEY, row_ids=["x", "y", "z"])
    prefixes = [PROMPTS[3][:2], PROMPTS[3][:5], PROMPTS[3]]
    fresh = sampler.generate(prefixes, params, key=KEY, row_ids=["x", "y", "z"])
    for b in range(3):
        assert tokens_of(out)[b] == tokens_of(fresh)[b]


def test_decoding_goes_on_where_it_stopped(tiny_model):
    """Twice 5 tokens are the same as 10: noise is by position."""
    sampler = make(tiny_model, rows=(1,))
    state = sampler.prefill([PROMPTS[0]], min_tokens=32)
    half = SamplingParams(max_new_tokens=5)
    first, state = sampler.decode(state, half, key=KEY, row_ids=["r"])
    second, _ = sampler.decode(state, half, key=KEY, row_ids=["r"])
    whole = sampler.generate([PROMPTS[0]], SamplingParams(10), key=KEY, row_ids=["r"])
    assert tokens_of(first)[0] + tokens_of(second)[0] == tokens_of(whole)[0]


def test_stop_ids(tiny_model):
    free = make(tiny_model).generate(PROMPTS, SamplingParams(20), key=KEY, row_ids=ids_of(PROMPTS))
    stop = tokens_of(free)[0][3]
    params = SamplingParams(20, stop_ids=(stop,))
    out = make(tiny_model).generate(PROMPTS, params, key=KEY, row_ids=ids_of(PROMPTS))
    for b in range(len(PROMPTS)):
        expected = tokens_of(free)[b]
        if stop in expected:
            expected = expected[: expected.index(stop) + 1]
            assert out[b].stop_reason is StopReason.STOP_ID
        else:
            assert out[b].stop_reason is StopReason.LENGTH
        assert tokens_of(out)[b] == expected


class Letters:
    """64 tokens, each a letter or two of `ab`: stop strings lie across and inside tokens."""

    known_ids = frozenset(range(64))

    def token_bytes(self):
        words = ["a", "b", "ab", "ba", "bb", "aab", "x", "y"]
        return [words[i % 8].encode() for i in range(64)]


def test_stop_strings_across_tokens(tiny_model):
    tokenizer = Letters()
    free = make(tiny_model).generate(PROMPTS, SamplingParams(20), key=KEY, row_ids=ids_of(PROMPTS))
    params = SamplingParams(20, stop_strings=("abb",))
    out = make(tiny_model, tokenizer).generate(PROMPTS, params, key=KEY, row_ids=ids_of(PROMPTS))
    spelled = tokenizer.token_bytes()
    hits = 0
    for b in range(len(PROMPTS)):
        text, expected = b"", []
        for token in tokens_of(free)[b]:
            expected.append(token)
            text += spelled[token]
            if b"abb" in text:
                hits += 1
                assert out[b].stop_reason is StopReason.STOP_STRING
                break
        assert tokens_of(out)[b] == expected
    assert hits, "the case shows nothing: no row contains the stop string"


def test_inverse_cdf_hits_the_distribution():
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(1), (1, 700)) * 2)
    uniform = (jnp.arange(20000) + 0.5) / 20000
    tokens, logprobs = inverse_cdf(jnp.log(jnp.broadcast_to(probs, (20000, 700))), uniform)
    np.testing.assert_allclose(logprobs, jnp.log(probs[0])[tokens], atol=1e-5)
    counts = np.bincount(np.asarray(tokens), minlength=700) / 20000
    np.testing.assert_allclose(counts, probs[0], atol=2e-4)
    ends = np.cumsum(np.asarray(probs[0], np.float64))
    expected = np.searchsorted(ends, np.asarray(uniform))
    # Rounding may move a token only if its uniform lies at a boundary.
    off = np.abs(ends[None] - np.asarray(uniform)[:, None]).min(axis=1)
    assert (off[np.asarray(tokens) != expected] < 1e-6).all()


def test_inverse_cdf_never_takes_what_has_no_probability():
    probs = jnp.zeros((3, 300)).at[:, 40].set(0.5).at[:, 290].set(0.5)
    tokens, _ = inverse_cdf(jnp.log(probs), jnp.array([0.0, 0.5, 1.0]))
    assert tokens.tolist() == [40, 290, 290]


def test_inverse_cdf_at_its_own_boundaries():
    """Where a draw falls on a boundary to the last bit, rounding must not leave the support."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        probs = np.zeros(1024, np.float32)
        probs[rng.choice(1024, 20, replace=False)] = rng.dirichlet(np.ones(20))
        edges = np.cumsum(probs.reshape(4, 256).sum(axis=1, dtype=np.float32), dtype=np.float32)
        around = np.concatenate([np.nextafter(edges, side) for side in (-1, 2)] + [edges])
        uniform = jnp.asarray(np.clip(around, 0, np.float32(1 - 2**-24)), jnp.float32)
        tokens, _ = inverse_cdf(jnp.log(jnp.broadcast_to(probs, (len(uniform), 1024))), uniform)
        assert (probs[np.asarray(tokens)] > 0).all()


def test_a_row_ends_at_its_own_limit(tiny_model):
    sampler = make(tiny_model)
    ids = ids_of(PROMPTS)
    state = sampler.prefill(PROMPTS, min_tokens=32)
    limits = [len(PROMPTS[0]) + 2, 20, len(PROMPTS[2]), 9]
    output, state = sampler.decode(state, SamplingParams(12), key=KEY, row_ids=ids, limits_B=limits)
    assert [len(completion.tokens) for completion in output] == [2, 12, 0, 2]
    free = sampler.generate(PROMPTS, SamplingParams(12), key=KEY, row_ids=ids)
    for b in range(4):
        assert tokens_of(output)[b] == tokens_of(free)[b][: len(output[b].tokens)]


def test_top_k_above_the_vocabulary_is_no_truncation():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    np.testing.assert_allclose(truncate(logits, 9, None), truncate(logits, 0, None))


def test_truncation_and_its_logprobs():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    top_k = jnp.exp(truncate(logits, 2, None))
    np.testing.assert_allclose(top_k, [[4 / 7, 3 / 7, 0, 0]], atol=1e-6)
    top_p = jnp.exp(truncate(logits, 0, jnp.float32(0.5)))
    np.testing.assert_allclose(top_p, [[4 / 7, 3 / 7, 0, 0]], atol=1e-6)
    nothing = jnp.exp(truncate(logits, 0, jnp.float32(0.3)))
    np.testing.assert_allclose(nothing, [[1, 0, 0, 0]], atol=1e-6)


def test_compiled_shapes_are_few(tiny_model):
    sampler = make(tiny_model, rows=(2, 8), buckets=(16, 32))
    for count in (1, 2, 3, 5, 8, 11):
        prompts = [[1 + i, 2, 3] for i in range(count)]
        sampler.generate(prompts, SamplingParams(6), key=KEY, row_ids=ids_of(prompts))
    decodes = [shape for shape in sampler.engine.compiled_shapes if shape.startswith("decode")]
    assert len(decodes) == 2

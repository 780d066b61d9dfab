"""The engine against the chunk sampler: the same noise, whatever is shared, refilled, moved."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from sampled import Reference, assert_sampled, tokens_of

from stepwiser_jax.errors import UserError
from stepwiser_jax.inference import engine as engine_module
from stepwiser_jax.inference import engine_state
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import Prefix, SampleRequest, SamplingParams, StopReason
from stepwiser_jax.inference.prefix_cache import PrefixCache
from stepwiser_jax.inference.scheduler import Grid
from stepwiser_jax.inference.token_sampler import TokenSampler
from stepwiser_jax.model.decoder import Decoder
from stepwiser_jax.model.flops import NOTHING, block_parameters
from stepwiser_jax.model.transformer import Transformer
from tiny import tiny_config

KEY = jax.random.key(7)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 64, n).tolist() for n in (3, 9, 14, 5, 30, 7)]
GROUP = 5
IDS = [f"p{p}/{g}" for p in range(len(PROMPTS)) for g in range(GROUP)]
STOPS = (3, 5, 7, 9, 11, 13)


def reference(model, params):
    sampler = Reference(model, rows=(8,), buckets=(16, 64))
    return sampler.generate(PROMPTS, params, key=KEY, row_ids=IDS, group_size=GROUP)


def check(model, params, output):
    assert_sampled(model, [p for p in PROMPTS for _ in range(GROUP)], IDS, params, KEY, output)


@pytest.mark.parametrize(
    ("rows", "params"),
    [
        ((4, 16), SamplingParams(12, stop_ids=STOPS)),
        ((2,), SamplingParams(12, stop_ids=STOPS)),
        ((64,), SamplingParams(12)),
        ((16,), SamplingParams(12, temperature=0.0)),
        ((16,), SamplingParams(12, temperature=0.7, top_k=10, top_p=0.9)),
    ],
    ids=["stops", "few rows", "many rows", "greedy", "truncated"],
)
def test_groups_are_those_of_the_sampler(tiny_model, rows, params):
    engine = Engine(tiny_model, rows=rows, buckets=(16, 64))
    output = engine.generate(PROMPTS, params, key=KEY, row_ids=IDS, group_size=GROUP)
    check(tiny_model, params, output)
    check(tiny_model, params, reference(tiny_model, params))
    assert engine.sampled_tokens == sum(len(c.tokens) for c in output)


def test_a_prompt_is_read_once_for_its_group(tiny_model):
    params, config = SamplingParams(12, stop_ids=STOPS), tiny_model.config
    engine = Engine(tiny_model, rows=(8,), buckets=(16, 64))
    output = engine.generate(PROMPTS, params, key=KEY, row_ids=IDS, group_size=GROUP)
    read = [completion.spent.read for completion in output]
    assert read == [n for prompt in PROMPTS for n in (len(prompt), *[0] * (GROUP - 1))]
    assert [c.spent.generated for c in output] == [len(c.tokens) for c in output]
    for b, completion in enumerate(output):
        n, new = len(PROMPTS[b // GROUP]), len(completion.tokens)
        fed = new if b % GROUP else n + new
        keys = sum(range(n + 1, n + new + 1)) + (0 if b % GROUP else sum(range(1, n + 1)))
        weights = fed * block_parameters(config) + new * config.vocab_size * config.hidden_size
        attention = 2 * config.num_layers * config.num_heads * config.head_dim * keys
        assert completion.spent.flops == 2 * (weights + attention)
    assert engine.usage.spent == sum((c.spent for c in output), NOTHING)
    engine.log_odds([PROMPTS[0]], (1, 2))
    assert engine.usage.spent.read == sum(read) + len(PROMPTS[0])
    sampler = Reference(tiny_model, rows=(8,), buckets=(16, 64))
    found = sampler.generate(PROMPTS[:1], params, key=KEY, row_ids=IDS[:1])
    alone = engine.generate(PROMPTS[:1], params, key=KEY, row_ids=IDS[:1])
    assert sampler.usage.spent == alone[0].spent
    assert found[0].spent.read == 0, "the caller knows for what rows it was read"


SOLUTIONS = [RNG.integers(0, 60, 50).tolist() for _ in range(6)]
CHUNK_ENDS = (10, 15, 24, 30, 38)


def judged(solution, end, closing=(61, 62)):
    """A prompt about a chunk: problem, history and chunk, and then the same words of each."""
    return [*solution[:end], *closing]


@pytest.mark.parametrize("rows", [(128,), (8,), (2,)], ids=["all at once", "refilled", "few rows"])
def test_prompts_that_begin_alike_read_what_they_share_once(tiny_model, rows):
    prompts = [judged(solution, end) for solution in SOLUTIONS for end in CHUNK_ENDS]
    prompts += [[5, 6], [7]]
    ids = [f"s{b}" for b in range(2 * len(prompts))]
    prompts_B = [prompt for prompt in prompts for _ in range(2)]
    params = SamplingParams(9, stop_ids=STOPS)
    engine = Engine(tiny_model, rows=rows, buckets=(64,))
    how = {"key": KEY, "row_ids": ids, "group_size": 2}
    output = engine.generate(prompts, params, cache=PrefixCache(), **how)
    assert_sampled(tiny_model, prompts_B, ids, params, KEY, output)
    read = engine.usage.spent.read
    apart = sum(map(len, prompts))
    assert read == sum(c.spent.read for c in output) < (apart if rows == (2,) else 0.6 * apart)
    if rows == (128,):
        longest = len(judged(SOLUTIONS[0], CHUNK_ENDS[-1]))
        assert read == len(SOLUTIONS) * (longest + 4 * 2) + 3, "the others read their last words"
    whole = engine.generate(prompts, params, **how)
    assert engine.usage.spent.read == read + apart
    assert tokens_of(whole) == tokens_of(output)


def test_prompts_of_the_next_call_read_what_is_new(tiny_model):
    """Steps of a search: a chunk more; a chunk written anew; a problem less, and one that is new;
    more rows than before. Rows end at different times, so that the grid shrinks on the way."""
    first, *_, last = SOLUTIONS
    steps = [
        [judged(solution, 15) for solution in SOLUTIONS[:5]],
        [judged(solution, 24) for solution in SOLUTIONS[:5]],
        [judged(first[:15] + last[15:], 21), *(judged(s, 30) for s in SOLUTIONS[2:5])],
        [judged(last, 15), judged(SOLUTIONS[3], 38), judged(SOLUTIONS[2], 30, (9, 9, 9))],
        [judged(SOLUTIONS[3], 38, (closing,)) for closing in range(6)],
        [judged(SOLUTIONS[3], 10, ())],
    ]
    read = [5 * 17, 5 * 11, 8 + 3 * 8, 17 + 10 + 3, 6 * 1, 1]
    engine = Engine(tiny_model, rows=(1, 2, 4, 16), buckets=(64,))
    params, cache = SamplingParams(9, stop_ids=STOPS), PrefixCache()
    for step, prompts in enumerate(steps):
        before, ids = engine.usage.spent.read, [f"{step}/{b}" for b in range(len(prompts))]
        output = engine.generate(prompts, params, key=KEY, row_ids=ids, cache=cache)
        assert_sampled(tiny_model, prompts, ids, params, KEY, output)
        assert engine.usage.spent.read - before == read[step], step
    assert any(name.startswith("shrink") for name in engine.compiled_shapes)


def test_a_prompt_that_begins_with_a_whole_prompt_reads_its_last_token(tiny_model):
    """Of three prompts each begins with all of the one before. The last token of a prompt is fed by
    its rows, and is not among what the next one copies."""
    params = SamplingParams(6, temperature=0.0, compared=(1, 2))
    engine, cache = Engine(tiny_model, rows=(1,), buckets=(64,)), PrefixCache()
    read = []
    for end in (15, 24, 38):
        how = {"key": KEY, "row_ids": [f"to {end}"]}
        (found,) = engine.generate([SOLUTIONS[0][:end]], params, cache=cache, **how)
        (expected,) = engine.generate([SOLUTIONS[0][:end]], params, **how)
        np.testing.assert_allclose(found.log_odds, expected.log_odds, rtol=0, atol=1e-5)
        assert tokens_of([found]) == tokens_of([expected])
        read.append(found.spent.read)
    assert read == [15, 10, 15]


def test_rows_are_refilled_and_slots_take_the_next_prefix(tiny_model, monkeypatch):
    """Fewer rows than samples and fewer slots than prefixes: 8 rows, 30 samples of many lengths."""
    params = SamplingParams(24, stop_ids=STOPS)
    told = []
    monkeypatch.setattr(engine_module, "rows_done", lambda *numbers: told.append(numbers))
    engine = Engine(tiny_model, rows=(8,), buckets=(32, 64))
    bursts = [
        completions
        for completions in engine.stream(requests(24), params, key=KEY, samples_per_prefix=2)
        if completions
    ]
    assert len(bursts) > 4
    found = [completion for burst in bursts for completion in burst]
    assert sorted(c.row_id for c in found) == sorted(IDS), "each is handed out once"
    found.sort(key=lambda completion: IDS.index(completion.row_id))
    assert len({len(c.tokens) for c in found}) > 3, "the case shows nothing: all end together"
    check(tiny_model, params, found)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[-1][:2] == (len(IDS), len(IDS)) and len({done for done, _, _ in told}) > 4
    assert sum(tokens for _, _, tokens in told) == engine.sampled_tokens
    grids = [name for name in engine.compiled_shapes if name.startswith("decode")]
    assert grids == ["decode 4x2 prefix=32 new=24 top_k=0 top_p=False"]


def requests(max_new_tokens):
    return [
        Prefix(
            prompt,
            [SampleRequest(f"p{p}/{g}", len(prompt), max_new_tokens) for g in range(GROUP)],
        )
        for p, prompt in enumerate(PROMPTS)
    ]


def test_few_rows_that_are_left_move_to_a_smaller_grid(tiny_model):
    params = SamplingParams(30, stop_ids=STOPS)
    engine = Engine(tiny_model, rows=(4, 32), buckets=(64,))
    output = engine.generate(PROMPTS, params, key=KEY, row_ids=IDS, group_size=GROUP)
    assert any(name.startswith("shrink") for name in engine.compiled_shapes)
    check(tiny_model, params, output)


def other_noise(state, b):
    return dataclasses.replace(state, hash_B=state.hash_B.at[b].add(1))


def other_values(state, b):
    values = tuple(x.at[b].multiply(0.9) for x in state.suffix.values)
    return dataclasses.replace(state, suffix=dataclasses.replace(state.suffix, values=values))


@pytest.mark.parametrize("corrupt", [other_noise, other_values])
def test_one_row_that_a_move_corrupts_is_found(tiny_model, monkeypatch, corrupt):
    """The check is as sharp as it has to be: the last row that is left, and no other."""
    shrink_grid = engine_module.shrink_grid

    def corrupting(state, source_B, is_used_B):
        return corrupt(shrink_grid(state, source_B, is_used_B), int(is_used_B.sum()) - 1)

    monkeypatch.setattr(engine_module, "shrink_grid", corrupting)
    params = SamplingParams(30, stop_ids=STOPS)
    engine = Engine(tiny_model, rows=(4, 32), buckets=(64,))
    output = engine.generate(PROMPTS, params, key=KEY, row_ids=IDS, group_size=GROUP)
    with pytest.raises(AssertionError):
        check(tiny_model, params, output)


@pytest.mark.parametrize("drawing", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 5}])
def test_compared_tokens_have_the_models_log_odds_at_each_token(tiny_model, drawing):
    """Rows move to a smaller grid, temperature and truncation do not matter. Without a pair nothing
    is recorded, and all else is the same."""
    free = SamplingParams(30, stop_ids=STOPS, **drawing)
    params = dataclasses.replace(free, compared=(11, 3))
    how = {"key": KEY, "row_ids": IDS, "group_size": GROUP}
    engine = Engine(tiny_model, rows=(4, 32), buckets=(64,))
    found = engine.generate(PROMPTS, params, **how)
    has_moved = any(name.startswith("shrink") for name in engine.compiled_shapes)
    assert has_moved or params.temperature == 0, "greedy rows of a group end together"
    check(tiny_model, params, found)
    assert found[0].log_odds.dtype == np.float32
    others = engine.generate(PROMPTS, free, **how)
    assert tokens_of(others) == tokens_of(found)
    assert {other.log_odds is None for other in others} == {True}
    plain = {name for name in engine.compiled_shapes if not name.endswith(" log-odds")}
    assert {f"{name} log-odds" for name in plain} & set(engine.compiled_shapes)


def test_a_burst_is_bounded(tiny_model, monkeypatch):
    monkeypatch.setattr(engine_module, "BURST_STEPS", 5)
    engine = Engine(tiny_model, rows=(32,), buckets=(64,))
    parts = list(engine.stream(requests(19), SamplingParams(19), key=KEY, overlap=False))
    assert [len(part) for part in parts] == [0, 0, 0, len(IDS), 0]
    expected = reference(tiny_model, SamplingParams(19))
    by_id = dict(zip(IDS, tokens_of(expected), strict=True))
    assert {c.row_id: c.tokens.tolist() for c in parts[3]} == by_id


def test_who_reads_along_sees_every_row_grow_and_changes_nothing(tiny_model):
    engine, seen, ended = Engine(tiny_model, rows=(32,), buckets=(64,)), {}, []
    params = SamplingParams(19, stop_ids=STOPS)
    how = {"key": KEY, "row_ids": IDS, "group_size": GROUP}
    plain = engine.generate(PROMPTS, params, **how)

    def watch(running, completions):
        for row_id, tokens in running.items():
            seen.setdefault(row_id, []).append(tokens.tolist())
        ended.extend(completions)

    engine.watch = watch
    watched = engine.generate(PROMPTS, params, **how)
    assert tokens_of(watched) == tokens_of(plain)
    for a, b in zip(plain, watched, strict=True):
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
    assert sorted(c.row_id for c in ended) == sorted(IDS)
    assert [len(x) for x in max(seen.values(), key=len)] == [8, 16]
    final = dict(zip(IDS, tokens_of(plain), strict=True))
    for row_id, beginnings in seen.items():
        assert all(final[row_id][: len(x)] == x for x in beginnings)


def test_samples_that_are_not_needed_do_not_start(tiny_model):
    """What has been handed out decides about what starts next."""
    engine, seen = Engine(tiny_model, rows=(8,), buckets=(64,)), []

    def is_needed(sample):
        return sample.row_id.split("/")[0] not in {row_id.split("/")[0] for row_id in seen}

    params = SamplingParams(6)
    for part in engine.stream(
        requests(6), params, key=KEY, is_needed=is_needed, overlap=False, samples_per_prefix=2
    ):
        seen += [completion.row_id for completion in part]
    assert sorted(seen) == sorted(f"p{p}/{g}" for p in range(len(PROMPTS)) for g in range(2))


def test_samples_that_continue_a_part_of_their_prefix(tiny_model):
    """A trajectory cut in three places: as if each part had been prefilled by itself."""
    prefix, cuts, params = PROMPTS[4], (2, 11, 30), SamplingParams(9)
    engine = Engine(tiny_model, rows=(4,), buckets=(64,))
    samples = [SampleRequest(f"c{cut}", cut, 9 - index) for index, cut in enumerate(cuts)]
    parts = engine.stream([Prefix(prefix, samples)], params, key=KEY)
    found = {c.row_id: c.tokens.tolist() for part in parts for c in part}
    sampler = Reference(tiny_model, rows=(4,), buckets=(64,))
    expected = sampler.generate(
        [prefix[:cut] for cut in cuts],
        params,
        key=KEY,
        row_ids=[sample.row_id for sample in samples],
    )
    for sample, tokens in zip(samples, tokens_of(expected), strict=True):
        assert found[sample.row_id] == tokens[: sample.max_new_tokens]


def test_stop_strings_reach_over_bursts(word_tokenizer):
    """A stop string's automaton is a row's own, through refills and moves."""
    from flax import nnx

    from stepwiser_jax.model.config import ModelConfig
    from stepwiser_jax.model.transformer import Transformer
    from stepwiser_jax.tasks import arithmetic

    model = Transformer(ModelConfig.from_hf(arithmetic.hf_config()), rngs=nnx.Rngs(3))
    text = word_tokenizer.decode([7, 8])
    params = SamplingParams(30, temperature=3.0, stop_strings=(text[:1], "</chunk>"))
    prompts, ids = [[5, 6, 7]] * 12, [f"r{b}" for b in range(12)]
    shapes = {"rows": (2, 4), "buckets": (64,)}
    expected = Reference(model, word_tokenizer, **shapes).generate(
        prompts, params, key=KEY, row_ids=ids
    )
    output = Engine(model, word_tokenizer, **shapes).generate(prompts, params, key=KEY, row_ids=ids)
    reasons = [completion.stop_reason for completion in expected]
    assert StopReason.STOP_STRING in reasons
    assert tokens_of(output) == tokens_of(expected)
    assert [completion.stop_reason for completion in output] == reasons


def test_programs_are_compiled_once(tiny_model):
    """Other prompts, other lengths, other groups of the same shapes: nothing new is compiled."""
    engine = Engine(tiny_model, rows=(4, 16), buckets=(16, 64))
    params = SamplingParams(12, stop_ids=STOPS)

    def sample(seed):
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(0, 64, n).tolist() for n in rng.integers(2, 40, 12)]
        ids = [f"{seed}/{b}" for b in range(48)]
        engine.generate(prompts, params, key=KEY, row_ids=ids, group_size=4)

    programs = (
        engine_module.prefill,
        engine_module.decode_burst,
        engine_module.shrink_grid,
    )
    for seed in range(6):
        sample(seed)
    warm = [program._cache_size() for program in programs]
    for seed in range(6, 12):
        sample(seed)
    assert [program._cache_size() for program in programs] == warm


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        ([SampleRequest("long", 10, 7)], UserError, "long: prompt of 10 tokens"),
        ([SampleRequest("none", 0, 1)], UserError, "none: expected a prompt of at least one token"),
        ([SampleRequest("far", 11, 1)], ValueError, "far continues 11 tokens of a prefix of 10"),
        ([SampleRequest("zero", 5, 0)], ValueError, "zero has max_new_tokens 0, expected 1 to 7"),
        ([SampleRequest("much", 5, 8)], ValueError, "much has max_new_tokens 8, expected 1 to 7"),
        ([], ValueError, "a prefix of 10 tokens has no samples"),
    ],
)
def test_requests_that_cannot_be_sampled_are_named(tiny_model, samples, error, message):
    engine = Engine(tiny_model, rows=(4,), buckets=(16,))
    with pytest.raises(error, match=message):
        list(engine.stream([Prefix([1] * 10, samples)], SamplingParams(7), key=KEY))


def test_log_odds_are_those_of_the_full_forward(tiny_model):
    """Prompts of several lengths, in several buckets and batches."""
    lengths = [1, 7, 16, 31, 3, 32, 8, *[5] * 300]
    prompts = [[(3 * p + t) % 60 + 1 for t in range(n)] for p, n in enumerate(lengths)]
    engine = Engine(tiny_model, rows=(8,), buckets=(16, 32))
    found_P = engine.log_odds(prompts, (11, 3))
    rows = np.zeros((len(prompts), 32), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    logits_BTV = np.asarray(jax.nn.log_softmax(tiny_model(rows)))
    last_B = logits_BTV[np.arange(len(rows)), np.array(lengths) - 1]
    np.testing.assert_allclose(found_P, last_B[:, 11] - last_B[:, 3], atol=1e-4)
    assert len(engine.compiled_shapes) == 2
    with pytest.raises(UserError, match="prompt 1: expected a prompt of at least one token"):
        engine.log_odds([[5], []], (11, 3))
    with pytest.raises(UserError, match="prompt 0: prompt of 33 tokens"):
        engine.log_odds([[5] * 33], (11, 3))


def test_prompts_that_cannot_be_sampled_are_refused(tiny_model):
    engine, params = Engine(tiny_model, rows=(4,), buckets=(32,)), SamplingParams(6)
    with pytest.raises(UserError, match="context of 32"):
        engine.generate([[1] * 30], params, key=KEY, row_ids=["long"])
    with pytest.raises(UserError, match="model's context is 256"):
        Engine(tiny_model, rows=(4,), buckets=(512,))
    with pytest.raises(UserError, match="b: expected a prompt of at least one token"):
        engine.generate([[1], []], params, key=KEY, row_ids=["a", "b"])
    with pytest.raises(ValueError, match="different row_ids"):
        engine.generate(PROMPTS, params, key=KEY, row_ids=["a"] * len(PROMPTS))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, found 0"):
        SamplingParams(0)


def test_a_burst_does_not_cast_the_embedding():
    """XLA's CPU backend would cast all of it to float32, at every call."""
    config = tiny_config(vocab_size=8192, tie_embeddings=True)
    model = Transformer(config, rngs=nnx.Rngs(0), param_dtype="bfloat16", compute_dtype="bfloat16")
    decoder = Decoder.from_transformer(model)
    rows = engine_state.StartingRows(
        starts_B=np.ones((8,), bool),
        prefix_length_B=np.zeros((8,), np.int32),
        last_token_B=np.zeros((8,), np.int32),
        limit_B=np.full((8,), 8, np.int32),
        hash_B=np.zeros((8,), np.uint32),
    )
    compiled = engine_state.decode_burst.lower(
        decoder,
        engine_state.empty_state(decoder, None, Grid(1, 8), 16, 8),
        rows,
        TokenSampler.create(KEY, 1.0, 0, 1.0),
        np.int32(0),
        np.int32(8),
        np.array((), np.int32),
        None,
    ).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < decoder.embed_VD.size * 4

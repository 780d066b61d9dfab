"""Ids without a token: models have more logits than their tokenizer has tokens, and tokenizers have
gaps. Such ids are never sampled, and stand outside of the trainer's softmax."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sampled import Reference, arrays_of

from stepwiser_jax.distributed.loading import load_model
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.inference.token_sampler import _pass
from stepwiser_jax.model.attention import Attention
from stepwiser_jax.model.attention.splash import splash_attention, splash_mask
from stepwiser_jax.model.hf import load_hf, save_hf
from stepwiser_jax.model.lora import make_adapters, with_adapters
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.rl.logprobs import token_logprobs, token_logprobs_and_entropy
from stepwiser_jax.text.tokenizer import load_tokenizer, unknown_ids
from tiny import tiny_config, with_unknown_ids

KNOWN, UNKNOWN = 50, 14
SPLASH = Attention(functools.partial(splash_mask, interpret=True), splash_attention)


def model_of(family="llama", **settings):
    """Its vocabulary is exactly that of a tokenizer."""
    config = tiny_config(family, vocab_size=KNOWN, num_layers=1)
    return Transformer(config, rngs=nnx.Rngs(0), **settings)


def adapted():
    base = model_of()
    adapters = make_adapters(base.blocks, rank=3, alpha=12.0, targets=("q", "down"), seed=1)
    return with_adapters(base, jax.tree.map(lambda x: x + 0.1, adapters))


MODELS = {
    "untied head, adapters": adapted,
    "tied head": lambda: model_of("qwen3"),
    "splash attention": lambda: model_of(attention=SPLASH),
    "bfloat16": lambda: model_of(compute_dtype=jnp.bfloat16),
}


def objective(model):
    """Every token's log-prob and entropy, each weighted: all that losses are made of."""
    rows = jax.random.randint(jax.random.key(0), (2, 24), 0, KNOWN)
    weights = jax.random.normal(jax.random.key(1), (2, *rows.shape))
    stats = token_logprobs_and_entropy(model, rows, temperature=0.9, num_slices=3)
    return jnp.sum(weights * jnp.stack(stats)), stats


@pytest.mark.parametrize(
    "name",
    [
        "untied head, adapters",
        "tied head",
        pytest.param("splash attention", marks=pytest.mark.slow),
        pytest.param("bfloat16", marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_are_those_of_the_tokenizers_vocabulary(name):
    gradients = jax.jit(jax.grad(objective, has_aux=True))
    model = MODELS[name]()
    expected, expected_stats = gradients(model)
    found, stats = gradients(with_unknown_ids(model, UNKNOWN))
    rounding = 1e-2 if name == "bfloat16" else 1e-5
    np.testing.assert_allclose(stats, expected_stats, atol=rounding)
    for path, (a, b) in flat(expected, found).items():
        if a.shape != b.shape:
            assert not np.asarray(b[KNOWN:]).any(), f"{path}: ids without a token have a gradient"
            b = b[:KNOWN]
        np.testing.assert_allclose(a, b, rtol=rounding, atol=10 * rounding, err_msg=path)


def flat(*trees):
    """The leaves of trees of one structure, by their path."""
    leaves = [jax.tree_util.tree_flatten_with_path(nnx.state(tree))[0] for tree in trees]
    return {
        jax.tree_util.keystr(group[0][0]): [leaf for _, leaf in group]
        for group in zip(*leaves, strict=True)
    }


PROMPTS = [[5, 9, 11], [3], [8, 8, 2, 40, 33], [1, 2, 3, 4, 5, 6, 7]]
IDS = [f"p{p}/{g}" for p in range(4) for g in range(4)]
HOT = SamplingParams(12, temperature=50.0)


def sample(sampler_class, model, weights, params):
    sampler = sampler_class(model, rows=(16,), buckets=(32,), weights=weights)
    return sampler.generate(PROMPTS, params, key=jax.random.key(7), row_ids=IDS, group_size=4)


@pytest.mark.parametrize(
    ("sampler_class", "weights", "params"),
    [
        (Engine, "model", HOT),
        (Engine, "int8", dataclasses.replace(HOT, top_k=60, top_p=0.99)),
        (Reference, "model", dataclasses.replace(HOT, temperature=0.0)),
    ],
    ids=["hot", "truncated, int8", "greedy"],
)
def test_samples_are_those_of_the_tokenizers_vocabulary(sampler_class, weights, params):
    model = model_of()
    expected = sample(sampler_class, model, weights, params)
    found = sample(sampler_class, with_unknown_ids(model, UNKNOWN), weights, params)
    np.testing.assert_array_equal(arrays_of(found)[0], arrays_of(expected)[0])
    np.testing.assert_allclose(arrays_of(found)[1], arrays_of(expected)[1], atol=1e-5)
    other = sample(sampler_class, with_unknown_ids(model, UNKNOWN, known=True), weights, params)
    assert (arrays_of(other)[0] >= KNOWN).any(), "the case shows nothing: no such id would be drawn"


def test_logprobs_of_sampler_and_trainer_agree():
    model = with_unknown_ids(model_of(), UNKNOWN)
    output = sample(Engine, model, "model", HOT)
    rows = np.zeros((len(IDS), 32), np.int32)
    for b in range(len(IDS)):
        ids = [*PROMPTS[b // 4], *output[b].tokens]
        rows[b, : len(ids)] = ids
    trained = np.asarray(jax.jit(token_logprobs)(model, rows, temperature=HOT.temperature))
    for b in range(len(IDS)):
        start = len(PROMPTS[b // 4])
        np.testing.assert_allclose(output[b].logprobs, trained[b, start : start + 12], atol=1e-5)


def test_gaps_inside_the_vocabulary_are_never_drawn():
    gaps = (range(0, 3), range(20, 30), range(63, 64))
    model = Transformer(tiny_config(num_layers=1), rngs=nnx.Rngs(0))
    known = np.array([i for i in range(64) if not any(i in gap for gap in gaps)])
    rows = jnp.asarray(np.random.default_rng(0).choice(known, (2, 9)))
    expected = jax.nn.log_softmax(model(rows)[:, :-1, known])
    model.config = dataclasses.replace(model.config, unknown_ids=gaps)
    found, entropy = token_logprobs_and_entropy(model, rows)
    places = np.searchsorted(known, rows[:, 1:])
    taken = np.take_along_axis(np.asarray(expected), places[:, :, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(found[:, 1:], taken, atol=1e-5)
    np.testing.assert_allclose(
        entropy[:, 1:], -jnp.sum(jnp.exp(expected) * expected, axis=-1), atol=1e-5
    )
    output = sample(Engine, model, "model", SamplingParams(20, temperature=50.0))
    assert set(arrays_of(output)[0].ravel().tolist()) == set(known.tolist())


def test_an_entry_without_mass_is_never_passed(monkeypatch):
    """Some backends add up in a tree: the sum then may grow by rounding where nothing is added."""

    def in_a_tree(x, axis):
        return jax.lax.associative_scan(jnp.add, x, axis=axis)

    monkeypatch.setattr(jnp, "cumsum", in_a_tree)
    mass_BN = np.random.default_rng(0).random((500, 8)).astype(np.float32)
    mass_BN[:, 7] = 0
    mass_BN = np.concatenate([mass_BN, np.ones((500, 1), np.float32)], axis=1)
    sums_BN = np.asarray(in_a_tree(mass_BN, axis=1))
    grows = sums_BN[:, 7] > sums_BN[:, 6]
    assert grows.sum() > 10, "the case shows nothing"
    index_B, rest_B = _pass(jnp.asarray(mass_BN), jnp.asarray(sums_BN[:, 6]))
    np.testing.assert_array_equal(index_B, np.where(grows, 6, 8))
    assert (np.asarray(rest_B) >= 0).all()


def test_nothing_is_added_where_every_id_has_a_token():
    model = model_of()

    def operations(model):
        hidden = jnp.zeros((2, model.config.hidden_size))
        return [str(e.primitive) for e in jax.make_jaxpr(model.logits)(hidden).eqns]

    assert operations(model) == ["dot_general"]
    assert len(operations(with_unknown_ids(model, UNKNOWN))) > 1


# --- where models and tokenizers are loaded -----------------------------------------------------


@pytest.fixture
def padded(tmp_path, word_tokenizer):
    """A checkpoint with 5 more embeddings than its tokenizer has tokens."""
    size = max(word_tokenizer.known_ids) + 1
    model = Transformer(tiny_config("qwen2", vocab_size=size), rngs=nnx.Rngs(0))
    save_hf(with_unknown_ids(model, 5), word_tokenizer, str(tmp_path / "model"))
    return tmp_path / "model"


def test_a_model_knows_which_ids_have_a_token(padded, word_tokenizer, tmp_path):
    size = word_tokenizer.vocab_size
    loaded = load_model(str(padded), mesh=make_mesh())
    assert loaded.model.config.vocab_size == size + 5
    assert loaded.model.unknown_ids == (range(size, size + 5),)
    assert load_model("arithmetic", mesh=make_mesh()).model.unknown_ids == ()
    # What is exported is as before: the tokenizer says it again.
    save_hf(loaded.model, loaded.tokenizer, str(tmp_path / "again"))
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config == json.loads((padded / "config.json").read_text())
    assert "unknown_ids" not in config and config["vocab_size"] == size + 5
    again = load_hf(str(tmp_path / "again"), tokenizer=word_tokenizer)
    assert again.config == loaded.model.config


def test_a_sampler_refuses_a_model_that_does_not_know_its_tokenizer(padded, word_tokenizer):
    model = load_hf(str(padded))
    for sampler_class in (Reference, Engine):
        with pytest.raises(ValueError, match=r"load it with load_hf\(path, tokenizer=tokenizer\)"):
            sampler_class(model, word_tokenizer, rows=(2,), buckets=(16,))


def test_a_tokenizer_with_ids_beyond_the_model_is_refused(tmp_path, word_tokenizer):
    size = word_tokenizer.vocab_size - 1
    model = Transformer(tiny_config(vocab_size=size, num_layers=1), rngs=nnx.Rngs(0))
    save_hf(model, word_tokenizer, str(tmp_path / "model"))
    with pytest.raises(UserError, match=f"below the model's vocab_size {size}, found {size}"):
        load_model(str(tmp_path / "model"), mesh=make_mesh())


def test_gaps_of_a_tokenizer(tmp_path):
    """Its length is the number of its tokens, and no bound of their ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 3, "d": 7}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="b").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.known_ids == {0, 1, 3, 7} and tokenizer.vocab_size == 8
    assert unknown_ids(tokenizer, 8) == (range(2, 3), range(4, 7))
    assert unknown_ids(tokenizer, 10) == (range(2, 3), range(4, 7), range(8, 10))
    spelled = tokenizer.token_bytes()
    assert spelled[7] == b" d" and [spelled[i] for i in (2, 4, 5, 6)] == [b""] * 4
    assert tokenizer.decode([0, 7]) == "a d"
    for unknown in (2, 9, -1):
        with pytest.raises(UserError, match=rf"the largest is 7\), found {unknown}"):
            tokenizer.decode([0, unknown, 7])
        with pytest.raises(UserError, match=rf"the largest is 7\), found {unknown}"):
            tokenizer.decode_batch([[0, 7], [0, unknown, 7]])

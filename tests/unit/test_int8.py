"""Weights of 8-bit integers: what is stored, what is sampled, how far it is from the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from sampled import Reference, arrays_of, assert_sampled

from stepwiser_jax.inference import engine as engine_module
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.model.decoder import Decoder
from stepwiser_jax.model.linear import quantize
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.rl.logprobs import token_logprobs
from tiny import tiny_config

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 64, n).tolist() for n in (3, 9, 14, 5)]
IDS = [f"p{p}/{g}" for p in range(len(PROMPTS)) for g in range(4)]
SHAPES = {"rows": (16,), "buckets": (16, 64)}
PARAMS = SamplingParams(12)


def sample(sampler):
    return sampler.generate(
        PROMPTS, PARAMS, key=jax.random.key(7), row_ids=IDS, group_size=len(IDS) // len(PROMPTS)
    )


def teacher_forced(model, output):
    """Log-probs of the sampled ids, (B, C)."""
    prompts_B = [prompt for prompt in PROMPTS for _ in range(len(IDS) // len(PROMPTS))]
    rows_BT = np.zeros((len(IDS), 32), np.int32)
    for b, prompt in enumerate(prompts_B):
        ids = [*prompt, *output[b].tokens]
        rows_BT[b, : len(ids)] = ids
    logprobs_BT = np.asarray(jax.jit(token_logprobs)(model, rows_BT))
    return np.stack(
        [row[len(p) : len(p) + 12] for row, p in zip(logprobs_BT, prompts_B, strict=True)]
    )


def rounded(model):
    """The same model with the matrices that int8 stands for, in floating point."""

    def of_layers(x):
        if x.ndim < 3:
            return x
        return jnp.stack([qwix.dequantize(quantize(matrix.T)).T for matrix in x])

    model = nnx.merge(*nnx.split(model))
    model.blocks = jax.tree.map(of_layers, model.blocks)
    return model


def test_weights_are_off_by_half_a_step_at_most():
    weight_IO = jnp.asarray(RNG.normal(0, 1, (32, 5)) * [1, 10, 0.1, 1e-3, 0], jnp.float32)
    found = quantize(weight_IO)
    step_O = np.abs(weight_IO).max(axis=0) / 127
    assert found.qvalue.dtype == jnp.int8
    assert found.scale.shape == (1, 5)
    error_IO = np.abs(qwix.dequantize(found) - weight_IO)
    assert (error_IO <= step_O / 2 * 1.0001).all()
    assert error_IO[:, :4].max() > 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_only_the_matrices_of_the_blocks_are_int8(family):
    model = Transformer(tiny_config(family), rngs=nnx.Rngs(0))
    for block in Decoder.from_transformer(model, "int8").blocks:
        matrices = [block.q, block.k, block.v, block.o, block.gate, block.up, block.down]
        assert all(matrix[...].qvalue.dtype == jnp.int8 for matrix in matrices)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(block)} == {"int8", "float32"}
        assert len(jax.tree.leaves(block)) == len(jax.tree.leaves(model.blocks)) + len(matrices)
    assert Decoder.from_transformer(model, "int8").embed_VD.dtype == jnp.float32


def test_a_model_for_decoding_keeps_its_weights_or_is_refused(tiny_model):
    for weights, other in (("model", "int8"), ("int8", "model")):
        model = Decoder.from_transformer(tiny_model, weights)
        assert Engine(model, weights=weights, **SHAPES).decoder is model
        with pytest.raises(ValueError, match=f"weights '{other}', found one with '{weights}'"):
            Engine(model, weights=other, **SHAPES)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logprobs_are_those_of_the_rounded_model(family):
    """Sampled with int8: exactly (to rounding) what the rounded weights say, nearly the model's."""
    model = Transformer(tiny_config(family, initializer_range=0.1), rngs=nnx.Rngs(0))
    output = sample(Engine(model, weights="int8", **SHAPES))
    _, logprobs_BC = arrays_of(output)
    np.testing.assert_allclose(logprobs_BC, teacher_forced(rounded(model), output), atol=1e-4)
    gap = np.abs(logprobs_BC - teacher_forced(model, output)).mean()
    assert 5e-4 < gap < 0.05


def test_the_engine_samples_what_the_sampler_does(tiny_model):
    prompts_B = [prompt for prompt in PROMPTS for _ in range(4)]
    for cls in (Engine, Reference):
        output = sample(cls(tiny_model, weights="int8", **SHAPES))
        assert_sampled(rounded(tiny_model), prompts_B, IDS, PARAMS, jax.random.key(7), output)


def test_other_weights_are_quantized_too_and_compile_nothing(tiny_model):
    engine = Engine(tiny_model, weights="int8", **SHAPES)
    first = sample(engine)
    programs = (engine_module.prefill, engine_module.decode_burst)
    warm = [program._cache_size() for program in programs]
    other_model = jax.tree.map(lambda x: x * 1.3, tiny_model)
    second = sample(engine.with_model(other_model))
    assert engine.sampled_tokens == 2 * len(IDS) * 12, "both are counted together"
    assert [program._cache_size() for program in programs] == warm
    fresh = sample(Engine(other_model, weights="int8", **SHAPES))
    np.testing.assert_array_equal(arrays_of(second)[0], arrays_of(fresh)[0])
    assert (arrays_of(first)[0] != arrays_of(second)[0]).any()

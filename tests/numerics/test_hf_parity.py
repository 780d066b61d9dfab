"""Against transformers: tiny random models of each family, float32, both ways."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'numerics'")
transformers = pytest.importorskip("transformers")

from sampled import Reference

from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.hf import load_hf, save_hf

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "qwen2": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2_untied": ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_untied": ("qwen3", {"num_key_value_heads": 1, "head_dim": 8}),
    "llama": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "llama3_rope": (
        "llama",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    ),
}


@pytest.fixture(params=sorted(CASES))
def theirs(request):
    family, changes = CASES[request.param]
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:  # so that leaving one out is seen
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens_BT():
    return np.random.default_rng(0).integers(3, 96, (3, 40))


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(tokens_BT())).logits.float().numpy()


def our_logits(model):
    return np.asarray(jax.jit(lambda m, t: m(t))(model, jnp.asarray(tokens_BT())))


def close(ours, reference, tolerance=1e-4):
    assert np.abs(ours - reference).max() / np.abs(reference).max() <= tolerance


def test_logits_and_the_way_back(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_hf(str(tmp_path / "theirs"))
    reference = their_logits(theirs)
    close(our_logits(ours), reference)

    save_hf(ours, None, str(tmp_path / "ours"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_array_equal(their_logits(again), reference)
    close(our_logits(load_hf(str(tmp_path / "ours"))), reference)


def test_sharded_checkpoints(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    ours = load_hf(str(tmp_path / "theirs"))
    close(our_logits(ours), their_logits(theirs))
    save_hf(ours, None, str(tmp_path / "ours"), max_shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_array_equal(their_logits(again), their_logits(theirs))


def test_bfloat16_checkpoints(theirs, tmp_path):
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    # Read back in float32: a cast of the live model rounds its rotary frequencies too.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", dtype=torch.float32
    ).eval()
    ours = load_hf(str(tmp_path / "theirs"), dtype="bfloat16", compute_dtype="float32")
    assert ours.embed[...].dtype == jnp.bfloat16
    close(our_logits(ours), their_logits(theirs))
    save_hf(ours, None, str(tmp_path / "ours"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert again.dtype == torch.bfloat16
    for name, parameter in theirs.named_parameters():
        assert torch.equal(again.get_parameter(name).float(), parameter), name


def test_greedy_continuation_is_theirs(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    sampler = Reference(load_hf(str(tmp_path)), rows=(4,), buckets=(64,))
    prompts = [[5, 9, 11], [3], [8, 8, 2, 60, 33]]
    out = sampler.generate(
        prompts,
        SamplingParams(32, temperature=0.0),
        key=jax.random.key(0),
        row_ids=["a", "b", "c"],
    )
    for b, prompt in enumerate(prompts):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None
        )
        assert out[b].tokens.tolist() == expected[0, len(prompt) :].tolist()


def test_config_json_survives(theirs):
    config = ModelConfig.from_hf(json.loads(theirs.config.to_json_string()))
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert dataclasses.asdict(config)["num_layers"] == 3

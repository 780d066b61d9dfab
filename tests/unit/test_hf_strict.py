"""What is not exactly the expected checkpoint is refused by name."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from stepwiser_jax.errors import UserError
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.hf import load_hf, save_hf
from stepwiser_jax.model.transformer import Transformer
from tiny import tiny_config


@pytest.fixture
def checkpoint(tmp_path):
    save_hf(Transformer(tiny_config("qwen2"), rngs=nnx.Rngs(0)), None, str(tmp_path / "model"))
    return tmp_path / "model"


def change(checkpoint, edit):
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    for family in ("llama", "qwen2", "qwen3"):
        model = Transformer(tiny_config(family), rngs=nnx.Rngs(1))
        save_hf(model, None, str(tmp_path / family))
        again = load_hf(str(tmp_path / family))
        assert again.config == model.config
        for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(ours, theirs)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(NORM), f"lacks 1 tensors.*{NORM}"),
        (lambda t: t.update(surprise=np.ones(2)), "unknown 1 tensors.*surprise"),
        (lambda t: t.update({NORM: np.ones(5, np.float32)}), f"{NORM} has shape"),
        (
            lambda t: t.update({"lm_head.weight": np.ones((64, 32), np.float32)}),
            "lm_head.weight differs",
        ),
    ],
)
def test_wrong_tensors(checkpoint, edit, message):
    change(checkpoint, edit)
    with pytest.raises(UserError, match=message):
        load_hf(str(checkpoint))


def test_a_tied_head_that_is_stored_too_is_accepted(checkpoint):
    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    expected = load_hf(str(checkpoint)).embed[...]
    change(checkpoint, add_head)
    np.testing.assert_array_equal(load_hf(str(checkpoint)).head_VD, expected)


def test_doubled_tensors(checkpoint):
    (checkpoint / "more.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="is in two files"):
        load_hf(str(checkpoint))


def test_truncated_file_and_missing_file(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        load_hf(str(checkpoint))
    file.unlink()
    with pytest.raises(UserError, match="found none"):
        load_hf(str(checkpoint))


@pytest.mark.parametrize("text", ["[]", "{", "{}"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_files_that_hold_something_else(checkpoint, name, text):
    (checkpoint / name).write_text(text)
    with pytest.raises(UserError, match=r"JSON|weight_map|model_type"):
        load_hf(str(checkpoint))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mixtral"}, "found 'mixtral'"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "needs"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_unsupported_configs_are_refused_by_name(checkpoint, fields, message):
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    if "rope_scaling" in fields:
        config.pop("rope_parameters")
    file.write_text(json.dumps(config | fields))
    with pytest.raises(UserError, match=message):
        load_hf(str(checkpoint))


def test_rope_is_read_from_either_generation_of_config():
    new = tiny_config("llama").to_hf()
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    newest = {k: v for k, v in new.items() if k not in ("rope_scaling", "rope_theta")}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(newest) == tiny_config("llama")


def test_a_failed_save_leaves_the_old_directory(checkpoint):
    class Broken:
        def save(self, path):
            raise OSError("disk full")

    before = sorted(p.name for p in checkpoint.iterdir())
    with pytest.raises(OSError, match="disk full"):
        save_hf(Transformer(tiny_config(), rngs=nnx.Rngs(0)), Broken(), str(checkpoint))
    assert sorted(p.name for p in checkpoint.iterdir()) == before
    load_hf(str(checkpoint))


def test_a_save_that_is_killed_at_the_end_leaves_a_whole_model(checkpoint, monkeypatch):
    """The old model is moved, not removed, before the new one takes its place."""
    rename = Path.rename

    def dying(self, target):
        if self.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dying)
    with pytest.raises(KeyboardInterrupt):
        save_hf(Transformer(tiny_config("qwen2"), rngs=nnx.Rngs(1)), None, str(checkpoint))
    load_hf(str(checkpoint.with_name(".model.old")))
    monkeypatch.undo()
    save_hf(Transformer(tiny_config("qwen2"), rngs=nnx.Rngs(1)), None, str(checkpoint))
    assert [path.name for path in checkpoint.parent.iterdir()] == ["model"]

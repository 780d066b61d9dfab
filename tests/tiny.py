"""A decoder of a few thousand parameters, of each family; and what a run has logged."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from stepwiser_jax.model.config import Llama3RopeScaling, ModelConfig
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.rl.rollouts import RolloutGroup
from stepwiser_jax.runs.metric_lines import TIMING_FIELDS


def tiny_config(family: str = "llama", **changes) -> ModelConfig:
    """Sizes that differ wherever they can; head_dim differs from width / heads on purpose."""
    fields = {
        "model_type": family,
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16 if family == "qwen3" else 8,
        "max_length": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": Llama3RopeScaling(8.0, 1.0, 4.0, 32) if family == "llama" else None,
        "tie_embeddings": family != "llama",
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        "initializer_range": 0.3,
    }
    return ModelConfig(**{**fields, **changes})


def with_unknown_ids(model: Transformer, more: int, *, known: bool = False) -> Transformer:
    """The model with logits of `more` ids that no token has. Their embeddings are those of the
    first tokens, twice as long, so that they would often be drawn. `known`: it does not know."""

    def pad(table_VD: jax.Array) -> jax.Array:
        return jnp.concatenate([table_VD, 2 * table_VD[:more]])

    padded, size = copy.copy(model), model.config.vocab_size
    unknown_ids = () if known else (range(size, size + more),)
    padded.config = dataclasses.replace(
        model.config, vocab_size=size + more, unknown_ids=unknown_ids
    )
    for name in ("embed", "head"):
        if hasattr(model, name):
            setattr(padded, name, jax.tree.map(pad, getattr(model, name)))
    return padded


def logged(run) -> list[str]:
    """The lines of a run's metrics.jsonl without the times of their writing, all else as it is."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["seconds"] >= 0 and line["time"].endswith("Z") for line in lines)
    kept = [{k: v for k, v in line.items() if k not in TIMING_FIELDS} for line in lines]
    return [json.dumps(line) for line in kept]


def rollout_group(prompt, completions, logprobs=None, rewards=(), name="g"):
    """A group from lists."""
    logprobs = logprobs or [[-1.0] * len(ids) for ids in completions]
    return RolloutGroup(
        name,
        np.array(prompt, np.int32),
        [np.array(ids, np.int32) for ids in completions],
        [np.array(x, np.float32) for x in logprobs],
        reward_terms_G=[{"": reward} for reward in rewards],
    )

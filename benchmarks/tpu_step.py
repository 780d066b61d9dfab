"""What an update of the judge needs on a TPU, by its compiler's account: no TPU, nothing is run.

    pip install '.[tpu]' && python benchmarks/tpu_step.py [--topology v5p:2x2x1] [--layers 4]

One device, one group a row, at the paper's lengths: a prompt of 3096 tokens and 4 judgments of
3096 (paper 4.1), in rows of 15872; layers of Qwen2.5-1.5B, bfloat16 compute, remat, AdamW. Both
sides are the whole train step; they differ in their attention alone.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import topologies

from stepwiser_jax.config import Judge
from stepwiser_jax.model.attention import Attention, attention, segment_mask
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.splash import splash_mask
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.runtime.data import Group, RolloutBatch, rollout_batch
from stepwiser_jax.runtime.loading import attention_of, sharding_of
from stepwiser_jax.runtime.mesh import batch_sharding, make_mesh, replicated
from stepwiser_jax.runtime.trainer import TrainState, make_optimizer, make_train_step
from stepwiser_jax.stages.judge import judge_denominators, judge_loss

TOKENS, COMPLETIONS, ROW = 3096, 4, 15872
QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
JUDGE = {
    "model": {"path": "unused"},
    "examples": "unused",
    "iterations": 1,
    "prompts_per_iteration": 1,
    "row_lengths": [ROW],
    "sampling": {"max_new_tokens": TOKENS},
    "engine": {"buckets": [2 * TOKENS]},
    "training": {"optimizer": {"learning_rate": 1e-6}, "remat": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5p:2x2x1")
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    config = ModelConfig.from_hf(QWEN | {"num_hidden_layers": args.layers})
    mesh = make_mesh(devices=tpu_devices(args.topology))
    group = Group(
        [0] * TOKENS, [[0] * TOKENS] * COMPLETIONS, [[0.0] * TOKENS] * COMPLETIONS, [0.0] * 4
    )
    batch = rollout_batch([group], num_rows=1, row_length=ROW)
    kernel, _ = splash_mask(jnp.asarray(batch.segment_ids_BT))
    steps = kernel.fwd_mask_info.block_mask
    blocks = steps.shape[2]
    print(
        f"{args.layers} layers, {mesh.devices.flat[0].device_kind}; blocks of scores computed: "
        f"{int(jnp.sum(steps))} of {blocks**2} ({blocks * (blocks + 1) // 2} are causal)"
    )
    dense = Attention(segment_mask, attention)
    for name, kind in (("splash", attention_of(config, mesh)), ("dense", dense)):
        begin = time.perf_counter()
        try:
            memory = compiled_train_step(config, mesh, kind, batch).memory_analysis()
            needed = f"temporary memory {memory.temp_size_in_bytes / 2**30:.2f} GiB"
        except jax.errors.JaxRuntimeError as error:
            needed = str(error).splitlines()[0]
        print(f"{name}: {needed}; compiled in {time.perf_counter() - begin:.0f} s", flush=True)


def tpu_devices(topology: str) -> list[Any]:
    """Descriptions of the devices of a topology such as v5e:2x2. Needs libtpu, and no TPU."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def compiled_train_step(
    config: ModelConfig, mesh: jax.sharding.Mesh, attention: Attention, batch: RolloutBatch
) -> Any:
    """The judge's train step for a model of `config` and batches like `batch`."""
    judge = Judge.model_validate(JUDGE)
    optimizer = make_optimizer(lambda _: 1e-6, weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.95)
    train_step = make_train_step(
        functools.partial(judge_loss, config=judge),
        optimizer,
        lambda _: 1e-6,
        micro_batches=1,
        denominator_fn=functools.partial(judge_denominators, config=judge),
    )
    model = abstract_model(config, mesh, attention)
    whole = replicated(mesh)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    moments = optax.tree_map_params(
        optimizer,
        lambda leaf, parameter: _placed(leaf, parameter.sharding),
        jax.eval_shape(optimizer.init, model),
        model,
        transform_non_params=lambda leaf: _placed(leaf, whole),
    )
    rows = jax.tree.map(lambda leaf: _placed(leaf, batch_sharding(mesh)), batch)
    state = TrainState(model, moments, scalar, scalar)
    with jax.set_mesh(mesh):
        return train_step.lower(state, rows).compile()


def abstract_model(
    config: ModelConfig, mesh: jax.sharding.Mesh, attention: Attention
) -> Transformer:
    """Shapes and shardings of float32 parameters that compute in bfloat16."""
    model = nnx.eval_shape(
        lambda: Transformer(
            config, rngs=nnx.Rngs(0), compute_dtype=jnp.bfloat16, attention=attention
        )
    )
    sharding_for = sharding_of(config, mesh)
    placed = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable.get_value()
        sharding = sharding_for(variable.get_metadata("axes"), value.shape)
        placed.append((path, variable.replace(_placed(value, sharding))))
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(placed))


def _placed(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)


if __name__ == "__main__":
    main()

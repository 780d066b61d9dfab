"""Prints what an update of the judge needs on a TPU, by its compiler's account. It runs nothing.

    pip install '.[tpu]' && python benchmarks/tpu_step.py [--topology v5p:2x2x1] [--layers 4]

It needs no TPU. The update has one device and one group a row, at the paper's lengths: a prompt of
3096 tokens and 4 judgments of 3096 (paper 4.1), in rows of 15872, with layers of Qwen2.5-1.5B,
bfloat16 compute, remat and AdamW. Both sides are the whole train step, with different attention.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from stepwiser_jax.commands.plan.programs import lower_update
from stepwiser_jax.commands.plan.tpu import tpu_topology
from stepwiser_jax.config import TrainJudge
from stepwiser_jax.distributed.loading import attention_of
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.distributed.shapes import abstract_model
from stepwiser_jax.model.attention import PLAIN
from stepwiser_jax.model.attention.splash import splash_mask
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.rl.rollouts import RolloutGroup, pack_groups

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
    "examples": {"source": "unused"},
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
    mesh = make_mesh(devices=tpu_topology(args.topology).devices)
    judge = TrainJudge.model_validate(JUDGE)
    ids = np.zeros(TOKENS, np.int32)
    group = RolloutGroup("", ids, [ids] * COMPLETIONS, [ids] * COMPLETIONS)
    batch = pack_groups([group], [[0.0] * COMPLETIONS], num_rows=1, row_lengths=[ROW])
    kernel, _ = splash_mask(jnp.asarray(batch.segment_ids_BT))
    steps = kernel.fwd_mask_info.block_mask
    blocks = steps.shape[2]
    print(
        f"{args.layers} layers, {mesh.devices.flat[0].device_kind}; blocks of scores computed: "
        f"{int(jnp.sum(steps))} of {blocks**2} ({blocks * (blocks + 1) // 2} are causal)"
    )
    for name, kind in (("splash", attention_of(config, mesh, "bfloat16")), ("dense", PLAIN)):
        begin = time.perf_counter()
        try:
            model = abstract_model(config, mesh, kind)
            memory = lower_update(judge, model, batch, mesh).compile().memory_analysis()
            needed = f"temporary memory {memory.temp_size_in_bytes / 2**30:.2f} GiB"
        except jax.errors.JaxRuntimeError as error:
            needed = str(error).splitlines()[0]
        print(f"{name}: {needed}; compiled in {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()

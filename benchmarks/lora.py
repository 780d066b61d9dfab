"""Compares the judge's update with and without LoRA: memory by XLA's account, core seconds as run.

    python benchmarks/lora.py --model DIR [--rank 16] [--prompts 4] [--repeats 3] [--core 0]

The update is that of train_step.py (4 prompts of 256 tokens x 8 completions of 128, a micro-batch
each, bfloat16 products, layers recomputed). All sides take turns in one process. They train all
weights, adapters of every matrix of the blocks on a base in float32, and the same on one in
bfloat16.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

SIDES = {
    "all weights": {},
    "LoRA": {"lora": {}},
    "LoRA, base in bfloat16": {"lora": {}, "dtype": "bfloat16"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompts", type=int, choices=range(1, 5), default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {arguments.core})

    import jax
    import numpy as np
    from common import random_completions
    from train_step import LENGTH, PROMPTS, SAMPLES, settings

    from stepwiser_jax.config import TrainJudge
    from stepwiser_jax.config_files import validate
    from stepwiser_jax.distributed.loading import load_for_training
    from stepwiser_jax.distributed.mesh import make_mesh, shard_batch
    from stepwiser_jax.model.lora import trainable
    from stepwiser_jax.rl.grpo import group_advantages, make_objective
    from stepwiser_jax.rl.rollouts import RolloutGroup
    from stepwiser_jax.stages.train_judge import pack
    from stepwiser_jax.training.optimizer import make_optimizer, make_schedule
    from stepwiser_jax.training.step import create_train_state, make_train_step

    mesh = make_mesh()
    states, batches, programs = {}, {}, {}
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    print(f"{'side':24}{'trained M':>10}{'state MiB':>11}{'temporaries MiB':>17}{'all MiB':>9}")
    for name, changes in SIDES.items():
        tree = settings(arguments.model)
        tree["model"] |= changes
        tree["prompts_per_iteration"] = arguments.prompts
        tree["training"]["micro_batches"] = arguments.prompts
        if "lora" in changes:
            tree["model"]["lora"] = {"rank": arguments.rank, "alpha": 2 * arguments.rank}
        config = validate(TrainJudge, tree, "the benchmark")
        schedule = make_schedule(config.training.optimizer, 1)
        optimizer = make_optimizer(config.training.optimizer, schedule)
        model = load_for_training(**config.model.load_args, mesh=mesh, seed=0).model
        state = create_train_state(model, optimizer, mesh)
        logprobs = [np.full(LENGTH, -1.0)] * SAMPLES
        groups = [
            RolloutGroup(f"p{p}", ids, completions_G, logprobs)
            for p, (ids, completions_G) in enumerate(
                zip(PROMPTS, random_completions(), strict=True)
            )
        ][: arguments.prompts]
        rewards_PG = np.array([[float(g % 3) for g in range(SAMPLES)]] * len(groups))
        batches[name] = shard_batch(pack(groups, group_advantages(rewards_PG), config), mesh)
        objective = make_objective(config.grpo, correction="none", temperature=1.0, remat=True)
        step = make_train_step(
            *objective, optimizer, schedule, micro_batches=config.training.micro_batches
        )
        programs[name] = step.lower(state, batches[name]).compile()
        states[name] = state
        memory = programs[name].memory_analysis()
        trained = sum(leaf.size for leaf in jax.tree.leaves(trainable(model)))
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        sizes = (held, memory.temp_size_in_bytes, held + memory.temp_size_in_bytes)
        state_mib, temporary_mib, all_mib = (size / 2**20 for size in sizes)
        print(
            f"{name:24}{trained / 1e6:10.2f}{state_mib:11.0f}{temporary_mib:17.0f}{all_mib:9.0f}",
            flush=True,
        )
        del model, state
    for repeat in range(1 + arguments.repeats):  # the first warms up
        for name in SIDES:
            begin = time.process_time()
            states[name], metrics = programs[name](states[name], batches[name])
            jax.block_until_ready((states[name], metrics))
            if repeat:
                seconds[name].append(time.process_time() - begin)
    for name, values in seconds.items():
        print(f"{name:24}{statistics.median(values):8.1f} core s {[round(x, 1) for x in values]}")


if __name__ == "__main__":
    main()

"""Compares our GRPO update and whole step with TRL's and with the machine's floor, on one core.

    python benchmarks/train_step.py --model DIR [--workloads update step] [--repeats 3]
        [--rival trl=PYTHON] [--output FILE.json]

DIR is SmolLM2-135M-Instruct in float32. Workloads (`train` of workload.json: 4 prompts of 256
tokens x 8 completions of 128, float32 master weights, bfloat16 products, 4 micro-batches):

    update  forward, backward and AdamW on fixed random completions, which cost nothing
    step    the same on completions that the weights in training have just sampled

Sides, turns, core seconds and peak memory are those of rollout.py; rivals/trl_update.py says how to
install the rival. The floor needs torch (`pip install '.[numerics]'`). Tunix's trainer is not a
side: one of its updates takes minutes here, and 15 GiB.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from common import (
    FOLDER,
    SUMMARY_COLUMNS,
    WORKLOAD,
    Side,
    Sizes,
    ceilings,
    compilations,
    print_header,
    print_summary,
    random_completions,
    read_sizes,
    rival_of,
    sampling_floor,
    serve,
    summaries,
    take_turns,
    write_json,
)

NAMES = ("update", "step")
TRAIN = WORKLOAD["train"]
PROMPTS = WORKLOAD["prompts"][: TRAIN["prompts"]]
SAMPLES, LENGTH = TRAIN["samples"], TRAIN["completion_len"]
TOKENS = len(PROMPTS) * SAMPLES * LENGTH
RIVALS = {"trl": "trl_update.py"}


# --- ours, in its own process -------------------------------------------------------------------


def settings(model_dir: str) -> dict[str, Any]:
    """Returns a judge's settings: each group has its own row, with its prompt once."""
    return {
        "model": {"path": model_dir, "dtype": "bfloat16"},
        "examples": {"source": "unused"},
        "iterations": 1,
        "prompts_per_iteration": len(PROMPTS),
        "group_size": SAMPLES,
        "max_prompt_tokens": TRAIN["prompt_len"],
        "row_lengths": [TRAIN["prompt_len"] + SAMPLES * LENGTH],
        "sampling": {"max_new_tokens": LENGTH},
        "engine": {"buckets": [TRAIN["prompt_len"] + LENGTH]},
        "training": {
            "optimizer": {"learning_rate": TRAIN["lr"]},
            "micro_batches": len(PROMPTS),
            "remat": True,
        },
    }


def ours(model_dir: str) -> Callable[[str], dict[str, Any]]:
    import jax
    import numpy as np

    from stepwiser_jax.config import TrainJudge
    from stepwiser_jax.config_files import validate
    from stepwiser_jax.distributed.loading import load_for_training
    from stepwiser_jax.distributed.mesh import make_mesh, shard_batch
    from stepwiser_jax.inference.engine import Engine
    from stepwiser_jax.inference.params import Prefix, SampleRequest, SamplingParams
    from stepwiser_jax.rl.grpo import group_advantages, make_objective
    from stepwiser_jax.rl.rollouts import RolloutGroup
    from stepwiser_jax.stages.train_judge import pack
    from stepwiser_jax.training.optimizer import make_optimizer, make_schedule
    from stepwiser_jax.training.step import create_train_state, make_train_step

    compiled = compilations()
    config = validate(TrainJudge, settings(model_dir), "the benchmark")
    mesh = make_mesh()
    schedule = make_schedule(config.training.optimizer, 1)
    optimizer = make_optimizer(config.training.optimizer, schedule)
    model = load_for_training(**config.model.load_args, mesh=mesh, seed=0).model
    state = create_train_state(model, optimizer, mesh)
    del model
    objective = make_objective(config.grpo, correction="none", temperature=1.0, remat=True)
    micro_batches = config.training.micro_batches
    train_step = make_train_step(*objective, optimizer, schedule, micro_batches=micro_batches)
    runs = 0

    def sampled() -> list[list[list[int]]]:
        engine = Engine(state.model, rows=[len(PROMPTS) * SAMPLES], buckets=[256, 384])
        trunks = [
            Prefix(ids, [SampleRequest(f"{p}/{g}", len(ids), LENGTH) for g in range(SAMPLES)])
            for p, ids in enumerate(PROMPTS)
        ]
        parts = engine.stream(trunks, SamplingParams(LENGTH), key=jax.random.key(runs))
        ids = {done.row_id: done.tokens.tolist() for part in parts for done in part}
        return [[ids[f"{p}/{g}"] for g in range(SAMPLES)] for p in range(len(PROMPTS))]

    def run(name: str) -> dict[str, Any]:
        nonlocal state, runs
        runs += 1
        before = len(compiled)
        logprobs = [np.full(LENGTH, -1.0)] * SAMPLES
        completions = sampled() if name == "step" else random_completions()
        groups = [
            RolloutGroup(f"p{p}", ids, completions[p], logprobs) for p, ids in enumerate(PROMPTS)
        ]
        rewards_PG = np.array([[float(g % 3) for g in range(SAMPLES)]] * len(groups))
        batch = shard_batch(pack(groups, group_advantages(rewards_PG), config), mesh)
        state, metrics = train_step(state, batch)
        jax.block_until_ready((state, metrics))
        return {"compilations": len(compiled) - before}

    return run


# --- the floor ----------------------------------------------------------------------------------


def floor_seconds(name: str, sizes: Sizes, limits: dict[str, float]) -> float:
    """Returns the least time of an update: prompts once, pairs of tokens that see one another, and
    the head for tokens of completions, forward and twice as much backward; AdamW reads weights,
    moments and gradients and writes the first three, in float32. A step samples before it."""
    prompt, scored = TRAIN["prompt_len"], SAMPLES * LENGTH
    pairs = prompt**2 / 2 + SAMPLES * (prompt * LENGTH + LENGTH**2 / 2)
    products = 2 * sizes.body * (prompt + scored) + 2 * sizes.head * scored
    group = products + 4 * sizes.layers * sizes.width * pairs
    adamw = 7 * 4 * (sizes.body + sizes.head)
    update = 3 * len(PROMPTS) * group / limits["flops"] + adamw / limits["bandwidth"]
    if name == "update":
        return update
    trunks = [(len(ids), [(len(ids), LENGTH)] * SAMPLES) for ids in PROMPTS]
    return update + sampling_floor(sizes, trunks, len(PROMPTS) * SAMPLES, **limits)


# --- the parent ---------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument(
        "--rival", type=rival_of(RIVALS), action="append", default=[], metavar="NAME=PYTHON"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--output")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(ours(args.model))
        return
    os.sched_setaffinity(0, {args.core})
    limits, sizes = ceilings(), read_sizes(args.model)
    commands = {"ours": [sys.executable, __file__, "--serve"]} | {
        name: [python, str(FOLDER / "rivals" / RIVALS[name])] for name, python in args.rival
    }
    sides = {
        name: Side(name, [*command, "--model", args.model], args.core)
        for name, command in commands.items()
    }
    print(
        f"one core: {limits['flops'] / 1e9:.0f} GFLOP/s (bf16), "
        f"{limits['bandwidth'] / 1e9:.1f} GB/s; medians of {args.repeats}\n"
    )
    print_header(*SUMMARY_COLUMNS)
    rows = []
    for workload in sorted(args.workloads, key=NAMES.index):
        runs = take_turns(sides, workload, args.repeats)
        floor = floor_seconds(workload, sizes, limits)
        for row in summaries(workload, runs, TOKENS, floor):
            rows.append(row)
            print_summary(row)
        write_json(args.output, {"limits": limits, "rows": rows})
    compiled = sum(row["compilations_after_warm_up"] for row in rows)
    print(f"\ncompilations after warm-up: {compiled}")
    for side in sides.values():
        side.close()
    if len(sides) < len(commands):
        raise SystemExit(
            f"ended before their time: {', '.join(sorted(set(commands) - set(sides)))}"
        )


if __name__ == "__main__":
    main()

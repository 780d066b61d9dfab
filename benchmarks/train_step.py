"""One GRPO update: ours beside TRL's, on one core, both against the machine's floor.

    python benchmarks/train_step.py --model DIR [--trl PYTHON] [--repeats 3] [--output FILE.json]

DIR is SmolLM2-135M-Instruct in float32. The workload (`train` of workload.json): 4 prompts of 256
tokens x 8 completions of 128; forward, backward and AdamW with float32 master weights and bfloat16
products. PYTHON is an interpreter that has trl; its own script is rivals/trl_update.py.

Each side runs in a process of its own, pinned to the same core. Seconds are core seconds; peak
memory is the process's. Ours trains on fixed random completions: their values cost nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
from common import (
    FOLDER,
    WORKLOAD,
    Sizes,
    ceilings,
    compilations,
    core_seconds,
    peak_mib,
    read_sizes,
    write_json,
)

TRAIN = WORKLOAD["train"]
MICRO_BATCHES = 4


def ours(model_dir: str, repeats: int) -> dict[str, Any]:
    import jax

    from stepwiser_jax.config import Judge, validate
    from stepwiser_jax.model.hf import load_hf
    from stepwiser_jax.runtime.mesh import make_mesh, shard_batch
    from stepwiser_jax.runtime.trainer import (
        create_train_state,
        make_optimizer,
        make_schedule,
        make_train_step,
    )
    from stepwiser_jax.stages import judge

    compiled = compilations()
    prompts, samples, length = TRAIN["prompts"], TRAIN["samples"], TRAIN["completion_len"]
    settings = {
        "model": {"path": model_dir, "compute_dtype": "bfloat16"},
        "examples": "",
        "iterations": repeats,
        "prompts_per_iteration": prompts,
        "group_size": samples,
        "max_prompt_tokens": TRAIN["prompt_len"],
        "row_lengths": [TRAIN["prompt_len"] + samples * length],
        "sampling": {"max_new_tokens": length},
        "engine": {"buckets": [TRAIN["prompt_len"] + length]},
        "training": {
            "optimizer": {"learning_rate": TRAIN["lr"]},
            "micro_batches": MICRO_BATCHES,
            "remat": True,
        },
    }
    config = validate(Judge, settings, "the benchmark")
    mesh = make_mesh()
    schedule = make_schedule(
        learning_rate=TRAIN["lr"],
        schedule="constant",
        warmup_steps=0,
        total_steps=1,
        end_fraction=1.0,
    )
    optimizer = make_optimizer(schedule, weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.95)
    model = load_hf(model_dir, dtype="float32", compute_dtype="bfloat16")
    state = create_train_state(model, optimizer, mesh)
    del model
    step = make_train_step(
        functools.partial(judge.judge_loss, config=config),
        optimizer,
        schedule,
        micro_batches=MICRO_BATCHES,
        denominator_fn=functools.partial(judge.judge_denominators, config=config),
    )
    rng = np.random.default_rng(0)
    groups = [
        judge.Judged(
            prompt,
            rng.integers(100, 40_000, (samples, length)).tolist(),
            [[-1.0] * length] * samples,
            [],
            [float(g % 3) for g in range(samples)],
        )
        for prompt in WORKLOAD["prompts"][:prompts]
    ]

    def update() -> None:
        nonlocal state
        batch = shard_batch(judge.assemble(groups, config), mesh)
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    update()
    before = len(compiled)
    runs = [core_seconds(update) for _ in range(repeats)]
    return {
        "runs": runs,
        "peak_mib": peak_mib(),
        "compilations_after_warm_up": len(compiled) - before,
    }


def floor_seconds(sizes: Sizes, *, flops: float, bandwidth: float) -> float:
    """Least time: prompts once, their pairs of tokens that see one another, and the head where a
    completion is predicted, forward and twice as much backward; AdamW reads weights, moments and
    gradients and writes the first three, in float32."""
    prompt, completion = TRAIN["prompt_len"], TRAIN["completion_len"]
    scored = TRAIN["samples"] * completion
    pairs = prompt**2 / 2 + TRAIN["samples"] * (prompt * completion + completion**2 / 2)
    group = 2 * sizes.body * (prompt + scored) + 2 * sizes.head * scored
    group += 4 * sizes.layers * sizes.width * pairs
    return 3 * TRAIN["prompts"] * group / flops + 7 * 4 * (sizes.body + sizes.head) / bandwidth


def run(command: list[str], core: int) -> dict[str, Any]:
    """The last line of a command pinned to `core`, which is JSON."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--trl", metavar="PYTHON")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--output")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        print(json.dumps(ours(args.model, args.repeats)))
        return
    os.sched_setaffinity(0, {args.core})
    limits = ceilings()
    repeats = ["--repeats", str(args.repeats)]
    sides = {"ours": [sys.executable, __file__, "--serve", "--model", args.model, *repeats]}
    if args.trl:
        script, workload = str(FOLDER / "rivals" / "trl_update.py"), str(FOLDER / "workload.json")
        sides["trl"] = [args.trl, script, args.model, workload, str(args.repeats)]
    start = time.perf_counter()
    results = {name: run(command, args.core) for name, command in sides.items()}
    floor = floor_seconds(read_sizes(args.model), **limits)
    medians = {name: statistics.median(found["runs"]) for name, found in results.items()}
    print(
        f"one core: {limits['flops'] / 1e9:.0f} GFLOP/s (bf16), "
        f"{limits['bandwidth'] / 1e9:.1f} GB/s; floor {floor:.1f} s; medians of {args.repeats}\n\n"
        "| side | core seconds | of the floor | peak MiB | ratio |\n|---|---|---|---|---|"
    )
    for name, found in results.items():
        found |= {"seconds": medians[name], "share_of_floor": floor / medians[name]}
        ratio = medians.get("trl", medians[name]) / medians[name]
        print(
            f"| {name} | {medians[name]:.1f} | {floor / medians[name]:.0%} | "
            f"{found['peak_mib']:.0f} | {ratio:.1f}x |"
        )
    print(f"\ncompilations after warm-up: {results['ours']['compilations_after_warm_up']}")
    wall = time.perf_counter() - start
    write_json(args.output, {"limits": limits, "floor": floor, "wall": wall} | results)


if __name__ == "__main__":
    main()

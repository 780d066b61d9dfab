"""Compares the engine, which refills rows, with a static batch, on rows that end by themselves.

    python benchmarks/refill.py --quickstart DIR [--problems 128] [--output FILE.json]
    python benchmarks/refill.py --model DIR [--problems 6] [--output FILE.json]

Workloads, 16 solutions of each problem:

    arithmetic   DIR is a finished `stepwiser quickstart`: its policy, 256 rows
    smollm2      DIR is SmolLM2-135M-Instruct: prompts of workload.json (its chat template, 256
                 tokens each), up to 256 new tokens, bfloat16, 32 rows

The static batch is the chunk sampler: batches of the same number of rows, each until its last
row has ended. Both run in one process, on one core, and take turns. Tokens are those of the
solutions, end token included, and equal on both sides apart from rounding. It prints medians of
core seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from common import (
    WORKLOAD,
    compilations,
    core_seconds,
    finished_quickstart,
    print_header,
    print_row,
    write_json,
)

from stepwiser_jax.distributed.loading import Loaded, load_for_decoding
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.inference.chunk_sampler import ChunkSampler
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import Problem
from stepwiser_jax.text.prompts import encode_solve_prompt

GROUP = 16


@dataclass(frozen=True)
class Work:
    """`rows` of the engine; the static batch has the last of them."""

    name: str
    loaded: Loaded
    prompts: list[list[int]]
    rows: list[int]
    buckets: list[int]
    max_new_tokens: int


def arithmetic(quickstart: Path, problems: int) -> Work:
    loaded = load_for_decoding(str(quickstart / "policy"), weights="model", mesh=make_mesh())
    questions = [p.question for p in read_records(quickstart / "rollouts", Problem)[:problems]]
    prompts = [encode_solve_prompt(loaded.tokenizer, question, "bare") for question in questions]
    return Work("arithmetic", loaded, prompts, [32, 256], [32, 160], 112)


def smollm2(model_dir: str, problems: int) -> Work:
    dtypes = {"dtype": "bfloat16"}
    loaded = load_for_decoding(model_dir, weights="model", mesh=make_mesh(), **dtypes)
    return Work("smollm2", loaded, WORKLOAD["prompts"][:problems], [8, 32], [256, 512], 256)


def sample_with_refills(
    engine: Engine, work: Work, row_ids: list[str], params: SamplingParams
) -> None:
    key = jax.random.key(0)
    engine.generate(work.prompts, params, key=key, row_ids=row_ids, group_size=GROUP)


def sample_statically(
    engine: Engine, work: Work, row_ids: list[str], params: SamplingParams
) -> None:
    sampler, key = ChunkSampler(engine), jax.random.key(0)
    at_once = engine.shapes.max_rows // GROUP
    for start in range(0, len(work.prompts), at_once):
        prompts = work.prompts[start : start + at_once]
        state = sampler.prefill(prompts, max(map(len, prompts)) + params.max_new_tokens)
        state = sampler.branch(state, [p for p in range(len(prompts)) for _ in range(GROUP)])
        ids = row_ids[start * GROUP : (start + at_once) * GROUP]
        sampler.decode(state, params, key=key, row_ids=ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    policy = parser.add_mutually_exclusive_group(required=True)
    policy.add_argument("--quickstart", type=finished_quickstart)
    policy.add_argument("--model")
    parser.add_argument("--problems", type=int, help="128, or 6 of a model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--output")
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})
    work = (
        smollm2(args.model, args.problems or 6)
        if args.model
        else arithmetic(args.quickstart, args.problems or 128)
    )
    compiled, loaded = compilations(), work.loaded
    row_ids = [f"{p}/{g}" for p in range(len(work.prompts)) for g in range(GROUP)]
    params = SamplingParams(work.max_new_tokens, stop_ids=loaded.tokenizer.eos_ids)

    def timed(is_static: bool) -> dict[str, Any]:
        most = work.rows[-1]
        # The static batch reads each prompt as one row: this number of them, and no padding.
        rows = [most // GROUP, most] if is_static else work.rows
        engine = Engine(loaded.model, loaded.tokenizer, rows=rows, buckets=work.buckets)
        sample = sample_statically if is_static else sample_with_refills
        seconds = core_seconds(lambda: sample(engine, work, row_ids, params))
        return {"seconds": seconds, "tokens": engine.sampled_tokens}

    sides = {"static batch": True, "engine": False}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for is_static in sides.values():
        timed(is_static)  # compiles
    warm = len(compiled)
    for _ in range(args.repeats):
        for name, is_static in sides.items():
            runs[name].append(timed(is_static))
    rate = {
        name: statistics.median(run["tokens"] / run["seconds"] for run in some)
        for name, some in runs.items()
    }
    print_header("workload", "side", "tokens/s", "tokens a solution", "ratio")
    for name, some in runs.items():
        print_row(
            work.name,
            name,
            f"{rate[name]:.0f}",
            f"{some[0]['tokens'] / len(row_ids):.0f} of at most {work.max_new_tokens}",
            f"{rate[name] / rate['static batch']:.2f}x",
        )
    print(f"\ncompilations after warm-up: {len(compiled) - warm}")
    write_json(args.output, {"workload": work.name, "runs": runs})


if __name__ == "__main__":
    main()

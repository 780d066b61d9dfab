"""Rows that end by themselves: the engine, which refills slots, beside a static batch.

    python benchmarks/refill.py --quickstart DIR [--problems 128] [--output FILE.json]

DIR is a finished `stepwiser quickstart`; its policy writes 16 solutions of each problem. The static
batch is the reference sampler: batches of as many rows, each until its last row has ended. Both run
in one process and take turns; tokens are those of the solutions, end token included, and are the
same on both sides but for rounding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax

from stepwiser_jax.records import Problem, read_records
from stepwiser_jax.runtime.engine import Engine
from stepwiser_jax.runtime.loading import load_for_decoding
from stepwiser_jax.runtime.mesh import make_mesh
from stepwiser_jax.runtime.sampler import Sampler
from stepwiser_jax.runtime.sampling import SamplingParams
from stepwiser_jax.text.prompts import encode_solve_prompt

GROUP = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, required=True)
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output")
    args = parser.parse_args()
    loaded = load_for_decoding(str(args.quickstart / "policy"), weights="model", mesh=make_mesh())
    problems = read_records(args.quickstart / "rollouts", Problem)[: args.problems]
    prompts = [encode_solve_prompt(loaded.tokenizer, p.question, "bare") for p in problems]
    row_ids = [f"{p.problem_id}/{g}" for p in problems for g in range(GROUP)]
    params = SamplingParams(112, stop_ids=loaded.tokenizer.eos_ids)

    def timed(sampler_class: type[Sampler]) -> dict[str, Any]:
        rows = [32, args.rows] if sampler_class is Engine else [args.rows]
        sampler = sampler_class(loaded.model, loaded.tokenizer, rows=rows, buckets=[160])
        start = time.perf_counter()
        output = sampler.generate(
            prompts, params, key=jax.random.key(0), row_ids=row_ids, group_size=GROUP
        )
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": int(output.length_B.sum())}

    sides = {"static batch": Sampler, "engine": Engine}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for sampler_class in sides.values():
        timed(sampler_class)  # compiles
    for _ in range(args.repeats):
        for name, sampler_class in sides.items():
            runs[name].append(timed(sampler_class))
    rate = {
        name: statistics.median(run["tokens"] / run["seconds"] for run in some)
        for name, some in runs.items()
    }
    print("| side | tokens/s | ratio |\n|---|---|---|")
    for name in sides:
        print(f"| {name} | {rate[name]:.0f} | {rate[name] / rate['static batch']:.2f}x |")
    if args.output:
        Path(args.output).write_text(json.dumps(runs, indent=2) + "\n")


if __name__ == "__main__":
    main()

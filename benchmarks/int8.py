"""Compares int8 weights with bfloat16: bytes, core seconds, log-prob gap to the trained model.

    python benchmarks/int8.py --model DIR [--rows 32] [--new-tokens 64] [--repeats 3]

It samples `--new-tokens` tokens at temperature 1 from `--rows` prompts of workload.json. Seconds
are core seconds of sampling after a warm-up, and the two sides take turns: pin the process to one
core. The gap is between the sampler's log-probs of its tokens and those of the same checkpoint,
teacher-forced, computed in bfloat16 and in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import Completion, SamplingParams
from stepwiser_jax.model.hf import load_hf
from stepwiser_jax.rl.logprobs import token_logprobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    workload = Path(__file__).with_name("workload.json").read_text()
    prompts = json.loads(workload)["prompts"][: args.rows]
    dtypes = ("bfloat16", "float32")
    models = {dtype: load_hf(args.model, dtype=dtype, compute_dtype=dtype) for dtype in dtypes}
    shapes = {"rows": (args.rows,), "buckets": (256, 1024)}
    engines = {
        weights: Engine(models["bfloat16"], weights=weights, **shapes)
        for weights in ("model", "int8")
    }

    def sample(weights: str) -> tuple[list[Completion], float]:
        ids = [str(b) for b in range(args.rows)]
        params, key = SamplingParams(args.new_tokens), jax.random.key(0)
        start = time.process_time()
        output = engines[weights].generate(prompts, params, key=key, row_ids=ids)
        return output, time.process_time() - start

    outputs = {weights: sample(weights)[0] for weights in engines}
    seconds: dict[str, list[float]] = {weights: [] for weights in engines}
    for _ in range(args.repeats):
        for weights in engines:
            seconds[weights].append(sample(weights)[1])
    score = jax.jit(token_logprobs)
    for weights, output in outputs.items():
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(engines[weights].decoder)) / 2**20
        spent = f"{statistics.median(seconds[weights]):.2f} core s, " if args.repeats else ""
        print(f"{weights}: {size:.0f} MiB, {spent}of {args.rows} x {args.new_tokens} tokens")
        tokens_BC = np.stack([completion.tokens for completion in output])
        logprobs_BC = np.stack([completion.logprobs for completion in output])
        rows_BT = np.concatenate([np.array(prompts), tokens_BC], axis=1)
        for dtype, model in models.items():
            teacher_BC = np.asarray(score(model, rows_BT))[:, -args.new_tokens :]
            gap_BC = teacher_BC - logprobs_BC
            ratio_B = np.exp(gap_BC.sum(axis=1))
            print(
                f"  against {dtype}: gap {np.abs(gap_BC).mean():.4f}, largest "
                f"{np.abs(gap_BC).max():.2f}; token weights above 2: "
                f"{(np.exp(gap_BC) > 2).mean():.2%}; sequence: std of the log "
                f"{np.log(ratio_B).std():.2f}, ratios {ratio_B.min():.2f} to {ratio_B.max():.2f}, "
                f"above 2: {(ratio_B > 2).mean():.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()

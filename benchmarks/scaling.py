"""Measures how the cost of sampling grows with rows, stored prefix, chunks, M and vocabulary.

    python benchmarks/scaling.py [--axes rows prefix chunks M vocabulary] [--output FILE.json]

The model has SmolLM2-135M's shape, but 6 layers and random weights, in bfloat16, on one core. Token
ids are random, with 16 new tokens per row and no end token. One thing varies at a time:

    rows         1 to 96 rows that continue one prompt of 256 tokens
    prefix       64 to 1024 stored tokens, 32 rows
    chunks       a trajectory of 512 tokens cut at 1 to 16 places, 4 rollouts from each
    M            1 to 16 rollouts from each of 6 cuts of a trajectory of 512 tokens
    vocabulary   4096 to 131072 tokens, 32 rows that continue one prompt of 256 tokens

The engine shares what is stored. The chunk sampler takes turns with it in the same process: it
reads every prefix as another prompt, and shares no cache. Seconds are medians of core seconds of
the whole call, reading included. The exponent is the slope of a line through the logarithms of
(what varies, seconds): 1 is linear growth, 0 is none.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import compilations, core_seconds, print_header, print_row, write_json
from flax import nnx

from stepwiser_jax.inference.chunk_sampler import ChunkSampler
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import Prefix, SampleRequest, SamplingParams
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.decoder import Decoder
from stepwiser_jax.model.transformer import Transformer

NEW_TOKENS = 16
TRAJECTORY = 512


@dataclass(frozen=True)
class Point:
    """`rollouts` rows from each of these lengths of one stored sequence."""

    cuts: tuple[int, ...]
    rollouts: int
    vocab_size: int = 49152


def even_cuts(count: int) -> tuple[int, ...]:
    """Returns evenly spaced cuts of a trajectory, the last at its end."""
    return tuple(TRAJECTORY * (j + 1) // count for j in range(count))


AXES: dict[str, dict[int, Point]] = {
    "rows": {n: Point((256,), n) for n in (1, 8, 32, 96)},
    "prefix": {n: Point((n,), 32) for n in (64, 256, 1024)},
    "chunks": {n: Point(even_cuts(n), 4) for n in (1, 2, 4, 8, 16)},
    "M": {n: Point(even_cuts(6), n) for n in (1, 4, 16)},
    "vocabulary": {n: Point((256,), 32, n) for n in (4096, 16384, 49152, 131072)},
}


def random_model(vocab_size: int) -> Transformer:
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 2048,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
        }
    )
    model = Transformer(
        config,
        rngs=nnx.Rngs(0),
        param_dtype=jnp.dtype("bfloat16"),
        compute_dtype=jnp.dtype("bfloat16"),
    )
    return Decoder.from_transformer(model)


def engine_side(model: Decoder, point: Point) -> Callable[[], Any]:
    ids = token_ids(point)
    rows = len(point.cuts) * point.rollouts
    engine = Engine(model, rows=[rows], buckets=[max(point.cuts), max(point.cuts) + NEW_TOKENS])
    forks = [
        SampleRequest(f"{cut}/{m}", cut, NEW_TOKENS)
        for cut in point.cuts
        for m in range(point.rollouts)
    ]

    def run() -> None:
        parts = engine.stream(
            [Prefix(ids, forks)],
            SamplingParams(NEW_TOKENS),
            key=jax.random.key(0),
            samples_per_prefix=rows,
        )
        assert sum(len(done.tokens) for part in parts for done in part) == rows * NEW_TOKENS

    return run


def sampler_side(model: Decoder, point: Point) -> Callable[[], Any]:
    """Reads all prefixes in one call, padded to the longest, and copies them to their rows."""
    ids = token_ids(point)
    rows, longest = len(point.cuts) * point.rollouts, max(point.cuts)
    sampler = ChunkSampler(
        Engine(model, rows=[len(point.cuts), rows], buckets=[longest, longest + NEW_TOKENS])
    )
    source_B = np.repeat(np.arange(len(point.cuts)), point.rollouts).tolist()
    row_ids = [f"{b}" for b in range(rows)]

    def run() -> None:
        state = sampler.prefill([ids[:cut] for cut in point.cuts], longest + NEW_TOKENS)
        state = sampler.branch(state, source_B)
        params = SamplingParams(NEW_TOKENS)
        output, _ = sampler.decode(state, params, key=jax.random.key(0), row_ids=row_ids)
        assert sum(len(done.tokens) for done in output) == rows * NEW_TOKENS

    return run


def token_ids(point: Point) -> list[int]:
    return np.random.default_rng(0).integers(3, 4096, max(point.cuts)).tolist()


SIDES = {"engine": engine_side, "sampler": sampler_side}


def measure(point: Point, repeats: int, compiled: list[str]) -> dict[str, Any]:
    """Returns medians of core seconds of the sides, and compilations after the warm-up."""
    model = random_model(point.vocab_size)
    runs = {name: side(model, point) for name, side in SIDES.items()}
    for run in runs.values():
        run()
    before = len(compiled)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(core_seconds(run))
    return {
        "tokens": len(point.cuts) * point.rollouts * NEW_TOKENS,
        "seconds": {name: statistics.median(some) for name, some in seconds.items()},
        "runs": seconds,
        "compilations_after_warm_up": len(compiled) - before,
    }


def exponent(xs: list[int], seconds: list[float]) -> float:
    """Returns the slope of least squares through (log x, log seconds)."""
    return float(np.polyfit([math.log(x) for x in xs], [math.log(s) for s in seconds], 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--output")
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})
    compiled, results, late = compilations(), {}, 0
    for axis in args.axes:
        print_header(axis, "engine, s", "sampler, s", "sampler / engine", "engine, ms a token")
        found = {}
        for x, point in AXES[axis].items():
            row = found[x] = measure(point, args.repeats, compiled)
            late += row["compilations_after_warm_up"]
            engine, sampler = (row["seconds"][name] for name in SIDES)
            print_row(
                str(x),
                f"{engine:.2f}",
                f"{sampler:.2f}",
                f"{sampler / engine:.1f}x",
                f"{1000 * engine / row['tokens']:.2f}",
            )
        exponents = {
            name: exponent(list(found), [row["seconds"][name] for row in found.values()])
            for name in SIDES
        }
        print_row("exponent", *(f"{exponents[name]:.2f}" for name in SIDES), "", "")
        print()
        results[axis] = {"points": found, "exponents": exponents}
        write_json(args.output, results)
    print(f"compilations after warm-up: {late}")


if __name__ == "__main__":
    main()

"""Measures `label` on many long trajectories, and what a shard of `annotate` reads.

It makes a rollout run of random tokens of the embedded task, with random values of every prefix,
and runs the `label` stage on them in this process. It prints seconds and memory.

    python benchmarks/label.py --trajectories 200000 --tokens 700 --chunks 5
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stepwiser_jax import token_files
from stepwiser_jax.config import Label
from stepwiser_jax.record_io import stream_records, write_manifest
from stepwiser_jax.record_lines import write_records
from stepwiser_jax.records import PrefixValue, Problem, Tokens, Trajectory
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.stages import label

GROUP, NUM_ROLLOUTS = 16, 16


def trajectories(count: int, num_tokens: int, num_chunks: int) -> Iterator[Trajectory]:
    tokenizer, rng = load_tokenizer_of("arithmetic"), np.random.default_rng(0)
    prompt_ids = np.array(tokenizer.encode("start 4 ; * 7 + 5 ?"))
    words = np.array(sorted(tokenizer.known_ids - set(tokenizer.eos_ids)))
    close = tokenizer.encode("</chunk>")[-1]
    ends = tuple(int(end) for end in np.linspace(0, num_tokens, num_chunks + 1)[1:])
    for i in range(count):
        ids = rng.choice(words, num_tokens)
        ids[np.array(ends) - 1] = close
        tokens = Tokens(prompt_ids, ids, -rng.random(num_tokens))
        name = f"p/{i // GROUP:06d}"
        yield Trajectory(f"{name}#{i % GROUP}", name, "policy", tokens, ends, "stop_id", i % 2 > 0)


def make_runs(directory: Path, count: int, num_tokens: int, num_chunks: int) -> None:
    rng, rollouts, values = np.random.default_rng(1), directory / "rollouts", directory / "values"
    numbers = range(-(-count // GROUP))
    problems = [Problem(f"p/{p:06d}", "start 4 ; * 7 + 5 ?", "3", "random") for p in numbers]
    part = "part-00000-of-00001.jsonl"
    write_records(rollouts / "records" / "problems" / part, problems)
    made = trajectories(count, num_tokens, num_chunks)
    write_records(rollouts / "records" / "trajectories" / part, made)
    write_manifest(rollouts, "rollout", "0", [Problem, Trajectory])
    write_records(
        values / "records" / "prefix_values" / part,
        (
            PrefixValue(name, j, NUM_ROLLOUTS, int(right), NUM_ROLLOUTS, "policy")
            for name in (t.trajectory_id for t in stream_records(rollouts, Trajectory))
            for j, right in enumerate(rng.integers(1, NUM_ROLLOUTS + 1, num_chunks + 1))
        ),
    )
    write_manifest(values, "annotate", "0", [PrefixValue])


def bytes_of_shard(rollouts: Path, index: int, count: int) -> tuple[int, int]:
    """Returns the bytes of the token file that shard `index` of `count` reads, and all of them."""
    read, pread = 0, os.pread

    def counted(file: int, size: int, offset: int) -> bytes:
        nonlocal read
        read += size
        return pread(file, size, offset)

    token_files.os.pread = counted
    for trajectory in list(stream_records(rollouts, Trajectory))[index::count]:
        trajectory.tokens.read()
    token_files.os.pread = pread
    return read, sum(file.stat().st_size for file in rollouts.rglob("*.tokens"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trajectories", type=int, default=200_000)
    parser.add_argument("--tokens", type=int, default=700)
    parser.add_argument("--chunks", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        make_runs(directory, args.trajectories, args.tokens, args.chunks)
        read, size = bytes_of_shard(directory / "rollouts", 3, 64)
        settings = {"rollouts": directory / "rollouts", "values": directory / "values"}
        config = Label(
            **{k: str(path) for k, path in settings.items()},
            tokenizer="arithmetic",
            prompt_style="bare",
        )
        start, before = time.perf_counter(), time.process_time()
        summary = label.run(config, directory / "labels")
        found = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - before,
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "shard_3_of_64_reads": read / size,
        }
        print(json.dumps(found | {k: summary[k] for k in ("labels", "judge_examples")}, indent=2))


if __name__ == "__main__":
    main()

"""Sampling: ours beside transformers `generate`, on one core, both against the machine's floor.

    python benchmarks/rollout.py --model DIR [--workloads mc group b32 b8 b1] [--output FILE.json]

DIR is SmolLM2-135M-Instruct (the shapes of the floor are its own). Workloads, of real token ids
(workload.json), temperature 1, no end token:

    b1 b8 b32   as many prompts of 256 tokens, 128 new tokens each
    group       4 prompts x 8 samples, 128 new tokens
    mc          one trajectory (256 + 384 tokens) cut at 6 places, 16 rollouts of 96 tokens each

Each side runs in a process of its own, pinned to the same core; the two take turns in every
repeat. Seconds are core seconds (user + system of that process), which another process on the core
does not stretch. Peak memory is the process's, so workloads run from small to large. Needs the
`numerics` extra (torch); `--only ours` leaves transformers out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORKLOAD = json.loads(Path(__file__).with_name("workload.json").read_text())
NAMES = ("b1", "b8", "group", "b32", "mc")
LAYERS, WIDTH, KV_WIDTH, BODY, EMBEDDING = 30, 576, 192, 106.2e6, 28.3e6


def requests(name: str) -> tuple[list[tuple[list[int], list[int], int]], int]:
    """[(token ids, lengths of the prefixes to go on from, samples of each)], new tokens."""
    prompts = WORKLOAD["prompts"]
    if name == "mc":
        mc = WORKLOAD["mc"]
        prompt = mc["prompt"]
        cuts = [len(prompt) + boundary for boundary in mc["boundaries"]]
        return [(prompt + mc["response"], cuts, mc["rollouts"])], mc["new_tokens"]
    if name == "group":
        group = WORKLOAD["group"]
        chosen, samples = prompts[: group["prompts"]], group["samples"]
    else:
        chosen, samples = prompts[: int(name[1:])], 1
    return [(prompt, [len(prompt)], samples) for prompt in chosen], WORKLOAD["new_tokens"]


def num_tokens(name: str) -> int:
    some, new = requests(name)
    return sum(len(cuts) * samples for _, cuts, samples in some) * new


# --- the two sides, each in its own process -----------------------------------------------------


def ours(model_dir: str) -> Callable[[str], dict[str, Any]]:
    import jax

    from stepwiser_jax.model.hf import load_hf
    from stepwiser_jax.runtime.engine import Engine, Fork, Trunk
    from stepwiser_jax.runtime.sampling import SamplingParams, decoding_layout

    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else None
    )
    model = decoding_layout(load_hf(model_dir, dtype="bfloat16", compute_dtype="bfloat16"))
    runs = 0

    def run(name: str) -> dict[str, Any]:
        nonlocal runs
        runs += 1
        some, new = requests(name)
        trunks = [
            Trunk(
                ids,
                [Fork(f"{p}/{c}/{s}", c, new) for c in cuts for s in range(samples)],
            )
            for p, (ids, cuts, samples) in enumerate(some)
        ]
        rows = sum(len(trunk.forks) for trunk in trunks)
        engine = Engine(model, rows=[rows], buckets=[256, 640, 1024])
        before = len(compilations)
        parts = engine.sample(trunks, SamplingParams(new), key=jax.random.key(runs))
        assert sum(len(done.ids) for part in parts for done in part) == num_tokens(name)
        return {"compilations": len(compilations) - before}

    return run


def transformers_generate(model_dir: str) -> Callable[[str], dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None

    def generate(prompts: list[list[int]], samples: int, new: int) -> None:
        ids = torch.tensor(prompts)
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=new,
                num_return_sequences=samples,
                pad_token_id=2,
                eos_token_id=None,
            )
        assert out.shape == (len(prompts) * samples, ids.shape[1] + new)

    def run(name: str) -> dict[str, Any]:
        some, new = requests(name)
        if name == "mc":
            for cut in some[0][1]:
                generate([some[0][0][:cut]], some[0][2], new)
        else:
            generate([ids for ids, _, _ in some], some[0][2], new)
        return {}

    return run


def ceilings() -> dict[str, float]:
    """bfloat16 FLOP/s of a matrix product (oneDNN) and bytes/s of a sum over 1 GiB."""
    import torch

    torch.set_num_threads(1)
    a = torch.randn(2048, 2048).to(torch.bfloat16)
    x = torch.ones(1 << 28)

    def best(function: Callable[[], Any]) -> float:
        function()
        return min(core_seconds(function) for _ in range(5))

    return {"flops": 2 * 2048**3 / best(lambda: a @ a), "bandwidth": x.nbytes / best(x.sum)}


SIDES = {"ours": ours, "transformers": transformers_generate}


def core_seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def serve(side: str, model_dir: str) -> None:
    """A line with a workload's name in, a line of JSON out; the first run of each is a warm-up."""
    run = SIDES[side](model_dir)
    warm = set()
    print("ready", flush=True)
    for line in sys.stdin:
        name = line.strip()
        if name not in warm and side == "ours":  # transformers compiles nothing
            run(name)
            warm.add(name)
        found: dict[str, Any] = {}
        found["seconds"] = core_seconds(lambda n=name, f=found: f.update(run(n)))
        found["peak_mib"] = peak_mib()
        print(json.dumps(found), flush=True)


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


# --- the floor ----------------------------------------------------------------------------------


def floor_seconds(name: str, flops: float, bandwidth: float) -> float:
    """Least time in bfloat16: every step reads the weights and every distinct key and value once,
    at full bandwidth, while all products run at the rate of a large square one."""
    some, new = requests(name)
    rows = sum(len(cuts) * samples for _, cuts, samples in some)
    context = sum(cut * samples for _, cuts, samples in some for cut in cuts) / rows + new / 2
    stored = sum(max(cuts) for _, cuts, _ in some) + rows * new / 2
    step_flops = rows * (2 * (BODY + EMBEDDING) + 4 * LAYERS * WIDTH * context)
    step_bytes = 2 * (BODY + EMBEDDING) + stored * 2 * LAYERS * KV_WIDTH * 2
    read = sum(max(cuts) for _, cuts, _ in some)
    length = max(max(cuts) for _, cuts, _ in some)
    read_flops = read * (2 * BODY + 2 * LAYERS * WIDTH * length)
    return read_flops / flops + (new - 1) * max(step_flops / flops, step_bytes / bandwidth)


# --- the parent ---------------------------------------------------------------------------------


class Side:
    """A child process pinned to `core`."""

    def __init__(self, name: str, model_dir: str, core: int):
        command = [sys.executable, __file__, "--serve", name, "--model", model_dir]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        self._expect("ready")

    def _expect(self, wanted: str | None = None) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if (wanted is None and line.startswith("{")) or line.strip() == wanted:
                return line
        raise SystemExit(f"a benchmark process ended with status {self.process.wait()}")

    def run(self, workload: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(workload + "\n")
        self.process.stdin.flush()
        return json.loads(self._expect())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--only", choices=list(SIDES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--output")
    parser.add_argument("--serve", choices=list(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.model)
        return
    os.sched_setaffinity(0, {args.core})
    limits = ceilings()
    sides = {name: Side(name, args.model, args.core) for name in SIDES if args.only in (None, name)}
    print(
        f"one core: {limits['flops'] / 1e9:.0f} GFLOP/s (bf16), "
        f"{limits['bandwidth'] / 1e9:.1f} GB/s; medians of {args.repeats}\n\n"
        "| workload | side | core seconds | tokens/s | of the floor | peak MiB | ratio |\n"
        "|---|---|---|---|---|---|---|"
    )
    results = []
    for workload in sorted(args.workloads, key=NAMES.index):
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for _ in range(args.repeats):
            for name, side in sides.items():
                runs[name].append(side.run(workload))
        floor = floor_seconds(workload, **limits)
        medians = {n: statistics.median(r["seconds"] for r in some) for n, some in runs.items()}
        for name, some in runs.items():
            seconds = medians[name]
            row = {
                "workload": workload,
                "side": name,
                "seconds": seconds,
                "runs": [r["seconds"] for r in some],
                "tokens_per_second": num_tokens(workload) / seconds,
                "share_of_floor": floor / seconds,
                "peak_mib": max(r["peak_mib"] for r in some),
                "ratio": medians.get("transformers", seconds) / seconds,
                "compilations_after_warm_up": sum(r.get("compilations", 0) for r in some),
            }
            results.append(row)
            print(
                f"| {workload} | {name} | {seconds:.2f} | {row['tokens_per_second']:.0f} | "
                f"{row['share_of_floor']:.0%} | {row['peak_mib']:.0f} | {row['ratio']:.1f}x |",
                flush=True,
            )
    if args.output:
        Path(args.output).write_text(json.dumps({"limits": limits, "rows": results}, indent=2))
    compiled = sum(row["compilations_after_warm_up"] for row in results)
    print(f"\ncompilations after warm-up: {compiled}")
    for side in sides.values():
        side.process.terminate()


if __name__ == "__main__":
    main()

"""Compares our sampling with its rivals on one core, and all with the machine's floor.

    python benchmarks/rollout.py --model DIR [--workloads mc group b32 b8 b1] [--output FILE.json]
        [--rival vllm=PYTHON] [--rival llama.cpp=PYTHON] [--rival tunix=PYTHON]

DIR is SmolLM2-135M-Instruct. Workloads have its token ids (workload.json), temperature 1, and no
end token:

    b1 b8 b32   this number of prompts of 256 tokens, 128 new tokens each
    group       4 prompts x 8 samples, 128 new tokens
    mc          one trajectory (256 + 384 tokens) cut at 6 places, 16 rollouts of 96 tokens each

transformers `generate` runs in this environment; each other rival in its own, whose interpreter
`--rival` names (benchmarks/rivals/ says how to install it). Each side is its own process, all are
pinned to the same core, and they take turns in every repeat. Seconds are medians of core seconds
(user + system of that process), to which other processes on the core add nothing. Peak memory is
that of the runs of a workload. "beside ours" is a side's seconds over ours. transformers and the
floor need torch (`pip install '.[numerics]'`); `--only ours` leaves transformers out.
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
    Side,
    Sizes,
    ceilings,
    compilations,
    num_tokens,
    print_header,
    print_summary,
    read_sizes,
    requests,
    rival_of,
    sampling_floor,
    serve,
    summaries,
    take_turns,
    write_json,
)

NAMES = ("b1", "b8", "group", "b32", "mc")


# --- the two sides, each in its own process -----------------------------------------------------


def ours(model_dir: str) -> Callable[[str], dict[str, Any]]:
    import jax

    from stepwiser_jax.inference.engine import Engine
    from stepwiser_jax.inference.params import Prefix, SampleRequest, SamplingParams
    from stepwiser_jax.model.decoder import Decoder
    from stepwiser_jax.model.hf import load_hf

    compiled = compilations()
    model = Decoder.from_transformer(load_hf(model_dir, dtype="bfloat16", compute_dtype="bfloat16"))
    runs = 0

    def run(name: str) -> dict[str, Any]:
        nonlocal runs
        runs += 1
        some, new = requests(name)
        trunks = [
            Prefix(
                ids,
                [SampleRequest(f"{p}/{c}/{s}", c, new) for c in cuts for s in range(samples)],
            )
            for p, (ids, cuts, samples) in enumerate(some)
        ]
        rows = sum(len(trunk.samples) for trunk in trunks)
        engine = Engine(model, rows=[rows], buckets=[256, 640, 1024])
        before = len(compiled)
        parts = engine.stream(trunks, SamplingParams(new), key=jax.random.key(runs))
        assert sum(len(done.tokens) for part in parts for done in part) == num_tokens(name)
        return {"compilations": len(compiled) - before}

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


SIDES = {"ours": ours, "transformers": transformers_generate}
RIVALS = {
    "vllm": "vllm_generate.py",
    "llama.cpp": "llama_cpp_generate.py",
    "tunix": "tunix_generate.py",
}


# --- the floor ----------------------------------------------------------------------------------


def floor_seconds(name: str, sizes: Sizes, limits: dict[str, float]) -> float:
    """Returns the floor for all rows of a workload at once."""
    some, new = requests(name)
    trunks = [
        (max(cuts), [(cut, new) for cut in cuts for _ in range(samples)])
        for _, cuts, samples in some
    ]
    rows = sum(len(forks) for _, forks in trunks)
    return sampling_floor(sizes, trunks, rows, **limits)


# --- the parent ---------------------------------------------------------------------------------


def start_sides(args: argparse.Namespace) -> dict[str, Side]:
    commands = {
        name: [sys.executable, __file__, "--serve", name]
        for name in SIDES
        if args.only in (None, name)
    } | {name: [python, str(FOLDER / "rivals" / RIVALS[name])] for name, python in args.rival}
    return {
        name: Side(name, [*command, "--model", args.model], args.core)
        for name, command in commands.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--only", choices=list(SIDES))
    parser.add_argument(
        "--rival", type=rival_of(RIVALS), action="append", default=[], metavar="NAME=PYTHON"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--output")
    parser.add_argument("--serve", choices=list(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(SIDES[args.serve](args.model), warm_up=args.serve == "ours")
        return
    os.sched_setaffinity(0, {args.core})
    limits, sizes = ceilings(), read_sizes(args.model)
    sides = start_sides(args)
    started = set(sides)
    print(
        f"one core: {limits['flops'] / 1e9:.0f} GFLOP/s (bf16), "
        f"{limits['bandwidth'] / 1e9:.1f} GB/s; medians of {args.repeats}\n"
    )
    print_header(*SUMMARY_COLUMNS)
    rows = []
    for workload in sorted(args.workloads, key=NAMES.index):
        runs = take_turns(sides, workload, args.repeats)
        floor = floor_seconds(workload, sizes, limits)
        for row in summaries(workload, runs, num_tokens(workload), floor):
            rows.append(row)
            print_summary(row)
        write_json(args.output, {"limits": limits, "rows": rows})
    compiled = sum(row["compilations_after_warm_up"] for row in rows)
    print(f"\ncompilations after warm-up: {compiled}")
    for side in sides.values():
        side.close()
    if started - set(sides):
        raise SystemExit(f"ended before their time: {', '.join(sorted(started - set(sides)))}")


if __name__ == "__main__":
    main()

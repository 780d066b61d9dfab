"""Compares annotation as the stage runs it with the same rollouts without sharing, on one core.

    python benchmarks/annotate.py --model DIR [--trajectories 2] [--rollouts 16] [--output FILE]
    python benchmarks/annotate.py --quickstart DIR [--trajectories 64] [--output FILE]

Workloads, M = 16 rollouts from every prefix, with real end tokens:

    smollm2      DIR is SmolLM2-135M-Instruct: solutions of the prompts of workload.json (its chat
                 template, 256 tokens each), up to 256 tokens, sampled first, cut at blank lines
    arithmetic   DIR is a finished `stepwiser quickstart`: its policy and its trajectories

Sides, each its own process, all pinned to the same core, take turns:

    ours           the stage's function: the engine samples all prefixes of a trajectory from one
                   stored copy and refills rows, and worker processes verify answers
    static batch   the chunk sampler: it reads every prefix as another prompt, in batches of the
                   same number of rows, each until its last row has ended; the rollouts are the
                   same, apart from rounding
    transformers   `generate` for every prefix, M sequences (needs torch, as does the floor:
                   `pip install '.[numerics]'`)

Tokens are those of the completions, end token included. Seconds are core seconds of the side's
process. "beside ours" is ours in tokens/s over the side's. The floor is for the same rollouts.
Waiting for verification is wall time in which answers were verified while the device had nothing to
do. It is an upper bound: a call counts whole if the device is idle when it returns. All sides
verify the same kind of answers; workers share the core, which is the worst case.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    SUMMARY_COLUMNS,
    WORKLOAD,
    Side,
    ceilings,
    compilations,
    finished_quickstart,
    print_header,
    print_summary,
    read_sizes,
    sampling_floor,
    serve,
    summaries,
    take_turns,
    write_json,
)


@dataclasses.dataclass(frozen=True)
class Work:
    """What to annotate, and the shapes to do it in. `policy` are the settings of `load_model`."""

    name: str
    policy: dict[str, Any]
    model_dir: str
    trajectories: list[Any]
    problems: dict[str, Any]
    rows: list[int]
    buckets: list[int]
    max_new_tokens: int
    num_rollouts: int = 16

    def load(self) -> Any:
        from stepwiser_jax.distributed.loading import load_for_decoding
        from stepwiser_jax.distributed.mesh import make_mesh

        return load_for_decoding(**self.policy, weights="model", mesh=make_mesh())

    def verify(self, tokenizer: Any, verifier: Any, rows: Sequence[Any]) -> list[bool]:
        """Returns for each (trajectory, completion ids) whether the final answer is right."""
        from stepwiser_jax.text.tokenizer import completion_text

        return verifier.verify(
            [completion_text(tokenizer, completion) for _, completion in rows],
            [self.problems[trajectory.problem_id] for trajectory, _ in rows],
        )


# --- what to annotate ---------------------------------------------------------------------------


def smollm2(model_dir: str, count: int) -> Work:
    """Returns the policy's own solutions; a solution's answer is the reference, to be verified."""
    import jax

    from stepwiser_jax.inference.engine import Engine
    from stepwiser_jax.inference.params import SamplingParams
    from stepwiser_jax.records import Problem, Tokens, Trajectory
    from stepwiser_jax.tasks.mathematics import extract_answer
    from stepwiser_jax.text.chunks import BLANK_LINE, TokenMatcher, chunk_ends
    from stepwiser_jax.text.tokenizer import completion_text

    dtypes = {"dtype": "bfloat16"}
    work = Work(
        name="smollm2",
        policy={"path": model_dir} | dtypes,
        model_dir=model_dir,
        trajectories=[],
        problems={},
        rows=[8, 32, 96],
        buckets=[384, 512],
        max_new_tokens=256,
    )
    loaded = work.load()
    tokenizer = loaded.tokenizer
    matcher = TokenMatcher.build(tokenizer.token_bytes(), [BLANK_LINE])
    prompts = WORKLOAD["prompts"][:count]
    output = Engine(loaded.model, rows=[8], buckets=work.buckets).generate(
        prompts,
        SamplingParams(work.max_new_tokens, stop_ids=tokenizer.eos_ids),
        key=jax.random.key(0),
        row_ids=[f"trajectory {p}" for p in range(len(prompts))],
    )
    for p, prompt in enumerate(prompts):
        ids = output[p].tokens.tolist()
        answer = extract_answer(completion_text(tokenizer, ids)) or "0"
        work.problems[f"{p}"] = Problem(f"{p}", "", answer, "")
        work.trajectories.append(
            Trajectory(
                trajectory_id=f"{p}#0",
                problem_id=f"{p}",
                policy_id="",
                tokens=Tokens(np.array(prompt), np.array(ids), np.array(output.logprobs(p))),
                chunk_ends=chunk_ends(ids, matcher, tokenizer),
                stop_reason="",
                is_correct=True,
            )
        )
    return work


def arithmetic(quickstart: Path, count: int) -> Work:
    import yaml

    from stepwiser_jax.record_io import read_records
    from stepwiser_jax.records import Problem, Trajectory

    config = yaml.safe_load((quickstart / "values" / "config.yaml").read_text())
    policy = str(quickstart / "policy")
    return Work(
        name="arithmetic",
        policy=config["policy"] | {"path": policy},
        model_dir=f"{policy}/model",
        trajectories=read_records(quickstart / "rollouts", Trajectory)[:count],
        problems={p.problem_id: p for p in read_records(quickstart / "rollouts", Problem)},
        rows=list(config["engine"]["rows"]),
        buckets=list(config["engine"]["buckets"]),
        max_new_tokens=config["sampling"]["max_new_tokens"],
    )


# --- the sides ----------------------------------------------------------------------------------


def ours(work: Work, verifier: Any) -> Callable[[str], dict[str, Any]]:
    import jax

    from stepwiser_jax.inference.engine import Engine
    from stepwiser_jax.inference.params import Completion, Prefix, SamplingParams
    from stepwiser_jax.rl.values import estimate_prefix_values

    class RecordingEngine(Engine):
        """Keeps how long every rollout was, which the floor needs."""

        def stream(
            self, trunks: Sequence[Prefix], params: SamplingParams, **settings: Any
        ) -> Iterator[list[Completion]]:
            lengths: dict[str, int] = {}
            for completions in super().stream(trunks, params, **settings):
                lengths |= {done.row_id: len(done.tokens) for done in completions}
                yield completions
            self.trunks = [
                (trunk.num_tokens, [(f.num_tokens, lengths[f.row_id]) for f in trunk.samples])
                for trunk in trunks
            ]

    compiled, loaded = compilations(), work.load()
    engine = RecordingEngine(loaded.model, loaded.tokenizer, rows=work.rows, buckets=work.buckets)
    params = SamplingParams(work.max_new_tokens, stop_ids=loaded.tokenizer.eos_ids)

    def run(_: str) -> dict[str, Any]:
        verifying = waiting = 0.0

        def is_correct(solutions: Sequence[Any]) -> list[bool]:
            nonlocal verifying, waiting
            start = time.perf_counter()
            correct = verifier.verify([text for _, text in solutions], [p for p, _ in solutions])
            seconds = time.perf_counter() - start
            verifying += seconds
            if all(array.is_ready() for array in jax.live_arrays()):
                waiting += seconds
            return correct

        before, start = len(compiled), time.perf_counter()
        values = estimate_prefix_values(
            engine,
            loaded.tokenizer,
            work.trajectories,
            work.problems,
            is_correct,
            num_rollouts=work.num_rollouts,
            params=params,
            key=jax.random.key(0),
        )
        wall = time.perf_counter() - start
        return {
            "tokens": sum(tokens for _, forks in engine.trunks for _, tokens in forks),
            "trunks": engine.trunks,
            "verifying": verifying / wall,
            "waiting": waiting / wall,
            "mean_value": sum(value.value for value in values) / len(values),
            "compilations": len(compiled) - before,
        }

    return run


def static_batch(work: Work, verifier: Any) -> Callable[[str], dict[str, Any]]:
    import jax

    from stepwiser_jax.inference.chunk_sampler import ChunkSampler
    from stepwiser_jax.inference.engine import Engine
    from stepwiser_jax.inference.params import SamplingParams
    from stepwiser_jax.rl.values import prefixes_to_sample

    compiled, loaded = compilations(), work.load()
    params = SamplingParams(work.max_new_tokens, stop_ids=loaded.tokenizer.eos_ids)
    everything = [
        (prefix, f"{prefix.sampling_id}/r{m}")
        for prefix in prefixes_to_sample(work.trajectories)
        for m in range(work.num_rollouts)
    ]
    rows = work.rows[-1]
    batches = [everything[start : start + rows] for start in range(0, len(everything), rows)]
    prefixes = [list(dict.fromkeys(prefix for prefix, _ in batch)) for batch in batches]
    # As many rows as there are, of prefixes too: nothing is computed for padding.
    counts = sorted({len(some) for some in (*batches, *prefixes)})
    buckets = sorted({t.tokens.num_prompt for t in work.trajectories} | set(work.buckets))
    engine = Engine(loaded.model, loaded.tokenizer, rows=counts, buckets=buckets)
    sampler = ChunkSampler(engine)

    def run(_: str) -> dict[str, Any]:
        before, tokens = len(compiled), 0
        for batch, distinct in zip(batches, prefixes, strict=True):
            prompts = [
                [*p.trajectory.prompt_ids, *p.trajectory.completion_ids][: p.num_tokens]
                for p in distinct
            ]
            state = sampler.prefill(prompts, sampler.shapes.max_length)
            state = sampler.branch(state, [distinct.index(prefix) for prefix, _ in batch])
            output, _ = sampler.decode(
                state,
                params,
                key=jax.random.key(0),
                row_ids=[row_id for _, row_id in batch],
                limits_B=[p.trajectory.tokens.num_prompt + work.max_new_tokens for p, _ in batch],
            )
            solutions = [
                (p.trajectory, [*p.trajectory.completion_ids[: p.num_completion_tokens], *c.tokens])
                for (p, _), c in zip(batch, output, strict=True)
            ]
            work.verify(loaded.tokenizer, verifier, solutions)
            tokens += sum(len(completion.tokens) for completion in output)
        return {"tokens": tokens, "compilations": len(compiled) - before}

    return run


def transformers_generate(work: Work, verifier: Any) -> Callable[[str], dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    from stepwiser_jax.rl.values import prefixes_to_sample
    from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of

    torch.set_num_threads(1)
    dtype = getattr(torch, work.policy.get("dtype", "float32"))
    model = AutoModelForCausalLM.from_pretrained(work.model_dir, dtype=dtype).eval()
    tokenizer = load_tokenizer_of(work.policy["path"])
    ends = torch.tensor(tokenizer.eos_ids)

    def run(_: str) -> dict[str, Any]:
        tokens = 0
        for prefix in prefixes_to_sample(work.trajectories):
            trajectory, done = prefix.trajectory, prefix.num_completion_tokens
            ids = torch.tensor([[*trajectory.prompt_ids, *trajectory.completion_ids[:done]]])
            with torch.no_grad():
                output = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=work.max_new_tokens - done,
                    num_return_sequences=work.num_rollouts,
                    pad_token_id=tokenizer.pad_id,
                    eos_token_id=list(tokenizer.eos_ids),
                )[:, ids.shape[1] :]
            ended = torch.isin(output, ends)
            before_end = (ended.cumsum(1) - ended.int()) == 0
            tokens += int(before_end.sum())
            completions = [row[kept].tolist() for row, kept in zip(output, before_end, strict=True)]
            solutions = [
                (trajectory, [*trajectory.completion_ids[:done], *completion])
                for completion in completions
            ]
            work.verify(tokenizer, verifier, solutions)
        return {"tokens": tokens}

    return run


SIDES = {"ours": ours, "static batch": static_batch, "transformers": transformers_generate}


def serve_side(side: str, work: Work) -> None:
    from stepwiser_jax.runs.directory import worker_count
    from stepwiser_jax.tasks.verifier import Verifier

    with Verifier(workers=worker_count()) as verifier:
        serve(SIDES[side](work, verifier), warm_up=side != "transformers")


# --- the parent ---------------------------------------------------------------------------------


def print_work(work: Work, run: dict[str, Any]) -> None:
    forks = [fork for _, some in run["trunks"] for fork in some]
    chunks = [len(t.chunk_ends) for t in work.trajectories]
    print(
        f"\n{work.name}: {len(chunks)} trajectories of {min(chunks)} to {max(chunks)} chunks (mean "
        f"{sum(chunks) / len(chunks):.1f}), M = {work.num_rollouts}: {len(forks)} rollouts of "
        f"{run['tokens'] / len(forks):.0f} tokens on average; {work.rows[-1]} rows at a time\n"
        f"verifying answers: {run['verifying']:.2%} of the wall time; waiting for it: at most "
        f"{run['waiting']:.2%}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    policy = parser.add_mutually_exclusive_group(required=True)
    policy.add_argument("--model")
    policy.add_argument("--quickstart", type=finished_quickstart)
    parser.add_argument("--trajectories", type=int, help="2, or 64 of a quickstart")
    parser.add_argument("--rollouts", type=int, default=16, help="M")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--output")
    parser.add_argument("--serve", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_side(args.serve, pickle.loads(args.work.read_bytes()))
        return
    os.sched_setaffinity(0, {args.core})
    limits = ceilings()
    work = (
        smollm2(args.model, args.trajectories or 2)
        if args.model
        else arithmetic(args.quickstart, args.trajectories or 64)
    )
    work = dataclasses.replace(work, num_rollouts=args.rollouts)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "work"
        file.write_bytes(pickle.dumps(work))
        of = ["--model", args.model] if args.model else ["--quickstart", str(args.quickstart)]
        sides = {
            name: Side(
                name,
                [sys.executable, __file__, *of, "--serve", name, "--work", str(file)],
                args.core,
            )
            for name in args.sides
        }
        runs = take_turns(sides, work.name, args.repeats)
    first = runs["ours"][0]
    floor = sampling_floor(read_sizes(work.model_dir), first["trunks"], work.rows[-1], **limits)
    print_work(work, first)
    print_header(*SUMMARY_COLUMNS)
    rows = summaries(work.name, runs, first["tokens"], floor)
    for row in rows:
        print_summary(row)
    print(f"\ncompilations after warm-up: {sum(r['compilations_after_warm_up'] for r in rows)}")
    for side in sides.values():
        side.close()
    shares = {name: [run[name] for run in runs["ours"]] for name in ("verifying", "waiting")}
    chunks = [len(t.chunk_ends) for t in work.trajectories]
    write_json(
        args.output,
        {"limits": limits, "rollouts": work.num_rollouts, "chunks": chunks, "rows": rows} | shares,
    )


if __name__ == "__main__":
    main()

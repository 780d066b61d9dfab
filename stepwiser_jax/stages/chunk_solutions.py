"""Cut solutions into chunks of thought (StepWiser 3.1): what a policy learns to mark by itself.

    right solution -> K proposals of a teacher -> those that are the solution again, in the format
                   -> the cut that most of them agree on: what `sft` teaches the policy

Where the paper is silent: it keeps the proposals that reconstruct their solution, and does not say
what it does with several. Here a solution is one example, cut as most of them cut it.

Reads `rollouts` and the teacher. Writes chunked solutions, also those
without a proposal that was kept.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stepwiser_jax.config import ChunkSolutions
from stepwiser_jax.data.problems import check_tokenizer
from stepwiser_jax.distributed.hosts import NO_SHARD, Shard
from stepwiser_jax.distributed.loading import load_for_decoding, load_tokenizer_of
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams, StopReason
from stepwiser_jax.inference.remote import RemoteEngine
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import ChunkedSolution, Problem, Trajectory
from stepwiser_jax.runs.directory import RunDirectory, blocks, per_item
from stepwiser_jax.text.chunking import (
    Outcome,
    majority_chunking,
    read_chunks,
    split_solution,
)
from stepwiser_jax.text.chunks import strip_tags
from stepwiser_jax.text.prompts import chunking_prompt, encode_message
from stepwiser_jax.text.tokenizer import Tokenizer, completion_text, load_tokenizer

Solutions = Sequence[tuple[Trajectory, str]]
"""Trajectories with their text."""

Proposals = list[list[tuple[Outcome, tuple[str, ...]]]]
"""Of each solution, what became of each proposal, and its chunks."""


def run(config: ChunkSolutions, run_dir: str | Path, shard: Shard = NO_SHARD) -> dict[str, Any]:
    """Cut block after block; a restarted run repeats the block it was killed in."""
    directory = RunDirectory(run_dir, "chunk-solutions", config, shard)
    if directory.finished:
        return directory.summary()
    directory.begin()
    tokenizer = load_tokenizer_of(config.tokenizer)
    problems = {problem.problem_id: problem for problem in read_records(config.rollouts, Problem)}
    trajectories = read_records(config.rollouts, Trajectory)
    check_tokenizer(tokenizer, list(problems.values()), trajectories)
    right = right_trajectories(trajectories, config.max_per_problem)
    if not right:
        raise UserError(
            f"none of the {len(trajectories)} solutions of {config.rollouts} is right: there is "
            "nothing to learn to cut. Sample more, or with a stronger policy"
        )
    solutions = [
        (t, strip_tags(completion_text(tokenizer, t.completion_ids)).strip()) for t in right
    ]
    work = blocks(solutions, config.solutions_per_block)
    work = directory.pending(
        work, ChunkedSolution, lambda block: [t.trajectory_id for t, _ in block]
    )
    measured = cut_blocks(config, directory, problems, work) if work else {}
    writer = directory.writer(ChunkedSolution)
    counts = {"solutions": len(trajectories), "right": len(right)}
    texts = {trajectory.trajectory_id: text for trajectory, text in solutions}
    return directory.finish(lambda: counts | summarize(writer.read(), texts, tokenizer) | measured)


def right_trajectories(trajectories: Sequence[Trajectory], most: int) -> list[Trajectory]:
    """The first `most` right ones of every problem."""
    of_problem: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        if trajectory.is_correct:
            of_problem[trajectory.problem_id].append(trajectory)
    return [trajectory for found in of_problem.values() for trajectory in found[:most]]


def cut_blocks(
    config: ChunkSolutions,
    directory: RunDirectory,
    problems: dict[str, Problem],
    work: Sequence[Solutions],
) -> dict[str, Any]:
    """Segmentations of these blocks, written; returns what was measured."""
    propose, measured = make_proposer(config)

    def cut(block: Solutions) -> list[ChunkedSolution]:
        return [
            choose(problems[trajectory.problem_id], trajectory.trajectory_id, proposals)
            for (trajectory, _), proposals in zip(block, propose(block), strict=True)
        ]

    seconds, solutions = directory.write_blocks(work, ChunkedSolution, cut)
    return {"seconds_per_solution": per_item(seconds, solutions)} | measured


def make_proposer(
    config: ChunkSolutions,
) -> tuple[Callable[[Solutions], Proposals], dict[str, Any]]:
    """What cuts the solutions of a block, and a summary that it fills."""
    splitter = config.splitter
    if splitter is not None:
        return lambda block: [
            [(Outcome.KEPT, split_solution(text, splitter))] for _, text in block
        ], {}
    assert config.sampling is not None
    if config.server is not None:
        server = config.server
        tokenizer = load_tokenizer(server.tokenizer, server.chat_template_args)
        settings = server.model_dump(exclude={"tokenizer", "chat_template_args", "context"})
        engine = RemoteEngine(**settings, vocab_size=tokenizer.vocab_size)
        return Teacher(config, tokenizer, engine, server.context), {}
    assert config.teacher is not None and config.engine is not None
    mesh = make_mesh(**config.mesh.model_dump(), devices=jax.local_devices())
    loaded = load_for_decoding(
        **config.teacher.model_dump(), weights=config.engine.weights, mesh=mesh, seed=config.seed
    )
    engine = Engine(loaded.model, loaded.tokenizer, mesh=mesh, **config.engine.model_dump())
    teacher = Teacher(config, loaded.tokenizer, engine, engine.shapes.max_length)
    return teacher, {"compiled": engine.compiled_shapes}


class Teacher:
    """Solutions of one block -> `num_segmentations` proposals of each. What does not fit the
    teacher's context, with room to write it again, is not asked for."""

    def __init__(
        self,
        config: ChunkSolutions,
        tokenizer: Tokenizer,
        engine: Engine | RemoteEngine,
        context: int,
    ):
        assert config.sampling is not None
        self.config, self.tokenizer, self.engine, self.context = config, tokenizer, engine, context
        self.params = SamplingParams(**config.sampling.model_dump(), stop_ids=tokenizer.eos_ids)
        self.key = jax.random.key(config.seed)

    def __call__(self, block: Solutions) -> Proposals:
        size = self.config.num_segmentations
        proposals: Proposals = [[(Outcome.NO_ROOM, ())] * size for _ in block]
        prompts = [self.prompt_ids(text) for _, text in block]
        fitting = [i for i, prompt in enumerate(prompts) if self.fits(prompt)]
        if not fitting:
            return proposals
        output = self.engine.generate(
            [prompts[i] for i in fitting],
            self.params,
            key=self.key,
            row_ids=[
                f"segment/{block[i][0].trajectory_id}/{k}" for i in fitting for k in range(size)
            ],
            group_size=size,
        )
        for row, i in enumerate(fitting):
            for k in range(size):
                b = row * size + k
                if output.stop_reason_B[b] == StopReason.LENGTH:
                    proposals[i][k] = (Outcome.UNFINISHED, ())
                else:
                    text = completion_text(self.tokenizer, output.ids(b))
                    proposals[i][k] = read_chunks(text, block[i][1])
        return proposals

    def prompt_ids(self, solution: str) -> list[int]:
        style = self.config.prompt_style
        return encode_message(self.tokenizer, chunking_prompt(solution, style), style)

    def fits(self, prompt: Sequence[int]) -> bool:
        return len(prompt) + self.params.max_new_tokens <= self.context


def choose(
    problem: Problem, trajectory_id: str, proposals: Sequence[tuple[Outcome, tuple[str, ...]]]
) -> ChunkedSolution:
    """The cut that most of the kept proposals agree on."""
    kept = [chunks for outcome, chunks in proposals if outcome is Outcome.KEPT]
    chunks, votes = majority_chunking(kept) if kept else ((), 0)
    outcomes = tuple(outcome.value for outcome, _ in proposals)
    return ChunkedSolution(
        trajectory_id, problem.problem_id, problem.question, chunks, votes, outcomes
    )


def summarize(
    chunked: Sequence[ChunkedSolution], solutions: dict[str, str], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Proposals by what became of them, and the paper's table 4 for the solutions that were cut:
    chunks and tokens, beside what blank lines would have made of them."""
    outcomes: Counter[str] = Counter({outcome.value: 0 for outcome in Outcome})
    for solution in chunked:
        outcomes.update(solution.outcomes)
    cut = [s for s in chunked if s.chunks]
    texts = [solutions[s.trajectory_id] for s in cut]
    tokens = [len(tokenizer.encode(chunk)) for s in cut for chunk in s.chunks]
    return {
        "cut": len(cut),
        "proposals": dict(outcomes),
        "agreement": mean([s.votes / s.outcomes.count(Outcome.KEPT.value) for s in cut]),
        "mean_chunks": mean([len(s.chunks) for s in cut]),
        "mean_blank_line_chunks": mean([len(split_solution(t, "blank_lines")) for t in texts]),
        "mean_tokens_per_chunk": mean(tokens),
        "mean_tokens": mean([len(tokenizer.encode(text)) for text in texts]),
    }


def mean(values: Sequence[float]) -> float:
    """0 of nothing."""
    return float(np.mean(values)) if values else 0.0

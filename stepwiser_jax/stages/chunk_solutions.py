"""Cuts solutions into chunks of thought (StepWiser 3.1), which the policy then learns to mark.

    right solution -> K proposals of a teacher -> those that repeat the solution, in the format
                   -> the cut that most of them agree on: what `sft` teaches the policy

The paper keeps the proposals that reconstruct their solution and does not say what it does with
several. Here a solution is one example, cut as most of its proposals cut it.

Reads `rollouts` and the teacher. Writes every solution with its chunks, none if no proposal was
kept.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stepwiser_jax.config import ChunkSolutions, TeacherModel, TeacherRule, TeacherServer
from stepwiser_jax.data.problems import check_tokenizer
from stepwiser_jax.distributed.hosts import NO_SHARD, Shard
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams, StopReason
from stepwiser_jax.inference.remote import RemoteEngine
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import ChunkedSolution, Problem, Trajectory
from stepwiser_jax.runs.blocks import Session, Work, run_blocks
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.text.chunking import (
    ProposalOutcome,
    majority_chunking,
    read_chunks,
    split_solution,
)
from stepwiser_jax.text.chunks import strip_tags
from stepwiser_jax.text.prompts import PromptStyle, chunking_prompt, encode_message
from stepwiser_jax.text.tokenizer import Tokenizer, completion_text, load_tokenizer

Solutions = Sequence[tuple[Trajectory, str]]
"""Trajectories, each with its text."""

Texts = Sequence[tuple[str, str]]
"""Ids of solutions, each with the solution's text."""

Proposals = list[list[tuple[ProposalOutcome, tuple[str, ...]]]]
"""For each solution: what became of each proposal, and its chunks."""


def run(config: ChunkSolutions, run_dir: str | Path, shard: Shard = NO_SHARD) -> dict[str, Any]:
    """Cuts the right solutions of a rollout run, block after block."""

    def prepare() -> Work[tuple[Trajectory, str], ChunkedSolution]:
        tokenizer = load_tokenizer_of(config.tokenizer)
        problems = {p.problem_id: p for p in read_records(config.rollouts, Problem)}
        trajectories = read_records(config.rollouts, Trajectory)
        check_tokenizer(tokenizer, list(problems.values()), trajectories)
        right = right_trajectories(trajectories, config.max_per_problem)
        if not right:
            raise UserError(
                f"none of the {len(trajectories)} solutions of {config.rollouts} is right: there "
                "is nothing to learn to cut. Sample more, or with a stronger policy"
            )
        solutions = [
            (t, strip_tags(completion_text(tokenizer, t.completion_ids)).strip()) for t in right
        ]
        texts = {trajectory.trajectory_id: text for trajectory, text in solutions}
        counts = {"solutions": len(trajectories), "right": len(right)}
        return Work(
            items=solutions,
            record_type=ChunkedSolution,
            ids_of=lambda block: [trajectory.trajectory_id for trajectory, _ in block],
            begin=lambda session: begin(config, session, problems),
            summarize=lambda found: counts | summarize(found, texts, tokenizer),
            unit="solution",
        )

    return run_blocks("chunk-solutions", config, run_dir, shard, prepare)


def begin(
    config: ChunkSolutions, session: Session, problems: dict[str, Problem]
) -> Callable[[Solutions], list[ChunkedSolution]]:
    """Returns the function that cuts the solutions of a block."""
    propose = make_proposer(config, session)

    def cut(block: Solutions) -> list[ChunkedSolution]:
        return [
            choose(problems[trajectory.problem_id], trajectory.trajectory_id, proposals)
            for (trajectory, _), proposals in zip(block, propose(texts_of(block)), strict=True)
        ]

    return cut


def texts_of(solutions: Solutions) -> Texts:
    return [(trajectory.trajectory_id, text) for trajectory, text in solutions]


def right_trajectories(trajectories: Sequence[Trajectory], most: int) -> list[Trajectory]:
    """Returns the first `most` right trajectories of every problem."""
    of_problem: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        if trajectory.is_correct:
            of_problem[trajectory.problem_id].append(trajectory)
    return [trajectory for found in of_problem.values() for trajectory in found[:most]]


def make_proposer(config: ChunkSolutions, session: Session) -> Callable[[Texts], Proposals]:
    """Returns the function that proposes cuts for the solutions of a block."""
    teacher = config.teacher
    if isinstance(teacher, TeacherRule):
        return lambda block: [
            [(ProposalOutcome.KEPT, split_solution(text, teacher.splitter))] for _, text in block
        ]
    if isinstance(teacher, TeacherServer):
        tokenizer = load_tokenizer(teacher.tokenizer, **teacher.asked)
        engine = RemoteEngine(url=teacher.url, model=teacher.model, vocab_size=tokenizer.vocab_size)
        return Proposer(config, teacher, tokenizer, engine, teacher.context)
    loaded, engine = session.load(teacher, teacher.engine, "teacher")
    return Proposer(config, teacher, loaded.tokenizer, engine, engine.shapes.max_length)


class Proposer:
    """Asks a teacher for `num_segmentations` proposals of each solution of a block. It is not asked
    about a solution that does not fit its context, with room to write it again."""

    def __init__(
        self,
        config: ChunkSolutions,
        teacher: TeacherModel | TeacherServer,
        tokenizer: Tokenizer,
        engine: Engine | RemoteEngine,
        context: int,
    ):
        self.num_segmentations = config.num_segmentations
        self.prompt_style: PromptStyle = teacher.prompt_style
        self.tokenizer, self.engine, self.context = tokenizer, engine, context
        self.params = SamplingParams(**teacher.sampling.model_dump(), stop_ids=tokenizer.eos_ids)
        self.key = jax.random.key(config.seed)

    def __call__(self, block: Texts) -> Proposals:
        size = self.num_segmentations
        proposals: Proposals = [[(ProposalOutcome.NO_ROOM, ())] * size for _ in block]
        prompts = [self.prompt_ids(text) for _, text in block]
        fitting = [i for i, prompt in enumerate(prompts) if self.fits(prompt)]
        if not fitting:
            return proposals
        completions = self.engine.generate(
            [prompts[i] for i in fitting],
            self.params,
            key=self.key,
            row_ids=[f"segment/{block[i][0]}/{k}" for i in fitting for k in range(size)],
            group_size=size,
        )
        for row, i in enumerate(fitting):
            for k in range(size):
                completion = completions[row * size + k]
                if completion.stop_reason is StopReason.LENGTH:
                    proposals[i][k] = (ProposalOutcome.UNFINISHED, ())
                else:
                    text = completion_text(self.tokenizer, completion.tokens.tolist())
                    proposals[i][k] = read_chunks(text, block[i][1])
        return proposals

    def prompt_ids(self, solution: str) -> list[int]:
        """Returns the prompt that asks for a cut."""
        style = self.prompt_style
        text = chunking_prompt(solution, style, self.tokenizer.prompts)
        return encode_message(self.tokenizer, text, style)

    def fits(self, prompt: Sequence[int]) -> bool:
        """Returns whether the context holds the prompt and an answer."""
        return len(prompt) + self.params.max_new_tokens <= self.context


def most_agreed(
    proposals: Sequence[tuple[ProposalOutcome, tuple[str, ...]]],
) -> tuple[tuple[str, ...], int]:
    """Returns the most frequent of the kept cuts, and how many proposals agree on it; no chunks and
    0 if none was kept."""
    kept = [chunks for outcome, chunks in proposals if outcome is ProposalOutcome.KEPT]
    return majority_chunking(kept) if kept else ((), 0)


def choose(
    problem: Problem,
    trajectory_id: str,
    proposals: Sequence[tuple[ProposalOutcome, tuple[str, ...]]],
) -> ChunkedSolution:
    """Returns the cut that most of the kept proposals agree on."""
    chunks, votes = most_agreed(proposals)
    outcomes = tuple(outcome.value for outcome, _ in proposals)
    return ChunkedSolution(
        trajectory_id, problem.problem_id, problem.question, chunks, votes, outcomes
    )


def summarize(
    chunked: Sequence[ChunkedSolution], solutions: dict[str, str], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Returns how many proposals were kept, and the paper's table 4 for the solutions that were
    cut: their chunks and tokens, and how many chunks blank lines would make of them."""
    outcomes: Counter[str] = Counter({outcome.value: 0 for outcome in ProposalOutcome})
    for solution in chunked:
        outcomes.update(solution.outcomes)
    cut = [s for s in chunked if s.chunks]
    texts = [solutions[s.trajectory_id] for s in cut]
    tokens = [len(tokenizer.encode(chunk)) for s in cut for chunk in s.chunks]
    return {
        "cut": len(cut),
        "proposals": dict(outcomes),
        "agreement": mean([s.votes / s.outcomes.count(ProposalOutcome.KEPT.value) for s in cut]),
        "mean_chunks": mean([len(s.chunks) for s in cut]),
        "mean_blank_line_chunks": mean([len(split_solution(t, "blank_lines")) for t in texts]),
        "mean_tokens_per_chunk": mean(tokens),
        "mean_tokens": mean([len(tokenizer.encode(text)) for text in texts]),
    }


def mean(values: Sequence[float]) -> float:
    """Returns the mean, 0 if there are no values."""
    return float(np.mean(values)) if values else 0.0

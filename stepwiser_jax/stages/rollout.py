"""Samples chunked solutions of every problem and checks their final answers (StepWiser 3.1, 4.1).

    Problem -> prompt ids -> group_size completions -> chunk ends on token ids -> is_correct

Problems are left out, and counted, if they occur twice, if their reference answer cannot be
verified (4.1), if they are in an evaluation set (`problems.exclude`), or if they are too long for
the context. Reads `problems` and `policy`. Writes problems and trajectories.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stepwiser_jax.config import Rollout
from stepwiser_jax.data.problems import keep_verifiable, read_problems
from stepwiser_jax.distributed.hosts import NO_SHARD, Shard
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.statistics import accuracy, right_by_problem
from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.records import Problem, Tokens, Trajectory
from stepwiser_jax.runs.blocks import Session, Work, run_blocks
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.text.chunks import (
    CHUNK_CLOSE,
    TokenMatcher,
    check_tags,
    chunk_ends,
    end_patterns,
)
from stepwiser_jax.text.prompts import encode_solve_prompt
from stepwiser_jax.text.tokenizer import Tokenizer, completion_text

_log = logging.getLogger(__name__)


def run(config: Rollout, run_dir: str | Path, shard: Shard = NO_SHARD) -> dict[str, Any]:
    """Samples solutions of every problem, block after block."""

    def prepare() -> Work[Problem, Trajectory]:
        problems, dropped = load_problems(config)

        def write_problems(directory: RunDirectory) -> None:
            writer = directory.writer(Problem)
            if directory.worker == 0:
                writer.append(problems)

        counts = {"problems": len(problems), "dropped": dict(dropped)}
        return Work(
            items=problems,
            record_type=Trajectory,
            ids_of=lambda block: trajectory_ids(config, block),
            begin=lambda session: BlockSampler(config, session),
            summarize=lambda trajectories: summarize(config, trajectories) | counts,
            unit="trajectory",
            complete=write_problems,
        )

    return run_blocks("rollout", config, run_dir, shard, prepare)


def load_problems(config: Rollout) -> tuple[list[Problem], Counter[str]]:
    """Returns the problems to solve, and counts of those that were left out by the reason."""
    dropped = Counter(duplicate=0, unverifiable=0)
    problems = drop_duplicates(read_problems(config.problems, dropped, config.verifier), dropped)
    problems = keep_verifiable(problems, config.verifier, dropped)
    return keep_fitting(config, problems, dropped), dropped


def trajectory_ids(config: Rollout, block: Sequence[Problem]) -> list[str]:
    """Returns the ids of a block's trajectories, those of a problem one after another."""
    return [f"{problem.problem_id}#{g}" for problem in block for g in range(config.group_size)]


def drop_duplicates(problems: Sequence[Problem], dropped: Counter[str]) -> list[Problem]:
    """Returns the first problem of every question (paper 4.1). The others are counted in
    `dropped`."""
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(" ".join(problem.question.split()), problem)
    dropped["duplicate"] += len(problems) - len(first)
    return list(first.values())


def keep_fitting(
    config: Rollout, problems: Sequence[Problem], dropped: Counter[str]
) -> list[Problem]:
    """Returns the problems whose prompt and completion fit the largest of `engine.buckets`. The
    others are counted in `dropped` and logged: a large data set has some. Raises UserError if none
    is left."""
    tokenizer = load_tokenizer_of(config.policy.path, **config.policy.asked)
    room = max(config.engine.buckets) - config.sampling.max_new_tokens
    lengths = [len(prompt_ids(config, tokenizer, problem)) for problem in problems]
    kept = [p for p, length in zip(problems, lengths, strict=True) if length <= room]
    if len(kept) < len(problems):
        longest = problems[lengths.index(max(lengths))]
        too_long = (
            f"{len(problems) - len(kept)} of {len(problems)} problems are too long, such as "
            f"{longest.problem_id}: prompt of {max(lengths)} tokens + max_new_tokens "
            f"{config.sampling.max_new_tokens} exceeds the context of {max(config.engine.buckets)} "
            "(the largest of engine.buckets)"
        )
        if not kept:
            raise UserError(f"{too_long}: raise it, or lower max_new_tokens")
        _log.warning("left out: %s", too_long)
    dropped["too_long"] += len(problems) - len(kept)
    return kept


def prompt_ids(config: Rollout, tokenizer: Tokenizer, problem: Problem) -> list[int]:
    """Returns the prompt that asks for a solution, in chunks if the config says so."""
    tags = CHUNK_CLOSE in end_patterns(config.chunking)
    return encode_solve_prompt(tokenizer, problem.question, config.prompt_style, tags=tags)


class BlockSampler:
    """Makes the trajectories of a block, in one compiled shape per length bucket."""

    def __init__(self, config: Rollout, session: Session):
        self.config, self.verifier = config, session.verifier(config.verifier)
        self.loaded, self.engine = session.load(config.policy, config.engine)
        tokenizer = self.loaded.tokenizer
        patterns = end_patterns(config.chunking)
        if CHUNK_CLOSE in patterns:
            check_tags(tokenizer)
        self.matcher = TokenMatcher.build(tokenizer.token_bytes(), patterns)
        self.params = SamplingParams(**config.sampling.model_dump(), stop_ids=tokenizer.eos_ids)
        self.key = jax.random.key(config.seed)

    def __call__(self, block: Sequence[Problem]) -> list[Trajectory]:
        ids_B = trajectory_ids(self.config, block)
        tokenizer = self.loaded.tokenizer
        prompts_P = [prompt_ids(self.config, tokenizer, problem) for problem in block]
        completions = self.engine.generate(
            prompts_P,
            self.params,
            key=self.key,
            row_ids=[f"rollout/{trajectory_id}" for trajectory_id in ids_B],
            group_size=self.config.group_size,
        )
        group_size = self.config.group_size
        completions_B = [completion.tokens.tolist() for completion in completions]
        correct_B = self.verifier.verify(
            [completion_text(tokenizer, ids) for ids in completions_B],
            [block[b // group_size] for b in range(len(ids_B))],
        )
        return [
            Trajectory(
                trajectory_id=ids_B[b],
                problem_id=block[b // group_size].problem_id,
                policy_id=self.loaded.model_id,
                tokens=Tokens(
                    np.array(prompts_P[b // group_size]),
                    completions[b].tokens,
                    completions[b].logprobs,
                ),
                chunk_ends=chunk_ends(completions_B[b], self.matcher, tokenizer),
                stop_reason=completions[b].stop_reason.name.lower(),
                is_correct=correct_B[b],
            )
            for b in range(len(ids_B))
        ]


def summarize(config: Rollout, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Returns counts, and shares between 0 and 1; the accuracy's interval is over problems."""
    count = len(trajectories)
    return {
        "trajectories": count,
        **accuracy(right_by_problem(trajectories), seed=config.seed),
        "mean_chunks": sum(len(t.chunk_ends) for t in trajectories) / count,
        "mean_tokens": sum(t.tokens.num_completion for t in trajectories) / count,
        "stopped_by_length": sum(t.is_cut for t in trajectories) / count,
    }

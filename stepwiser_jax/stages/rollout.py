"""Sample chunked solutions of every problem and check their final answers (StepWiser 3.1, 4.1).

    Problem -> prompt ids -> group_size completions -> chunk ends on token ids -> is_correct

Leaves out, and counts, problems that occur twice, problems whose reference answer cannot be
verified (4.1), those of evaluation sets (`problems.exclude`), and those too long for the context.
Reads `problems` and `policy`. Writes problems and trajectories.
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
from stepwiser_jax.distributed.loading import Loaded, load_for_decoding, load_tokenizer_of
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.statistics import accuracy, right_by_problem
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams, StopReason
from stepwiser_jax.records import Problem, Tokens, Trajectory
from stepwiser_jax.runs.directory import RunDirectory, blocks, per_item, worker_count
from stepwiser_jax.tasks.verifier import Verifier
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
    """Sample block after block; a restarted run repeats the block it was killed in."""
    directory = RunDirectory(run_dir, "rollout", config, shard)
    if directory.finished:
        return directory.summary()
    directory.begin()
    dropped = Counter(duplicate=0, unverifiable=0)
    problems = drop_duplicates(read_problems(config.problems, dropped, config.verifier), dropped)
    problems = keep_verifiable(problems, config, dropped)
    problems = keep_fitting(config, problems, dropped)
    work = blocks(problems, config.problems_per_block)
    work = directory.pending(work, Trajectory, lambda block: trajectory_ids(config, block))
    measured = sample_blocks(config, directory, work) if work else {}
    problem_writer, writer = directory.writer(Problem), directory.writer(Trajectory)
    if directory.worker == 0:
        problem_writer.append(problems)
    counts = {"problems": len(problems), "dropped": dict(dropped)}
    return directory.finish(lambda: summarize(config, writer.read()) | counts | measured)


def sample_blocks(
    config: Rollout,
    directory: RunDirectory,
    work: Sequence[Sequence[Problem]],
) -> dict[str, Any]:
    """Trajectories of these blocks, written; returns what was measured."""
    mesh = make_mesh(**config.mesh.model_dump(), devices=jax.local_devices())
    loaded = load_for_decoding(
        **config.policy.model_dump(), weights=config.engine.weights, mesh=mesh, seed=config.seed
    )
    if CHUNK_CLOSE in end_patterns(config.chunking):
        check_tags(loaded.tokenizer)
    sample = BlockSampler(config, loaded, mesh)
    with Verifier(
        config.verifier, workers=worker_count(), timeout_seconds=config.answer_timeout_seconds
    ) as verifier:
        seconds, sampled = directory.write_blocks(
            work, Trajectory, lambda block: sample(block, verifier)
        )
    return {
        "seconds_per_trajectory": per_item(seconds, sampled),
        "verifier_timeouts": verifier.timeouts,
        "verifier_failures": verifier.failures,
        "compiled": sample.engine.compiled_shapes,
    }


def trajectory_ids(config: Rollout, block: Sequence[Problem]) -> list[str]:
    return [f"{problem.problem_id}#{g}" for problem in block for g in range(config.group_size)]


def drop_duplicates(problems: Sequence[Problem], dropped: Counter[str]) -> list[Problem]:
    """Paper 4.1: the first problem of every question. The others are counted in `dropped`."""
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(" ".join(problem.question.split()), problem)
    dropped["duplicate"] += len(problems) - len(first)
    return list(first.values())


def keep_fitting(
    config: Rollout, problems: Sequence[Problem], dropped: Counter[str]
) -> list[Problem]:
    """Returns the problems whose prompt and completion fit the largest of `engine.buckets`. The
    others are counted in `dropped` and told of: a large data set has some. Raises UserError if none
    is left."""
    tokenizer = load_tokenizer_of(config.policy.path, config.policy.chat_template_args)
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
    """Problems of one block -> their trajectories, in one compiled shape per length bucket."""

    def __init__(self, config: Rollout, loaded: Loaded, mesh: jax.sharding.Mesh):
        self.config, self.loaded = config, loaded
        self.engine = Engine(
            loaded.model, loaded.tokenizer, mesh=mesh, **config.engine.model_dump()
        )
        self.matcher = TokenMatcher.build(
            loaded.tokenizer.token_bytes(), end_patterns(config.chunking)
        )
        self.params = SamplingParams(
            **config.sampling.model_dump(), stop_ids=loaded.tokenizer.eos_ids
        )
        self.key = jax.random.key(config.seed)

    def __call__(self, block: Sequence[Problem], verifier: Verifier) -> list[Trajectory]:
        ids_B = trajectory_ids(self.config, block)
        tokenizer = self.loaded.tokenizer
        prompts_P = [prompt_ids(self.config, tokenizer, problem) for problem in block]
        output = self.engine.generate(
            prompts_P,
            self.params,
            key=self.key,
            row_ids=[f"rollout/{trajectory_id}" for trajectory_id in ids_B],
            group_size=self.config.group_size,
        )
        group_size = self.config.group_size
        completions_B = [output.ids(b) for b in range(len(ids_B))]
        correct_B = verifier.verify(
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
                    np.array(completions_B[b]),
                    np.array(output.logprobs(b)),
                ),
                chunk_ends=chunk_ends(completions_B[b], self.matcher, tokenizer),
                stop_reason=StopReason(output.stop_reason_B[b]).name.lower(),
                is_correct=correct_B[b],
            )
            for b in range(len(ids_B))
        ]


def summarize(config: Rollout, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Counts, and shares as fractions between 0 and 1; the accuracy's interval is over problems."""
    count = len(trajectories)
    return {
        "trajectories": count,
        **accuracy(right_by_problem(trajectories), seed=config.seed),
        "mean_chunks": sum(len(t.chunk_ends) for t in trajectories) / count,
        "mean_tokens": sum(t.tokens.num_completion for t in trajectories) / count,
        "stopped_by_length": sum(t.is_cut for t in trajectories) / count,
    }

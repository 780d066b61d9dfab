"""Chunk-reset search (StepWiser 4.3) beside the ways to spend tokens without a judge.

    policy writes one chunk -> judge -> Positive: keep it and go on
                                     -> Negative: rewind to where it began and write it anew

Where the paper is silent:

1. After `max_attempts` rejections the last attempt is kept (and counted as a forced chunk).
2. The judge answers greedily; a judgment that cannot be parsed accepts the chunk: it is no reason
   to spend more tokens.
3. Token cost counts what is generated: accepted and rejected policy tokens, and judge tokens.

Baselines on the same problems: greedy decoding; plain sampling, averaged over as many samples as
the largest majority vote needs; majority vote over the first k of those samples (the answer given
most often, the earliest of equals; a sample without an answer has no vote).

Reads `problems`, `policy` and `judge`. Writes search results.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stepwiser_jax.algo.statistics import bootstrap_interval
from stepwiser_jax.config import Search
from stepwiser_jax.records import Problem, SearchResult, Verdict
from stepwiser_jax.runtime import compilation
from stepwiser_jax.runtime.engine import Engine
from stepwiser_jax.runtime.hosts import WHOLE, Shard
from stepwiser_jax.runtime.judging import ChunkJudge, Solution
from stepwiser_jax.runtime.loading import Loaded, load_for_decoding
from stepwiser_jax.runtime.mesh import make_mesh
from stepwiser_jax.runtime.problems import read_problems
from stepwiser_jax.runtime.run import RunDirectory, blocks, per_item, progress, stop, worker_count
from stepwiser_jax.runtime.sampling import SamplingParams, StopReason
from stepwiser_jax.text.answers import AnswerVerifier, extract_answer
from stepwiser_jax.text.chunks import CHUNK_CLOSE, check_tags, strip_tags
from stepwiser_jax.text.prompts import (
    PromptStyle,
    encode_solve_prompt,
)
from stepwiser_jax.text.tokenizer import completion_text


@dataclass
class Policy:
    """A model with its sampler, prompt style and settings."""

    loaded: Loaded
    engine: Engine
    prompt_style: PromptStyle
    params: SamplingParams
    key: jax.Array


@dataclass
class Attempt:
    """Where the search of one problem stands. `ids` are prompt and accepted chunks."""

    problem: Problem
    prompt_length: int
    ids: list[int]
    chunk_index: int = 0
    attempt: int = 0
    accepted_tokens: int = 0
    rejected_tokens: int = 0
    judge_tokens: int = 0
    forced_chunks: int = 0
    finished: bool = False

    @property
    def completion_ids(self) -> list[int]:
        return self.ids[self.prompt_length :]

    @property
    def row_id(self) -> str:
        return f"search/{self.problem.problem_id}/c{self.chunk_index}/a{self.attempt}"


def chunk_reset_search(
    policy: Policy,
    judge: ChunkJudge,
    problems: Sequence[Problem],
    *,
    max_attempts: int = 5,
    max_completion_tokens: int | None = None,
) -> list[Attempt]:
    """Solve all problems at once, chunk by chunk; at most as many as the policy has rows.

    `policy.params` samples one chunk: its `max_new_tokens` bounds a chunk, its `stop_strings` end
    it. A solution ends where the policy ends it, or when another chunk might not fit into
    `max_completion_tokens` (by default into the policy's context).

    A row of the policy's cache is one problem. A kept chunk stays in the cache; a rejected one is a
    rewind of its row. Rows of finished problems are dropped when a smaller batch holds the rest.
    """
    tokenizer = policy.loaded.tokenizer
    attempts = []
    for problem in problems:
        ids = encode_solve_prompt(tokenizer, problem.question, policy.prompt_style)
        attempts.append(Attempt(problem, len(ids), ids))
    longest = max(attempt.prompt_length for attempt in attempts)
    room = policy.engine.shapes.max_length - longest
    budget = (max_completion_tokens or room) - policy.params.max_new_tokens
    active = list(attempts)
    slots = longest + budget + policy.params.max_new_tokens
    state = policy.engine.prefill([attempt.ids for attempt in active], slots)
    while active:
        output, state = policy.engine.decode(
            state, policy.params, key=policy.key, row_ids=[a.row_id for a in active]
        )
        chunks = [output.ids(b) for b in range(len(active))]
        accepted = judge_chunks(policy, judge, active, chunks)
        for b, attempt in enumerate(active):
            keep_or_reset(attempt, chunks[b], accepted[b], max_attempts)
            if attempt.attempt == 0:
                ended = output.stop_reason_B[b] == StopReason.STOP_ID
                attempt.finished = ended or len(attempt.completion_ids) > budget
        rows = np.array([b for b, attempt in enumerate(active) if not attempt.finished], int)
        active = [active[b] for b in rows]
        if active:
            state = policy.engine.fork(state, rows, np.array([len(a.ids) for a in active]))
    return attempts


def judge_chunks(
    policy: Policy, judge: ChunkJudge, active: Sequence[Attempt], chunks: Sequence[list[int]]
) -> list[bool]:
    """One greedy judgment of every new chunk. An end token with no text needs none."""
    tokenizer = policy.loaded.tokenizer
    texts = [completion_text(tokenizer, chunk) for chunk in chunks]
    rows = [b for b, text in enumerate(texts) if strip_tags(text).strip()]
    accepted = [True] * len(active)
    solutions = [
        Solution(
            active[b].row_id,
            active[b].problem.question,
            (completion_text(tokenizer, active[b].completion_ids), texts[b]),
            start=1,
            separator="",
        )
        for b in rows
    ]
    for b, (opinion,) in zip(rows, judge(solutions) if rows else [], strict=True):
        active[b].judge_tokens += opinion.num_tokens
        accepted[b] = opinion.verdict is not Verdict.NEGATIVE
    return accepted


def keep_or_reset(attempt: Attempt, chunk: list[int], accepted: bool, max_attempts: int) -> None:
    """Keep the chunk, or throw it away; the last attempt is kept whatever the judge says."""
    if not accepted and attempt.attempt < max_attempts - 1:
        attempt.rejected_tokens += len(chunk)
        attempt.attempt += 1
        return
    attempt.forced_chunks += not accepted
    attempt.accepted_tokens += len(chunk)
    attempt.ids = attempt.ids + chunk
    attempt.attempt = 0
    attempt.chunk_index += 1


# --- the stage ----------------------------------------------------------------------------------


def run(config: Search, run_dir: str | Path, shard: Shard = WHOLE) -> dict[str, Any]:
    """Search block after block; a restarted run repeats the block it was killed in."""
    directory = RunDirectory(run_dir, "search", config, shard)
    if directory.finished:
        return directory.summary()
    compilation.start(config.compilation_cache)
    dropped: Counter[str] = Counter()
    problems = read_problems(config.problems, dropped)
    work = blocks(problems, config.problems_per_block)
    work = directory.pending(work, SearchResult, lambda block: search_ids(config, block))
    measured = search_blocks(config, directory, problems, work) if work else {}
    writer = directory.writer(SearchResult)
    counts = {"problems": len(problems), "dropped": dict(dropped)}
    return directory.finish(lambda: summarize(config, writer.read()) | counts | measured)


def search_blocks(
    config: Search,
    directory: RunDirectory,
    problems: Sequence[Problem],
    work: Sequence[Sequence[Problem]],
) -> dict[str, Any]:
    """Results for these blocks, written; returns what was measured. Checks all problems first:
    every worker must refuse what one would."""
    policy, judge = load_solvers(config)
    check_lengths(config, policy, judge, problems)
    writer = directory.writer(SearchResult)
    start, found = time.perf_counter(), 0
    with (
        AnswerVerifier(worker_count(), config.answer_timeout_seconds) as verifier,
        progress("search", len(work)) as advance,
    ):
        for block in work:
            results = search_block(config, policy, judge, block, verifier)
            writer.append(results)
            found += len(results)
            advance(1)
            stop.check()
    return {
        "seconds_per_solution": per_item(time.perf_counter() - start, found),
        "verifier_timeouts": verifier.timeouts,
        "verifier_failures": verifier.failures,
        "compiled": {
            "policy": policy.engine.compiled_shapes,
            "judge": judge.engine.compiled_shapes,
        },
    }


def check_lengths(
    config: Search, policy: Policy, judge: ChunkJudge, problems: Sequence[Problem]
) -> None:
    """Raises UserError where a solution does not fit the policy's context, or a judgment of its
    last chunk, whose prompt holds all of it, not the judge's."""
    room = config.sampling.max_new_tokens
    for problem in problems:
        ids = encode_solve_prompt(policy.loaded.tokenizer, problem.question, policy.prompt_style)
        policy.engine.check_length(len(ids), room, problem.problem_id)
        empty = judge.prompt_ids(Solution(problem.problem_id, problem.question, [""]), 0)
        name = f"the judge of {problem.problem_id}, with a solution of {room} tokens"
        judge.engine.check_length(len(empty), room + judge.max_new_tokens, name)


def load_solvers(config: Search) -> tuple[Policy, ChunkJudge]:
    """The policy, writing one chunk at a time, and the greedy judge."""
    mesh = make_mesh(**config.mesh.model_dump(), devices=jax.local_devices())
    key = jax.random.key(config.seed)
    policy = load_for_decoding(
        **config.policy.model_dump(),
        weights=config.policy_engine.weights,
        mesh=mesh,
        seed=config.seed,
    )
    check_tags(policy.tokenizer)
    judge = load_for_decoding(
        **config.judge.model_dump(),
        weights=config.judge_engine.weights,
        mesh=mesh,
        seed=config.seed,
    )
    chunk_sampling = config.sampling.model_copy(update={"max_new_tokens": config.max_chunk_tokens})
    chunk_params = SamplingParams(
        **chunk_sampling.model_dump(),
        stop_ids=policy.tokenizer.eos_ids,
        stop_strings=(CHUNK_CLOSE,),
    )
    return (
        Policy(
            policy,
            Engine(policy.model, policy.tokenizer, mesh=mesh, **config.policy_engine.model_dump()),
            config.prompt_style,
            chunk_params,
            key,
        ),
        ChunkJudge(
            judge,
            Engine(judge.model, judge.tokenizer, mesh=mesh, **config.judge_engine.model_dump()),
            name="judge",
            prompt_style=config.judge_prompt_style,
            max_new_tokens=config.judge_max_new_tokens,
            key=key,
        ),
    )


def sample_names(config: Search) -> list[str]:
    return [f"sample{k}" for k in range(max(config.majority, default=1))]


def search_ids(config: Search, block: Sequence[Problem]) -> list[str]:
    names = ["greedy", "chunk_reset", *sample_names(config)]
    return [f"{problem.problem_id}/{name}" for problem in block for name in names]


def search_block(
    config: Search,
    policy: Policy,
    judge: ChunkJudge,
    block: Sequence[Problem],
    verifier: AnswerVerifier,
) -> list[SearchResult]:
    """Every method on every problem of the block."""
    attempts = chunk_reset_search(
        policy,
        judge,
        block,
        max_attempts=config.max_attempts,
        max_completion_tokens=config.sampling.max_new_tokens,
    )
    solutions = [(attempt, "chunk_reset") for attempt in attempts]
    solutions += whole_solutions(config, policy, block, 0.0, ["greedy"])
    solutions += whole_solutions(
        config, policy, block, config.sampling.temperature, sample_names(config)
    )
    texts = [
        completion_text(policy.loaded.tokenizer, attempt.completion_ids) for attempt, _ in solutions
    ]
    answers = [extract_answer(text) for text in texts]
    references = [attempt.problem.answer for attempt, _ in solutions]
    correct = verifier.verify(list(zip(answers, references, strict=True)))
    return [
        SearchResult(
            search_id=f"{attempt.problem.problem_id}/{method}",
            problem_id=attempt.problem.problem_id,
            method=method,
            answer=answers[i] or "",
            is_correct=correct[i],
            completion=texts[i],
            accepted_tokens=attempt.accepted_tokens,
            rejected_tokens=attempt.rejected_tokens,
            judge_tokens=attempt.judge_tokens,
            forced_chunks=attempt.forced_chunks,
        )
        for i, (attempt, method) in enumerate(solutions)
    ]


def whole_solutions(
    config: Search,
    policy: Policy,
    block: Sequence[Problem],
    temperature: float,
    names: Sequence[str],
) -> list[tuple[Attempt, str]]:
    """Solutions written in one go, one per problem and name."""
    prompts = [
        encode_solve_prompt(policy.loaded.tokenizer, problem.question, policy.prompt_style)
        for problem in block
    ]
    sampling = config.sampling.model_copy(update={"temperature": temperature})
    params = SamplingParams(**sampling.model_dump(), stop_ids=policy.loaded.tokenizer.eos_ids)
    output = policy.engine.generate(
        prompts,
        params,
        key=policy.key,
        row_ids=[f"search/{problem.problem_id}/{name}" for problem in block for name in names],
        group_size=len(names),
    )
    solutions = []
    for p, problem in enumerate(block):
        for g, name in enumerate(names):
            ids = output.ids(p * len(names) + g)
            attempt = Attempt(problem, len(prompts[p]), prompts[p] + ids, accepted_tokens=len(ids))
            solutions.append((attempt, name))
    return solutions


def summarize(config: Search, results: Sequence[SearchResult]) -> dict[str, Any]:
    """Per method: accuracy with its 95% interval, and mean tokens per problem."""
    of_problem: dict[str, dict[str, SearchResult]] = defaultdict(dict)
    for result in results:
        of_problem[result.problem_id][result.method] = result
    groups = list(of_problem.values())
    names = sample_names(config)
    plain = [[group[name] for name in names] for group in groups]
    reset = [group["chunk_reset"] for group in groups]
    summary: dict[str, Any] = {
        "greedy": method_row(config, [[group["greedy"]] for group in groups]),
        "plain": method_row(config, plain),
        "chunk_reset": method_row(config, [[result] for result in reset]),
        "majority": {
            str(k): majority_row(config, [samples[:k] for samples in plain])
            for k in config.majority
        },
    }
    for name in ("accepted_tokens", "rejected_tokens", "forced_chunks"):
        value = float(np.mean([getattr(result, name) for result in reset]))
        summary["chunk_reset"][name] = value
    return summary


def method_row(config: Search, results: Sequence[Sequence[SearchResult]]) -> dict[str, Any]:
    """`results`: per problem, the samples that accuracy and cost are averaged over."""
    flat = [result for samples in results for result in samples]
    right = [float(np.mean([result.is_correct for result in samples])) for samples in results]
    return {
        "accuracy": float(np.mean(right)),
        "accuracy_interval": list(bootstrap_interval(right, np.mean, seed=config.seed)),
        "policy_tokens": float(np.mean([result.policy_tokens for result in flat])),
        "judge_tokens": float(np.mean([result.judge_tokens for result in flat])),
    }


def majority_row(config: Search, results: Sequence[Sequence[SearchResult]]) -> dict[str, Any]:
    """The most frequent answer of a problem's samples (the earliest of equals) is its answer."""
    right, tokens = [], []
    for samples in results:
        votes = Counter(sample.answer for sample in samples if sample.answer)
        voted = votes.most_common(1)[0][0] if votes else ""
        right.append(float(next(s.is_correct for s in samples if s.answer == voted)))
        tokens.append(sum(sample.policy_tokens for sample in samples))
    return {
        "accuracy": float(np.mean(right)),
        "accuracy_interval": list(bootstrap_interval(right, np.mean, seed=config.seed)),
        "policy_tokens": float(np.mean(tokens)),
        "judge_tokens": 0.0,
    }

"""Searches chunk by chunk: the policy extends its beams, the judge scores them, a method decides.

    beams of all problems -> one more chunk each -> judge -> method: which beams go on -> ...

A kept chunk stays in the policy's cache, and a rejected one is left out of the beam
(`Beam.without_last_chunk`) and then cut off its row (`ChunkSampler.rewind`). A branch is a copy of
a row. Rows of finished problems are dropped when a smaller batch holds the rest.

A `token_budget` bounds what policy and judge write about a problem. The step that spends it is the
last one to be judged, and the solutions found by then are the result. If there are none, the best
beam alone is written to its end (chunk-reset's beam keeps its chunk, accepted or not). So there
always is a solution. The budget is exceeded by at most one step and the rest of one solution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter

import jax

from stepwiser_jax.config import EngineShapes, FirstAttempt
from stepwiser_jax.distributed.loading import Loaded, load_for_decoding
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.inference.chunk_sampler import ChunkSampler
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import Completion, SamplingParams, StopReason
from stepwiser_jax.judges.base import ChunkJudgment, Solution
from stepwiser_jax.model.flops import NOTHING
from stepwiser_jax.records import Problem
from stepwiser_jax.runs.directory import blocks
from stepwiser_jax.search.methods import Method
from stepwiser_jax.search.state import Beam, Chunk, Hypothesis, SearchState
from stepwiser_jax.text.chunks import CHUNK_CLOSE, CHUNK_OPEN, TokenMatcher, strip_tags
from stepwiser_jax.text.prompts import PromptStyle, encode_solve_prompt
from stepwiser_jax.text.tokenizer import completion_text

JudgeChunks = Callable[[Sequence[Solution]], Sequence[Sequence[ChunkJudgment]]]
"""Returns, per solution, one judgment of each chunk from `start` on: a `Judge`, or a function."""


@dataclass
class Policy:
    """A policy. Its `engine` writes whole solutions, its `chunk_sampler` chunk by chunk.
    `params.max_new_tokens` bounds a chunk, and `params.stop_strings` end it. The prompt asks for
    tags if these strings have the closing one."""

    loaded: Loaded
    engine: Engine
    chunk_sampler: ChunkSampler
    prompt_style: PromptStyle
    params: SamplingParams
    key: jax.Array

    @classmethod
    def load(
        cls,
        path: str,
        params: SamplingParams,
        engine: EngineShapes,
        *,
        prompt_style: PromptStyle = "instruct",
        seed: int = 0,
    ) -> Policy:
        """Returns the policy of a run, a Hugging Face directory or a hub id, on the first device.

        Args:
            path: See `distributed.loading`.
            params: How a chunk is sampled; its end tokens are those of the tokenizer.
            engine: Shapes of the engine.
            prompt_style: How the policy is asked.
            seed: Decides what is sampled.

        Raises:
            UserError: There is no model at `path`.
        """
        mesh = make_mesh(devices=jax.devices()[:1])
        loaded = load_for_decoding(path, weights=engine.weights, mesh=mesh, seed=seed)
        writer = Engine(loaded.model, loaded.tokenizer, mesh=mesh, **engine.model_dump())
        params = replace(params, stop_ids=loaded.tokenizer.eos_ids)
        key = jax.random.key(seed)
        return cls(loaded, writer, ChunkSampler(writer), prompt_style, params, key)

    def prompt_ids(self, problem: Problem) -> list[int]:
        return encode_solve_prompt(
            self.loaded.tokenizer,
            problem.question,
            self.prompt_style,
            tags=CHUNK_CLOSE in self.params.stop_strings,
        )

    @cached_property
    def chunk_matcher(self) -> TokenMatcher:
        """The matcher that finds the ends of chunks."""
        return TokenMatcher.build(self.loaded.tokenizer.token_bytes(), self.params.stop_strings)


def search_chunks(
    policy: Policy,
    judge: JudgeChunks,
    problems: Sequence[Problem],
    method: Method,
    *,
    num_beams: int = 1,
    aggregate: str = "last",
    max_new_tokens: int,
    token_budget: int | None = None,
    first_attempt: FirstAttempt = "sampled",
) -> list[SearchState]:
    """Searches for solutions of as many problems at once as the policy has rows for.

    Args:
        policy: Writes chunks.
        judge: Scores every new chunk.
        problems: The problems.
        method: Decides which beams go on.
        num_beams: Beams of a problem.
        aggregate: How a solution is scored, a key of `voting.AGGREGATES`.
        max_new_tokens: Bounds a whole solution, which ends when another chunk might not fit.
        token_budget: Bounds the tokens that policy and judge write for a problem.
        first_attempt: Whether attempt 0 of a chunk is sampled as `policy.params` say, or greedy.

    Returns:
        The final state of every problem.
    """
    at_once = max(1, policy.chunk_sampler.shapes.max_rows // num_beams)
    states: list[SearchState] = []
    for part in blocks(problems, at_once):
        together = [
            SearchState(
                problem,
                policy.prompt_ids(problem),
                [Beam(Hypothesis(aggregate), k, source=p) for k in range(num_beams)],
                token_budget,
            )
            for p, problem in enumerate(part)
        ]
        _search(policy, judge, together, method, num_beams, max_new_tokens, first_attempt)
        states += together
    return states


def _search(
    policy: Policy,
    judge: JudgeChunks,
    states: Sequence[SearchState],
    method: Method,
    num_beams: int,
    max_new_tokens: int,
    first_attempt: FirstAttempt,
) -> None:
    """Steps until no problem has beams."""
    longest = max(len(state.prompt_ids) for state in states)
    sampler_state = policy.chunk_sampler.prefill(
        [s.prompt_ids for s in states], longest + max_new_tokens
    )
    for state in states:
        state.policy += policy.engine.spent_on(read=len(state.prompt_ids))
    while rows := [(state, beam) for state in states for beam in state.beams]:
        sampler_state = policy.chunk_sampler.branch(
            sampler_state, [beam.source for _, beam in rows]
        )
        # A rejected chunk is no part of its hypothesis: its row is rewound to where it began.
        lengths_B = [len(state.prompt_ids) + len(beam.hypothesis.ids) for state, beam in rows]
        sampler_state = policy.chunk_sampler.rewind(sampler_state, lengths_B)
        row_ids = [state.row_id(beam) for state, beam in rows]
        completions, sampler_state = policy.chunk_sampler.decode(
            sampler_state,
            policy.params,
            key=policy.key,
            row_ids=row_ids,
            greedy_B=[beam.attempt == 0 for _, beam in rows] if first_attempt == "greedy" else None,
        )
        for b, (state, beam) in enumerate(rows):
            written = append_chunk(policy, beam.hypothesis, completions[b], max_new_tokens)
            rows[b] = (state, Beam(written, beam.attempt, source=b))
        judge_last_chunks(policy, judge, rows, row_ids)
        for state, of_state in groupby(rows, key=itemgetter(0)):
            beams = [beam for _, beam in of_state]
            if num_beams == 1:
                state.attempts += beams
            state.beams = next_beams(state, beams, method)


def append_chunk(
    policy: Policy, hypothesis: Hypothesis, completion: Completion, max_new_tokens: int
) -> Hypothesis:
    """Returns the hypothesis with one more chunk. It is finished if the policy ended it, or if
    another chunk might exceed `max_new_tokens`."""
    ids, ended = completion.tokens.tolist(), completion.stop_reason is StopReason.STOP_ID
    written = hypothesis.ids + ids
    has_text = bool(strip_tags(completion_text(policy.loaded.tokenizer, ids)).strip())
    is_tail = bool(hypothesis.nonempty_chunks) and has_tail(policy, written)
    is_full = len(written) + policy.params.max_new_tokens > max_new_tokens
    chunks = (*hypothesis.chunks, Chunk(ids, has_text, is_tail, spent=completion.spent))
    return replace(hypothesis, chunks=chunks, is_finished=ended or is_full)


def has_tail(policy: Policy, ids: Sequence[int]) -> bool:
    """Returns whether a solution with tags ends with text that is in no chunk."""
    tokenizer, ends = policy.loaded.tokenizer, policy.chunk_matcher.ends(ids)
    return (
        len(ends) > 0
        and ends[-1] < len(ids)
        and CHUNK_CLOSE in completion_text(tokenizer, ids)
        and CHUNK_OPEN not in completion_text(tokenizer, ids[ends[-1] :])
    )


def judge_last_chunks(
    policy: Policy,
    judge: JudgeChunks,
    rows: Sequence[tuple[SearchState, Beam]],
    row_ids: Sequence[str],
) -> None:
    """Judges every new chunk, while the budget of its problem lasts."""
    chunks: list[Chunk] = []
    solutions: list[Solution] = []
    for (state, beam), row_id in zip(rows, row_ids, strict=True):
        chunk = beam.hypothesis.chunks[-1]
        if not chunk.joins_another and not state.is_budget_spent:
            texts = beam.hypothesis.texts(policy.loaded.tokenizer)
            history = beam.hypothesis.chunks[:-1]
            chunks.append(chunk)
            solutions.append(
                Solution(
                    row_id,
                    state.problem.question,
                    texts,
                    start=len(texts) - 1,
                    separator="",
                    is_begun=history in state.judged_histories,
                )
            )
            state.judged_histories.add(history)
    judgments = judge(solutions) if solutions else []
    for chunk, (judgment,) in zip(chunks, judgments, strict=True):
        chunk.judgment = judgment


def next_beams(state: SearchState, beams: list[Beam], method: Method) -> list[Beam]:
    """Counts what the step cost, then decides which beams go on."""
    for beam in beams:
        chunk = beam.hypothesis.chunks[-1]
        state.policy += chunk.spent
        state.judge += chunk.judgment.spent if chunk.judgment else NOTHING
    return state.finish_best(beams) if state.is_budget_spent else method(state, beams)

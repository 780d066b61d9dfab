"""Chooses one of several responses to a problem by what a judge says of their chunks."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from stepwiser_jax.errors import UserError
from stepwiser_jax.judges.base import ChunkJudgment, Solution, spent_on
from stepwiser_jax.records import Problem, Selection, Trajectory
from stepwiser_jax.text.chunks import chunk_texts
from stepwiser_jax.text.tokenizer import Tokenizer, completion_text


@dataclass(frozen=True)
class Candidates:
    """A problem with the responses to choose from."""

    problem: Problem
    responses: Sequence[Trajectory]

    def solutions(self, tokenizer: Tokenizer) -> list[Solution]:
        return [
            Solution(
                response.trajectory_id,
                self.problem.question,
                chunk_texts(tokenizer, response.completion_ids, response.chunk_ends),
                separator="",
                is_begun=response is not self.responses[0],
            )
            for response in self.responses
        ]


def find_candidates(
    problems: Sequence[Problem], responses: Sequence[Trajectory], source: str, *, only_correct: bool
) -> list[Candidates]:
    """Returns the problems that have a response to choose. Raises UserError, naming the source, if
    none has."""
    of_problem: dict[str, list[Trajectory]] = defaultdict(list)
    for response in responses:
        if response.is_correct or not only_correct:
            of_problem[response.problem_id].append(response)
    if not of_problem:
        raise UserError(
            f"none of the {len(responses)} responses of {source} is right: there is nothing to "
            "select. Sample more, or with a stronger policy, or set only_correct to false"
        )
    return [
        Candidates(problem, of_problem[problem.problem_id])
        for problem in problems
        if problem.problem_id in of_problem
    ]


def select(
    candidates: Candidates,
    judgments: Sequence[Sequence[ChunkJudgment]],
    tokenizer: Tokenizer,
    *,
    tagged: bool,
    seed: int,
) -> Selection:
    """Returns the selection of the response whose chunks have the highest mean score.

    Args:
        candidates: The problem and its responses.
        judgments: The judgments of each response's chunks; empty without a judge.
        tokenizer: The policy's.
        tagged: Whether the responses mark their chunks.
        seed: Seeds the draw that chooses among equals.
    """
    responses = candidates.responses
    scores = [fmean(judgment.p_positive for judgment in of_one) for of_one in judgments]
    chosen = choose(responses, scores, seed)
    spent = spent_on([judgment for of_one in judgments for judgment in of_one])
    return Selection(
        trajectory_id=chosen.trajectory_id,
        problem_id=candidates.problem.problem_id,
        question=candidates.problem.question,
        completion=completion_text(tokenizer, chosen.completion_ids),
        tagged=tagged,
        is_correct=chosen.is_correct,
        candidates=tuple(response.trajectory_id for response in responses),
        scores=tuple(scores),
        judge_tokens=spent.generated,
        judge_read_tokens=spent.read,
        judge_flops=spent.flops,
    )


def choose(responses: Sequence[Trajectory], scores: Sequence[float], seed: int) -> Trajectory:
    """Returns the response with the highest score. A draw that does not depend on the judge chooses
    among equals, or among all if there are no scores."""

    def draw(response: Trajectory) -> str:
        return hashlib.sha256(f"{seed}/{response.trajectory_id}".encode()).hexdigest()

    scores = scores or [0.0] * len(responses)
    equals = [r for r, score in zip(responses, scores, strict=True) if score == max(scores)]
    return min(equals, key=draw)

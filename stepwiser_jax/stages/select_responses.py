"""Choose responses for fine-tuning by what a judge thinks of their chunks (StepWiser 4.3).

    N responses to a problem -> the right ones -> mean score of each one's chunks -> the best -> sft

Where the paper is silent: a chunk's score is the judge's (1 for Positive and 0 for Negative, or the
share of its votes, or a classifier's P(+)). Of equals, which a judge without votes has many of, a
draw chooses one, the same whatever the judge. Without a judge all are equal: that is the paper's
baseline, selection by the outcome alone, or at random with `only_correct: false`.

Reads `rollouts` and, if given, `judge`. Writes selections, one of every problem
that has a response to choose.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from stepwiser_jax.config import SelectResponses, read_run_settings
from stepwiser_jax.data.problems import check_tokenizer
from stepwiser_jax.distributed.hosts import WHOLE, Shard
from stepwiser_jax.distributed.loading import load_tokenizer_of
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.statistics import accuracy
from stepwiser_jax.judges.base import ChunkJudgment, Solution
from stepwiser_jax.judges.load import load_judge
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import Problem, Selection, Trajectory, natural_key
from stepwiser_jax.runs.blocks import Session, Work, run_blocks
from stepwiser_jax.text.chunks import CHUNK_CLOSE, chunk_texts, end_patterns
from stepwiser_jax.text.tokenizer import Tokenizer, completion_text


@dataclass(frozen=True)
class Candidates:
    """A problem with its responses to choose from."""

    problem: Problem
    responses: Sequence[Trajectory]

    def solutions(self, tokenizer: Tokenizer) -> list[Solution]:
        return [
            Solution(
                response.trajectory_id,
                self.problem.question,
                chunk_texts(tokenizer, response.completion_ids, response.chunk_ends),
                separator="",
            )
            for response in self.responses
        ]


def run(config: SelectResponses, run_dir: str | Path, shard: Shard = WHOLE) -> dict[str, Any]:
    """Selects a response to every problem, block after block."""

    def prepare() -> Work[Candidates, Selection]:
        tokenizer = load_tokenizer_of(config.tokenizer)
        problems = read_records(config.rollouts, Problem)
        responses = read_records(config.rollouts, Trajectory)
        check_tokenizer(tokenizer, problems, responses)
        candidates = find_candidates(config, problems, responses)
        counts = {"problems": len(problems), "responses": len(responses)}
        return Work(
            items=candidates,
            record_type=Selection,
            ids_of=lambda block: [each.problem.problem_id for each in block],
            begin=lambda session: begin(config, session, tokenizer, candidates),
            summarize=lambda selections: counts | summarize(config, selections),
            unit="problem",
        )

    return run_blocks("select-responses", config, run_dir, shard, prepare)


def find_candidates(
    config: SelectResponses, problems: Sequence[Problem], responses: Sequence[Trajectory]
) -> list[Candidates]:
    """Of every problem that has any. Raises UserError where none has."""
    of_problem: dict[str, list[Trajectory]] = defaultdict(list)
    for response in responses:
        if response.is_correct or not config.only_correct:
            of_problem[response.problem_id].append(response)
    if not of_problem:
        raise UserError(
            f"none of the {len(responses)} responses of {config.rollouts} is right: there is "
            "nothing to select. Sample more, or with a stronger policy, or set only_correct to "
            "false"
        )
    return [
        Candidates(problem, of_problem[problem.problem_id])
        for problem in problems
        if problem.problem_id in of_problem
    ]


def begin(
    config: SelectResponses,
    session: Session,
    tokenizer: Tokenizer,
    candidates: Sequence[Candidates],
) -> Callable[[Sequence[Candidates]], list[Selection]]:
    """Returns the function that selects the responses of a block. Raises UserError for a response
    that is too long."""
    judge = None
    if config.judge is not None:
        judge = load_judge(config.judge, mesh=session.mesh, seed=config.seed)
        judge.check_lengths([s for each in candidates for s in each.solutions(tokenizer)])
        session.compiled["judge"] = judge.compiled_shapes
    chunking = read_run_settings(config.rollouts).get("chunking", "tags")

    def selections_of(block: Sequence[Candidates]) -> list[Selection]:
        solutions = [solution for each in block for solution in each.solutions(tokenizer)]
        opinions = iter(judge(solutions) if judge else [])
        return [
            select(
                each,
                list(islice(opinions, len(each.responses))),
                tokenizer,
                tagged=CHUNK_CLOSE in end_patterns(chunking),
                seed=config.seed,
            )
            for each in block
        ]

    return selections_of


def select(
    candidates: Candidates,
    opinions: Sequence[Sequence[ChunkJudgment]],
    tokenizer: Tokenizer,
    *,
    tagged: bool,
    seed: int,
) -> Selection:
    """By the opinions of every response's chunks, or without any."""
    responses = candidates.responses
    scores = [fmean(opinion.p_positive for opinion in of_one) for of_one in opinions]
    chosen = choose(responses, scores, seed)
    return Selection(
        trajectory_id=chosen.trajectory_id,
        problem_id=candidates.problem.problem_id,
        question=candidates.problem.question,
        completion=completion_text(tokenizer, chosen.completion_ids),
        tagged=tagged,
        is_correct=chosen.is_correct,
        candidates=tuple(response.trajectory_id for response in responses),
        scores=tuple(scores),
        judge_tokens=sum(opinion.num_tokens for of_one in opinions for opinion in of_one),
    )


def choose(responses: Sequence[Trajectory], scores: Sequence[float], seed: int) -> Trajectory:
    """The one with the highest score, of equals (without scores: of all) by a draw."""

    def draw(response: Trajectory) -> str:
        return hashlib.sha256(f"{seed}/{response.trajectory_id}".encode()).hexdigest()

    scores = scores or [0.0] * len(responses)
    equals = [r for r, score in zip(responses, scores, strict=True) if score == max(scores)]
    return min(equals, key=draw)


def summarize(config: SelectResponses, selections: Sequence[Selection]) -> dict[str, Any]:
    """Shares and scores between 0 and 1; without a judge there are no scores."""
    selections = sorted(selections, key=lambda selection: natural_key(selection.record_id))
    candidates = sum(len(selection.candidates) for selection in selections)
    summary: dict[str, Any] = {
        "selected": len(selections),
        "candidates": candidates,
        **accuracy([float(s.is_correct) for s in selections], seed=config.seed),
    }
    scores = [score for selection in selections for score in selection.scores]
    if scores:
        selected = sum(selection.score for selection in selections)
        summary |= {
            "mean_score_selected": selected / len(selections),
            "mean_score": sum(scores) / len(scores),
            "judge_tokens": sum(selection.judge_tokens for selection in selections),
        }
    return summary

"""Choose responses for fine-tuning by what a judge thinks of their chunks (StepWiser 4.3).

    N responses to a problem -> the right ones -> mean score of each one's chunks -> the best -> sft

Where the paper is silent: a chunk's score is the judge's (1 for Positive and 0 for Negative, or the
share of its votes, or a classifier's P(+)). Of equals, which a judge without votes has many of, a
draw chooses one, the same whatever the judge. Without a judge all are equal: that is the paper's
baseline, selection by the outcome alone, or at random with `only_correct: false`.

Reads `rollouts` and, if given, `judge` or `classifier`. Writes selections, one of every problem
that has a response to choose.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import jax

from stepwiser_jax.config import SelectResponses, read_run_settings
from stepwiser_jax.data.problems import check_tokenizer
from stepwiser_jax.distributed.hosts import NO_SHARD, Shard
from stepwiser_jax.distributed.loading import load_tokenizer_of
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.statistics import accuracy
from stepwiser_jax.judges.load import load_judge
from stepwiser_jax.judges.stepwiser import ChunkJudgment, Solution
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import Problem, Selection, Trajectory, natural_key
from stepwiser_jax.runs.directory import RunDirectory, blocks, per_item
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


def run(config: SelectResponses, run_dir: str | Path, shard: Shard = NO_SHARD) -> dict[str, Any]:
    """Select block after block; a restarted run repeats the block it was killed in."""
    directory = RunDirectory(run_dir, "select-responses", config, shard)
    if directory.finished:
        return directory.summary()
    directory.begin()
    tokenizer = load_tokenizer_of(config.tokenizer)
    problems = read_records(config.rollouts, Problem)
    responses = read_records(config.rollouts, Trajectory)
    check_tokenizer(tokenizer, problems, responses)
    candidates = find_candidates(config, problems, responses)
    work = blocks(candidates, config.problems_per_block)
    work = directory.pending(work, Selection, lambda block: [c.problem.problem_id for c in block])
    measured = select_blocks(config, directory, tokenizer, candidates, work) if work else {}
    writer = directory.writer(Selection)
    counts = {"problems": len(problems), "responses": len(responses)}
    return directory.finish(lambda: counts | summarize(config, writer.read()) | measured)


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


def select_blocks(
    config: SelectResponses,
    directory: RunDirectory,
    tokenizer: Tokenizer,
    candidates: Sequence[Candidates],
    work: Sequence[Sequence[Candidates]],
) -> dict[str, Any]:
    """Selections of these blocks, written; returns what was measured. Checks all responses first:
    every worker must refuse what one would."""
    settings = config.judge or config.classifier
    judge = None
    if settings is not None:
        mesh = make_mesh(**config.mesh.model_dump(), devices=jax.local_devices())
        judge = load_judge(settings, mesh=mesh, seed=config.seed)
        judge.check_lengths([s for each in candidates for s in each.solutions(tokenizer)])
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

    seconds, _ = directory.write_blocks(work, Selection, selections_of)
    responses = sum(len(each.responses) for block in work for each in block)
    compiled = {} if judge is None else {"compiled": judge.compiled_shapes}
    return {"seconds_per_response": per_item(seconds, responses)} | compiled


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

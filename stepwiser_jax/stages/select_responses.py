"""Choose responses for fine-tuning by what a judge thinks of their chunks (StepWiser 4.3).

    N responses to a problem -> the right ones -> mean score of each one's chunks -> the best -> sft

Where the paper is silent: the score of a chunk is the probability that it is right, as the judge
gives it (P(Positive) of the verdict that it writes, the mean of its votes, or a classifier's P(+)).
A draw that does not depend on the judge chooses among equals; `tie_rate` is the share of problems
whose best score several responses have. Without a judge all are equal: that is the paper's
baseline, selection by the outcome alone, or at random with `only_correct: false`.

Reads `rollouts` and, if given, `judge`. Writes a selection for every problem that has a response to
choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from stepwiser_jax.config import SelectResponses
from stepwiser_jax.config_files import read_run_settings
from stepwiser_jax.data.problems import check_tokenizer
from stepwiser_jax.distributed.hosts import NO_SHARD, Shard
from stepwiser_jax.evaluation.statistics import accuracy
from stepwiser_jax.judges.load import load_judge
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import Problem, Selection, Trajectory, natural_key
from stepwiser_jax.runs.blocks import Session, Work, run_blocks
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.search.selection import Candidates, find_candidates, select
from stepwiser_jax.text.chunks import CHUNK_CLOSE, end_patterns
from stepwiser_jax.text.tokenizer import Tokenizer


def run(config: SelectResponses, run_dir: str | Path, shard: Shard = NO_SHARD) -> dict[str, Any]:
    """Selects a response to every problem, block after block."""

    def prepare() -> Work[Candidates, Selection]:
        tokenizer = load_tokenizer_of(config.tokenizer)
        problems = read_records(config.rollouts, Problem)
        responses = read_records(config.rollouts, Trajectory)
        check_tokenizer(tokenizer, problems, responses)
        candidates = find_candidates(
            problems, responses, config.rollouts, only_correct=config.only_correct
        )
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
        judgments = iter(judge(solutions) if judge else [])
        return [
            select(
                each,
                list(islice(judgments, len(each.responses))),
                tokenizer,
                tagged=CHUNK_CLOSE in end_patterns(chunking),
                seed=config.seed,
            )
            for each in block
        ]

    return selections_of


def summarize(config: SelectResponses, selections: Sequence[Selection]) -> dict[str, Any]:
    """Returns counts, accuracy, and with a judge the mean scores and the tie rate; fractions."""
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
            "tie_rate": sum(s.scores.count(s.score) > 1 for s in selections) / len(selections),
            "judge_tokens": sum(selection.judge_tokens for selection in selections),
        }
    return summary

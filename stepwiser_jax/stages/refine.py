"""Lets a policy think again where GenPRM's judge finds its first wrong step (arXiv 2504.00891).

`search.refinement` says how a turn goes. Leaves out, and counts, problems whose reference answer
cannot be verified. Reads `problems`, `policy` and `judge`. Writes search results
`<problem>/turn<r>`: the solution after r turns. `rejected_tokens` are those of earlier solutions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from stepwiser_jax.config import Refine
from stepwiser_jax.data.problems import read_verifiable
from stepwiser_jax.distributed.hosts import NO_SHARD, Shard
from stepwiser_jax.evaluation.statistics import accuracy
from stepwiser_jax.judges.genprm.judge import GenPrmCritic
from stepwiser_jax.judges.load import load_judge
from stepwiser_jax.judges.writer import Writer
from stepwiser_jax.records import Problem, SearchResult, natural_key
from stepwiser_jax.runs.blocks import Session, Work, run_blocks
from stepwiser_jax.search.refinement import Refiner


def run(config: Refine, run_dir: str | Path, shard: Shard = NO_SHARD) -> dict[str, Any]:
    """Refines solutions of every problem, block after block."""

    def prepare() -> Work[Problem, SearchResult]:
        problems, counts = read_verifiable(config)
        return Work(
            items=problems,
            record_type=SearchResult,
            ids_of=lambda block: result_ids(config, block),
            begin=lambda session: begin(config, session, problems),
            summarize=lambda results: counts | summarize(config, results),
            unit="solution",
        )

    return run_blocks("refine", config, run_dir, shard, prepare)


def result_ids(config: Refine, block: Sequence[Problem]) -> list[str]:
    return [f"{p.problem_id}/turn{turn}" for p in block for turn in range(config.turns + 1)]


def begin(
    config: Refine, session: Session, problems: Sequence[Problem]
) -> Callable[[Sequence[Problem]], list[SearchResult]]:
    """Returns the function that refines the solutions of a block. Raises UserError for a problem
    that is too long."""
    verifier = session.verifier(config.verifier)
    loaded, engine = session.load(config.policy, config.engine)
    judge = load_judge(config.judge, mesh=session.mesh, seed=config.seed, name="refine")
    assert isinstance(judge, GenPrmCritic)
    session.compiled["judge"] = judge.compiled_shapes
    style = config.prompt_style
    policy = Writer(loaded, engine, config.sampling, style, config.seed, name="refine")
    refine = Refiner(config, policy, judge)
    refine.check_lengths(problems)
    session.measures += [
        lambda made: {"steps_without_verdict": refine.steps_without_verdict},
        judge.measured,
    ]
    return lambda block: refine(block, verifier)


def summarize(config: Refine, results: Sequence[SearchResult]) -> dict[str, Any]:
    """Returns for every turn the accuracy with its interval, the number of problems that the policy
    thought about again, and mean tokens and FLOPs per problem so far."""
    summary: dict[str, Any] = {}
    before: dict[str, int] = {}
    for turn in range(config.turns + 1):
        of_turn = sorted(
            (result for result in results if result.method == f"turn{turn}"),
            key=lambda result: natural_key(result.problem_id),
        )
        tokens = {result.problem_id: result.policy_tokens for result in of_turn}
        summary[f"turn{turn}"] = {
            **accuracy([float(result.is_correct) for result in of_turn], seed=config.seed),
            "rethought": sum(tokens[p] > count for p, count in before.items()),
            "policy_tokens": sum(tokens.values()) / len(of_turn),
            "judge_tokens": sum(result.judge_tokens for result in of_turn) / len(of_turn),
            "policy_read_tokens": fmean(result.policy_read_tokens for result in of_turn),
            "judge_read_tokens": fmean(result.judge_read_tokens for result in of_turn),
            "flops": fmean(result.policy_flops + result.judge_flops for result in of_turn),
        }
        before = tokens
    return summary

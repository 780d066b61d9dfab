"""Compares methods: how many problems each solves, and what it costs."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from stepwiser_jax.config import Search
from stepwiser_jax.evaluation.statistics import accuracy
from stepwiser_jax.records import SearchResult, natural_key
from stepwiser_jax.search.voting import AGGREGATES, best, vote


@dataclass(frozen=True)
class Solved:
    """How right a method's answer to a problem is (0 to 1), and what it cost: tokens that policy
    and judge wrote and read, and the FLOPs of both together."""

    right: float
    policy_tokens: float
    judge_tokens: float = 0.0
    rejected_tokens: float = 0.0
    samples: int = 1
    policy_read_tokens: float = 0.0
    judge_read_tokens: float = 0.0
    flops: float = 0.0


COSTS = tuple(field.name for field in fields(Solved) if field.name != "right")


def sample_names(config: Search) -> list[str]:
    """Returns the names of a problem's samples. All votes share them."""
    return [f"sample{k}" for k in range(max((*config.majority, *config.best_of), default=1))]


def search_names(config: Search) -> list[str]:
    """Returns the names of the methods that the judge steers."""
    beams = {"beam": config.beam, "dvts": config.dvts}
    return ["chunk_reset", *(name for name, found in beams.items() if found), *config.own]


def summarize(config: Search, results: Sequence[SearchResult]) -> dict[str, Any]:
    """Returns each method's accuracy with its 95% interval, and its mean tokens and FLOPs per
    problem. `majority/4` of `solved_by_method` becomes entry 4 of `majority`."""
    summary: dict[str, Any] = {}
    for name, solved in solved_by_method(config, results).items():
        *groups, last = name.split("/")
        rows = summary
        for group in groups:
            rows = rows.setdefault(group, {})
        rows[last] = row_of(config, solved)
    for name in search_names(config):
        of_method = [result for result in results if result.method == name]
        summary[name] |= {
            "accepted_tokens": float(np.mean([result.accepted_tokens for result in of_method])),
            "forced_chunks": float(np.mean([result.forced_chunks for result in of_method])),
        }
    flops = summary["chunk_reset"]["flops"]
    summary["majority_at_equal_flops"] = majority_at(config, results, flops)
    return summary


def row_of(config: Search, solved: Sequence[Solved]) -> dict[str, Any]:
    """Returns the accuracy of a method with its interval, and its mean costs."""
    right = accuracy([problem.right for problem in solved], seed=config.seed)
    costs = {c: float(np.mean([getattr(problem, c) for problem in solved])) for c in COSTS}
    return right | costs


def majority_at(
    config: Search, results: Sequence[SearchResult], flops: float
) -> dict[str, dict[str, Any] | None]:
    """Returns the largest majority of k, for any k, that takes `at_most` these FLOPs per problem in
    the mean, and the `next` one, which takes more. `samples` is k. None stands for a majority that
    not even one sample allows, or that has more samples than were drawn."""
    samples = samples_by_problem(config, results)
    found: dict[str, dict[str, Any] | None] = {"at_most": None, "next": None}
    for k in range(1, len(sample_names(config)) + 1):
        row = row_of(config, [by_majority(None, of_one[:k]) for of_one in samples])
        if row["flops"] > flops:
            return found | {"next": row}
        found["at_most"] = row
    return found


def results_by_problem(results: Sequence[SearchResult]) -> list[dict[str, SearchResult]]:
    """Returns each problem's results by method, in the order of problem ids."""
    of_problem: dict[str, dict[str, SearchResult]] = defaultdict(dict)
    for result in results:
        of_problem[result.problem_id][result.method] = result
    return [of_problem[problem_id] for problem_id in sorted(of_problem, key=natural_key)]


def samples_by_problem(config: Search, results: Sequence[SearchResult]) -> list[list[SearchResult]]:
    names = sample_names(config)
    return [[problem[name] for name in names] for problem in results_by_problem(results)]


def solved_by_method(config: Search, results: Sequence[SearchResult]) -> dict[str, list[Solved]]:
    """Returns every problem as each method solves it, in the order of problem ids: greedy,
    chunk_reset, ..., plain, majority/K, best_of/AGGREGATE/K and weighted_majority/AGGREGATE/K."""
    problems, samples = results_by_problem(results), samples_by_problem(config, results)
    budget = config.token_budget
    found = {
        name: [_by_search(problem[name]) for problem in problems]
        for name in ("greedy", *search_names(config))
    }
    found["plain"] = [_by_average(of_one) for of_one in samples]
    for k in config.majority:
        found[f"majority/{k}"] = [by_majority(budget, of_one[:k]) for of_one in samples]
    for name, k in itertools.product(AGGREGATES, config.best_of):
        found[f"best_of/{name}/{k}"] = [by_best(budget, s[:k], name) for s in samples]
        found[f"weighted_majority/{name}/{k}"] = [by_weight(budget, s[:k], name) for s in samples]
    return found


def _by_search(result: SearchResult) -> Solved:
    return Solved(
        float(result.is_correct),
        result.policy_tokens,
        result.judge_tokens,
        result.rejected_tokens,
        policy_read_tokens=result.policy_read_tokens,
        judge_read_tokens=result.judge_read_tokens,
        flops=result.policy_flops + result.judge_flops,
    )


def _by_average(samples: Sequence[SearchResult]) -> Solved:
    return Solved(
        float(np.mean([sample.is_correct for sample in samples])),
        float(np.mean([sample.policy_tokens for sample in samples])),
        policy_read_tokens=samples[0].policy_read_tokens,
        flops=float(np.mean([sample.policy_flops for sample in samples])),
    )


def _together(right: bool, samples: Sequence[SearchResult]) -> Solved:
    """Returns what samples cost that read their problem once."""
    return Solved(
        float(right),
        sum(sample.policy_tokens for sample in samples),
        samples=len(samples),
        policy_read_tokens=samples[0].policy_read_tokens,
        flops=sum(sample.policy_flops for sample in samples)
        - sum(sample.prompt_flops for sample in samples[1:]),
    )


def _judged(solved: Solved, samples: Sequence[SearchResult]) -> Solved:
    """Returns the same with what the judge spent on the samples."""
    return replace(
        solved,
        judge_tokens=sum(sample.scoring_tokens for sample in samples),
        judge_read_tokens=sum(sample.scoring_read_tokens for sample in samples),
        flops=solved.flops + sum(sample.scoring_flops for sample in samples),
    )


def by_majority(budget: int | None, samples: Sequence[SearchResult]) -> Solved:
    """Takes the most frequent answer."""
    used = affordable(budget, samples, [sample.policy_tokens for sample in samples])
    return _by_vote(used, vote([sample.answer for sample in used]))


def by_best(budget: int | None, samples: Sequence[SearchResult], aggregate: str) -> Solved:
    """Takes the answer of the sample with the highest score."""
    used, scores = _affordable_scores(budget, samples, aggregate)
    chosen = used[best(scores)]
    solved = _judged(_together(chosen.is_correct, used), used)
    return replace(solved, rejected_tokens=solved.policy_tokens - chosen.policy_tokens)


def by_weight(budget: int | None, samples: Sequence[SearchResult], aggregate: str) -> Solved:
    """Takes the answer whose samples have the largest sum of scores."""
    used, scores = _affordable_scores(budget, samples, aggregate)
    return _judged(_by_vote(used, vote([sample.answer for sample in used], scores)), used)


def _affordable_scores(
    budget: int | None, samples: Sequence[SearchResult], aggregate: str
) -> tuple[Sequence[SearchResult], list[float]]:
    """Returns the samples that the budget pays for, judgments included, and their scores."""
    costs = [sample.policy_tokens + sample.scoring_tokens for sample in samples]
    used = affordable(budget, samples, costs)
    return used, [AGGREGATES[aggregate](sample.chunk_scores) for sample in used]


def _by_vote(samples: Sequence[SearchResult], answer: str) -> Solved:
    right = next(sample.is_correct for sample in samples if sample.answer == answer)
    return _together(right, samples)


def affordable(
    budget: int | None, samples: Sequence[SearchResult], costs: Sequence[int]
) -> Sequence[SearchResult]:
    """Returns the first samples that the budget pays for, at least one; without a budget all."""
    if budget is None:
        return samples
    return samples[: max(1, sum(spent <= budget for spent in itertools.accumulate(costs)))]

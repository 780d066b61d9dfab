"""Compares methods: how many problems each solves, and what it costs."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stepwiser_jax.config import Search
from stepwiser_jax.evaluation.statistics import accuracy
from stepwiser_jax.records import SearchResult, natural_key
from stepwiser_jax.search.voting import AGGREGATES, best, vote


@dataclass(frozen=True)
class Solved:
    """How right a method's answer to a problem is (0 to 1), and what it cost."""

    right: float
    policy_tokens: float
    judge_tokens: float = 0.0
    rejected_tokens: float = 0.0
    samples: int = 1


def sample_names(config: Search) -> list[str]:
    """Returns the names of a problem's samples. All votes share them."""
    return [f"sample{k}" for k in range(max((*config.majority, *config.best_of), default=1))]


def search_names(config: Search) -> list[str]:
    """Returns the names of the methods that the judge steers."""
    beams = {"beam": config.beam, "dvts": config.dvts}
    return ["chunk_reset", *(name for name, found in beams.items() if found), *config.own]


def summarize(config: Search, results: Sequence[SearchResult]) -> dict[str, Any]:
    """Returns each method's accuracy with its 95% interval, and its mean tokens per problem.
    `majority/4` of `solved_by_method` becomes entry 4 of `majority`."""
    summary: dict[str, Any] = {}
    for name, solved in solved_by_method(config, results).items():
        *groups, last = name.split("/")
        rows = summary
        for group in groups:
            rows = rows.setdefault(group, {})
        rows[last] = {
            **accuracy([problem.right for problem in solved], seed=config.seed),
            **{
                cost: float(np.mean([getattr(problem, cost) for problem in solved]))
                for cost in ("policy_tokens", "judge_tokens", "rejected_tokens", "samples")
            },
        }
    for name in search_names(config):
        of_method = [result for result in results if result.method == name]
        summary[name] |= {
            "accepted_tokens": float(np.mean([result.accepted_tokens for result in of_method])),
            "forced_chunks": float(np.mean([result.forced_chunks for result in of_method])),
        }
    return summary


def solved_by_method(config: Search, results: Sequence[SearchResult]) -> dict[str, list[Solved]]:
    """Returns every problem as each method solves it, in the order of problem ids: greedy,
    chunk_reset, ..., plain, majority/K, best_of/AGGREGATE/K and weighted_majority/AGGREGATE/K."""
    of_problem: dict[str, dict[str, SearchResult]] = defaultdict(dict)
    for result in results:
        of_problem[result.problem_id][result.method] = result
    problems = [of_problem[problem_id] for problem_id in sorted(of_problem, key=natural_key)]
    samples = [[problem[name] for name in sample_names(config)] for problem in problems]
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
        float(result.is_correct), result.policy_tokens, result.judge_tokens, result.rejected_tokens
    )


def _by_average(samples: Sequence[SearchResult]) -> Solved:
    right = float(np.mean([sample.is_correct for sample in samples]))
    return Solved(right, float(np.mean([sample.policy_tokens for sample in samples])))


def by_majority(budget: int | None, samples: Sequence[SearchResult]) -> Solved:
    """Takes the most frequent answer."""
    used = affordable(budget, samples, [sample.policy_tokens for sample in samples])
    return _by_vote(used, vote([sample.answer for sample in used]))


def by_best(budget: int | None, samples: Sequence[SearchResult], aggregate: str) -> Solved:
    """Takes the answer of the sample with the highest score."""
    used, scores = _affordable_scores(budget, samples, aggregate)
    chosen = used[best(scores)]
    policy_tokens = sum(sample.policy_tokens for sample in used)
    return Solved(
        float(chosen.is_correct),
        policy_tokens,
        sum(sample.scoring_tokens for sample in used),
        policy_tokens - chosen.policy_tokens,
        len(used),
    )


def by_weight(budget: int | None, samples: Sequence[SearchResult], aggregate: str) -> Solved:
    """Takes the answer whose samples have the largest sum of scores."""
    used, scores = _affordable_scores(budget, samples, aggregate)
    solved = _by_vote(used, vote([sample.answer for sample in used], scores))
    return replace(solved, judge_tokens=sum(sample.scoring_tokens for sample in used))


def _affordable_scores(
    budget: int | None, samples: Sequence[SearchResult], aggregate: str
) -> tuple[Sequence[SearchResult], list[float]]:
    """Returns the samples that the budget pays for, judgments included, and their scores."""
    costs = [sample.policy_tokens + sample.scoring_tokens for sample in samples]
    used = affordable(budget, samples, costs)
    return used, [AGGREGATES[aggregate](sample.chunk_scores) for sample in used]


def _by_vote(samples: Sequence[SearchResult], answer: str) -> Solved:
    right = next(sample.is_correct for sample in samples if sample.answer == answer)
    policy_tokens = sum(sample.policy_tokens for sample in samples)
    return Solved(float(right), policy_tokens, samples=len(samples))


def affordable(
    budget: int | None, samples: Sequence[SearchResult], costs: Sequence[int]
) -> Sequence[SearchResult]:
    """Returns the first samples that the budget pays for, at least one; without a budget all."""
    if budget is None:
        return samples
    return samples[: max(1, sum(spent <= budget for spent in itertools.accumulate(costs)))]

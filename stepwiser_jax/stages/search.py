"""Ways to spend tokens on a problem, with a judge (StepWiser 4.3) and without, side by side.

    greedy, plain samples                    no judge
    majority of k                            votes of the first k samples
    best of k, weighted majority of k        the first k samples, their chunks judged
    chunk-reset, beam search, DVTS           the judge steers the policy (`search.chunk_search`)

Every sample is judged once, for all that uses it. Best of k takes the sample with the highest min,
mean, last or product of its chunks' scores, the earliest of equals; the weighted majority sums that
score over the samples of an answer. Beam search and DVTS answer by the weighted majority of the
solutions that they find, each weighed by the aggregate of its chunks' scores that ranked it.

Where the paper is silent:

1. After `max_attempts` rejections the last attempt is kept (and counted as a forced chunk).
2. A judgment without a verdict accepts the chunk: it is no reason to spend more tokens.
3. Token cost counts what is generated: by the policy, accepted or rejected, and by the judge. Of
   a classifier that is its sign, one token a chunk. Rejected is what stands in no solution that is
   chosen or votes: a chunk taken back, a beam that was pruned, every sample but the best of k.

With a `token_budget` B, of policy and judge together, per problem:

    majority, best of k, weighted majority   the first samples that fit B, judgments included where
                                             they are used; at least one, at most k
    chunk-reset, beam search, DVTS           judge and branch until B is spent, and finish

Samples never overrun B but for the first, the steered methods by one step and the rest of one
solution at most: compare the tokens that `summary.json` gives, not B. Where a row's `samples` is k,
B was not what limited it: for an equal budget ask for more samples.

Leaves out, and counts, problems whose reference answer cannot be verified. Reads `problems`,
`policy`, and `judge` or `classifier`. Writes search results.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stepwiser_jax.config import Beams, Sampling, Search
from stepwiser_jax.data.problems import keep_verifiable, read_problems
from stepwiser_jax.distributed.hosts import NO_SHARD, Shard
from stepwiser_jax.distributed.loading import load_for_decoding
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.evaluation.statistics import accuracy
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.judges.load import load_judge
from stepwiser_jax.judges.stepwiser import Solution, SolutionJudge
from stepwiser_jax.records import Problem, SearchResult, Verdict, natural_key
from stepwiser_jax.runs.directory import RunDirectory, blocks, per_item, worker_count
from stepwiser_jax.search.chunk_search import (
    Method,
    Policy,
    Tree,
    beam_search,
    chunk_reset,
    dvts,
    search_chunks,
)
from stepwiser_jax.search.voting import AGGREGATES, best, vote
from stepwiser_jax.tasks.mathematics import extract_answer
from stepwiser_jax.tasks.verifier import Verifier
from stepwiser_jax.text.chunks import CHUNK_CLOSE, check_tags, chunk_ends, chunk_texts, end_patterns
from stepwiser_jax.text.tokenizer import completion_text


def run(config: Search, run_dir: str | Path, shard: Shard = NO_SHARD) -> dict[str, Any]:
    """Search block after block; a restarted run repeats the block it was killed in."""
    directory = RunDirectory(run_dir, "search", config, shard)
    if directory.finished:
        return directory.summary()
    directory.begin()
    dropped: Counter[str] = Counter()
    problems = read_problems(config.problems, dropped, config.verifier)
    problems = keep_verifiable(problems, config, dropped)
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
    with Verifier(
        config.verifier, workers=worker_count(), timeout_seconds=config.answer_timeout_seconds
    ) as verifier:
        seconds, found = directory.write_blocks(
            work,
            SearchResult,
            lambda block: verified(search_block(config, policy, judge, block), block, verifier),
        )
    return {
        "seconds_per_solution": per_item(seconds, found),
        "verifier_timeouts": verifier.timeouts,
        "verifier_failures": verifier.failures,
        "compiled": {
            "policy": policy.engine.compiled_shapes,
            "judge": judge.compiled_shapes,
        },
    }


def check_lengths(
    config: Search, policy: Policy, judge: SolutionJudge, problems: Sequence[Problem]
) -> None:
    """Raises UserError where a solution does not fit the policy's context, or a judgment of it not
    the judge's."""
    room = config.sampling.max_new_tokens
    for problem in problems:
        ids = policy.prompt_ids(problem)
        policy.engine.check_length(len(ids), room, problem.problem_id)
        judge.check_room(problem.problem_id, problem.question, room)


def load_solvers(config: Search) -> tuple[Policy, SolutionJudge]:
    """The policy, writing one chunk at a time, and the judge."""
    mesh = make_mesh(**config.mesh.model_dump(), devices=jax.local_devices())
    loaded = load_for_decoding(
        **config.policy.model_dump(), weights=config.engine.weights, mesh=mesh, seed=config.seed
    )
    stop_strings = end_patterns(config.chunking)
    if CHUNK_CLOSE in stop_strings:
        check_tags(loaded.tokenizer)
    chunk_sampling = config.sampling.model_copy(update={"max_new_tokens": config.max_chunk_tokens})
    policy = Policy(
        loaded,
        Engine(loaded.model, loaded.tokenizer, mesh=mesh, **config.engine.model_dump()),
        config.prompt_style,
        SamplingParams(
            **chunk_sampling.model_dump(),
            stop_ids=loaded.tokenizer.eos_ids,
            stop_strings=stop_strings,
        ),
        jax.random.key(config.seed),
    )
    settings = config.judge or config.classifier
    assert settings is not None
    return policy, load_judge(settings, mesh=mesh, seed=config.seed)


# --- a block ------------------------------------------------------------------------------------


def sample_names(config: Search) -> list[str]:
    return [f"sample{k}" for k in range(max((*config.majority, *config.best_of), default=1))]


def steered_methods(config: Search) -> dict[str, tuple[Method, Beams]]:
    """What the judge steers, each with its rows a problem."""
    one = Beams(beams=1, width=1)
    methods = {"chunk_reset": (chunk_reset(config.max_attempts), one)}
    for name, method, sizes in (("beam", beam_search, config.beam), ("dvts", dvts, config.dvts)):
        if sizes is not None:
            methods[name] = (method(sizes.beams, sizes.width), sizes)
    return methods


def search_ids(config: Search, block: Sequence[Problem]) -> list[str]:
    names = ["greedy", *steered_methods(config), *sample_names(config)]
    return [f"{problem.problem_id}/{name}" for problem in block for name in names]


def search_block(
    config: Search, policy: Policy, judge: SolutionJudge, block: Sequence[Problem]
) -> list[SearchResult]:
    """Every method on every problem of the block, not yet verified."""
    results = []
    for name, (method, sizes) in steered_methods(config).items():
        trees = search_chunks(
            policy,
            judge,
            block,
            method,
            rows_per_problem=sizes.beams,
            aggregate=sizes.aggregate,
            max_new_tokens=config.sampling.max_new_tokens,
            token_budget=config.token_budget,
        )
        results += [steered_result(policy, name, tree) for tree in trees]
    greedy = config.sampling.model_copy(update={"temperature": 0.0})
    results += whole_solutions(greedy, policy, judge, block, ["greedy"], 0)
    num_judged = max(config.best_of, default=0)
    names = sample_names(config)
    return results + whole_solutions(config.sampling, policy, judge, block, names, num_judged)


def verified(
    results: Sequence[SearchResult], block: Sequence[Problem], verifier: Verifier
) -> list[SearchResult]:
    """Returns the results with `is_correct` filled in."""
    problems = {problem.problem_id: problem for problem in block}
    are_correct = verifier.verify(
        [result.completion for result in results],
        [problems[result.problem_id] for result in results],
    )
    return [
        dataclasses.replace(result, is_correct=is_correct)
        for result, is_correct in zip(results, are_correct, strict=True)
    ]


def steered_result(policy: Policy, method: str, tree: Tree) -> SearchResult:
    """The answer of the weighted majority, in the words of the best solution that gives it."""
    texts = [completion_text(policy.loaded.tokenizer, path.ids) for path in tree.solutions]
    answers = [extract_answer(text) or "" for text in texts]
    scores = [path.score for path in tree.solutions]
    voted = vote(answers, scores)
    giving = [i for i, answer in enumerate(answers) if answer == voted]
    chosen = giving[best([scores[i] for i in giving])]
    opinions = tree.solutions[chosen].opinions
    return SearchResult(
        search_id=f"{tree.problem.problem_id}/{method}",
        problem_id=tree.problem.problem_id,
        method=method,
        answer=voted,
        is_correct=False,
        completion=texts[chosen],
        accepted_tokens=tree.accepted_tokens,
        rejected_tokens=tree.policy_tokens - tree.accepted_tokens,
        judge_tokens=tree.judge_tokens,
        forced_chunks=sum(opinion.verdict is Verdict.NEGATIVE for opinion in opinions),
        chunk_scores=tuple(opinion.p_positive for opinion in opinions),
        scoring_tokens=0,
    )


def whole_solutions(
    sampling: Sampling,
    policy: Policy,
    judge: SolutionJudge,
    block: Sequence[Problem],
    names: Sequence[str],
    num_judged: int,
) -> list[SearchResult]:
    """Solutions written in one go, one per problem and name, of which the first `num_judged` of a
    problem are judged."""
    tokenizer = policy.loaded.tokenizer
    ids = [f"{problem.problem_id}/{name}" for problem in block for name in names]
    output = policy.engine.generate(
        [policy.prompt_ids(problem) for problem in block],
        SamplingParams(**sampling.model_dump(), stop_ids=tokenizer.eos_ids),
        key=policy.key,
        row_ids=[f"search/{search_id}" for search_id in ids],
        group_size=len(names),
    )
    judged = [b for b in range(len(ids)) if b % len(names) < num_judged]
    solutions = []
    for b in judged:
        ends = chunk_ends(output.ids(b), policy.chunk_matcher, tokenizer)
        texts = chunk_texts(tokenizer, output.ids(b), ends)
        solutions.append(Solution(ids[b], block[b // len(names)].question, texts, separator=""))
    opinions = dict(zip(judged, judge(solutions) if judged else [], strict=True))
    results = []
    for b, search_id in enumerate(ids):
        text = completion_text(tokenizer, output.ids(b))
        results.append(
            SearchResult(
                search_id=search_id,
                problem_id=block[b // len(names)].problem_id,
                method=names[b % len(names)],
                answer=extract_answer(text) or "",
                is_correct=False,
                completion=text,
                accepted_tokens=len(output.ids(b)),
                rejected_tokens=0,
                judge_tokens=0,
                forced_chunks=0,
                chunk_scores=tuple(opinion.p_positive for opinion in opinions.get(b, ())),
                scoring_tokens=sum(opinion.num_tokens for opinion in opinions.get(b, ())),
            )
        )
    return results


# --- numbers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solved:
    """A problem by one method: how right its answer is (0 to 1), and what it cost."""

    right: float
    policy_tokens: float
    judge_tokens: float = 0.0
    rejected_tokens: float = 0.0
    samples: int = 1


def summarize(config: Search, results: Sequence[SearchResult]) -> dict[str, Any]:
    """Per method: accuracy with its 95% interval, and mean tokens per problem. `majority/4` of
    `solved_by_method` is 4 of majority."""
    summary: dict[str, Any] = {}
    for name, solved in solved_by_method(config, results).items():
        *groups, last = name.split("/")
        rows = summary
        for group in groups:
            rows = rows.setdefault(group, {})
        rows[last] = method_row(config, solved)
    for name in steered_methods(config):
        of_method = [result for result in results if result.method == name]
        summary[name] |= {
            "accepted_tokens": float(np.mean([result.accepted_tokens for result in of_method])),
            "forced_chunks": float(np.mean([result.forced_chunks for result in of_method])),
        }
    return summary


def solved_by_method(config: Search, results: Sequence[SearchResult]) -> dict[str, list[Solved]]:
    """Every problem by every method, in the order of their ids, whoever wrote which part: greedy,
    plain, chunk_reset, ..., majority/K, best_of/AGGREGATE/K and weighted_majority/AGGREGATE/K."""
    of_problem: dict[str, dict[str, SearchResult]] = defaultdict(dict)
    for result in results:
        of_problem[result.problem_id][result.method] = result
    groups = [of_problem[problem_id] for problem_id in sorted(of_problem, key=natural_key)]
    samples = [[group[name] for name in sample_names(config)] for group in groups]
    budget = config.token_budget
    found = {
        name: [steered(group[name]) for group in groups]
        for name in ("greedy", *steered_methods(config))
    }
    found["plain"] = [averaged(of_one) for of_one in samples]
    for k in config.majority:
        found[f"majority/{k}"] = [by_majority(budget, of_one[:k]) for of_one in samples]
    for name, k in itertools.product(AGGREGATES, config.best_of):
        found[f"best_of/{name}/{k}"] = [by_best(budget, s[:k], name) for s in samples]
        found[f"weighted_majority/{name}/{k}"] = [by_weight(budget, s[:k], name) for s in samples]
    return found


def method_row(config: Search, solved: Sequence[Solved]) -> dict[str, Any]:
    return {
        **accuracy([problem.right for problem in solved], seed=config.seed),
        "policy_tokens": float(np.mean([problem.policy_tokens for problem in solved])),
        "judge_tokens": float(np.mean([problem.judge_tokens for problem in solved])),
        "rejected_tokens": float(np.mean([problem.rejected_tokens for problem in solved])),
        "samples": float(np.mean([problem.samples for problem in solved])),
    }


def steered(result: SearchResult) -> Solved:
    return Solved(
        float(result.is_correct),
        result.policy_tokens,
        result.judge_tokens,
        result.rejected_tokens,
    )


def averaged(samples: Sequence[SearchResult]) -> Solved:
    """One sample, on average."""
    right = float(np.mean([sample.is_correct for sample in samples]))
    return Solved(right, float(np.mean([sample.policy_tokens for sample in samples])))


def by_majority(budget: int | None, samples: Sequence[SearchResult]) -> Solved:
    """The answer that is given most often."""
    used = affordable(budget, samples, [sample.policy_tokens for sample in samples])
    return answered(used, vote([sample.answer for sample in used]))


def by_best(budget: int | None, samples: Sequence[SearchResult], aggregate: str) -> Solved:
    """The answer of the sample with the highest score."""
    used, scores = scored(budget, samples, aggregate)
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
    """The answer whose samples have the largest sum of scores."""
    used, scores = scored(budget, samples, aggregate)
    solved = answered(used, vote([sample.answer for sample in used], scores))
    return dataclasses.replace(solved, judge_tokens=sum(sample.scoring_tokens for sample in used))


def scored(
    budget: int | None, samples: Sequence[SearchResult], aggregate: str
) -> tuple[Sequence[SearchResult], list[float]]:
    """Samples that can be paid with their judgments, and their scores."""
    costs = [sample.policy_tokens + sample.scoring_tokens for sample in samples]
    used = affordable(budget, samples, costs)
    return used, [AGGREGATES[aggregate](sample.chunk_scores) for sample in used]


def answered(samples: Sequence[SearchResult], answer: str) -> Solved:
    """By the answer that samples voted for."""
    right = next(sample.is_correct for sample in samples if sample.answer == answer)
    policy_tokens = sum(sample.policy_tokens for sample in samples)
    return Solved(float(right), policy_tokens, samples=len(samples))


def affordable(
    budget: int | None, samples: Sequence[SearchResult], costs: Sequence[int]
) -> Sequence[SearchResult]:
    """The first samples that the budget pays for, at least one; all without a budget."""
    if budget is None:
        return samples
    return samples[: max(1, sum(spent <= budget for spent in itertools.accumulate(costs)))]

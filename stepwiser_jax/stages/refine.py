"""A policy thinks again where a judge finds its first wrong step (GenPRM, arXiv 2504.00891).

    problem -> solution -> P(right) of its steps -> the first below the threshold, with the judge's
               ^                                    analysis, is what the user says next
               |______________________________________________|             at most `turns` times

The conversation goes on with all that was said before in it. A solution in which nothing is wrong
stays; so does one after which the context has no room for another of `sampling.max_new_tokens`, so
that none is replaced by one that was cut short; and one that has no step to be judged.

Leaves out, and counts, problems whose reference answer cannot be verified. Reads `problems`,
`policy` and `judge`. Writes search results `<problem>/turn<r>`: the solution after r turns;
`rejected_tokens` are those of the solutions before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from stepwiser_jax.config import Engine as Shapes
from stepwiser_jax.config import Model, Refine
from stepwiser_jax.data.problems import keep_verifiable, read_problems
from stepwiser_jax.distributed.hosts import NO_SHARD, Shard
from stepwiser_jax.distributed.loading import Loaded, load_for_decoding
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.evaluation.statistics import accuracy
from stepwiser_jax.evaluation.verdicts import first_predicted_error, verdict_at
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.judges.genprm import Draft, GenPrmJudge, Writer
from stepwiser_jax.judges.genprm_form import analysis_of, rethink_prompt
from stepwiser_jax.judges.stepwiser import Solution
from stepwiser_jax.records import Problem, SearchResult, Verdict, natural_key
from stepwiser_jax.runs.directory import RunDirectory, blocks, per_item, worker_count
from stepwiser_jax.tasks.mathematics import extract_answer
from stepwiser_jax.tasks.verifier import Verifier
from stepwiser_jax.text.chunks import (
    CHUNK_CLOSE,
    TokenMatcher,
    chunk_ends,
    chunk_texts,
    end_patterns,
)
from stepwiser_jax.text.prompts import solve_prompt
from stepwiser_jax.text.tokenizer import Tokenizer


def run(config: Refine, run_dir: str | Path, shard: Shard = NO_SHARD) -> dict[str, Any]:
    """Refine block after block; a restarted run repeats the block it was killed in."""
    directory = RunDirectory(run_dir, "refine", config, shard)
    if directory.finished:
        return directory.summary()
    directory.begin()
    dropped: Counter[str] = Counter()
    problems = read_problems(config.problems, dropped, config.verifier)
    problems = keep_verifiable(problems, config, dropped)
    work = blocks(problems, config.problems_per_block)
    work = directory.pending(work, SearchResult, lambda block: result_ids(config, block))
    measured = refine_blocks(config, directory, problems, work) if work else {}
    writer = directory.writer(SearchResult)
    counts = {"problems": len(problems), "dropped": dict(dropped)}
    return directory.finish(lambda: counts | summarize(config, writer.read()) | measured)


def result_ids(config: Refine, block: Sequence[Problem]) -> list[str]:
    return [f"{p.problem_id}/turn{turn}" for p in block for turn in range(config.turns + 1)]


def refine_blocks(
    config: Refine,
    directory: RunDirectory,
    problems: Sequence[Problem],
    work: Sequence[Sequence[Problem]],
) -> dict[str, Any]:
    """Results of these blocks, written; returns what was measured. Checks all problems first: every
    worker must refuse what one would."""
    mesh = make_mesh(**config.mesh.model_dump(), devices=jax.local_devices())

    def load(model: Model, shapes: Shapes) -> tuple[Loaded, Engine]:
        path = model.model_dump(include=set(Model.model_fields))
        loaded = load_for_decoding(**path, weights=shapes.weights, mesh=mesh, seed=config.seed)
        return loaded, Engine(loaded.model, loaded.tokenizer, mesh=mesh, **shapes.model_dump())

    policy, engine = load(config.policy, config.engine)
    judge = GenPrmJudge(
        *load(config.judge, config.judge.engine),
        name="refine",
        genprm=config.judge.genprm,
        prompt_style=config.judge.prompt_style,
        max_new_tokens=config.judge.max_new_tokens,
        key=jax.random.key(config.seed),
    )
    refine = Refiner(config, policy.tokenizer, engine, judge)
    refine.check_lengths(problems)
    with Verifier(
        config.verifier, workers=worker_count(), timeout_seconds=config.answer_timeout_seconds
    ) as verifier:
        seconds, _ = directory.write_blocks(
            work, SearchResult, lambda block: refine(block, verifier)
        )
    return {
        "seconds_per_problem": per_item(seconds, sum(map(len, work))),
        "verifier_timeouts": verifier.timeouts,
        "verifier_failures": verifier.failures,
        "steps_without_verdict": refine.steps_without_verdict,
        "compiled": {"policy": engine.compiled_shapes, "judge": judge.engine.compiled_shapes},
    } | judge.writer.measured


@dataclass
class Attempt:
    """A problem on its way through the turns: the conversation with the policy, the solution that
    stands last in it, and what was spent."""

    problem: Problem
    draft: Draft
    solution: str = ""
    accepted_tokens: int = 0
    rejected_tokens: int = 0
    judge_tokens: int = 0


class Refiner:
    """Problems of one block -> the results of all turns. `steps_without_verdict`: so far, those at
    which the judge's context was full."""

    def __init__(self, config: Refine, tokenizer: Tokenizer, engine: Engine, judge: GenPrmJudge):
        self.config, self.tokenizer, self.judge = config, tokenizer, judge
        self.steps_without_verdict = 0
        key = jax.random.key(config.seed)
        self.writer = Writer(tokenizer, engine, prompt_style=config.prompt_style, key=key)
        self.patterns = end_patterns(config.chunking)
        self.matcher = TokenMatcher.build(tokenizer.token_bytes(), self.patterns)
        sampling = config.sampling.model_dump()
        self.params = SamplingParams(**sampling, stop_ids=tokenizer.eos_ids)

    def _begin(self, problem: Problem) -> Attempt:
        attempt = Attempt(problem, Draft("", ""))
        tags = CHUNK_CLOSE in self.patterns
        prompt = solve_prompt(problem.question, self.config.prompt_style, tags=tags)
        attempt.draft.say("user", prompt)
        return attempt

    def check_lengths(self, problems: Sequence[Problem]) -> None:
        """Raises UserError where the policy's context does not hold a first solution, or the
        judge's the first step of none."""
        for problem in problems:
            length = len(self.writer.encode(self._begin(problem).draft))
            self.writer.engine.check_length(length, self.params.max_new_tokens, problem.problem_id)
        self.judge.check_lengths([Solution(p.problem_id, p.question, [""]) for p in problems])

    def __call__(self, block: Sequence[Problem], verifier: Verifier) -> list[SearchResult]:
        attempts = [self._begin(problem) for problem in block]
        results, thinking = [], attempts
        for turn in range(self.config.turns + 1):
            thinking = self._solve(thinking, turn)
            results += self._results(attempts, turn, verifier)
            if turn < self.config.turns:
                thinking = self._criticise(thinking, turn)
        return results

    def _solve(self, attempts: Sequence[Attempt], turn: int) -> list[Attempt]:
        """The next solution; returns the attempts that have room for it."""
        attempts = [attempt for attempt in attempts if self._has_room(attempt)]
        for attempt in attempts:
            attempt.draft.name = f"refine/{attempt.problem.problem_id}/policy{turn}"
            attempt.draft.begin_turn("")
        self.writer.write([a.draft for a in attempts], self.params, stops=[], reserve=0)
        for attempt in attempts:
            attempt.solution = attempt.draft.turn
            attempt.rejected_tokens += attempt.accepted_tokens
            attempt.accepted_tokens = attempt.draft.num_tokens
        return attempts

    def _has_room(self, attempt: Attempt) -> bool:
        length = len(self.writer.encode(attempt.draft))
        return length + self.params.max_new_tokens <= self.writer.engine.shapes.max_length

    def _criticise(self, attempts: Sequence[Attempt], turn: int) -> list[Attempt]:
        """Says what is wrong with a solution; returns the attempts of which something is."""
        solutions = [self._solution(attempt, turn) for attempt in attempts]
        criticised = []
        for attempt, solution, opinions in zip(
            attempts, solutions, self.judge(solutions), strict=True
        ):
            attempt.judge_tokens += sum(opinion.num_tokens for opinion in opinions)
            verdicts = [opinion.verdict for opinion in opinions]
            self.steps_without_verdict += verdicts.count(Verdict.UNPARSED)
            threshold = self.config.judge.genprm.threshold
            found = first_predicted_error([verdict_at(threshold, o.p_positive) for o in opinions])
            if found != -1:
                style = self.config.judge.prompt_style
                analysis = analysis_of(opinions[found].completion, style)
                message = rethink_prompt(solution.chunks[found], analysis, self.config.prompt_style)
                attempt.draft.say("user", message)
                criticised.append(attempt)
        return criticised

    def _solution(self, attempt: Attempt, turn: int) -> Solution:
        ids = self.tokenizer.encode(attempt.solution)
        ends = chunk_ends(ids, self.matcher, self.tokenizer) if ids else ()
        chunks = chunk_texts(self.tokenizer, ids, ends) if ids else []
        name = f"{attempt.problem.problem_id}/turn{turn}"
        return Solution(name, attempt.problem.question, chunks, separator="")

    def _results(
        self, attempts: Sequence[Attempt], turn: int, verifier: Verifier
    ) -> list[SearchResult]:
        answers = [extract_answer(attempt.solution) for attempt in attempts]
        right = verifier.verify(
            [attempt.solution for attempt in attempts], [attempt.problem for attempt in attempts]
        )
        return [
            SearchResult(
                search_id=f"{attempt.problem.problem_id}/turn{turn}",
                problem_id=attempt.problem.problem_id,
                method=f"turn{turn}",
                answer=answer or "",
                is_correct=is_right,
                completion=attempt.solution,
                accepted_tokens=attempt.accepted_tokens,
                rejected_tokens=attempt.rejected_tokens,
                judge_tokens=attempt.judge_tokens,
                forced_chunks=0,
                chunk_scores=(),
                scoring_tokens=0,
            )
            for attempt, answer, is_right in zip(attempts, answers, right, strict=True)
        ]


def summarize(config: Refine, results: Sequence[SearchResult]) -> dict[str, Any]:
    """After every turn: accuracy with its interval, how many problems were thought through again in
    it, and mean tokens a problem so far."""
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
        }
        before = tokens
    return summary

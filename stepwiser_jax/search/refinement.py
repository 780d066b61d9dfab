"""Lets a policy think again about the first step that a judge finds wrong (GenPRM's refinement).

    problem -> solution -> P(right) of its steps -> the first below the threshold, with the judge's
               ^                                    analysis, is what the user says next
               |______________________________________________|             at most `turns` times

The conversation goes on with all that was said before. A solution stays if nothing in it is wrong,
if it has no step to judge, or if the context has no room for another one of
`sampling.max_new_tokens`: no solution is replaced by one that was cut short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stepwiser_jax.config import Refine
from stepwiser_jax.evaluation.verdicts import first_predicted_error, verdict_at
from stepwiser_jax.judges.base import Solution, spent_on
from stepwiser_jax.judges.genprm.form import analysis_of, rethink_prompt
from stepwiser_jax.judges.genprm.judge import Conversation, GenPrmCritic, TurnWriter
from stepwiser_jax.judges.writer import Writer
from stepwiser_jax.model.flops import NOTHING, Spent
from stepwiser_jax.records import Problem, SearchResult, Verdict
from stepwiser_jax.search.results import Found, check_answers
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


@dataclass
class Attempt:
    """A problem, the conversation with the policy about it, its last solution, and the cost."""

    problem: Problem
    conversation: Conversation
    solution: str = ""
    accepted_tokens: int = 0
    policy: Spent = NOTHING
    judge: Spent = NOTHING


class Refiner:
    """The loop of policy and judge over a block of problems. `steps_without_verdict` counts the
    steps so far at which the judge's context was full."""

    def __init__(self, config: Refine, policy: Writer, judge: GenPrmCritic):
        self.config, self.policy, self.judge = config, policy, judge
        self.turns, self.tokenizer = TurnWriter(policy), policy.tokenizer
        self.steps_without_verdict = 0
        self.patterns = end_patterns(config.chunking)
        self.matcher = TokenMatcher.build(self.tokenizer.token_bytes(), self.patterns)

    def _begin(self, problem: Problem) -> Attempt:
        """Returns the attempt at a problem that the user has just posed."""
        attempt = Attempt(problem, Conversation("", ""))
        tags = CHUNK_CLOSE in self.patterns
        prompt = solve_prompt(
            problem.question, self.config.prompt_style, tags=tags, prompts=self.tokenizer.prompts
        )
        attempt.conversation.say("user", prompt)
        return attempt

    def check_lengths(self, problems: Sequence[Problem]) -> None:
        """Raises UserError if the policy's context does not hold a first solution of each problem,
        or if the judge's check fails."""
        for problem in problems:
            prompt = self.turns.encode(self._begin(problem).conversation)
            self.policy.check_length(prompt, problem.problem_id)
        self.judge.check_lengths([Solution(p.problem_id, p.question, [""]) for p in problems])

    def __call__(self, block: Sequence[Problem], verifier: Verifier) -> list[SearchResult]:
        """Returns the solutions of a block after each turn."""
        attempts = [self._begin(problem) for problem in block]
        results, thinking = [], attempts
        for turn in range(self.config.turns + 1):
            thinking = self._solve(thinking, turn)
            results += self._results(attempts, turn, verifier)
            if turn < self.config.turns:
                thinking = self._criticize(thinking, turn)
        return results

    def _solve(self, attempts: Sequence[Attempt], turn: int) -> list[Attempt]:
        """Writes the next solutions; returns the attempts that have room for one."""
        attempts = [attempt for attempt in attempts if self._has_room(attempt)]
        for attempt in attempts:
            attempt.conversation.name = f"{attempt.problem.problem_id}/policy{turn}"
            attempt.conversation.begin_turn("")
        self.turns.write([a.conversation for a in attempts], self.policy.params())
        for attempt in attempts:
            attempt.solution = attempt.conversation.turn
            attempt.policy += attempt.conversation.spent
            attempt.accepted_tokens = attempt.conversation.spent.generated
        return attempts

    def _has_room(self, attempt: Attempt) -> bool:
        length = len(self.turns.encode(attempt.conversation))
        return length + self.policy.max_new_tokens <= self.policy.engine.shapes.max_length

    def _criticize(self, attempts: Sequence[Attempt], turn: int) -> list[Attempt]:
        """Tells the policy its first wrong steps; returns the attempts that have one."""
        solutions = [self._solution(attempt, turn) for attempt in attempts]
        judged = self.judge(solutions)
        criticized = []
        for attempt, solution, judgments in zip(attempts, solutions, judged, strict=True):
            attempt.judge += spent_on(judgments)
            verdicts = [judgment.verdict for judgment in judgments]
            self.steps_without_verdict += verdicts.count(Verdict.UNPARSED)
            threshold = self.config.judge.threshold or 0.5
            found = first_predicted_error([verdict_at(threshold, o.p_positive) for o in judgments])
            if found != -1:
                analysis = analysis_of(judgments[found].completion, found, self.judge.form)
                style, prompts = self.config.prompt_style, self.tokenizer.prompts
                message = rethink_prompt(solution.chunks[found], analysis, style, prompts)
                attempt.conversation.say("user", message)
                criticized.append(attempt)
        return criticized

    def _solution(self, attempt: Attempt, turn: int) -> Solution:
        ids = self.tokenizer.encode(attempt.solution)
        ends = chunk_ends(ids, self.matcher, self.tokenizer) if ids else ()
        chunks = chunk_texts(self.tokenizer, ids, ends) if ids else []
        name = f"{attempt.problem.problem_id}/turn{turn}"
        return Solution(name, attempt.problem.question, chunks, separator="")

    def _results(
        self, attempts: Sequence[Attempt], turn: int, verifier: Verifier
    ) -> list[SearchResult]:
        found = [
            Found(
                attempt.problem,
                f"turn{turn}",
                answer=extract_answer(attempt.solution) or "",
                completion=attempt.solution,
                accepted_tokens=attempt.accepted_tokens,
                policy=attempt.policy,
                judge=attempt.judge,
            )
            for attempt in attempts
        ]
        return check_answers(found, verifier)

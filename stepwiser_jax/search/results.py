"""Solutions that a search or a sample found, before and after their answers are checked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.judges.base import Judge, Solution, spent_on
from stepwiser_jax.model.flops import NOTHING, Spent
from stepwiser_jax.records import ChunkAttempt, Problem, SearchResult, Verdict
from stepwiser_jax.search.chunk_search import Policy
from stepwiser_jax.search.state import Beam, Hypothesis, SearchState
from stepwiser_jax.search.voting import best, in_first_words, vote
from stepwiser_jax.tasks.mathematics import extract_answer
from stepwiser_jax.tasks.verifier import Verifier
from stepwiser_jax.text.chunks import chunk_ends, chunk_texts
from stepwiser_jax.text.tokenizer import Tokenizer, completion_text


@dataclass(frozen=True)
class Found:
    """A method's solution of a problem, with what `SearchResult` says of it. Its answer is not
    checked yet."""

    problem: Problem
    method: str
    answer: str
    completion: str
    accepted_tokens: int
    policy: Spent
    judge: Spent = NOTHING
    forced_chunks: int = 0
    chunk_scores: tuple[float, ...] = ()
    scoring: Spent = NOTHING
    prompt_flops: float = 0.0
    attempts: tuple[ChunkAttempt, ...] = ()

    @property
    def rejected_tokens(self) -> int:
        return self.policy.generated - self.accepted_tokens


def check_answers(found: Sequence[Found], verifier: Verifier) -> list[SearchResult]:
    """Returns the records of what was found, with whether each answer is right. Answers to a
    problem that mean the same are written in the same words."""
    problems = [each.problem for each in found]
    right = verifier.verify([each.completion for each in found], problems)
    answers = in_first_words(problems, [each.answer for each in found], verifier)
    return [
        SearchResult(
            search_id=f"{each.problem.problem_id}/{each.method}",
            problem_id=each.problem.problem_id,
            method=each.method,
            answer=answer,
            is_correct=is_correct,
            completion=each.completion,
            accepted_tokens=each.accepted_tokens,
            rejected_tokens=each.rejected_tokens,
            judge_tokens=each.judge.generated,
            forced_chunks=each.forced_chunks,
            chunk_scores=each.chunk_scores,
            scoring_tokens=each.scoring.generated,
            policy_read_tokens=each.policy.read,
            judge_read_tokens=each.judge.read,
            scoring_read_tokens=each.scoring.read,
            policy_flops=each.policy.flops,
            judge_flops=each.judge.flops,
            scoring_flops=each.scoring.flops,
            prompt_flops=each.prompt_flops,
            attempts=each.attempts,
        )
        for each, is_correct, answer in zip(found, right, answers, strict=True)
    ]


def found_by_search(
    policy: Policy, method: str, states: Sequence[SearchState], verifier: Verifier
) -> list[Found]:
    """Returns for each problem the answer of the weighted majority of its solutions, in the words
    of the best solution that gives it."""
    tokenizer = policy.loaded.tokenizer
    texts = [[completion_text(tokenizer, x.ids) for x in state.solutions] for state in states]
    answers = iter(
        in_first_words(
            [state.problem for state in states for _ in state.solutions],
            [extract_answer(text) or "" for of_state in texts for text in of_state],
            verifier,
        )
    )
    return [
        _voted(tokenizer, method, state, of_state, list(itertools.islice(answers, len(of_state))))
        for state, of_state in zip(states, texts, strict=True)
    ]


def _voted(
    tokenizer: Tokenizer,
    method: str,
    state: SearchState,
    texts: Sequence[str],
    answers: Sequence[str],
) -> Found:
    scores = [solution.score for solution in state.solutions]
    voted = vote(answers, scores)
    giving = [i for i, answer in enumerate(answers) if answer == voted]
    chosen = giving[best([scores[i] for i in giving])]
    judgments = state.solutions[chosen].judgments
    return Found(
        problem=state.problem,
        method=method,
        answer=extract_answer(texts[chosen]) or "",
        completion=texts[chosen],
        accepted_tokens=state.accepted_tokens,
        policy=state.policy,
        judge=state.judge,
        forced_chunks=sum(judgment.verdict is Verdict.NEGATIVE for judgment in judgments),
        chunk_scores=tuple(judgment.p_positive for judgment in judgments),
        attempts=tuple(
            _attempt(tokenizer, beam, state.solutions[chosen])
            for beam in state.attempts
            if beam.hypothesis.chunks[-1].has_text
        ),
    )


def _attempt(tokenizer: Tokenizer, beam: Beam, solution: Hypothesis) -> ChunkAttempt:
    """Returns the record of the last chunk of a beam, which may be a chunk of the solution."""
    *before, chunk = beam.hypothesis.chunks
    judgment = chunk.judgment
    return ChunkAttempt(
        num_before=len(before),
        attempt=beam.attempt,
        text=completion_text(tokenizer, chunk.ids),
        verdict=None if judgment is None else judgment.verdict,
        p_positive=None if judgment is None else judgment.p_positive,
        judgment="" if judgment is None else judgment.completion,
        is_kept=chunk in solution.chunks,
    )


def sample_solutions(
    policy: Policy,
    judge: Judge,
    problems: Sequence[Problem],
    params: SamplingParams,
    names: Sequence[str],
    num_judged: int,
) -> list[Found]:
    """Returns solutions written in one go, one for each problem and name, each with what it would
    cost the policy alone. Of the judge, the first one counts the reading of the problem.

    Args:
        policy: Writes the solutions.
        judge: Judges the chunks of the first `num_judged` solutions of each problem.
        problems: The problems.
        params: Samples a whole solution.
        names: Names of the samples of a problem. They decide its noise.
        num_judged: How many solutions of a problem are judged.
    """
    tokenizer = policy.loaded.tokenizer
    samples = [(problem, name) for problem in problems for name in names]
    completions = policy.engine.generate(
        [policy.prompt_ids(problem) for problem in problems],
        params,
        key=policy.key,
        row_ids=[f"search/{problem.problem_id}/{name}" for problem, name in samples],
        group_size=len(names),
    )
    solutions = []
    for b, (problem, name) in enumerate(samples):
        if name in names[:num_judged]:
            ids = completions[b].tokens.tolist()
            chunks = chunk_texts(tokenizer, ids, chunk_ends(ids, policy.chunk_matcher, tokenizer))
            solution_id = f"{problem.problem_id}/{name}"
            solutions.append(
                Solution(
                    solution_id,
                    problem.question,
                    chunks,
                    separator="",
                    is_begun=name != names[0],
                )
            )
    judged = judge(solutions) if solutions else []
    judgments_of = {x.solution_id: found for x, found in zip(solutions, judged, strict=True)}
    found = []
    for b, (problem, name) in enumerate(samples):
        ids, length = completions[b].tokens.tolist(), len(policy.prompt_ids(problem))
        text = completion_text(tokenizer, ids)
        prompt = policy.engine.spent_on(read=length)
        judgments = judgments_of.get(f"{problem.problem_id}/{name}", [])
        found.append(
            Found(
                problem,
                name,
                answer=extract_answer(text) or "",
                completion=text,
                accepted_tokens=len(ids),
                policy=prompt + policy.engine.spent_on(before=length, generated=len(ids)),
                chunk_scores=tuple(judgment.p_positive for judgment in judgments),
                scoring=spent_on(judgments),
                prompt_flops=prompt.flops,
            )
        )
    return found

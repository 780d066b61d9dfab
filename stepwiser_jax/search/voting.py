"""Chooses one solution, or one answer, of several by the scores of their chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from statistics import fmean

from stepwiser_jax.records import Problem
from stepwiser_jax.tasks.verifier import Verifier

AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "mean": fmean,
    "last": lambda scores: scores[-1],
    "product": math.prod,
}
"""Functions from the scores of a solution's chunks, at least one, to its score (Lightman et al.
2023; Snell et al. 2024)."""


def best(scores: Sequence[float]) -> int:
    """Returns the index of the highest score, the first of equals."""
    return max(range(len(scores)), key=scores.__getitem__)


def vote(answers: Sequence[str], weights: Sequence[float] | None = None) -> str:
    """Returns the answer with the largest sum of weights (1 each by default), the first of equals.
    An empty answer has no vote; if all are empty, so is the result."""
    votes: dict[str, float] = {}
    for answer, weight in zip(answers, weights or [1.0] * len(answers), strict=True):
        if answer:
            votes[answer] = votes.get(answer, 0.0) + weight
    return max(votes, key=votes.__getitem__, default="")


def in_first_words(
    problems: Sequence[Problem], answers: Sequence[str], verifier: Verifier
) -> list[str]:
    """Returns each answer in the words of the first answer to its problem that means the same, so
    that `vote` counts `1/2` and `\\frac12` as one. Empty answers stay empty.

    Two answers mean the same if the verifier accepts each of them when the other is the reference.
    That holds for `mathematics`. A verifier that looks for other things might accept all right
    answers for one another, and votes would then know which they are: with it only equal texts are
    the same.
    """
    if not verifier.compares_meanings:
        return list(answers)
    distinct: dict[str, dict[str, None]] = {}
    for problem, answer in zip(problems, answers, strict=True):
        distinct.setdefault(problem.problem_id, {})[answer] = None
    words: dict[str, dict[str, str]] = {}
    asking = {name: _first_words([a for a in of_one if a]) for name, of_one in distinct.items()}
    replies: dict[str, bool | None] = dict.fromkeys(asking)
    while asking:
        pairs: dict[str, tuple[str, str]] = {}
        for name, questions in list(asking.items()):
            try:
                pairs[name] = questions.send(replies[name])
            except StopIteration as end:
                words[name] = end.value
                del asking[name]
        found = verifier.same([a for a, _ in pairs.values()], [b for _, b in pairs.values()])
        replies = dict(zip(pairs, found, strict=True))
    return [
        words[problem.problem_id].get(answer, "")
        for problem, answer in zip(problems, answers, strict=True)
    ]


def _first_words(
    distinct: Sequence[str],
) -> Generator[tuple[str, str], bool | None, dict[str, str]]:
    """Yields (answer, reference) to compare, one question at a time, and is sent the replies; None
    says that it took too long. Returns the first words of each answer.

    An answer is compared with the first answer of each meaning so far. Two that take too long are
    compared with nothing else, since either may be the cause: so none costs two deadlines.
    """
    words: dict[str, str] = {}
    first: list[str] = []  # of each meaning
    for answer in distinct:
        for reference in first:
            reply = yield answer, reference
            if reply:
                reply = yield reference, answer
            if reply is None:
                first.remove(reference)
                words[answer] = answer
            elif reply:
                words[answer] = reference
            if answer in words:
                break
        else:
            words[answer] = answer
            first.append(answer)
    return words

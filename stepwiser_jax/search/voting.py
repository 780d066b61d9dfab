"""Chooses one solution, or one answer, of several by the scores of their chunks."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
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
    that `vote` counts `1/2` and `\\frac12` as one.

    Two answers mean the same if the verifier accepts each of them when the other is the reference.
    Empty answers stay empty.
    """
    asked: dict[str, tuple[Problem, list[str]]] = {}
    for problem, answer in zip(problems, answers, strict=True):
        _, distinct = asked.setdefault(problem.problem_id, (problem, []))
        if answer and answer not in distinct:
            distinct.append(answer)
    pairs = [
        (problem, answer, reference)
        for problem, distinct in asked.values()
        for answer, reference in itertools.permutations(distinct, 2)
    ]
    replies = verifier.verify(
        [f"\\boxed{{{answer}}}" for _, answer, _ in pairs],
        [dataclasses.replace(problem, answer=reference) for problem, _, reference in pairs],
    )
    accepted = {
        (problem.problem_id, answer, reference)
        for (problem, answer, reference), reply in zip(pairs, replies, strict=True)
        if reply
    }
    words: dict[tuple[str, str], str] = {}
    for name, (_, distinct) in asked.items():
        first: list[str] = []  # of each meaning
        for answer in distinct:
            same = (w for w in first if {(name, answer, w), (name, w, answer)} <= accepted)
            words[name, answer] = word = next(same, answer)
            if word == answer:
                first.append(answer)
    return [
        words.get((problem.problem_id, answer), "")
        for problem, answer in zip(problems, answers, strict=True)
    ]

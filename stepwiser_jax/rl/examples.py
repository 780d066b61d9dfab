"""Turns chunk labels into examples for judges and classifiers (StepWiser 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np

from stepwiser_jax.errors import UserError
from stepwiser_jax.records import (
    ChunkLabel,
    ClassifierExample,
    JudgeExample,
    PrefixValue,
    Problem,
    Trajectory,
)
from stepwiser_jax.rl.adaptive import LabelTable
from stepwiser_jax.text.chunks import chunk_texts
from stepwiser_jax.text.prompts import JudgePromptStyle, encode_judge_prompt
from stepwiser_jax.text.tokenizer import Tokenizer


def label_values(
    values: Sequence[PrefixValue], table: LabelTable, rule: str
) -> list[ChunkLabel | None]:
    """Labels the chunks of one trajectory.

    Args:
        values: The values of its prefixes 0..J, in any order.
        table: The rule's labels for the number of rollouts of this trajectory.
        rule: The rule's name, written into the labels.

    Returns:
        J labels, None for chunks that teach nothing. If not all rollouts of a prefix were sampled,
        the label is the likeliest one (`rl/adaptive.py`).

    Raises:
        UserError: A prefix has no value.
    """
    of_prefix = {value.num_chunks: value for value in values}
    if sorted(of_prefix) != list(range(len(of_prefix))):
        raise UserError(
            f"expected values of the prefixes 0..J of {values[0].trajectory_id}, found "
            f"{sorted(of_prefix)}"
        )
    labels: list[ChunkLabel | None] = []
    for v, q in pairwise(of_prefix[j] for j in range(len(of_prefix))):
        positive = table.likeliest(q.counts, v.counts)
        label = ChunkLabel(v.trajectory_id, v.num_chunks, q.value, v.value, bool(positive), rule)
        labels.append(None if positive is None else label)
    return labels


class Labelled(Protocol):
    @property
    def is_positive(self) -> bool: ...


L = TypeVar("L", bound=Labelled)


def balanced(examples: Sequence[L], seed: int) -> list[L]:
    """Returns all examples of the smaller class, and as many of the larger one, drawn from the
    whole set (paper 4.1), in the order given."""
    of_class = {
        positive: [i for i, example in enumerate(examples) if example.is_positive is positive]
        for positive in (True, False)
    }
    size = min(map(len, of_class.values()))
    rng = np.random.default_rng(seed)
    chosen = np.concatenate(
        [rng.choice(np.array(rows, int), size, replace=False) for rows in of_class.values()]
    )
    return [examples[i] for i in sorted(chosen)]


def ids_of_texts(trajectory: Trajectory, judged: Sequence[ChunkLabel]) -> list[np.ndarray]:
    """Returns the token ids of the texts that examples are made of: the chunks of a trajectory,
    then what comes before each of the `judged` ones. A chunk that was cut short is left out, since
    a classifier reads the whole solution and would see the cut."""
    ids, ends = trajectory.completion_ids, (0, *trajectory.chunk_ends)  # read once
    chunks = [ids[start:end] for start, end in pairwise(ends[: -1 if trajectory.is_cut else None])]
    return chunks + [ids[: ends[label.chunk_index]] for label in judged]


def classifier_example(
    labels: Sequence[ChunkLabel], trajectory: Trajectory, question: str, chunks: Sequence[str]
) -> ClassifierExample:
    """Returns a trajectory of these chunks with its labels, in order."""
    return ClassifierExample(
        solution_id=trajectory.trajectory_id,
        problem_id=trajectory.problem_id,
        question=question,
        chunks=tuple(chunks),
        labelled=tuple(label.chunk_index for label in labels),
        is_positive=tuple(label.is_positive for label in labels),
        q=tuple(label.q for label in labels),
    )


def judge_example(solution: ClassifierExample, index: int, history: str) -> JudgeExample:
    """Returns the example of a solution's labelled chunk number `index`, after the text
    `history`, the exact text of the chunks before it."""
    chunk = solution.labelled[index]
    return JudgeExample(
        example_id=f"{solution.solution_id}/{chunk}",
        problem_id=solution.problem_id,
        question=solution.question,
        history=history,
        chunk=solution.chunks[chunk],
        is_positive=solution.is_positive[index],
    )


class PromptLengths:
    """The lengths of judge prompts in tokens, and their limit of paper 4.1."""

    def __init__(self, tokenizer: Tokenizer, style: JudgePromptStyle, longest: int):
        self.tokenizer = tokenizer
        self.style: JudgePromptStyle = style
        self.longest = longest
        self._without_chunks: dict[str, int] = {}

    def fits(self, trajectory: Trajectory, chunk: int, problem: Problem) -> bool:
        """Returns whether the prompt about a chunk is short enough.

        Text that is encoded again has nearly as many tokens as were sampled, less those of tags. So
        a prompt is only encoded if that estimate is more than half the limit.
        """
        if problem.problem_id not in self._without_chunks:
            self._without_chunks[problem.problem_id] = self._length(problem.question, "", "")
        length = self._without_chunks[problem.problem_id] + trajectory.chunk_ends[chunk]
        if length > self.longest / 2:
            start = trajectory.chunk_ends[chunk - 1] if chunk else 0
            ids = trajectory.completion_ids
            texts = chunk_texts(self.tokenizer, ids, (start, trajectory.chunk_ends[chunk]))
            length = self._length(problem.question, *texts)
        return length <= self.longest

    def _length(self, question: str, history: str, chunk: str) -> int:
        return len(encode_judge_prompt(self.tokenizer, question, history, chunk, self.style))

"""Puts together what runs say of each solution: its chunks, their values and labels, and verdicts.

Several runs may hold the same solution: the one that sampled it, one that measured its values, one
that labelled its chunks, and a run of `evaluate` for each judge. They are one solution here if the
id and all chunks are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from stepwiser_jax.records import Verdict

Written = tuple[str, float, str]
"""A judgment: its verdict, P(Positive), and what the judge wrote."""


@dataclass
class Judged:
    """What one judge says of a solution.

    Attributes:
        chunks: The judgments of each chunk, the greedy one first; none if it was not judged.
        whole: The judgments of the whole solution, if the judge gives any.
        predicted: The first error that the judge predicts, -1 for none; None if that is not known.
    """

    chunks: list[list[Written]]
    whole: list[Written] = field(default_factory=list)
    predicted: int | None = None


@dataclass
class ShownSolution:
    """A solution, with what is known of it. Lists have an entry for each chunk.

    Attributes:
        id: Its id in its data set or run.
        origin: The data set or run that it is from.
        subset: The part of the data set.
        question: The problem.
        answer: The reference answer.
        chunks: Texts.
        values: `[right, sampled]` before the first chunk and after each; None where it is not
            known.
        labels: The labels that follow from values, None where there is none.
        truth: Whether each chunk is right, as the benchmark or the task itself says; None where it
            says nothing, as after the first error.
        first_error: The index of the first wrong chunk by the truth, -1 for none.
        is_correct: Whether the final answer is right.
        is_cut: Whether the length limit ended it.
        tokens: The number of its tokens.
        judged: What each judge says, by the number of its run.
    """

    id: str
    origin: str
    subset: str
    question: str
    chunks: list[str]
    answer: str = ""
    values: Sequence[Sequence[float] | None] | None = None
    labels: list[bool | None] | None = None
    truth: list[bool | None] | None = None
    first_error: int | None = None
    is_correct: bool | None = None
    is_cut: bool = False
    tokens: int | None = None
    judged: dict[int, Judged] = field(default_factory=dict)


class Solutions:
    """The solutions of a report, without repetitions and in the order in which they were added."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, tuple[str, ...]], ShownSolution] = {}

    def __iter__(self):
        return iter(self._found.values())

    def __len__(self) -> int:
        return len(self._found)

    def add(self, solution: ShownSolution) -> ShownSolution:
        """Adds a solution, or what it says of one that is there. Returns the one that is kept."""
        kept = self._found.setdefault((solution.id, tuple(solution.chunks)), solution)
        if kept is not solution:
            for name, value in vars(solution).items():
                if getattr(kept, name) in (None, "", False):
                    setattr(kept, name, value)
            kept.judged |= solution.judged
        return kept


# --- the index ----------------------------------------------------------------------------------

WRONG_ANSWER, CUT, LABEL_NOT_TRUTH, HAS_VALUES, HAS_LABELS = 1, 2, 4, 8, 16
"""What the index says of a solution, as bits."""

JUDGED, WRONG_VERDICT, MISSED, NOT_LABEL, UNPARSED = 1, 2, 4, 8, 16
"""What it says of a judge and a solution: the judge has judged it, gave some chunk a verdict that
the truth contradicts, predicts another first error, contradicts a label that follows from values,
or gave some chunk no verdict."""

SNIPPET = 160
"""Characters of the question that the index holds."""


def flags_of(solution: ShownSolution) -> int:
    """Returns what the index says of a solution."""
    labels, truth = solution.labels or [], solution.truth or []
    differs = any(
        None not in (label, right) and label != right
        for label, right in zip(labels, truth, strict=False)
    )
    return (
        WRONG_ANSWER * (solution.is_correct is False)
        + CUT * solution.is_cut
        + LABEL_NOT_TRUTH * differs
        + HAS_VALUES * (solution.values is not None)
        + HAS_LABELS * (solution.labels is not None)
    )


def judge_flags_of(solution: ShownSolution, judge: int) -> int:
    """Returns what the index says of a judge and a solution, by the greedy judgments."""
    judged = solution.judged.get(judge)
    if judged is None:
        return 0
    verdicts = [votes[0][0] if votes else None for votes in judged.chunks]
    return (
        JUDGED
        + WRONG_VERDICT * _contradicts(verdicts, solution.truth)
        + MISSED * (None not in (judged.predicted, solution.first_error)
                    and judged.predicted != solution.first_error)
        + NOT_LABEL * _contradicts(verdicts, solution.labels)
        + UNPARSED * any(v in (Verdict.UNPARSED.value, Verdict.OTHER.value) for v in verdicts)
    )  # fmt: skip


def _contradicts(verdicts: Sequence[str | None], labels: Sequence[bool | None] | None) -> bool:
    """Returns whether some chunk has a verdict and a label that says the contrary."""
    contrary = {True: Verdict.NEGATIVE.value, False: Verdict.POSITIVE.value}
    pairs = zip(verdicts, labels or [], strict=False)
    return any(label is not None and given == contrary[label] for given, label in pairs)


def index_of(solutions: Sequence[ShownSolution], judges: int) -> dict[str, Any]:
    """Returns columns with an entry for each solution, which are all that filters need."""
    origins = list(dict.fromkeys(solution.origin for solution in solutions))
    subsets = list(dict.fromkeys(solution.subset for solution in solutions))
    return {
        "id": [s.id for s in solutions],
        "snippet": [" ".join(s.question[: 2 * SNIPPET].split())[:SNIPPET] for s in solutions],
        "origins": origins,
        "origin": [origins.index(s.origin) for s in solutions],
        "subsets": subsets,
        "subset": [subsets.index(s.subset) for s in solutions],
        "chunks": [len(s.chunks) for s in solutions],
        "flags": [flags_of(s) for s in solutions],
        "judge_flags": [[judge_flags_of(s, judge) for s in solutions] for judge in range(judges)],
    }


def as_fields(solution: ShownSolution) -> Mapping[str, Any]:
    """Returns a solution as plain data, without what says nothing."""
    return {key: value for key, value in asdict(solution).items() if value not in (None, {}, "")}

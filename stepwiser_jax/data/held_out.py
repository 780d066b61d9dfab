"""Finds training data that occurs in evaluation sets, by the text of the problem.

Problems are equal if their texts are, except for white space: copies of a data set differ in little
else. ProcessBench-GSM8K lies in GSM8K's test split, two other ProcessBench problems in MATH's train
split; PRMBench takes 401 problems from MATH's train split and 307 from MATH500.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from stepwiser_jax.config import DataSource
from stepwiser_jax.data.rows import columns_of, read_rows, shuffled
from stepwiser_jax.errors import UserError
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import (
    ClassifierExample,
    Dialogue,
    JudgeExample,
    LabelledSolution,
    Problem,
    SftExample,
)

R = TypeVar("R", Problem, LabelledSolution, JudgeExample, ClassifierExample)
Example = JudgeExample | ClassifierExample | SftExample | Dialogue
E = TypeVar("E", bound=Example)

_COLUMNS = ("problem", "question", "original_question", "modified_question")


def without_spaces(text: str) -> str:
    return "".join(text.split())


def is_held_out(record: R, held_out: frozenset[str]) -> bool:
    return without_spaces(record.question) in held_out


def drop_held_out(
    records: Sequence[R], held_out: frozenset[str], dropped: Counter[str] | None = None
) -> list[R]:
    """Returns the records whose question is not in `held_out` (see `held_out_questions`). The
    others are counted in `dropped`. Raises UserError if none is left."""
    kept = [record for record in records if not is_held_out(record, held_out)]
    if records and not kept:
        raise UserError(
            f"none of {len(records)} records is left: `exclude` has the problems of all of them"
        )
    if dropped is not None and len(kept) < len(records):
        dropped["excluded"] += len(records) - len(kept)
    return kept


def held_out_questions(sources: Iterable[str]) -> frozenset[str]:
    """Returns all problem texts, without white space, of local files, finished `rollout` runs, or
    hub data sets (all their splits). Raises UserError for a row without a problem."""
    questions: set[str] = set()
    for source in sources:
        if Path(source).is_dir():
            problems = read_records(source, Problem)
            questions.update(without_spaces(problem.question) for problem in problems)
            continue
        for _, where, row in read_rows(source):
            try:
                questions.update(map(without_spaces, _questions(columns_of(row))))
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
    return frozenset(questions)


def _questions(row: dict[str, Any]) -> list[str]:
    """Returns the problem's texts: PRMBench has three wordings, PRM800K an object with one."""
    question = row.get("question")
    texts = [row.get(column) for column in _COLUMNS]
    texts += [question.get("problem")] if isinstance(question, dict) else []
    found = [text for text in texts if isinstance(text, str) and text.strip()]
    if not found:
        raise UserError(f"expected a 'problem' or 'question', found {sorted(row)}")
    return found


# --- examples that validate a training ----------------------------------------------------------


def part_of(examples: Sequence[E], data: DataSource) -> list[E]:
    """Returns the examples that `shuffle`, `seed` and `limit` of `data` choose. Shuffled, they are
    those of whole problems, until there are `limit` of them or more: what is left of a problem
    could not be learned (`drop_problems_of`)."""
    if not data.shuffle:
        return list(examples[: data.limit])
    rows_of: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        for name in _names_of_problem(example):
            rows_of[name].append(i)
    limit = len(examples) if data.limit is None else data.limit
    chosen: dict[int, None] = {}
    for first in shuffled({rows[0] for rows in rows_of.values()}, data.seed):
        if len(chosen) >= limit:
            break
        problem: set[int] = set()
        found = {first}
        while found != problem:  # of two wordings, each may have a name that the other has not
            problem, names = found, {x for i in found for x in _names_of_problem(examples[i])}
            found = {i for name in names for i in rows_of[name]}
        chosen |= dict.fromkeys(sorted(problem))
    return [examples[i] for i in chosen]


def drop_problems_of(
    held_out: Sequence[E], examples: Sequence[E], dropped: Counter[str]
) -> list[E]:
    """Returns the examples whose problem no held-out example has. The others are counted in
    `dropped`. Raises UserError if none is left."""
    problems = {name for example in held_out for name in _names_of_problem(example)}
    kept = [example for example in examples if problems.isdisjoint(_names_of_problem(example))]
    if len(kept) < len(examples):
        dropped["validation"] += len(examples) - len(kept)
    if examples and not kept:
        raise UserError(
            f"none of {len(examples)} examples is left to learn: validation.examples has the "
            "problems of all of them: set validation.examples.limit, or name other examples"
        )
    return kept


def _names_of_problem(example: Example) -> set[tuple[str, str]]:
    """Returns what two examples of one problem share. A demonstration does not hold its problem
    apart from its prompt, so it goes by the id of the problem too."""
    if isinstance(example, JudgeExample | ClassifierExample):
        return {("text", without_spaces(example.question))}
    is_dialogue = isinstance(example, Dialogue)
    prompt = example.texts[example.roles.index("user")] if is_dialogue else example.prompt
    return {("text", without_spaces(prompt)), ("id", example.problem_id)}

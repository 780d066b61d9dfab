"""Data sets -> records: problems with reference answers, and ProcessBench items.

A source is a hub id or a local jsonl, json or parquet file, read through `datasets`. Known by their
columns: GSM8K (`question`, `answer` with ####), MATH (`problem`, `answer` or a `solution` with
\\boxed{}), ProcessBench (`steps`, `label`), and our own records.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepwiser_jax.records import (
    ClassifierExample,
    JudgeExample,
    Problem,
    ProcessBenchItem,
    UserError,
    read_records,
)
from stepwiser_jax.text.answers import extract_answer

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def read_rows(
    source: str, *, split: str | None = None, subset: str | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Rows of a local file, or of `split` ('train' by default) and `subset` of a hub data set.

    Raises UserError for a missing or unreadable source, an unknown split, and an empty set.
    """
    import datasets

    path = Path(source)
    if not path.is_file() and (path.suffix in _FORMATS or source.startswith((".", "/"))):
        raise UserError(f"expected a data file at {source}, found nothing")
    try:
        if path.is_file():
            if path.suffix not in _FORMATS:
                raise UserError(f"expected a {sorted(_FORMATS)} file, found {source}")
            if path.stat().st_size == 0:
                raise UserError(f"{source} is empty: expected at least one row")
            table = datasets.load_dataset(
                _FORMATS[path.suffix], data_files=str(path), split="train"
            )
        else:
            table = datasets.load_dataset(source, subset, split=split or "train")
    except UserError:
        raise
    except Exception as error:  # datasets raises many types for one thing: it cannot read this
        raise UserError(f"cannot read the data set {source}: {error.__cause__ or error}") from None
    rows: list[Any] = list(table.select(range(min(limit or len(table), len(table)))))
    if not rows:
        raise UserError(f"{source} is empty: expected at least one row")
    return rows


def load_problems(
    source: str, *, split: str | None = None, subset: str | None = None, limit: int | None = None
) -> list[Problem]:
    """Problems with their reference answers; raises UserError for a row without one."""
    stem = Path(source).parent.name if Path(source).is_file() else source.rsplit("/", 1)[-1]
    part = Path(source).stem if Path(source).is_file() else (split or "train")
    problems = []
    for number, row in enumerate(read_rows(source, split=split, subset=subset, limit=limit)):
        where = f"{source}, row {number + 1}"
        question = row.get("question") or row.get("problem")
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"{where}: expected a 'question' or 'problem', found {sorted(row)}")
        problems.append(
            Problem(
                problem_id=str(row.get("problem_id") or f"{stem}/{part}/{number:06d}"),
                question=question.strip(),
                answer=_reference(row, where),
                source=row.get("source") or stem,
            )
        )
    _refuse_doubles(source, [problem.problem_id for problem in problems])
    return problems


def _refuse_doubles(source: str, ids: Sequence[str]) -> None:
    """Ids name records and noise: two of the same would be taken for one."""
    seen: set[str] = set()
    for number, record_id in enumerate(ids, 1):
        if record_id in seen:
            raise UserError(f"{source}, row {number}: the id {record_id!r} is there twice")
        seen.add(record_id)


def _reference(row: dict[str, Any], where: str) -> str:
    """The final answer: as it is given, or out of a worked solution."""
    for column in ("answer", "solution"):
        text = row.get(column)
        if text is None or not str(text).strip():
            continue
        extracted = extract_answer(str(text))
        if extracted is not None:
            return extracted
        if column == "answer":
            return str(text).strip()
    raise UserError(
        f"{where}: the problem has no answer: expected an 'answer', or a 'solution' with "
        f"\\boxed{{}} or ####, found the columns {sorted(row)}"
    )


def _first(row: dict[str, Any], *columns: str) -> Any:
    """What stands in the first of the columns that holds something; None where none does."""
    return next((row[column] for column in columns if row.get(column) is not None), None)


def load_processbench(
    source: str, *, split: str | None = None, limit: int | None = None
) -> list[ProcessBenchItem]:
    """ProcessBench's own files (label = index of the first wrong step, -1: none), or our
    records."""
    items = []
    for number, row in enumerate(read_rows(source, split=split, limit=limit)):
        item_id, question = _first(row, "item_id", "id"), _first(row, "question", "problem")
        steps, label = _first(row, "steps"), _first(row, "label", "first_error")
        final = _first(row, "final_answer_correct")
        is_right = {
            "an 'id', a text": isinstance(item_id, str),
            "a 'problem', a text": isinstance(question, str),
            "'steps', a list of at least one": isinstance(steps, list) and bool(steps),
            "a 'label', the index of a step": isinstance(label, int),
            "'final_answer_correct', true or false": isinstance(final, bool),
        }
        if not all(is_right.values()):
            missing = "; ".join(name for name, right in is_right.items() if not right)
            raise UserError(
                f"{source}, row {number + 1}: expected {missing}, found the columns {sorted(row)}"
            )
        if not -1 <= label < len(steps):
            raise UserError(
                f"{source}, row {number + 1}: expected a label from -1 to {len(steps) - 1} for "
                f"{len(steps)} steps, found {label}"
            )
        items.append(
            ProcessBenchItem(
                item_id=item_id,
                subset=row.get("subset") or item_id.rsplit("-", 1)[0],
                question=question,
                steps=tuple(steps),
                first_error=label,
                final_answer_correct=final,
            )
        )
    _refuse_doubles(source, [item.item_id for item in items])
    return items


def load_judge_examples(source: str) -> list[JudgeExample]:
    """JudgeExample records of a JSONL file or a finished `label` run; from any other file,
    ProcessBench items, whose human step labels become chunk labels."""
    path = Path(source)
    if path.is_file() and path.suffix != ".jsonl":
        return processbench_to_judge_examples(load_processbench(source))
    return read_records(source, JudgeExample)


def processbench_to_judge_examples(items: Sequence[ProcessBenchItem]) -> list[JudgeExample]:
    """Human step labels as chunk labels: every step up to and including the first error."""
    examples = []
    for item in items:
        last = len(item.steps) - 1 if item.first_error == -1 else item.first_error
        for step in range(last + 1):
            examples.append(
                JudgeExample(
                    example_id=f"{item.item_id}/{step}",
                    problem_id=item.item_id,
                    question=item.question,
                    history="\n\n".join(item.steps[:step]),
                    chunk=item.steps[step],
                    is_positive=step != item.first_error,
                )
            )
    return examples


def load_classifier_examples(source: str) -> list[ClassifierExample]:
    """ClassifierExample records of a JSONL file or a finished `label` run; from any other file,
    ProcessBench items with their human labels. Raises UserError where there are none, or where
    one's labels are not of its chunks."""
    path = Path(source)
    if path.is_file() and path.suffix != ".jsonl":
        return processbench_to_classifier_examples(load_processbench(source))
    solutions = read_records(source, ClassifierExample)
    if not solutions:
        raise UserError(f"expected classifier examples in {source}, found none")
    for solution in solutions:
        labelled = solution.labelled
        ascending = list(labelled) == sorted(set(labelled))
        inside = set(labelled) <= set(range(len(solution.chunks)))
        paired = len(labelled) == len(solution.is_positive) == len(solution.q)
        if not (
            labelled and ascending and inside and paired and all(0 <= q <= 1 for q in solution.q)
        ):
            raise UserError(
                f"{source}: {solution.solution_id} has {len(solution.chunks)} chunks: expected "
                "'labelled' to be ascending indices of them, at least one, with an 'is_positive' "
                f"and a 'q' from 0 to 1 each, found {labelled}, {solution.is_positive} and "
                f"{solution.q}"
            )
    return solutions


def processbench_to_classifier_examples(
    items: Sequence[ProcessBenchItem],
) -> list[ClassifierExample]:
    """Human step labels up to and including the first error; a right step is worth 1."""
    solutions = []
    for item in items:
        last = len(item.steps) - 1 if item.first_error == -1 else item.first_error
        is_positive = tuple(step != item.first_error for step in range(last + 1))
        solutions.append(
            ClassifierExample(
                solution_id=item.item_id,
                problem_id=item.item_id,
                question=item.question,
                chunks=item.steps,
                labelled=tuple(range(last + 1)),
                is_positive=is_positive,
                q=tuple(map(float, is_positive)),
            )
        )
    return solutions

"""Reads data sets: problems with answers, solutions with labelled steps, benchmarks of judges.

Rows are known by their columns: GSM8K (`question`, `answer` with ####), MATH and NuminaMath-CoT
(`problem`, `answer` or a `solution` with \\boxed{}), the step-labelled formats of
`data.step_formats`, and our own records. `data.rows` reads the files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from stepwiser_jax.data.rows import OnMalformed, Rows, Split, columns_of, parse_rows, read_rows
from stepwiser_jax.data.step_formats import (
    BAD_PROBLEM,
    error_steps_past_the_end,
    is_prmbench,
    parse_solutions,
    prmbench_items,
    to_classifier_examples,
    to_judge_examples,
    to_processbench_items,
)
from stepwiser_jax.errors import UserError
from stepwiser_jax.record_io import read_records
from stepwiser_jax.record_lines import from_fields
from stepwiser_jax.records import (
    BenchmarkItem,
    ClassifierExample,
    JudgeExample,
    LabelledSolution,
    Problem,
)
from stepwiser_jax.tasks.mathematics import extract_answer

Example = TypeVar("Example", JudgeExample, ClassifierExample)

USED_COLUMNS = {"problem_id", "question", "problem", "answer", "solution", "source", "messages"}
"""Columns of a problem's row that are not kept in `Problem.extra`."""


def load_problems(
    source: str,
    rows: Rows | None = None,
    *,
    split: str | None = None,
    subset: str | None = None,
    shuffle_seed: int | None = None,
    is_excluded: Callable[[Problem], bool] = lambda problem: False,
    limit: int | None = None,
    on_malformed: OnMalformed = "stop",
    dropped: Counter[str] | None = None,
    needs_answer: bool = True,
) -> list[Problem]:
    """Returns problems with their answers; see `read_rows` and `parse_rows` for the arguments.

    Args:
        source: File or hub id, from which ids are made.
        rows: The source's rows. By default they are read from it, from a hub data set those of
            the split 'train'.
        needs_answer: Whether a row without an answer is malformed.
    """
    part = _name(source, split)
    if rows is None:
        rows = read_rows(source, split=split or "train", subset=subset, shuffle_seed=shuffle_seed)

    def parse(row: Any, number: int) -> list[Problem]:
        if isinstance(row, Problem):
            return [row]
        row = columns_of(row)
        question = row.get("question") or row.get("problem")
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"expected a 'question' or 'problem', found {sorted(row)}")
        others = {name: row[name] for name in row.keys() - USED_COLUMNS if row[name] is not None}
        return [
            Problem(
                problem_id=str(row.get("problem_id") or f"{part}/{number:06d}"),
                question=question.strip(),
                answer=_find_answer(row, needs_answer),
                source=str(row.get("source") or part.rsplit("/", 1)[0]),
                extra=json.loads(json.dumps(others, default=str, sort_keys=True)),
            )
        ]

    return parse_rows(
        rows,
        parse,
        is_excluded=is_excluded,
        limit=limit,
        on_malformed=on_malformed,
        dropped=dropped,
    )


def _name(source: str, split: Split) -> str:
    """Returns what ids begin with: the data set and the part of it."""
    path = Path(source)
    if path.is_file():
        return f"{path.parent.name}/{path.stem}".removeprefix("/")
    part = split if isinstance(split, str) else "+".join(split or ["train"])
    return f"{source.rsplit('/', 1)[-1]}/{part}"


def _find_answer(row: dict[str, Any], needed: bool) -> str:
    """Returns the final answer: the given one, or that of a worked solution."""
    for column in ("answer", "solution"):
        text = row.get(column)
        if text is None or not str(text).strip():
            continue
        extracted = extract_answer(str(text))
        if extracted is not None:
            return extracted
        if column == "answer":
            return str(text).strip()
    if not needed:
        return ""
    raise UserError(
        "the problem has no answer: expected an 'answer', or a 'solution' with \\boxed{} or ####, "
        f"found the columns {sorted(row)} (on_malformed: skip leaves such rows out; a verifier of "
        "other answers needs none)"
    )


def load_solutions(
    source: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    on_malformed: OnMalformed = "stop",
    dropped: Counter[str] | None = None,
) -> list[LabelledSolution]:
    """Returns solutions with labelled steps, in any format that `data.step_formats` knows. Without
    `split` a hub data set gives all its splits."""
    part = _name(source, split)
    return parse_rows(
        read_rows(source, split=split),
        lambda row, number: _solutions(columns_of(row), f"{part}/{number:06d}", dropped),
        limit=limit,
        on_malformed=on_malformed,
        dropped=dropped,
    )


def load_benchmark(
    source: str,
    *,
    split: Split = None,
    on_malformed: OnMalformed = "stop",
    dropped: Counter[str] | None = None,
) -> list[BenchmarkItem]:
    """Returns solutions to score a judge with: those of PRMBench, or those of ProcessBench (label =
    index of the first wrong step, -1: none), our records, and the whole solutions of other formats.
    A row without a whole solution is malformed.

    Five solutions of PRMBench repeat an id. They are left out, as by its own loader, and `dropped`
    counts them as `repeated`.

    Raises UserError for a source that holds both benchmarks, since their scores differ.
    """
    part = _name(source, split)
    seen: set[str] = set()

    def parse(row: Any, number: int) -> list[BenchmarkItem]:
        row = columns_of(row)
        if not is_prmbench(row):
            solutions = _solutions(row, f"{part}/{number:06d}", dropped)
            return list(to_processbench_items(solutions))
        _count_past_the_end(row, dropped)
        items = [item for item in prmbench_items(row) if item.item_id not in seen]
        if not items and dropped is not None:
            dropped["repeated"] += 1
        seen.update(item.item_id for item in items)
        return list(items)

    rows = read_rows(source, split=split or "train")
    items = parse_rows(rows, parse, on_malformed=on_malformed, dropped=dropped)
    if len({type(item) for item in items}) > 1:
        raise UserError(
            f"{source}: expected rows of PRMBench or of ProcessBench, found both; their scores are "
            "different ones: make a file of each"
        )
    return items


def _solutions(
    row: dict[str, Any], row_id: str, dropped: Counter[str] | None
) -> list[LabelledSolution]:
    """Returns the solutions of a row, and counts what is ignored in it."""
    solutions = parse_solutions(row, row_id)
    if is_prmbench(row):
        _count_past_the_end(row, dropped)
    return solutions


def _count_past_the_end(row: dict[str, Any], dropped: Counter[str] | None) -> None:
    past_the_end = error_steps_past_the_end(row)
    if past_the_end and dropped is not None:
        dropped["error_steps_past_the_end"] += past_the_end


def load_judge_examples(
    source: str, *, on_malformed: OnMalformed = "stop", dropped: Counter[str] | None = None
) -> list[JudgeExample]:
    """Returns the JudgeExample records of a file or a finished `label` run, or the labelled steps
    of others' solutions (`data.step_formats`), of all splits of a hub data set. Rows of PRM800K
    whose labeller found the problem itself wrong give none."""
    kind = (JudgeExample, "example_id", to_judge_examples)
    return _load_examples(source, *kind, on_malformed=on_malformed, dropped=dropped)


def load_classifier_examples(
    source: str, *, on_malformed: OnMalformed = "stop", dropped: Counter[str] | None = None
) -> list[ClassifierExample]:
    """Returns the ClassifierExample records of a file or a finished `label` run, or others'
    solutions, as `load_judge_examples` reads them."""
    kind = (ClassifierExample, "labelled", to_classifier_examples)
    return _load_examples(source, *kind, on_malformed=on_malformed, dropped=dropped)


def _load_examples(
    source: str,
    record_type: type[Example],
    column: str,
    to_examples: Callable[[Iterable[LabelledSolution]], Iterable[Example]],
    *,
    on_malformed: OnMalformed,
    dropped: Counter[str] | None,
) -> list[Example]:
    """Returns the records of a run or a file, whose rows have this column, or makes them of others'
    solutions."""
    if Path(source).is_dir():
        return read_records(source, record_type)
    part = _name(source, None)

    def parse(row: Any, number: int) -> list[Example]:
        row = columns_of(row)
        if column in row:
            return [from_fields(row, record_type)]
        solutions = _solutions(row, f"{part}/{number:06d}", dropped)
        return list(to_examples(_of_sound_problems(solutions, dropped)))

    return parse_rows(read_rows(source), parse, on_malformed=on_malformed, dropped=dropped)


def _of_sound_problems(
    solutions: Sequence[LabelledSolution], dropped: Counter[str] | None
) -> Sequence[LabelledSolution]:
    """Returns the solutions, none if PRM800K's labeller found fault with the problem itself."""
    if all(solution.finish_reason != BAD_PROBLEM for solution in solutions):
        return solutions
    if dropped is not None:
        dropped[BAD_PROBLEM] += 1
    return []

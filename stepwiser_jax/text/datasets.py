"""Data sets -> records: problems with reference answers, solutions with labelled steps.

A source is a hub id, or a local file: JSON, one row a line or all in a list, or parquet. Known by
their columns: GSM8K (`question`, `answer` with ####), MATH and NuminaMath-CoT (`problem`, `answer`
or a `solution` with \\boxed{}), the step-labelled formats of `text.solutions`, and our own records.

A malformed row stops the reading with its file and line, or is named in the log, counted as dropped
and left out, as `on_malformed` has it.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from stepwiser_jax.record_files import from_fields, nothing_at, parse_json, read_records
from stepwiser_jax.records import (
    ClassifierExample,
    JudgeExample,
    LabelledSolution,
    Problem,
    ProcessBenchItem,
    Record,
    UserError,
)
from stepwiser_jax.text.answers import extract_answer
from stepwiser_jax.text.solutions import (
    BAD_PROBLEM,
    classifier_examples,
    judge_examples,
    parse_solutions,
    processbench_items,
)

R = TypeVar("R", bound=Record)
OnMalformed = Literal["stop", "skip"]
_SUFFIXES = (".jsonl", ".json", ".parquet")
_log = logging.getLogger(__name__)


# --- rows -----------------------------------------------------------------------------------------


def read_rows(
    source: str, *, split: str | None = None, subset: str | None = None
) -> Iterator[tuple[str, Any]]:
    """(where, row) of a local file, or of `split` (None: all of them) and `subset` of a hub data
    set. A line of JSON comes as it is, unparsed.

    Raises UserError for a missing, unreadable or empty source, and an unknown split.
    """
    path = Path(source)
    if not path.is_file() and (path.suffix in _SUFFIXES or source.startswith((".", "/"))):
        found = f"the directory {path}" if path.is_dir() else nothing_at(path)
        raise UserError(f"expected a data file, found {found}")
    if path.is_file() and path.suffix not in _SUFFIXES:
        raise UserError(f"expected a {sorted(_SUFFIXES)} file, found {source}")
    is_json = path.is_file() and path.suffix != ".parquet"
    rows = _json_rows(path) if is_json else _table_rows(source, split, subset)
    empty = True
    for place, row in rows:
        empty = False
        yield f"{source}, {place}", row
    if empty:
        raise UserError(f"{source} is empty: expected at least one row, found none")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # Not through `datasets`: it gives all rows the same columns and types, and knows no lines.
    with open(path, "rb") as file:
        if file.read(1024).lstrip().startswith(b"["):
            yield from _list_items(path)
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", line


def _list_items(path: Path) -> Iterator[tuple[str, Any]]:
    """The items of a JSON list, each with the line that it begins on."""
    decoder, number = json.JSONDecoder(), 0
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)  # the whole of it, so that what follows need not look at commas
    except ValueError as error:
        raise UserError(f"{path} is not a list in JSON: {error}") from None
    position, line = text.index("[") + 1, 1 + text.count("\n", 0, text.index("[") + 1)
    while True:
        begin = position
        while text[begin] in " \t\r\n,":
            begin += 1
        if text[begin] == "]":
            return
        line += text.count("\n", position, begin)
        item, position = decoder.raw_decode(text, begin)
        number += 1
        yield f"row {number} (line {line})", item
        line += text.count("\n", begin, position)


def _table_rows(source: str, split: str | None, subset: str | None) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        if Path(source).is_file():
            tables = {"train": datasets.load_dataset("parquet", data_files=source, split="train")}
        else:
            tables: Any = datasets.load_dataset(source, subset, split=split)
            tables = tables if split is None else {split: tables}
    except Exception as error:  # datasets raises many types for one thing: it cannot read this
        reason = error.__cause__ or error
        if Path(source).is_file():
            raise UserError(f"cannot read the file {source}: {reason}") from None
        raise UserError(
            f"expected a file, a run or a data set of the hub, found {nothing_at(source)}, and on "
            f"the hub: {reason}"
        ) from None
    for name, table in tables.items():
        of_split = "" if Path(source).is_file() else f"{name} "
        for number, row in enumerate(table, 1):
            yield f"{of_split}row {number}", row


def parse_rows(
    source: str,
    parse: Callable[[dict[str, Any], int], list[R]],
    *,
    split: str | None = None,
    subset: str | None = None,
    limit: int | None = None,
    on_malformed: OnMalformed = "stop",
    dropped: Counter[str] | None = None,
) -> list[R]:
    """The records that `parse` makes of each row and its number, from 0; of the first `limit` good
    rows. What is left out is counted in `dropped`.

    A row is malformed if `parse` raises UserError, or an id was there before: ids name records and
    noise, and two of the same would be taken for one.
    """
    records: dict[str, R] = {}
    good, last_error = 0, None
    for number, (where, row) in enumerate(read_rows(source, split=split, subset=subset)):
        if good == limit:
            break
        try:
            new = parse(columns_of(row), number)
            for record in new:
                if record.record_id in records:
                    raise UserError(f"the id {record.record_id!r} is there twice")
        except UserError as error:
            last_error = UserError(f"{where}: {error}")
            if on_malformed == "stop":
                raise last_error from None
            _log.warning("left out: %s", last_error)
            if dropped is not None:
                dropped["malformed"] += 1
            continue
        good += 1
        records |= {record.record_id: record for record in new}
    if last_error is not None and not good:
        raise UserError(f"all rows are malformed, the last one is {last_error}")
    return list(records.values())


def columns_of(row: Any) -> dict[str, Any]:
    """A row that `read_rows` gave, parsed. Raises UserError unless it is an object in JSON."""
    if isinstance(row, bytes):
        try:
            row = parse_json(row.decode().rstrip("\r\n"))
        except UnicodeDecodeError as error:
            raise UserError(f"expected UTF-8: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"expected a JSON object with named columns, found {row!r:.80}")
    return row


# --- records --------------------------------------------------------------------------------------


def load_problems(
    source: str,
    *,
    split: str | None = None,
    subset: str | None = None,
    limit: int | None = None,
    on_malformed: OnMalformed = "stop",
    dropped: Counter[str] | None = None,
) -> list[Problem]:
    """Problems with their reference answers, from `split` ('train' by default) of a hub data set; a
    row without one is malformed."""
    stem, part = _name(source, split)

    def parse(row: dict[str, Any], number: int) -> list[Problem]:
        question = row.get("question") or row.get("problem")
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"expected a 'question' or 'problem', found {sorted(row)}")
        return [
            Problem(
                problem_id=str(row.get("problem_id") or f"{stem}/{part}/{number:06d}"),
                question=question.strip(),
                answer=_reference(row),
                source=str(row.get("source") or stem),
            )
        ]

    return parse_rows(
        source,
        parse,
        split=split or "train",
        subset=subset,
        limit=limit,
        on_malformed=on_malformed,
        dropped=dropped,
    )


def _name(source: str, split: str | None) -> tuple[str, str]:
    """What ids begin with: (data set, part of it)."""
    path = Path(source)
    if path.is_file():
        return path.parent.name, path.stem
    return source.rsplit("/", 1)[-1], split or "train"


def _reference(row: dict[str, Any]) -> str:
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
        "the problem has no answer: expected an 'answer', or a 'solution' with \\boxed{} or ####, "
        f"found the columns {sorted(row)} (on_malformed: skip leaves such rows out)"
    )


def load_solutions(
    source: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    on_malformed: OnMalformed = "stop",
    dropped: Counter[str] | None = None,
) -> list[LabelledSolution]:
    """Solutions with labelled steps, of any format that `text.solutions` knows; of all splits of a
    hub data set unless one is named."""
    stem, part = _name(source, split)
    return parse_rows(
        source,
        lambda row, number: parse_solutions(row, f"{stem}/{part}/{number:06d}"),
        split=split,
        limit=limit,
        on_malformed=on_malformed,
        dropped=dropped,
    )


def load_processbench(
    source: str,
    *,
    split: str | None = None,
    on_malformed: OnMalformed = "stop",
    dropped: Counter[str] | None = None,
) -> list[ProcessBenchItem]:
    """ProcessBench's own files (label = index of the first wrong step, -1: none), our records, and
    the whole solutions of other formats; a row without one is malformed."""
    stem, part = _name(source, split)
    return parse_rows(
        source,
        lambda row, number: processbench_items(parse_solutions(row, f"{stem}/{part}/{number:06d}")),
        split=split or "train",
        on_malformed=on_malformed,
        dropped=dropped,
    )


def load_judge_examples(
    source: str, *, on_malformed: OnMalformed = "stop", dropped: Counter[str] | None = None
) -> list[JudgeExample]:
    """JudgeExample records of a file or a finished `label` run, or the labelled steps of others'
    solutions (`text.solutions`), of all splits of a hub data set. Rows of PRM800K whose labeller
    found the problem itself wrong give none."""
    if Path(source).is_dir():
        return read_records(source, JudgeExample)
    stem, part = _name(source, None)

    def parse(row: dict[str, Any], number: int) -> list[JudgeExample]:
        if "example_id" in row:
            return [from_fields(row, JudgeExample)]
        solutions = parse_solutions(row, f"{stem}/{part}/{number:06d}")
        return list(judge_examples(_of_sound_problems(solutions, dropped)))

    return parse_rows(source, parse, on_malformed=on_malformed, dropped=dropped)


def load_classifier_examples(
    source: str, *, on_malformed: OnMalformed = "stop", dropped: Counter[str] | None = None
) -> list[ClassifierExample]:
    """ClassifierExample records of a file or a finished `label` run, or others' solutions, as
    `load_judge_examples` reads them. Raises UserError where an example's labels are not of its
    chunks."""
    if Path(source).is_dir():
        return read_records(source, ClassifierExample)
    stem, part = _name(source, None)

    def parse(row: dict[str, Any], number: int) -> list[ClassifierExample]:
        if "labelled" in row:
            return [_checked(from_fields(row, ClassifierExample))]
        solutions = parse_solutions(row, f"{stem}/{part}/{number:06d}")
        return list(classifier_examples(_of_sound_problems(solutions, dropped)))

    return parse_rows(source, parse, on_malformed=on_malformed, dropped=dropped)


def _checked(example: ClassifierExample) -> ClassifierExample:
    labelled = example.labelled
    ascending = list(labelled) == sorted(set(labelled))
    inside = set(labelled) <= set(range(len(example.chunks)))
    paired = len(labelled) == len(example.is_positive) == len(example.q)
    if not (labelled and ascending and inside and paired and all(0 <= q <= 1 for q in example.q)):
        raise UserError(
            f"{example.solution_id} has {len(example.chunks)} chunks: expected 'labelled' to be "
            "ascending indices of them, at least one, with an 'is_positive' and a 'q' from 0 to 1 "
            f"each, found {labelled}, {example.is_positive} and {example.q}"
        )
    return example


def _of_sound_problems(
    solutions: Sequence[LabelledSolution], dropped: Counter[str] | None
) -> Sequence[LabelledSolution]:
    """Those of a row of PRM800K whose labeller found no fault with the problem itself."""
    if all(solution.finish_reason != BAD_PROBLEM for solution in solutions):
        return solutions
    if dropped is not None:
        dropped[BAD_PROBLEM] += 1
    return []

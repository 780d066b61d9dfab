"""Reads solutions that nobody has labelled, to be checked.

a text       the problem, a blank line, the solution
rows         `question` or `problem`; `steps` or `chunks`, a list, or `solution`, a text
             and rows of all formats of `data.step_formats`, whose labels are not used
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepwiser_jax.data.rows import Rows, columns_of, number_rows, read_rows
from stepwiser_jax.data.step_formats import parse_solutions
from stepwiser_jax.errors import UserError
from stepwiser_jax.files import nothing_at
from stepwiser_jax.record_lines import parse_json

ROW_FILES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Unlabelled:
    """A problem with a solution: its chunks, or a text that is still to be cut."""

    solution_id: str
    question: str
    solution: tuple[str, ...] | str


def solutions_of_text(text: str, name: str, question: str | None = None) -> list[Unlabelled]:
    """Returns the solutions in a text: rows of JSON, or a problem, a blank line and a solution. If
    the `question` is given, the text is its solution.

    Raises UserError if there is no blank line, or a row has no solution. `name` is what it names.
    """
    text = text.strip()
    if question is not None:
        return [Unlabelled(name, question, text)]
    if rows := _json_rows(text):
        return _of_rows(number_rows(rows, None), name)
    problem, *rest = re.split(r"\n\s*\n", text, maxsplit=1)
    if not rest:
        raise UserError(
            f"{name}: expected a problem, a blank line and a solution, found "
            f"{'no blank line' if text else 'an empty text'}"
        )
    return [Unlabelled(name, problem, rest[0])]


def solutions_of_file(file: Path, question: str | None = None) -> list[Unlabelled]:
    """Returns the solutions in a file, see `solutions_of_text`. Files that end with .jsonl, .json
    or .parquet hold rows."""
    if not file.exists() or file.is_dir():  # a pipe has a name too
        found = f"the directory {file}" if file.is_dir() else nothing_at(file)
        raise UserError(f"expected a file with a problem and its solution, found {found}")
    if question is None and file.suffix == ".parquet":
        return _of_rows(read_rows(str(file)), str(file))
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: expected UTF-8: {error}") from None
    if question is None and file.suffix in ROW_FILES and not _json_rows(text.strip()):
        raise UserError(f"{file}: expected rows in JSON, found {text.strip()[:80]!r}")
    return solutions_of_text(text, str(file), question)


def _json_rows(text: str) -> list[tuple[str, Any]]:
    """Returns the rows of a text in JSON, each with its place: an object, a list of objects, or an
    object a line; none if the text is something else."""
    whole = _parsed(text)
    if isinstance(whole, list) and whole and isinstance(whole[0], dict):
        return [(f"row {number}", row) for number, row in enumerate(whole, 1)]
    if isinstance(whole, dict):
        return [("row 1", whole)]
    lines = [(f"line {n}", x) for n, x in enumerate(text.splitlines(), 1) if x.strip()]
    if not lines or not isinstance(_parsed(lines[0][1]), dict):
        return []
    return [(place, line.encode()) for place, line in lines]


def _parsed(text: str) -> Any:
    """Returns what a text holds in JSON, None if it is something else."""
    try:
        return parse_json(text) if text.startswith(("{", "[")) else None
    except UserError:
        return None


def _of_rows(rows: Rows, name: str) -> list[Unlabelled]:
    found: dict[str, Unlabelled] = {}
    for number, place, row in rows:
        try:
            for solution in _of_row(columns_of(row), f"{name}/{number + 1}"):
                if solution.solution_id in found:
                    raise UserError(f"the id {solution.solution_id!r} is there twice")
                found[solution.solution_id] = solution
        except UserError as error:
            raise UserError(f"{name}, {place}: {error}") from None
    return list(found.values())


def _of_row(row: dict[str, Any], row_id: str) -> Iterator[Unlabelled]:
    question = next((row[x] for x in ("question", "problem") if isinstance(row.get(x), str)), None)
    chunks = next((row[x] for x in ("steps", "chunks") if isinstance(row.get(x), list)), None)
    named = (row[x] for x in ("id", "solution_id", "item_id") if isinstance(row.get(x), str))
    solution_id = next(named, row_id)
    if question is not None and chunks is not None:
        if not all(isinstance(chunk, str) for chunk in chunks):
            raise UserError(f"expected texts in 'steps', found {chunks!r:.80}")
        yield Unlabelled(solution_id, question, tuple(chunks))
    elif question is not None and isinstance(row.get("solution"), str):
        yield Unlabelled(solution_id, question, row["solution"])
    else:
        try:
            labelled = parse_solutions(row, row_id)
        except UserError as error:
            raise UserError(
                "expected 'question' or 'problem', and 'steps' (a list) or 'solution' (a text); "
                f"or {error}"
            ) from None
        yield from (Unlabelled(x.solution_id, x.question, x.steps) for x in labelled)

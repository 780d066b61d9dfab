"""Reads the rows of files and hub data sets, and parses them into records.

A source is a hub id, or a local file: JSON, one row a line or all in a list, or parquet. A
malformed row stops the reading with its file and line, or is counted as dropped and left out, as
`on_malformed` says; the log then names the first few.

Rows are taken in the order that `config.Problems` states: shuffled, malformed ones and those of
excluded problems left out, then the first `limit`. A row keeps the id that it has in its
source, also after a shuffle.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from stepwiser_jax.errors import UserError
from stepwiser_jax.files import nothing_at
from stepwiser_jax.record_lines import check_text, parse_json, to_json
from stepwiser_jax.records import Record

N = TypeVar("N", int, str)
R = TypeVar("R", bound=Record)
Rows = Iterable[tuple[int, str, Any]]
"""(number from 0, the place that errors name, content)."""

OnMalformed = Literal["stop", "skip"]
Split = str | Sequence[str] | None
_SUFFIXES = (".jsonl", ".json", ".parquet")
_log = logging.getLogger(__name__)

MAX_NAMED = 10
"""The most malformed rows that are named one by one. NuminaMath-CoT has thousands, with proofs."""


def shuffled(names: Iterable[N], seed: int) -> list[N]:
    """Returns the names in an order that depends on the seed and each name alone: it is the same on
    every machine, and one more name moves no other."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())


def read_rows(
    source: str,
    *,
    split: Split = None,
    subset: str | None = None,
    shuffle_seed: int | None = None,
) -> Iterator[tuple[int, str, Any]]:
    """Yields the rows of a local file or a hub data set. A line of JSON comes unparsed (see
    `columns_of`). A hub data set is read row by row, never as a whole.

    Args:
        source: Path or hub id.
        split: One or several splits of a hub data set, one after another; None for all.
        subset: The configuration of a hub data set.
        shuffle_seed: Shuffles the rows of each split.

    Raises:
        UserError: The source is missing, unreadable or empty, or there is no such split.
    """
    path = Path(source)
    if not path.is_file() and (path.suffix in _SUFFIXES or source.startswith((".", "/"))):
        found = f"the directory {path}" if path.is_dir() else nothing_at(path)
        raise UserError(f"expected a data file, found {found}")
    if path.is_file() and path.suffix not in _SUFFIXES:
        raise UserError(f"expected a {sorted(_SUFFIXES)} file, found {source}")
    if path.is_file() and path.suffix != ".parquet":
        rows = number_rows(_json_rows(path), shuffle_seed)
    else:
        rows = _table_rows(source, split, subset, shuffle_seed)
    empty = True
    for number, place, row in rows:
        empty = False
        yield number, f"{source}, {place}", row
    if empty:
        raise UserError(f"{source} is empty: expected at least one row, found none")


def number_rows(rows: Iterable[tuple[str, Any]], shuffle_seed: int | None) -> Rows:
    """Numbers (place, content) pairs, and shuffles them if there is a seed."""
    numbered = ((number, place, row) for number, (place, row) in enumerate(rows))
    if shuffle_seed is None:
        return numbered
    listed = list(numbered)
    return (listed[number] for number in shuffled(range(len(listed)), shuffle_seed))


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # `datasets` would give all rows the same columns and types, and knows no lines.
    with open(path, "rb") as file:
        if file.read(1024).lstrip().startswith(b"["):
            yield from _list_items(path)
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", line


def _list_items(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the items of a JSON list, each with the line that it begins on."""
    decoder = json.JSONDecoder()
    try:
        text = path.read_text(encoding="utf-8")
        count = len(json.loads(text))  # valid as a whole, so commas need no check
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a list in JSON: {error}") from None
    end, line, counted = text.index("[") + 1, 1, 0
    for number in range(1, count + 1):
        begin = end
        while text[begin] in " \t\r\n,":
            begin += 1
        line, counted = line + text.count("\n", counted, begin), begin
        item, end = decoder.raw_decode(text, begin)
        yield f"row {number} (line {line})", item


def _table_rows(source: str, split: Split, subset: str | None, shuffle_seed: int | None) -> Rows:
    import datasets

    is_file = Path(source).is_file()
    try:
        if is_file:
            tables = {"train": datasets.load_dataset("parquet", data_files=source, split="train")}
        elif split is None:
            tables: Any = datasets.load_dataset(source, subset, split=None)
        else:
            names = [split] if isinstance(split, str) else split
            tables = {name: datasets.load_dataset(source, subset, split=name) for name in names}
    except Exception as error:  # datasets raises many types for this
        reason = error.__cause__ or error
        if is_file:
            raise UserError(f"cannot read the file {source}: {reason}") from None
        raise UserError(
            f"expected a file, a run, a data set of the hub or module:function, found "
            f"{nothing_at(source)}, and on the hub: {reason}"
        ) from None
    before = 0
    for name, table in tables.items():
        split_name = "" if is_file else f"{name} "
        if shuffle_seed is None:
            rows = enumerate(table)
        else:
            rows = ((number, table[number]) for number in shuffled(range(len(table)), shuffle_seed))
        for number, row in rows:
            yield before + number, f"{split_name}row {number + 1}", row
        before += len(table)


def columns_of(row: Any) -> dict[str, Any]:
    """Returns the columns of a row of `read_rows`. Raises UserError unless it is an object in
    JSON."""
    if isinstance(row, bytes):
        try:
            row = parse_json(row.decode().rstrip("\r\n"))
        except UnicodeDecodeError as error:
            raise UserError(f"expected UTF-8: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"expected a JSON object with named columns, found {row!r:.80}")
    return row


def parse_rows(
    rows: Rows,
    parse: Callable[[Any, int], list[R]],
    *,
    is_excluded: Callable[[R], bool] = lambda record: False,
    limit: int | None = None,
    on_malformed: OnMalformed = "stop",
    dropped: Counter[str] | None = None,
) -> list[R]:
    """Returns the records that `parse` makes of each row and its number.

    A row is malformed if `parse` raises UserError, if a text of it cannot be written, or if its id
    came before: ids name records and noise, and two equal ones would be taken for one.

    Args:
        rows: As `read_rows` yields them.
        parse: Makes records of a row.
        is_excluded: Which records to leave out.
        limit: The most rows to use; malformed and excluded ones do not count.
        on_malformed: Whether a malformed row stops the reading or is left out.
        dropped: Counts what is left out.

    Raises:
        UserError: A row is malformed and stops the reading, or nothing is left.
    """
    records: dict[str, R] = {}
    good, last_error, counts = 0, None, Counter[str]()
    for number, where, row in rows:
        if good == limit:
            break
        try:
            new = parse(row, number)
            for record in new:
                if record.record_id in records:
                    raise UserError(f"the id {record.record_id!r} is there twice")
                check_text(to_json(record))
        except UserError as error:
            last_error = UserError(f"{where}: {error}")
            if on_malformed == "stop":
                raise last_error from None
            counts["malformed"] += 1
            if counts["malformed"] <= MAX_NAMED:
                _log.warning("left out: %s", last_error)
            continue
        kept = [record for record in new if not is_excluded(record)]
        counts["excluded"] += len(new) - len(kept)
        if kept or not new:
            good += 1
            records |= {record.record_id: record for record in kept}
    if counts["malformed"] > MAX_NAMED:
        others = counts["malformed"] - MAX_NAMED
        _log.warning("left out: %d more malformed rows, the last one is %s", others, last_error)
    if dropped is not None:
        dropped.update(+counts)
    if counts["excluded"] and not records:
        raise UserError(
            f"none of {counts['excluded']} records is left: `exclude` has the problems of all of "
            "them"
        )
    if last_error is not None and not good:
        raise UserError(f"all rows are malformed, the last one is {last_error}")
    return list(records.values())

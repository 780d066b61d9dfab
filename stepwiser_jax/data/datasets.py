"""Data sets -> records: problems with reference answers, solutions with labelled steps.

A source is a hub id, or a local file: JSON, one row a line or all in a list, or parquet. Known by
their columns: GSM8K (`question`, `answer` with ####), MATH and NuminaMath-CoT (`problem`, `answer`
or a `solution` with \\boxed{}), the step-labelled formats of `data.step_formats`, and our own
records.

A malformed row stops the reading with its file and line, or is counted as dropped and left out, as
`on_malformed` has it; the log then names the first few.

Rows are taken in the order that `config_parts.Problems` states: shuffled, malformed ones and those
of excluded problems left out, then the first `limit`. An id is that of the row in its source,
wherever the shuffle has put it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from stepwiser_jax.data.step_formats import (
    BAD_PROBLEM,
    classifier_examples,
    error_steps_past_the_end,
    is_prmbench,
    judge_examples,
    parse_solutions,
    prmbench_items,
    processbench_items,
)
from stepwiser_jax.errors import UserError
from stepwiser_jax.record_io import (
    check_text,
    from_fields,
    nothing_at,
    parse_json,
    read_records,
    to_json,
)
from stepwiser_jax.records import (
    BenchmarkItem,
    ClassifierExample,
    JudgeExample,
    LabelledSolution,
    Problem,
    Record,
)
from stepwiser_jax.tasks.mathematics import extract_answer

N = TypeVar("N", int, str)
R = TypeVar("R", bound=Record)
OnMalformed = Literal["stop", "skip"]
Split = str | Sequence[str] | None
_SUFFIXES = (".jsonl", ".json", ".parquet")
_log = logging.getLogger(__name__)

MOST_NAMED = 10
"""Malformed rows that are named one by one: a data set may have thousands, as NuminaMath-CoT has
proofs."""


# --- rows -----------------------------------------------------------------------------------------


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
    """(number from 0, where, row) of a local file, or of `split` (several: one after another; None:
    all) and `subset` of a hub data set; with `shuffle_seed` the rows of a split are shuffled. A
    line of JSON comes as it is, unparsed. A hub data set is read row by row, never as a whole.

    Raises UserError for a missing, unreadable or empty source, and an unknown split.
    """
    path = Path(source)
    if not path.is_file() and (path.suffix in _SUFFIXES or source.startswith((".", "/"))):
        found = f"the directory {path}" if path.is_dir() else nothing_at(path)
        raise UserError(f"expected a data file, found {found}")
    if path.is_file() and path.suffix not in _SUFFIXES:
        raise UserError(f"expected a {sorted(_SUFFIXES)} file, found {source}")
    if path.is_file() and path.suffix != ".parquet":
        rows = numbered_rows(_json_rows(path), shuffle_seed)
    else:
        rows = _table_rows(source, split, subset, shuffle_seed)
    empty = True
    for number, place, row in rows:
        empty = False
        yield number, f"{source}, {place}", row
    if empty:
        raise UserError(f"{source} is empty: expected at least one row, found none")


def numbered_rows(
    rows: Iterator[tuple[str, Any]], shuffle_seed: int | None
) -> Iterator[tuple[int, str, Any]]:
    """Yields (number from 0, where, row), shuffled if there is a seed."""
    if shuffle_seed is None:
        yield from ((number, place, row) for number, (place, row) in enumerate(rows))
        return
    held = list(rows)
    for number in shuffled(range(len(held)), shuffle_seed):
        yield number, *held[number]


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
    except (ValueError, RecursionError) as error:
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


def _table_rows(
    source: str, split: Split, subset: str | None, shuffle_seed: int | None
) -> Iterator[tuple[int, str, Any]]:
    import datasets

    try:
        if Path(source).is_file():
            tables = {"train": datasets.load_dataset("parquet", data_files=source, split="train")}
        elif split is None:
            tables: Any = datasets.load_dataset(source, subset, split=None)
        else:
            names = [split] if isinstance(split, str) else split
            tables = {name: datasets.load_dataset(source, subset, split=name) for name in names}
    except Exception as error:  # datasets raises many types for one thing: it cannot read this
        reason = error.__cause__ or error
        if Path(source).is_file():
            raise UserError(f"cannot read the file {source}: {reason}") from None
        raise UserError(
            f"expected a file, a run or a data set of the hub, found {nothing_at(source)}, and on "
            f"the hub: {reason}"
        ) from None
    before = 0
    for name, table in tables.items():
        of_split = "" if Path(source).is_file() else f"{name} "
        if shuffle_seed is None:
            rows = enumerate(table)
        else:
            rows = ((number, table[number]) for number in shuffled(range(len(table)), shuffle_seed))
        for number, row in rows:
            yield before + number, f"{of_split}row {number + 1}", row
        before += len(table)


def parse_rows(
    source: str,
    parse: Callable[[Any, int], list[R]],
    rows: Iterable[tuple[int, str, Any]] | None = None,
    *,
    split: Split = None,
    subset: str | None = None,
    shuffle_seed: int | None = None,
    is_excluded: Callable[[R], bool] = lambda record: False,
    limit: int | None = None,
    on_malformed: OnMalformed = "stop",
    dropped: Counter[str] | None = None,
) -> list[R]:
    """The records that `parse` makes of each row and its number, from 0, as the head of this module
    says; `limit` counts rows. What is left out is counted in `dropped`.

    A row is malformed if `parse` raises UserError, if a text of it cannot be written, or if an id
    was there before: ids name records and noise, and two of the same would be taken for one.
    """
    records: dict[str, R] = {}
    good, malformed, excluded, last_error = 0, 0, 0, None
    if rows is None:
        rows = read_rows(source, split=split, subset=subset, shuffle_seed=shuffle_seed)
    for number, where, row in rows:
        if good == limit:
            break
        try:
            new = parse(row if isinstance(row, Problem) else columns_of(row), number)
            for record in new:
                if record.record_id in records:
                    raise UserError(f"the id {record.record_id!r} is there twice")
                check_text(to_json(record))
        except UserError as error:
            last_error = UserError(f"{where}: {error}")
            if on_malformed == "stop":
                raise last_error from None
            malformed += 1
            if malformed <= MOST_NAMED:
                _log.warning("left out: %s", last_error)
            continue
        kept = [record for record in new if not is_excluded(record)]
        excluded += len(new) - len(kept)
        if new and not kept:
            continue
        good += 1
        records |= {record.record_id: record for record in kept}
    if malformed > MOST_NAMED:
        _log.warning("left out: %d more malformed rows of %s", malformed - MOST_NAMED, source)
    if malformed and dropped is not None:
        dropped["malformed"] += malformed
    if excluded and dropped is not None:
        dropped["excluded"] += excluded
    if excluded and not records:
        raise UserError(
            f"none of {excluded} records is left: `exclude` has the problems of all of them"
        )
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
    rows: Iterable[tuple[int, str, Any]] | None = None,
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
    """Returns problems with their answers, of `rows` if there are some, else of the source; of a
    hub data set from `split`, 'train' by default. If it `needs_answer`, a row without one is
    malformed."""
    stem, part = _name(source, split)

    def parse(row: dict[str, Any] | Problem, number: int) -> list[Problem]:
        if isinstance(row, Problem):
            return [row]
        question = row.get("question") or row.get("problem")
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"expected a 'question' or 'problem', found {sorted(row)}")
        return [
            Problem(
                problem_id=str(row.get("problem_id") or f"{stem}/{part}/{number:06d}"),
                question=question.strip(),
                answer=_reference(row, needs_answer),
                source=str(row.get("source") or stem),
                extra=json.loads(json.dumps(_other_columns(row), default=str)),
            )
        ]

    return parse_rows(
        source,
        parse,
        rows,
        split=split or "train",
        subset=subset,
        shuffle_seed=shuffle_seed,
        is_excluded=is_excluded,
        limit=limit,
        on_malformed=on_malformed,
        dropped=dropped,
    )


def _name(source: str, split: Split) -> tuple[str, str]:
    """What ids begin with: (data set, part of it)."""
    path = Path(source)
    if path.is_file():
        return path.parent.name, path.stem
    part = split if isinstance(split, str) else "+".join(split or ["train"])
    return source.rsplit("/", 1)[-1], part


def _other_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Returns what a verifier may need beside the answer."""
    used = ("problem_id", "question", "problem", "answer", "solution", "source", "messages")
    return {name: value for name, value in row.items() if name not in used and value is not None}


def _reference(row: dict[str, Any], needed: bool) -> str:
    """Returns the final answer: as it is given, or from a worked solution."""
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
    """Returns solutions with labelled steps, of any format that `data.step_formats` knows; of all
    splits of a hub data set unless one is named."""
    stem, part = _name(source, split)
    return parse_rows(
        source,
        lambda row, number: _solutions(row, f"{stem}/{part}/{number:06d}", dropped),
        split=split,
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
    """Returns solutions whose judge is scored: PRMBench's, or ProcessBench's own (label = index of
    the first wrong step, -1: none), our records, and the whole solutions of other formats; a row
    without one is malformed.

    PRMBench has five solutions under an id that was there before. As its own loader does, this one
    leaves them out; `dropped` counts them as `repeated`.

    Raises UserError for a source that holds both benchmarks: they have different scores.
    """
    stem, part = _name(source, split)
    seen: set[str] = set()

    def parse(row: dict[str, Any], number: int) -> list[BenchmarkItem]:
        if not is_prmbench(row):
            solutions = _solutions(row, f"{stem}/{part}/{number:06d}", dropped)
            return list(processbench_items(solutions))
        _count_past_the_end(row, dropped)
        items = [item for item in prmbench_items(row) if item.item_id not in seen]
        if not items and dropped is not None:
            dropped["repeated"] += 1
        seen.update(item.item_id for item in items)
        return list(items)

    items = parse_rows(
        source, parse, split=split or "train", on_malformed=on_malformed, dropped=dropped
    )
    if len({type(item) for item in items}) > 1:
        raise UserError(
            f"{source}: expected rows of PRMBench or of ProcessBench, found both; their scores are "
            "different ones: make a file of each"
        )
    return items


def _solutions(
    row: dict[str, Any], row_id: str, dropped: Counter[str] | None
) -> list[LabelledSolution]:
    """`parse_solutions`; what is ignored in a row is counted."""
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
    """JudgeExample records of a file or a finished `label` run, or the labelled steps of others'
    solutions (`data.step_formats`), of all splits of a hub data set. Rows of PRM800K whose labeller
    found the problem itself wrong give none."""
    if Path(source).is_dir():
        return read_records(source, JudgeExample)
    stem, part = _name(source, None)

    def parse(row: dict[str, Any], number: int) -> list[JudgeExample]:
        if "example_id" in row:
            return [from_fields(row, JudgeExample)]
        solutions = _solutions(row, f"{stem}/{part}/{number:06d}", dropped)
        return list(judge_examples(_of_sound_problems(solutions, dropped)))

    return parse_rows(source, parse, on_malformed=on_malformed, dropped=dropped)


def load_classifier_examples(
    source: str, *, on_malformed: OnMalformed = "stop", dropped: Counter[str] | None = None
) -> list[ClassifierExample]:
    """ClassifierExample records of a file or a finished `label` run, or others' solutions, as
    `load_judge_examples` reads them. Raises UserError where an example's labels are not of its
    chunks."""
    if Path(source).is_dir():
        return [_checked(example) for example in read_records(source, ClassifierExample)]
    stem, part = _name(source, None)

    def parse(row: dict[str, Any], number: int) -> list[ClassifierExample]:
        if "labelled" in row:
            return [_checked(from_fields(row, ClassifierExample))]
        solutions = _solutions(row, f"{stem}/{part}/{number:06d}", dropped)
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

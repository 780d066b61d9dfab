"""Turns records into JSON lines and back, and writes files of them.

The token arrays of trajectories are in a file beside that of the lines; each line says where
(`token_files`).
"""

from __future__ import annotations

import contextlib
import enum
import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from stepwiser_jax.errors import UserError
from stepwiser_jax.files import replacing
from stepwiser_jax.records import Record, Trajectory
from stepwiser_jax.token_files import StoredTokens, TokenFile, TokenSpan, write_row

R = TypeVar("R", bound=Record)
T = TypeVar("T")

_to_json = json.JSONEncoder(
    ensure_ascii=False,
    check_circular=False,  # no record holds itself
    allow_nan=False,
    separators=(",", ":"),
    default=lambda part: part.value if isinstance(part, enum.Enum) else vars(part),
).encode


def to_json(record: Record) -> str:
    """Returns the line of a record, without its end. Raises UserError if a number is not finite."""
    try:
        return _to_json(vars(record))
    except ValueError:
        raise UserError(
            f"expected finite numbers in the {type(record).__name__} {record.record_id}, found "
            "others: the model that made it overflows (compute_dtype float32 has more room)"
        ) from None


@functools.cache
def _adapter(record_type: type) -> TypeAdapter[Any]:
    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    return TypeAdapter(with_config(config)(record_type))


def from_json(line: str | bytes, record_type: type[T]) -> T:
    """Reads one line. Raises UserError that names each missing, unknown or mistyped field."""
    try:
        return _adapter(record_type).validate_json(line)
    except ValidationError as error:
        raise _refusal(error, record_type) from None


def from_fields(fields: Any, record_type: type[R]) -> R:
    """Returns the record with these fields, which are as `json` reads them. Raises UserError as
    `from_json` does."""
    check_text(text := json.dumps(fields, ensure_ascii=False, default=str))
    return from_json(text, record_type)


def _refusal(error: ValidationError, record_type: type) -> UserError:
    """Returns the error that names the first three mistakes in one line."""
    found = []
    for one in error.errors(include_url=False):
        if one["type"] == "json_invalid":
            reason = one["msg"].removeprefix("Invalid JSON: ")
            line = one["input"] if isinstance(one["input"], str) else one["input"].decode()
            return UserError(f"expected one JSON object a line, found {line[:80]!r} ({reason})")
        name = ".".join(map(str, one["loc"]))
        given = "" if one["type"] == "missing" else f" (found {one['input']!r:.400})"
        place = f"{record_type.__name__}.{name}: " if name else ""
        found.append(f"{place}{one['msg'].removeprefix('Value error, ')}{given}")
    return UserError("; ".join(found[:3]))


def parse_json(line: str) -> Any:
    """Returns the value of a line of JSON. Raises UserError if it is not JSON, or if it holds more
    than can be read."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # also for integers of thousands of digits
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg} at column {error.colno}"
        raise UserError(
            f"expected one JSON object a line, found {line[:80]!r} ({reason})"
        ) from None


def check_text(text: str) -> None:
    """Raises UserError for half of a surrogate pair, which no file and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = text[max(0, error.start - 20) : error.start + 20]
        raise UserError(
            f"expected text that UTF-8 can hold, found half of a surrogate pair in {place!r}"
        ) from None


# --- files of lines ------------------------------------------------------------------------------


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Writes one JSONL file completely or not at all, and the token arrays of trajectories beside
    it. Keeps one record in memory at a time."""
    path = Path(path)
    with contextlib.ExitStack() as files:
        lines = files.enter_context(replacing(path))  # entered first: it is replaced last
        tokens = None
        for record in records:
            if tokens is None and isinstance(record, Trajectory):
                tokens = files.enter_context(replacing(path.with_suffix(".tokens")))
            lines.write(encode_line(record, tokens, path.with_suffix(".tokens").name))


def encode_line(record: Record, tokens: IO[bytes] | None, tokens_name: str) -> bytes:
    """Returns a record's line. The arrays of a trajectory are appended to `tokens`."""
    if not isinstance(record, Trajectory) or tokens is None:
        return f"{to_json(record)}\n".encode()
    span = write_row(tokens, tokens_name, record.tokens, record.record_id)
    return f"{_to_json(vars(record) | {'tokens': span})}\n".encode()


@dataclass(frozen=True)
class TrajectoryLine:
    """The line of a trajectory: `tokens` says where its arrays are."""

    trajectory_id: str
    problem_id: str
    policy_id: str
    tokens: TokenSpan
    chunk_ends: tuple[int, ...]
    stop_reason: str
    is_correct: bool


def read_lines(path: Path, record_type: type[R], *, growing: bool = False) -> Iterator[R]:
    """Reads the records of a file one by one. With `growing`, another process may be writing the
    last line. Raises UserError with the file and the line if a line is no record."""
    token_file = functools.cache(lambda name: TokenFile(path.parent / name))

    def decode(line: bytes) -> Any:
        if record_type is not Trajectory:
            return from_json(line, record_type)
        found = from_json(line, TrajectoryLine)
        stored = StoredTokens(token_file(found.tokens.file), found.tokens)
        fields: dict[str, Any] = vars(found) | {"tokens": stored}
        return Trajectory(**fields)

    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if growing and not line.endswith(b"\n"):
                return
            try:
                line.decode()
                yield decode(line)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: expected UTF-8: {error}") from None
            except UserError as error:
                raise UserError(f"{path}, line {number}: {error}") from None

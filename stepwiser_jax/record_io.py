"""Reads and writes records, one JSON line each.

A stage appends records to one JSONL part per process, and writes `manifest.json` last: no manifest
means the run is not finished.

    <run_dir>/records/<kind>/part-00000-of-00001.jsonl    one record a line
                             part-00000-of-00001.tokens   token arrays of trajectories
    <run_dir>/manifest.json    counts and sha256 of every part, sha256 of the run's other files and
                               of itself

While the run grows, a part's `.jsonl.crc32` holds its size and CRC-32, and token arrays are in
`part-00000-of-00001.growing.tokens`; lines name the file that holds their arrays (`token_files`).

A run that is killed while it writes a line loses only that line. When it is started again, it
skips the ids that are present. A stage that finishes puts each part in id order, so a restarted run
leaves the same bytes as an undisturbed one.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import heapq
import json
import os
import socket
import typing
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from stepwiser_jax.checksums import seal_fits, sealed, sha256_of
from stepwiser_jax.errors import UserError
from stepwiser_jax.records import (
    ChunkedSolution,
    ChunkLabel,
    ClassifierExample,
    Dialogue,
    JudgeExample,
    Judgment,
    PrefixValue,
    Problem,
    ProcessBenchItem,
    Rationale,
    Record,
    SearchResult,
    Selection,
    SftExample,
    Trajectory,
    natural_key,
)
from stepwiser_jax.token_files import StoredTokens, TokenFile, TokenSpan, write_row

R = TypeVar("R", bound=Record)

MANIFEST = "manifest.json"
MANIFEST_FILES = ("config.yaml", "metrics.jsonl", "summary.json")
"""Files of a run, other than records, whose checksums its manifest holds."""

KIND: dict[type, str] = {
    Problem: "problems",
    Trajectory: "trajectories",
    SftExample: "sft_examples",
    Dialogue: "dialogues",
    ChunkedSolution: "segmentations",
    Rationale: "rationales",
    PrefixValue: "prefix_values",
    ChunkLabel: "chunk_labels",
    JudgeExample: "judge_examples",
    ClassifierExample: "classifier_examples",
    Judgment: "judgments",
    ProcessBenchItem: "processbench_items",
    SearchResult: "search_results",
    Selection: "selections",
}
"""The folder of each record type in `<run_dir>/records`."""


# --- one record <-> one line --------------------------------------------------------------------

_to_json = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), default=lambda e: e.value, allow_nan=False
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


def from_json(line: str | bytes, record_type: type[R]) -> R:
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


# --- files --------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Opens a new file that replaces `path` when all of it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # such as a full disk: remove the half
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, text: str) -> None:
    """Writes a whole file or nothing."""
    with replacing(path) as file:
        file.write(text.encode())


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
            lines.write(_line(record, tokens, path.with_suffix(".tokens").name))


def _line(record: Record, tokens: IO[bytes] | None, tokens_name: str) -> bytes:
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


def _lines(path: Path, record_type: type[R], *, growing: bool = False) -> Iterator[R]:
    """Reads the records of a file one by one. With `growing`, another process may be writing the
    last line. Raises UserError with the file and the line if a line is no record."""
    token_file = functools.cache(lambda name: TokenFile(path.parent / name))

    def decode(line: bytes) -> Any:
        if record_type is not Trajectory:
            return from_json(line, record_type)
        fields = vars(from_json(line, TrajectoryLine))  # pyright: ignore[reportArgumentType]
        span = fields["tokens"]
        return Trajectory(**fields | {"tokens": StoredTokens(token_file(span.file), span)})

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


def read_jsonl(path: Path, record_type: type[R], *, growing: bool = False) -> list[R]:
    """Returns one record for each line. Raises UserError with the file and the lines if a line is
    no record or an id occurs twice."""
    return _without_duplicates({path: list(_lines(path, record_type, growing=growing))})


def _without_duplicates(of_file: Mapping[Path, Sequence[R]]) -> list[R]:
    records = [record for found in of_file.values() for record in found]
    if len({record.record_id for record in records}) < len(records):
        _refuse_duplicate(of_file)
    return records


def _refuse_duplicate(of_file: Mapping[Path, Sequence[Record]]) -> NoReturn:
    first: dict[str, str] = {}
    for path, records in of_file.items():
        for number, record in enumerate(records, 1):
            name, place = record.record_id, f"{path}, line {number}"
            if name in first:
                raise UserError(
                    f"{place}: the id {name!r} is there twice, first in {first[name]}: delete one "
                    "of the two lines, in a finished run also its manifest.json, and repeat the "
                    "command that wrote them"
                )
            first[name] = place
    raise AssertionError("no id is there twice")


def read_records(path: str | Path, record_type: type[R]) -> list[R]:
    """Returns the records of one type of a JSONL file, or of a finished run directory in id order.

    Raises:
        UserError: The path is missing, the run is not finished, a part does not match the manifest,
            or the run holds no records of the type.
    """
    return list(stream_records(path, record_type))


def stream_records(path: str | Path, record_type: type[R]) -> Iterator[R]:
    """Yields what `read_records` returns, without keeping a run's records in memory."""
    path = Path(path)
    if path.is_file():
        yield from read_jsonl(path, record_type)
        return
    parts = read_parts(path, record_type)
    makers: set[str] = set()
    last = None
    streams = [_lines(part, record_type) for part in parts]
    for record in heapq.merge(*streams, key=_order) if len(parts) > 1 else streams[0]:
        if record.record_id == last:
            _refuse_duplicate({part: list(_lines(part, record_type)) for part in parts})
        last = record.record_id
        makers |= makers_of(record)
        yield record
    check_makers(path, makers)


def _order(record: Record) -> Any:
    return natural_key(record.record_id)


def read_parts(run_dir: str | Path, record_type: type[Record]) -> list[Path]:
    """Returns the files with a finished run's records of one type. Raises UserError if the run is
    not finished, if it holds none, or if a file does not match the manifest."""
    run_dir, manifest = Path(run_dir), read_manifest(run_dir)
    kind = KIND[record_type]
    if kind not in manifest["records"]:
        held = sorted(manifest["records"]) or "no records"
        raise UserError(
            f"{run_dir} is a run of stage '{manifest['stage']}' and holds {held}, not {kind}"
        )
    parts = {part["path"]: part["sha256"] for part in manifest["records"][kind]["parts"]}
    for name, digest in parts.items():
        _check_promised(run_dir, name, digest)
    return [run_dir / name for name in parts]


def check_run_file(run_dir: Path, name: str) -> None:
    """Raises UserError if a file of `MANIFEST_FILES` does not match the run's manifest. A run that
    is not finished has no manifest and is not checked."""
    if not (run_dir / MANIFEST).is_file():
        return
    files = read_manifest(run_dir).get("files", {})
    if name in files:
        _check_promised(run_dir, name, files[name])


def check_finished(run_dir: Path) -> None:
    """Raises UserError if any file of a finished run does not match its manifest."""
    for name, digest in _promises(read_manifest(run_dir)):
        _check_promised(run_dir, name, digest)


def _promises(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns name and checksum of every file that a manifest names."""
    parts = [part for kind in manifest["records"].values() for part in kind["parts"]]
    tokens = [part["tokens"] for part in parts if "tokens" in part]
    of_parts = [(part["path"], part["sha256"]) for part in (*parts, *tokens)]
    return [*of_parts, *manifest.get("files", {}).items()]


_WITHOUT_A_COPY = {
    "config.yaml": "write it again: with --dry-run and a new --run-dir beside this one, the "
    "command that made the run prints it",
    "metrics.jsonl": f"delete {MANIFEST} and repeat the command that made the run: it names a line "
    "that cannot be read",
}
"""What to do about a file that the run cannot make again."""


def _check_promised(run_dir: Path, name: str, digest: str) -> None:
    file = run_dir / name
    if not file.is_file() or sha256_of(file) != digest:
        make_again = (
            f"delete it and {MANIFEST}, and repeat the command that made the run: it makes again "
            "what is missing"
        )
        raise UserError(
            f"{file} is missing or is not the file that {run_dir / MANIFEST} names: put it back. "
            f"If there is no copy, {_WITHOUT_A_COPY.get(name, make_again)}"
        )


def nothing_at(path: str | Path) -> str:
    """Returns the text of an error about a missing path, with the closest name beside it."""
    path = Path(path)
    text = f"nothing at {path}" + ("" if path.is_absolute() else f" (in {Path.cwd()})")
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return text + (f"; did you mean {path.parent / close[0]}?" if close else "")


def read_manifest(run_dir: str | Path) -> dict[str, Any]:
    """Returns the manifest of a finished run. Raises UserError if it is missing or damaged."""
    run_dir = Path(run_dir)
    manifest = run_dir / MANIFEST
    if manifest.is_file():
        fields = _read_json(manifest)
        if not _is_manifest(fields):
            raise UserError(
                f"{manifest} is damaged: put it back, or delete it and repeat the command that "
                "made the run: it writes the file again"
            )
        return fields
    if (run_dir / "config.yaml").is_file():
        raise UserError(
            f"{run_dir} is not finished (it has no manifest.json): resume it with the command that "
            "started it, then run this one again"
        )
    raise UserError(f"expected a file or a finished run directory, found {nothing_at(run_dir)}")


def read_run_json(run_dir: Path, name: str) -> dict[str, Any]:
    """Returns the object in a JSON file of a finished run. Raises UserError if it is damaged or
    missing."""
    check_run_file(run_dir, name)
    fields = _read_json(run_dir / name) if (run_dir / name).is_file() else None
    if not isinstance(fields, dict):
        raise UserError(
            f"expected a JSON object in {run_dir / name}, found none: put the file back, or delete "
            f"{MANIFEST} and repeat the command that made the run"
        )
    return fields


def _read_json(file: Path) -> Any:
    """Returns the content of a JSON file, None if it is not JSON."""
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None


def _is_manifest(fields: Any) -> bool:
    known = {"stage", "config_digest", "records", "files", "sha256"}
    if not isinstance(fields, dict) or not {"stage", "records"} <= set(fields) <= known:
        return False
    try:
        promises = _promises(fields)
    except (TypeError, KeyError, AttributeError):
        return False
    are_texts = all(isinstance(text, str) for promise in promises for text in promise)  # pyright: ignore[reportUnnecessaryIsInstance]
    return are_texts and isinstance(fields["stage"], str) and seal_fits(fields)


def stream_written(run_dir: Path, record_type: type[R]) -> Iterator[R]:
    """Yields what all writers of a run, finished or not, have written so far, part by part."""
    for part in sorted((run_dir / "records" / KIND[record_type]).glob("part-*.jsonl")):
        _check_growing(part)
        yield from _lines(part, record_type, growing=True)


def read_written(run_dir: Path, record_type: type[R]) -> list[R]:
    """Returns what all writers of a run, finished or not, have written so far. Raises UserError for
    an id that occurs twice."""
    parts = sorted((run_dir / "records" / KIND[record_type]).glob("part-*.jsonl"))
    for part in parts:
        _check_growing(part)
    return _without_duplicates(
        {part: list(_lines(part, record_type, growing=True)) for part in parts}
    )


def _sum_of_growing(part: Path) -> Path:
    """Returns the file that holds the number of bytes written to a part, and their CRC-32."""
    return part.with_name(f"{part.name}.crc32")


def _check_growing(part: Path) -> None:
    """Raises UserError unless a part of an unfinished run begins with the bytes that were counted.
    Bytes after them are newer: the process ended before it could count them."""
    file = _sum_of_growing(part)
    if not file.is_file():
        return
    size, _, found = file.read_text(encoding="utf-8", errors="replace").partition(" ")
    is_whole = size.isdecimal() and part.is_file() and part.stat().st_size >= int(size)
    if is_whole and f"{_crc32(part, int(size)):08x}\n" == found:
        return
    raise UserError(
        f"{part} does not begin with the {size} bytes that were written ({file.name}): put it "
        "back. Without a copy, delete both files and give the same command again: their records "
        "are made again, the same ones"
    )


def _crc32(file: Path, size: int) -> int:
    """Returns the CRC-32 of the first `size` bytes of a file."""
    crc = 0
    with open(file, "rb") as stream:
        while block := stream.read(min(size, 1 << 20)):
            crc, size = zlib.crc32(block, crc), size - len(block)
    return crc


def makers_of(record: Record) -> set[str]:
    """Returns the ids of the models that made this record, as far as it names them."""
    fields = vars(record)
    return {fields[name] for name in ("policy_id", "judge_id") if name in fields}


def check_makers(where: Path, makers: set[str]) -> None:
    """Raises UserError if records of one type and run come from several models. That is so if a
    model was replaced during the run."""
    if len(makers) > 1:
        raise UserError(
            f"{where}: expected records of one model, found those of {sorted(makers)}: put the "
            "model back that began the run, or begin again in a new run directory"
        )


class RecordWriter(typing.Generic[R]):
    """Appends records of one type to one part, and skips ids that any part has already.

    `part` of `num_parts` must differ between writers that write at the same time.
    """

    def __init__(self, run_dir: Path, record_type: type[R], part: int = 0, num_parts: int = 1):
        self.run_dir, self.record_type = run_dir, record_type
        name = f"part-{part:05d}-of-{num_parts:05d}.jsonl"
        self.path = run_dir / "records" / KIND[record_type] / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _check_growing(self.path)
        self.path.touch()
        _drop_half_written_line(self.path)
        written = self.read()
        self.done = {record.record_id for record in written}
        self._makers = set().union(*map(makers_of, written))
        self._tokens = _open_growing_tokens(self.path) if record_type is Trajectory else None
        self._file = open(self.path, "ab")  # noqa: SIM115 - closed by close()
        self._size = self.path.stat().st_size
        self._crc = _crc32(self.path, self._size)
        self._count(b"")

    def read(self) -> list[R]:
        """Returns what all writers of this type have written so far, part by part."""
        return read_written(self.run_dir, self.record_type)

    def append(self, records: Sequence[R]) -> None:
        """Writes the records whose ids are new, and waits until they are on disk. Raises UserError
        if they are not by the model that made those before them."""
        new = [record for record in records if record.record_id not in self.done]
        self._makers = self._makers.union(*map(makers_of, new))
        check_makers(self.run_dir, self._makers)
        name = _growing_tokens(self.path).name
        lines = b"".join(_line(record, self._tokens, name) for record in new)
        if self._tokens is not None:  # first, so that no line names bytes that are not there
            self._tokens.flush()
            os.fsync(self._tokens.fileno())
        self._file.write(lines)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._count(lines)
        self.done.update(record.record_id for record in new)

    def _count(self, written: bytes) -> None:
        self._size, self._crc = self._size + len(written), zlib.crc32(written, self._crc)
        atomic_write(_sum_of_growing(self.path), f"{self._size} {self._crc:08x}\n")

    def close(self) -> None:
        self._file.close()
        if self._tokens is not None:
            self._tokens.close()


def _drop_half_written_line(part: Path) -> None:
    with open(part, "rb+") as file:
        file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))


def _growing_tokens(part: Path) -> Path:
    return part.with_suffix(".growing.tokens")


def _open_growing_tokens(part: Path) -> IO[bytes]:
    """Opens the token file of a growing part, and cuts off rows that no line names. A missing row
    is noticed when it is read."""
    file = _growing_tokens(part)
    file.touch()
    with open(part, "rb") as lines:
        spans = [from_json(line, TrajectoryLine).tokens for line in lines]  # pyright: ignore
    end = max((span.end for span in spans if span.file == file.name), default=0)
    if file.stat().st_size > end:
        os.truncate(file, end)
    return open(file, "ab")


def write_manifest(
    run_dir: Path, stage: str, config_digest: str, record_types: Iterable[type[Record]]
) -> None:
    """Puts every part in id order and writes the manifest, which finishes the run. Parts without
    records are left out if others have some."""
    records = {}
    for record_type in record_types:
        kind = KIND[record_type]
        paths = sorted((run_dir / "records" / kind).glob("part-*.jsonl"))
        parts = [_finish_part(path, record_type, run_dir) for path in paths]
        parts = [part for part in parts if part["count"]] or parts[:1]
        records[kind] = {"count": sum(part["count"] for part in parts), "parts": parts}
    files = {
        name: sha256_of(run_dir / name) for name in MANIFEST_FILES if (run_dir / name).exists()
    }
    manifest = {
        "stage": stage,
        "config_digest": config_digest,
        "records": records,
        "files": files,
    }
    for unfinished in (*run_dir.glob(".*.tmp"), *(run_dir / "records").glob("*/.*.tmp")):
        unfinished.unlink()  # left by a process that was killed
    atomic_write(run_dir / MANIFEST, json.dumps(sealed(manifest), indent=2) + "\n")


def _finish_part(path: Path, record_type: type[Record], run_dir: Path) -> dict[str, Any]:
    """Puts a part in id order and returns its entry in the manifest."""
    _check_growing(path)
    keys = (natural_key(record.record_id) for record in _lines(path, record_type))
    is_sorted, count = True, 0
    previous: Any = ()
    for key in keys:
        is_sorted, count, previous = is_sorted and previous <= key, count + 1, key
    _sum_of_growing(path).unlink(missing_ok=True)  # the order changes now
    if record_type is Trajectory or not is_sorted:
        write_records(path, sorted(_lines(path, record_type), key=_order))
        _growing_tokens(path).unlink(missing_ok=True)  # now no line names it

    def entry(file: Path) -> dict[str, Any]:
        return {"path": str(file.relative_to(run_dir)), "sha256": sha256_of(file)}

    found = {"count": count} | entry(path)
    if record_type is Trajectory and count:
        found["tokens"] = entry(path.with_suffix(".tokens"))
    return found

"""Records on disk: a line is a record.

A stage appends records to one JSONL part per process, and writes `manifest.json` last: no manifest
means the run is not finished.

    <run_dir>/records/<kind>/part-00000-of-00001.jsonl     append-only; a record is one line
                             part-00000-of-00001.jsonl.crc32    while the run grows: size and CRC-32
    <run_dir>/manifest.json                                counts and sha256 of every part, sha256
                                                           of the run's other files and of itself

Killed in the middle of a line, a run loses that line only; started again, it skips the ids that are
present. When a stage finishes, each part is put in id order, so a restarted run leaves the same
bytes as an undisturbed one.
"""

from __future__ import annotations

import difflib
import enum
import functools
import json
import math
import os
import socket
import types
import typing
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

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

R = TypeVar("R", bound=Record)

MANIFEST = "manifest.json"
MANIFEST_FILES = ("config.yaml", "metrics.jsonl", "summary.json")
"""Beside the records, files of a run whose checksums its manifest holds."""

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
"""Folder of each record type below `<run_dir>/records`."""


# --- one record <-> one line --------------------------------------------------------------------


def to_json(record: Record) -> str:
    """One line, without its end. Raises UserError if a number is not finite."""
    try:
        return json.dumps(
            vars(record),
            ensure_ascii=False,
            separators=(",", ":"),
            default=lambda e: e.value,
            allow_nan=False,
        )
    except ValueError:
        raise UserError(
            f"expected finite numbers in the {type(record).__name__} {record.record_id}, found "
            "others: the model that made it overflows (compute_dtype float32 has more room)"
        ) from None


@functools.cache
def _field_types(record_type: type) -> dict[str, Any]:
    return typing.get_type_hints(record_type)


def _decode(value: Any, to: Any) -> Any:
    if isinstance(to, types.UnionType):  # of one type and None
        if value is None:
            return None
        (to,) = {*typing.get_args(to)} - {types.NoneType}
    if typing.get_origin(to) is tuple:
        item_type = typing.get_args(to)[0]
        if not isinstance(value, list):
            raise TypeError(f"expected a list, found {value!r}")
        return tuple(_decode(item, item_type) for item in value)
    if isinstance(to, type) and issubclass(to, enum.Enum):
        return to(value)
    to = typing.get_origin(to) or to  # a dict of other columns is not looked into
    if to is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not to:
        raise TypeError(f"expected {to.__name__}, found {value!r:.80}")
    if to is float and not math.isfinite(value):
        raise ValueError(f"expected a finite number, found {value}")
    if isinstance(value, str):
        check_text(value)
    return value


def check_text(text: str) -> None:
    """Raises UserError for half of a surrogate pair: no file and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = text[max(0, error.start - 20) : error.start + 20]
        raise UserError(
            f"expected text that UTF-8 can hold, found half of a surrogate pair in {place!r}"
        ) from None


def from_json(line: str, record_type: type[R]) -> R:
    """Parse one line. Raises UserError naming the missing, unknown or mistyped field."""
    return from_fields(parse_json(line), record_type)


def parse_json(line: str) -> Any:
    """Raises UserError for a line that is no JSON, or holds more than can be read."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # also for integers of thousands of digits
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg} at column {error.colno}"
        raise UserError(
            f"expected one JSON object a line, found {line[:80]!r} ({reason})"
        ) from None


def from_fields(fields: Any, record_type: type[R]) -> R:
    """A record of what `json` made of its line; raises UserError as `from_json` does."""
    types_of = _field_types(record_type)
    if isinstance(fields, dict) and record_type is Problem:
        fields = {"extra": {}} | fields  # runs of before have none
    if not isinstance(fields, dict) or set(fields) != set(types_of):
        found = sorted(fields) if isinstance(fields, dict) else fields
        raise UserError(
            f"a {record_type.__name__} has the fields {sorted(types_of)}, found {found}"
        )
    decoded = {}
    for name, value in fields.items():
        try:
            decoded[name] = _decode(value, types_of[name])
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{record_type.__name__}.{name}: {error}") from None
    return record_type(**decoded)


# --- files --------------------------------------------------------------------------------------


def atomic_write(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:  # the disk is full, maybe: half a file is in the way
        temporary.unlink(missing_ok=True)
        raise


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write one JSONL file, whole or not at all."""
    atomic_write(Path(path), "".join(to_json(record) + "\n" for record in records))


def read_jsonl(path: Path, record_type: type[R]) -> list[R]:
    """One record a line. Raises UserError for what is no record, and for an id that occurs twice,
    with the file, the lines and the id."""
    return _read_files([path], record_type)


def _read_files(paths: Sequence[Path], record_type: type[R], *, growing: bool = False) -> list[R]:
    """Records of all files. `growing`: another process may be writing a file's last line."""
    of_file = [list(_parse_lines(path, record_type, growing)) for path in paths]
    records = [record for found in of_file for record in found]
    if len({record.record_id for record in records}) < len(records):
        _refuse_duplicate(dict(zip(paths, of_file, strict=True)))
    return records


def _parse_lines(path: Path, record_type: type[R], growing: bool) -> Iterator[R]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if growing and not line.endswith(b"\n"):
                return
            try:
                yield from_json(line.decode(), record_type)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: expected UTF-8: {error}") from None
            except UserError as error:
                raise UserError(f"{path}, line {number}: {error}") from None


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
    """Records of one type, from a JSONL file or a finished run directory.

    Raises UserError where the path is missing, the run is not finished, a part's bytes are not
    those the manifest promises, or the run holds no records of the type.
    """
    path = Path(path)
    if path.is_file():
        return read_jsonl(path, record_type)
    records = _read_files(read_parts(path, record_type), record_type)
    check_makers(path, makers_of(records))
    # In the order in which one writer alone would have left them.
    return sorted(records, key=lambda record: natural_key(record.record_id))


def read_parts(run_dir: str | Path, record_type: type[Record]) -> list[Path]:
    """The files with a finished run's records of one type. Raises UserError if the run is not
    finished, or holds none, or if a file's bytes are not those that the manifest promises."""
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
    """Raises UserError if a file of `MANIFEST_FILES` is not the one that the run's manifest names.
    Nothing is known of a run that is not finished."""
    if not (run_dir / MANIFEST).is_file():
        return
    files = read_manifest(run_dir).get("files", {})
    if name in files:
        _check_promised(run_dir, name, files[name])


def check_finished(run_dir: Path) -> None:
    """Raises UserError if any file of a finished run is not the one that its manifest names."""
    for name, digest in _promises(read_manifest(run_dir)):
        _check_promised(run_dir, name, digest)


def _promises(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns name and checksum of every file that a manifest names."""
    parts = [part for kind in manifest["records"].values() for part in kind["parts"]]
    of_parts = [(part["path"], part["sha256"]) for part in parts]
    return [*of_parts, *manifest.get("files", {}).items()]


_WITHOUT_A_COPY = {
    "config.yaml": "write it again: with --dry-run and a new --run-dir beside this one, the "
    "command that made the run prints it",
    "metrics.jsonl": f"delete {MANIFEST} and repeat the command that made the run: it names a line "
    "that cannot be read",
}
"""What to do about a file that the run itself cannot make again."""


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
    """Returns what an error says of a missing path: where it was looked for, and the closest name
    that there is."""
    path = Path(path)
    text = f"nothing at {path}" + ("" if path.is_absolute() else f" (in {Path.cwd()})")
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return text + (f"; did you mean {path.parent / close[0]}?" if close else "")


def read_manifest(run_dir: str | Path) -> dict[str, Any]:
    """The manifest of a finished run. Raises UserError if there is none, or if it is damaged."""
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
    """The object in a JSON file of a finished run. Raises UserError if it is damaged or missing."""
    check_run_file(run_dir, name)
    fields = _read_json(run_dir / name) if (run_dir / name).is_file() else None
    if not isinstance(fields, dict):
        raise UserError(
            f"expected a JSON object in {run_dir / name}, found none: put the file back, or delete "
            f"{MANIFEST} and repeat the command that made the run"
        )
    return fields


def _read_json(file: Path) -> Any:
    """What a JSON file holds; None for one that is no JSON."""
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
    are_texts = all(isinstance(text, str) for promise in promises for text in promise)
    return are_texts and isinstance(fields["stage"], str) and seal_fits(fields)


def read_written(run_dir: Path, record_type: type[R]) -> list[R]:
    """What all writers of a run, finished or not, have written so far."""
    parts = sorted((run_dir / "records" / KIND[record_type]).glob("part-*.jsonl"))
    for part in parts:
        _check_growing(part)
    return _read_files(parts, record_type, growing=True)


def _sum_of_growing(part: Path) -> Path:
    """The file that says how many bytes of a part are written, and their CRC-32."""
    return part.with_name(f"{part.name}.crc32")


def _check_growing(part: Path) -> None:
    """Raises UserError unless a part of an unfinished run begins with the bytes that were written.
    What follows them is newer: the process ended before it could count it."""
    file = _sum_of_growing(part)
    if not file.is_file():
        return
    size, _, found = file.read_text(encoding="utf-8", errors="replace").partition(" ")
    written = part.read_bytes() if part.is_file() else b""
    is_whole = size.isdecimal() and len(written) >= int(size)
    if is_whole and f"{zlib.crc32(written[: int(size)]):08x}\n" == found:
        return
    raise UserError(
        f"{part} does not begin with the {size} bytes that were written ({file.name}): put it "
        "back. Without a copy, delete both files and give the same command again: their records "
        "are made again, the same ones"
    )


def makers_of(records: Iterable[Record]) -> set[str]:
    """Ids of the models that made these records, as far as records name them."""
    names = ("policy_id", "judge_id")
    return {vars(record)[name] for record in records for name in names if name in vars(record)}


def check_makers(where: Path, makers: set[str]) -> None:
    """Raises UserError if records of one type and run are of several models: half of them are of a
    model that was replaced while the run was under way."""
    if len(makers) > 1:
        raise UserError(
            f"{where}: expected records of one model, found those of {sorted(makers)}: put the "
            "model back that began the run, or begin again in a new run directory"
        )


class RecordWriter(typing.Generic[R]):
    """Appends records of one type to a part of their own, skipping ids that any part has already.

    Part `part` of `num_parts`: those that write at the same time must differ."""

    def __init__(self, run_dir: Path, record_type: type[R], part: int = 0, num_parts: int = 1):
        self.run_dir, self.record_type = run_dir, record_type
        name = f"part-{part:05d}-of-{num_parts:05d}.jsonl"
        self.path = run_dir / "records" / KIND[record_type] / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _check_growing(self.path)
        self._drop_half_written_line()
        written = self.read()
        self.done = {record.record_id for record in written}
        self._makers = makers_of(written)
        self._file = open(self.path, "ab")  # noqa: SIM115 - closed by close()
        self._size, self._crc = 0, 0
        self._count(self.path.read_bytes())

    def _drop_half_written_line(self) -> None:
        self.path.touch()
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)

    def read(self) -> list[R]:
        """What has been written so far, by all writers of this type, part by part."""
        return read_written(self.run_dir, self.record_type)

    def append(self, records: Sequence[R]) -> None:
        """Write records whose id is new, and make sure they are on disk. Raises UserError if they
        are not of the model that made those before them."""
        new = [record for record in records if record.record_id not in self.done]
        self._makers |= makers_of(new)
        check_makers(self.run_dir, self._makers)
        lines = "".join(to_json(record) + "\n" for record in new).encode()
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


def write_manifest(
    run_dir: Path, stage: str, config_digest: str, record_types: Iterable[type[Record]]
) -> None:
    """Put every part in id order and write the manifest: from here on the run is finished. Parts
    without a record are left out, where others have some."""
    records = {}
    for record_type in record_types:
        kind = KIND[record_type]
        parts = []
        for path in sorted((run_dir / "records" / kind).glob("part-*.jsonl")):
            _check_growing(path)
            found = read_jsonl(path, record_type)
            _sum_of_growing(path).unlink(missing_ok=True)  # from here on the order is another one
            found.sort(key=lambda record: natural_key(record.record_id))
            write_records(path, found)
            parts.append(
                {
                    "path": str(path.relative_to(run_dir)),
                    "count": len(found),
                    "sha256": sha256_of(path),
                }
            )
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
        unfinished.unlink()  # of a process that was killed while it wrote a whole file
    atomic_write(run_dir / MANIFEST, json.dumps(sealed(manifest), indent=2) + "\n")

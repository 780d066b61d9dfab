"""Records on disk: a line is a record.

A stage appends records to one JSONL part per process, and writes `manifest.json` last: no manifest
means the run is not finished.

    <run_dir>/records/<kind>/part-00000-of-00001.jsonl     append-only; a record is one line
    <run_dir>/manifest.json                                counts and sha256 of every part

Killed in the middle of a line, a run loses that line only; started again, it skips the ids that are
present. When a stage finishes, each part is put in id order, so a restarted run leaves the same
bytes as an undisturbed one.
"""

from __future__ import annotations

import difflib
import enum
import functools
import hashlib
import io
import json
import os
import socket
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from stepwiser_jax.records import (
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
    Segmentation,
    Selection,
    SftExample,
    Trajectory,
    UserError,
    natural_key,
)

R = TypeVar("R", bound=Record)

KIND: dict[type, str] = {
    Problem: "problems",
    Trajectory: "trajectories",
    SftExample: "sft_examples",
    Dialogue: "dialogues",
    Segmentation: "segmentations",
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
    return json.dumps(
        vars(record), ensure_ascii=False, separators=(",", ":"), default=lambda e: e.value
    )


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
    if to is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not to:
        raise TypeError(f"expected {to.__name__}, found {value!r}")
    return value


def from_json(line: str, record_type: type[R]) -> R:
    """Parse one line. Raises UserError naming the missing, unknown or mistyped field."""
    return from_fields(parse_json(line), record_type)


def parse_json(line: str) -> Any:
    """Raises UserError for a line that is no JSON."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"expected one JSON object a line, found {line[:80]!r} ({error.msg} at column "
            f"{error.colno})"
        ) from None


def from_fields(fields: Any, record_type: type[R]) -> R:
    """A record of what `json` made of its line; raises UserError as `from_json` does."""
    types_of = _field_types(record_type)
    if not isinstance(fields, dict) or set(fields) != set(types_of):
        found = sorted(fields) if isinstance(fields, dict) else fields
        raise UserError(
            f"a {record_type.__name__} has the fields {sorted(types_of)}, found {found}"
        )
    decoded = {}
    for name, value in fields.items():
        try:
            decoded[name] = _decode(value, types_of[name])
        except (TypeError, ValueError) as error:
            raise UserError(f"{record_type.__name__}.{name}: {error}") from None
    return record_type(**decoded)


# --- files --------------------------------------------------------------------------------------


def atomic_write(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write one JSONL file, whole or not at all."""
    atomic_write(Path(path), "".join(to_json(record) + "\n" for record in records))


def read_jsonl(path: Path, record_type: type[R], *, growing: bool = False) -> list[R]:
    """One record a line. `growing`: another process may be writing the last line."""
    content = path.read_bytes()
    if growing:
        content = content[: content.rfind(b"\n") + 1]
    records = []
    for number, line in enumerate(io.StringIO(content.decode(), newline="\n"), 1):
        try:
            records.append(from_json(line, record_type))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return records


def read_records(path: str | Path, record_type: type[R]) -> list[R]:
    """Records of one type, from a JSONL file or a finished run directory.

    Raises UserError where the path is missing, the run is not finished, a part's bytes are not
    those the manifest promises, or the run holds no records of the type.
    """
    path = Path(path)
    if path.is_file():
        return read_jsonl(path, record_type)
    records: list[R] = []
    for part in read_parts(path, record_type):
        file = path / part["path"]
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != part["sha256"]:
            raise UserError(f"{file} is missing or is not the file that {path}/manifest.json names")
        records.extend(read_jsonl(file, record_type))
    # In the order in which one writer alone would have left them.
    return sorted(records, key=lambda record: natural_key(record.record_id))


def read_parts(run_dir: str | Path, record_type: type[Record]) -> list[dict[str, Any]]:
    """The manifest's entries for records of one type. Raises UserError where the run is not
    finished, or holds none."""
    manifest = read_manifest(run_dir)
    kind = KIND[record_type]
    if kind not in manifest["records"]:
        held = sorted(manifest["records"]) or "no records"
        raise UserError(
            f"{run_dir} is a run of stage '{manifest['stage']}' and holds {held}, not {kind}"
        )
    return manifest["records"][kind]["parts"]


def nothing_at(path: str | Path) -> str:
    """Returns what an error says of a missing path: where it was looked for, and the closest name
    that there is."""
    path = Path(path)
    text = f"nothing at {path}" + ("" if path.is_absolute() else f" (in {Path.cwd()})")
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return text + (f"; did you mean {path.parent / close[0]}?" if close else "")


def read_manifest(run_dir: str | Path) -> dict[str, Any]:
    """The manifest of a finished run. Raises UserError where there is none."""
    run_dir = Path(run_dir)
    manifest = run_dir / "manifest.json"
    if manifest.is_file():
        return json.loads(manifest.read_text(encoding="utf-8"))
    if (run_dir / "config.yaml").is_file():
        raise UserError(
            f"{run_dir} is not finished (it has no manifest.json): resume it with the command that "
            "started it, then run this one again"
        )
    raise UserError(f"expected a file or a finished run directory, found {nothing_at(run_dir)}")


def read_written(run_dir: Path, record_type: type[R]) -> list[R]:
    """What all writers of a run, finished or not, have written so far."""
    parts = sorted((run_dir / "records" / KIND[record_type]).glob("part-*.jsonl"))
    return [record for part in parts for record in read_jsonl(part, record_type, growing=True)]


class RecordWriter(typing.Generic[R]):
    """Appends records of one type to a part of their own, skipping ids that any part has already.

    Part `part` of `num_parts`: those that write at the same time must differ."""

    def __init__(self, run_dir: Path, record_type: type[R], part: int = 0, num_parts: int = 1):
        self.run_dir, self.record_type = run_dir, record_type
        name = f"part-{part:05d}-of-{num_parts:05d}.jsonl"
        self.path = run_dir / "records" / KIND[record_type] / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_half_written_line()
        self.done = {record.record_id for record in self.read()}
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

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
        """Write records whose id is new, and make sure they are on disk."""
        new = [record for record in records if record.record_id not in self.done]
        self._file.write("".join(to_json(record) + "\n" for record in new))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.update(record.record_id for record in new)

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
            found = read_jsonl(path, record_type)
            found.sort(key=lambda record: natural_key(record.record_id))
            write_records(path, found)
            parts.append(
                {
                    "path": str(path.relative_to(run_dir)),
                    "count": len(found),
                    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                }
            )
        parts = [part for part in parts if part["count"]] or parts[:1]
        records[kind] = {"count": sum(part["count"] for part in parts), "parts": parts}
    manifest = {"stage": stage, "config_digest": config_digest, "records": records}
    atomic_write(run_dir / "manifest.json", json.dumps(manifest, indent=2) + "\n")

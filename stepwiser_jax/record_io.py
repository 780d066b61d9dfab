"""Reads and writes the records of runs.

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

import dataclasses
import heapq
import json
import os
import typing
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NoReturn, TypeVar

from stepwiser_jax.checksums import sealed, sha256_of
from stepwiser_jax.errors import UserError
from stepwiser_jax.files import atomic_write
from stepwiser_jax.manifest import MANIFEST, MANIFEST_FILES, check_promised, read_manifest
from stepwiser_jax.record_lines import (
    TrajectoryLine,
    encode_line,
    from_json,
    read_lines,
    write_records,
)
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


# --- what a finished run holds --------------------------------------------------------------------


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
        yield from _without_duplicates({path: list(read_lines(path, record_type))})
        return
    parts = _promised_parts(path, record_type)
    names, makers = _names_of_makers(record_type), set[str]()
    last = None
    streams = [read_lines(part, record_type) for part in parts]
    for record in heapq.merge(*streams, key=_order) if len(parts) > 1 else streams[0]:
        record_id = record.record_id
        if record_id == last:
            _refuse_duplicate({part: list(read_lines(part, record_type)) for part in parts})
        last = record_id
        for name in names:
            makers.add(getattr(record, name))
        yield record
    _check_makers(path, makers)


def _order(record: Record) -> Any:
    return natural_key(record.record_id)


def _promised_parts(run_dir: str | Path, record_type: type[Record]) -> list[Path]:
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
        check_promised(run_dir, name, digest)
    return [run_dir / name for name in parts]


def _names_of_makers(record_type: type[Record]) -> list[str]:
    """Returns the fields that hold the id of the model that made a record."""
    fields = {field.name for field in dataclasses.fields(record_type)}
    return [name for name in ("policy_id", "judge_id") if name in fields]


def _check_makers(where: Path, makers: set[str]) -> None:
    """Raises UserError if records of one type and run come from several models. That is so if a
    model was replaced during the run."""
    if len(makers) > 1:
        raise UserError(
            f"{where}: expected records of one model, found those of {sorted(makers)}: put the "
            "model back that began the run, or begin again in a new run directory"
        )


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


# --- while a run grows ----------------------------------------------------------------------------


def stream_written(run_dir: Path, record_type: type[R]) -> Iterator[R]:
    """Yields what all writers of a run, finished or not, have written so far, part by part."""
    for part in _growing_parts(run_dir, record_type):
        yield from read_lines(part, record_type, growing=True)


def read_written(run_dir: Path, record_type: type[R]) -> list[R]:
    """Returns what all writers of a run, finished or not, have written so far. Raises UserError for
    an id that occurs twice."""
    parts = _growing_parts(run_dir, record_type)
    return _without_duplicates(
        {part: list(read_lines(part, record_type, growing=True)) for part in parts}
    )


def _growing_parts(run_dir: Path, record_type: type[Record]) -> Iterator[Path]:
    """Yields the files of one type in a run, finished or not. Raises UserError at one that does not
    hold what was written."""
    for part in sorted((run_dir / "records" / KIND[record_type]).glob("part-*.jsonl")):
        _check_growing(part)
        yield part


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
        self._last: Any = None if written else []
        """The key of the last record; None if this part is not known to be in id order."""
        self._makers = self._makers_of(written)
        self._tokens = _open_growing_tokens(self.path) if record_type is Trajectory else None
        self._file = open(self.path, "ab")  # noqa: SIM115 - closed by close()
        self._size = self.path.stat().st_size
        self._crc = _crc32(self.path, self._size)
        self._count(b"")

    def _makers_of(self, records: Sequence[R]) -> set[str]:
        names = _names_of_makers(self.record_type)
        return {getattr(record, name) for name in names for record in records}

    def read(self) -> list[R]:
        """Returns what all writers of this type have written so far, part by part."""
        return read_written(self.run_dir, self.record_type)

    def append(self, records: Sequence[R]) -> None:
        """Writes the records whose ids are new, and waits until they are on disk. Raises UserError
        if they are not by the model that made those before them."""
        new = [record for record in records if record.record_id not in self.done]
        self._makers |= self._makers_of(new)
        _check_makers(self.run_dir, self._makers)
        name = _growing_tokens(self.path).name
        lines = b"".join(encode_line(record, self._tokens, name) for record in new)
        if self._tokens is not None:  # first, so that no line names bytes that are not there
            self._tokens.flush()
            os.fsync(self._tokens.fileno())
        self._file.write(lines)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._count(lines)
        ids = [record.record_id for record in new]
        self.done.update(ids)
        if self._last is not None:
            keys = [self._last, *map(natural_key, ids)]
            self._last = keys[-1] if all(a < b for a, b in pairwise(keys)) else None

    @property
    def num_in_order(self) -> int | None:
        """Returns the number of this part's records if they are known to be in id order. Those of a
        part that an earlier process began are not."""
        return None if self._last is None else len(self.done)

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
        spans = [from_json(line, TrajectoryLine).tokens for line in lines]
    end = max((span.end for span in spans if span.file == file.name), default=0)
    if file.stat().st_size > end:
        os.truncate(file, end)
    return open(file, "ab")


# --- when a run is finished -----------------------------------------------------------------------


def write_manifest(
    run_dir: Path,
    stage: str,
    config_digest: str,
    record_types: Iterable[type[Record]],
    in_order: Mapping[Path, int | None] = MappingProxyType({}),
) -> None:
    """Puts every part in id order and writes the manifest, which finishes the run. Parts without
    records are left out if others have some. `in_order` holds the number of records of parts that
    are known to be in order (`RecordWriter.num_in_order`), and need not be read for it."""
    records = {}
    for record_type in record_types:
        kind = KIND[record_type]
        growing = _growing_parts(run_dir, record_type)
        parts = [_finish_part(path, record_type, run_dir, in_order.get(path)) for path in growing]
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


def _finish_part(
    path: Path, record_type: type[Record], run_dir: Path, num_in_order: int | None
) -> dict[str, Any]:
    """Puts a part in id order and returns its entry in the manifest."""
    is_sorted, count = True, num_in_order or 0
    if num_in_order is None:
        previous: Any = []
        for key in map(_order, read_lines(path, record_type)):
            is_sorted, count, previous = is_sorted and previous <= key, count + 1, key
    _sum_of_growing(path).unlink(missing_ok=True)  # the order changes now
    if record_type is Trajectory or not is_sorted:
        write_records(path, sorted(read_lines(path, record_type), key=_order))
        _growing_tokens(path).unlink(missing_ok=True)  # now no line names it

    def entry(file: Path) -> dict[str, Any]:
        return {"path": str(file.relative_to(run_dir)), "sha256": sha256_of(file)}

    found = {"count": count} | entry(path)
    if record_type is Trajectory and count:
        found["tokens"] = entry(path.with_suffix(".tokens"))
    return found

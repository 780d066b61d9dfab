"""Writes and checks checksums, which show whether a file still holds what was written.

A directory that is handed on as a whole, such as an exported model, has a file `SHA256SUMS`, which
`sha256sum -c` reads too. A JSON object may hold the checksum of its other fields in a field
`sha256`. Files without a checksum, such as models of others, are read unchecked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stepwiser_jax.errors import UserError

SUMS = "SHA256SUMS"
THREADS = 8
"""Files that are read at once: one thread hashes 1 to 2 GB/s, and a disk may be faster."""


def sha256_of(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_checksums(directory: Path) -> None:
    """Writes the checksums of all files of a directory. Hidden files are left out: a process that
    was killed may have left one half-written."""
    found = sorted(path for path in directory.iterdir() if path.is_file())
    files = [file for file in found if file.name != SUMS and not file.name.startswith(".")]
    with ThreadPoolExecutor(THREADS) as pool:
        lines = zip(pool.map(sha256_of, files), files, strict=True)
        text = "".join(f"{digest}  {file.name}\n" for digest, file in lines)
    temporary = directory / f".{SUMS}.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(directory / SUMS)


def read_checksums(directory: Path) -> dict[str, str]:
    """Returns the checksum of each file of a directory by name, none if there is no `SHA256SUMS`.
    Raises UserError if that file is damaged."""
    file = directory / SUMS
    if not file.is_file():
        return {}
    sums = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, separator, name = line.partition("  ")
        if len(digest) != 64 or not separator or "/" in name:
            raise UserError(
                f"{file} is damaged: expected lines of a checksum and a name, found {line[:80]!r}"
            )
        sums[name] = digest
    return sums


def check_files(directory: Path, names: Iterable[str], sums: dict[str, str]) -> None:
    """Raises UserError with the names of the files whose checksums differ from `sums`."""

    def is_whole(name: str) -> bool:
        file = directory / name
        return file.is_file() and sha256_of(file) == sums[name]

    names = sorted(names)
    with ThreadPoolExecutor(THREADS) as pool:
        whole = list(pool.map(is_whole, names))
    if not all(whole):
        damaged = [name for name, is_good in zip(names, whole, strict=True) if not is_good]
        raise UserError(
            f"{directory}: {', '.join(damaged)} is missing, or is not the file that was written "
            f"({SUMS} names another): put it back, or write the directory again. If you changed "
            f"it on purpose, delete {SUMS}"
        )


# --- objects in JSON ------------------------------------------------------------------------------


def sealed(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the object with a checksum of its other fields."""
    return fields | {"sha256": _digest(fields)}


def seal_fits(fields: dict[str, Any]) -> bool:
    """Returns whether an object fits its checksum, or has none."""
    rest = {name: value for name, value in fields.items() if name != "sha256"}
    return fields.get("sha256", _digest(rest)) == _digest(rest)


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

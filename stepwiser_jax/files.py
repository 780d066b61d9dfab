"""Writes files completely or not at all, and says what is near a path where nothing is."""

from __future__ import annotations

import contextlib
import difflib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO


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


def nothing_at(path: str | Path) -> str:
    """Returns the text of an error about a missing path, with the closest name beside it."""
    path = Path(path)
    text = f"nothing at {path}" + ("" if path.is_absolute() else f" (in {Path.cwd()})")
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return text + (f"; did you mean {path.parent / close[0]}?" if close else "")

"""What a file system refuses, told in one message that says what to change."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stepwiser_jax.errors import UserError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def writing_to(directory: str | Path) -> Iterator[None]:
    """Everything inside may write files below `directory`.

    Raises UserError for a disk or a quota that is full, a file system that is read-only, and
    missing rights; what is written so far stays valid. Libraries that write in another language
    (TensorStore, safetensors) have types of their own for this, with the system's words in them.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = getattr(error, "errno", None) or _named_by(str(error))
        file = getattr(error, "filename", None)
        where = f"{directory} ({file})" if file else directory
        if number in _NO_SPACE:
            raise UserError(
                f"{where}: {os.strerror(number)}. Make room there, then give the same command "
                "again: it goes on from what is written"
            ) from error
        if number in _NOT_ALLOWED:
            raise UserError(
                f"{where}: {os.strerror(number)}. Allow this user to read and write there, then "
                "give the same command again: it goes on from what is written"
            ) from error
        raise


def check_writable(directory: Path) -> None:
    """Raises UserError where `directory` is there and cannot be written, or cannot be made."""
    while not directory.exists():
        directory = directory.parent
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(
            f"{directory} cannot be written by this user, or is mounted read-only: expected a "
            "directory for the files of this run, allow that or name another one"
        )


def _named_by(message: str) -> int | None:
    return next((e for e in (*_NO_SPACE, errno.EROFS) if os.strerror(e) in message), None)

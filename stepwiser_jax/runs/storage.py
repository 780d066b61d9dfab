"""Turns errors of a file system into one message that says what to change."""

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
    """Raises UserError when code inside cannot write files below `directory`.

    That is when a disk or a quota is full, a file system is read-only, or rights are missing. What
    is written so far stays valid. Libraries that write from C++ (TensorStore, safetensors) raise
    errors of their own types; these are known by the system's words in their message.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = getattr(error, "errno", None) or _errno_in(str(error))
        if number in _NO_SPACE:
            change = "Make room there"
        elif number in _NOT_ALLOWED:
            change = "Allow this user to read and write there"
        else:
            raise
        file = getattr(error, "filename", None)
        where = f"{directory} ({file})" if file else directory
        raise UserError(
            f"{where}: {os.strerror(number)}. {change}, then give the same command again: it goes "
            "on from what is written"
        ) from error


def check_writable(directory: Path) -> None:
    """Raises UserError if `directory` exists and cannot be written, or cannot be made."""
    while not directory.exists():
        directory = directory.parent
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(
            f"{directory} cannot be written by this user, or is mounted read-only: expected a "
            "directory for the files of this run, allow that or name another one"
        )


def _errno_in(message: str) -> int | None:
    return next((e for e in (*_NO_SPACE, errno.EROFS) if os.strerror(e) in message), None)

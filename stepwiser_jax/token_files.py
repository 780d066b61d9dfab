"""Token ids and log-probs on disk: one binary file beside each part of trajectories.

The arrays of a trajectory lie in one row of 4-byte little-endian words: prompt ids (int32),
completion ids (int32), log-probs (float32). The trajectory's JSON line holds the row's `TokenSpan`.
Without this project, NumPy reads a row:

    ids = np.fromfile(file, "<i4", prompt + completion, offset=offset)

A row is read when it is asked for. Its CRC-32 lies in the JSON line and is checked at each read.
"""

from __future__ import annotations

import functools
import os
import weakref
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from stepwiser_jax.errors import UserError
from stepwiser_jax.records import TokenArrays, Tokens, expect

WORD = 4
"""Bytes of a token id, and of a log-prob."""


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Where a row lies: file name, offset in bytes, lengths in tokens, and its CRC-32."""

    file: str
    offset: int
    prompt: int
    completion: int
    crc32: int

    def __post_init__(self) -> None:
        sizes = (self.offset, self.prompt, self.completion, self.crc32)
        is_name = self.file.endswith(".tokens") and "/" not in self.file
        expect(min(sizes) >= 0 and max(sizes) < 2**63 and is_name, "a row of a .tokens file", self)

    @property
    def end(self) -> int:
        """Offset of the first byte after the row."""
        return self.offset + WORD * (self.prompt + 2 * self.completion)


class TokenFile:
    """A file of rows. It is opened when the first row is read."""

    def __init__(self, path: Path):
        self.path = path

    @functools.cached_property
    def _descriptor(self) -> int:
        descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def read(self, span: TokenSpan) -> Tokens:
        """Returns views of the row's bytes. Raises UserError if they are not those that were
        written."""
        try:
            row = os.pread(self._descriptor, span.end - span.offset, span.offset)
        except FileNotFoundError:
            row = b""
        if len(row) != span.end - span.offset or zlib.crc32(row) != span.crc32:
            raise UserError(
                f"{self.path} is missing, or its bytes {span.offset} to {span.end} are not those "
                "that were written: put it back. Without a copy, delete it, the .jsonl file of the "
                "same part and, in a finished run, manifest.json, and repeat the command that made "
                "the run: it makes the same records again"
            )
        ids = np.frombuffer(row, "<i4", span.prompt + span.completion)
        logprobs = np.frombuffer(row, "<f4", span.completion, WORD * len(ids))
        return Tokens(ids[: span.prompt], ids[span.prompt :], logprobs)


@dataclass(frozen=True, slots=True, eq=False)
class StoredTokens:
    """The arrays of a trajectory in a file. Each access reads the row again and keeps nothing."""

    source: TokenFile
    span: TokenSpan

    def read(self) -> Tokens:
        return self.source.read(self.span)

    @property
    def num_prompt(self) -> int:
        return self.span.prompt

    @property
    def num_completion(self) -> int:
        return self.span.completion

    def __eq__(self, other: object) -> bool:
        return self.read() == other


def write_row(file: IO[bytes], name: str, tokens: TokenArrays, record_id: str) -> dict[str, Any]:
    """Appends a row to `file`, which is called `name` when it is read. Returns the row's span as a
    JSON object. Raises UserError if a log-prob is not finite."""
    arrays = tokens.read()
    if not np.isfinite(arrays.logprobs).all():
        raise UserError(
            f"expected finite log-probs in the trajectory {record_id}, found others: the model "
            "that made it overflows (compute_dtype float32 has more room)"
        )
    parts = (arrays.prompt_ids, arrays.completion_ids, arrays.logprobs)
    row = b"".join(part.astype(part.dtype.newbyteorder("<")).tobytes() for part in parts)
    offset = file.tell()
    file.write(row)
    span = TokenSpan(name, offset, tokens.num_prompt, tokens.num_completion, zlib.crc32(row))
    return asdict(span)

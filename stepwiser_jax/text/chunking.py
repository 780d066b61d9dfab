"""Cuts a finished solution into chunks (StepWiser 3.1): as a teacher tagged it, or by a rule.

    solution -> teacher -> <chunk>...</chunk> <chunk>...</chunk> -> its chunks, if they add up to
                                                                     the solution

The paper does not say what becomes of white space around tags. Here it is not part of a chunk: the
chunks add up to the solution if only white space stands between them.
"""

from __future__ import annotations

import enum
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from stepwiser_jax.errors import UserError
from stepwiser_jax.text.chunks import CHUNK_CLOSE, CHUNK_OPEN, strip_tags

Splitter = Literal["blank_lines", "steps", "sentences"]

_BOUNDARIES: dict[Splitter, str] = {
    "blank_lines": r"\n\s*\n",
    "steps": r"(?<!\s)[^\S\n]*\n\s*(?=(?:[#*]+ *)?Step \d)",
    "sentences": r"(?<=[.!?])\s+",
}


class ProposalOutcome(enum.Enum):
    """What became of a teacher's proposal: it is KEPT, or the reason why it is not."""

    KEPT = "kept"
    NO_ROOM = "no_room"
    UNFINISHED = "unfinished"
    UNBALANCED_TAGS = "unbalanced_tags"
    TEXT_OUTSIDE_OF_CHUNKS = "text_outside_of_chunks"
    EMPTY_CHUNK = "empty_chunk"
    ALTERED = "altered"


def read_chunks(text: str, solution: str) -> tuple[ProposalOutcome, tuple[str, ...]]:
    """Returns what becomes of a teacher's `text`, and the chunks of `solution` that it tags. There
    are none unless it is KEPT."""
    outside, *parts = re.split(f"({CHUNK_OPEN}|{CHUNK_CLOSE})", text)
    tags, between = parts[::2], [part.strip() for part in parts[1::2]]
    if tags != [CHUNK_OPEN, CHUNK_CLOSE] * (len(tags) // 2):
        return ProposalOutcome.UNBALANCED_TAGS, ()
    chunks, outsides = between[::2], [outside.strip(), *between[1::2]]
    if not chunks or any(outsides):
        return ProposalOutcome.TEXT_OUTSIDE_OF_CHUNKS, ()
    if not all(chunks):
        return ProposalOutcome.EMPTY_CHUNK, ()
    end = 0
    for chunk in chunks:
        begin = solution.find(chunk, end)
        if begin < 0 or solution[end:begin].strip():
            return ProposalOutcome.ALTERED, ()
        end = begin + len(chunk)
    return (
        (ProposalOutcome.ALTERED, ())
        if solution[end:].strip()
        else (ProposalOutcome.KEPT, tuple(chunks))
    )


def cut(solution: str) -> tuple[str, ...]:
    """Returns the chunks of a solution: those of its tags if it has any, else those between blank
    lines. Raises UserError as `cut_at_tags` does."""
    if CHUNK_OPEN in solution or CHUNK_CLOSE in solution:
        return cut_at_tags(solution)
    return split_solution(solution, "blank_lines")


def cut_at_tags(solution: str) -> tuple[str, ...]:
    """Returns the chunks that a solution tags, without the tags. Text after the last tag joins the
    last chunk, as in `text.chunks.chunk_ends`. Raises UserError if the tags are not in pairs, if a
    chunk is empty, or if other text stands outside of chunks."""
    head, close, tail = solution.rpartition(CHUNK_CLOSE)
    if close and tail.strip() and CHUNK_OPEN not in tail:
        solution = f"{head.rstrip()}\n{tail.strip()}{close}"
    outcome, chunks = read_chunks(solution, strip_tags(solution))
    if outcome is not ProposalOutcome.KEPT:
        raise UserError(
            f"expected {CHUNK_OPEN} and {CHUNK_CLOSE} around every chunk, found "
            f"{outcome.value.replace('_', ' ')}: correct the tags, or cut in another way"
        )
    return chunks


def majority_chunking(proposals: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], int]:
    """Returns the most frequent proposal, the earliest of equals, and how often it occurs."""
    return Counter(proposals).most_common(1)[0]


def split_solution(solution: str, splitter: Splitter) -> tuple[str, ...]:
    """Splits by a rule of thumb: at blank lines, before lines that begin with `Step n`, or after
    sentences."""
    parts = re.split(_BOUNDARIES[splitter], solution)
    return tuple(part.strip() for part in parts if part.strip())


def join_tagged(chunks: Sequence[str]) -> str:
    """Returns the tagged solution, which a policy learns to write."""
    return "\n".join(f"{CHUNK_OPEN}\n{chunk}\n{CHUNK_CLOSE}" for chunk in chunks)

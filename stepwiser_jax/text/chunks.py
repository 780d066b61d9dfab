"""Finds chunks: spans of the sampled token ids that end where the policy closed them.

A closing tag is several tokens in real vocabularies, and its last token may hold the characters
that follow it. So boundaries are found on token ids, by an automaton that reads each token's bytes.
A chunk ends with the token that completes the tag. The sampler stops at tags with the same table.
Nothing is re-tokenised and nothing is added to the vocabulary.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stepwiser_jax.errors import UserError
from stepwiser_jax.text.tokenizer import TokenIds, Tokenizer, completion_text

CHUNK_OPEN = "<chunk>"
CHUNK_CLOSE = "</chunk>"
BLANK_LINE = "\n\n"


def end_patterns(chunking: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the strings that end a chunk: those listed, or those of `tags` or `blank_lines`."""
    if isinstance(chunking, str):
        return {"tags": (CHUNK_CLOSE,), "blank_lines": (BLANK_LINE,)}[chunking]
    return tuple(chunking)


@dataclass(frozen=True)
class TokenMatcher:
    """An automaton that finds strings in token ids: Aho-Corasick over bytes, compiled to tokens.

    `table_AV[state, token]` is the next state. State 0 is the start. The last state means that a
    pattern was completed; it is never left."""

    table_AV: np.ndarray

    @classmethod
    def build(cls, token_bytes: Sequence[bytes], patterns: Sequence[str]) -> TokenMatcher:
        """Returns a matcher of the patterns. Raises ValueError if there are none, or one is
        empty."""
        step = _byte_automaton([pattern.encode() for pattern in patterns])
        longest = max(map(len, token_bytes), default=0)
        bytes_VL = np.zeros((len(token_bytes), longest), np.uint8)
        length_V = np.array([len(token) for token in token_bytes])
        for token, content in enumerate(token_bytes):
            bytes_VL[token, : len(content)] = np.frombuffer(content, np.uint8)
        table_AV = np.repeat(np.arange(len(step))[:, None], len(token_bytes), axis=1)
        for position in range(longest):
            inside_V = position < length_V
            moved_AV = step[table_AV[:, inside_V], bytes_VL[inside_V, position][None]]
            table_AV[:, inside_V] = moved_AV
        return cls(table_AV.astype(np.int16))

    @property
    def accept(self) -> int:
        return len(self.table_AV) - 1

    def ends(self, ids: Sequence[int]) -> list[int]:
        """Returns the exclusive end of every token that completes a pattern. The search starts
        anew after each."""
        ends, state = [], 0
        for position, token in enumerate(ids, 1):
            state = int(self.table_AV[state, token])
            if state == self.accept:
                ends.append(position)
                state = 0
        return ends


def _byte_automaton(patterns: Sequence[bytes]) -> np.ndarray:
    """Returns the next state for each state and byte, (states, 256). The last state means that a
    pattern was completed; it is never left."""
    if not patterns or not all(patterns):
        raise ValueError(f"expected non-empty patterns, found {list(patterns)}")
    children: list[dict[int, int]] = [{}]
    final: set[int] = set()
    for pattern in patterns:
        node = 0
        for byte in pattern:
            if byte not in children[node]:
                children.append({})
                children[node][byte] = len(children) - 1
            node = children[node][byte]
        final.add(node)
    step = np.zeros((len(children), 256), np.int64)
    fail = [0] * len(children)
    queue = deque([0])
    while queue:
        node = queue.popleft()
        if fail[node] in final:
            final.add(node)
        step[node] = step[fail[node]] if node else 0
        for byte, child in children[node].items():
            fail[child] = int(step[fail[node], byte]) if node else 0
            step[node, byte] = child
            queue.append(child)
    accept = len(children)
    step = np.where(np.isin(step, list(final)), accept, step)
    return np.vstack([step, np.full((1, 256), accept)])


def chunk_ends(
    completion_ids: Sequence[int], matcher: TokenMatcher, tokenizer: Tokenizer
) -> tuple[int, ...]:
    """Returns the exclusive token ends of the chunks, a partition of the completion.

    A span without text (only white space, tags, end tokens) is no chunk. It joins the chunk before
    it, or the one after it if it comes first. Text after the last closing tag joins the last chunk
    unless it opens a new one: the answer may follow the tag at once (paper Table 11). If blank
    lines are the boundaries, it is a chunk like any other.
    """
    total, matches = len(completion_ids), matcher.ends(completion_ids)
    tagged = CHUNK_CLOSE in tokenizer.decode(completion_ids)
    chunks: list[int] = []
    start = 0
    for end in [*(match for match in matches if match < total), total]:
        text = completion_text(tokenizer, completion_ids[start:end])
        is_tail = end == total and total not in matches
        joins = not strip_tags(text).strip() or (is_tail and tagged and CHUNK_OPEN not in text)
        if joins and chunks:
            chunks[-1] = end
        elif not joins or end == total:
            chunks.append(end)
        start = end
    return tuple(chunks)


def chunk_texts(tokenizer: Tokenizer, completion_ids: TokenIds, ends: Sequence[int]) -> list[str]:
    """Returns the exact text of every chunk, without the end token."""
    starts = [0, *ends[:-1]]
    return [
        completion_text(tokenizer, completion_ids[start:end])
        for start, end in zip(starts, ends, strict=True)
    ]


def strip_tags(text: str) -> str:
    """Returns the text without its tags, for a judge that knows none. A tag that results from the
    removal of another one, as in `<chu</chunk>nk>`, is removed too."""
    kept = ""
    for piece in re.split("(?<=>)", text):
        kept += piece
        kept = kept.removesuffix(CHUNK_OPEN).removesuffix(CHUNK_CLOSE)
    return kept


def tagged(chunk: str) -> str:
    """Returns a chunk in its tags, as the embedded task writes it."""
    return f"{CHUNK_OPEN} {chunk} {CHUNK_CLOSE}"


def check_tags(tokenizer: Tokenizer) -> None:
    """Raises UserError if the tokenizer does not give the tags back."""
    text = f"one {CHUNK_OPEN} two {CHUNK_CLOSE} three"
    back = tokenizer.decode(tokenizer.encode(text))
    if CHUNK_OPEN not in back or CHUNK_CLOSE not in back:
        raise UserError(
            f"the tokenizer cannot round-trip the chunk tags: {text!r} comes back as {back!r}. Use "
            "a tokenizer that can spell them, or chunking: blank_lines"
        )

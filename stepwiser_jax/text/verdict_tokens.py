"""Finds the token of a written judgment that decides its verdict.

    \\boxed{Positive}, \\boxed{Negative} -> tokens -> the first ones in which the two differ
    judgment -> its last box -> the verdict's first letter -> the token that has it

P(Positive) is the sigmoid of the log-odds of the two tokens, where the judgment has one of them. A
box may be spelled in other tokens, such as those of \\boxed{\\text{positive}}: nothing says then
how likely the other verdict was.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stepwiser_jax.errors import UserError
from stepwiser_jax.records import Verdict
from stepwiser_jax.tasks.mathematics import last_box_span
from stepwiser_jax.text.prompts import JudgePromptStyle
from stepwiser_jax.text.tokenizer import Tokenizer

WORDS = (Verdict.POSITIVE.value, Verdict.NEGATIVE.value)
_WORD = re.compile("|".join(WORDS))


def verdict_box(word: str, style: JudgePromptStyle) -> str:
    """Returns the box as the style's judgments spell it. The embedded task has spaces between all
    words."""
    return f"\\boxed{{ {word} }}" if style == "bare" else f"\\boxed{{{word}}}"


@dataclass(frozen=True)
class VerdictTokens:
    """The tokens of Positive and Negative in a box, each from the first one that differs to the one
    with the word's first letter. As a rule that is one token. It is more if the brace before one of
    the words is a token by itself, and before the other it is not."""

    positive: tuple[int, ...]
    negative: tuple[int, ...]
    token_bytes: Sequence[bytes] = field(repr=False)

    @classmethod
    def of(cls, tokenizer: Tokenizer, style: JudgePromptStyle) -> VerdictTokens:
        """Returns the verdict tokens of a judge. Raises UserError if the vocabulary cannot spell
        the boxes."""
        token_bytes = tokenizer.token_bytes()
        boxes = [verdict_box(word, style) for word in WORDS]
        ids = [tokenizer.encode(box) for box in boxes]
        letters = [_letter(of_box, token_bytes) for of_box in ids]
        if None in letters:
            raise UserError(
                f"a judge writes {boxes[0]} or {boxes[1]}: expected a vocabulary that spells both, "
                f"found {[tokenizer.decode(of_box) for of_box in ids]}, encoded as {ids}. Use "
                "another model, or another prompt_style"
            )
        first = next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
        positive, negative = (
            tuple(of_box[first : (letter or 0) + 1])
            for of_box, letter in zip(ids, letters, strict=True)
        )
        return cls(positive, negative, token_bytes)

    @property
    def pair(self) -> tuple[int, int]:
        """The first tokens in which the verdicts differ."""
        return self.positive[0], self.negative[0]

    def place(self, tokens: Sequence[int], verdict: Verdict) -> int | None:
        """Returns the index of the token of `pair` with which the verdict of a judgment begins.

        Args:
            tokens: The judgment.
            verdict: What `parse_verdict` reads in it.

        Returns:
            The index, or None if there is no verdict, or it is written in other tokens.
        """
        letter = _letter(tokens, self.token_bytes) if verdict.is_given else None
        if letter is None:
            return None
        written = self.positive if verdict is Verdict.POSITIVE else self.negative
        start = letter + 1 - len(written)
        return start if start >= 0 and tuple(tokens[start : letter + 1]) == written else None


def _letter(tokens: Sequence[int], token_bytes: Sequence[bytes]) -> int | None:
    """Returns the index of the token with the first letter of the word in the last box."""
    pieces = [token_bytes[token] for token in tokens]
    text = b"".join(pieces).decode("latin-1")  # each byte is a character, so indices are of both
    box = last_box_span(text)
    word = None if box is None else _WORD.search(text, *box)
    if word is None:
        return None
    ends = np.cumsum([len(piece) for piece in pieces])
    return int(np.searchsorted(ends, word.start(), side="right"))

"""The verifier of mathematics: it finds a completion's final answer, and compares its meaning.

Numbers and equal texts are compared here. Everything else goes to math-verify, which can hang on a
pathological text. So call `verify` and `is_equivalent` in a process with a deadline, as
`tasks.verifier` does.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from typing import Any

from stepwiser_jax.errors import UserError
from stepwiser_jax.records import Problem

MAX_ANSWER_CHARACTERS = 1000
"""Longer answers are wrong: no reference is that long, and parsing them takes forever."""

BOX = re.compile(r"\\boxed\s*(?:\{|\Z)")
"""The beginning of a box, also if the text ends in the middle of it."""

_BRACE = re.compile(r"(?<!\\)\\[{}]|[{}]")


def verify(completion: str, problem: Problem) -> bool:
    """Returns whether the final answer of a completion equals the problem's answer.

    Raises:
        UserError: The problem's answer is not mathematics.
    """
    if not _is_verifiable(problem.answer):
        raise _refusal(problem.answer)
    return is_equivalent(extract_answer(completion), problem.answer)


def decide(completion: str, problem: Problem) -> bool | UserError | str:
    """Returns what `verify` would return or raise, if that needs no math-verify.

    Otherwise returns the part of the completion that `verify` needs, so that equal answers are
    compared only once."""
    verifiable = _is_plainly_verifiable(problem.answer)
    if verifiable is False:
        return _refusal(problem.answer)
    answer = extract_answer(completion)
    if answer is None:
        return False if verifiable else ""
    plain = compare_plainly(answer, problem.answer)
    if plain is not None:
        return plain
    return f"\\boxed{{{answer}}}" if BOX.search(completion) else f"#### {answer}"


def _refusal(reference: str) -> UserError:
    return UserError(
        f"expected a reference answer that is mathematics, found {reference!r:.80}; for another "
        "kind of answers set `verifier`"
    )


# --- where the answer is --------------------------------------------------------------------------


def last_box(text: str) -> str | None:
    """Returns the content of the last \\boxed{}, None if there is no box or the last one is
    unfinished. Earlier boxes do not count then, since the model gave them up. Escaped braces are
    text."""
    span = last_box_span(text)
    return None if span is None else text[slice(*span)].strip()


def last_box_span(text: str) -> tuple[int, int] | None:
    """Returns where the content of the last box begins and ends, see `last_box`."""
    start = max((match.end() for match in BOX.finditer(text)), default=len(text))
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return start, brace.start()
    return None


def extract_answer(text: str) -> str | None:
    """Returns the content of the last \\boxed{}, which has to be finished. Without any box, returns
    what follows GSM8K's last `####`, else the number in the last "answer is ..." (as Minerva's
    prompt ends), else None."""
    if BOX.search(text):
        return last_box(text)
    marked = re.findall(r"####[ \t]*([^\n]+)", text) or re.findall(
        r"(?i)\banswer is:?[ \t]*\$?([+-]?\d[\d,]*(?:\.\d+)?)", text
    )
    return marked[-1].strip() if marked else None


# --- whether it is right --------------------------------------------------------------------------


def _normalize(answer: str) -> str:
    answer = answer.strip().strip("$").strip().rstrip(".")
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", answer).removeprefix("\\$").strip()


def _number(answer: str) -> Fraction | None:
    if re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)", answer):
        return Fraction(answer)
    return None


def compare_plainly(answer: str | None, reference: str) -> bool | None:
    """Returns whether two answers are equal, or None if math-verify must decide."""
    if answer is None or max(len(answer), len(reference)) > MAX_ANSWER_CHARACTERS:
        return False
    answer, reference = _normalize(answer), _normalize(reference)
    if answer == reference:
        return True
    numbers = _number(answer), _number(reference)
    return None if None in numbers else numbers[0] == numbers[1]


def is_equivalent(answer: str | None, reference: str) -> bool:
    """Returns whether the answer equals the reference. May run long on adversarial text."""
    plain = compare_plainly(answer, reference)
    if plain is not None or answer is None:
        return bool(plain)
    return _equals(answer, reference)


def _parse(text: str) -> list[Any]:
    """Returns what math-verify finds in an answer: the expression, if there is one, and its text.
    Its own time-outs are off, because they work in the main thread only."""
    from math_verify import parse

    return parse(f"\\boxed{{{text}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]


_parse_reference = functools.lru_cache(maxsize=256)(_parse)


def _equals(answer: str, reference: str) -> bool:
    from math_verify import verify as equals

    gold = _parse_reference(reference)
    return bool(gold) and bool(equals(gold, _parse(answer), timeout_seconds=None))


# --- whether a reference is mathematics -----------------------------------------------------------

_CODE = re.compile(r"==|(?<!\w)[\"']\w")
_LATEX_WORDS = re.compile(r"\\(?:text|math|mbox|operatorname)\w*\s*\{[^{}]*\}|\\[A-Za-z]+|\band\b")
_PROSE = re.compile(r"[A-Za-z]{3,}\s+[A-Za-z]|[A-Za-z]\s+[A-Za-z]{3,}")


def _is_plainly_verifiable(reference: str) -> bool | None:
    """Returns True for numbers, False for code and an empty text, and None if math-verify must
    decide."""
    reference = _normalize(reference)
    if not reference or len(reference) > MAX_ANSWER_CHARACTERS or _CODE.search(reference):
        return False
    return True if _number(reference) is not None else None


@functools.lru_cache(maxsize=256)
def _is_verifiable(reference: str) -> bool:
    """Returns whether an answer can be checked against the reference: math-verify reads an
    expression that equals itself.

    math-verify reads words as products of their letters. Two words in a row outside of LaTeX are
    prose or code. But if the expression has no letters, the words were a number's unit. `and` joins
    expressions, as `or` does."""
    plain = _is_plainly_verifiable(reference)
    if plain is not None:
        return plain
    found = _parse_reference(reference)
    if _PROSE.search(_LATEX_WORDS.sub(" , ", reference)):
        expressions = [expression for expression in found if not isinstance(expression, str)]
        if not expressions or any(expression.free_symbols for expression in expressions):
            return False
    return _equals(reference, reference)

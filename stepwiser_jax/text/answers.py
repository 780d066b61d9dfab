"""The final answer of a completion, and whether it equals the reference.

Plain numbers and equal strings are compared here. Everything else goes to math-verify, in worker
processes: it can hang on a pathological string and cannot be interrupted in a thread, so each
batch of answers has a deadline after which the worker is killed and the answer counts as wrong.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import re
import signal
from collections.abc import Sequence
from fractions import Fraction
from types import TracebackType
from typing import Any

MAX_ANSWER_CHARACTERS = 1000
"""Longer answers are wrong: no reference is that long, and parsing them takes for ever."""

TASKS_PER_WORKER = 1000
"""A worker is replaced after so many answers, since sympy's caches only grow."""


def extract_answer(text: str) -> str | None:
    """The content of the last complete \\boxed{}, else what stands behind GSM8K's last `####`, else
    the number in the last "answer is ..." (as Minerva's prompt ends)."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for position in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start:position].strip()
    marked = re.findall(r"####[ \t]*([^\n]+)", text) or re.findall(
        r"(?i)\banswer is:?[ \t]*\$?([+-]?\d[\d,]*(?:\.\d+)?)", text
    )
    return marked[-1].strip() if marked else None


def _normalize(answer: str) -> str:
    answer = answer.strip().strip("$").strip().rstrip(".")
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", answer).removeprefix("\\$").strip()


def _number(answer: str) -> Fraction | None:
    if re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)", answer):
        return Fraction(answer)
    return None


def compare_plainly(answer: str | None, reference: str) -> bool | None:
    """True or False where no mathematics is needed, None where math-verify must decide."""
    if answer is None or max(len(answer), len(reference)) > MAX_ANSWER_CHARACTERS:
        return False
    answer, reference = _normalize(answer), _normalize(reference)
    if answer == reference:
        return True
    numbers = _number(answer), _number(reference)
    return None if None in numbers else numbers[0] == numbers[1]


def _verify_math(answer: str, reference: str) -> bool:
    """math-verify without its own time-outs, which work in the main thread only."""
    from math_verify import parse, verify

    def expression(text: str) -> Any:
        return parse(f"\\boxed{{{text}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]

    gold = expression(reference)
    return bool(gold) and bool(verify(gold, expression(answer), timeout_seconds=None))


def is_equivalent(answer: str | None, reference: str) -> bool:
    """Does the answer equal the reference? May run long on adversarial text: see AnswerVerifier."""
    plain = compare_plainly(answer, reference)
    if plain is not None or answer is None:
        return bool(plain)
    return _verify_math(answer, reference)


def is_verifiable(reference: str) -> bool:
    """Can an answer be checked against this reference at all (paper 4.1)?"""
    reference = _normalize(reference)
    if not reference or len(reference) > MAX_ANSWER_CHARACTERS:
        return False
    return _number(reference) is not None or _verify_math(reference, reference)


def _worker(pipe: Any) -> None:
    # Ctrl-C reaches the whole process group; the parent decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # It warns, at every call, that its own time-outs are off: ours are outside.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            answer, reference = pipe.recv()
            try:
                pipe.send(_verify_math(answer, reference))
            except Exception as error:  # math-verify and sympy raise anything on odd input
                pipe.send(repr(error))


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=_worker, args=(child,), daemon=True)
        self.process.start()
        child.close()
        self.tasks = 0

    def ask(self, pair: tuple[str | None, str]) -> None:
        with contextlib.suppress(BrokenPipeError):  # answer() will find that the worker died
            self.pipe.send(pair)

    def answer(self, timeout_seconds: float) -> bool | str | None:
        """The result, what math-verify raised, or None: too slow, and killed. Raises EOFError or
        ConnectionResetError where the worker died."""
        patience = timeout_seconds if self.tasks else AnswerVerifier.START_SECONDS
        self.tasks += 1
        if not self.pipe.poll(patience):
            self.process.kill()
            self.process.join()
            return None
        return self.pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class AnswerVerifier:
    """Checks answers, the hard ones in up to `workers` processes that start when first needed.

    `timeouts` counts answers that took longer than `timeout_seconds`, `failures` those on which
    math-verify raised or two workers died; both count as wrong.
    """

    START_SECONDS = 60.0
    """What a new worker may take for its first answer, which imports sympy."""

    def __init__(self, workers: int = 1, timeout_seconds: float = 5.0):
        self._limit, self._timeout = workers, timeout_seconds
        self._workers: list[_Worker] = []
        self.timeouts = self.failures = 0

    def __enter__(self) -> AnswerVerifier:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def verify(self, pairs: Sequence[tuple[str | None, str]]) -> list[bool]:
        """For each (answer, reference): are they equal? Equal pairs are decided once."""
        distinct = {pair: compare_plainly(*pair) for pair in pairs}
        hard = [pair for pair, plain in distinct.items() if plain is None]
        for start in range(0, len(hard), self._limit):
            self._verify_together(hard[start : start + self._limit], distinct)
        return [bool(distinct[pair]) for pair in pairs]

    def _verify_together(
        self,
        pairs: Sequence[tuple[str | None, str]],
        results: dict[tuple[str | None, str], bool | None],
    ) -> None:
        """One pair per worker, at the same time."""
        while len(self._workers) < len(pairs):
            self._workers.append(_Worker())
        for worker, pair in zip(self._workers, pairs, strict=False):
            worker.ask(pair)
        for slot, pair in enumerate(pairs):
            try:
                answer = self._workers[slot].answer(self._timeout)
            except (EOFError, ConnectionResetError):
                answer = self._ask_again(slot, pair)
            self.timeouts += answer is None
            self.failures += isinstance(answer, str)
            results[pair] = answer is True
            worker = self._workers[slot]
            if not worker.process.is_alive() or worker.tasks >= TASKS_PER_WORKER:
                self._replace(slot)

    def _ask_again(self, slot: int, pair: tuple[str | None, str]) -> bool | str | None:
        """A worker that died was killed from outside, or by this answer: one more is asked."""
        self._replace(slot)
        self._workers[slot].ask(pair)
        try:
            return self._workers[slot].answer(self._timeout)
        except (EOFError, ConnectionResetError):
            return "two workers died of it"

    def _replace(self, slot: int) -> None:
        self._workers[slot].kill()
        self._workers[slot] = _Worker()

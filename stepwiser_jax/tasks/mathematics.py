"""The final answer of a completion, and whether it equals the reference.

Plain numbers and equal strings are compared here. Everything else goes to math-verify, in worker
processes: it can hang on a pathological string and cannot be interrupted in a thread, so every
question to a worker has a deadline, after which the worker is killed and the answer counts as
wrong.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Container, Sequence
from fractions import Fraction
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from stepwiser_jax.errors import UserError

MAX_ANSWER_CHARACTERS = 1000
"""Longer answers are wrong: no reference is that long, and parsing them takes for ever."""

QUESTIONS_PER_WORKER = 1000
"""A worker is replaced after this number of questions: sympy's caches only grow."""

START_SECONDS = 300.0
"""What a new worker may take until it is ready: it imports sympy, on a machine that may be busy."""

WARM_UP = "stepwiser_jax.tasks.math_warm_up"
"""What a worker imports before it is ready."""

DIED = "the worker died"
"""The answer to a question whose worker died of it, or was killed."""

BOX = re.compile(r"\\boxed\s*(?:\{|\Z)")
"""The beginning of a box, also where the text ends in the middle of it."""
_BRACE = re.compile(r"(?<!\\)\\[{}]|[{}]")


# --- where the answer stands ----------------------------------------------------------------------


def last_box(text: str) -> str | None:
    """Returns the content of the last \\boxed{}, None if there is no box or the last one is
    unfinished: what stands in an earlier one was given up. Braces that are escaped are text."""
    start = max((match.end() for match in BOX.finditer(text)), default=None)
    depth = 1
    for brace in _BRACE.finditer(text, len(text) if start is None else start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()].strip()
    return None


def extract_answer(text: str) -> str | None:
    """The content of the last \\boxed{}, which has to be finished; without any box, what follows
    GSM8K's last `####`, else the number in the last "answer is ..." (as Minerva's prompt ends)."""
    if BOX.search(text):
        return last_box(text)
    marked = re.findall(r"####[ \t]*([^\n]+)", text) or re.findall(
        r"(?i)\banswer is:?[ \t]*\$?([+-]?\d[\d,]*(?:\.\d+)?)", text
    )
    return marked[-1].strip() if marked else None


# --- comparing it ---------------------------------------------------------------------------------


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


def _read_mathematics(text: str) -> list[Any]:
    """What math-verify finds in an answer, without its own time-outs, which work in the main thread
    only: the expression, if there is one, and its text."""
    from math_verify import parse

    return parse(f"\\boxed{{{text}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _verify_math(answer: str, reference: str) -> bool:
    from math_verify import verify

    gold = _read_mathematics(reference)
    return bool(gold) and bool(verify(gold, _read_mathematics(answer), timeout_seconds=None))


def is_equivalent(answer: str | None, reference: str) -> bool:
    """Does the answer equal the reference? May run long on adversarial text: see AnswerVerifier."""
    plain = compare_plainly(answer, reference)
    if plain is not None or answer is None:
        return bool(plain)
    return _verify_math(answer, reference)


# --- what can be compared -------------------------------------------------------------------------

_CODE = re.compile(r"==|(?<!\w)[\"']\w")
_LATEX_WORDS = re.compile(r"\\(?:text|math|mbox|operatorname)\w*\s*\{[^{}]*\}|\\[A-Za-z]+|\band\b")
_PROSE = re.compile(r"[A-Za-z]{3,}\s+[A-Za-z]|[A-Za-z]\s+[A-Za-z]{3,}")


def _is_plainly_verifiable(reference: str) -> bool | None:
    """True for numbers, False for code and for nothing, None where math-verify must decide."""
    reference = _normalize(reference)
    if not reference or len(reference) > MAX_ANSWER_CHARACTERS or _CODE.search(reference):
        return False
    return True if _number(reference) is not None else None


def _is_mathematics(reference: str) -> bool:
    """Whether math-verify reads an expression that equals itself. It reads words as products of
    their letters; two in a row, outside of LaTeX, are prose or code, unless none of their letters
    is in the expression: they were the number's unit. `and` joins expressions, as `or` does."""
    found = _read_mathematics(reference)
    if _PROSE.search(_LATEX_WORDS.sub(" , ", reference)):
        expressions = [expression for expression in found if not isinstance(expression, str)]
        if not expressions or any(expression.free_symbols for expression in expressions):
            return False
    return _verify_math(reference, reference)


# --- with a deadline ------------------------------------------------------------------------------


def _serve(pipe: Connection) -> None:
    """Say that this process is ready, then answer questions, a function and its arguments each."""
    # Ctrl-C reaches the whole process group; the parent decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    importlib.import_module(WARM_UP)
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        pipe.send("ready")
        while True:
            function, arguments = pipe.recv()
            try:
                answer = function(*arguments)
            except Exception as error:  # math-verify and sympy raise anything on odd input
                answer = repr(error)
            pipe.send(answer)


class _Worker:
    """A process that answers questions, one at a time. It is ready when it has been made."""

    def __init__(self) -> None:
        """Raises UserError where the process cannot be started."""
        # Every worker is a fork of a server that has imported what takes long: one that replaces a
        # worker that was too slow is ready at once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([WARM_UP])
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=_serve, args=(child,), daemon=True)
        self.questions = 0
        reason = f"none was ready after {START_SECONDS:g} s"
        try:
            self.process.start()
            child.close()
            if self.pipe.poll(START_SECONDS):
                self.pipe.recv()
                return
        except (OSError, EOFError) as error:
            reason = f"the first sign of it was {error!r}"
        self.kill()
        raise UserError(
            "answers are compared in worker processes, and one could not be started: "
            f"{reason}; what it printed stands above. A script that verifies answers must do so "
            "under `if __name__ == '__main__':`, since workers import it"
        )

    def ask(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.questions += 1
        with contextlib.suppress(ConnectionError):  # the reader will find that the worker died
            self.pipe.send((function, arguments))

    def answer(self) -> bool | str | None:
        """What it says of its question, what that raised, or `DIED`; None if nothing so far."""
        try:
            return self.pipe.recv() if self.pipe.poll() else None
        except (EOFError, OSError):
            self.questions = QUESTIONS_PER_WORKER
            return DIED

    @property
    def is_used_up(self) -> bool:
        return self.questions >= QUESTIONS_PER_WORKER

    def kill(self) -> None:
        if self.process.pid is not None:
            self.process.kill()
            self.process.join()
        self.pipe.close()


class AnswerVerifier:
    """Checks answers, the hard ones in up to `workers` processes that start when first needed.

    `timeouts` counts questions that took longer than `timeout_seconds`, `failures` those on which
    math-verify raised or two workers died; the answer to both is no.
    """

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
        """For each (answer, reference): are they equal? Equal pairs are decided once. Raises
        UserError where no worker can be started."""
        return self._decide(compare_plainly, _verify_math, pairs)

    def verifiable(self, references: Sequence[str]) -> list[bool]:
        """For each reference: can an answer be checked against it at all (paper 4.1)? Raises
        UserError where no worker can be started."""
        questions = [(reference,) for reference in references]
        return self._decide(_is_plainly_verifiable, _is_mathematics, questions)

    def _decide(
        self,
        plainly: Callable[..., bool | None],
        function: Callable[..., bool],
        questions: Sequence[tuple[Any, ...]],
    ) -> list[bool]:
        """What `plainly` says of each question's arguments; where that is None, `function`."""
        said = {question: plainly(*question) for question in questions}
        hard = [question for question, answer in said.items() if answer is None]
        said.update(zip(hard, self._ask(function, hard), strict=True))
        return [bool(said[question]) for question in questions]

    def _ask(
        self, function: Callable[..., bool], questions: Sequence[tuple[Any, ...]]
    ) -> list[bool]:
        """Returns what workers say of the questions; each works on one at a time. A question whose
        worker died, of it or killed from outside, is asked once more."""
        answers = [False] * len(questions)
        waiting, asked_again = deque(range(len(questions))), set[int]()
        busy: dict[_Worker, tuple[int, float]] = {}  # its question, and until when it may answer
        try:
            while waiting or busy:
                while waiting and len(busy) < self._limit:
                    worker, index = self._idle_worker(busy), waiting.popleft()
                    worker.ask(function, questions[index])
                    busy[worker] = index, time.monotonic() + self._timeout
                first = min(deadline for _, deadline in busy.values())
                wait([worker.pipe for worker in busy], max(0.0, first - time.monotonic()))
                for worker, (index, deadline) in list(busy.items()):
                    answer = worker.answer()
                    if answer is None and time.monotonic() < deadline:
                        continue
                    del busy[worker]
                    if answer is None or worker.is_used_up:
                        self._end(worker)
                    if answer == DIED and index not in asked_again:
                        asked_again.add(index)
                        waiting.append(index)
                        continue
                    self.timeouts += answer is None
                    self.failures += isinstance(answer, str)
                    answers[index] = answer is True
        finally:
            for worker in busy:
                self._end(worker)
        return answers

    def _idle_worker(self, busy: Container[_Worker]) -> _Worker:
        for worker in self._workers:
            if worker not in busy:
                return worker
        self._workers.append(_Worker())
        return self._workers[-1]

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()

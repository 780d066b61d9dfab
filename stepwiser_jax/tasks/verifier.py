"""Checks whether solutions are right, in worker processes with a deadline.

A verifier is a function of a completion and its problem:

    def verify(completion: str, problem: Problem) -> bool

It finds the final answer in the completion and compares it with the problem's. It raises UserError
for a problem that it cannot check, whatever the completion is; stages leave such problems out. A
config names it: `mathematics`, `code`, or `module:function`.

Verifiers run in processes, not in threads: they read what a model wrote, may hang on it, and cannot
be interrupted in a thread. A worker that misses its deadline is killed, and the solution counts as
wrong.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Container, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType

from stepwiser_jax import plugins
from stepwiser_jax.errors import UserError
from stepwiser_jax.records import Problem
from stepwiser_jax.tasks import code, mathematics

VERIFIERS: dict[str, Callable[[str, Problem], bool]] = {
    "mathematics": mathematics.verify,
    "code": code.verify,
}
"""The built-in verifiers, by the names that configs use."""

QUESTIONS_PER_WORKER = 1000
"""A worker is replaced after this number of questions, because sympy's caches only grow."""

START_SECONDS = 300.0
"""How long a new worker may take until it is ready: it imports sympy, maybe on a busy machine."""

WARM_UP = "stepwiser_jax.tasks.math_warm_up"
"""What a worker of `mathematics` imports before it is ready."""

DIED = "the worker died"
"""The reply to a question whose worker died or was killed."""

Reply = bool | UserError | str | None
"""The solution is right or wrong (bool), the problem cannot be checked (UserError), the verifier
raised something else (str), or it was too slow (None)."""


def load_verifier(name: str) -> Callable[[str, Problem], bool]:
    """Returns the verifier that a config names. Raises UserError if there is none."""
    return plugins.load(name, "a verifier", VERIFIERS)


def worker_count() -> int:
    """Returns how many worker processes suit this machine."""
    return max(1, min(8, (os.cpu_count() or 2) - 1))


class Verifier:
    """A pool of up to `workers` processes that check solutions. They start when first needed.

    `timeouts` counts questions that took longer than `timeout_seconds`, `failures` those on which
    the verifier raised an exception or two workers died. Such solutions count as wrong. What is
    asked for votes (`same`) is not counted.
    """

    def __init__(
        self, name: str = "mathematics", *, workers: int = 1, timeout_seconds: float = 5.0
    ):
        """Raises UserError if there is no verifier of that name."""
        load_verifier(name)
        self._name, self._limit, self._timeout = name, workers, timeout_seconds
        self._workers: list[_Worker] = []
        self.timeouts = self.failures = 0

    def __enter__(self) -> Verifier:
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

    def verify(self, completions: Sequence[str], problems: Sequence[Problem]) -> list[bool]:
        """Returns for each completion whether it solves its problem.

        Raises UserError if no worker can be started."""
        return [reply is True for reply in self._replies(completions, problems)]

    @property
    def compares_meanings(self) -> bool:
        """Whether a right solution is one whose answer means the same as the problem's. That is
        known of `mathematics` alone: others may accept many different answers."""
        return self._name == "mathematics"

    def same(self, answers: Sequence[str], references: Sequence[str]) -> list[bool | None]:
        """Returns for each answer whether `mathematics` accepts it for its reference, None if that
        took too long.

        Raises UserError if no worker can be started."""
        completions = [f"\\boxed{{{answer}}}" for answer in answers]
        problems = [Problem("", "", reference, "") for reference in references]
        replies = self._replies(completions, problems, counted=False)
        return [None if reply is None else reply is True for reply in replies]

    def check(self, problems: Sequence[Problem]) -> list[str | None]:
        """Returns for each problem why it cannot be checked, None if it can be (paper 4.1).

        Raises UserError if no worker can be started."""
        replies = self._replies([""] * len(problems), problems)
        too_slow = f"the verifier took longer than {self._timeout:g} s"
        return [
            None if isinstance(reply, bool) else too_slow if reply is None else str(reply)
            for reply in replies
        ]

    def _replies(
        self, completions: Sequence[str], problems: Sequence[Problem], *, counted: bool = True
    ) -> list[Reply]:
        """Returns the reply to each pair. Equal questions are asked, and `counted`, once."""
        pairs = list(zip(completions, problems, strict=True))
        if self._name == "mathematics":
            decided = [mathematics.decide(completion, problem) for completion, problem in pairs]
        else:
            decided = list(completions)
        questions = list(
            dict.fromkeys(
                (rest, problem)
                for rest, problem in zip(decided, problems, strict=True)
                if isinstance(rest, str)
            )
        )
        replies = dict(zip(questions, self._ask(questions), strict=True))
        if counted:
            self.timeouts += sum(reply is None for reply in replies.values())
            self.failures += sum(isinstance(reply, str) for reply in replies.values())
        return [
            replies[found, problem] if isinstance(found, str) else found
            for found, problem in zip(decided, problems, strict=True)
        ]

    def _ask(self, questions: Sequence[tuple[str, Problem]]) -> list[Reply]:
        """Returns the workers' replies. Each worker has one question at a time. If a worker died or
        was killed from outside, its question is asked once more."""
        replies: list[Reply] = [None] * len(questions)
        waiting, asked_again = deque(range(len(questions))), set[int]()
        busy: dict[_Worker, tuple[int, float]] = {}  # its question, and its deadline
        try:
            while waiting or busy:
                while waiting and len(busy) < self._limit:
                    worker, index = self._idle_worker(busy), waiting.popleft()
                    worker.ask(*questions[index])
                    busy[worker] = index, time.monotonic() + self._timeout
                first = min(deadline for _, deadline in busy.values())
                wait([worker.pipe for worker in busy], max(0.0, first - time.monotonic()))
                for worker, (index, deadline) in list(busy.items()):
                    reply = worker.reply()
                    if reply is None and time.monotonic() < deadline:
                        continue
                    del busy[worker]
                    if reply is None or worker.is_used_up:
                        self._end(worker)
                    if reply == DIED and index not in asked_again:
                        asked_again.add(index)
                        waiting.append(index)
                        continue
                    replies[index] = reply
        finally:
            for worker in busy:
                self._end(worker)
        return replies

    def _idle_worker(self, busy: Container[_Worker]) -> _Worker:
        for worker in self._workers:
            if worker not in busy:
                return worker
        self._workers.append(_Worker(self._name))
        return self._workers[-1]

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()


def _serve(pipe: Connection, name: str) -> None:
    """Says that this process is ready, then answers questions."""
    # Ctrl-C reaches the whole process group; the parent decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    verify = load_verifier(name)
    if name == "mathematics":
        importlib.import_module(WARM_UP)
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        pipe.send("ready")
        while True:
            completion, problem = pipe.recv()
            try:
                reply: Reply = bool(verify(completion, problem))
            except UserError as error:
                reply = error
            except Exception as error:  # math-verify and sympy raise anything on odd input
                reply = repr(error)
            pipe.send(reply)


class _Worker:
    """A process that answers questions, one at a time. The constructor waits until it is ready."""

    def __init__(self, name: str) -> None:
        """Raises UserError if the process cannot be started."""
        # Every worker is a fork of a server that has done the slow imports, so that one that
        # replaces a slow worker is ready at once.
        context = multiprocessing.get_context("forkserver")
        if name == "mathematics":
            context.set_forkserver_preload([WARM_UP])
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=_serve, args=(child, name), daemon=True)
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
            "answers are checked in worker processes, and one could not be started: "
            f"{reason}; what it printed stands above. A script that verifies answers must do so "
            "under `if __name__ == '__main__':`, since workers import it"
        )

    def ask(self, completion: str, problem: Problem) -> None:
        self.questions += 1
        with contextlib.suppress(ConnectionError):  # the reader will find that the worker died
            self.pipe.send((completion, problem))

    def reply(self) -> Reply:
        """Returns the reply to the worker's question or `DIED`; None if there is none yet."""
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

"""`stepwiser serve`: a judge over HTTP, and the page on which one asks it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from stepwiser_jax.commands.check import EXAMPLE
from stepwiser_jax.errors import UserError
from stepwiser_jax.judges.base import Solution
from stepwiser_jax.judges.check import PACKAGED, Checker
from stepwiser_jax.runs.progress import say
from stepwiser_jax.server.http import Access, Server, is_loopback, listen, make_app
from stepwiser_jax.server.worker import Worker

KEY = "STEPWISER_API_KEY"
"""The environment variable with the key that clients must send."""


def serve_judge(
    run: Path | None,
    *,
    host: str,
    port: int,
    waiting: int,
    timeout: float,
    overrides: Sequence[str],
) -> None:
    """Serves the judge of a run, or that of the package, until a signal comes."""
    key = read_key()
    try:
        listener = listen(host, port)  # before the judge, which takes longer
    except OSError as error:
        raise UserError(
            f"expected an address of this machine with a free port, found --host {host} --port "
            f"{port}: {error.strerror or error}"
        ) from None
    with listener:
        checker = Checker.load(PACKAGED if run is None else run, overrides)
        warm_up(checker)
        worker = Worker(checker, waiting)
        hosts = None
        if is_loopback(listener):
            hosts = frozenset({"localhost", "127.0.0.1", "::1", host.lower()})
        elif key is None:
            say(f"Everybody who reaches {host} may ask this judge: set {KEY} to ask for a key")
        example = None
        if run is None:
            example = {"question": EXAMPLE.question, "solution": "\n\n".join(EXAMPLE.solution)}
        app = make_app(worker, Access(hosts, key), timeout=timeout, example=example)
        address = f"[{host}]" if ":" in host else host
        say(f"{worker.judge_id} at http://{address}:{listener.getsockname()[1]}/ (Ctrl-C ends it)")
        Server(app, worker).run(sockets=[listener])


def warm_up(checker: Checker) -> None:
    """Has the judge compile what a short request needs, so that the first client does not wait."""
    solution = Solution("warm-up", EXAMPLE.question, tuple(EXAMPLE.solution))
    checker.check([solution], reader=lambda *_: None)


def read_key() -> str | None:
    """Returns the key that clients must send, None if everybody may ask. Raises UserError if it is
    no word."""
    key = os.environ.get(KEY)
    if key is not None and not (key.isascii() and key.isprintable() and key.split() == [key]):
        raise UserError(f"{KEY}: expected a word of printable ASCII, found something else")
    return key

"""Programs with unit tests: a solution is right if its code passes the problem's tests.

The tests are the problem's column `tests`: Python text, such as assertions, or a list of them. They
run in the sandbox after the last fenced block of the completion:

    ```python                       def double(x): return 2 * x
    def double(x): return 2 * x     assert double(2) == 4            <- the column `tests`
    ```                             print("<a random word>")         <- not reached if a test fails

Code that ends the process before its tests does not print the word, and so is wrong. (Code that
searches the interpreter could find the word: the sandbox protects the machine, not the tests.)
"""

from __future__ import annotations

import functools
import secrets

from stepwiser_jax.errors import UserError
from stepwiser_jax.records import Problem
from stepwiser_jax.sandbox.runner import Limits, execute

LIMITS = Limits(seconds=4.0)
"""The limits of one solution with its tests. The time is less than the 5 seconds of a verifier, so
that ordinary loops end before the worker is killed."""


def verify(completion: str, problem: Problem) -> bool:
    """Returns whether the code of a completion passes the tests of its problem.

    Raises:
        UserError: The problem has no tests, or code cannot be confined on this machine.
    """
    tests = problem.extra.get("tests")
    lines = [tests] if isinstance(tests, str) else tests
    if not isinstance(lines, list) or not lines or not all(isinstance(x, str) for x in lines):
        raise UserError(
            f"expected a column 'tests' with Python code, or a list of it, found {tests!r:.80} "
            f"(other columns: {sorted(problem.extra)})"
        )
    _check_sandbox()
    code = extract_code(completion)
    if code is None:
        return False
    word = secrets.token_hex(16)
    execution = execute("\n".join([code, *lines, f"print({word!r})"]), LIMITS)
    return execution.failure is None and execution.output.endswith(word)


def extract_code(text: str) -> str | None:
    """Returns the last block of code between Markdown's fences, None if there is none."""
    blocks = text.split("```")[1:-1:2]
    return blocks[-1].partition("\n")[2] if blocks else None


@functools.cache
def _check_sandbox() -> None:
    """Raises UserError if this machine cannot confine a process."""
    execute("", LIMITS)

"""Runs Python code that a model wrote, each piece in a fresh process that `sandbox.confine` locks
before the first line runs.

Code gets the interpreter, its packages (what pip installed, not the project's own folder), one
scratch folder that is deleted afterwards, an empty environment, one thread, and `Limits`. It has no
network, no processes, no signals and no other files. This works on Linux only; a `Sandbox` refuses
to be made on a platform that lacks a part.

Not protected against: errors in the kernel or the processor. Code can learn whether a file exists,
how large it is and when it was changed, if it guesses the path (Landlock restricts opening, not
`stat`), and the name of the machine. Calls that run at the same time slow one another down.
Scratch files stay until the end, also those that code removes, so that all of them are counted.
This happens ten times a second: in between, all files together can exceed the limit, but no single
file can. If the parent is killed, its children die with it, and their scratch folders remain.

A call takes about 20 ms on one core, 250 ms if the code imports sympy (numpy: 70 ms).
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from stepwiser_jax.errors import UserError
from stepwiser_jax.sandbox import confine

Failure = Literal["error", "time", "memory", "output", "killed"]
"""The code raised, exceeded its time, memory or output (printed or scratch), or died of a signal,
such as a segmentation fault."""

START_SECONDS = 60.0
"""How long a process may take until it is confined; its own seconds begin then."""

POLL_SECONDS = 0.1
"""Between two looks at the scratch folder."""


@dataclass(frozen=True)
class Limits:
    """The limits of one call. `seconds` is wall time (GenPRM's 5). `memory_bytes` is address space
    including libraries, so a machine needs as much for each worker. `scratch_bytes` is the size of
    all files; an empty one counts as a page."""

    seconds: float = 5.0
    memory_bytes: int = 2**30
    output_bytes: int = 2**16
    scratch_bytes: int = 2**24


@dataclass(frozen=True)
class Execution:
    """What the model reads: all that was printed, and a last line that says how the code failed, in
    GenPRM's words. `failure` is None if it ended well."""

    output: str
    failure: Failure | None


class Sandbox:
    """Runs code, up to `workers` processes at a time. `failures` counts failures by kind.

    Raises UserError if this machine cannot confine a process, or a confined process cannot import
    sympy, which most of the code uses.
    """

    def __init__(self, limits: Limits = Limits(), workers: int = 1):
        self.limits, self._workers = limits, workers
        self.failures: Counter[Failure] = Counter()
        if sys.platform != "linux":
            raise _refusal(f"this is {sys.platform}")
        probe = execute("import sympy", replace(limits, seconds=START_SECONDS))
        if probe.failure is not None:
            raise UserError(
                "code that a model wrote must be able to import sympy, but in a confined process "
                f"that ended with: {probe.output or probe.failure}; install sympy where this "
                "Python has its other packages, and allow more memory than "
                f"{limits.memory_bytes} bytes"
            )

    def run(self, codes: Sequence[str]) -> list[Execution]:
        """Returns the executions in the order of the codes. Nothing that code does raises."""
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                executions = list(pool.map(lambda code: execute(code, self.limits), codes))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # nobody wants the rest
                raise
        self.failures.update(e.failure for e in executions if e.failure is not None)
        return executions


def _refusal(reason: str) -> UserError:
    return UserError(
        f"code that a model wrote cannot be confined on this machine ({reason}): expected Linux "
        "6.2 or later on x86_64 or aarch64, with Landlock among the security modules and seccomp; "
        "run there, or switch the execution of code off"
    )


def _packages() -> list[str]:
    """Returns the folders of the standard library and of installed packages. Other entries of
    `sys.path` are somebody's work."""
    standard = os.path.realpath(sysconfig.get_path("stdlib"))
    paths = [os.path.realpath(path) for path in sys.path]
    return [
        path
        for path in paths
        if Path(path).name in ("site-packages", "dist-packages")
        or Path(path).is_relative_to(standard)
    ]


def execute(code: str, limits: Limits) -> Execution:
    """Runs one piece of code. Raises UserError if the process cannot confine itself."""
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-") as scratch,
        tempfile.TemporaryFile() as file,
    ):
        file.write(code.encode(errors="replace"))
        file.seek(0)
        settings = (
            os.getpid(),
            limits.memory_bytes,
            math.ceil(limits.seconds) + 1,  # of CPU: should the parent be stopped
            limits.scratch_bytes,
        )
        with subprocess.Popen(
            [sys.executable, "-P", "-S", "-B", "-X", "utf8", confine.__file__]
            + [str(setting) for setting in settings]
            + _packages(),
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=scratch,
            env={
                "HOME": scratch,
                "TMPDIR": scratch,
                "TZ": "UTC",
                "PYTHONHASHSEED": "0",  # sets are printed in the same order by every process
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
            start_new_session=True,
        ) as process:
            try:
                printed = _await_confinement(process)
                return _watch(process, printed, scratch, limits)
            finally:
                process.kill()


def _read(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """Returns what has been printed, b"" if the pipe is closed, None if it takes longer."""
    pipe = process.stdout.fileno()  # pyright: ignore[reportOptionalMemberAccess]
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return os.read(pipe, 2**16) if poll.poll(1000 * seconds) else None


def _await_confinement(process: subprocess.Popen[bytes]) -> bytes:
    """Returns what was printed after the mark. `_watch` deals with a process that a signal killed
    before it."""
    printed = b""
    while confine.MARK not in printed:
        piece = _read(process, START_SECONDS)
        if piece:
            printed += piece
        elif piece is None or process.wait() < 0:
            return b""
        else:
            raise _refusal(printed.decode(errors="replace").strip())
    return printed.partition(confine.MARK)[2]


def _watch(
    process: subprocess.Popen[bytes], printed: bytes, scratch: str, limits: Limits
) -> Execution:
    """Reads what the process prints until it ends, or has to be ended."""
    failure: Failure | None = None
    deadline = time.monotonic() + limits.seconds
    while failure is None:
        ended = process.poll() is not None
        left = min(deadline - time.monotonic(), POLL_SECONDS)
        piece = _read(process, 0 if ended else max(left, 0))
        if piece:
            printed += piece
        elif ended:
            break
        elif piece is not None:  # it closed the pipe, and is about to end or goes on in silence
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(left, 0))
        if len(printed) > limits.output_bytes or _exceeds(scratch, limits.scratch_bytes):
            failure = "output"
        elif left <= 0:
            failure = "time"
    failure = failure or _failure_of(process.returncode)
    texts = printed[: limits.output_bytes].decode(errors="replace").split(confine.MARK.decode(), 1)
    ends = {
        "time": "Code execute time out: Code execution timed out",
        "output": "Code execute Error: too much output",
        "killed": "Code execute Error: the process was killed",
    }
    texts.append(ends.get(failure or "", ""))
    return Execution("\n".join(filter(None, map(str.strip, texts))), failure)


def _failure_of(returncode: int) -> Failure | None:
    if returncode == 0:
        return None
    if returncode < 0:
        return "time" if -returncode == signal.SIGXCPU else "killed"
    return "memory" if returncode == confine.OUT_OF_MEMORY else "error"


def _exceeds(scratch: str, limit_bytes: int) -> bool:
    """Returns whether the files hold more. Each is at least a page; code makes no folders."""
    total = 0
    with os.scandir(scratch) as files:
        for file in files:
            total += max(4096, 512 * file.stat(follow_symlinks=False).st_blocks)
            if total > limit_bytes:
                return True
    return False

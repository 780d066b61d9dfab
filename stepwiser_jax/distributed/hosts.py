"""Several processes, one run: how they find one another, share work, and wait.

A training stage is one program over the devices of all processes, what it samples included. In a
sampling stage each process has a copy of the model on its own devices and takes every n-th block of
the work: processes meet at the end only. Work can also be cut into shards that never meet: runs of
their own, at any time and place, of which the last, without a shard, finds all records and writes
the manifest.

The run directory must be one that all processes see.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from stepwiser_jax.errors import UserError

CONNECT_SECONDS = 1800
"""How long processes wait for all others to start: nodes of a pod boot at different speeds."""

BEAT_SECONDS, SILENCE_SECONDS = 1.0, 60.0
"""How often a process says that it is alive, and how long it may be silent."""

BARRIER_SECONDS = 7 * 24 * 3600
"""A process that dies is noticed long before; one that still works may need days."""


PEER_IS_GONE = re.compile(
    r"(UNKNOWN|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL): (?!.*(RET_CHECK|compil))",
    re.DOTALL,
)
"""What XLA says where a collective fails; it has other words for what it cannot compile, run or
hold."""


@dataclass(frozen=True)
class Shard:
    """Blocks `index`, `index + count`, ... of a stage's work."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From `I/N`, 0 <= I < N."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise UserError(f"expected --shard I/N with 0 <= I < N, found {text!r}")
        return cls(int(index), int(count))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


NO_SHARD = Shard()


class Agreement:
    """The point of the program at which all processes stop once one of them is asked to.

    They call `here` at the same points, and count the calls. When one is asked to stop, each
    publishes its count, and from then on waits in `here` until all have: they stop at the first
    call that no process has made yet. `exchange`, in another thread, talks with the others. So no
    call waits for a device, nor for another process before one is asked to stop.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls = 0
        self._asked = self._published = False
        self._stop_at: int | None = None

    def here(self, asked: bool) -> bool:
        """Returns whether all processes stop at this point; `asked`: this one was asked to."""
        with self._changed:
            self._asked |= asked
            self._changed.wait_for(lambda: not self._published or self._stop_at is not None)
            self._calls += 1
            return self._calls == self._stop_at

    def exchange(self, client: Any, process: int, processes: int) -> None:
        """Publish this process's count when a process was asked to stop, and read the others'."""
        counts = [int(count) for _, count in client.key_value_dir_get("stop")]
        with self._changed:
            if (self._asked or counts) and not self._published:
                client.key_value_set(f"stop/{process}", str(self._calls))
                self._published = True
            if len(counts) == processes:
                self._stop_at = 1 + max(counts)
                self._changed.notify_all()


_agreement = Agreement()


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Find the other processes; returns when all are there. Without arguments the cluster is asked
    (Cloud TPU, GKE, SLURM). Must come before the first use of a device.

    From then on a process that dies ends all others within `SILENCE_SECONDS`, with exit status 1.
    Where the others do not come in time this process ends, with status 2. Raises UserError where
    the arguments or the cluster do not tell who they are.
    """
    given = (coordinator, num_processes, process_id)
    if None in given and given != (None, None, None):
        raise UserError(
            "expected --coordinator, --num-processes and --process-id together, found "
            f"coordinator {coordinator}, num-processes {num_processes}, process-id {process_id}"
        )
    who = "this process asks the cluster where the others are, and waits for them"
    if num_processes is not None and process_id is not None:
        if not 0 <= process_id < num_processes:
            raise UserError(
                f"expected --process-id from 0 to {num_processes - 1}, found {process_id}"
            )
        who = f"process {process_id} of {num_processes} waits for the others at {coordinator}"
    print(f"{who}, {CONNECT_SECONDS // 60} minutes at most", file=sys.stderr, flush=True)
    # SIGTERM and Ctrl-C are handled by runtime.run: jax's own handler, of SIGTERM alone, would take
    # its place. See `Agreement`.
    jax.config.update("jax_enable_preemption_service", False)
    # jax's own time-out aborts the process with a stack trace.
    timer = threading.Timer(CONNECT_SECONDS, _give_up)
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=CONNECT_SECONDS + 60
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes did not find one another: {error}") from None
    finally:
        timer.cancel()
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(over,), daemon=True)
    watch.start()
    atexit.register(lambda: (over.set(), watch.join()))  # before jax takes its leave


def _give_up() -> None:
    print(
        f"error: the other processes did not come within {CONNECT_SECONDS} s: start all of them, "
        "with one --coordinator that they can reach and one --num-processes",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def exit_process(status: int) -> NoReturn:
    """End this process. One that failed does not wait for the others, which hear of it."""
    if status and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _client() -> Any:
    """The coordination service: jax offers no public way to it, and Orbax goes the same one."""
    from jax._src import distributed

    return distributed.global_state.client


def _watch(over: threading.Event) -> None:
    """Say that this process is alive, and end it when another is not. jax would do so as well, 40
    seconds later and with a stack trace."""
    client, beats = _client(), 0
    heard: dict[str, tuple[str, float]] = {}
    while not over.wait(BEAT_SECONDS):
        beats += 1
        try:
            client.key_value_set(f"alive/{jax.process_index()}", str(beats), allow_overwrite=True)
            _agreement.exchange(client, jax.process_index(), jax.process_count())
            now = time.monotonic()
            # Process 0 hears all; the others hear of a death when its service is gone.
            found = client.key_value_dir_get("alive") if is_primary() else []
        except Exception as error:  # whatever the service's failure is called
            _end(f"process 0 cannot be reached any more ({str(error).splitlines()[0]})")
        for name, beat in found:
            if heard.get(name, ("",))[0] != beat:
                heard[name] = (beat, now)
            elif now - heard[name][1] > SILENCE_SECONDS:
                _end(
                    f"process {name.rpartition('/')[2]} has not been heard of for "
                    f"{SILENCE_SECONDS:.0f} s"
                )


def _end(reason: str) -> NoReturn:
    here = f"process {jax.process_index()} ends too; start all of them again to go on"
    print(f"error: {reason}: {here}", file=sys.stderr, flush=True)
    os._exit(1)


@contextmanager
def report_lost_peers() -> Iterator[None]:
    """A collective fails at once where another process is gone: that is no bug, and one line."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # jax turns some into the latter
        if jax.process_count() == 1 or not PEER_IS_GONE.match(str(error)):
            raise
        _end(f"another process is gone or cannot be reached ({str(error).splitlines()[0]})")


def is_primary() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Until every process is here; `name` must be used once."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(name, BARRIER_SECONDS * 1000)


def all_stop_here(asked: bool) -> bool:
    """Whether this process, or any of several, was asked to stop, and all do so at this point. All
    must call it, at the same points; it does not wait for a device."""
    return asked if jax.process_count() == 1 else _agreement.here(asked)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process. All must call it, at the same point; it waits for the
    devices of all."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array([flag]))))

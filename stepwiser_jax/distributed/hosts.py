"""Several processes in one run: how they find one another, share work, wait and stop.

A training stage is one program over the devices of all processes, its sampling included. In a
sampling stage each process has a copy of the model on its own devices and takes every n-th block of
the work: processes meet at the end only. Work can also be cut into shards that never meet. Each
runs at any time and place; a last command without a shard finds all records and finishes the run.

All processes must see the run directory.

jax's coordination service, which `connect` starts, ends all processes when one of them dies. When
they are asked to stop, `StopAgreement` decides at which point they do. jax's
`reached_preemption_sync_point` cannot: it knows SIGTERM but not Ctrl-C, and counts one kind of
step. Orbax calls it with the number of each checkpoint, so it cannot also count points inside an
iteration, between two bursts of decoding.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
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

SILENCE_SECONDS = 30
"""How long a process may send no heartbeat before jax ends all. Its heartbeats come from a thread
in C++, so a process that is busy in Python or in compilation keeps sending them."""

EXCHANGE_SECONDS = 1.0
"""How often a process looks whether another one was asked to stop."""

BARRIER_SECONDS = 7 * 24 * 3600
"""The longest wait at a barrier. A working peer may need days; a dead one ends the wait."""

LOST_PEER = re.compile(
    r"(UNKNOWN|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL): (?!.*(RET_CHECK|compil))",
    re.DOTALL,
)
"""Matches XLA's message when a collective fails, but not failures to compile or to allocate."""


@dataclass(frozen=True)
class Shard:
    """Blocks `index`, `index + count`, ... of a stage's work."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Returns the shard that `I/N` names, 0 <= I < N. Raises UserError for any other text."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise UserError(f"expected --shard I/N with 0 <= I < N, found {text!r}")
        return cls(int(index), int(count))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


NO_SHARD = Shard()


class StopAgreement:
    """Finds the point of the program at which all processes stop once one of them is asked to.

    All processes call `here` at the same points of the program and count the calls. When one is
    asked to stop, each publishes its count and then waits in `here` until all have: they stop at
    the first call that no process has made yet. `exchange` runs in a thread beside the program, so
    that a process publishes its count even while it waits for a device. Until one is asked to stop,
    `here` waits for nothing.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls = 0
        self._asked = self._published = False
        self._stop_at: int | None = None

    def here(self, asked: bool) -> bool:
        """Returns whether all processes stop here. `asked` says whether this one was asked to."""
        with self._changed:
            self._asked |= asked
            self._changed.wait_for(lambda: not self._published or self._stop_at is not None)
            self._calls += 1
            return self._calls == self._stop_at

    def exchange(self, client: Any, process: int, processes: int) -> None:
        """Publishes this process's count if any was asked to stop, and reads the others'."""
        counts = [int(count) for _, count in client.key_value_dir_get("stop")]
        with self._changed:
            if (self._asked or counts) and not self._published:
                client.key_value_set(f"stop/{process}", str(self._calls))
                self._published = True
            if len(counts) == processes:
                self._stop_at = 1 + max(counts)
                self._changed.notify_all()


_agreement = StopAgreement()


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects to the other processes; returns when all are there.

    Call it before the first use of a device. From then on jax ends this process when another one
    dies. If the others do not come in time, this process ends with status 2.

    Args:
        coordinator: HOST:PORT of process 0. Without arguments the cluster says who the processes
            are (Cloud TPU, GKE, SLURM).
        num_processes: the number of processes.
        process_id: the number of this one.

    Raises:
        UserError: if neither the arguments nor the cluster say who the processes are.
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
    # jax's own handler of SIGTERM would replace that of runs/signals.py.
    jax.config.update("jax_enable_preemption_service", False)
    # jax's own time-out aborts the process with a stack trace.
    timer = threading.Timer(CONNECT_SECONDS, _give_up)
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=CONNECT_SECONDS + 60,
            heartbeat_timeout_seconds=SILENCE_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes did not find one another: {error}") from None
    finally:
        timer.cancel()
    over = threading.Event()
    thread = threading.Thread(target=_exchange, args=(over,), daemon=True)
    thread.start()
    atexit.register(lambda: (over.set(), thread.join()))  # before jax disconnects


def _give_up() -> None:
    print(
        f"error: the other processes did not come within {CONNECT_SECONDS} s: start all of them, "
        "with one --coordinator that they can reach and one --num-processes",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _exchange(over: threading.Event) -> None:
    client = _client()
    while not over.wait(EXCHANGE_SECONDS):
        try:
            _agreement.exchange(client, jax.process_index(), jax.process_count())
        except jax.errors.JaxRuntimeError:
            continue  # if the service is gone for good, jax ends this process


def _client() -> Any:
    """Returns jax's client of the coordination service, which has no public name. Orbax uses it in
    the same way."""
    from jax._src import distributed

    return distributed.global_state.client


def exit_process(status: int) -> NoReturn:
    """Ends this process; after a failure at once, without waiting for the others."""
    if status and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@contextmanager
def report_lost_peers() -> Iterator[None]:
    """Ends this process with one line when a collective fails because another process is gone."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # some come as ValueError
        if jax.process_count() == 1 or not LOST_PEER.match(str(error)):
            raise
        print(
            f"error: another process is gone or cannot be reached ({str(error).splitlines()[0]}): "
            f"process {jax.process_index()} ends too; start all of them again to resume",
            file=sys.stderr,
        )
        exit_process(1)


def is_primary() -> bool:
    """Returns whether this is the primary process, which writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here. Each name can be used once."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(name, BARRIER_SECONDS * 1000)


def all_stop_here(asked: bool) -> bool:
    """Returns whether all processes stop here, because this or another one was asked to.

    All processes must call it at the same points of the program. It does not wait for a device.
    """
    return asked if jax.process_count() == 1 else _agreement.here(asked)


def any_process(flag: bool) -> bool:
    """Returns whether the flag is set in any process.

    All processes must call it at the same point. It waits for the devices of all.
    """
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array([flag]))))

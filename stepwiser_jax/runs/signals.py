"""How a run is stopped: Ctrl-C and SIGTERM wait until the work so far is saved."""

from __future__ import annotations

import os
import signal


class Interrupted(Exception):
    """Everything is saved after Ctrl-C or SIGTERM; the same command resumes."""


class StopRequest:
    """A signal handler that remembers the first signal and raises KeyboardInterrupt at the next."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, signum: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # `print` will not do: the signal may interrupt a print, and a second one inside it raises.
        os.write(2, b"stopping: saving first (Ctrl-C again to stop at once)\n")

    def check(self) -> None:
        """Raises Interrupted if a stop is requested. Call it when everything so far is saved."""
        if self.requested:
            raise Interrupted


stop = StopRequest()


def install_signal_handlers() -> None:
    """Makes Ctrl-C and SIGTERM wait for the end of the current unit of work.

    Call it when there is something to save; before that both signals end the process at once.
    """
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)

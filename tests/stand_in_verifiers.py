"""Verifiers that behave as a completion orders."""

import os
import signal
import time

from stepwiser_jax.records import Problem


def follow(completion: str, problem: Problem) -> bool:
    order, *seconds = completion.split()
    if order == "sleep":
        time.sleep(float(seconds[0]))
    elif order == "hold":
        pow(7, 10**9)
    elif order == "wait":
        signal.sigwait(signal.valid_signals())
    elif order == "exit":
        os._exit(1)
    elif order == "raise":
        raise LookupError(completion)
    return order != "wrong"


def is_seven(completion: str, problem: Problem) -> bool:
    """Knows the right answer by itself, whatever the reference is."""
    return completion in ("\\boxed{7}", "\\boxed{7.0}")

"""What a stage compiles before it is warm: a report, and a cache for the next process.

A program is compiled for each shape it meets. `start` begins a stage's account; `report` is the
summary's `warm_up`:

    seconds     of all compilation, the reading of cached programs included
    cached      how many programs came from the persistent cache
    compiled    how many did not
    programs    those with a shape of ours, in order: name, shape, seconds, cached

Tracing is not counted. Source of the numbers: jax.monitoring.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stepwiser_jax.runs.progress import say

WORTH_A_LINE = 1.0
"""Seconds from which on a program that was compiled, or read from the cache, is told of."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One compilation of one program; `shape` is None for what jax compiles by itself."""

    program: str
    shape: str | None
    seconds: float
    cached: bool


_compiled: list[Program] = []
_here = threading.local()


def start(cache: str | None) -> None:
    """Begin a new account, and keep compiled programs in the directory `cache` if there is one.

    Programs for a CPU are of that processor's instructions, so each kind of processor has a
    directory of its own. An entry that cannot be read is compiled again; jax warns of it.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    _listen()
    _compiled.clear()
    if cache is None:
        return
    directory = Path(cache).absolute()
    if jax.default_backend() == "cpu":
        directory /= f"cpu-{processor()}"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # Small programs too: there are hundreds, and together they take seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # it ignores another directory once it is in use


@contextmanager
def compiling(shape: str) -> Iterator[None]:
    """Around the call of a program: what is compiled inside is of this shape."""
    outer, _here.shape = getattr(_here, "shape", None), shape
    try:
        yield
    finally:
        _here.shape = outer


def report() -> dict[str, Any]:
    """See above."""
    return {
        "seconds": sum(program.seconds for program in _compiled),
        "cached": sum(program.cached for program in _compiled),
        "compiled": sum(not program.cached for program in _compiled),
        "programs": [dataclasses.asdict(p) for p in _compiled if p.shape is not None],
    }


def processor() -> str:
    """12 hex digits that two processors share only if they have the same instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    kinds.add(f"{platform.machine()} {platform.processor()}")
    return hashlib.sha256("\n".join(sorted(kinds)).encode()).hexdigest()[:12]


@functools.cache
def _listen() -> None:
    """Once a process: jax tells of a program that came from the cache, then of every program."""
    from jax import monitoring

    def on_event(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            _here.hit = True

    def on_duration(event: str, duration_secs: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            hit, _here.hit = getattr(_here, "hit", False), False
            shape = getattr(_here, "shape", None)
            if duration_secs >= WORTH_A_LINE:
                how = "read from the cache" if hit else "compiled"
                say(f"{how} in {duration_secs:.1f} s: {shape or about['fun_name']}")
            _compiled.append(Program(about["fun_name"], shape, duration_secs, hit))

    monitoring.register_event_listener(on_event)
    monitoring.register_event_duration_secs_listener(on_duration)

"""Records what a stage compiles, and keeps compiled programs for the next process.

A program is compiled for each shape that it meets. `start` begins a stage's record; `report`
returns it for `warm_up` in summary.json. Tracing does not count. The numbers come from
jax.monitoring.
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

LINE_SECONDS = 1.0
"""A program that took at least this long to compile, or to read from the cache, gets a line."""


@dataclasses.dataclass(frozen=True)
class Compilation:
    """One compilation of one program; `shape` is None for what jax compiles by itself."""

    program: str
    shape: str | None
    seconds: float
    cached: bool


_compiled: list[Compilation] = []
_here = threading.local()


def start(cache: str | None) -> None:
    """Starts a new record; keeps compiled programs in the directory `cache`, if it is not None.

    Programs for a CPU use that processor's instructions, so each kind of processor has a
    subdirectory. An entry that cannot be read is compiled again, and jax warns of it.
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
    # Keep small programs too: there are hundreds, and together they take seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # it ignores another directory once it is in use


@contextmanager
def compiling(shape: str) -> Iterator[None]:
    """Names the shape of the programs that are compiled inside."""
    outer, _here.shape = getattr(_here, "shape", None), shape
    try:
        yield
    finally:
        _here.shape = outer


def report() -> dict[str, Any]:
    """Returns what has been compiled since `start`.

    It holds the `seconds` of all compilation, with the reading of cached programs; how many
    programs were `cached` and how many `compiled`; and the `programs` with a named shape, in order.
    """
    return {
        "seconds": sum(program.seconds for program in _compiled),
        "cached": sum(program.cached for program in _compiled),
        "compiled": sum(not program.cached for program in _compiled),
        "programs": [dataclasses.asdict(p) for p in _compiled if p.shape is not None],
    }


def processor() -> str:
    """Returns 12 hex digits that two processors share only if their instructions are the same."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    kinds.add(f"{platform.machine()} {platform.processor()}")
    return hashlib.sha256("\n".join(sorted(kinds)).encode()).hexdigest()[:12]


@functools.cache
def _listen() -> None:
    """Registers listeners, once per process. jax reports a hit in the cache before its program."""
    from jax import monitoring

    def on_event(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            _here.hit = True

    def on_duration(event: str, duration_secs: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            hit, _here.hit = getattr(_here, "hit", False), False
            shape = getattr(_here, "shape", None)
            if duration_secs >= LINE_SECONDS:
                how = "read from the cache" if hit else "compiled"
                say(f"{how} in {duration_secs:.1f} s: {shape or about['fun_name']}")
            _compiled.append(Compilation(about["fun_name"], shape, duration_secs, hit))

    monitoring.register_event_listener(on_event)
    monitoring.register_event_duration_secs_listener(on_duration)

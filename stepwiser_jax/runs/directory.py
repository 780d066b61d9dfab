"""A stage's run: its directory, its metrics, and how it is stopped.

<run_dir>/config.yaml     the resolved config; with another one, but for where it computes, how much
                          it is to do and what is still to be decided, the directory is refused
<run_dir>/metrics.jsonl   one line per optimizer step or iteration, also as TensorBoard events; its
                          `time` (UTC) and `seconds` (since the line before) are of this machine,
                          all else is the same whenever the run is repeated
<run_dir>/records/        what the stage hands on
<run_dir>/summary.json    the numbers a person would quote
<run_dir>/manifest.json   written last: the run is finished
<run_dir>/lock            who works here: locked by each process, and let go when it ends
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import jax

from stepwiser_jax import __version__
from stepwiser_jax.config import (
    ComputeStage,
    Config,
    completed,
    config_digest,
    differing_keys,
    dump_config,
    read_run_settings,
)
from stepwiser_jax.distributed import hosts
from stepwiser_jax.distributed.hosts import WHOLE, Shard
from stepwiser_jax.errors import UserError
from stepwiser_jax.record_io import (
    KIND,
    MANIFEST,
    RecordWriter,
    atomic_write,
    check_finished,
    read_run_json,
    read_written,
    write_manifest,
)
from stepwiser_jax.records import (
    Dialogue,
    Judgment,
    PrefixValue,
    Rationale,
    Record,
    SearchResult,
    Segmentation,
    Selection,
    SftExample,
    Trajectory,
)
from stepwiser_jax.runs import compilation
from stepwiser_jax.runs.progress import progress, say
from stepwiser_jax.runs.storage import check_writable

WHERE = (
    "mesh",
    "sampling_mesh",
    "compilation_cache",
    "teacher.url",
    "judge.rows",
    "judge.max_length",
)
"""Settings that say where a run computes, not what: it may go on with others. A longer row changes
no score of a classifier but by rounding."""

DECIDED_LAST: dict[str, tuple[tuple[str, ...], tuple[type[Record], ...]]] = {
    "rejection-sample": (("balance", "max_examples"), (SftExample, Dialogue)),
}
"""By stage, settings that decide no record but these: they may change until there are any."""

LOCK_SECONDS = 120
"""A machine that was lost keeps its locks on a shared file system for about a minute and a half."""

WORTH: dict[type[Record], tuple[str, Callable[[Any], float]]] = {
    Trajectory: ("right", lambda trajectory: trajectory.is_correct),
    Segmentation: ("cut", lambda segmentation: bool(segmentation.chunks)),
    PrefixValue: ("value", lambda value: value.value),
    Rationale: ("kept", lambda rationale: rationale.outcome == "kept"),
    Judgment: ("right", lambda judgment: judgment.reward),
    SearchResult: ("right", lambda result: result.is_correct),
    Selection: ("right", lambda selection: selection.is_correct),
}
"""What is told of a block of records: the mean of this number, under this name."""

LENGTH = {
    "sft": "steps",
    "train-judge": "iterations",
    "train-classifier": "steps",
    "evaluate": "benchmark.limit",
}
"""By stage, how much is to be done, null being all there is. It may be raised: what a run has done
is kept, finished or not, and the rest is done."""


def _setting(tree: dict[str, Any], name: str | None) -> Any:
    """Returns the setting `a.b` of a dumped config, None if it is not there."""
    for key in name.split(".") if name else ["none"]:
        tree = (tree or {}).get(key)  # pyright: ignore[reportAssignmentType]
    return tree


T = TypeVar("T")
R = TypeVar("R", bound=Record)


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: everything is saved, the same command goes on from here."""


class RunDirectory:
    """Nothing is written before the first of `writer`, `write_blocks`, `metrics` or `finish`: a
    stage reads and checks its input first, so that a mistake leaves no directory."""

    def __init__(self, path: str | Path, stage: str, config: Config, shard: Shard = WHOLE):
        """Raises UserError where `path` holds another stage's run or one of another config, or
        cannot be written."""
        self._is_longer = False
        self.path, self.stage, self.config, self.shard = Path(path), stage, config, shard
        self.worker = shard.index * jax.process_count() + jax.process_index()
        self.num_workers = shard.count * jax.process_count()
        self._writers: dict[type, RecordWriter[Any]] = {}
        self._is_locked = False
        self._began, self._blocks_done = time.perf_counter(), 0
        self._refuse_other_run()
        if not self.finished:
            check_writable(self.path)

    def _refuse_other_run(self) -> None:
        for path in (self.path, *self.path.parents):
            if path.exists() and not path.is_dir():
                raise UserError(f"expected a directory at {path}, found a file")
        if not (self.path / "config.yaml").is_file():
            # A run that ended before it wrote its config leaves its lock, and half a config.
            left = ("lock", ".config.yaml.")
            names = [file.name for file in self.path.iterdir()] if self.path.is_dir() else []
            if not all(name.startswith(left) for name in names):
                raise UserError(
                    f"{self.path} is not empty and is no run directory (it has no config.yaml): "
                    "name an empty or a new directory"
                )
            return
        found = completed(type(self.config), read_run_settings(self.path), str(self.path))
        self._is_longer = self._continues(found)
        if self._is_longer and (self.path / MANIFEST).is_file():
            check_finished(self.path)  # for the last time: the next manifest names what is there
        undecided, kinds = DECIDED_LAST.get(self.stage, ((), ()))
        if any(read_written(self.path, kind) for kind in kinds):
            undecided = ()
        longer = (LENGTH[self.stage],) if self._is_longer else ()
        free = tuple(f"{key}{end}" for key in (*WHERE, *undecided, *longer) for end in (":", "."))
        differences = [
            difference
            for difference in differing_keys(found, self._settings)
            if not difference.startswith(free)
        ]
        if differences:
            raise UserError(
                f"{self.path} is a run of another config, which differs in "
                f"{'; '.join(differences)}: name a new run directory, or repeat the old config "
                "to resume"
            )

    def _continues(self, found: dict[str, Any]) -> bool:
        """Whether the run with the settings `found` is the beginning of this one. Raises UserError
        if it would be, had its learning rate not followed its length."""
        name = LENGTH.get(self.stage)
        before, now = (_setting(found, name), _setting(self._settings, name))
        training = found.get("training")
        if before is None or (training is not None and now is None):  # all there is; or by epochs
            return False
        if now is not None and now <= before:
            return False
        schedule = "constant" if training is None else training["optimizer"]["schedule"]
        if schedule != "constant":
            raise UserError(
                f"{name}: {before} -> {now}: the learning rate of every step of {self.path} "
                f"follows from {name} (training.optimizer.schedule is {schedule}), so that with "
                "more of them it is another run: name a new run directory (model.path may name "
                "this one), or begin with the schedule constant what is to be continued"
            )
        return True

    @property
    def _settings(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json")

    @property
    def finished(self) -> bool:
        """Whether all is done that the config asks for."""
        return (self.path / MANIFEST).is_file() and not self._is_longer

    def begin(self) -> None:
        """Says what runs and where, and begins the account of what is compiled. A stage calls it
        when it has work to do."""
        where = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        if jax.process_count() > 1:
            where += f" in {jax.process_count()} processes"
        if isinstance(self.config, ComputeStage):
            compilation.start(self.config.compilation_cache)
            axes = self.config.mesh.model_dump().items()
            where += f", mesh {' x '.join(f'{axis} {size}' for axis, size in axes)}"
        say(f"{self.stage}: stepwiser {__version__} in {self.path}, {where}")

    def create(self) -> Path:
        """Make the directory, where nobody else may work from now on."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock_others_out()
        file = self.path / "config.yaml"
        if not file.is_file() or read_run_settings(self.path) != self._settings:
            # First of all a run that is continued is no longer finished: from here on it is one
            # that was killed at its old end, whenever this process ends.
            if self._is_longer:
                (self.path / MANIFEST).unlink(missing_ok=True)
            atomic_write(file, dump_config(self.config))
        return self.path

    def _lock_others_out(self) -> None:
        """Keep every other process from this worker's part of the run, and from the whole of it
        those that cut it otherwise, until this run is let go or its process ends, however it ends:
        they would do the same work and write into one another's files.

        Workers w of N lie side by side: each locks byte N (N - 1) / 2 + w of the file `lock` for
        itself, and shares with the others all bytes that do not belong to N.

        Raises UserError if another process stays.
        """
        if self._is_locked:
            return
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, lock)
        first = self.num_workers * (self.num_workers - 1) // 2
        others = f"another process works in {self.path}"
        for second in range(LOCK_SECONDS + 1):
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, first + self.worker)
                fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB, 0, first + self.num_workers)
                if first:
                    fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB, first, 0)
                break
            except (BlockingIOError, PermissionError):
                fcntl.lockf(lock, fcntl.LOCK_UN)  # another one may be about to get all it needs
                if second == 0:
                    waits = f"{others}: this one waits for it, {LOCK_SECONDS} seconds at most"
                    print(waits, file=sys.stderr, flush=True)
                stop.check()
                time.sleep(second < LOCK_SECONDS)
            except OSError:  # a file system without locks
                break
        else:
            raise UserError(f"{others}: wait for its end, or give this one its own --run-dir")
        self._is_locked = True
        self._refuse_other_run()  # again: another one may have been here since

    def writer(self, record_type: type[R]) -> RecordWriter[R]:
        """A part of this worker's own: a process, of a shard where there are several."""
        if record_type not in self._writers:
            place = (self.worker, self.num_workers)
            self._writers[record_type] = RecordWriter(self.create(), record_type, *place)
        return self._writers[record_type]

    def pending(
        self,
        work: Sequence[Sequence[T]],
        record_type: type[Record],
        ids_of: Callable[[Sequence[T]], Iterable[str]],
    ) -> list[Sequence[T]]:
        """This worker's blocks whose records are not all there yet, whoever wrote them."""
        if (self.path / "config.yaml").is_file():
            self._lock_others_out()
        done = {record.record_id for record in read_written(self.path, record_type)}
        mine = work[self.worker :: self.num_workers]
        left = [block for block in mine if not done.issuperset(ids_of(block))]
        self._blocks_done = len(mine) - len(left)
        return left

    def write_blocks(
        self,
        work: Sequence[Sequence[T]],
        record_type: type[R],
        records_of: Callable[[Sequence[T]], Sequence[R]],
    ) -> tuple[float, int]:
        """Make the records of block after block and write them; between blocks the run can be
        stopped, and nothing is lost. Returns seconds, and how many records were made."""
        install_signal_handlers()
        writer = self.writer(record_type)
        start, made, done = time.perf_counter(), 0, self._blocks_done
        if done:
            say(f"{self.stage}: goes on after {done} of {done + len(work)} blocks")
        with progress(self.stage, "block", done + len(work), done) as told:
            for block in work:
                records = records_of(block)
                writer.append(records)
                made += len(records)
                told.advance(**worth(records))
                stop.check()
        return time.perf_counter() - start, made

    def metrics(self) -> Metrics:
        return Metrics(self.create())

    def finish(self, summarize: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """When all processes are here, one of them writes summary.json, puts the parts in id order,
        and writes the manifest last. A shard leaves that to the run without one, which finds the
        records of all shards."""
        self.create()
        for writer in self._writers.values():
            writer.close()
        hosts.barrier(f"{self.stage}: records are written")
        if self.shard.count > 1:
            written = {KIND[w.record_type]: len(w.done) for w in self._writers.values()}
            return {"shard": str(self.shard), "records_so_far": written}
        if hosts.is_first():
            summary = summarize()
            if isinstance(self.config, ComputeStage):
                summary |= {"warm_up": compilation.report()}
            summary |= {"peak_host_memory_bytes": peak_memory_bytes(), "version": __version__}
            atomic_write(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
            write_manifest(self.path, self.stage, config_digest(self.config), self._writers)
        hosts.barrier(f"{self.stage}: the run is finished")
        took = timedelta(seconds=round(time.perf_counter() - self._began))
        say(f"{self.stage}: finished after {took}, numbers in {self.path / 'summary.json'}")
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """Returns the numbers of a finished run. Raises UserError if its summary or its manifest is
        damaged."""
        return read_run_json(self.path, "summary.json")


def worth(records: Sequence[Record]) -> dict[str, float]:
    """How many records there are, and the mean of what they are worth."""
    if not records or type(records[0]) not in WORTH:
        return {"rows": len(records)}
    name, of = WORTH[type(records[0])]
    return {"rows": len(records), name: sum(map(of, records)) / len(records)}


OF_THIS_MACHINE = ("time", "seconds")
"""What a line of metrics.jsonl says of its writing: not the same when a run is repeated."""


class Metrics:
    """metrics.jsonl and TensorBoard events side by side, of the first process; the others write
    nothing."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / "metrics.jsonl"
        self._tensorboard, self._last_line = None, time.perf_counter()
        if hosts.is_first():
            # Not its SummaryWriter: when the disk is full, the thread that writes for it dies, and
            # who adds to its queue then waits for ever.
            from tensorboardX.event_file_writer import EventsWriter

            folder = run_dir / "tensorboard"
            folder.mkdir(exist_ok=True)
            self._tensorboard = EventsWriter(str(folder / "events"))

    def resume_at(self, step: int) -> dict[str, float]:
        """Forget what a killed run logged after the checkpoint it resumes from; returns the last
        values before it. Raises UserError where they are missing."""
        lines = read_metrics(self._path) if self._path.exists() else []
        kept = [line for line in lines if line["step"] <= step]
        last_step = kept[-1]["step"] if kept else 0
        if last_step < step:
            raise UserError(
                f"{self._path} ends at step {last_step}, the checkpoint to go on from is of step "
                f"{step}: put the file back, or delete the checkpoints after step {last_step}"
            )
        if self._tensorboard is not None:
            atomic_write(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        last = kept[-1] if kept else {}
        return {k: value for k, value in last.items() if k not in ("step", *OF_THIS_MACHINE)}

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._tensorboard is None:
            return
        now = time.perf_counter()
        values = {name: float(value) for name, value in values.items()}
        values["seconds"], self._last_line = round(now - self._last_line, 3), now
        line = {"step": step, **values, "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        event = Event(wall_time=time.time(), step=step)
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._tensorboard.write_event(event)
        self._tensorboard.flush()

    def sync(self) -> None:
        """Until everything written is on disk: before a checkpoint that counts on it."""
        if self._tensorboard is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, but for a last one that a kill cut off. Raises UserError for a
    damaged line."""
    lines = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        before = lines[-1]["step"] if lines else 0
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            fields = None
        if isinstance(fields, dict) and type(fields.get("step")) is int and fields["step"] > before:
            lines.append(fields)
        elif line.endswith(b"\n"):
            raise UserError(
                f"{file}, line {number} is damaged ({line[:80]!r}): put the file back, or delete "
                "that line; the training itself does not depend on it"
            )
    return lines


class StopRequest:
    """First Ctrl-C or SIGTERM: finish the unit of work, save, leave. Second Ctrl-C: leave now."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, signum: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not `print`: the signal may come in the middle of one, which no other may interrupt.
        os.write(2, b"stopping: saving first (Ctrl-C again to stop at once)\n")

    def check(self) -> None:
        """Call between units of work, when everything so far is saved."""
        if self.requested:
            raise Interrupted


stop = StopRequest()


def install_signal_handlers() -> None:
    """From now on there is something to save, and a stop waits for it."""
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def blocks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Fixed blocks of the work: a block's shapes depend on its members' ids alone, so a block that
    is done again after a kill gives the same bytes."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def per_item(seconds: float, items: int) -> float | None:
    """Seconds per item that this process did; None where a restarted run found all of them done."""
    return seconds / items if items else None


def keep_freed_memory() -> None:
    """Tell glibc to keep what it frees. XLA's CPU buffers are larger than malloc's threshold for
    mapping fresh pages, so that by default every step of a small model spends as long in page
    faults as in arithmetic. Nothing happens on other C libraries."""
    trim_threshold, mmap_threshold, top_pad = -1, -3, -2
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(mmap_threshold, 1 << 25)  # the most that glibc takes
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(top_pad, 1 << 26)


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def worker_count() -> int:
    return max(1, min(8, (os.cpu_count() or 2) - 1))

"""The directory of a stage's run.

<run_dir>/config.yaml     the resolved config; a run resumes only with the same one, except for
                          settings that are marked with `config.OnResume`
<run_dir>/metrics.jsonl   one line per optimizer step or iteration (see `runs.metrics`)
<run_dir>/records/        the records that the stage hands on
<run_dir>/summary.json    the numbers that a person would quote
<run_dir>/manifest.json   written last: the run is finished
<run_dir>/progress/       how far its workers have come (see `runs.progress_file`)
<run_dir>/lock            locked by each process that works here, until the process ends
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import jax

from stepwiser_jax import __version__
from stepwiser_jax.config import ComputeStage, Config, OnResume
from stepwiser_jax.config_files import (
    completed,
    config_digest,
    differing_keys,
    dump_config,
    read_run_settings,
    settings_marked,
)
from stepwiser_jax.distributed import hosts
from stepwiser_jax.distributed.hosts import NO_SHARD, Shard
from stepwiser_jax.errors import UserError
from stepwiser_jax.files import atomic_write
from stepwiser_jax.manifest import MANIFEST, check_finished, read_run_json
from stepwiser_jax.record_io import KIND, RecordWriter, stream_written, write_manifest
from stepwiser_jax.records import Dialogue, Record, SftExample
from stepwiser_jax.runs import compilation
from stepwiser_jax.runs.metrics import Metrics
from stepwiser_jax.runs.progress import block_means, progress, say
from stepwiser_jax.runs.progress_file import FOLDER, Progress, write_progress
from stepwiser_jax.runs.signals import install_signal_handlers, stop
from stepwiser_jax.runs.storage import check_writable

LOCK_SECONDS = 120
"""How long a process waits for a lock: a machine that was lost keeps its locks on a shared file
system for about a minute and a half."""


def _setting(tree: dict[str, Any], name: str) -> Any:
    """Returns the setting `a.b` of a dumped config, None if it is not there."""
    *groups, last = name.split(".")
    for group in groups:
        tree = tree.get(group) or {}
    return tree.get(last)


T = TypeVar("T")
R = TypeVar("R", bound=Record)


class RunDirectory:
    """The directory of one run, as one worker of it sees it.

    A worker is one process of one shard. Nothing is written before the first call of `writer`,
    `write_blocks`, `metrics` or `finish`: a stage reads and checks its input first, so that a
    mistake leaves no directory.
    """

    def __init__(self, path: str | Path, stage: str, config: Config, shard: Shard = NO_SHARD):
        """Raises UserError if `path` cannot be written, or holds a run of another stage or config.

        Args:
            path: the directory; it is created when something is written.
            stage: the name of the stage, as on the command line.
            config: the resolved config.
            shard: the part of the work that this command does.
        """
        self._is_longer = False
        self.path, self.stage, self.config, self.shard = Path(path), stage, config, shard
        self.worker = shard.index * jax.process_count() + jax.process_index()
        self.num_workers = shard.count * jax.process_count()
        self._writers: dict[type, RecordWriter[Any]] = {}
        self._is_locked = False
        self._start_time, self._blocks_done = time.perf_counter(), 0
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
        self._is_longer = self._is_lengthened(found)
        if self._is_longer and (self.path / MANIFEST).is_file():
            check_finished(self.path)  # before the next manifest names what is there
        free = settings_marked(self.config, OnResume.FREE)
        examples = chain(*(stream_written(self.path, kind) for kind in (SftExample, Dialogue)))
        if next(examples, None) is None:
            free += settings_marked(self.config, OnResume.UNTIL_EXAMPLES)
        if self._is_longer:
            free += settings_marked(self.config, OnResume.LONGER)
        beginnings = tuple(f"{key}{end}" for key in free for end in (":", "."))
        differences = [
            difference
            for difference in differing_keys(found, self._settings)
            if not difference.startswith(beginnings)
        ]
        if differences:
            raise UserError(
                f"{self.path} is a run of another config, which differs in "
                f"{'; '.join(differences)}: name a new run directory, or repeat the old config "
                "to resume"
            )

    def _is_lengthened(self, found: dict[str, Any]) -> bool:
        """Returns whether this config asks the run with the settings `found` for more of the same.

        Raises UserError if its learning rates depend on its length.
        """
        for name in settings_marked(self.config, OnResume.LONGER):
            before, now = _setting(found, name), _setting(self._settings, name)
            training = found.get("training")
            # The run used everything, or now trains by epochs.
            if before is None or (training is not None and now is None):
                continue
            if now is not None and now <= before:
                continue
            schedule = "constant" if training is None else training["optimizer"]["schedule"]
            if schedule != "constant":
                raise UserError(
                    f"{name}: {before} -> {now}: the learning rate of every step of {self.path} "
                    f"depends on {name} (training.optimizer.schedule is {schedule}), so a longer "
                    "run is another run: name a new run directory (model.path may name this one). "
                    "Only runs with a constant schedule can be lengthened"
                )
            return True
        return False

    @property
    def _settings(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json")

    @property
    def finished(self) -> bool:
        """Whether everything is done that the config asks for."""
        return (self.path / MANIFEST).is_file() and not self._is_longer

    def begin(self) -> None:
        """Says what runs and where, and starts to record what is compiled.

        A stage calls it when it has work to do.
        """
        where = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        if jax.process_count() > 1:
            where += f" in {jax.process_count()} processes"
        if isinstance(self.config, ComputeStage):
            compilation.start(self.config.compilation_cache)
            axes = self.config.mesh.model_dump().items()
            where += f", mesh {' x '.join(f'{axis} {size}' for axis, size in axes)}"
        say(f"{self.stage}: stepwiser {__version__} in {self.path}, {where}")

    def create(self) -> Path:
        """Makes and locks the directory, and returns its path."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        file = self.path / "config.yaml"
        if not file.is_file() or read_run_settings(self.path) != self._settings:
            # A run that is lengthened first stops being finished: if this process is killed now,
            # it is an unfinished run of its old length.
            if self._is_longer:
                (self.path / MANIFEST).unlink(missing_ok=True)
            atomic_write(file, dump_config(self.config))
        return self.path

    def _lock(self) -> None:
        """Keeps other processes from this worker's part of the run until this process ends.

        Two processes with the same part would write into one another's files. So would processes
        that divide the run into another number of parts; those are kept from the whole run.

        Worker w of N locks byte N (N - 1) / 2 + w of the file `lock` for itself, and shares with
        the others all bytes that do not belong to N.

        Raises UserError if another process does not let go in time.
        """
        if self._is_locked:
            return
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, lock)
        first = self.num_workers * (self.num_workers - 1) // 2
        problem = f"another process works in {self.path}"
        for second in range(LOCK_SECONDS + 1):
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, first + self.worker)
                fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB, 0, first + self.num_workers)
                if first:
                    fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB, first, 0)
                break
            except (BlockingIOError, PermissionError):
                fcntl.lockf(lock, fcntl.LOCK_UN)  # or two processes could wait for one another
                if second == 0:
                    waits = f"{problem}: this one waits for it, {LOCK_SECONDS} seconds at most"
                    print(waits, file=sys.stderr, flush=True)
                stop.check()
                time.sleep(second < LOCK_SECONDS)
            except OSError:  # a file system without locks
                break
        else:
            raise UserError(f"{problem}: wait for its end, or give this one its own --run-dir")
        self._is_locked = True
        self._refuse_other_run()  # again: another process may have changed the run meanwhile

    def writer(self, record_type: type[R]) -> RecordWriter[R]:
        """Returns the writer of this worker's part of the records of one type."""
        if record_type not in self._writers:
            part = (self.worker, self.num_workers)
            self._writers[record_type] = RecordWriter(self.create(), record_type, *part)
        return self._writers[record_type]

    def pending(
        self,
        work: Sequence[Sequence[T]],
        record_type: type[Record],
        ids_of: Callable[[Sequence[T]], Iterable[str]],
    ) -> list[Sequence[T]]:
        """Returns this worker's blocks of `work` for which records are missing.

        Args:
            work: all blocks of the stage, the same in every worker.
            record_type: the type of record that is made from a block.
            ids_of: returns the ids of the records of a block.
        """
        if (self.path / "config.yaml").is_file():
            self._lock()
        done = {record.record_id for record in stream_written(self.path, record_type)}
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
        """Makes and writes the records of one block after the other.

        The run can be stopped between two blocks without losing anything.

        Args:
            work: the blocks, as `pending` returns them.
            record_type: the type of record to write.
            records_of: makes the records of a block.

        Returns:
            The seconds that this took, and the number of records.
        """
        install_signal_handlers()
        writer = self.writer(record_type)
        start, num_records, done = time.perf_counter(), 0, self._blocks_done
        if done:
            say(f"{self.stage}: resumes after {done} of {done + len(work)} blocks")
        with progress(self.stage, "block", done + len(work), done, self.keep) as report:
            for block in work:
                records = records_of(block)
                writer.append(records)
                num_records += len(records)
                report.advance(**block_means(records))
                stop.check()
        return time.perf_counter() - start, num_records

    def keep(self, found: Progress) -> None:
        """Keeps how far this worker has come, for `stepwiser status`."""
        write_progress(self.path, self.worker, found)

    def metrics(self) -> Metrics:
        return Metrics(self.create(), self._settings)

    def finish(self, summarize: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Waits for all processes; then the primary one writes summary.json and the manifest.

        A shard only closes its files: the command without `--shard` finds the records of all
        shards and finishes the run.

        Returns:
            The summary; of a shard, the number of records it wrote.
        """
        self.create()
        for writer in self._writers.values():
            writer.close()
        hosts.barrier(f"{self.stage}: records are written")
        if self.shard.count > 1:
            written = {KIND[w.record_type]: len(w.done) for w in self._writers.values()}
            return {"shard": str(self.shard), "records_so_far": written}
        if hosts.is_primary():
            summary = summarize()
            if isinstance(self.config, ComputeStage):
                summary |= {"warm_up": compilation.report()}
            summary |= {"peak_host_memory_bytes": peak_memory_bytes(), "version": __version__}
            atomic_write(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
            in_order = {writer.path: writer.num_in_order for writer in self._writers.values()}
            digest = config_digest(self.config)
            shutil.rmtree(self.path / FOLDER, ignore_errors=True)
            write_manifest(self.path, self.stage, digest, self._writers, in_order)
        hosts.barrier(f"{self.stage}: the run is finished")
        took = timedelta(seconds=round(time.perf_counter() - self._start_time))
        say(f"{self.stage}: finished after {took}, numbers in {self.path / 'summary.json'}")
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """Returns the numbers of a finished run.

        Raises UserError if its summary or its manifest is damaged.
        """
        return read_run_json(self.path, "summary.json")


def blocks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Returns the items in blocks of `size`.

    The blocks are the same after a restart, so a block that is done again gives the same bytes.
    """
    return [items[start : start + size] for start in range(0, len(items), size)]


def per_item(seconds: float, items: int) -> float | None:
    """Returns seconds per item that this process did; None if a restarted run had none to do."""
    return seconds / items if items else None


def peak_memory_bytes() -> int:
    """Returns the largest resident set of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

"""Runs a sampling stage on blocks of its inputs; each block is sampled at once and then written.

A stage defines its `Work`: the inputs, how a block of them becomes records, and how records become
a summary. `run_blocks` does what all stages share: it finds out which blocks are left to do, loads
models for them, writes their records, and finishes the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax

from stepwiser_jax.config import EngineShapes, Model, SamplingStage
from stepwiser_jax.distributed.hosts import Shard
from stepwiser_jax.distributed.loading import Loaded, load_for_decoding
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.records import Record
from stepwiser_jax.runs.directory import RunDirectory, blocks, per_item
from stepwiser_jax.tasks.verifier import Verifier, worker_count

T = TypeVar("T")
R = TypeVar("R", bound=Record)

Compiled = Counter[str]
"""How often each program ran, by its shape."""


class Session:
    """The blocks that this process does, the devices, models and verifier that it samples them
    with, and their measurements."""

    def __init__(self, config: SamplingStage, blocks: Sequence[Sequence[Any]], closing: ExitStack):
        self.blocks = blocks
        self.seconds = 0.0
        """How long the blocks took, once they are done."""
        self.seed = config.seed
        self.mesh = make_mesh(**config.mesh.model_dump(), devices=jax.local_devices())
        self.compiled: dict[str, Compiled] = {}
        self.measures: list[Callable[[int], dict[str, Any]]] = []
        """Functions of the number of records made, whose numbers go into the summary."""
        self._closing = closing

    def load(
        self, model: Model, engine: EngineShapes, name: str = "policy"
    ) -> tuple[Loaded, Engine]:
        """Returns a model and the engine that samples from it. The summary calls it `name`."""
        arguments = {**model.load_args, "mesh": self.mesh, "seed": self.seed}
        loaded = load_for_decoding(**arguments, weights=engine.weights)
        sampler = Engine(loaded.model, loaded.tokenizer, mesh=self.mesh, **engine.model_dump())
        self.compiled[name] = sampler.compiled_shapes
        return loaded, sampler

    def verifier(self, name: str) -> Verifier:
        """Returns what checks answers, in processes that end with the session."""
        verifier = Verifier(name, workers=worker_count())
        self.measures.append(
            lambda made: {
                "verifier_timeouts": verifier.timeouts,
                "verifier_failures": verifier.failures,
            }
        )
        return self._closing.enter_context(verifier)

    def measured(self, made: int) -> dict[str, Any]:
        """Returns what the summary says of a session in which this number of records was made."""
        found = {key: x for measure in self.measures for key, x in measure(made).items()}
        if self.compiled:
            several = len(self.compiled) > 1
            found["compiled"] = self.compiled if several else next(iter(self.compiled.values()))
        return found


@dataclass(frozen=True)
class Work(Generic[T, R]):
    """What a sampling stage has to do.

    Attributes:
        items: The inputs, the same in every process and after every restart.
        record_type: The records that are made of them.
        ids_of: Returns the ids of all records of a block.
        begin: Loads models, and raises UserError if any item cannot be done. Returns the function
            that makes the records of a block. It is called only if blocks are left to do.
        summarize: Returns what summary.json says of all records.
        unit: What a record is called in `seconds_per_UNIT`.
        complete: Writes the records of other types, when all blocks are done.
    """

    items: Sequence[T]
    record_type: type[R]
    ids_of: Callable[[Sequence[T]], Iterable[str]]
    begin: Callable[[Session], Callable[[Sequence[T]], Sequence[R]]]
    summarize: Callable[[Sequence[R]], dict[str, Any]]
    unit: str
    complete: Callable[[RunDirectory], None] = field(default=lambda directory: None)


def run_blocks(
    stage: str,
    config: SamplingStage,
    run_dir: str | Path,
    shard: Shard,
    prepare: Callable[[], Work[Any, Any]],
) -> dict[str, Any]:
    """Runs a sampling stage; a restarted run repeats the block it was killed in.

    Args:
        stage: The name of the stage.
        config: Its settings.
        run_dir: Where it writes.
        shard: The part of the blocks to do.
        prepare: Reads the inputs. It is called only if the run is not finished.

    Returns:
        The summary of the run.
    """
    directory = RunDirectory(run_dir, stage, config, shard)
    if directory.finished:
        return directory.summary()
    directory.begin()
    work = prepare()
    left = directory.pending(blocks(work.items, config.block_size), work.record_type, work.ids_of)
    measured: dict[str, Any] = {}
    if left:
        with ExitStack() as closing:
            session = Session(config, left, closing)
            records_of = work.begin(session)
            session.seconds, made = directory.write_blocks(left, work.record_type, records_of)
            measured = {f"seconds_per_{work.unit}": per_item(session.seconds, made)}
            measured |= session.measured(made)
    writer = directory.writer(work.record_type)
    work.complete(directory)
    return directory.finish(lambda: work.summarize(writer.read()) | measured)

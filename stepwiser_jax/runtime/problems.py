"""Settings -> records. `problems`: a data set, or the embedded task's generator. `items`:
ProcessBench, or a rollout run of the embedded task."""

from __future__ import annotations

from pathlib import Path

from stepwiser_jax.config import Problems
from stepwiser_jax.records import Problem, ProcessBenchItem, Trajectory, UserError, read_records
from stepwiser_jax.tasks import arithmetic
from stepwiser_jax.text.chunks import chunk_texts
from stepwiser_jax.text.datasets import load_problems, load_processbench
from stepwiser_jax.text.tokenizer import Tokenizer


def read_problems(problems: Problems) -> list[Problem]:
    """Raises UserError for an empty set, or a problem without an answer."""
    if problems.source != "arithmetic":
        return load_problems(
            problems.source, split=problems.split, subset=problems.subset, limit=problems.limit
        )
    if problems.limit is None or problems.split is None:
        raise UserError(
            "problems.limit and problems.split must say how many problems of which split to "
            "generate when problems.source is 'arithmetic'"
        )
    return arithmetic.generate_problems(problems.limit, problems.seed, problems.split)


def load_items(
    source: str, tokenizer: Tokenizer, *, split: str | None = None, limit: int | None = None
) -> list[ProcessBenchItem]:
    """ProcessBench items, or a rollout run of the embedded task with its exact truth."""
    if not (Path(source) / "config.yaml").is_file():
        return load_processbench(source, split=split, limit=limit)
    if split is not None:
        raise UserError(f"split {split!r} is of a data set, and {source} is a run: set it to null")
    problems = {p.problem_id: p for p in read_records(source, Problem)}
    trajectories = read_records(source, Trajectory)[:limit]
    return [
        arithmetic.processbench_item(
            problems[t.problem_id],
            t.trajectory_id,
            chunk_texts(tokenizer, t.completion_ids, t.chunk_ends),
            t.is_correct,
        )
        for t in trajectories
    ]

"""Reads what settings name: problems with their answers, and solutions to judge."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stepwiser_jax import plugins
from stepwiser_jax.config import DataSource, Evaluate, SolvingStage
from stepwiser_jax.config_files import read_run_settings
from stepwiser_jax.data.datasets import load_benchmark, load_problems
from stepwiser_jax.data.held_out import drop_held_out, held_out_questions, is_held_out
from stepwiser_jax.data.rows import OnMalformed, Split, number_rows, shuffled
from stepwiser_jax.errors import UserError
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import BenchmarkItem, Problem, ProcessBenchItem, Trajectory
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.tasks.sources import PROBLEMS, TRUTH, is_function
from stepwiser_jax.tasks.verifier import Verifier, worker_count
from stepwiser_jax.text.chunks import chunk_texts
from stepwiser_jax.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


def read_problems(
    problems: DataSource, dropped: Counter[str] | None = None, verifier: str = "mathematics"
) -> list[Problem]:
    """Returns the problems of a data set, a finished run, or a function.

    Args:
        problems: The settings.
        dropped: Counts what is left out.
        verifier: What checks the answers. For `mathematics` a row without an answer is malformed.

    Raises:
        UserError: No problem is left, or a row is malformed and those are not to be skipped.
    """
    held_out = held_out_questions(problems.exclude)
    shuffle_seed = problems.seed if problems.shuffle else None
    source, rows = problems.source, None
    if is_function(source, PROBLEMS):
        rows = number_rows(_generate(problems), shuffle_seed)
    elif Path(source).is_dir():
        found = {p.problem_id: p for p in read_records(source, Problem)}
        ids = shuffled(found, problems.seed) if problems.shuffle else found
        return drop_held_out([found[i] for i in ids], held_out, dropped)[: problems.limit]
    return load_problems(
        source,
        rows,
        split=problems.one_split,
        subset=problems.subset,
        shuffle_seed=shuffle_seed,
        is_excluded=lambda problem: is_held_out(problem, held_out),
        limit=problems.limit,
        on_malformed=problems.on_malformed,
        dropped=dropped,
        needs_answer=verifier == "mathematics",
    )


def _generate(problems: DataSource) -> Iterator[tuple[str, Any]]:
    """Yields what a function of `problems.source` makes, each with the place that errors name."""
    generate = plugins.load(problems.source, "a source of problems", PROBLEMS)
    limit = None if problems.shuffle else problems.limit
    rows = generate(split=problems.one_split, limit=limit, seed=problems.seed)
    yield from ((f"{problems.source}, row {n}", row) for n, row in enumerate(rows, 1))


def keep_verifiable(
    problems: Sequence[Problem], verifier: str, dropped: Counter[str]
) -> list[Problem]:
    """Returns the problems that `verifier` can check (paper 4.1). The others are counted in
    `dropped` and logged. Raises UserError if no problem is left, or no worker starts."""
    with Verifier(verifier, workers=worker_count()) as checking:
        reasons = checking.check(problems)
    kept = [p for p, reason in zip(problems, reasons, strict=True) if reason is None]
    if len(kept) == len(problems):
        return kept
    first = next(i for i, reason in enumerate(reasons) if reason is not None)
    unverifiable = (
        f"{len(problems) - len(kept)} of {len(problems)} problems cannot be checked by the "
        f"verifier {verifier!r}, such as {problems[first].problem_id}: {reasons[first]}"
    )
    if not kept:
        raise UserError(unverifiable)
    _log.warning("left out: %s", unverifiable)
    dropped["unverifiable"] += len(problems) - len(kept)
    return kept


def read_verifiable(config: SolvingStage) -> tuple[list[Problem], dict[str, Any]]:
    """Returns the problems that a stage solves, and for its summary how many there are, and how
    many were left out."""
    dropped: Counter[str] = Counter()
    problems = read_problems(config.problems, dropped, config.verifier)
    problems = keep_verifiable(problems, config.verifier, dropped)
    return problems, {"problems": len(problems), "dropped": dict(dropped)}


def load_items(
    source: str,
    tokenizer: Tokenizer,
    *,
    split: Split = None,
    limit: int | None = None,
    on_malformed: OnMalformed = "stop",
    dropped: Counter[str] | None = None,
) -> list[BenchmarkItem]:
    """Returns solutions whose first error is known: items of ProcessBench or PRMBench, or a
    rollout run of a task that knows the truth of its chunks.

    `limit` of them are drawn at random, the same ones every time and in the order of the draw, so
    that a larger limit adds others. (ProcessBench's files begin with solutions that hold an
    error.)"""
    if (Path(source) / "config.yaml").is_file():
        items: list[BenchmarkItem] = [*items_of_run(source, tokenizer, split)]
    else:
        items = load_benchmark(source, split=split, on_malformed=on_malformed, dropped=dropped)
    if limit is None:
        return items
    return [items[i] for i in np.random.default_rng(0).permutation(len(items))[:limit]]


def read_items(config: Evaluate, dropped: Counter[str] | None = None) -> list[BenchmarkItem]:
    """Returns the items that a run of `evaluate` judges, see `load_items`."""
    benchmark = config.benchmark
    return load_items(
        benchmark.source,
        load_tokenizer_of(config.judge.path),
        split=benchmark.split,
        limit=benchmark.limit,
        on_malformed=benchmark.on_malformed,
        dropped=dropped,
    )


def items_of_run(source: str, tokenizer: Tokenizer, split: Split) -> list[ProcessBenchItem]:
    """Returns all trajectories of a rollout run of a task that knows the truth of its chunks.
    Raises UserError for another task, other chunks than the task's own, and for a split."""
    if split is not None:
        raise UserError(f"split {split!r} is of a data set, and {source} is a run: set it to null")
    chunking = read_run_settings(source).get("chunking", "tags")
    if chunking != "tags":
        raise UserError(
            f"a task knows the truth of its own chunks: expected a rollout run with chunking "
            f"'tags', found {chunking!r} in {source}"
        )
    problems = {p.problem_id: p for p in read_records(source, Problem)}
    unknown = {problem.source for problem in problems.values()} - set(TRUTH)
    if unknown:
        raise UserError(
            "expected a rollout run of a task that knows which chunks are right "
            f"({', '.join(TRUTH)}), found problems of {min(unknown)!r} in {source}"
        )
    return [
        TRUTH[problems[t.problem_id].source](
            problems[t.problem_id],
            t.trajectory_id,
            chunk_texts(tokenizer, t.completion_ids, t.chunk_ends),
            t.is_correct,
        )
        for t in read_records(source, Trajectory)
    ]


def check_tokenizer(
    tokenizer: Tokenizer, problems: Sequence[Problem], trajectories: Sequence[Trajectory]
) -> None:
    """Raises UserError if the first prompts, decoded by `tokenizer`, do not hold their questions.
    It is then not the tokenizer that the trajectories were sampled with."""
    questions = {problem.problem_id: problem.question for problem in problems}

    def reads(trajectory: Trajectory) -> bool:
        prompt = tokenizer.decode(trajectory.prompt_ids.tolist())
        return "".join(questions[trajectory.problem_id].split()) in "".join(prompt.split())

    if not any(map(reads, trajectories[:16])):
        raise UserError(
            "tokenizer: expected that of the policy that sampled the rollouts; by this one the "
            f"prompt of {trajectories[0].trajectory_id} is "
            f"{tokenizer.decode(trajectories[0].prompt_ids.tolist())[:80]!r}"
        )

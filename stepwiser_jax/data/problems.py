"""Settings -> records. `problems`: a data set, or the embedded task's generator. `items`:
ProcessBench, or a rollout run of the embedded task."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stepwiser_jax.config import DataSource, read_run_settings
from stepwiser_jax.data.datasets import (
    OnMalformed,
    Split,
    load_benchmark,
    load_problems,
    shuffled,
)
from stepwiser_jax.data.held_out import drop_held_out, held_out_questions, is_held_out
from stepwiser_jax.errors import UserError
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import BenchmarkItem, Problem, ProcessBenchItem, Trajectory
from stepwiser_jax.runs.directory import worker_count
from stepwiser_jax.tasks import arithmetic
from stepwiser_jax.tasks.mathematics import AnswerVerifier
from stepwiser_jax.text.chunks import chunk_texts
from stepwiser_jax.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


def read_problems(problems: DataSource, dropped: Counter[str] | None = None) -> list[Problem]:
    """What is left out is counted in `dropped`. Raises UserError for an empty set, and for a
    malformed row unless those are left out."""
    if problems.source == "arithmetic":
        return _generated(problems)
    held_out = held_out_questions(problems.exclude)
    if Path(problems.source).is_dir():
        found = {p.problem_id: p for p in read_records(problems.source, Problem)}
        ids = shuffled(found, problems.seed) if problems.shuffle else found
        return drop_held_out([found[i] for i in ids], held_out, dropped)[: problems.limit]
    return load_problems(
        problems.source,
        split=problems.one_split,
        subset=problems.subset,
        shuffle_seed=problems.seed if problems.shuffle else None,
        is_excluded=lambda problem: is_held_out(problem, held_out),
        limit=problems.limit,
        on_malformed=problems.on_malformed,
        dropped=dropped,
    )


def _generated(problems: DataSource) -> list[Problem]:
    if problems.limit is None or problems.one_split is None:
        raise UserError(
            "problems.limit and problems.split must say how many problems of which split to "
            "generate when problems.source is 'arithmetic'"
        )
    return arithmetic.generate_problems(problems.limit, problems.seed, problems.one_split)


def keep_verifiable(
    problems: Sequence[Problem], timeout_seconds: float, dropped: Counter[str]
) -> list[Problem]:
    """Problems against whose reference an answer can be checked (paper 4.1). The others are counted
    in `dropped` and told of. Raises UserError where no problem is left, or no worker starts."""
    with AnswerVerifier(worker_count(), timeout_seconds) as verifier:
        are_verifiable = verifier.verifiable([problem.answer for problem in problems])
    kept = [p for p, is_verifiable in zip(problems, are_verifiable, strict=True) if is_verifiable]
    if len(kept) == len(problems):
        return kept
    first = problems[are_verifiable.index(False)]
    unverifiable = (
        f"{len(problems) - len(kept)} of {len(problems)} problems have a reference answer that "
        f"cannot be verified as mathematics, such as {first.answer[:80]!r} of {first.problem_id}"
    )
    if not kept:
        raise UserError(f"{unverifiable}: name a data set with mathematical answers")
    _log.warning("left out: %s", unverifiable)
    dropped["unverifiable"] += len(problems) - len(kept)
    return kept


def load_items(
    source: str,
    tokenizer: Tokenizer,
    *,
    split: Split = None,
    limit: int | None = None,
    on_malformed: OnMalformed = "stop",
    dropped: Counter[str] | None = None,
) -> list[BenchmarkItem]:
    """Returns items of ProcessBench or PRMBench, or a rollout run of the embedded task with its
    exact truth. `limit` of them are drawn at random, the same ones every time and in the order of
    the draw: with a larger limit others follow. ProcessBench's files begin with solutions that hold
    an error."""
    if (Path(source) / "config.yaml").is_file():
        items: list[BenchmarkItem] = [*items_of_run(source, tokenizer, split)]
    else:
        items = load_benchmark(source, split=split, on_malformed=on_malformed, dropped=dropped)
    if limit is None:
        return items
    return [items[i] for i in np.random.default_rng(0).permutation(len(items))[:limit]]


def check_tokenizer(
    tokenizer: Tokenizer, problems: Sequence[Problem], trajectories: Sequence[Trajectory]
) -> None:
    """Raises UserError where the first prompts, read by `tokenizer`, do not hold their questions:
    it is not the one that the trajectories were sampled with, and would make other text of them."""
    questions = {problem.problem_id: problem.question for problem in problems}

    def reads(trajectory: Trajectory) -> bool:
        prompt = tokenizer.decode(trajectory.prompt_ids)
        return "".join(questions[trajectory.problem_id].split()) in "".join(prompt.split())

    if not any(map(reads, trajectories[:16])):
        raise UserError(
            "tokenizer: expected that of the policy that sampled the rollouts; by this one the "
            f"prompt of {trajectories[0].trajectory_id} is "
            f"{tokenizer.decode(trajectories[0].prompt_ids)[:80]!r}"
        )


def items_of_run(source: str, tokenizer: Tokenizer, split: Split) -> list[ProcessBenchItem]:
    """All trajectories of a rollout run of the embedded task. Raises UserError where their chunks
    are not the task's own, and for a split."""
    if split is not None:
        raise UserError(f"split {split!r} is of a data set, and {source} is a run: set it to null")
    chunking = read_run_settings(source).get("chunking", "tags")
    if chunking != "tags":
        raise UserError(
            f"the embedded task knows the truth of its own chunks: expected a rollout run with "
            f"chunking 'tags', found {chunking!r} in {source}"
        )
    problems = {p.problem_id: p for p in read_records(source, Problem)}
    return [
        arithmetic.processbench_item(
            problems[t.problem_id],
            t.trajectory_id,
            chunk_texts(tokenizer, t.completion_ids, t.chunk_ends),
            t.is_correct,
        )
        for t in read_records(source, Trajectory)
    ]

"""Settings -> records. `problems`: a data set, or the embedded task's generator. `items`:
ProcessBench, or a rollout run of the embedded task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stepwiser_jax.config_parts import Problems
from stepwiser_jax.record_files import read_records
from stepwiser_jax.records import Problem, ProcessBenchItem, Trajectory, UserError
from stepwiser_jax.settings import read_settings
from stepwiser_jax.tasks import arithmetic
from stepwiser_jax.text.chunks import chunk_texts
from stepwiser_jax.text.contamination import drop_held_out, held_out_questions
from stepwiser_jax.text.datasets import OnMalformed, load_problems, load_processbench
from stepwiser_jax.text.tokenizer import Tokenizer


def read_problems(problems: Problems, dropped: Counter[str] | None = None) -> list[Problem]:
    """What is left out is counted in `dropped`. Raises UserError for an empty set, and for a
    malformed row unless those are left out."""
    if problems.source != "arithmetic":
        found = load_problems(
            problems.source,
            split=problems.split,
            subset=problems.subset,
            limit=problems.limit,
            on_malformed=problems.on_malformed,
            dropped=dropped,
        )
    elif problems.limit is None or problems.split is None:
        raise UserError(
            "problems.limit and problems.split must say how many problems of which split to "
            "generate when problems.source is 'arithmetic'"
        )
    else:
        found = arithmetic.generate_problems(problems.limit, problems.seed, problems.split)
    return drop_held_out(found, held_out_questions(problems.exclude), dropped)


def load_items(
    source: str,
    tokenizer: Tokenizer,
    *,
    split: str | None = None,
    limit: int | None = None,
    on_malformed: OnMalformed = "stop",
    dropped: Counter[str] | None = None,
) -> list[ProcessBenchItem]:
    """ProcessBench items, or a rollout run of the embedded task with its exact truth; `limit` of
    them, drawn at random, the same ones every time, and in the order of the draw: with a larger
    limit others follow. ProcessBench's files begin with solutions that hold an error."""
    if (Path(source) / "config.yaml").is_file():
        items = items_of_run(source, tokenizer, split)
    else:
        items = load_processbench(source, split=split, on_malformed=on_malformed, dropped=dropped)
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


def items_of_run(source: str, tokenizer: Tokenizer, split: str | None) -> list[ProcessBenchItem]:
    """All trajectories of a rollout run of the embedded task. Raises UserError where their chunks
    are not the task's own, and for a split."""
    if split is not None:
        raise UserError(f"split {split!r} is of a data set, and {source} is a run: set it to null")
    chunking = read_settings(Path(source) / "config.yaml").get("chunking", "tags")
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

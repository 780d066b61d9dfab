"""Prefix values -> chunk labels -> judge examples (StepWiser eqs 1-3 and 4.1). CPU, seconds.

    values [Q_0 .. Q_J] -> rule -> positive / negative / None (teaches nothing: dropped)
                        -> length filter -> as many negatives as positives

Two kinds of chunks get no label, whatever their values, and are counted: the only one of a response
that closes no chunk though the policy was asked for tags, since it is a whole solution; and the
last one of a response that was cut at the length limit, whose outcome says nothing about it.

Changing the label rule reruns this stage only. Reads `values`, `rollouts` and `tokenizer`.
Writes chunk labels (all but those of these two kinds), judge examples (filtered and balanced), and
classifier examples, whole solutions for a classifier: neither filtered by length nor balanced.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepwiser_jax.config import AdaptiveRollouts, Label, read_run_settings
from stepwiser_jax.data.problems import check_tokenizer
from stepwiser_jax.distributed.loading import load_tokenizer_of
from stepwiser_jax.errors import UserError
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import (
    ChunkLabel,
    ClassifierExample,
    JudgeExample,
    PrefixValue,
    Problem,
    Trajectory,
)
from stepwiser_jax.rl.adaptive import LabelTable
from stepwiser_jax.rl.labels import balanced
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.text.chunks import CHUNK_CLOSE, chunk_texts, end_patterns
from stepwiser_jax.text.prompts import encode_judge_prompt
from stepwiser_jax.text.tokenizer import Tokenizer, completion_text


def run(config: Label, run_dir: str | Path) -> dict[str, Any]:
    directory = RunDirectory(run_dir, "label", config)
    if directory.finished:
        return directory.summary()
    directory.begin()
    problems = {p.problem_id: p for p in read_records(config.rollouts, Problem)}
    trajectories = {t.trajectory_id: t for t in read_records(config.rollouts, Trajectory)}
    check_rule(config)
    labels, no_label = label_trajectories(config, read_records(config.values, PrefixValue))
    unknown = {label.trajectory_id for label in labels} - set(trajectories)
    if unknown:
        raise UserError(
            f"{config.values} values the trajectory {min(unknown)}, which is not in "
            f"{config.rollouts}: name the rollout run that was annotated"
        )
    tokenizer = load_tokenizer_of(config.tokenizer, config.chat_template_args)
    check_tokenizer(tokenizer, list(problems.values()), list(trajectories.values()))
    labels, dropped = drop_undeserved(config, labels, trajectories, tokenizer)
    telling = [label for label in labels if label.v >= config.min_prefix_value]
    examples = judge_examples(telling, trajectories, problems, tokenizer)
    fitting = filter_length(config, examples, tokenizer, dropped)
    dropped["low_prefix_value"] = len(labels) - len(telling)
    chosen = balanced(fitting, config.seed) if config.balance else fitting
    if not chosen:
        raise UserError(
            f"no judge example is left of the labelled chunks ({dict(dropped)} dropped; "
            f"{sum(e.is_positive for e in fitting)} positive among the "
            f"{len(fitting)} that fit): annotate more trajectories, or set balance to false"
        )
    directory.writer(ChunkLabel).append(labels)
    directory.writer(JudgeExample).append(chosen)
    solutions = classifier_examples(telling, trajectories, problems, tokenizer)
    directory.writer(ClassifierExample).append(solutions)
    summary = {
        "rule": config.rule,
        "labels": len(labels),
        "teach_nothing": no_label,
        "positive_share": sum(label.is_positive for label in labels) / len(labels),
        "dropped": dict(dropped),
        "judge_examples": len(chosen),
        "judge_positive_share": sum(example.is_positive for example in chosen) / len(chosen),
        "classifier_examples": len(solutions),
    }
    return directory.finish(lambda: summary)


def label_trajectories(
    config: Label, values: Sequence[PrefixValue]
) -> tuple[list[ChunkLabel], int]:
    """Labels of all chunks that teach something, and the number of those that do not. Of prefixes
    that were not sampled to the end, the likeliest label (`rl/adaptive.py`)."""
    of_trajectory: dict[str, dict[int, PrefixValue]] = defaultdict(dict)
    for value in values:
        of_trajectory[value.trajectory_id][value.num_chunks] = value
    tables = {
        num_rollouts: LabelTable(config.rule, num_rollouts, **config.rule_args)
        for num_rollouts in {value.max_rollouts for value in values}
    }
    labels, no_label = [], 0
    for trajectory_id, by_chunks in of_trajectory.items():
        if sorted(by_chunks) != list(range(len(by_chunks))):
            raise UserError(
                f"{config.values}: expected values of the prefixes 0..J of {trajectory_id}, "
                f"found {sorted(by_chunks)}"
            )
        for j in range(len(by_chunks) - 1):
            v, q = by_chunks[j], by_chunks[j + 1]
            positive = tables[v.max_rollouts].likeliest(q.counts, v.counts)
            if positive is None:
                no_label += 1
            else:
                label = ChunkLabel(trajectory_id, j, q.value, v.value, positive, config.rule)
                labels.append(label)
    return labels, no_label


def drop_undeserved(
    config: Label,
    labels: Sequence[ChunkLabel],
    trajectories: dict[str, Trajectory],
    tokenizer: Tokenizer,
) -> tuple[list[ChunkLabel], Counter[str]]:
    """Labels of chunks that deserve one, and counts of the others by the reason."""
    file = Path(config.rollouts) / "config.yaml"
    chunking = "tags"
    if file.is_file():
        chunking = read_run_settings(config.rollouts).get("chunking", "tags")
    patterns = end_patterns(chunking)

    def closes_none(trajectory: Trajectory) -> bool:
        text = completion_text(tokenizer, trajectory.completion_ids)
        return not any(pattern in text for pattern in patterns)

    kept, dropped = [], Counter(untagged=0, cut=0, too_long=0)
    for label in labels:
        trajectory = trajectories[label.trajectory_id]
        last = len(trajectory.chunk_ends) - 1
        if CHUNK_CLOSE in patterns and last == 0 and closes_none(trajectory):
            dropped["untagged"] += 1
        elif label.chunk_index == last and trajectory.is_cut:
            dropped["cut"] += 1
        else:
            kept.append(label)
    return kept, dropped


def check_rule(config: Label) -> None:
    """Raises UserError where the annotations stopped early for the labels of another rule."""
    is_run = (Path(config.values) / "config.yaml").is_file()
    adaptive = read_run_settings(config.values).get("adaptive") if is_run else None
    if adaptive is None:
        return
    sampled_for = AdaptiveRollouts.model_validate(adaptive)
    if (sampled_for.rule, sampled_for.rule_args) != (config.rule, config.rule_args):
        raise UserError(
            f"{config.values} sampled until the labels of {sampled_for.rule} "
            f"{sampled_for.rule_args} were known, found rule {config.rule} {config.rule_args}: "
            "use that rule, or annotate without adaptive"
        )


def judge_examples(
    labels: Sequence[ChunkLabel],
    trajectories: dict[str, Trajectory],
    problems: dict[str, Problem],
    tokenizer: Tokenizer,
) -> list[JudgeExample]:
    """One example per label: the chunk, and the chunks before it as history."""
    examples = []
    for label in labels:
        trajectory = trajectories[label.trajectory_id]
        problem = problems[trajectory.problem_id]
        start = trajectory.chunk_ends[label.chunk_index - 1] if label.chunk_index else 0
        end = trajectory.chunk_ends[label.chunk_index]
        history, chunk = chunk_texts(tokenizer, trajectory.completion_ids, (start, end))
        examples.append(
            JudgeExample(
                example_id=f"{label.trajectory_id}/{label.chunk_index}",
                problem_id=problem.problem_id,
                question=problem.question,
                history=history,
                chunk=chunk,
                is_positive=label.is_positive,
            )
        )
    return examples


def classifier_examples(
    labels: Sequence[ChunkLabel],
    trajectories: dict[str, Trajectory],
    problems: dict[str, Problem],
    tokenizer: Tokenizer,
) -> list[ClassifierExample]:
    """One per trajectory that has a label. A trajectory's labels stand together, in order. The
    chunk that was cut is no part of the solution: who judges all of it would learn of that too."""
    solutions = []
    for trajectory_id, group in itertools.groupby(labels, lambda label: label.trajectory_id):
        trajectory, own = trajectories[trajectory_id], list(group)
        ends = trajectory.chunk_ends[: -1 if trajectory.is_cut else None]
        solutions.append(
            ClassifierExample(
                solution_id=trajectory_id,
                problem_id=trajectory.problem_id,
                question=problems[trajectory.problem_id].question,
                chunks=tuple(chunk_texts(tokenizer, trajectory.completion_ids, ends)),
                labelled=tuple(label.chunk_index for label in own),
                is_positive=tuple(label.is_positive for label in own),
                q=tuple(label.q for label in own),
            )
        )
    return solutions


def filter_length(
    config: Label, examples: Sequence[JudgeExample], tokenizer: Tokenizer, dropped: Counter[str]
) -> list[JudgeExample]:
    """Paper 4.1: judge prompts that are excessively long are left out, and counted
    in `dropped`."""
    kept = []
    for example in examples:
        prompt = encode_judge_prompt(
            tokenizer, example.question, example.history, example.chunk, config.prompt_style
        )
        if len(prompt) > config.max_prompt_tokens:
            dropped["too_long"] += 1
        else:
            kept.append(example)
    return kept

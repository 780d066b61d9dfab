"""Prefix values -> chunk labels -> judge examples (StepWiser eqs 1-3 and 4.1). CPU, seconds.

    values [Q_0 .. Q_J] -> rule -> positive / negative / None (teaches nothing: dropped)
                        -> length filter -> as many negatives as positives

Chunks after a prefix worth 0 are labelled, as the paper has it, or get no label (`dead_prefix`,
`rl/labels.py`). Two kinds of chunks get no label, whatever their values, and are counted. If the
policy was asked for tags and a response closes no chunk, its only chunk is a whole solution. If a
response was cut at the length limit, its outcome says nothing about its last chunk.

Changing the label rule reruns this stage only. Reads `values`, `rollouts` and `tokenizer`.
Writes chunk labels (all but those of these two kinds), judge examples (filtered and balanced), and
classifier examples, whole solutions for a classifier: neither filtered by length nor balanced.
"""

from __future__ import annotations

import contextlib
import gc
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, TypeVar

from stepwiser_jax.config import AdaptiveRollouts, Label, LabelRule
from stepwiser_jax.config_files import read_adaptive, read_run_settings
from stepwiser_jax.data.problems import check_tokenizer
from stepwiser_jax.errors import UserError
from stepwiser_jax.record_io import read_records, stream_records
from stepwiser_jax.records import (
    ChunkLabel,
    ClassifierExample,
    JudgeExample,
    PrefixValue,
    Problem,
    Trajectory,
)
from stepwiser_jax.rl.adaptive import LabelTable
from stepwiser_jax.rl.examples import (
    PromptLengths,
    balanced,
    classifier_example,
    ids_of_texts,
    judge_example,
    label_values,
)
from stepwiser_jax.rl.labels import load_rule
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.runs.directory import RunDirectory, blocks
from stepwiser_jax.text.chunks import CHUNK_CLOSE, end_patterns
from stepwiser_jax.text.tokenizer import Tokenizer, completion_text, completion_texts

BLOCK = 4096
"""Records that are written at a time."""

DECODED = 512
"""Trajectories that are decoded at a time."""

T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def without_cycle_search() -> Iterator[None]:
    """Keeps Python from looking for reference cycles. The records, which may be millions, are in
    none, and each search would visit all of them."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@without_cycle_search()
def run(config: Label, run_dir: str | Path) -> dict[str, Any]:
    directory = RunDirectory(run_dir, "label", config)
    if directory.finished:
        return directory.summary()
    directory.begin()
    problems = {p.problem_id: p for p in read_records(config.rollouts, Problem)}
    trajectories = {t.trajectory_id: t for t in stream_records(config.rollouts, Trajectory)}
    check_rule(config)
    labels, no_label = label_trajectories(config)
    unknown = {label.trajectory_id for label in labels} - set(trajectories)
    if unknown:
        raise UserError(
            f"{config.values} values the trajectory {min(unknown)}, which is not in "
            f"{config.rollouts}: name the rollout run that was annotated"
        )
    tokenizer = load_tokenizer_of(config.tokenizer, **config.asked)
    check_tokenizer(tokenizer, list(problems.values()), list(trajectories.values())[:16])
    labels, dropped = drop_undeserved(config, labels, trajectories, tokenizer)
    informative = [label for label in labels if label.v >= config.min_prefix_value]
    dropped["low_prefix_value"] = len(labels) - len(informative)
    fitting = keep_fitting(config, informative, trajectories, problems, tokenizer, dropped)
    chosen = balanced(fitting, config.seed) if config.balance else fitting
    if not chosen:
        raise UserError(
            f"no judge example is left of the labelled chunks ({dict(dropped)} dropped; "
            f"{sum(e.is_positive for e in fitting)} positive among the "
            f"{len(fitting)} that fit): annotate more trajectories, or set balance to false"
        )
    for block in blocks(labels, BLOCK):
        directory.writer(ChunkLabel).append(block)
    made = examples(informative, chosen, trajectories, problems, tokenizer)
    num_solutions = write_examples(directory, made)
    summary = {
        "rule": config.rule,
        "labels": len(labels),
        "teach_nothing": no_label,
        "positive_share": sum(label.is_positive for label in labels) / len(labels),
        "dropped": dict(dropped),
        "judge_examples": len(chosen),
        "judge_positive_share": sum(label.is_positive for label in chosen) / len(chosen),
        "classifier_examples": num_solutions,
    }
    return directory.finish(lambda: summary)


def label_trajectories(config: Label) -> tuple[list[ChunkLabel], int]:
    """Returns the labels of all chunks that teach something, and the number of those that do not.
    Raises UserError if a trajectory's values are not complete."""
    rule = load_rule(config.rule, config.rule_args)
    tables: dict[int, LabelTable] = {}
    labels, no_label = [], 0
    values = stream_records(config.values, PrefixValue)  # those of one trajectory together
    for _, group in groupby(values, lambda value: value.trajectory_id):
        of_one = list(group)
        num_rollouts = of_one[0].max_rollouts
        if num_rollouts not in tables:
            tables[num_rollouts] = LabelTable(rule, num_rollouts, config.dead_prefix)
        found = label_values(of_one, tables[num_rollouts], config.rule)
        labels += filter(None, found)
        no_label += found.count(None)
    return labels, no_label


def drop_undeserved(
    config: Label,
    labels: Sequence[ChunkLabel],
    trajectories: dict[str, Trajectory],
    tokenizer: Tokenizer,
) -> tuple[list[ChunkLabel], Counter[str]]:
    """Returns the labels of chunks that deserve one, and counts of the others by the reason."""
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


def keep_fitting(
    config: Label,
    labels: Sequence[ChunkLabel],
    trajectories: dict[str, Trajectory],
    problems: dict[str, Problem],
    tokenizer: Tokenizer,
    dropped: Counter[str],
) -> list[ChunkLabel]:
    """Returns the labels whose judge prompts are not excessively long (paper 4.1). The others are
    counted in `dropped`."""
    lengths = PromptLengths(tokenizer, config.prompt_style, config.max_prompt_tokens)
    kept = []
    for label in labels:
        trajectory = trajectories[label.trajectory_id]
        problem = problems[trajectory.problem_id]
        if lengths.fits(trajectory, label.chunk_index, problem):
            kept.append(label)
        else:
            dropped["too_long"] += 1
    return kept


def examples(
    labels: Sequence[ChunkLabel],
    chosen: Sequence[ChunkLabel],
    trajectories: dict[str, Trajectory],
    problems: dict[str, Problem],
    tokenizer: Tokenizer,
) -> Iterator[tuple[ClassifierExample, list[JudgeExample]]]:
    """Yields an example for a classifier of each trajectory that has a label, and examples for a
    judge of those of its labels that were chosen."""

    def by_trajectory(labels: Sequence[ChunkLabel]) -> dict[str, list[ChunkLabel]]:
        return {name: list(some) for name, some in groupby(labels, lambda x: x.trajectory_id)}

    labels_of, chosen_of = by_trajectory(labels), by_trajectory(chosen)

    def decoded(names: Sequence[str]) -> list[tuple[str, list[str]]]:
        ids = [ids_of_texts(trajectories[name], chosen_of.get(name, ())) for name in names]
        texts = iter(completion_texts(tokenizer, chain(*ids)))
        return [(name, list(islice(texts, len(own)))) for name, own in zip(names, ids, strict=True)]

    for name, texts in chain.from_iterable(in_threads(decoded, blocks([*labels_of], DECODED))):
        of_one, judged = labels_of[name], chosen_of.get(name, ())
        question = problems[trajectories[name].problem_id].question
        num_chunks = len(texts) - len(judged)
        solution = classifier_example(of_one, trajectories[name], question, texts[:num_chunks])
        histories = zip(judged, texts[num_chunks:], strict=True)
        yield solution, [judge_example(solution, of_one.index(x), text) for x, text in histories]


def in_threads(make: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yields what is made of each item. Two threads make the next ones meanwhile."""
    with ThreadPoolExecutor(2) as threads:
        coming = deque[Future[R]]()
        for item in items:
            coming.append(threads.submit(make, item))
            if len(coming) > 2:
                yield coming.popleft().result()
        yield from (future.result() for future in coming)


def write_examples(
    directory: RunDirectory, made: Iterator[tuple[ClassifierExample, list[JudgeExample]]]
) -> int:
    """Writes examples as they are made. Returns how many solutions there are."""
    of_judge, of_classifier = directory.writer(JudgeExample), directory.writer(ClassifierExample)
    total, judged, solutions = 0, [], []
    for solution, some in made:
        total += 1
        solutions.append(solution)
        judged += some
        if len(solutions) == BLOCK:
            of_classifier.append(solutions)
            of_judge.append(judged)
            judged, solutions = [], []
    of_classifier.append(solutions)
    of_judge.append(judged)
    return total


def check_rule(config: Label) -> None:
    """Raises UserError if the annotations stopped early for other labels: those of another rule, or
    of another `dead_prefix`; or for labels only, while their values are needed too."""
    adaptive = read_adaptive(config.values)
    if adaptive is None:
        return
    if config.min_prefix_value:
        raise UserError(
            f"{config.values} sampled until the labels were known, not whether values are below "
            f"min_prefix_value {config.min_prefix_value}: set it to 0, or annotate without adaptive"
        )
    sampled_for = AdaptiveRollouts.model_validate(adaptive)

    def labels_by(settings: LabelRule) -> dict[str, Any]:
        return settings.model_dump(include=set(LabelRule.model_fields))

    def words(settings: LabelRule) -> str:
        return f"{settings.rule} {settings.rule_args} with dead_prefix {settings.dead_prefix}"

    if labels_by(sampled_for) != labels_by(config):
        raise UserError(
            f"{config.values} sampled until the labels of {words(sampled_for)} were known, found "
            f"rule {words(config)}: use that rule, or annotate without adaptive"
        )

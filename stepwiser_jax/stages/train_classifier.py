"""Trains a discriminative process reward model, the baseline of StepWiser 4.2 (A.1, RLHFlow).

    ClassifierExample -> one conversation: a chunk, its answer, a chunk, its answer, ...
                     -> packed TokenBatch -> cross-entropy of + against - at the answers

Only the answers are learned; one pass over a solution learns, and scores, all of its chunks.

1. The loss is over the two signs, not the vocabulary (`judges/classifier.py`).
2. Hard labels stand in the conversation as the answers, as RLHFlow has it, and + if a chunk has no
   label; scoring puts + everywhere. With soft labels, or a scalar head, every answer is +: it only
   marks where to read, as in Math-Shepherd. Chunks after the last label are left out.
3. A scalar head is two rows, wrong and right, in place of the vocabulary's, read where the answer
   would be predicted: transformers' ...ForTokenClassification.
4. With `validation` the classifier scores held-out chunks as it does in use, every so many steps.

Reads `model` and `examples`. Writes checkpoints/, metrics.jsonl and model/. Other programs can
score with it by the logits of + and -, or of the two classes, before each answer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stepwiser_jax.config import ClassifierJudge, DataSource, TrainClassifier
from stepwiser_jax.config_files import read_adaptive, read_run_settings
from stepwiser_jax.data.datasets import load_classifier_examples
from stepwiser_jax.data.held_out import (
    drop_held_out,
    drop_problems_of,
    held_out_questions,
    part_of,
)
from stepwiser_jax.distributed.loading import Loaded, load_for_training, with_new_score
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.judges.base import Solution
from stepwiser_jax.judges.classifier import (
    Classifier,
    classifier_loss,
    encode_solution,
    sign_ids,
)
from stepwiser_jax.judges.validation import CRITERION, check_classes, judgment_metrics, log_loss
from stepwiser_jax.records import ClassifierExample
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.text.tokenizer import Tokenizer
from stepwiser_jax.training.batches import (
    Document,
    document_loader,
    fitting_documents,
    num_batches,
)
from stepwiser_jax.training.first_example import show_first_document
from stepwiser_jax.training.loop import TrainingRun, say_held_out, say_length
from stepwiser_jax.training.sft_loss import num_target_tokens
from stepwiser_jax.training.validation import Measurements


def run(config: TrainClassifier, run_dir: str | Path) -> dict[str, Any]:
    """Trains for `steps` or `epochs`, resuming from the last checkpoint."""
    directory = RunDirectory(run_dir, "train-classifier", config)
    if directory.finished:
        return directory.summary()
    check_values(config)
    held_out, validation_dropped = load_held_out(config)
    solutions, dropped = load_examples(config, held_out)
    say_held_out("train-classifier", len(held_out), dropped.get("validation", 0))
    mesh = make_mesh(**config.mesh.model_dump())
    directory.begin()
    loaded = load(config, mesh)
    documents, too_long = fitting_documents(
        [make_document(solution, loaded.tokenizer, config) for solution in solutions],
        config.max_length,
    )
    batching: dict[str, Any] = config.model_dump(
        include={"batch_size", "max_length", "seed", "epochs"}
    )
    steps = config.steps or num_batches(documents, **batching)
    say_length("train-classifier", config.epochs, len(documents), f"{steps} steps")
    signs, remat = sign_ids(loaded.tokenizer), config.training.remat
    validation = make_validation(config, loaded, mesh, held_out, validation_dropped, steps)
    training = TrainingRun(
        directory,
        loaded,
        mesh,
        config.training,
        total_updates=steps,
        loader=document_loader(documents, **batching),
        loss_fn=functools.partial(classifier_loss, signs=signs, remat=remat),
        normalizer_fn=num_target_tokens,
        validation=validation,
    )
    show_first_document(directory, documents[0], loaded.tokenizer)
    seconds_per_step = training.fit(steps)
    labels = np.concatenate([np.asarray(d.targets_T)[d.target_mask_T] for d in documents])
    summary = {
        "solutions": len(documents),
        "dropped": {"too_long": too_long} | dropped,
        "labels": len(labels),
        "mean_label": float(np.mean(labels, dtype=np.float64)),
        "steps": steps,
        "loss": training.last_metrics.get("loss"),
        "accuracy": training.last_metrics.get("accuracy"),
        "seconds_per_step": seconds_per_step,
    }
    return training.finish(summary)


def check_values(config: TrainClassifier) -> None:
    """Raises UserError if the values to learn are of annotations that stopped early."""
    if config.labels == "hard":
        return
    validation = [] if config.validation is None else [config.validation.examples]
    for data in (config.examples, *validation):
        is_run = (Path(data.source) / "config.yaml").is_file()
        values = read_run_settings(data.source).get("values") if is_run else None
        if values is not None and read_adaptive(values) is not None:
            raise UserError(
                f"{values}, whose labels are in {data.source}, sampled until the labels were "
                "known, not the values: set labels to hard, or annotate without adaptive"
            )


def load_examples(
    config: TrainClassifier, held_out: Sequence[ClassifierExample]
) -> tuple[list[ClassifierExample], dict[str, int]]:
    """Returns the examples of no excluded or held-out problem, and counts of what was left out."""
    dropped: Counter[str] = Counter()
    examples = drop_problems_of(held_out, read_examples(config.examples, dropped), dropped)
    return examples, dict(dropped)


def load_held_out(config: TrainClassifier) -> tuple[list[ClassifierExample], dict[str, int]]:
    """Returns the examples of `validation`, if there is one, and counts of what was left out."""
    if config.validation is None:
        return [], {}
    dropped: Counter[str] = Counter()
    data = config.validation.examples
    return part_of(read_examples(data, dropped), data), dict(dropped)


def read_examples(data: DataSource, dropped: Counter[str]) -> list[ClassifierExample]:
    """Returns the examples of no excluded problem. Raises UserError if there are none."""
    examples = load_classifier_examples(
        data.source, on_malformed=data.on_malformed, dropped=dropped
    )
    if not examples:
        raise UserError(f"expected classifier examples in {data.source}, found none")
    return drop_held_out(examples, held_out_questions(data.exclude), dropped)


def load(config: TrainClassifier, mesh: jax.sharding.Mesh) -> Loaded:
    """Returns the model to train, with a new scalar head if it needs one."""
    scalar = config.head == "scalar"
    settings = config.model.load_args
    loaded = load_for_training(**settings, mesh=mesh, seed=config.seed, classifier=scalar)
    if not scalar or loaded.model.config.classifier:
        return loaded
    return dataclasses.replace(loaded, model=with_new_score(loaded.model, mesh, config.seed))


def make_document(
    solution: ClassifierExample, tokenizer: Tokenizer, config: TrainClassifier
) -> Document:
    """Returns the conversation about a solution, its labelled answers as targets."""
    is_positive = dict(zip(solution.labelled, solution.is_positive, strict=True))
    targets = solution.q if config.labels == "soft" else solution.is_positive
    chunks = up_to_last_label(solution)
    marks_only = config.labels == "soft" or config.head == "scalar"
    answers = [marks_only or is_positive.get(j, True) for j in range(len(chunks))]
    ids, places = encode_solution(
        tokenizer, solution.question, chunks, config.prompt_style, answers
    )
    learned = [places[j] for j in solution.labelled]
    mask_T, targets_T = np.zeros(len(ids), bool), np.zeros(len(ids), np.float32)
    mask_T[learned], targets_T[learned] = True, targets
    return Document(np.array(ids, np.int32), mask_T, targets_T)


def up_to_last_label(solution: ClassifierExample) -> tuple[str, ...]:
    return solution.chunks[: solution.labelled[-1] + 1]


# --- validation ---------------------------------------------------------------------------------


def make_validation(
    config: TrainClassifier,
    loaded: Loaded,
    mesh: jax.sharding.Mesh,
    held_out: Sequence[ClassifierExample],
    dropped: dict[str, int],
    steps: int,
) -> Measurements | None:
    """Returns what measures the classifier, if `validation` says so. Raises UserError if no
    held-out solution fits, or if the best classifier is to be exported and their labels are all of
    one class."""
    if config.validation is None:
        return None
    lengths = [len(make_document(x, loaded.tokenizer, config).tokens_T) for x in held_out]
    fitting = [x for x, n in zip(held_out, lengths, strict=True) if n <= config.max_length]
    if not fitting:
        raise UserError(
            f"no example of validation.examples fits max_length {config.max_length}: the shortest "
            f"of {len(held_out)} has {min(lengths)} tokens"
        )
    labels = [label for solution in fitting for label in solution.is_positive]
    if config.validation.export == "best":
        check_classes(labels, config.validation.examples.source)
    dropped = {"too_long": len(held_out) - len(fitting)} | dropped
    return Measurements(
        config.validation,
        steps,
        functools.partial(measure, config, loaded, mesh, fitting),
        CRITERION,
        {"examples": len(fitting), "labels": len(labels), "dropped": dropped},
    )


def measure(
    config: TrainClassifier,
    loaded: Loaded,
    mesh: jax.sharding.Mesh,
    held_out: Sequence[ClassifierExample],
    model: Any,
) -> dict[str, float]:
    """Returns metrics of the scores of all labelled chunks of held-out solutions."""
    settings = ClassifierJudge(
        path=config.model.path,
        prompt_style=config.prompt_style,
        rows=config.batch_size // config.training.micro_batches,
        max_length=config.max_length,
    )
    judge = Classifier(dataclasses.replace(loaded, model=model), mesh, settings)
    scored = judge([Solution(x.solution_id, x.question, up_to_last_label(x)) for x in held_out])
    judgments = [found[j] for x, found in zip(held_out, scored, strict=True) for j in x.labelled]
    labels = [label for x in held_out for label in x.is_positive]
    targets = [q for x in held_out for q in x.q] if config.labels == "soft" else labels
    loss = log_loss(targets, [judgment.p_positive for judgment in judgments])
    positions = [j for x in held_out for j in x.labelled]
    return {"loss": loss} | judgment_metrics(labels, judgments, positions)

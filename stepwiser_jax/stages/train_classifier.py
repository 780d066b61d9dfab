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

Reads `model` and `examples`. Writes checkpoints/, metrics.jsonl and model/. Other programs can
score with it by the logits of + and -, or of the two classes, before each answer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stepwiser_jax.config import TrainClassifier
from stepwiser_jax.data.datasets import load_classifier_examples
from stepwiser_jax.data.held_out import drop_held_out, held_out_questions
from stepwiser_jax.distributed.loading import Loaded, load_for_training, with_new_score
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.judges.classifier import classifier_loss, encode_solution, sign_ids
from stepwiser_jax.records import ClassifierExample
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.text.tokenizer import Tokenizer
from stepwiser_jax.training.batches import (
    Document,
    document_loader,
    fitting_documents,
    num_batches,
)
from stepwiser_jax.training.loop import TrainingRun, say_length
from stepwiser_jax.training.sft_loss import num_target_tokens


def run(config: TrainClassifier, run_dir: str | Path) -> dict[str, Any]:
    """Trains for `steps` or `epochs`, resuming from the last checkpoint."""
    directory = RunDirectory(run_dir, "train-classifier", config)
    if directory.finished:
        return directory.summary()
    solutions, dropped = load_examples(config)
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
    training = TrainingRun(
        directory,
        loaded,
        mesh,
        config.training,
        total_updates=steps,
        loader=document_loader(documents, **batching),
        loss_fn=functools.partial(classifier_loss, signs=signs, remat=remat),
        normalizer_fn=num_target_tokens,
    )
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


def load_examples(config: TrainClassifier) -> tuple[list[ClassifierExample], dict[str, int]]:
    """Returns the examples of no excluded problem, and counts of what was left out."""
    dropped: Counter[str] = Counter()
    examples = load_classifier_examples(
        config.examples.source, on_malformed=config.examples.on_malformed, dropped=dropped
    )
    if not examples:
        raise UserError(f"expected classifier examples in {config.examples.source}, found none")
    examples = drop_held_out(examples, held_out_questions(config.examples.exclude), dropped)
    return examples, dict(dropped)


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
    chunks = solution.chunks[: solution.labelled[-1] + 1]
    marks_only = config.labels == "soft" or config.head == "scalar"
    answers = [marks_only or is_positive.get(j, True) for j in range(len(chunks))]
    ids, places = encode_solution(
        tokenizer, solution.question, chunks, config.prompt_style, answers
    )
    learned = [places[j] for j in solution.labelled]
    mask_T, targets_T = np.zeros(len(ids), bool), np.zeros(len(ids), np.float32)
    mask_T[learned], targets_T[learned] = True, targets
    return Document(np.array(ids, np.int32), mask_T, targets_T)

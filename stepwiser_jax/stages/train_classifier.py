"""Train a discriminative process reward model, the baseline of StepWiser 4.2 (A.1): RLHFlow's form.

    ClassifierExample -> one conversation: a chunk, its answer, a chunk, its answer, ...
                     -> packed ClassifierBatch -> cross-entropy of + against - -> AdamW

Only the answers are learned; one pass over a solution learns, and scores, all of its chunks.

1. The loss is over the two signs, not the vocabulary (`judges/classifier.py`).
2. Hard labels stand in the conversation as the answers, as RLHFlow has it, and + where a chunk has
   none; scoring puts + everywhere. With soft labels, or a scalar head, every answer is +: a mark of
   where to read, as in Math-Shepherd. What comes after the last label is left out.
3. A scalar head is two rows, wrong and right, in place of the vocabulary's, read where the answer
   would be predicted: transformers' ...ForTokenClassification.

Reads `model` and `examples`. Writes checkpoints/, metrics.jsonl and model/, which `classify` reads,
and any other program by the logits of + and -, or of the two classes, before each answer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import optax

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
    ClassifierBatch,
    classifier_documents,
    classifier_loader,
    num_batches,
)
from stepwiser_jax.training.loop import TrainingRun, tell_length
from stepwiser_jax.training.sft_loss import supervised_tokens
from stepwiser_jax.training.step import TrainState, make_train_step


def run(config: TrainClassifier, run_dir: str | Path) -> dict[str, Any]:
    """Train for `steps` or `epochs`, resuming from the last checkpoint."""
    directory = RunDirectory(run_dir, "train-classifier", config)
    if directory.finished:
        return directory.summary()
    solutions, dropped = load_examples(config)
    mesh = make_mesh(**config.mesh.model_dump())
    directory.begin()
    loaded = load(config, mesh)
    documents, too_long = classifier_documents(
        solutions,
        functools.partial(render, tokenizer=loaded.tokenizer, config=config),
        max_length=config.max_length,
    )
    batches: dict[str, Any] = {
        "batch_size": config.batch_size,
        "max_length": config.max_length,
        "seed": config.seed,
        "epochs": config.epochs,
    }
    steps = config.steps or num_batches(documents, **batches, packing=True)
    tell_length("train-classifier", config.epochs, len(documents), f"{steps} steps")
    loader = classifier_loader(documents, **batches)
    training = TrainingRun(
        directory, loaded, mesh, config.training, total_updates=steps, loader=loader
    )
    train_step = classifier_train_step(
        config, sign_ids(loaded.tokenizer), training.schedule, training.optimizer, training.state
    )
    shape = f"{config.batch_size}x{config.max_length}"
    seconds_per_step = training.fit(train_step, steps, mesh, shape)
    labels = [document["targets"][document["answer_mask"] > 0] for document in documents]
    count = sum(map(len, labels))
    summary = {
        "solutions": len(documents),
        "dropped": {"too_long": too_long} | dropped,
        "labels": count,
        "mean_label": sum(float(label.sum()) for label in labels) / count,
        "steps": steps,
        "loss": training.last("loss"),
        "accuracy": training.last("accuracy"),
        "seconds_per_step": seconds_per_step,
    }
    return training.finish(summary)


def load_examples(config: TrainClassifier) -> tuple[list[ClassifierExample], dict[str, int]]:
    """Examples of no excluded problem, and counts of what was left out."""
    dropped: Counter[str] = Counter()
    examples = load_classifier_examples(
        config.examples.source, on_malformed=config.examples.on_malformed, dropped=dropped
    )
    if not examples:
        raise UserError(f"expected classifier examples in {config.examples.source}, found none")
    return drop_held_out(examples, held_out_questions(config.examples.exclude), dropped), dict(
        dropped
    )


def load(config: TrainClassifier, mesh: jax.sharding.Mesh) -> Loaded:
    """The model to train. With a scalar head it may have one already."""
    scalar = config.head == "scalar"
    settings = config.model.load_args
    loaded = load_for_training(**settings, mesh=mesh, seed=config.seed, classifier=scalar)
    if not scalar or loaded.model.config.classifier:
        return loaded
    return dataclasses.replace(loaded, model=with_new_score(loaded.model, mesh, config.seed))


def render(
    solution: ClassifierExample, tokenizer: Tokenizer, config: TrainClassifier
) -> tuple[list[int], list[int], list[float]]:
    """(ids, the places of the answers that are learned, the target of each)."""
    is_positive = dict(zip(solution.labelled, solution.is_positive, strict=True))
    targets = solution.q if config.labels == "soft" else map(float, solution.is_positive)
    chunks = solution.chunks[: solution.labelled[-1] + 1]
    marks = config.labels == "soft" or config.head == "scalar"
    answers = [marks or is_positive.get(j, True) for j in range(len(chunks))]
    ids, places = encode_solution(
        tokenizer, solution.question, chunks, config.prompt_style, answers
    )
    return ids, [places[j] for j in solution.labelled], list(targets)


def classifier_train_step(
    config: TrainClassifier,
    signs: tuple[int, int],
    schedule: optax.Schedule,
    optimizer: optax.GradientTransformation,
    like: TrainState | None = None,
) -> Any:
    """One update on a `ClassifierBatch`, see `make_train_step`. `signs`: the ids of + and -."""
    return make_train_step(
        functools.partial(batch_loss, signs=signs, remat=config.training.remat),
        optimizer,
        schedule,
        micro_batches=config.training.micro_batches,
        denominator_fn=lambda batch: supervised_tokens(batch.answer_mask_BT),
        like=like,
    )


def batch_loss(
    model: Any,
    batch: ClassifierBatch,
    denominator: jax.Array,
    *,
    signs: tuple[int, int],
    remat: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy over the answers, divided by `denominator`."""
    return classifier_loss(
        model,
        batch.tokens_BT,
        batch.positions_BT,
        batch.segment_ids_BT,
        batch.answer_mask_BT,
        batch.targets_BT,
        signs=signs,
        normalizer=denominator,
        remat=remat,
    )

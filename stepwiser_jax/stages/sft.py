"""Fine-tunes a model on demonstrations (StepWiser 3.1).

A policy learns to cut its thought into chunks. A judge learns the form of a judgment before GRPO;
GenPRM's judge learns all that it knows.

    demonstrations -> token ids, and which are learned -> packed TokenBatch -> cross-entropy

With `validation` the loss of held-out demonstrations is measured every so many steps.

Reads `examples` and `model`. Writes checkpoints/, metrics.jsonl and model/ (a Hugging Face
directory).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stepwiser_jax.config import Sft
from stepwiser_jax.data.demonstrations import (
    Demonstration,
    encode_demonstration,
    load_demonstrations,
    spells_control,
)
from stepwiser_jax.data.held_out import drop_problems_of
from stepwiser_jax.distributed.loading import load_for_training
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
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
from stepwiser_jax.training.sft_loss import cross_entropy_loss, num_target_tokens
from stepwiser_jax.training.validation import Measurements, mean_loss, packed_batches


def run(config: Sft, run_dir: str | Path) -> dict[str, Any]:
    """Trains for `steps` or `epochs`, resuming from the last checkpoint."""
    directory = RunDirectory(run_dir, "sft", config)
    if directory.finished:
        return directory.summary()
    examples, held_out, dropped = load_examples(config)
    say_held_out("sft", len(held_out), dropped.get("dropped_held_out", 0))
    mesh = make_mesh(**config.mesh.model_dump())
    directory.begin()
    loaded = load_for_training(**config.model.load_args, mesh=mesh, seed=config.seed)
    tokenizer = loaded.tokenizer
    documents, too_long = make_documents(examples, tokenizer, config)
    batching: dict[str, Any] = config.model_dump(
        include={"batch_size", "max_length", "seed", "epochs"}
    )
    steps = config.steps or num_batches(documents, **batching)
    say_length("sft", config.epochs, len(documents), f"{steps} steps")
    training = TrainingRun(
        directory,
        loaded,
        mesh,
        config.training,
        total_updates=steps,
        loader=document_loader(documents, **batching),
        loss_fn=functools.partial(cross_entropy_loss, remat=config.training.remat),
        normalizer_fn=num_target_tokens,
        validation=make_validation(config, tokenizer, mesh, held_out, steps),
    )
    show_first_document(directory, documents[0], tokenizer)
    seconds_per_step = training.fit(steps)
    summary = {
        "examples": len(documents),
        "dropped_too_long": too_long,
        **dropped,
        "with_control_tokens": sum(spells_control(x, tokenizer) for x in examples),
        "steps": steps,
        "loss": training.last_metrics.get("loss"),
        "seconds_per_step": seconds_per_step,
    }
    return training.finish(summary)


def load_examples(
    config: Sft,
) -> tuple[Sequence[Demonstration], Sequence[Demonstration], dict[str, int]]:
    """Returns what is learned, what validates, and what was left out because of that."""
    prompts = load_tokenizer_of(config.model.path, **config.model.asked).prompts
    examples = load_demonstrations(config.examples, config.prompt_style, prompts)
    if config.validation is None:
        return examples, [], {}
    dropped: Counter[str] = Counter()
    held_out = load_demonstrations(config.validation.examples, config.prompt_style, prompts)
    learned = drop_problems_of(held_out, examples, dropped)
    return learned, held_out, {"dropped_held_out": dropped["validation"]}


def make_documents(
    examples: Sequence[Demonstration], tokenizer: Tokenizer, config: Sft
) -> tuple[list[Document], int]:
    """Returns the demonstrations that fit `max_length`, and the number of the others. Raises
    UserError if none does."""
    encoded = (encode_demonstration(x, tokenizer, config.prompt_style) for x in examples)
    return fitting_documents(
        [Document(np.array(ids, np.int32), np.array(learned)) for ids, learned in encoded],
        config.max_length,
    )


def make_validation(
    config: Sft,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    held_out: Sequence[Demonstration],
    steps: int,
) -> Measurements | None:
    """Returns what measures the loss of held-out demonstrations, if `validation` says so."""
    if config.validation is None:
        return None
    documents, too_long = make_documents(held_out, tokenizer, config)
    num_rows = config.batch_size // config.training.micro_batches
    batches = packed_batches(documents, num_rows, config.max_length)

    def measure(model: Any) -> dict[str, float]:
        return {"loss": mean_loss(model, batches, cross_entropy_loss, mesh)}

    counts = {"examples": len(documents), "dropped_too_long": too_long}
    return Measurements(config.validation, steps, measure, "loss", counts)

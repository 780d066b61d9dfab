"""Fine-tunes a model on demonstrations (StepWiser 3.1).

A policy learns to cut its thought into chunks. A judge learns the form of a judgment before GRPO;
GenPRM's judge learns all that it knows.

    demonstrations -> token ids, and which are learned -> packed TokenBatch -> cross-entropy

Reads `examples` and `model`. Writes checkpoints/, metrics.jsonl and model/ (a Hugging Face
directory).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from stepwiser_jax.config import Sft
from stepwiser_jax.data.demonstrations import (
    encode_demonstration,
    load_demonstrations,
    spells_control,
)
from stepwiser_jax.distributed.loading import load_for_training
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.training.batches import (
    Document,
    document_loader,
    fitting_documents,
    num_batches,
)
from stepwiser_jax.training.loop import TrainingRun, say_length
from stepwiser_jax.training.sft_loss import cross_entropy_loss, num_target_tokens


def run(config: Sft, run_dir: str | Path) -> dict[str, Any]:
    """Trains for `steps` or `epochs`, resuming from the last checkpoint."""
    directory = RunDirectory(run_dir, "sft", config)
    if directory.finished:
        return directory.summary()
    prompts = load_tokenizer_of(config.model.path, **config.model.asked).prompts
    examples = load_demonstrations(config.examples, config.prompt_style, prompts)
    mesh = make_mesh(**config.mesh.model_dump())
    directory.begin()
    loaded = load_for_training(**config.model.load_args, mesh=mesh, seed=config.seed)
    tokenizer = loaded.tokenizer
    encoded = (encode_demonstration(x, tokenizer, config.prompt_style) for x in examples)
    documents, too_long = fitting_documents(
        [Document(np.array(ids, np.int32), np.array(learned)) for ids, learned in encoded],
        config.max_length,
    )
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
    )
    seconds_per_step = training.fit(steps)
    summary = {
        "examples": len(documents),
        "dropped_too_long": too_long,
        "with_control_tokens": sum(spells_control(x, tokenizer) for x in examples),
        "steps": steps,
        "loss": training.last_metrics.get("loss"),
        "seconds_per_step": seconds_per_step,
    }
    return training.finish(summary)

"""Supervised fine-tuning (StepWiser 3.1): a policy learns to cut its thought into chunks, or a
judge learns the form of a judgment before GRPO, or GenPRM's and all that it knows.

    SftExample | Dialogue -> ids, which are learned -> packed TokenBatch -> masked cross-entropy
                                                                                         -> AdamW
Learned are completions, and of dialogues what the assistant says, with the end tokens. What its
code printed is read and not learned: at inference the interpreter writes it. (GenPRM's paper does
not say.)

Reads `examples` and `model`. Writes checkpoints/, metrics.jsonl and model/ (a Hugging Face
directory).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import optax

from stepwiser_jax import plugins
from stepwiser_jax.config import DataSource, Sft
from stepwiser_jax.distributed.loading import load_for_training
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.record_io import KIND, read_manifest, read_records
from stepwiser_jax.records import ChunkedSolution, Dialogue, Selection, SftExample
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.tasks.sources import EXAMPLES
from stepwiser_jax.text.chunking import join_tagged
from stepwiser_jax.text.prompts import PromptStyle, encode_dialogue, encode_message, solve_prompt
from stepwiser_jax.text.tokenizer import Tokenizer
from stepwiser_jax.training.batches import TokenBatch, num_batches, sft_documents, sft_loader
from stepwiser_jax.training.loop import TrainingRun, tell_length
from stepwiser_jax.training.sft_loss import cross_entropy_loss, supervised_tokens
from stepwiser_jax.training.step import TrainState, make_train_step


def run(config: Sft, run_dir: str | Path) -> dict[str, Any]:
    """Train for `steps` or `epochs`, resuming from the last checkpoint."""
    directory = RunDirectory(run_dir, "sft", config)
    if directory.finished:
        return directory.summary()
    examples = load_examples(config.examples, config.prompt_style)
    mesh = make_mesh(**config.mesh.model_dump())
    directory.begin()
    loaded = load_for_training(**config.model.load_args, mesh=mesh, seed=config.seed)
    documents, too_long = sft_documents(
        examples,
        functools.partial(render, tokenizer=loaded.tokenizer, style=config.prompt_style),
        max_length=config.max_length,
    )
    batches: dict[str, Any] = {
        "batch_size": config.batch_size,
        "max_length": config.max_length,
        "seed": config.seed,
        "packing": config.packing,
        "epochs": config.epochs,
    }
    steps = config.steps or num_batches(documents, **batches)
    tell_length("sft", config.epochs, len(documents), f"{steps} steps")
    loader = sft_loader(documents, **batches)
    training = TrainingRun(
        directory, loaded, mesh, config.training, total_updates=steps, loader=loader
    )
    train_step = sft_train_step(config, training.schedule, training.optimizer, training.state)
    shape = f"{config.batch_size}x{config.max_length}"
    seconds_per_step = training.fit(train_step, steps, mesh, shape)
    summary = {
        "examples": len(documents),
        "dropped_too_long": too_long,
        "with_control_tokens": sum(spells_control(x, loaded.tokenizer) for x in examples),
        "steps": steps,
        "loss": training.last("loss"),
        "seconds_per_step": seconds_per_step,
    }
    return training.finish(summary)


def sft_train_step(
    config: Sft,
    schedule: optax.Schedule,
    optimizer: optax.GradientTransformation,
    like: TrainState | None = None,
) -> Any:
    """One update on a `TokenBatch`, see `make_train_step`."""
    return make_train_step(
        functools.partial(sft_loss, remat=config.training.remat),
        optimizer,
        schedule,
        micro_batches=config.training.micro_batches,
        denominator_fn=lambda batch: supervised_tokens(batch.loss_mask_BT),
        like=like,
    )


def sft_loss(
    model: Any, batch: TokenBatch, denominator: jax.Array, *, remat: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy over the completions' tokens, divided by `denominator`."""
    return cross_entropy_loss(
        model,
        batch.tokens_BT,
        batch.loss_mask_BT,
        positions_BT=batch.positions_BT,
        segment_ids_BT=batch.segment_ids_BT,
        denominator=denominator,
        remat=remat,
    )


def load_examples(data: DataSource, style: PromptStyle) -> list[SftExample] | list[Dialogue]:
    """Returns examples of a file, of a finished run, or of a function. Raises UserError for an
    empty set."""
    if Path(data.source).exists():
        examples = read_examples(data.source, style)
    else:
        make = plugins.load(data.source, "a file, a finished run or a source of examples", EXAMPLES)
        examples = make(count=data.limit, seed=data.seed, style=style)
    if not examples:
        raise UserError(f"expected examples in {data.source}, found none")
    return examples[: data.limit]


def read_examples(source: str, style: PromptStyle) -> list[SftExample] | list[Dialogue]:
    """SftExample or Dialogue records; of a `segment` run each solution that was cut, of a `select`
    run each response that was selected, after the question in the words in which `rollout` asks
    it."""
    if holds_dialogues(source):
        return read_records(source, Dialogue)
    kinds = read_manifest(source)["records"] if Path(source).is_dir() else {}
    if KIND[Selection] in kinds:
        return [
            SftExample(
                example_id=selection.trajectory_id,
                problem_id=selection.problem_id,
                prompt=solve_prompt(selection.question, style, tags=selection.tagged),
                completion=selection.completion,
            )
            for selection in read_records(source, Selection)
        ]
    if KIND[ChunkedSolution] not in kinds:
        return read_records(source, SftExample)
    return [
        SftExample(
            example_id=solution.trajectory_id,
            problem_id=solution.problem_id,
            prompt=solve_prompt(solution.question, style),
            completion=join_tagged(solution.chunks),
        )
        for solution in read_records(source, ChunkedSolution)
        if solution.chunks
    ]


def holds_dialogues(source: str) -> bool:
    """Of a finished run by its manifest, of a file by its first line."""
    path = Path(source)
    if path.is_dir():
        return KIND[Dialogue] in read_manifest(path)["records"]
    if not path.is_file():
        return False
    with open(path, "rb") as lines:
        return b'"roles":' in lines.readline()


def spells_control(example: SftExample | Dialogue, tokenizer: Tokenizer) -> bool:
    """Whether a text of it holds a control token. It is learned as the text that it is: turns are
    those of a Dialogue, and are not spelled out."""
    is_dialogue = isinstance(example, Dialogue)
    texts = example.texts if is_dialogue else (example.prompt, example.completion)
    return any(map(tokenizer.control.spelled_in, texts))


def render(
    example: SftExample | Dialogue, tokenizer: Tokenizer, style: PromptStyle
) -> tuple[list[int], list[bool]]:
    """(ids, which of them are learned), the end token last. Raises UserError for a dialogue that
    cannot be rendered, or that does not end with what the assistant says."""
    if isinstance(example, SftExample):
        ids = encode_message(tokenizer, example.prompt, style, answer=example.completion)
        completion = [*tokenizer.encode(example.completion), tokenizer.eos_ids[0]]
        return [*ids, *completion], [False] * len(ids) + [True] * len(completion)
    try:
        ids, learned = encode_dialogue(tokenizer, example.roles, example.texts, style)
    except UserError as error:
        raise UserError(f"{example.example_id}: {error}") from None
    if example.roles[-1] != "assistant":
        raise UserError(
            f"{example.example_id}: expected a conversation that ends with the assistant, found "
            f"{example.roles[-1]!r} last"
        )
    return [*ids, tokenizer.eos_ids[0]], [*learned, True]

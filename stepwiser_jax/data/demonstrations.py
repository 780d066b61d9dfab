"""Reads demonstrations for supervised fine-tuning, and turns them into tokens.

A model learns completions, and in conversations what the assistant says, with the end tokens. What
the assistant's code printed is not learned: at inference the interpreter writes it. (GenPRM's paper
does not say.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepwiser_jax import plugins
from stepwiser_jax.config import DataSource
from stepwiser_jax.data.held_out import part_of
from stepwiser_jax.errors import UserError
from stepwiser_jax.manifest import read_manifest
from stepwiser_jax.record_io import KIND, read_records
from stepwiser_jax.records import ChunkedSolution, Dialogue, Selection, SftExample
from stepwiser_jax.tasks.arithmetic_demonstrations import EXAMPLES
from stepwiser_jax.text.chunking import join_tagged
from stepwiser_jax.text.dialogues import encode_dialogue
from stepwiser_jax.text.prompts import PromptStyle, encode_message, solve_prompt
from stepwiser_jax.text.templates import OURS, Prompts
from stepwiser_jax.text.tokenizer import Tokenizer

Demonstration = SftExample | Dialogue


def load_demonstrations(
    data: DataSource, style: PromptStyle, prompts: Prompts = OURS
) -> list[Demonstration]:
    """Returns demonstrations of a file, of a finished run, or of a function.

    Raises:
        UserError: There are none, or the source is unknown.
    """
    if Path(data.source).exists():
        examples = read_demonstrations(data.source, style, prompts)
    else:
        make = plugins.load(data.source, "a file, a finished run or a source of examples", EXAMPLES)
        examples = make(count=data.limit, seed=data.seed, style=style)
    if not examples:
        raise UserError(f"expected examples in {data.source}, found none")
    return part_of(examples, data)


def read_demonstrations(
    source: str, style: PromptStyle, prompts: Prompts = OURS
) -> Sequence[Demonstration]:
    """Returns SftExample or Dialogue records. A `chunk-solutions` run gives the solutions that were
    cut, and a `select-responses` run the selected responses, each after the prompt of `rollout`."""
    if holds_dialogues(source):
        return read_records(source, Dialogue)
    kinds = read_manifest(source)["records"] if Path(source).is_dir() else {}
    if KIND[Selection] in kinds:
        return [
            SftExample(
                example_id=selection.trajectory_id,
                problem_id=selection.problem_id,
                prompt=solve_prompt(
                    selection.question, style, tags=selection.tagged, prompts=prompts
                ),
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
            prompt=solve_prompt(solution.question, style, prompts=prompts),
            completion=join_tagged(solution.chunks),
        )
        for solution in read_records(source, ChunkedSolution)
        if solution.chunks
    ]


def holds_dialogues(source: str) -> bool:
    """Returns whether a run's manifest, or the first line of a file, tells of dialogues."""
    path = Path(source)
    if path.is_dir():
        return KIND[Dialogue] in read_manifest(path)["records"]
    if not path.is_file():
        return False
    with open(path, "rb") as lines:
        return b'"roles":' in lines.readline()


def encode_demonstration(
    example: Demonstration, tokenizer: Tokenizer, style: PromptStyle
) -> tuple[list[int], list[bool]]:
    """Returns token ids, the end token last, and which of them are learned.

    Raises:
        UserError: Nothing is learned, or a dialogue cannot be rendered or does not end with what
            the assistant says.
    """
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


def spells_control(example: Demonstration, tokenizer: Tokenizer) -> bool:
    """Returns whether a text holds a control token. It is learned as plain text: only a Dialogue
    has turns."""
    is_dialogue = isinstance(example, Dialogue)
    texts = example.texts if is_dialogue else (example.prompt, example.completion)
    return any(map(tokenizer.control.spelled_in, texts))

"""Demonstrations for supervised fine-tuning: where they come from, and their tokens.

What is learned are completions, and of conversations what the assistant says, with the end tokens.
What the assistant's code printed is read and not learned: at inference the interpreter writes it.
(GenPRM's paper does not say.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from stepwiser_jax.config import SftData
from stepwiser_jax.errors import UserError
from stepwiser_jax.record_io import KIND, read_manifest, read_records
from stepwiser_jax.records import Dialogue, Segmentation, Selection, SftExample
from stepwiser_jax.tasks import arithmetic
from stepwiser_jax.text.chunking import tagged
from stepwiser_jax.text.prompts import PromptStyle, encode_dialogue, encode_message, solve_prompt
from stepwiser_jax.text.tokenizer import Tokenizer

Demonstrations = list[SftExample] | list[Dialogue]


def load_demonstrations(data: SftData, style: PromptStyle) -> Demonstrations:
    """Returns demonstrations from a file, a finished run, or the embedded task.

    Raises:
        UserError: There are none, or the source is unknown.
    """
    if not data.source.startswith("arithmetic-"):
        examples = read_demonstrations(data.source, style)
        if not examples:
            raise UserError(f"expected examples in {data.source}, found none")
        return examples[: data.count]
    makers: dict[str, Callable[..., Demonstrations]] = {
        "arithmetic-policy": arithmetic.policy_demonstrations,
        "arithmetic-untagged": arithmetic.untagged_demonstrations,
        "arithmetic-segmenter": arithmetic.segmenter_demonstrations,
        "arithmetic-judge": arithmetic.judge_demonstrations,
        "arithmetic-verdicts": arithmetic.verdict_demonstrations,
        "arithmetic-genprm": functools.partial(arithmetic.genprm_demonstrations, style=style),
        "arithmetic-thinkprm": functools.partial(arithmetic.thinkprm_demonstrations, style=style),
    }
    if data.source not in makers:
        raise UserError(f"expected data.source among {sorted(makers)}, found {data.source!r}")
    if data.count is None:
        raise UserError(f"data.count must say how many examples of {data.source} to generate")
    problems = arithmetic.generate_problems(data.count, data.seed, "train")
    return makers[data.source](problems, data.seed)


def read_demonstrations(source: str, style: PromptStyle) -> Demonstrations:
    """Returns SftExample or Dialogue records; of a `chunk-solutions` run the solutions that were
    cut, and of a `select-responses` run the selected responses, each after its question in the
    words in which `rollout` asks it."""
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
    if KIND[Segmentation] not in kinds:
        return read_records(source, SftExample)
    return [
        SftExample(
            example_id=segmentation.trajectory_id,
            problem_id=segmentation.problem_id,
            prompt=solve_prompt(segmentation.question, style),
            completion=tagged(segmentation.chunks),
        )
        for segmentation in read_records(source, Segmentation)
        if segmentation.chunks
    ]


def holds_dialogues(source: str) -> bool:
    """Returns what the manifest of a finished run says, or the first line of a file."""
    path = Path(source)
    if path.is_dir():
        return KIND[Dialogue] in read_manifest(path)["records"]
    if not path.is_file():
        return False
    with open(path, "rb") as lines:
        return b'"roles":' in lines.readline()


def encode_demonstration(
    example: SftExample | Dialogue, tokenizer: Tokenizer, style: PromptStyle
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


def spells_control(example: SftExample | Dialogue, tokenizer: Tokenizer) -> bool:
    """Returns whether a text holds a control token. It is learned as the text that it is: turns are
    those of a Dialogue, and are not spelled out."""
    is_dialogue = isinstance(example, Dialogue)
    texts = example.texts if is_dialogue else (example.prompt, example.completion)
    return any(map(tokenizer.control.spelled_in, texts))

"""Encodes conversations of several turns: a judge of many chunks, or one whose code is run."""

from __future__ import annotations

from collections.abc import Sequence

from stepwiser_jax.errors import UserError
from stepwiser_jax.text.prompts import (
    NO_THOUGHT,
    JudgePromptStyle,
    encode_message,
    split_thought,
)
from stepwiser_jax.text.tokenizer import Tokenizer

SAYS = ("system", "user", "assistant", "output")
"""Roles of a `Dialogue`; the last two are in the assistant's turns."""


def encode_dialogue(
    tokenizer: Tokenizer, roles: Sequence[str], texts: Sequence[str], style: JudgePromptStyle
) -> tuple[list[int], list[bool]]:
    """Encodes a conversation (`records.Dialogue`) up to and including its last text.

    Every text is encoded alone, exactly as it is, so its tokens do not depend on what follows.
    Between turns come the ids that the chat template writes (`before_answers`), or in the style
    `bare` an end token.

    Args:
        tokenizer: The model's.
        roles: Who says each text, one of `SAYS`.
        texts: What is said.
        style: The form of the prompts.

    Returns:
        The ids, and which of them are learned: what the assistant says, and the end tokens between
        its turns.

    Raises:
        UserError: The roles do not form a conversation, or `before_answers` fails.
    """
    turns = _turns(roles, texts)
    asked = [question for question, _ in turns]
    if style == "bare":
        first, *later = [" ".join(text for _, text in question) for question in asked]
        before = [encode_message(tokenizer, first, style)]
        before += [[tokenizer.eos_ids[0], *tokenizer.encode(text)] for text in later]
    else:
        messages = [[{"role": role, "content": text} for role, text in part] for part in asked]
        before = before_answers(tokenizer, messages)
    ids: list[int] = []
    learned: list[bool] = []
    for new, (_, answer) in zip(before, turns, strict=True):
        is_end = bool(ids) and new[0] in tokenizer.eos_ids
        ids += new
        learned += [is_end] + [False] * (len(new) - 1)
        for role, text in answer:
            new = tokenizer.encode(text)
            ids += new
            learned += [role == "assistant"] * len(new)
    return ids, learned


def _turns(
    roles: Sequence[str], texts: Sequence[str]
) -> list[tuple[list[tuple[str, str]], list[tuple[str, str]]]]:
    """Returns what is said before each of the assistant's turns, and the turn, as (role, text)
    pairs. The last turn is empty if the conversation ends with a question."""
    if len(roles) != len(texts):
        raise UserError(
            f"expected a text of every role, found {len(texts)} texts of {len(roles)} roles"
        )
    if not roles or not set(roles) <= set(SAYS) or roles[0] in SAYS[2:]:
        raise UserError(
            f"expected a conversation of {', '.join(SAYS)}, which one of the first two begins, "
            f"found {list(roles)}"
        )
    turns: list[tuple[list[tuple[str, str]], list[tuple[str, str]]]] = []
    for role, text in zip(roles, texts, strict=True):
        answers = role in SAYS[2:]
        if not answers and (not turns or turns[-1][1]):
            turns.append(([], []))
        turns[-1][answers].append((role, text))
    return turns


def before_answers(
    tokenizer: Tokenizer, groups: Sequence[Sequence[dict[str, str]]]
) -> list[list[int]]:
    """Returns the ids that the chat template writes before each of the assistant's answers.

    The conversation is rendered up to each answer, with + for the answers before it. The result is
    what each rendering adds to the one before:

        user How? assistant                            -> user How? assistant
        user How? assistant + user Why? assistant      -> user Why? assistant

    The ids include an empty thought, but not one that is only begun.

    Args:
        tokenizer: Has a chat template.
        groups: The messages before each answer.

    Raises:
        UserError: The template changes the beginning of a conversation when it goes on. (It may
            drop an empty thought, as Qwen3's does.)
    """
    messages: list[dict[str, str]] = []
    beginnings: list[list[int]] = [[]]  # what the next rendering may begin with
    found = []
    for group in groups:
        messages += group
        whole = tokenizer.render_chat(messages)
        read, thought = split_thought(tokenizer, whole)
        kept = next((len(ids) for ids in beginnings if read[: len(ids)] == ids), None)
        if kept is None:
            raise UserError(
                "the chat template does not keep the beginning of a conversation when it goes on, "
                "or an answer, such as +, is not a token of its own there: set prompt_style to "
                "'bare', or use another model's tokenizer"
            )
        is_empty = thought == tokenizer.encode(NO_THOUGHT)
        found.append(read[kept:] + (thought if is_empty else []))
        messages.append({"role": "assistant", "content": "+"})
        beginnings = [ids + tokenizer.encode("+") for ids in (whole, read)]
    return found

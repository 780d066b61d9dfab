"""Writes prompts, encodes them, and reads verdicts. Conversations of several turns are encoded by
`text.dialogues`.

Prompts have two styles. `instruct` is a chat message with instructions as in the paper (Tables 3
and 11), in the words of `text/prompts.yaml` or of a user's file (`text.templates`). `bare` is the
text alone, for models that were fine-tuned on nothing else, such as the embedded task's. A judge
has a third one, `verdict`, which asks for the verdict without an analysis (the ablation of the
chain of thought, A.1).
"""

from __future__ import annotations

import re
from typing import Literal

from stepwiser_jax.errors import UserError
from stepwiser_jax.records import Verdict
from stepwiser_jax.tasks.mathematics import last_box
from stepwiser_jax.text.chunks import strip_tags
from stepwiser_jax.text.templates import OURS, Prompts
from stepwiser_jax.text.tokenizer import Tokenizer

PromptStyle = Literal["instruct", "bare"]
JudgePromptStyle = Literal["instruct", "verdict", "bare"]


def solve_prompt(
    question: str, style: PromptStyle, *, tags: bool = True, prompts: Prompts = OURS
) -> str:
    """Returns the prompt of paper Table 11, or one without chunks if `tags` is false."""
    template = prompts["solve" if tags else "solve_without_tags"]
    return template.format(question=question) if style == "instruct" else question


def chunking_prompt(solution: str, style: PromptStyle, prompts: Prompts = OURS) -> str:
    """Returns the prompt of paper Table 1, or in the bare style the solution and a question
    mark."""
    template = prompts["chunk_solution"]
    return template.format(solution=solution) if style == "instruct" else f"{solution} ?"


def judge_prompt(
    question: str, history: str, chunk: str, style: JudgePromptStyle, prompts: Prompts = OURS
) -> str:
    """Returns the prompt about a chunk. Only the bare style keeps tags."""
    if style == "bare":
        return bare_judge_prompt(question, history, chunk)
    return prompts["verdict" if style == "verdict" else "judge"].format(
        question=question, history=strip_tags(history).strip(), chunk=strip_tags(chunk).strip()
    )


def render_judge_prompt(question: str, history: str, chunk: str) -> list[dict[str, str]]:
    """Returns the prompt of paper Table 3 as one user message for a chat template."""
    return [{"role": "user", "content": judge_prompt(question, history, chunk, "instruct")}]


def encode_message(
    tokenizer: Tokenizer, text: str, style: JudgePromptStyle, *, answer: str = ""
) -> list[int]:
    """Encodes one user message with the chat template, or bare after the start token. If the
    `answer` begins with a thought, the one that the template begins is left out."""
    if style != "bare":
        ids = tokenizer.render_chat([{"role": "user", "content": text}])
        return split_thought(tokenizer, ids)[0] if answer.startswith(THOUGHT) else ids
    ids = tokenizer.encode(text)
    if not ids:
        raise UserError("expected a prompt, found an empty text")
    return ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]


THOUGHT = "<think>\n"
"""Begins the assistant's turn in templates such as those of DeepSeek-R1's distilled models."""

NO_THOUGHT = "<think>\n\n</think>\n\n"
"""Begins the assistant's turn in Qwen3's template if thinking is switched off."""


def split_thought(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[int], list[int]]:
    """Splits a rendered conversation before the thought at its end, begun or empty. If there is no
    thought, the second part is empty."""
    for thought in (NO_THOUGHT, THOUGHT):
        begun = tokenizer.encode(thought)
        if ids[-len(begun) :] == begun:
            return ids[: -len(begun)], begun
    return ids, []


def encode_solve_prompt(
    tokenizer: Tokenizer, question: str, style: PromptStyle, *, tags: bool = True
) -> list[int]:
    text = solve_prompt(question, style, tags=tags, prompts=tokenizer.prompts)
    return encode_message(tokenizer, text, style)


def encode_judge_prompt(
    tokenizer: Tokenizer, question: str, history: str, chunk: str, style: JudgePromptStyle
) -> list[int]:
    text = judge_prompt(question, history, chunk, style, tokenizer.prompts)
    return encode_message(tokenizer, text, style)


def bare_judge_prompt(question: str, history: str, chunk: str) -> str:
    return " ".join(part.strip() for part in (question, history, chunk, "<judge>") if part.strip())


BOXED = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
"""A box whose content may hold braces, but not nested ones: no verdict has those."""

_DECORATION = re.compile(r"\\boxed|\\(?:text|math|bf|rm|bold)[a-z]*|[\s{}*_$.]")


def boxed_word(box: str) -> str:
    """Returns the content of a box in lower case, without LaTeX's and Markdown's fonts and
    spaces."""
    return _DECORATION.sub("", box).lower()


def parse_verdict(text: str) -> Verdict:
    """Returns the verdict in the last \\boxed{}, which has to be finished."""
    box = last_box(text)
    if box is None:
        return Verdict.UNPARSED
    verdicts = {"positive": Verdict.POSITIVE, "negative": Verdict.NEGATIVE}
    return verdicts.get(boxed_word(box), Verdict.OTHER)


def is_bare_verdict(text: str) -> bool:
    """Returns whether the text is one \\boxed{} with a verdict, and otherwise white space."""
    return bool(BOXED.fullmatch(text.strip())) and parse_verdict(text).is_given

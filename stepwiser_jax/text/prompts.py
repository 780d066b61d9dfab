"""Writes prompts, encodes them, and reads verdicts. Conversations of several turns are encoded by
`text.dialogues`.

Prompts have two styles. `instruct` is a chat message with the paper's instructions (Tables 3 and
11). `bare` is the text alone, for models that were fine-tuned on nothing else, such as the embedded
task's. A judge has a third one, `verdict`, which asks for the verdict without an analysis (the
ablation of the chain of thought, A.1).
"""

from __future__ import annotations

import re
from typing import Literal

from stepwiser_jax.errors import UserError
from stepwiser_jax.records import Verdict
from stepwiser_jax.tasks.mathematics import last_box
from stepwiser_jax.text.chunks import strip_tags
from stepwiser_jax.text.tokenizer import Tokenizer

PromptStyle = Literal["instruct", "bare"]
JudgePromptStyle = Literal["instruct", "verdict", "bare"]

SOLVE_PROMPT = """\
You are a careful mathematician. Solve the problem step by step, in exactly this format:
1. Put every part of your reasoning inside <chunk> and </chunk>. A chunk is one complete step of \
thought with one purpose: setting up an equation, one self-contained computation, one conclusion.
2. When the reasoning is complete, give the final answer inside \\boxed{{}}.
Follow the format strictly: no reasoning outside of the chunks.

Problem: {question}"""

SOLVE_PROMPT_WITHOUT_TAGS = """\
Solve the problem step by step, and give the final answer inside \\boxed{{}}.

Problem: {question}"""
"""This is for models that were not taught to mark chunks. A small one would only copy the tags."""

CHUNKING_PROMPT = """\
You are given the solution of a mathematical problem. Cut it into chunks of thought.

How to cut:
1. Unified purpose: a chunk serves one clear objective, such as setting up an equation, one \
self-contained computation, or stating one intermediate or final conclusion. Everything in it \
serves that objective.
2. Logical cohesion: the lines of a chunk form one unbroken flow of thought. Where the focus \
shifts, a new chunk begins.
3. Clear transition: a new chunk begins where the solution enters a new phase, for example from \
solving to verifying, or to an explanatory aside.

Format:
1. Wrap every chunk in <chunk> and </chunk>.
2. Write nothing but the tagged solution: no titles, no further text, no blank lines between chunks.
3. Keep the text of the solution, with its line breaks, exactly as it is.

Solution:
{solution}"""

JUDGE_PROMPT = """\
You are a reasoning validator for mathematical problems. Think step by step and decide whether the \
"New Reasoning Chunk" contains any explicit errors, given the problem and the historical reasoning \
path.

Always write your chain-of-thought analysis first, and only then give your judgment. It is \
acceptable for a chunk to contain no numerical calculation.
Judge Positive if the chunk is free of mistakes, and Negative if it contains one or more mistakes.

Input:
Mathematical Problem: {question}

Historical Reasoning Path: {history}

New Reasoning Chunk: {chunk}

Output format:
1. Analysis: [Always analyse step by step. First state briefly what the chunk sets out to do. Then \
verify its logic, its method and any calculation against the problem and the historical reasoning \
path. If something is wrong, explain the error and why it is one; if the chunk is right, say why \
the step is valid and logical.]
2. Final Judgment: [Give the judgment inside \\boxed{{}}, that is \\boxed{{Positive}} or \
\\boxed{{Negative}}.]"""


VERDICT_PROMPT = """\
You are a reasoning validator for mathematical problems. Decide whether the "New Reasoning Chunk" \
contains any explicit errors, given the problem and the historical reasoning path.

Give your judgment at once, without any analysis. It is acceptable for a chunk to contain no \
numerical calculation.
Judge Positive if the chunk is free of mistakes, and Negative if it contains one or more mistakes.

Input:
Mathematical Problem: {question}

Historical Reasoning Path: {history}

New Reasoning Chunk: {chunk}

Output format:
Nothing but the judgment inside \\boxed{{}}, that is \\boxed{{Positive}} or \\boxed{{Negative}}."""


def solve_prompt(question: str, style: PromptStyle, *, tags: bool = True) -> str:
    """Returns the prompt of paper Table 11, or one without chunks if `tags` is false."""
    prompt = SOLVE_PROMPT if tags else SOLVE_PROMPT_WITHOUT_TAGS
    return prompt.format(question=question) if style == "instruct" else question


def chunking_prompt(solution: str, style: PromptStyle) -> str:
    """Returns the prompt of paper Table 1, or in the bare style the solution and a question
    mark."""
    return CHUNKING_PROMPT.format(solution=solution) if style == "instruct" else f"{solution} ?"


def judge_prompt(question: str, history: str, chunk: str, style: JudgePromptStyle) -> str:
    """Returns the prompt about a chunk. Only the bare style keeps tags."""
    if style == "bare":
        return bare_judge_prompt(question, history, chunk)
    template = VERDICT_PROMPT if style == "verdict" else JUDGE_PROMPT
    return template.format(
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
    return encode_message(tokenizer, solve_prompt(question, style, tags=tags), style)


def encode_judge_prompt(
    tokenizer: Tokenizer, question: str, history: str, chunk: str, style: JudgePromptStyle
) -> list[int]:
    return encode_message(tokenizer, judge_prompt(question, history, chunk, style), style)


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

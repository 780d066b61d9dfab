"""GenPRM's form (arXiv 2504.00891): a conversation about a solution, a turn for every paragraph.

Code that the judge writes is run before the judge goes on:

    user        problem, paragraph 1
    assistant   <analyze> ... </analyze> <verify> ```python ... ``` [Code Output]
    output      what the code printed
    assistant   ... </verify> <output> **Judgement**: $\\boxed{Yes}$ </output>
    user        paragraph 2

There are two forms. `instruct` is the paper's, with the texts of `text/prompts.yaml` or of a user's
file. `bare` is for models that were fine-tuned on nothing else, such as the embedded task's: it has
no tags and no code, and verdicts are Positive or Negative.

The paper's released code gives `<verify>` and the beginning of a block of code after every
analysis, and runs a block once it is closed. Here the judge goes on by itself, unless the texts
`genprm_after_analysis` and `genprm_run_code` say otherwise.

A teacher's critique of a whole solution, written in one go, becomes such a conversation. The paper
leaves two points open. Here a conversation to learn from ends with the first wrong paragraph, as
the critique does. A critique that finds an error agrees with the labels only if that very paragraph
is labelled wrong; labels after it do not matter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from stepwiser_jax.data.rationales import RationaleOutcome
from stepwiser_jax.records import ClassifierExample
from stepwiser_jax.tasks.mathematics import last_box
from stepwiser_jax.text.chunks import strip_tags
from stepwiser_jax.text.prompts import JudgePromptStyle, PromptStyle, bare_judge_prompt
from stepwiser_jax.text.templates import OURS, Prompts

CODE_OUTPUT = "[Code Output]"
"""A judge writes this to have the block before it run."""

ANALYSIS_END = "</analyze>"

SYNTHESIS_OPENING = "### Paragraph 1\n<analyze>\n"
"""Begins the teacher's critique. In the paper the critique is a thought, after `<think>`. Here it
is the answer itself, so that models that do not think can write it too."""

USE_CODE = "Let's use python code to find any potential error:\n"

_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
_OUTPUT = re.compile(r"(?<=\[Code Output\])(\n\n```\n.*?\n```\n)", re.DOTALL)
_PARAGRAPH = re.compile(r"^### Paragraph (\d{1,6})[ \t]*\n", re.MULTILINE)
_SECTION = re.compile(
    r"\s*<analyze>(.*?)</analyze>(?:\s*<verify>(.*?)</verify>)?", re.DOTALL
)  # white space inside the tags is stripped later: matching it here would take forever
_INDEX = re.compile(r"-1|[1-9]\d{0,5}")


@dataclass(frozen=True)
class GenPrmForm:
    """The fixed texts of a conversation.

    Attributes:
        system: The system message; empty if there is none.
        opening: Begins a turn about the paragraph `number`. The judge's analysis follows.
        after_analysis: Is given after the analysis; empty if the judge goes on by itself.
        run_code: Where the judge has written this, its code is run.
        stop: Ends the analysis. If the judge does not write it, it is added after `gap`.
        gap: White space before `stop`.
        lead: Comes between `stop` and the verdict.
        words: The verdicts, right and wrong.
        ending: Ends the turn.
        style: The form of the prompts.
        prompts: The templates of the messages.
    """

    system: str
    opening: str
    after_analysis: str
    run_code: str
    stop: str
    gap: str
    lead: str
    words: tuple[str, str]
    ending: str
    style: JudgePromptStyle
    prompts: Prompts

    def user_turn(self, question: str, chunks: Sequence[str], t: int) -> str:
        """Returns the message with paragraph t. The first one also has the problem."""
        if self.style == "bare":
            return bare_judge_prompt("" if t else question, "", chunks[t])
        text = strip_tags(chunks[t]).strip()
        if t:
            return self.prompts["genprm_step"].format(step=text)
        return self.prompts["genprm_first_step"].format(question=question, step=text)

    def to_verdict(self, turn: str) -> str:
        """Returns what a turn lacks before the word of its verdict. It closes open tags."""
        if turn.endswith(self.stop):
            return self.lead
        closed = turn
        for tag in ("analyze", "verify"):
            if f"<{tag}>" in turn and f"</{tag}>" not in turn:
                closed += f"</{tag}>\n"
        gap = "" if not closed or closed[-1].isspace() else self.gap
        return closed[len(turn) :] + gap + self.stop + self.lead

    def verdict(self, is_right: bool) -> str:
        """Returns the verdict's word and the ending."""
        return self.words[0 if is_right else 1] + self.ending


BARE = GenPrmForm(
    system="",
    opening="",
    after_analysis="",
    run_code=CODE_OUTPUT,
    stop="\\boxed{",
    gap=" ",
    lead="",
    words=(" Positive", " Negative"),
    ending=" }",
    style="bare",
    prompts=OURS,
)


def form_of(style: JudgePromptStyle, prompts: Prompts) -> GenPrmForm:
    """Returns the form of a style, with the texts of these prompts."""
    if style == "bare":
        return BARE
    return GenPrmForm(
        system=prompts["genprm_system"].format(),
        opening=prompts["genprm_opening"],
        after_analysis=prompts["genprm_after_analysis"].format(),
        run_code=prompts["genprm_run_code"].format(),
        stop="<output>",
        gap="\n",
        lead="\n**Judgement**: $\\boxed{",
        words=("Yes", "No"),
        ending="}$\n</output>\n",
        style="instruct",
        prompts=prompts,
    )


INSTRUCT = form_of("instruct", OURS)
FORMS: dict[JudgePromptStyle, GenPrmForm] = {"instruct": INSTRUCT, "bare": BARE}


def analysis_of(turn: str, t: int, form: GenPrmForm) -> str:
    """Returns what a judge's turn says of paragraph t, without code and verdict."""
    end = form.stop if form.style == "bare" else ANALYSIS_END
    return turn.removeprefix(form.opening.format(number=t + 1)).partition(end)[0].strip()


def rethink_prompt(step: str, analysis: str, style: PromptStyle, prompts: Prompts = OURS) -> str:
    """Returns what a policy is told of its first wrong step. The bare style has only the step and
    the analysis."""
    if style == "bare":
        return f"{step} {analysis} ?"
    return prompts["rethink"].format(step=strip_tags(step).strip(), analysis=analysis)


# --- code -----------------------------------------------------------------------------------------


def code_to_run(text: str) -> str | None:
    """Returns the last block of Python, None if there is none."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else None


def with_memory(earlier: Sequence[str], code: str) -> str:
    """Returns a program that runs the earlier blocks, drops their output and errors, and then runs
    `code` in the namespace that they leave: a new process remembers nothing."""
    if not earlier:
        return code
    return f"""\
import contextlib as _contextlib, io as _io
for _code in {list(earlier)!r}:
    with _contextlib.redirect_stdout(_io.StringIO()):
        try:
            exec(_code, globals())
        except BaseException:
            pass
exec({code!r}, globals())
"""


def output_text(output: str) -> str:
    """Returns the text that shows a judge what its code printed. Fences in the output are
    replaced."""
    return f"\n\n```\n{output.replace('```', chr(39) * 3)}\n```\n"


def code_and_output(code: str, output: str) -> str:
    """Returns a block that has run: what a judge says, and what it is shown."""
    return f"```python\n{code}```\n{CODE_OUTPUT}{output_text(output)}"


def split_outputs(turn: str) -> list[tuple[str, str]]:
    """Splits an assistant's turn into (role, text): what it said, and what its code printed."""
    pieces = enumerate(_OUTPUT.split(turn))  # said, printed, said, ...
    return [("output" if i % 2 else "assistant", text) for i, text in pieces if text]


# --- critiques of whole solutions -----------------------------------------------------------------


def synthesis_prompt(
    question: str, chunks: Sequence[str], *, code: bool, prompts: Prompts = OURS
) -> str:
    """Returns the prompt for a critique of a whole solution. With `code` it asks for code and
    promises to run it."""
    paragraphs = [
        f"<paragraph_{number}>\n{strip_tags(chunk).strip()}\n</paragraph_{number}>"
        for number, chunk in enumerate(chunks, 1)
    ]
    verify = prompts["genprm_synthesis_verify"].format() if code else ""
    return prompts["genprm_synthesis"].format(
        question=question, solution="\n\n".join(paragraphs), verify=verify
    )


@dataclass(frozen=True)
class Critique:
    """The assistant's turns about the paragraphs up to the index `first_wrong`, or about all of
    them if it is -1."""

    turns: tuple[str, ...]
    first_wrong: int


def join_turns(turns: Sequence[str]) -> str:
    """Returns the text of a critique that was written turn by turn."""
    return "".join(f"### Paragraph {t}\n{turn}\n" for t, turn in enumerate(turns, 1))


def _paragraphs(text: str) -> list[str]:
    """Returns the text after each heading, or nothing if the headings do not count from 1."""
    _, *sections = _PARAGRAPH.split(text)
    in_order = [*map(int, sections[::2])] == [*range(1, len(sections) // 2 + 1)]
    return sections[1::2] if in_order else []


def parse_turns(text: str, form: GenPrmForm, num_chunks: int) -> Critique | None:
    """Reads a critique that was written turn by turn. Returns None if a turn up to the first wrong
    one has no verdict."""
    turns = [turn.removesuffix("\n") for turn in _paragraphs(text)]
    for t, turn in enumerate(turns):
        if turn.endswith(form.stop + form.lead + form.verdict(False)):
            return _covering(turns, t, num_chunks)
        if not turn.endswith(form.stop + form.lead + form.verdict(True)):
            return None
    return _covering(turns, -1, num_chunks)


def parse_critique(text: str, num_chunks: int, form: GenPrmForm = INSTRUCT) -> Critique | None:
    """Reads a critique that was written in one go, as the prompt `genprm_synthesis` asks for it.

    Returns None if it does not have that form, or if a paragraph has text outside of its tags,
    which its turn would lack. If the critique is a thought, the answer after it may repeat it, and
    give the number."""
    critique, _, answer = re.sub(r"<think>", "", text).partition("</think>")
    bodies = _paragraphs(critique)
    matches = [_SECTION.match(body) for body in bodies]
    if not (matches and matches[-1] and all(matches)):
        return None
    if any(m and body[m.end() :].strip() for m, body in zip(matches[:-1], bodies, strict=False)):
        return None
    index = last_box(bodies[-1][matches[-1].end() :] + answer)
    if index is None or not _INDEX.fullmatch(index):
        return None
    first_wrong = int(index) - (index != "-1")
    turns = []
    for t, match in enumerate(filter(None, matches)):
        analysis, verification = match.groups(default="")
        turns.append(
            whole_turn(t, analysis.strip(), verification.lstrip(), form, is_right=t != first_wrong)
        )
    return _covering(turns, first_wrong, num_chunks)


def _covering(turns: Sequence[str], first_wrong: int, num_chunks: int) -> Critique | None:
    """Returns the critique with the turns that are learned, None if there are too few."""
    covered = num_chunks if first_wrong == -1 else first_wrong + 1
    if covered > min(len(turns), num_chunks):
        return None
    return Critique(tuple(turns[:covered]), first_wrong)


def whole_turn(
    t: int, analysis: str, verification: str, form: GenPrmForm = INSTRUCT, *, is_right: bool
) -> str:
    """Returns the instruct form's turn about paragraph t. It has code if there is a
    `verification`."""
    turn = f"{form.opening.format(number=t + 1).rstrip(' ')} {analysis}{ANALYSIS_END}\n"
    if verification:
        turn += f"<verify>\n{USE_CODE}{verification.removeprefix(USE_CODE)}</verify>\n"
    return turn + form.to_verdict(turn) + form.verdict(is_right)


def critique_outcome(
    critique: Critique | None, finished: bool, example: ClassifierExample
) -> RationaleOutcome:
    """Returns the outcome of GenPRM's consensus filter: a critique is kept if it disagrees with no
    label."""
    if not finished:
        return RationaleOutcome.UNFINISHED
    if critique is None:
        return RationaleOutcome.UNPARSED
    is_kept = agrees(critique.first_wrong, example)
    return RationaleOutcome.KEPT if is_kept else RationaleOutcome.DISAGREES


def agrees(first_wrong: int, example: ClassifierExample) -> bool:
    """Returns whether the first wrong paragraph is labelled wrong and every labelled one before it
    right. If there is none (-1), all labels must be right."""
    labels = dict(zip(example.labelled, example.is_positive, strict=True))
    if first_wrong == -1:
        return all(labels.values())
    before = [right for t, right in labels.items() if t < first_wrong]
    return all(before) and labels.get(first_wrong) is False


def conversation(
    question: str, chunks: Sequence[str], turns: Sequence[str], form: GenPrmForm
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns (roles, texts) of the conversation with these turns about the first paragraphs."""
    parts = [("system", form.system)] if form.system else []
    for t, turn in enumerate(turns):
        parts.append(("user", form.user_turn(question, chunks, t)))
        parts += split_outputs(turn)
    roles, texts = zip(*parts, strict=True)
    return roles, texts

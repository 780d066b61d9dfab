"""GenPRM's form (arXiv 2504.00891): a conversation about a solution, a turn for every paragraph, in
which code that the judge writes is run before it goes on. And how a teacher's critique of a whole
solution, written in one go, becomes such a conversation.

    user        problem, paragraph 1
    assistant   <analyze> ... </analyze> <verify> ```python ... ``` [Code Output]
    output      what the code printed
    assistant   ... </verify> <output> **Judgement**: $\\boxed{Yes}$ </output>
    user        paragraph 2

Two forms: `instruct` is the paper's, `bare` that of models which were fine-tuned on nothing else,
such as the embedded task's: no tags, no code, the verdict is Positive or Negative.

Decided where the paper is silent: a conversation that is learned ends with the first wrong
paragraph, as the critique does; a critique that finds an error agrees with the labels only where
that very paragraph is labelled wrong; of labels behind it nothing is asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from stepwiser_jax.data.rationales import Outcome
from stepwiser_jax.records import ClassifierExample, Dialogue
from stepwiser_jax.tasks.mathematics import last_box
from stepwiser_jax.text.chunks import strip_tags
from stepwiser_jax.text.prompts import JudgePromptStyle, bare_judge_prompt

CODE_OUTPUT = "[Code Output]"
"""What a judge writes to have the block before it run."""

SYSTEM_PROMPT = """\
You are a teacher of mathematics. You are given a problem and its solution, one paragraph at a \
time. Review and critique the solution step by step: say of every paragraph whether it is right."""

SYNTHESIS_PROMPT = """\
You are given a mathematical problem and a solution that is split into paragraphs, tagged and \
numbered from 1. Review the solution paragraph by paragraph, in order, up to the first paragraph \
that is wrong. Write about each of them in exactly this form:

### Paragraph ID
<analyze>
[What the paragraph sets out to do, and whether its reasoning and its calculations hold.]
</analyze>{verify}

At the end, give the number of the first wrong paragraph inside \\boxed{{}}, or \\boxed{{-1}} if \
there is none.

[Math Problem]

{question}

[Solution]

{solution}"""

SYNTHESIS_VERIFY = f"""
<verify>
[Python code that could expose an error, in a ```python block, followed by a line with \
{CODE_OUTPUT}. The code is then run and you are shown what it printed. Where that contradicts your \
analysis, think again before you go on.]
</verify>"""

RETHINK_PROMPT = """\
A reviewer finds fault with this step of your solution:

{step}

The reviewer says: {analysis}

Think the problem through again, and give a whole new solution in the same form."""

SYNTHESIS_OPENING = "### Paragraph 1\n<analyze>\n"
"""What the teacher's critique begins with. The paper's stands in a thought, behind `<think>`; here
it is the answer itself, which models that do not think write too."""

USE_CODE = "Let's use python code to find any potential error:\n"

_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
_OUTPUT = re.compile(r"(?<=\[Code Output\])(\n\n```\n.*?\n```\n)", re.DOTALL)
_PARAGRAPH = re.compile(r"^### Paragraph (\d{1,6})[ \t]*\n", re.MULTILINE)
_SECTION = re.compile(
    r"\s*<analyze>(.*?)</analyze>(?:\s*<verify>(.*?)</verify>)?", re.DOTALL
)  # white space within the tags is stripped later: to match it here takes for ever
_INDEX = re.compile(r"-1|[1-9]\d{0,5}")


@dataclass(frozen=True)
class Form:
    """An assistant's turn: `opening` (of paragraph `number`), an analysis that ends when it writes
    `stop`, `lead`, then one of the `words`, right or wrong, and `ending`. `gap` stands before
    `stop`."""

    system: str
    opening: str
    stop: str
    gap: str
    lead: str
    words: tuple[str, str]
    ending: str
    style: JudgePromptStyle

    def user_turn(self, question: str, chunks: Sequence[str], t: int) -> str:
        """Paragraph t, the first one behind the problem."""
        if self.style == "bare":
            return bare_judge_prompt("" if t else question, "", chunks[t])
        text = strip_tags(chunks[t]).strip()
        return text if t else f"{question}\n{text}"

    def to_verdict(self, turn: str) -> str:
        """What a turn lacks up to where the word of its verdict stands: tags that are open are
        closed."""
        if turn.endswith(self.stop):
            return self.lead
        closed = turn
        for tag in ("analyze", "verify"):
            if f"<{tag}>" in turn and f"</{tag}>" not in turn:
                closed += f"</{tag}>\n"
        gap = "" if not closed or closed[-1].isspace() else self.gap
        return closed[len(turn) :] + gap + self.stop + self.lead

    def verdict(self, is_right: bool) -> str:
        """Word and ending."""
        return self.words[0 if is_right else 1] + self.ending


INSTRUCT = Form(
    system=SYSTEM_PROMPT,
    opening="<analyze>\nLet's analyze the Paragraph {number} step by step:",
    stop="<output>",
    gap="\n",
    lead="\n**Judgement**: $\\boxed{",
    words=("Yes", "No"),
    ending="}$\n</output>\n",
    style="instruct",
)
BARE = Form(
    system="",
    opening="",
    stop="\\boxed{",
    gap=" ",
    lead="",
    words=(" Positive", " Negative"),
    ending=" }",
    style="bare",
)
FORMS: dict[JudgePromptStyle, Form] = {"instruct": INSTRUCT, "bare": BARE}


def analysis_of(turn: str, style: JudgePromptStyle) -> str:
    """What a judge's turn says of its paragraph before any code and its verdict."""
    if style == "bare":
        return turn.partition(BARE.stop)[0].strip()
    analysis, _, _ = turn.partition(":")[2].partition("</analyze>")
    return analysis.strip()


def rethink_prompt(step: str, analysis: str, style: JudgePromptStyle) -> str:
    """What a policy is told of the first step that is wrong; bare, step and analysis alone."""
    if style == "bare":
        return f"{step} {analysis} ?"
    return RETHINK_PROMPT.format(step=strip_tags(step).strip(), analysis=analysis)


# --- code -----------------------------------------------------------------------------------------


def code_to_run(text: str) -> str | None:
    """The last block of Python, None where there is none."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else None


def with_memory(earlier: Sequence[str], code: str) -> str:
    """A program that runs `code` in the namespace that the earlier blocks leave, whose output and
    errors are dropped: a process has no memory of what ran before it."""
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
    """How a judge is shown what its code printed; it holds no fence but its own."""
    return f"\n\n```\n{output.replace('```', chr(39) * 3)}\n```\n"


def code_and_output(code: str, output: str) -> str:
    """A block that has run: what a judge says, and what it was shown."""
    return f"```python\n{code}```\n{CODE_OUTPUT}{output_text(output)}"


def split_outputs(turn: str) -> list[tuple[str, str]]:
    """An assistant's turn as (role, text): what it said, and what its code printed."""
    pieces = enumerate(_OUTPUT.split(turn))  # said, printed, said, ...
    return [("output" if i % 2 else "assistant", text) for i, text in pieces if text]


# --- critiques of whole solutions -----------------------------------------------------------------


def synthesis_prompt(question: str, chunks: Sequence[str], *, code: bool) -> str:
    """What a teacher is asked about a whole solution; of `code` only where it will be run."""
    paragraphs = [
        f"<paragraph_{number}>\n{strip_tags(chunk).strip()}\n</paragraph_{number}>"
        for number, chunk in enumerate(chunks, 1)
    ]
    verify = SYNTHESIS_VERIFY if code else ""
    return SYNTHESIS_PROMPT.format(
        question=question, solution="\n\n".join(paragraphs), verify=verify
    )


@dataclass(frozen=True)
class Critique:
    """The assistant's turns about the paragraphs up to `first_wrong`, an index, or about all of
    them: -1."""

    turns: tuple[str, ...]
    first_wrong: int


def join_turns(turns: Sequence[str]) -> str:
    """The text of a critique that was written turn by turn."""
    return "".join(f"### Paragraph {t}\n{turn}\n" for t, turn in enumerate(turns, 1))


def _paragraphs(text: str) -> list[str]:
    """What stands behind each heading, none where these do not count from 1."""
    _, *sections = _PARAGRAPH.split(text)
    in_order = [*map(int, sections[::2])] == [*range(1, len(sections) // 2 + 1)]
    return sections[1::2] if in_order else []


def parse_turns(text: str, form: Form, num_chunks: int) -> Critique | None:
    """Of a critique written turn by turn; None where a turn up to the first wrong one has no
    verdict."""
    turns = [turn.removesuffix("\n") for turn in _paragraphs(text)]
    for t, turn in enumerate(turns):
        if turn.endswith(form.stop + form.lead + form.verdict(False)):
            return _covering(turns, t, num_chunks)
        if not turn.endswith(form.stop + form.lead + form.verdict(True)):
            return None
    return _covering(turns, -1, num_chunks)


def parse_critique(text: str, num_chunks: int) -> Critique | None:
    """Of a critique written in one go, as `SYNTHESIS_PROMPT` asks for it; None where it is not of
    that form, or says of a paragraph what stands in none of its tags: a turn would lack that.
    Where it was a thought, what is said behind that may repeat it, and give the number."""
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
            whole_turn(t, analysis.strip(), verification.lstrip(), is_right=t != first_wrong)
        )
    return _covering(turns, first_wrong, num_chunks)


def _covering(turns: Sequence[str], first_wrong: int, num_chunks: int) -> Critique | None:
    """The turns that are learned; None where there are too few."""
    covered = num_chunks if first_wrong == -1 else first_wrong + 1
    if covered > min(len(turns), num_chunks):
        return None
    return Critique(tuple(turns[:covered]), first_wrong)


def whole_turn(t: int, analysis: str, verification: str, *, is_right: bool) -> str:
    """The instruct form's turn about paragraph t; without `verification` it has no code in it."""
    turn = f"{INSTRUCT.opening.format(number=t + 1)} {analysis}</analyze>\n"
    if verification:
        turn += f"<verify>\n{USE_CODE}{verification.removeprefix(USE_CODE)}</verify>\n"
    return turn + INSTRUCT.to_verdict(turn) + INSTRUCT.verdict(is_right)


def critique_outcome(
    critique: Critique | None, finished: bool, example: ClassifierExample
) -> Outcome:
    """GenPRM's consensus filter: no label of a paragraph may disagree with the critique."""
    if not finished:
        return Outcome.UNFINISHED
    if critique is None:
        return Outcome.UNPARSED
    return Outcome.KEPT if agrees(critique.first_wrong, example) else Outcome.DISAGREES


def agrees(first_wrong: int, example: ClassifierExample) -> bool:
    """Whether every labelled paragraph before the first wrong one is right and it itself is wrong;
    with none (-1), whether all that are labelled are right."""
    labels = dict(zip(example.labelled, example.is_positive, strict=True))
    if first_wrong == -1:
        return all(labels.values())
    before = [right for t, right in labels.items() if t < first_wrong]
    return all(before) and labels.get(first_wrong) is False


def dialogue_of(
    example_id: str, example: ClassifierExample, critique: Critique, form: Form
) -> Dialogue:
    """The conversation that a critique becomes."""
    roles, texts = conversation(example.question, example.chunks, critique.turns, form)
    return Dialogue(example_id, example.problem_id, roles, texts)


def conversation(
    question: str, chunks: Sequence[str], turns: Sequence[str], form: Form
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(roles, texts) of the assistant's turns about the first paragraphs."""
    parts = [("system", form.system)] if form.system else []
    for t, turn in enumerate(turns):
        parts.append(("user", form.user_turn(question, chunks, t)))
        parts += split_outputs(turn)
    roles, texts = zip(*parts, strict=True)
    return roles, texts

"""ThinkPRM (arXiv 2504.16828): one chain verifies a whole solution, or the beginning of one.

    user        problem, solution as `Step i: ...` lines
    verifier    <think>
                Let's verify step by step:
                Step 1: ... The step is \\boxed{correct}
                Step 2: ... The step is \\boxed{incorrect}     it may stop here
                </think>
                Is the solution correct? Yes | No            the score is P(Yes)

The opening is given, not sampled; so is the question, and of the answer the two probabilities are
read (`judges.thinkprm`). Where the paper's code asks the question without the </think> that its
training text has, it is asked here as it was learned. One prompt, with the format in it, is for the
model that writes chains to learn from and for the one that learned them.

`bare` is the embedded task's form: the verdicts of its judge's analyses, one chunk after another,
then `<judge>` for the question.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from stepwiser_jax.data.rationales import Outcome
from stepwiser_jax.records import ClassifierExample, Verdict
from stepwiser_jax.tasks.mathematics import BOX, last_box
from stepwiser_jax.text.chunks import strip_tags
from stepwiser_jax.text.prompts import BOXED, PromptStyle, bare_judge_prompt, boxed_word

VERIFY_PROMPT = """\
Here is a mathematical problem, and a solution of it that was proposed, step by step.

[Math Problem]

{question}

[Solution]

{steps}

Review and critique every step of the solution, and decide whether it is correct. If the solution \
is incomplete, verify only the steps that are given. Write one paragraph a step, in this format:

Step 1: [your critique of step 1] The step is \\boxed{{correct}} or \\boxed{{incorrect}}
Step 2: [your critique of step 2] The step is \\boxed{{correct}} or \\boxed{{incorrect}}

and so on. Stop after the first step that is incorrect."""


@dataclasses.dataclass(frozen=True)
class Form:
    """The words of a verification. `question` ends the chain and asks; `answers` are its Yes and
    No, `words` the boxed verdicts on a step, right and wrong. A chain ends before one of `stops`;
    `triggers` begin the second round of thought and those after it. `numbered`: verdicts stand
    under headings, `Step i:`, else they are of one step after another."""

    opening: str
    question: str
    answers: tuple[str, str]
    words: tuple[str, str]
    box: str
    stops: tuple[str, ...]
    triggers: tuple[str, str, str]
    numbered: bool

    def whole(self, chain: str, is_correct: bool) -> str:
        """All that the verifier says."""
        answer = self.answers[0] if is_correct else self.answers[1]
        return f"{self.opening}{chain}{self.question}{answer}"

    def boxed(self, verdict: Verdict) -> str:
        return self.box.format(self.words[0 if verdict is Verdict.POSITIVE else 1])

    def chain(self, critiques: Sequence[str], verdicts: Sequence[Verdict]) -> str:
        """Of the first steps, one after another."""
        said = zip(critiques, map(self.boxed, verdicts), strict=True)
        if self.numbered:
            return "\n".join(
                f"Step {i}: {critique} The step is {box}"
                for i, (critique, box) in enumerate(said, 1)
            )
        return " ".join(f"{critique} {box}" for critique, box in said)


FORMS: dict[PromptStyle, Form] = {
    "instruct": Form(
        opening="<think>\nLet's verify step by step:\n",
        question="\n</think>\nIs the solution correct? ",
        answers=("Yes", "No"),
        words=("correct", "incorrect"),
        box="\\boxed{{{}}}",
        stops=("Is the solution correct?", "</think>"),
        triggers=(
            "\nLet me double check\n",
            "\nLet's verify again\n",
            "\nDid I miss something?\n",
        ),
        numbered=True,
    ),
    "bare": Form(
        opening="",
        question=" <judge> ",
        answers=("Positive", "Negative"),
        words=("Positive", "Negative"),
        box="\\boxed{{ {} }}",
        stops=("<judge>",),
        triggers=(" fix ", " fix ", " fix "),
        numbered=False,
    ),
}


def verify_prompt(question: str, chunks: Sequence[str], style: PromptStyle) -> str:
    """What a verifier is asked; steps are numbered anew where they bring numbers along."""
    if style == "bare":
        return bare_judge_prompt(question, " ".join(chunks), "")
    texts = [re.sub(r"^Step \d+:", "", strip_tags(chunk).strip()).strip() for chunk in chunks]
    steps = "\n".join(f"Step {i}: {text}" for i, text in enumerate(texts, 1))
    return VERIFY_PROMPT.format(question=question, steps=steps)


# --- a chain, read ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StepVerdict:
    """A verdict on a step, 0-based. `text` is of its own, from the verdict before it to its box,
    which stands at `box` in the chain, a span."""

    step: int
    verdict: Verdict
    text: str
    box: tuple[int, int]


_HEADING = re.compile(r"^[^\w\n]*Step (?P<number>\d{1,6})[*_\s]*:", re.MULTILINE)
_MARK = re.compile(
    f"{_HEADING.pattern}|(?P<box>{BOXED.pattern})|(?P<begun>{BOX.pattern})", re.MULTILINE
)


def step_verdicts(chain: str, form: Form) -> list[StepVerdict]:
    """As they were written; under one heading there may be several. Boxes that hold no verdict do
    not count; a verdict before the first heading is of no step, -1. Where the last box is
    unfinished, what was said of its step before is given up."""
    verdict_of = dict(
        zip(map(str.lower, form.words), (Verdict.POSITIVE, Verdict.NEGATIVE), strict=True)
    )
    found: list[StepVerdict] = []
    step, start = -1 if form.numbered else 0, 0
    begun = None
    for mark in _MARK.finditer(chain):
        if mark["number"] is not None:
            step = int(mark["number"]) - 1 if form.numbered else step
        elif mark["box"] is None:
            begun = step
        elif verdict := verdict_of.get(boxed_word(mark["box"])):
            found.append(StepVerdict(step, verdict, chain[start : mark.end()], mark.span()))
            start = mark.end()
            step += not form.numbered
    if begun is not None and last_box(chain) is None:
        return [v for v in found if v.step != begun]
    return found


def cut_chain(text: str, form: Form, num_steps: int) -> str:
    """What was sampled, up to where a chain ends: before the question, or the verification of a
    step that there is not."""
    ends = [text.find(stop) for stop in form.stops]
    if form.numbered:
        beyond = (h.start() for h in _HEADING.finditer(text) if int(h["number"]) > num_steps)
        ends.append(next(beyond, -1))
    return text[: min((end for end in ends if end >= 0), default=len(text))].strip()


def verdicts_of(rounds: Sequence[str], form: Form, num_steps: int) -> list[Verdict]:
    """Of every step, by the last word that was said about it. Steps behind the first incorrect one
    of which nothing was said follow an incorrect step and are Negative, as in the paper's code;
    other steps without a verdict are Unparsed."""
    said = {v.step: v.verdict for chain in rounds for v in step_verdicts(chain, form)}
    verdicts, unsaid = [], Verdict.UNPARSED
    for step in range(num_steps):
        verdicts.append(said.get(step, unsaid))
        if verdicts[-1] is Verdict.NEGATIVE:
            unsaid = Verdict.NEGATIVE
    return verdicts


# --- chains to learn from -----------------------------------------------------------------------


def to_verify(example: ClassifierExample) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """(chunks, labels up to and including the first wrong one) of a labelled solution. Without a
    wrong one it is a prefix that ends where the labels do. Steps before a labelled one that have no
    label of their own are right: a source labels what its solutions share once."""
    wrong = [t for t, good in zip(example.labelled, example.is_positive, strict=True) if not good]
    if wrong:
        return example.chunks, (True,) * wrong[0] + (False,)
    end = example.labelled[-1] + 1
    return example.chunks[:end], (True,) * end


def chain_outcome(
    chain: str, finished: bool, labels: Sequence[bool], num_steps: int, form: Form
) -> Outcome:
    """Of a chain about `num_steps` steps, labelled up to the first wrong one: it has to give one
    verdict on every step, or on those with labels and no other, and agree with the labels."""
    written = step_verdicts(chain, form)
    if [v.step for v in written] == list(range(len(written))):
        said = [v.verdict is Verdict.POSITIVE for v in written]
        both = min(len(said), len(labels))
        if said[:both] != list(labels[:both]):
            return Outcome.DISAGREES
        if len(said) in (len(labels), num_steps):
            return Outcome.KEPT
    return Outcome.UNPARSED if finished else Outcome.UNFINISHED


def cleaned(chain: str, form: Form) -> str:
    """Up to the last verdict, with all verdicts spelled alike."""
    clean, start = "", 0
    for v in step_verdicts(chain, form):
        clean += chain[start : v.box[0]] + form.boxed(v.verdict)
        start = v.box[1]
    return clean

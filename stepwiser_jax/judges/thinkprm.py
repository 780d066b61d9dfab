"""ThinkPRM (arXiv 2504.16828): one chain of thought verifies a whole solution, or a prefix of one.

    user        problem, solution as `Step i: ...` lines
    verifier    <think>
                Let's verify step by step:
                Step 1: ... The step is \\boxed{correct}
                Step 2: ... The step is \\boxed{incorrect}     it may stop here
                </think>
                Is the solution correct? Yes | No            the score is P(Yes)

The opening and the question are given, not sampled. The rest of the chain may have several rounds;
a trigger begins each after the first. P(Yes) is read from the probabilities of the two answers. The
paper's code leaves out the </think> before the question, which its training text has, and compares
yes and no in lower case. Here the question is asked as it was learned, unless a user's prompts say
otherwise. Teachers and judges share one prompt, which holds the format.

A chain gives a verdict on every step, and the score of the whole. Search and selection need a
process reward, so there each prefix has a chain and its score (`ThinkPrmVerifier.__call__`).

`bare` is the form of the embedded task: an analysis and a verdict for one chunk after another, then
`<judge>` in place of the question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from stepwiser_jax.data.rationales import RationaleOutcome
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.verdicts import verdict_at
from stepwiser_jax.inference.params import SamplingParams, probabilities
from stepwiser_jax.inference.prefix_cache import PrefixCache
from stepwiser_jax.judges.base import ChunkJudgment, Solution, SolutionJudgment
from stepwiser_jax.judges.writer import Writer, sample_votes
from stepwiser_jax.model.flops import NOTHING, Spent
from stepwiser_jax.records import ClassifierExample, Verdict
from stepwiser_jax.tasks.mathematics import BOX, last_box
from stepwiser_jax.text.chunks import strip_tags
from stepwiser_jax.text.prompts import (
    BOXED,
    JudgePromptStyle,
    bare_judge_prompt,
    boxed_word,
    encode_message,
)
from stepwiser_jax.text.templates import OURS, Prompts, fields_of
from stepwiser_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ThinkPrmForm:
    """The words of a verification.

    Attributes:
        opening: The beginning, which is given.
        question: Ends the chain; one of the `answers`, Yes or No, follows.
        words: The boxed verdicts on a step, right and wrong.
        box: The format of a boxed verdict.
        stops: A chain ends before one of these.
        triggers: Begin the second round of thought and those after it.
        numbered: Whether verdicts stand under headings, `Step i:`. If not, the first is about the
            first step, and so on.
    """

    opening: str
    question: str
    answers: tuple[str, str]
    words: tuple[str, str]
    box: str
    stops: tuple[str, ...]
    triggers: tuple[str, str, str]
    numbered: bool

    def whole(self, chain: str, is_correct: bool) -> str:
        """Returns the verifier's whole text."""
        answer = self.answers[0] if is_correct else self.answers[1]
        return f"{self.opening}{chain}{self.question}{answer}"

    def boxed(self, verdict: Verdict) -> str:
        return self.box.format(self.words[0 if verdict is Verdict.POSITIVE else 1])

    def chain(self, critiques: Sequence[str], verdicts: Sequence[Verdict]) -> str:
        """Returns a chain about the first steps."""
        parts = zip(critiques, map(self.boxed, verdicts), strict=True)
        if self.numbered:
            return "\n".join(
                f"Step {i}: {critique} The step is {box}"
                for i, (critique, box) in enumerate(parts, 1)
            )
        return " ".join(f"{critique} {box}" for critique, box in parts)


BARE = ThinkPrmForm(
    opening="",
    question=" <judge> ",
    answers=("Positive", "Negative"),
    words=("Positive", "Negative"),
    box="\\boxed{{ {} }}",
    stops=("<judge>",),
    triggers=(" fix ", " fix ", " fix "),
    numbered=False,
)


def form_of(style: JudgePromptStyle, prompts: Prompts) -> ThinkPrmForm:
    """Returns the form of a style, with the texts of these prompts. Raises UserError if there is no
    question."""
    if style == "bare":
        return BARE
    texts = {name: text.format() for name, text in prompts.items() if not fields_of(text)}
    question = texts["thinkprm_question"]
    if not question.strip():
        raise UserError("expected a question in the prompt thinkprm_question, found no word")
    return ThinkPrmForm(
        opening=texts["thinkprm_opening"],
        question=question,
        answers=(texts["thinkprm_yes"], texts["thinkprm_no"]),
        words=("correct", "incorrect"),
        box="\\boxed{{{}}}",
        stops=(question.strip().splitlines()[-1], "</think>"),
        triggers=(
            texts["thinkprm_round_2"],
            texts["thinkprm_round_3"],
            texts["thinkprm_round_4"],
        ),
        numbered=True,
    )


FORMS: dict[JudgePromptStyle, ThinkPrmForm] = {"instruct": form_of("instruct", OURS), "bare": BARE}


def verify_prompt(
    question: str, chunks: Sequence[str], style: JudgePromptStyle, prompts: Prompts = OURS
) -> str:
    """Returns the user's message. Steps that have numbers already are numbered anew."""
    if style == "bare":
        return bare_judge_prompt(question, " ".join(chunks), "")
    texts = [re.sub(r"^Step \d+:", "", strip_tags(chunk).strip()).strip() for chunk in chunks]
    step = prompts["thinkprm_step"]
    steps = "\n".join(step.format(number=i, step=text) for i, text in enumerate(texts, 1))
    return prompts["thinkprm_verify"].format(question=question, steps=steps)


# --- reading a chain ----------------------------------------------------------------------------


@dataclass(frozen=True)
class StepVerdict:
    """A verdict on a step (0-based). `text` reaches from the end of the verdict before it to the
    end of its box; `box` is the span of that box in the chain."""

    step: int
    verdict: Verdict
    text: str
    box: tuple[int, int]


_HEADING = re.compile(r"^[^\w\n]*Step (?P<number>\d{1,6})[*_\s]*:", re.MULTILINE)
_MARK = re.compile(
    f"{_HEADING.pattern}|(?P<box>{BOXED.pattern})|(?P<begun>{BOX.pattern})", re.MULTILINE
)


def step_verdicts(chain: str, form: ThinkPrmForm) -> list[StepVerdict]:
    """Returns the verdicts in the order of the text; one heading may have several.

    Boxes without a verdict do not count. A verdict before the first heading has step -1. If the
    last box is unfinished, its step loses its earlier verdicts.
    """
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


def cut_chain(text: str, form: ThinkPrmForm, num_steps: int) -> str:
    """Returns sampled text up to the end of the chain: before the question, or before a step that
    the solution does not have."""
    ends = [text.find(stop) for stop in form.stops]
    if form.numbered:
        beyond = (h.start() for h in _HEADING.finditer(text) if int(h["number"]) > num_steps)
        ends.append(next(beyond, -1))
    return text[: min((end for end in ends if end >= 0), default=len(text))].strip()


def verdicts_of(rounds: Sequence[str], form: ThinkPrmForm, num_steps: int) -> list[Verdict]:
    """Returns the last verdict on every step. A step without a verdict is Negative if an earlier
    step is, since it builds on that one (as in the paper's code); otherwise it is Unparsed."""
    found = {v.step: v.verdict for chain in rounds for v in step_verdicts(chain, form)}
    verdicts, missing = [], Verdict.UNPARSED
    for step in range(num_steps):
        verdicts.append(found.get(step, missing))
        if verdicts[-1] is Verdict.NEGATIVE:
            missing = Verdict.NEGATIVE
    return verdicts


# --- the judge ----------------------------------------------------------------------------------


@dataclass
class Chain:
    """A verification that is being written. `text` has its `rounds` of thought, with the triggers
    between them, and `spent` is what they cost. `known_ids` are what was read before the next
    round. `name` decides its noise."""

    name: str
    prompt_ids: list[int]
    known_ids: list[int]
    num_steps: int
    rounds: list[str] = field(default_factory=list)
    text: str = ""
    spent: Spent = NOTHING


class ThinkPrmVerifier:
    """A judge that verifies whole solutions, in `rounds` of thought. The prompts about the prefixes
    of a solution share what is read; the score reads prompt and chain anew."""

    def __init__(self, writer: Writer, *, rounds: int):
        """Raises UserError unless the two answers are one token each."""
        self.writer, self.rounds, self.judge_id = writer, rounds, writer.loaded.model_id
        self.compiled_shapes, self.measured = writer.engine.compiled_shapes, writer.measured
        self.form = form_of(writer.prompt_style, writer.tokenizer.prompts)
        self.answer_ids = answer_ids(writer.tokenizer, self.form)

    def prompt_ids(self, solution: Solution) -> list[int]:
        """Returns the prompt about a solution, without the opening of the answer."""
        style = self.writer.prompt_style
        tokenizer = self.writer.tokenizer
        text = verify_prompt(solution.question, solution.chunks, style, tokenizer.prompts)
        return encode_message(tokenizer, text, style, answer=self.form.opening)

    def known_ids(self, solution: Solution) -> list[int]:
        """Returns the prompt that was read before: that about the chunks before `start`."""
        if not solution.start and not solution.is_begun:
            return []
        return self.prompt_ids(replace(solution, chunks=solution.chunks[: solution.start]))

    def check_room(self, problem_id: str, question: str, num_tokens: int) -> None:
        """Raises UserError if the context may not hold a verification of a solution of this length.
        The headings of its steps are not counted."""
        empty = self.prompt_ids(Solution(problem_id, question, [""]))
        self.writer.check_room(empty, problem_id, num_tokens, self._room(self.rounds))

    def check_lengths(self, solutions: Sequence[Solution]) -> None:
        """Raises UserError if the context does not hold a verification of each solution."""
        room = self._room(self.rounds)
        for solution in solutions:
            self.writer.check_length(self.prompt_ids(solution), solution.solution_id, room)

    def __call__(self, solutions: Sequence[Solution]) -> list[list[ChunkJudgment]]:
        """Returns, for every chunk, the judgment of the prefix that ends with it: the greedy one,
        or the result of all votes."""
        self.writer.cache_for(solutions)  # prefixes do not say whether a solution begins
        prefixes = [
            replace(x, solution_id=f"{x.solution_id}/{j}", chunks=x.chunks[: j + 1], start=j)
            for x in solutions
            for j in range(x.start, len(x.chunks))
        ]
        votes = iter(sample_votes(self, self.writer, prefixes))
        return [
            [
                ChunkJudgment.of_votes([vote.whole for vote in next(votes) if vote.whole])
                for _ in x.chunks[x.start :]
            ]
            for x in solutions
        ]

    def sample(
        self, solutions: Sequence[Solution], suffixes: Sequence[str], **sampling: Any
    ) -> list[list[SolutionJudgment]]:
        """Returns one chain about each solution for each suffix, see `Judge`."""
        cache = self.writer.cache_for(solutions)
        params = replace(self.writer.params(**sampling), stop_strings=self.form.stops)
        groups = [
            [
                Chain(x.solution_id + s, self.prompt_ids(x), self.known_ids(x), len(x.chunks))
                for s in suffixes
            ]
            for x in solutions
        ]
        # In the first round the chains about a solution begin alike, so they share a prompt.
        self._think([x.solution_id for x in solutions], groups, suffixes, params, cache)
        chains = [chain for group in groups for chain in group]
        for r in range(1, self.rounds):
            for chain in chains:
                chain.text += self.form.triggers[r - 1]
            names = [chain.name for chain in chains]
            self._think(names, [[chain] for chain in chains], [f"/round{r}"], params, cache)
        wholes = iter(self._judge_solutions(chains))
        return [
            [SolutionJudgment(self._judge_steps(chain), next(wholes)) for chain in group]
            for group in groups
        ]

    def _think(
        self,
        names: Sequence[str],
        groups: Sequence[Sequence[Chain]],
        suffixes: Sequence[str],
        params: SamplingParams,
        cache: PrefixCache,
    ) -> None:
        """Samples one more round of every chain. The chains of a group have the same text so far;
        there is one for each suffix."""
        prompts = [
            chain.prompt_ids + self._encode(self.form.opening + chain.text, len(chain.rounds))
            for chain, *_ in groups
        ]
        known = [chain.known_ids for chain, *_ in groups]
        written = self.writer.write(names, prompts, suffixes, params, cache, known)
        for prompt, group, of_group in zip(prompts, groups, written, strict=True):
            for chain, (text, completion) in zip(group, of_group, strict=True):
                chain.known_ids = prompt
                chain.rounds.append(cut_chain(text, self.form, chain.num_steps))
                chain.text += chain.rounds[-1]
                chain.spent += completion.spent

    def _encode(self, text: str, rounds: int, tail: int = 0) -> list[int]:
        """Encodes the verifier's text. Sampled text that is encoded again hardly ever has more
        tokens than before. If it has, the excess is cut out before the last `tail` tokens."""
        ids = self.writer.tokenizer.encode(text)
        excess = max(0, len(ids) - self._room(rounds))
        return ids[: len(ids) - tail - excess] + ids[len(ids) - tail :]

    def _room(self, rounds: int) -> int:
        """Returns the largest number of tokens that a verification of these rounds has."""
        texts = [self.form.whole("", True), *self.form.triggers[:rounds]]
        given = sum(len(self.writer.tokenizer.encode(text)) for text in texts)
        return given + rounds * self.writer.max_new_tokens

    def _judge_solutions(self, chains: Sequence[Chain]) -> list[ChunkJudgment]:
        """Returns the judgments of the whole: the likelier answer, and P(Yes)."""
        whole = self.form.whole
        tail = len(self.writer.tokenizer.encode(self.form.question + self.form.answers[0]))
        prompts = [
            chain.prompt_ids + self._encode(whole(chain.text, True), self.rounds, tail)[:-1]
            for chain in chains
        ]
        p_correct = probabilities(self.writer.engine.log_odds(prompts, self.answer_ids))
        judgments = []
        for chain, prompt, p in zip(chains, prompts, p_correct, strict=True):
            spent = chain.spent + self.writer.engine.spent_on(read=len(prompt))
            text, verdict = whole(chain.text, p >= 0.5), verdict_at(0.5, p)
            judgments.append(ChunkJudgment(text, verdict, p, *astuple(spent)))
        return judgments

    def _judge_steps(self, chain: Chain) -> list[ChunkJudgment]:
        """Returns the last verdict on every step, with its text."""
        written = {v.step: v.text for text in chain.rounds for v in step_verdicts(text, self.form)}
        judgments = []
        for step, verdict in enumerate(verdicts_of(chain.rounds, self.form, chain.num_steps)):
            text = written.get(step, "")
            num_tokens = len(self.writer.tokenizer.encode(text))
            judgments.append(ChunkJudgment.of_verdict(text, verdict, num_tokens))
        return judgments


def answer_ids(tokenizer: Tokenizer, form: ThinkPrmForm) -> tuple[int, int]:
    """Returns the tokens of yes and no after the question. Raises UserError unless the two texts
    differ in their last token alone."""
    yes, no = (tokenizer.encode(form.whole("", is_correct)) for is_correct in (True, False))
    if yes[:-1] != no[:-1] or yes[-1] == no[-1]:
        raise UserError(
            f"a verification ends with one token, {form.answers[0]!r} or {form.answers[1]!r}: "
            f"expected a vocabulary that has both, found them encoded as {yes} and {no}, after "
            "the question. Use another model"
        )
    return yes[-1], no[-1]


# --- chains to learn from -----------------------------------------------------------------------


def to_verify(example: ClassifierExample) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """Returns the chunks to verify, and labels up to and including the first wrong one.

    Without a wrong chunk, the chunks end where the labels do. An unlabelled chunk before a labelled
    one counts as right: a source labels chunks that its solutions share only once.
    """
    wrong = [t for t, good in zip(example.labelled, example.is_positive, strict=True) if not good]
    if wrong:
        return example.chunks, (True,) * wrong[0] + (False,)
    end = example.labelled[-1] + 1
    return example.chunks[:end], (True,) * end


def chain_outcome(
    chain: str, finished: bool, labels: Sequence[bool], num_steps: int, form: ThinkPrmForm
) -> RationaleOutcome:
    """Returns what becomes of a chain about `num_steps` steps, which are labelled up to the first
    wrong one. It is kept if it gives one verdict on every step, or on exactly the labelled ones,
    and agrees with the labels."""
    written = step_verdicts(chain, form)
    if [v.step for v in written] == list(range(len(written))):
        found = [v.verdict is Verdict.POSITIVE for v in written]
        both = min(len(found), len(labels))
        if found[:both] != list(labels[:both]):
            return RationaleOutcome.DISAGREES
        if len(found) in (len(labels), num_steps):
            return RationaleOutcome.KEPT
    return RationaleOutcome.UNPARSED if finished else RationaleOutcome.UNFINISHED


def clean_chain(chain: str, form: ThinkPrmForm) -> str:
    """Returns the chain up to its last verdict, with all verdicts spelled alike."""
    clean, start = "", 0
    for v in step_verdicts(chain, form):
        clean += chain[start : v.box[0]] + form.boxed(v.verdict)
        start = v.box[1]
    return clean

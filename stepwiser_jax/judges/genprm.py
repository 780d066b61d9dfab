"""GenPRM's judge (arXiv 2504.00891): a conversation about a solution, a turn for every step, with
code that it writes run on the way.

    solutions x paths -> turn t of all of them at once:
        write -> [Code Output] -> run, feed back -> write on -> ... -> <output> -> P(Yes), P(No)

    p = P(Yes) / (P(Yes) + P(No)) where the verdict's word stands; the likelier one is written

Each path keeps its own history of rationales (paper eqs 6-7). A turn is written to where its
verdict stands, whatever it ended with: one that was cut at `max_new_tokens`, or asks for code once
more than it may, has its tags closed. A conversation that the context does not hold has no verdict
in its remaining turns: p = 1/2.

Code runs in fresh processes, which remember nothing: the blocks that a path ran before are run
again, unseen, except those that were stopped, and draw the same random numbers as before (not with
numpy's `default_rng`). All of them share one call's `code_seconds`; a
block that ended its process at once, by `os._exit`, does so again, and what follows it prints
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import jax

from stepwiser_jax.config import GenPrm
from stepwiser_jax.distributed.loading import Loaded
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.verdicts import verdict_at
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams, StopReason, probabilities
from stepwiser_jax.inference.scheduler import Prefix, SampleRequest
from stepwiser_jax.judges.genprm_form import (
    CODE_OUTPUT,
    FORMS,
    SYNTHESIS_OPENING,
    Form,
    code_to_run,
    join_turns,
    output_text,
    synthesis_prompt,
    with_memory,
)
from stepwiser_jax.judges.stepwiser import ChunkJudgment, Solution
from stepwiser_jax.records import Verdict
from stepwiser_jax.runs.directory import worker_count
from stepwiser_jax.sandbox.runner import Limits, Sandbox
from stepwiser_jax.text.prompts import JudgePromptStyle, encode_dialogue
from stepwiser_jax.text.tokenizer import Tokenizer, completion_text


@dataclass
class Draft:
    """A conversation that is being written. Its turn's draws are named `<name>/<round><suffix>`.

    `rounds` times a turn may run code; `codes` are the blocks that ran. Of the turn that is being
    written, `turn_start` is the index of its first text, `num_tokens` what was sampled, and `why`
    it ended.
    """

    name: str
    suffix: str
    rounds: int = 0
    roles: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)
    turn_start: int = 0
    num_tokens: int = 0
    why: StopReason = StopReason.LENGTH

    def say(self, role: str, text: str) -> None:
        """What one role says twice in a row is one text."""
        if self.roles and self.roles[-1] == role:
            self.texts[-1] += text
        elif text:
            self.roles.append(role)
            self.texts.append(text)

    def begin_turn(self, opening: str) -> None:
        self.turn_start, self.num_tokens = len(self.texts), 0
        self.say("assistant", opening)

    @property
    def turn(self) -> str:
        return "".join(self.texts[self.turn_start :])

    @property
    def asks_for_code(self) -> bool:
        return self.why is StopReason.STOP_STRING and self.texts[-1].endswith(CODE_OUTPUT)

    @property
    def is_finished(self) -> bool:
        """Whether the turn came to its own end: it was not cut, and asks for nothing more."""
        return self.why is not StopReason.LENGTH and not self.asks_for_code


class Writer:
    """Writes turns of many conversations at once; what code they ask for is run in between, where
    there is a `sandbox`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        engine: Engine,
        *,
        prompt_style: JudgePromptStyle,
        key: jax.Array,
        sandbox: Sandbox | None = None,
    ):
        self.tokenizer, self.engine, self.key = tokenizer, engine, key
        self.prompt_style: JudgePromptStyle = prompt_style
        self.sandbox, self.code_runs = sandbox, 0

    def encode(self, draft: Draft) -> list[int]:
        return encode_dialogue(self.tokenizer, draft.roles, draft.texts, self.prompt_style)[0]

    def write(
        self,
        drafts: Sequence[Draft],
        params: SamplingParams,
        *,
        stops: Sequence[str],
        reserve: int,
    ) -> None:
        """Go on with the turn of every draft until it says one of `stops`, ends, has
        `max_new_tokens`, fills the context but for `reserve` tokens, or asks for code once more
        than it may."""
        request = [CODE_OUTPUT] if self.sandbox is not None else []
        params = replace(params, stop_strings=(*request, *stops))
        number = 0
        while drafts:
            self._write_on(drafts, params, number, reserve)
            drafts = [d for d in drafts if d.asks_for_code and number < d.rounds]
            self._run_code(drafts)
            number += 1

    def _write_on(
        self,
        drafts: Sequence[Draft],
        params: SamplingParams,
        number: int,
        reserve: int,
    ) -> None:
        """Up to the next stop, where there is room. Equal prompts are read once."""
        of_row: dict[str, Draft] = {}
        forks: dict[tuple[int, ...], list[SampleRequest]] = {}
        for draft in drafts:
            ids = self.encode(draft)
            left = self.engine.shapes.max_length - len(ids) - reserve
            room = min(params.max_new_tokens - draft.num_tokens, left)
            draft.why = StopReason.LENGTH
            if room >= 1:
                row_id = f"{draft.name}/{number}{draft.suffix}"
                of_row[row_id] = draft
                forks.setdefault(tuple(ids), []).append(SampleRequest(row_id, len(ids), room))
        trunks = [Prefix(ids, rows) for ids, rows in forks.items()]
        for completions in self.engine.sample(trunks, params, key=self.key):
            for completion in completions:
                draft = of_row[completion.row_id]
                text = completion_text(self.tokenizer, completion.ids)
                if completion.stop_reason is StopReason.STOP_STRING:
                    # The last token may hold what comes after the stop string.
                    text = text[: first_end(text, params.stop_strings)]
                draft.say("assistant", text)
                draft.num_tokens += len(completion.ids)
                draft.why = completion.stop_reason

    def _run_code(self, drafts: Sequence[Draft]) -> None:
        """The last block of every draft, and what it printed."""
        if self.sandbox is None or not drafts:
            return
        blocks = [code_to_run(draft.texts[-1]) or "" for draft in drafts]
        programs = [with_memory(d.codes, code) for d, code in zip(drafts, blocks, strict=True)]
        done = self.sandbox.run(programs)
        self.code_runs += len(programs)
        for draft, code, execution in zip(drafts, blocks, done, strict=True):
            draft.say("output", output_text(execution.output))
            if execution.failure in (None, "error"):
                draft.codes.append(code)

    @property
    def measured(self) -> dict[str, Any]:
        """Of this process so far: programs, and by kind those that failed."""
        failures = {} if self.sandbox is None else dict(self.sandbox.failures)
        return {"code_runs": self.code_runs, "code_failures": failures}


def first_end(text: str, stops: Sequence[str]) -> int:
    """Where the first stop string in a text ends."""
    return min(text.index(stop) + len(stop) for stop in stops if stop in text)


def sandbox_of(genprm: GenPrm) -> Sandbox | None:
    """Raises UserError where this machine cannot confine code that is to be run."""
    if not genprm.code:
        return None
    limits = Limits(
        seconds=genprm.code_seconds,
        memory_bytes=genprm.code_memory_bytes,
        output_bytes=genprm.code_output_bytes,
    )
    return Sandbox(limits, worker_count())


class GenPrmJudge:
    """Opinions of the steps of solutions, as `judges.stepwiser` has them. `max_new_tokens` bounds
    what is written about one step."""

    def __init__(
        self,
        loaded: Loaded,
        engine: Engine,
        *,
        name: str,
        genprm: GenPrm,
        prompt_style: JudgePromptStyle,
        max_new_tokens: int,
        key: jax.Array,
    ):
        """Raises UserError where a verdict is no token of its own, or as `sandbox_of` does."""
        self.loaded, self.engine, self.name = loaded, engine, name
        self.genprm, self.max_new_tokens = genprm, max_new_tokens
        self.form = FORMS[prompt_style]
        self.word_ids = verdict_ids(loaded.tokenizer, self.form)
        self.writer = Writer(
            loaded.tokenizer,
            engine,
            prompt_style=prompt_style,
            key=key,
            sandbox=sandbox_of(genprm),
        )
        longest = self.form.to_verdict("<analyze><verify>") + self.form.verdict(True)
        self.reserve = len(loaded.tokenizer.encode(longest)) + 4

    def check_lengths(self, solutions: Sequence[Solution]) -> None:
        """Raises UserError where the context holds the first turn of none of them."""
        context = self.engine.shapes.max_length
        drafts = [self._begin("") for _ in solutions]
        for draft, solution in zip(drafts, solutions, strict=True):
            self._ask(draft, solution, 0)
        needed = min(len(self.writer.encode(draft)) for draft in drafts) + self.reserve + 1
        if needed > context:
            raise UserError(
                f"no solution's first step fits the context of {context} tokens (the largest of "
                f"engine.buckets): the shortest needs {needed}; raise it"
            )

    def _begin(self, suffix: str) -> Draft:
        draft = Draft("", suffix, self.genprm.max_code_rounds)
        draft.say("system", self.form.system)
        return draft

    def _ask(self, draft: Draft, solution: Solution, t: int) -> None:
        draft.name = f"{self.name}/{solution.solution_id}/{t}"
        draft.say("user", self.form.user_turn(solution.question, solution.chunks, t))
        draft.begin_turn(self.form.opening.format(number=t + 1))

    def __call__(self, solutions: Sequence[Solution]) -> list[list[ChunkJudgment]]:
        """The greedy path's opinion of every chunk."""
        return [opinions for (opinions,) in self.sample(solutions, 0.0, ("",))]

    def sample(
        self,
        solutions: Sequence[Solution],
        temperature: float,
        suffixes: Sequence[str],
        *,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> list[list[list[ChunkJudgment]]]:
        """Of every solution, for each of `suffixes`: one path through all its chunks. A path begins
        with the first chunk, also where opinions are wanted from a later one on."""
        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.loaded.tokenizer.eos_ids,
        )
        found = self._converse(solutions, params, suffixes)
        return [
            [[opinion for opinion, _ in path[x.start :]] for path in paths]
            for x, paths in zip(solutions, found, strict=True)
        ]

    def critiques(
        self, solutions: Sequence[Solution], params: SamplingParams, suffixes: Sequence[str]
    ) -> list[list[tuple[str, bool]]]:
        """Of every solution, for each of `suffixes`: (the turns of a path up to the first that does
        not say right, joined; whether each of them came to its end), as `Synthesizer` gives
        them."""
        found = self._converse(solutions, params, suffixes, to_first_no=True)
        return [[_critique(path) for path in paths] for paths in found]

    def _converse(
        self,
        solutions: Sequence[Solution],
        params: SamplingParams,
        suffixes: Sequence[str],
        *,
        to_first_no: bool = False,
    ) -> list[list[list[tuple[ChunkJudgment, bool]]]]:
        """Of every solution, for each of `suffixes`, of every chunk: the opinion, and whether its
        turn came to its end. `to_first_no`: a path ends with the first that does not say right."""
        paths = [[self._begin(suffix) for suffix in suffixes] for _ in solutions]
        found: list[list[list[tuple[ChunkJudgment, bool]]]] = [
            [[] for _ in suffixes] for _ in solutions
        ]
        for t in range(max((len(x.chunks) for x in solutions), default=0)):
            at = [
                (s, k)
                for s, x in enumerate(solutions)
                for k in range(len(suffixes))
                if t < len(x.chunks) and not (to_first_no and _ends_with_no(found[s][k]))
            ]
            for s, k in at:
                self._ask(paths[s][k], solutions[s], t)
            said = self._judge([paths[s][k] for s, k in at], params)
            for (s, k), opinion_and_end in zip(at, said, strict=True):
                found[s][k].append(opinion_and_end)
        return found

    def _judge(
        self, drafts: Sequence[Draft], params: SamplingParams
    ) -> list[tuple[ChunkJudgment, bool]]:
        """The turn that every draft has begun, up to its verdict, and whether it came to its end
        before anything was closed for it."""
        self.writer.write(drafts, params, stops=[self.form.stop], reserve=self.reserve)
        finished = [draft.is_finished for draft in drafts]
        prompts: dict[int, list[int]] = {}
        for i, draft in enumerate(drafts):
            if draft.num_tokens:  # else there was no room
                draft.say("assistant", self.form.to_verdict(draft.turn))
                ids = self.writer.encode(draft)
                if len(ids) < self.engine.shapes.max_length:
                    prompts[i] = ids
        log_odds = self.engine.log_odds(list(prompts.values()), self.word_ids)
        p_right = dict(zip(prompts, probabilities(log_odds), strict=True))
        opinions = [self._opinion(draft, p_right.get(i)) for i, draft in enumerate(drafts)]
        return list(zip(opinions, finished, strict=True))

    def _opinion(self, draft: Draft, p_right: float | None) -> ChunkJudgment:
        if p_right is None:
            return ChunkJudgment(draft.turn, Verdict.UNPARSED, 0.5, draft.num_tokens)
        verdict = verdict_at(0.5, p_right)
        draft.say("assistant", self.form.verdict(verdict is Verdict.POSITIVE))
        return ChunkJudgment(draft.turn, verdict, p_right, draft.num_tokens)


def _ends_with_no(path: Sequence[tuple[ChunkJudgment, bool]]) -> bool:
    return bool(path) and path[-1][0].verdict is not Verdict.POSITIVE


def _critique(path: Sequence[tuple[ChunkJudgment, bool]]) -> tuple[str, bool]:
    return join_turns([opinion.completion for opinion, _ in path]), all(end for _, end in path)


def verdict_ids(tokenizer: Tokenizer, form: Form) -> tuple[int, int]:
    """The tokens of a verdict's two words. Raises UserError where they are not one token each."""
    before = form.stop + form.lead
    ids = tokenizer.encode(before)
    found = [tokenizer.encode(before + word) for word in form.words]
    if any(f[:-1] != ids for f in found) or found[0] == found[1]:
        raise UserError(
            f"a verdict is one token, {form.words[0].strip()} or {form.words[1].strip()}: expected "
            f"a vocabulary that has both, found {[f[len(ids) :] for f in found]} behind "
            f"{before!r}. Use another model"
        )
    return found[0][-1], found[1][-1]


# --- critiques of whole solutions -----------------------------------------------------------------


class Synthesizer:
    """A teacher that writes the critique of a whole solution in one go."""

    def __init__(
        self,
        loaded: Loaded,
        engine: Engine,
        *,
        name: str,
        genprm: GenPrm,
        max_new_tokens: int,
        key: jax.Array,
    ):
        """Raises UserError as `sandbox_of` does."""
        self.name, self.genprm, self.max_new_tokens = name, genprm, max_new_tokens
        self.writer = Writer(
            loaded.tokenizer,
            engine,
            prompt_style="instruct",
            key=key,
            sandbox=sandbox_of(genprm),
        )

    def _begin(self, solution: Solution, suffix: str) -> Draft:
        rounds = self.genprm.max_code_rounds * len(solution.chunks)
        draft = Draft(f"{self.name}/{solution.solution_id}", suffix, rounds)
        draft.say(
            "user", synthesis_prompt(solution.question, solution.chunks, code=self.genprm.code)
        )
        draft.begin_turn(SYNTHESIS_OPENING)
        return draft

    def check_lengths(self, solutions: Sequence[Solution]) -> None:
        """Raises UserError where the context does not hold a critique."""
        for solution in solutions:
            prompt = self.writer.encode(self._begin(solution, ""))
            self.writer.engine.check_length(len(prompt), self.max_new_tokens, solution.solution_id)

    def critiques(
        self, solutions: Sequence[Solution], params: SamplingParams, suffixes: Sequence[str]
    ) -> list[list[tuple[str, bool]]]:
        """Of every solution, for each of `suffixes`: (critique, whether it came to its end)."""
        drafts = [[self._begin(x, suffix) for suffix in suffixes] for x in solutions]
        self.writer.write(list(chain.from_iterable(drafts)), params, stops=[], reserve=0)
        return [
            [(draft.turn, draft.why is StopReason.STOP_ID) for draft in of_solution]
            for of_solution in drafts
        ]

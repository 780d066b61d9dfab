"""GenPRM's judge: one conversation about a solution, with a turn for every step.

    solutions x paths -> turn t of all conversations at once:
        write -> [Code Output] -> run the code, show its output -> write on -> ... -> <output>
              -> P(Yes), P(No) at the verdict's word

P(right) is P(Yes) / (P(Yes) + P(No)), and the likelier word is written. Each path keeps its own
history of rationales (paper eqs 6-7). If a turn is cut at `max_new_tokens`, or asks for code more
often than it may, its open tags are closed and its verdict is read anyway. A conversation that
outgrows the context has no verdict in its remaining turns, and P(right) is 1/2 there.

Code runs in fresh processes, which remember nothing. So the earlier blocks of a path run again,
without showing their output, except those that were stopped. They draw the same random numbers as
before (unless they use numpy's `default_rng`), and all blocks of a call share its `seconds`. If a
block ended its process by `os._exit`, it does so again, and the blocks after it print nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.verdicts import verdict_at
from stepwiser_jax.inference.params import (
    Prefix,
    SampleRequest,
    SamplingParams,
    StopReason,
    probabilities,
)
from stepwiser_jax.judges.base import ChunkJudgment, Solution, SolutionJudgment
from stepwiser_jax.judges.genprm.form import (
    ANALYSIS_END,
    CODE_OUTPUT,
    SYNTHESIS_OPENING,
    GenPrmForm,
    code_to_run,
    form_of,
    join_turns,
    output_text,
    synthesis_prompt,
    with_memory,
)
from stepwiser_jax.judges.writer import Writer, judge_by_votes
from stepwiser_jax.model.flops import NOTHING, Spent
from stepwiser_jax.records import Verdict
from stepwiser_jax.sandbox.runner import Limits, Sandbox
from stepwiser_jax.tasks.verifier import worker_count
from stepwiser_jax.text.dialogues import encode_dialogue
from stepwiser_jax.text.tokenizer import Tokenizer, completion_text

CODE_LIMITS = Limits(seconds=5.0, memory_bytes=2**30, output_bytes=2048)
"""What one run of code may take: wall-clock time, memory, and output that is kept."""


@dataclass
class Conversation:
    """A conversation that is being written.

    Attributes:
        name: Name of the current turn; its rows' ids are `<name>/<round><suffix>`.
        suffix: Tells the paths of one solution apart.
        code_rounds: How often a turn may have code run.
        run_code: Where this is written, code is run.
        roles: Who speaks each of the `texts`.
        codes: The blocks of code that ran.
        turn_start: Index of the first text of the current turn.
        spent: What the current turn costs.
        stop_reason: Why sampling last stopped.
    """

    name: str
    suffix: str
    code_rounds: int = 0
    run_code: str = CODE_OUTPUT
    roles: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)
    turn_start: int = 0
    spent: Spent = NOTHING
    stop_reason: StopReason = StopReason.LENGTH

    def say(self, role: str, text: str) -> None:
        """Appends a text; two texts of one role in a row become one."""
        if self.roles and self.roles[-1] == role:
            self.texts[-1] += text
        elif text:
            self.roles.append(role)
            self.texts.append(text)

    def begin_turn(self, opening: str) -> None:
        """Begins a turn of the assistant's with text that is given."""
        self.turn_start, self.spent = len(self.texts), NOTHING
        self.say("assistant", opening)

    @property
    def turn(self) -> str:
        return "".join(self.texts[self.turn_start :])

    @property
    def asks_for_code(self) -> bool:
        return self.stop_reason is StopReason.STOP_STRING and self.texts[-1].endswith(self.run_code)

    @property
    def is_finished(self) -> bool:
        """Whether the turn is complete: it was not cut short, and asks for no more code."""
        return self.stop_reason is not StopReason.LENGTH and not self.asks_for_code


class TurnWriter:
    """Writes turns of many conversations at once. With `code_rounds` it runs the code that they ask
    for, and counts the programs in `code_runs`."""

    def __init__(self, writer: Writer, code_rounds: int = 0):
        """Raises UserError if code is to be run and this machine cannot confine it."""
        self.writer, self.code_rounds, self.code_runs = writer, code_rounds, 0
        self.sandbox = Sandbox(CODE_LIMITS, worker_count()) if code_rounds else None

    def encode(self, conversation: Conversation) -> list[int]:
        """Returns the ids of a conversation up to and including its last text."""
        roles, texts, style = conversation.roles, conversation.texts, self.writer.prompt_style
        return encode_dialogue(self.writer.tokenizer, roles, texts, style)[0]

    def write(
        self, conversations: Sequence[Conversation], params: SamplingParams, *, reserve: int = 0
    ) -> None:
        """Continues the turn of every conversation.

        A turn stops if the model ends it, if it says one of the stop strings, if it has
        `max_new_tokens`, if only `reserve` tokens are left in the context, or if it asks for code
        more often than it may.
        """
        if self.sandbox is not None:
            requests = dict.fromkeys(c.run_code for c in conversations)
            params = replace(params, stop_strings=(*requests, *params.stop_strings))
        number = 0
        while conversations:
            self.write_to_stop(conversations, params, str(number), reserve)
            conversations = [c for c in conversations if c.asks_for_code and number < c.code_rounds]
            self._run_code(conversations)
            number += 1

    def write_to_stop(
        self,
        conversations: Sequence[Conversation],
        params: SamplingParams,
        name: str,
        reserve: int,
    ) -> None:
        """Samples up to the next stop, if there is room. Equal prompts are prefilled once. The name
        is part of the rows' ids.

        A conversation is read again for each stop. With a cache, the keys and values of the stop
        before would lie beside those of this one, and conversations fill the largest bucket.
        """
        engine = self.writer.engine
        conversation_of: dict[str, Conversation] = {}
        requests: dict[tuple[int, ...], list[SampleRequest]] = {}
        for conversation in conversations:
            ids = self.encode(conversation)
            left = engine.shapes.max_length - len(ids) - reserve
            room = min(params.max_new_tokens - conversation.spent.generated, left)
            conversation.stop_reason = StopReason.LENGTH
            if room >= 1:
                row_id = f"{self.writer.name}/{conversation.name}/{name}{conversation.suffix}"
                conversation_of[row_id] = conversation
                requests.setdefault(tuple(ids), []).append(SampleRequest(row_id, len(ids), room))
        prefixes = [Prefix(ids, rows) for ids, rows in requests.items()]
        for completions in engine.stream(prefixes, params, key=self.writer.key):
            for completion in completions:
                text = completion_text(self.writer.tokenizer, completion.tokens)
                if completion.stop_reason is StopReason.STOP_STRING:
                    # The last token may hold what comes after the stop string.
                    text = text[: first_end(text, params.stop_strings)]
                conversation = conversation_of[completion.row_id]
                conversation.say("assistant", text)
                conversation.spent += completion.spent
                conversation.stop_reason = completion.stop_reason

    def _run_code(self, conversations: Sequence[Conversation]) -> None:
        """Runs the last block of every conversation and appends what it printed."""
        if self.sandbox is None or not conversations:
            return
        blocks = [code_to_run(c.texts[-1]) or "" for c in conversations]
        programs = [with_memory(c.codes, b) for c, b in zip(conversations, blocks, strict=True)]
        executions = self.sandbox.run(programs)
        self.code_runs += len(programs)
        for conversation, block, execution in zip(conversations, blocks, executions, strict=True):
            if not conversation.texts[-1].endswith(CODE_OUTPUT):
                conversation.say("assistant", CODE_OUTPUT)
            conversation.say("output", output_text(execution.output))
            if execution.failure in (None, "error"):
                conversation.codes.append(block)

    @property
    def measured(self) -> dict[str, Any]:
        """Returns the number of programs so far, and of failures by kind, in this process."""
        failures = {} if self.sandbox is None else dict(self.sandbox.failures)
        return {"code_runs": self.code_runs, "code_failures": failures}


def first_end(text: str, stops: Iterable[str]) -> int:
    """Returns where the first stop string in a text ends."""
    return min(text.index(stop) + len(stop) for stop in stops if stop in text)


@dataclass
class Path:
    """One conversation about a solution, with the judgments so far, and whether each turn was
    complete."""

    solution: Solution
    conversation: Conversation
    judgments: list[ChunkJudgment] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)

    @property
    def has_rejected(self) -> bool:
        return bool(self.judgments) and self.judgments[-1].verdict is not Verdict.POSITIVE


class GenPrmCritic:
    """A judge that talks about the steps of a solution in one conversation. `max_new_tokens` of its
    `writer` bounds the text about one step."""

    def __init__(self, writer: Writer, *, code_rounds: int):
        """Raises UserError if a verdict is not one token, or as `TurnWriter` does."""
        self.writer, self.judge_id = writer, writer.loaded.model_id
        self.compiled_shapes = writer.engine.compiled_shapes
        self.form = form_of(writer.prompt_style, writer.tokenizer.prompts)
        self.word_ids = verdict_ids(writer.tokenizer, self.form)
        self.turns = TurnWriter(writer, code_rounds)
        longest = self.form.to_verdict("<analyze><verify>") + self.form.verdict(True)
        self.reserve = len(writer.tokenizer.encode(longest)) + 4

    def measured(self, made: int) -> dict[str, Any]:
        """Returns tokens per judgment, and how much code ran."""
        return self.writer.measured(made) | self.turns.measured

    def _first_prompt(self, solution: Solution) -> list[int]:
        path = Path(solution, self._begin(""))
        self._ask(path, 0)
        return self.turns.encode(path.conversation)

    def check_room(self, problem_id: str, question: str, num_tokens: int) -> None:
        """Raises UserError if the context may not hold the first turn about a solution."""
        prompt = self._first_prompt(Solution(problem_id, question, [""]))
        self.writer.check_room(prompt, problem_id, num_tokens, self.reserve + 1)

    def check_lengths(self, solutions: Sequence[Solution]) -> None:
        """Raises UserError if no solution's first turn fits the context."""
        context = self.writer.engine.shapes.max_length
        needed = min(len(self._first_prompt(x)) for x in solutions) + self.reserve + 1
        if needed > context:
            raise UserError(
                f"no solution's first step fits the context of {context} tokens (the largest of "
                f"engine.buckets): the shortest needs {needed}; raise it"
            )

    def __call__(self, solutions: Sequence[Solution]) -> list[list[ChunkJudgment]]:
        """Returns one judgment of every chunk, see `judge_by_votes`."""
        return judge_by_votes(self, self.writer, solutions)

    def sample(
        self, solutions: Sequence[Solution], suffixes: Sequence[str], **sampling: Any
    ) -> list[list[SolutionJudgment]]:
        """Returns one path through each solution for each suffix, see `Judge`. A path begins with
        the first chunk, even if judgments are wanted from a later one on."""
        return [
            [SolutionJudgment(path.judgments[path.solution.start :]) for path in paths]
            for paths in self._converse(solutions, suffixes, self.writer.params(**sampling))
        ]

    def critiques(
        self, solutions: Sequence[Solution], suffixes: Sequence[str]
    ) -> list[list[tuple[str, bool]]]:
        """Returns critiques as `Synthesizer` does: the joined turns of a path up to the first one
        that does not accept its step, and whether all of them were complete."""
        found = self._converse(solutions, suffixes, self.writer.params(), to_first_error=True)
        return [
            [(join_turns([j.completion for j in path.judgments]), all(path.finished)) for path in x]
            for x in found
        ]

    def _converse(
        self,
        solutions: Sequence[Solution],
        suffixes: Sequence[str],
        params: SamplingParams,
        *,
        to_first_error: bool = False,
    ) -> list[list[Path]]:
        """Returns the paths of each solution, [solution][suffix]. With `to_first_error` a path ends
        after the first step that it does not accept."""
        params = replace(params, stop_strings=(self.form.stop,))
        paths = [[Path(x, self._begin(suffix)) for suffix in suffixes] for x in solutions]
        active = [path for of_solution in paths for path in of_solution]
        for t in range(max((len(x.chunks) for x in solutions), default=0)):
            active = [
                path
                for path in active
                if t < len(path.solution.chunks) and not (to_first_error and path.has_rejected)
            ]
            for path in active:
                self._ask(path, t)
            self._judge(active, params)
        return paths

    def _begin(self, suffix: str) -> Conversation:
        conversation = Conversation("", suffix, self.turns.code_rounds, self.form.run_code)
        conversation.say("system", self.form.system)
        return conversation

    def _ask(self, path: Path, t: int) -> None:
        """Asks about chunk t."""
        solution, conversation = path.solution, path.conversation
        conversation.name = f"{solution.solution_id}/{t}"
        conversation.say("user", self.form.user_turn(solution.question, solution.chunks, t))
        conversation.begin_turn(self.form.opening.format(number=t + 1))

    def _write(self, conversations: Sequence[Conversation], params: SamplingParams) -> None:
        """Writes the turns up to their verdicts, with what the form gives after the analysis."""
        if self.form.after_analysis:
            to_end = replace(params, stop_strings=(ANALYSIS_END,))
            self.turns.write_to_stop(conversations, to_end, "analysis", self.reserve)
            conversations = [c for c in conversations if c.stop_reason is StopReason.STOP_STRING]
            for conversation in conversations:
                conversation.say("assistant", self.form.after_analysis)
            conversations = [c for c in conversations if not c.turn.endswith(self.form.stop)]
        self.turns.write(conversations, params, reserve=self.reserve)

    def _judge(self, paths: Sequence[Path], params: SamplingParams) -> None:
        """Writes the turn that every path has begun, and reads its verdict."""
        conversations = [path.conversation for path in paths]
        self._write(conversations, params)
        prompts: dict[int, list[int]] = {}
        for i, (path, conversation) in enumerate(zip(paths, conversations, strict=True)):
            path.finished.append(conversation.is_finished)
            if conversation.spent.generated:  # else there was no room
                conversation.say("assistant", self.form.to_verdict(conversation.turn))
                ids = self.turns.encode(conversation)
                if len(ids) < self.writer.engine.shapes.max_length:
                    prompts[i] = ids
        spent = {i: self.writer.engine.spent_on(read=len(ids)) for i, ids in prompts.items()}
        log_odds = self.writer.engine.log_odds(list(prompts.values()), self.word_ids)
        p_right = dict(zip(prompts, probabilities(log_odds), strict=True))
        for i, (path, conversation) in enumerate(zip(paths, conversations, strict=True)):
            p, verdict = p_right.get(i, 0.5), Verdict.UNPARSED
            if i in p_right:
                verdict = verdict_at(0.5, p)
                conversation.say("assistant", self.form.verdict(verdict is Verdict.POSITIVE))
            total = conversation.spent + spent.get(i, NOTHING)
            path.judgments.append(ChunkJudgment(conversation.turn, verdict, p, *astuple(total)))


def verdict_ids(tokenizer: Tokenizer, form: GenPrmForm) -> tuple[int, int]:
    """Returns the tokens of a verdict's two words. Raises UserError unless each is one token."""
    before = form.stop + form.lead
    ids = tokenizer.encode(before)
    found = [tokenizer.encode(before + word) for word in form.words]
    if any(f[:-1] != ids for f in found) or found[0] == found[1]:
        raise UserError(
            f"a verdict is one token, {form.words[0].strip()} or {form.words[1].strip()}: expected "
            f"a vocabulary that has both, found {[f[len(ids) :] for f in found]} after "
            f"{before!r}. Use another model"
        )
    return found[0][-1], found[1][-1]


class Synthesizer:
    """A teacher that writes the critique of a whole solution in one go, in the style `instruct`."""

    def __init__(self, writer: Writer, *, code_rounds: int):
        """Raises UserError as `TurnWriter` does."""
        self.writer, self.turns = writer, TurnWriter(writer, code_rounds)

    def _begin(self, solution: Solution, suffix: str) -> Conversation:
        rounds = self.turns.code_rounds
        conversation = Conversation(solution.solution_id, suffix, rounds * len(solution.chunks))
        prompts = self.writer.tokenizer.prompts
        prompt = synthesis_prompt(
            solution.question, solution.chunks, code=rounds > 0, prompts=prompts
        )
        conversation.say("user", prompt)
        conversation.begin_turn(SYNTHESIS_OPENING)
        return conversation

    def check_lengths(self, solutions: Sequence[Solution]) -> None:
        """Raises UserError if the context does not hold a critique of each solution."""
        for solution in solutions:
            prompt = self.turns.encode(self._begin(solution, ""))
            self.writer.check_length(prompt, solution.solution_id)

    def critiques(
        self, solutions: Sequence[Solution], suffixes: Sequence[str]
    ) -> list[list[tuple[str, bool]]]:
        """Returns (critique, whether the teacher ended it), [solution][suffix]."""
        written = [[self._begin(x, suffix) for suffix in suffixes] for x in solutions]
        self.turns.write([c for of_x in written for c in of_x], self.writer.params())
        return [[(c.turn, c.stop_reason is StopReason.STOP_ID) for c in of_x] for of_x in written]

"""The queue before a judge, and the thread that owns it. Knows nothing of HTTP.

    submit -> waiting jobs, a bounded number -> all that wait, up to the judge's rows -> one batch
           -> events of each job, the last of which is its result or an error

Nothing but this thread touches the judge. A job that is withdrawn while it waits is not judged.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.judgments import votes_of
from stepwiser_jax.inference.params import (
    Completion,
    Prefix,
    SampleRequest,
    SamplingParams,
    StopReason,
)
from stepwiser_jax.judges.base import ChunkJudgment, Solution
from stepwiser_jax.judges.check import Checker, judgment_fields
from stepwiser_jax.judges.writer import Writer
from stepwiser_jax.server.asking import MAX_STOP_BYTES, CompletionBody, Refused
from stepwiser_jax.text.tokenizer import Tokenizer, completion_text

ROWS = 64
"""How many chunks are judged together if the judge's settings do not say it."""

MAX_WAYS = 32
"""The most ways of drawing completions. Each is a program that is compiled once, and stays."""


@dataclass(frozen=True)
class Event:
    """What becomes of a job: it has `begun`; more of a text is `written`; a chunk is `judged`, a
    completion is `completed`; the last is a `result` or an `error`, which is a Refused."""

    name: str
    data: Any


@dataclass(eq=False)
class Job:
    """What a client asks for. `tell` is called with its events, by the judge's thread. Of a job
    that nobody reads along there is only the end."""

    asked: Solution | CompletionBody
    tell: Callable[[Event], None]
    is_read_along: bool = False


Asked = tuple[Any, Sequence[Job]]
"""What is judged together with others, and the jobs that ask for it."""


@dataclass(frozen=True)
class Draft:
    """A completion job whose prompt and way of drawing are known. `name` begins its row ids."""

    job: Job
    body: CompletionBody
    name: str
    prompt: list[int]
    params: SamplingParams

    @property
    def row_ids(self) -> list[str]:
        return [f"{self.name}/{k}" for k in range(self.body.n)]


class Worker:
    """Judges what is submitted, one batch after the other, in a thread of its own.

    Args:
        checker: The judge.
        places: How many jobs may wait.
    """

    def __init__(self, checker: Checker, places: int):
        self.checker, self.places = checker, places
        writer = getattr(checker.judge, "writer", None)
        self.writer = writer if isinstance(writer, Writer) else None
        self._rows = ROWS if self.writer is None else self.writer.engine.shapes.max_rows
        self._votes = votes_of(checker.settings)
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._ways: set[tuple[Any, ...]] = set()
        self._thread = threading.Thread(target=self._run, name="judge", daemon=True)
        self._thread.start()

    @property
    def judge_id(self) -> str:
        return self.checker.judge.judge_id

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def submit(self, job: Job) -> None:
        """Puts a job into the queue. Raises Refused if there is no place, or no more are taken."""
        with self._changed:
            if self._is_closed:
                raise Refused(503, "the server is stopping", {"Retry-After": "10"})
            if len(self._waiting) >= self.places:
                message = f"{self.places} requests wait already: try again later"
                raise Refused(429, message, {"Retry-After": "1"})
            self._waiting.append(job)
            self._changed.notify()

    def withdraw(self, job: Job) -> None:
        """Takes a job out of the queue, if it still waits."""
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(job)

    def close(self) -> None:
        """Takes no more jobs. Those that wait are judged."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def join(self) -> None:
        """Waits until all is judged, after `close`."""
        self._thread.join()

    # --- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while batch := self._take():
            self._work(batch)

    def _take(self) -> list[Job]:
        """Waits for jobs, and returns those of the next batch; none after the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            batch, rows = [], 0
            while self._waiting and rows < self._rows:
                job = self._waiting.popleft()
                if isinstance(job.asked, Solution):
                    rows += len(job.asked.chunks) * max(1, self._votes)
                else:
                    rows += job.asked.n
                batch.append(job)
            return batch

    def _work(self, batch: Sequence[Job]) -> None:
        jobs_of: dict[Solution, list[Job]] = {}
        drafts_of: dict[SamplingParams, list[Draft]] = {}
        for number, job in enumerate(batch):
            with self._refusing([job]):
                if isinstance(job.asked, Solution):
                    self.checker.asked(job.asked)
                    jobs_of.setdefault(job.asked, []).append(job)
                else:
                    draft = self._draft(job, job.asked, number)
                    drafts_of.setdefault(draft.params, []).append(draft)
        # With votes the id decides the noise, and is once in a batch. Else it decides nothing.
        of_checks = rounds(jobs_of, lambda x: x.solution_id if self._votes else id(x))
        for solutions in of_checks:
            self._alone_if_it_fails(self._check, [(x, jobs_of[x]) for x in solutions])
        for drafts in drafts_of.values():
            for some in rounds(drafts, lambda draft: draft.name):
                self._alone_if_it_fails(self._complete, [(draft, [draft.job]) for draft in some])

    def _alone_if_it_fails(
        self, work: Callable[[Sequence[Asked]], None], asked: Sequence[Asked]
    ) -> None:
        """Does work on all that is asked together, or else on each alone: none takes others down.
        (They hear again what they have heard of their texts.)"""
        if len(asked) > 1:
            with contextlib.suppress(Exception):
                return work(asked)
        for each in asked:
            with self._refusing(each[1]):
                work([each])

    @contextlib.contextmanager
    def _refusing(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Tells jobs what goes wrong. What the server did wrong is printed without the message,
        which may hold the text of a request."""
        try:
            yield
        except Exception as error:
            if isinstance(error, UserError):
                error = Refused(400, str(error))
            elif not isinstance(error, Refused):
                traceback.print_tb(error.__traceback__)
                print(f"serve: {type(error).__name__}", file=sys.stderr, flush=True)
                error = Refused(500, "the judge failed: see the server's own messages")
            for job in jobs:
                job.tell(Event("error", error))

    # --- solutions ------------------------------------------------------------------------------

    def _check(self, asked: Sequence[tuple[Solution, Sequence[Job]]]) -> None:
        """Judges different solutions together, each for the jobs that ask for it."""
        solutions = [solution for solution, _ in asked]
        readers = [[job for job in jobs if job.is_read_along] for _, jobs in asked]
        texts: dict[tuple[int, int], GrowingText] = {}
        told: set[tuple[int, int]] = set()

        def tell(i: int, name: str, data: dict[str, Any]) -> None:
            for job in readers[i]:
                job.tell(Event(name, data))

        def tell_judged(i: int, j: int, judgment: ChunkJudgment) -> None:
            told.add((i, j))
            tell(i, "judged", {"chunk": j} | judgment_fields(judgment))

        def read(i: int, j: int, found: np.ndarray | ChunkJudgment) -> None:
            if isinstance(found, ChunkJudgment):
                tell_judged(i, j, found)
            elif readers[i]:
                text = texts.setdefault((i, j), GrowingText(self.checker.tokenizer))
                tell(i, "written", {"chunk": j, "text": text.more(found)})

        for i, solution in enumerate(solutions):
            tell(i, "begun", {"chunks": list(solution.chunks)})
        unique = solutions
        if not self._votes:
            unique = [replace(x, solution_id=str(i)) for i, x in enumerate(solutions)]
        checked = self.checker.check(unique, read if any(readers) else None)
        for i, (solution, found) in enumerate(zip(solutions, checked, strict=True)):
            fields = {"judge": self.judge_id} | replace(found, solution=solution).to_fields()
            for j, judgment in enumerate(found.chunks):
                if (i, j) not in told:
                    tell_judged(i, j, judgment)
            for job in asked[i][1]:
                job.tell(Event("result", fields))

    # --- completions ----------------------------------------------------------------------------

    def _draft(self, job: Job, body: CompletionBody, number: int) -> Draft:
        """Returns what a completion job comes to. Raises Refused or UserError if the judge cannot
        do it."""
        writer = self.writer
        if writer is None:
            raise Refused(400, f"{self.judge_id} writes no text: ask for /check")
        if body.model not in (None, self.judge_id):
            raise Refused(404, f"expected the model {self.judge_id!r}, see /v1/models")
        if body.max_tokens > writer.max_new_tokens:
            raise Refused(
                400,
                f"max_tokens: this judge writes at most {writer.max_new_tokens}. For more, start "
                "the server with --set judge.sampling.max_new_tokens=N",
            )
        if sum(len(x.encode()) for x in body.stop_strings) > MAX_STOP_BYTES:
            raise Refused(400, f"stop: expected at most {MAX_STOP_BYTES} bytes in all")
        if 0 < body.temperature < 0.01:
            raise Refused(400, "temperature: expected 0 or at least 0.01")
        prompt, known = body.prompt, writer.tokenizer.known_ids
        if isinstance(prompt, str):
            prompt = writer.tokenizer.encode(prompt)
        if not known.issuperset([*prompt, *(body.stop_token_ids or ())]):
            raise Refused(400, "expected token ids of the judge's tokenizer, found others")
        writer.engine.check_length(len(prompt), body.max_tokens, "prompt")
        is_greedy = body.temperature == 0
        params = SamplingParams(
            writer.max_new_tokens,  # one length is compiled; each sample has its own limit
            temperature=body.temperature,
            top_k=0 if is_greedy else max(0, body.top_k),
            top_p=1.0 if is_greedy else body.top_p,
            stop_ids=tuple(
                dict.fromkeys((*writer.tokenizer.eos_ids, *(body.stop_token_ids or ())))
            ),
            stop_strings=body.stop_strings,
        )
        way = (is_greedy, params.top_k, params.top_p < 1, len(params.stop_ids), params.stop_strings)
        if way not in self._ways and len(self._ways) >= MAX_WAYS:
            raise Refused(
                400,
                f"this server has compiled {MAX_WAYS} combinations of top_k, stop and the number "
                "of stop_token_ids, and takes no others until it is started anew",
            )
        self._ways.add(way)
        # Noise comes from the row id alone: what else is in the batch does not change it.
        seed = secrets.randbits(63) if body.seed is None else body.seed
        digest = hashlib.sha256(str(prompt).encode()).hexdigest()
        name = f"completion {number}" if is_greedy else f"completion {seed} {digest}"
        return Draft(job, body, name, prompt, params)

    def _complete(self, asked: Sequence[tuple[Draft, Sequence[Job]]]) -> None:
        """Continues prompts that are drawn in the same way together."""
        assert self.writer is not None
        drafts, engine = [draft for draft, _ in asked], self.writer.engine
        places = {row_id: (draft, k) for draft in drafts for k, row_id in enumerate(draft.row_ids)}
        held = max(map(len, drafts[0].params.stop_strings), default=0)
        texts = {row_id: GrowingText(self.writer.tokenizer, held) for row_id in places}
        found: dict[str, dict[str, Any]] = {}
        written: Counter[str] = Counter()

        def watch(running: Mapping[str, np.ndarray], _: Sequence[Completion]) -> None:
            for row_id, tokens in running.items():
                draft, k = places[row_id]
                if draft.job.is_read_along and (more := texts[row_id].more(tokens)):
                    draft.job.tell(Event("written", {"index": k, "text": more}))

        prefixes = []
        for draft in drafts:
            limit, length = draft.body.max_tokens, len(draft.prompt)
            samples = [SampleRequest(row_id, length, limit) for row_id in draft.row_ids]
            prefixes.append(Prefix(draft.prompt, samples))
            if draft.job.is_read_along:
                draft.job.tell(Event("begun", {}))
        engine.watch = watch if any(draft.job.is_read_along for draft in drafts) else None
        try:
            for part in engine.stream(prefixes, drafts[0].params, key=self.writer.key):
                for completion in part:
                    draft, k = places[completion.row_id]
                    choice = choice_fields(self.writer.tokenizer, draft, k, completion)
                    found[completion.row_id] = choice
                    written[draft.name] += len(completion.tokens)
                    if draft.job.is_read_along:
                        rest = choice["text"][texts[completion.row_id].told :]
                        draft.job.tell(Event("completed", choice | {"text": rest}))
        finally:
            engine.watch = None
        for draft in drafts:
            choices = [found[row_id] for row_id in draft.row_ids]
            read, wrote = len(draft.prompt), written[draft.name]
            usage = {
                "prompt_tokens": read,
                "completion_tokens": wrote,
                "total_tokens": read + wrote,
            }
            draft.job.tell(Event("result", {"choices": choices, "usage": usage}))


Item = TypeVar("Item")


def rounds(items: Iterable[Item], name: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Deals items into rounds, none of which has a name twice."""
    found: list[list[Item]] = []
    seen: Counter[Hashable] = Counter()
    for item in items:
        if seen[name(item)] == len(found):
            found.append([])
        found[seen[name(item)]].append(item)
        seen[name(item)] += 1
    return found


class GrowingText:
    """The text of a row that is being written. `told` is how many of its characters were handed
    out; the last `held` are kept back, since a stop string may be cut off there."""

    def __init__(self, tokenizer: Tokenizer, held: int = 0):
        self.tokenizer, self.held = tokenizer, held
        self.text, self.told = "", 0
        self._start = self._read = 0

    def more(self, tokens: np.ndarray) -> str:
        """Returns what has come since the last call, if the row has these tokens now."""
        ids = tokens.tolist()
        # A token's text may depend on the one before it, and a character may take several.
        before = self.tokenizer.decode(ids[self._start : self._read])
        now = self.tokenizer.decode(ids[self._start :])
        if not now.endswith("\ufffd"):
            self.text += now[len(before) :]
            self._start, self._read = self._read, len(ids)
        end = max(self.told, len(self.text) - self.held)
        part, self.told = self.text[self.told : end], end
        return part


def choice_fields(
    tokenizer: Tokenizer, draft: Draft, index: int, completion: Completion
) -> dict[str, Any]:
    """Returns a completion as a choice of an answer in OpenAI's words and vLLM's."""
    body, ids = draft.body, completion.tokens.tolist()
    text, reason = completion_text(tokenizer, ids), completion.stop_reason
    stopped_by: int | str | None = None
    if reason is StopReason.STOP_ID and ids[-1] not in tokenizer.eos_ids:
        stopped_by = ids[-1]
    if reason is StopReason.STOP_STRING:
        ends = [(text.find(x), x) for x in body.stop_strings if x in text]
        place, stopped_by = min(ends, default=(len(text), None))
        if stopped_by is not None:
            text = text[: place + len(stopped_by) * body.include_stop_str_in_output]
    choice: dict[str, Any] = {
        "index": index,
        "text": text,
        "finish_reason": "length" if reason is StopReason.LENGTH else "stop",
        "stop_reason": stopped_by,
        "logprobs": None,
    }
    if body.logprobs is not None:
        choice["logprobs"] = {
            "tokens": [tokenizer.decode([i]) for i in ids],
            "token_logprobs": completion.logprobs.tolist(),
            "top_logprobs": None,
            "text_offset": None,
        }
    if body.return_token_ids:
        choice |= {"token_ids": ids, "prompt_token_ids": draft.prompt}
    return choice

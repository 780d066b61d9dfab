"""The records that stages hand to one another.

A record is a frozen dataclass. Its fields are str, int, float, bool and tuples, also of smaller
dataclasses, and None if a field allows it. `record_lines.py` writes each as a line, `record_io.py`
keeps those of a run.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from typing import Any, Protocol

import numpy as np

from stepwiser_jax.errors import UserError


def expect(holds: bool, what: str, record: Any) -> None:
    """Raises UserError unless a condition on a record holds. Records check themselves, so a wrong
    one is refused when it is made or read."""
    if not holds:
        fields = f"{record}"
        raise UserError(f"expected {what}, found {fields[:400]}{'...' * (len(fields) > 400)}")


MAX_ROLLOUTS = 1024
"""The most Monte Carlo rollouts of one prefix. A table of labels has its square of entries."""


class Verdict(enum.Enum):
    """A judge's verdict on a chunk: POSITIVE or NEGATIVE. The other values are counted and never a
    silent default: UNPARSED has no finished \\boxed{}, and the box of OTHER holds something
    else."""

    POSITIVE = "Positive"
    NEGATIVE = "Negative"
    UNPARSED = "Unparsed"
    OTHER = "Other"

    @property
    def is_given(self) -> bool:
        return self in (Verdict.POSITIVE, Verdict.NEGATIVE)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with its reference answer; the id looks like `gsm8k/train/000123`. `extra` holds
    the other columns of its row, such as the unit tests of a program."""

    problem_id: str
    question: str
    answer: str
    source: str
    extra: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def record_id(self) -> str:
        return self.problem_id


class TokenArrays(Protocol):
    """The token arrays of a trajectory, in memory (`Tokens`) or in a file (`token_files`)."""

    def read(self) -> Tokens: ...
    @property
    def num_prompt(self) -> int: ...
    @property
    def num_completion(self) -> int: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """A prompt and its completion: token ids (int32), and the log-prob (float32) of each token of
    the completion in the distribution it was sampled from. Other types are converted."""

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    logprobs: np.ndarray

    def __post_init__(self) -> None:
        for name, dtype in (("prompt_ids", "i4"), ("completion_ids", "i4"), ("logprobs", "f4")):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype))
        length = self.num_completion
        expect(len(self.logprobs) == length, "a log-prob for each token of the completion", self)
        smallest = min(self.prompt_ids.min(initial=0), self.completion_ids.min(initial=0))
        expect(smallest >= 0, "token ids from 0", self)

    def read(self) -> Tokens:
        return self

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_completion(self) -> int:
        return len(self.completion_ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokens):
            return NotImplemented
        names = ("prompt_ids", "completion_ids", "logprobs")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One sampled solution.

    `chunk_ends[j]` is the exclusive end of chunk j in `completion_ids`; the chunks are a partition
    of the completion. A trajectory that was read from a file reads its arrays on each access, so
    many of them need little memory.
    """

    trajectory_id: str
    problem_id: str
    policy_id: str
    tokens: TokenArrays = dataclasses.field(hash=False)
    chunk_ends: tuple[int, ...]
    stop_reason: str
    is_correct: bool

    def __post_init__(self) -> None:
        ends, length = self.chunk_ends, self.tokens.num_completion
        partition = list(ends) == sorted(set(ends)) and ends[-1:] == (length,) and ends[0] >= 0
        expect(partition, "chunk_ends that ascend to the completion's length", self)

    @property
    def prompt_ids(self) -> np.ndarray:
        return self.tokens.read().prompt_ids

    @property
    def completion_ids(self) -> np.ndarray:
        return self.tokens.read().completion_ids

    @property
    def logprobs(self) -> np.ndarray:
        return self.tokens.read().logprobs

    @property
    def record_id(self) -> str:
        return self.trajectory_id

    @property
    def is_cut(self) -> bool:
        """Whether the length limit ended it. Its outcome then says nothing about its last chunk."""
        return self.stop_reason == "length"


@dataclasses.dataclass(frozen=True)
class SftExample:
    """A prompt and the completion to imitate, both as text."""

    example_id: str
    problem_id: str
    prompt: str
    completion: str

    @property
    def record_id(self) -> str:
        return self.example_id


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A conversation to imitate: roles and texts in order, beginning with the system's or the
    user's. An assistant's turn may be several texts: those of the role `assistant` are learned,
    those of `output`, which its code printed, are not."""

    example_id: str
    problem_id: str
    roles: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def record_id(self) -> str:
        return self.example_id


@dataclasses.dataclass(frozen=True)
class ChunkedSolution:
    """A solution cut into chunks (StepWiser 3.1), which are its text except for white space between
    them; no chunks if no proposal was kept. `outcomes` says what became of every proposal
    (`text.chunking.ProposalOutcome`). `votes` of the kept proposals are these chunks."""

    trajectory_id: str
    problem_id: str
    question: str
    chunks: tuple[str, ...]
    votes: int
    outcomes: tuple[str, ...]

    @property
    def record_id(self) -> str:
        return self.trajectory_id


@dataclasses.dataclass(frozen=True)
class Rationale:
    """A judgment for a judge to learn, with its prompt and what became of it
    (`data.rationales.RationaleOutcome`). `is_positive` is the label of what it judges."""

    rationale_id: str
    problem_id: str
    prompt: str
    completion: str
    is_positive: bool
    outcome: str

    @property
    def record_id(self) -> str:
        return self.rationale_id


@dataclasses.dataclass(frozen=True)
class PrefixValue:
    """Raw Monte Carlo counts of one prefix (StepWiser 3.2): `num_correct` of `num_rollouts`
    continuations of the first `num_chunks` chunks were right. `num_chunks` = 0 is the bare problem.
    `max_rollouts` is M: fewer are sampled if the labels are known earlier."""

    trajectory_id: str
    num_chunks: int
    num_rollouts: int
    num_correct: int
    max_rollouts: int
    policy_id: str

    def __post_init__(self) -> None:
        right, sampled, most = self.num_correct, self.num_rollouts, self.max_rollouts
        expect(
            0 <= right <= sampled <= most <= MAX_ROLLOUTS and sampled > 0 and self.num_chunks >= 0,
            "0 <= num_correct <= num_rollouts <= max_rollouts, at least one rollout, at most "
            f"{MAX_ROLLOUTS}, and num_chunks >= 0",
            self,
        )

    @property
    def record_id(self) -> str:
        return f"{self.trajectory_id}/{self.num_chunks}"

    @property
    def counts(self) -> tuple[int, int]:
        """Returns (right, sampled)."""
        return self.num_correct, self.num_rollouts

    @property
    def value(self) -> float:
        """Returns the estimate of Q, the fraction of continuations that were right."""
        return self.num_correct / self.num_rollouts


@dataclasses.dataclass(frozen=True)
class ChunkLabel:
    """The label of a chunk, and the values that it follows from: q with the chunk, v before it."""

    trajectory_id: str
    chunk_index: int
    q: float
    v: float
    is_positive: bool
    rule: str

    def __post_init__(self) -> None:
        expect(0 <= self.q <= 1 and 0 <= self.v <= 1, "values from 0 to 1", self)
        expect(self.chunk_index >= 0, "chunk_index >= 0", self)

    @property
    def record_id(self) -> str:
        return f"{self.trajectory_id}/{self.chunk_index}"


@dataclasses.dataclass(frozen=True)
class JudgeExample:
    """One chunk to judge. Texts are exact; the prompt is rendered when the example is loaded."""

    example_id: str
    problem_id: str
    question: str
    history: str
    chunk: str
    is_positive: bool

    @property
    def record_id(self) -> str:
        return self.example_id

    @property
    def position(self) -> int | None:
        """Returns the number of chunks before this one, which an id `<solution>/<number>` says;
        None if the id says none, or one that does not fit the history."""
        number = self.example_id.rpartition("/")[2]
        is_number = number.isascii() and number.isdigit() and str(int(number)) == number
        return int(number) if is_number and (number == "0") == (not self.history) else None


@dataclasses.dataclass(frozen=True)
class ClassifierExample:
    """A solution whose chunks are judged all at once. `labelled` holds the indices of the chunks
    that have a label, ascending; `is_positive` and `q`, the value with the chunk, have an entry for
    each."""

    solution_id: str
    problem_id: str
    question: str
    chunks: tuple[str, ...]
    labelled: tuple[int, ...]
    is_positive: tuple[bool, ...]
    q: tuple[float, ...]

    def __post_init__(self) -> None:
        indices = [i for i in range(len(self.chunks)) if i in self.labelled]
        expect(list(self.labelled) == indices != [], "ascending indices of chunks", self)
        paired = len(self.labelled) == len(self.is_positive) == len(self.q)
        expect(paired, "an 'is_positive' and a 'q' for each of 'labelled'", self)
        expect(all(0 <= q <= 1 for q in self.q), "values from 0 to 1", self)

    @property
    def record_id(self) -> str:
        return self.solution_id


@dataclasses.dataclass(frozen=True)
class Judgment:
    """What a judge wrote about one chunk, or ThinkPRM's judge about a whole solution. `p_positive`
    is the probability that it is right: of the written verdict, of GenPRM's and ThinkPRM's last
    word, or a classifier's P(+). If it is not known, it is 1 for Positive, 0 for Negative, and 1/2
    without a verdict. A classifier writes the likelier sign only."""

    example_id: str
    judge_id: str
    completion: str
    verdict: Verdict
    p_positive: float
    reward: float

    def __post_init__(self) -> None:
        expect(0 <= self.p_positive <= 1, "a p_positive from 0 to 1", self)

    @property
    def record_id(self) -> str:
        return self.example_id


@dataclasses.dataclass(frozen=True)
class LabelledSolution:
    """A solution with steps that others have labelled (`data.step_formats` reads them).

    `labels[t]` says how right step t is: 1 is right, 0 wrong, a value between them a Monte Carlo
    value or PRM800K's neutral (0.5); None means that nobody judged it. If `cumulative`, a label
    is about the solution up to its step, so a right step makes those before it right. Otherwise a
    label is about its step alone.

    One row of a source may give a tree of solutions: the first `shared_steps` steps and their
    labels are in an earlier solution too. `question_value` is the value of the bare problem, and
    `finish_reason` says why a labeller stopped, if the source does.
    """

    solution_id: str
    problem_id: str
    source: str
    question: str
    answer: str | None
    steps: tuple[str, ...]
    labels: tuple[float | None, ...]
    cumulative: bool
    shared_steps: int = 0
    question_value: float | None = None
    final_answer_correct: bool | None = None
    finish_reason: str | None = None

    @property
    def record_id(self) -> str:
        return self.solution_id

    @property
    def first_error(self) -> int:
        """Returns the index of the first wrong step, -1 for none. If labels are cumulative, wrong
        steps before a right one do not count (ThinkPRM's `fix_step_labels`)."""
        right = [t for t, label in enumerate(self.labels) if label]
        start = right[-1] + 1 if right and self.cumulative else 0
        return next((t for t in range(start, len(self.labels)) if self.labels[t] == 0), -1)


@dataclasses.dataclass(frozen=True)
class ProcessBenchItem:
    """A solution in steps with its first wrong step, 0-based; `first_error` is -1 for none."""

    item_id: str
    subset: str
    question: str
    steps: tuple[str, ...]
    first_error: int
    final_answer_correct: bool

    def __post_init__(self) -> None:
        expect(-1 <= self.first_error < len(self.steps), "first_error to be -1 or a step", self)

    @property
    def record_id(self) -> str:
        return self.item_id

    def is_right(self, step: int) -> bool:
        """Returns whether the solution is right up to `step` (0-based)."""
        return self.first_error == -1 or step < self.first_error


@dataclasses.dataclass(frozen=True)
class PrmBenchItem:
    """A solution in steps, each of which is right or wrong by itself; `wrong_steps` are 0-based and
    ascend. `subset` is PRMBench's class of error, in its spelling, or `correct`."""

    item_id: str
    subset: str
    question: str
    steps: tuple[str, ...]
    wrong_steps: tuple[int, ...]

    @property
    def record_id(self) -> str:
        return self.item_id

    @property
    def first_error(self) -> int:
        return min(self.wrong_steps, default=-1)

    def is_right(self, step: int) -> bool:
        """Returns whether `step` (0-based) is right, whatever came before it."""
        return step not in self.wrong_steps


BenchmarkItem = ProcessBenchItem | PrmBenchItem


@dataclasses.dataclass(frozen=True)
class ChunkAttempt:
    """A chunk that a search wrote, as attempt number `attempt` after `num_before` kept chunks.
    There is no verdict if the chunk joins another one, or if the token budget was spent.
    `judgment` is the judge's text. `is_kept` says whether the chunk is in the solution."""

    num_before: int
    attempt: int
    text: str
    verdict: Verdict | None
    p_positive: float | None
    judgment: str
    is_kept: bool


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """One problem solved by one method.

    The policy wrote `accepted_tokens`, which are in a solution that was found, and
    `rejected_tokens`, which are not; the judge wrote `judge_tokens` to steer it. `forced_chunks`
    counts chunks that were kept although they were judged Negative. `chunk_scores` are the scores
    of those chunks of `completion` that were judged. A judgment of `scoring_tokens` scores a
    finished sample; they are a cost only for methods that use its scores. `attempts` are all chunks
    of a search with one beam, kept or not, as they were written.

    Policy and judge also read tokens: prompts, and what was no longer in a cache. FLOPs are those
    of both. `prompt_flops` is the part of a sample's `policy_flops` that reads its problem, which
    samples of one problem share. What they share of the judge's reading, the first one counts.
    """

    search_id: str
    problem_id: str
    method: str
    answer: str
    is_correct: bool
    completion: str
    accepted_tokens: int
    rejected_tokens: int
    judge_tokens: int
    forced_chunks: int
    chunk_scores: tuple[float, ...]
    scoring_tokens: int
    policy_read_tokens: int = 0
    judge_read_tokens: int = 0
    scoring_read_tokens: int = 0
    policy_flops: float = 0.0
    judge_flops: float = 0.0
    scoring_flops: float = 0.0
    prompt_flops: float = 0.0
    attempts: tuple[ChunkAttempt, ...] = ()

    def __post_init__(self) -> None:
        written = (self.accepted_tokens, self.rejected_tokens, self.judge_tokens)
        read = (self.policy_read_tokens, self.judge_read_tokens, self.scoring_read_tokens)
        flops = (self.policy_flops, self.judge_flops, self.scoring_flops, self.prompt_flops)
        counts = (*written, self.forced_chunks, self.scoring_tokens, *read, *flops)
        expect(min(counts) >= 0, "counts from 0", self)

    @property
    def record_id(self) -> str:
        return self.search_id

    @property
    def policy_tokens(self) -> int:
        return self.accepted_tokens + self.rejected_tokens


@dataclasses.dataclass(frozen=True)
class Selection:
    """The response to a problem that was selected from `candidates` by the mean scores of their
    chunks. Without a judge there are no `scores`. `completion` is the policy's text, and `tagged`
    says whether the policy was asked to mark its chunks. The judge wrote `judge_tokens` and read
    others."""

    trajectory_id: str
    problem_id: str
    question: str
    completion: str
    tagged: bool
    is_correct: bool
    candidates: tuple[str, ...]
    scores: tuple[float, ...]
    judge_tokens: int
    judge_read_tokens: int = 0
    judge_flops: float = 0.0

    def __post_init__(self) -> None:
        scored = len(self.scores) in (0, len(self.candidates))
        known = self.trajectory_id in self.candidates
        expect(scored and known, "the selected candidate, and no score or one for each", self)

    @property
    def record_id(self) -> str:
        return self.problem_id

    @property
    def score(self) -> float:
        """Returns the score of the selected response."""
        return self.scores[self.candidates.index(self.trajectory_id)]


Record = (
    Problem
    | Trajectory
    | SftExample
    | Dialogue
    | ChunkedSolution
    | Rationale
    | PrefixValue
    | ChunkLabel
    | JudgeExample
    | ClassifierExample
    | Judgment
    | LabelledSolution
    | ProcessBenchItem
    | PrmBenchItem
    | SearchResult
    | Selection
)


_split_at_numbers = re.compile("0*([0-9]+)").split


def natural_key(record_id: str) -> list[Any]:
    """Returns a sort key that puts `p#2` before `p#10`."""
    parts: list[Any] = _split_at_numbers(record_id)  # texts, and between them numbers
    parts[1::2] = [(len(number), number) for number in parts[1::2]]
    return parts

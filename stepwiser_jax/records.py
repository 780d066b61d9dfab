"""Records: what crosses from one stage to the next, and how it lies on disk.

A record is a frozen dataclass of str, int, float, bool and tuples, and None where a field says so.
A stage appends records to one JSONL part per process, and writes `manifest.json` last: no manifest
means the run is not finished.

    <run_dir>/records/<kind>/part-00000-of-00001.jsonl     append-only; a record is one line
    <run_dir>/manifest.json                                counts and sha256 of every part

Killed in the middle of a line, a run loses that line only; started again, it skips the ids that are
present. When a stage finishes, each part is put in id order, so a restarted run leaves the same
bytes as an undisturbed one.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import io
import json
import os
import re
import socket
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar


class UserError(ValueError):
    """A mistake of the user's: the CLI prints the message and exits with status 2."""


class Verdict(enum.Enum):
    """What a judge said about a chunk. UNPARSED is a counted value, never a silent default."""

    POSITIVE = "Positive"
    NEGATIVE = "Negative"
    UNPARSED = "Unparsed"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with its reference answer; the id looks like `gsm8k/train/000123`."""

    problem_id: str
    question: str
    answer: str
    source: str

    @property
    def record_id(self) -> str:
        return self.problem_id


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One sampled solution. `chunk_ends[j]` is the exclusive end of chunk j in `completion_ids`:
    the chunks are a partition of the completion. `logprobs` are of the distribution sampled
    from."""

    trajectory_id: str
    problem_id: str
    policy_id: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    chunk_ends: tuple[int, ...]
    stop_reason: str
    is_correct: bool

    @property
    def record_id(self) -> str:
        return self.trajectory_id


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
    """A conversation to imitate: who says what, in order, beginning with the system's or the user's
    text. Of an assistant's turn, which may be several texts, what the `assistant` says is learned;
    `output` is what its code printed: it stands in the turn, and is read and not learned."""

    example_id: str
    problem_id: str
    roles: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def record_id(self) -> str:
        return self.example_id


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """A solution cut into chunks (StepWiser 3.1), which are its text but for white space between
    them; none where no proposal was kept. `outcomes` says what became of every proposal
    (`text.segmentation.Outcome`); `votes` of those that were kept propose just these chunks."""

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
    """A judgment that was written to be learned, behind the prompt it answers, and what became of
    it (`text.rationales.Outcome`). `is_positive`: the label of what it judges."""

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
    """Raw Monte Carlo counts of one prefix (StepWiser 3.2): of `num_rollouts` continuations of the
    first `num_chunks` chunks, `num_correct` were right. `num_chunks` = 0 is the bare problem.
    `max_rollouts`: how many there would have been, had the labels not been known before."""

    trajectory_id: str
    num_chunks: int
    num_rollouts: int
    num_correct: int
    max_rollouts: int
    policy_id: str

    @property
    def record_id(self) -> str:
        return f"{self.trajectory_id}/{self.num_chunks}"

    @property
    def counts(self) -> tuple[int, int]:
        """(right, sampled)."""
        return self.num_correct, self.num_rollouts

    @property
    def value(self) -> float:
        """Estimate of Q, the fraction of continuations that were right."""
        return self.num_correct / self.num_rollouts


@dataclasses.dataclass(frozen=True)
class ChunkLabel:
    """Derived, never sampled: q is the value with the chunk, v the value before it."""

    trajectory_id: str
    chunk_index: int
    q: float
    v: float
    is_positive: bool
    rule: str

    @property
    def record_id(self) -> str:
        return f"{self.trajectory_id}/{self.chunk_index}"


@dataclasses.dataclass(frozen=True)
class JudgeExample:
    """One chunk to judge. Texts are exact; the prompt is rendered when it is loaded."""

    example_id: str
    problem_id: str
    question: str
    history: str
    chunk: str
    is_positive: bool

    @property
    def record_id(self) -> str:
        return self.example_id


@dataclasses.dataclass(frozen=True)
class ClassifierExample:
    """A solution whose chunks are judged all at once. `labelled` are the indices of its chunks that
    have a label, ascending; `is_positive` and `q`, the value with the chunk, are theirs."""

    solution_id: str
    problem_id: str
    question: str
    chunks: tuple[str, ...]
    labelled: tuple[int, ...]
    is_positive: tuple[bool, ...]
    q: tuple[float, ...]

    @property
    def record_id(self) -> str:
        return self.solution_id


@dataclasses.dataclass(frozen=True)
class Judged:
    """One prompt with its group of judgments and what they earned: kept while no checkpoint holds
    what was learned from it (`runtime.pending`)."""

    group_id: str
    prompt_ids: tuple[int, ...]
    completions_G: tuple[tuple[int, ...], ...]
    logprobs_G: tuple[tuple[float, ...], ...]
    verdicts_G: tuple[Verdict, ...]
    rewards_G: tuple[float, ...]

    @property
    def record_id(self) -> str:
        return self.group_id

    @property
    def teaches(self) -> bool:
        return len(set(self.rewards_G)) > 1


@dataclasses.dataclass(frozen=True)
class Judgment:
    """What a judge wrote about one chunk, or ThinkPRM's about a whole solution. `p_positive` is 1
    or 0 for a written verdict, Positive or not; a judge that knows how sure it is says more, as a
    classifier does, which writes nothing but the likelier sign."""

    example_id: str
    judge_id: str
    completion: str
    verdict: Verdict
    p_positive: float
    reward: float

    @property
    def record_id(self) -> str:
        return self.example_id


@dataclasses.dataclass(frozen=True)
class LabelledSolution:
    """A solution whose steps others have labelled (`text.solutions` reads them).

    `labels[t]` says how right step t is: 1 right, 0 wrong, between them a Monte Carlo value or
    PRM800K's neutral (0.5); None: nobody judged it. `cumulative`: a label speaks of the solution up
    to its step, so that a right step makes those before it right; else of the step alone.

    One row of a source may give several solutions, a tree of them: the first `shared_steps` steps
    with their labels stand in an earlier one too. `question_value` is the value of the bare
    problem, `finish_reason` why a labeller stopped, where the source says so.
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
        """Index of the first wrong step, -1: none. Where labels are cumulative, wrong steps before
        a right one do not count (ThinkPRM's `fix_step_labels`)."""
        right = [t for t, label in enumerate(self.labels) if label]
        start = right[-1] + 1 if right and self.cumulative else 0
        return next((t for t in range(start, len(self.labels)) if self.labels[t] == 0), -1)


@dataclasses.dataclass(frozen=True)
class ProcessBenchItem:
    """A solution in steps with its first wrong step, 0-based; `first_error` = -1: no error."""

    item_id: str
    subset: str
    question: str
    steps: tuple[str, ...]
    first_error: int
    final_answer_correct: bool

    @property
    def record_id(self) -> str:
        return self.item_id


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """One problem solved by one method. The policy wrote `accepted_tokens`, which are part of a
    solution that was found, and `rejected_tokens`, which are not; `judge_tokens` steered it.
    `forced_chunks` counts chunks kept although they were judged Negative.

    `chunk_scores` are of the chunks of `completion` that were judged. Those of a sample are known
    when it is written, from a judgment of `scoring_tokens`, a cost of methods that use them only.
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

    @property
    def record_id(self) -> str:
        return self.search_id

    @property
    def policy_tokens(self) -> int:
        return self.accepted_tokens + self.rejected_tokens


@dataclasses.dataclass(frozen=True)
class Selection:
    """The response to a problem that was selected of `candidates`, by the mean scores of their
    chunks; without a judge there are no `scores`. `completion` is the policy's own text, `tagged`
    says whether it was asked to mark its chunks."""

    trajectory_id: str
    problem_id: str
    question: str
    completion: str
    tagged: bool
    is_correct: bool
    candidates: tuple[str, ...]
    scores: tuple[float, ...]
    judge_tokens: int

    @property
    def record_id(self) -> str:
        return self.problem_id

    @property
    def score(self) -> float:
        """Of the response selected."""
        return self.scores[self.candidates.index(self.trajectory_id)]


Record = (
    Problem
    | Trajectory
    | SftExample
    | Dialogue
    | Segmentation
    | Rationale
    | PrefixValue
    | ChunkLabel
    | JudgeExample
    | ClassifierExample
    | Judged
    | Judgment
    | LabelledSolution
    | ProcessBenchItem
    | SearchResult
    | Selection
)
R = TypeVar("R", bound=Record)

KIND: dict[type, str] = {
    Problem: "problems",
    Trajectory: "trajectories",
    SftExample: "sft_examples",
    Dialogue: "dialogues",
    Segmentation: "segmentations",
    Rationale: "rationales",
    PrefixValue: "prefix_values",
    ChunkLabel: "chunk_labels",
    JudgeExample: "judge_examples",
    ClassifierExample: "classifier_examples",
    Judgment: "judgments",
    ProcessBenchItem: "processbench_items",
    SearchResult: "search_results",
    Selection: "selections",
}
"""Folder of each record type below `<run_dir>/records`."""


# --- one record <-> one line --------------------------------------------------------------------


def to_json(record: Record) -> str:
    return json.dumps(
        vars(record), ensure_ascii=False, separators=(",", ":"), default=lambda e: e.value
    )


@functools.cache
def _field_types(record_type: type) -> dict[str, Any]:
    return typing.get_type_hints(record_type)


def _decode(value: Any, to: Any) -> Any:
    if isinstance(to, types.UnionType):  # of one type and None
        if value is None:
            return None
        (to,) = {*typing.get_args(to)} - {types.NoneType}
    if typing.get_origin(to) is tuple:
        item_type = typing.get_args(to)[0]
        if not isinstance(value, list):
            raise TypeError(f"expected a list, found {value!r}")
        return tuple(_decode(item, item_type) for item in value)
    if isinstance(to, type) and issubclass(to, enum.Enum):
        return to(value)
    if to is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not to:
        raise TypeError(f"expected {to.__name__}, found {value!r}")
    return value


def from_json(line: str, record_type: type[R]) -> R:
    """Parse one line. Raises UserError naming the missing, unknown or mistyped field."""
    return from_fields(parse_json(line), record_type)


def parse_json(line: str) -> Any:
    """Raises UserError for a line that is no JSON."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"expected one JSON object a line, found {line[:80]!r} ({error.msg} at column "
            f"{error.colno})"
        ) from None


def from_fields(fields: Any, record_type: type[R]) -> R:
    """A record of what `json` made of its line; raises UserError as `from_json` does."""
    types_of = _field_types(record_type)
    if not isinstance(fields, dict) or set(fields) != set(types_of):
        found = sorted(fields) if isinstance(fields, dict) else fields
        raise UserError(
            f"a {record_type.__name__} has the fields {sorted(types_of)}, found {found}"
        )
    decoded = {}
    for name, value in fields.items():
        try:
            decoded[name] = _decode(value, types_of[name])
        except (TypeError, ValueError) as error:
            raise UserError(f"{record_type.__name__}.{name}: {error}") from None
    return record_type(**decoded)


# --- files --------------------------------------------------------------------------------------


def natural_key(record_id: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key in which `p#2` stands before `p#10`."""
    return tuple(
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in re.split(r"(\d+)", record_id)
        if part
    )


def atomic_write(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write one JSONL file, whole or not at all."""
    atomic_write(Path(path), "".join(to_json(record) + "\n" for record in records))


def read_jsonl(path: Path, record_type: type[R], *, growing: bool = False) -> list[R]:
    """One record a line. `growing`: another process may be writing the last line."""
    content = path.read_bytes()
    if growing:
        content = content[: content.rfind(b"\n") + 1]
    records = []
    for number, line in enumerate(io.StringIO(content.decode(), newline="\n"), 1):
        try:
            records.append(from_json(line, record_type))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return records


def read_records(path: str | Path, record_type: type[R]) -> list[R]:
    """Records of one type, from a JSONL file or a finished run directory.

    Raises UserError where the path is missing, the run is not finished, a part's bytes are not
    those the manifest promises, or the run holds no records of the type.
    """
    path = Path(path)
    if path.is_file():
        return read_jsonl(path, record_type)
    records: list[R] = []
    for part in read_parts(path, record_type):
        file = path / part["path"]
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != part["sha256"]:
            raise UserError(f"{file} is missing or is not the file that {path}/manifest.json names")
        records.extend(read_jsonl(file, record_type))
    # In the order in which one writer alone would have left them.
    return sorted(records, key=lambda record: natural_key(record.record_id))


def read_parts(run_dir: str | Path, record_type: type[Record]) -> list[dict[str, Any]]:
    """The manifest's entries for records of one type. Raises UserError where the run is not
    finished, or holds none."""
    manifest = read_manifest(run_dir)
    kind = KIND[record_type]
    if kind not in manifest["records"]:
        held = sorted(manifest["records"]) or "no records"
        raise UserError(
            f"{run_dir} is a run of stage '{manifest['stage']}' and holds {held}, not {kind}"
        )
    return manifest["records"][kind]["parts"]


def read_manifest(run_dir: str | Path) -> dict[str, Any]:
    """The manifest of a finished run. Raises UserError where there is none."""
    run_dir = Path(run_dir)
    manifest = run_dir / "manifest.json"
    if manifest.is_file():
        return json.loads(manifest.read_text(encoding="utf-8"))
    if (run_dir / "config.yaml").is_file():
        raise UserError(
            f"{run_dir} is not finished (it has no manifest.json): resume it with the command that "
            "started it, then run this one again"
        )
    raise UserError(f"expected a file or a finished run directory, found nothing at {run_dir}")


def read_written(run_dir: Path, record_type: type[R]) -> list[R]:
    """What all writers of a run, finished or not, have written so far."""
    parts = sorted((run_dir / "records" / KIND[record_type]).glob("part-*.jsonl"))
    return [record for part in parts for record in read_jsonl(part, record_type, growing=True)]


class RecordWriter(typing.Generic[R]):
    """Appends records of one type to a part of their own, skipping ids that any part has already.

    Part `part` of `num_parts`: those that write at the same time must differ."""

    def __init__(self, run_dir: Path, record_type: type[R], part: int = 0, num_parts: int = 1):
        self.run_dir, self.record_type = run_dir, record_type
        name = f"part-{part:05d}-of-{num_parts:05d}.jsonl"
        self.path = run_dir / "records" / KIND[record_type] / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_half_written_line()
        self.done = {record.record_id for record in self.read()}
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def _drop_half_written_line(self) -> None:
        self.path.touch()
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)

    def read(self) -> list[R]:
        """What has been written so far, by all writers of this type, part by part."""
        return read_written(self.run_dir, self.record_type)

    def append(self, records: Sequence[R]) -> None:
        """Write records whose id is new, and make sure they are on disk."""
        new = [record for record in records if record.record_id not in self.done]
        self._file.write("".join(to_json(record) + "\n" for record in new))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.update(record.record_id for record in new)

    def close(self) -> None:
        self._file.close()


def write_manifest(
    run_dir: Path, stage: str, config_digest: str, record_types: Iterable[type[Record]]
) -> None:
    """Put every part in id order and write the manifest: from here on the run is finished. Parts
    without a record are left out, where others have some."""
    records = {}
    for record_type in record_types:
        kind = KIND[record_type]
        parts = []
        for path in sorted((run_dir / "records" / kind).glob("part-*.jsonl")):
            found = read_jsonl(path, record_type)
            found.sort(key=lambda record: natural_key(record.record_id))
            write_records(path, found)
            parts.append(
                {
                    "path": str(path.relative_to(run_dir)),
                    "count": len(found),
                    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                }
            )
        parts = [part for part in parts if part["count"]] or parts[:1]
        records[kind] = {"count": sum(part["count"] for part in parts), "parts": parts}
    manifest = {"stage": stage, "config_digest": config_digest, "records": records}
    atomic_write(run_dir / "manifest.json", json.dumps(manifest, indent=2) + "\n")

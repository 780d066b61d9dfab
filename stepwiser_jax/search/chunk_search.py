"""Search chunk by chunk: rows of the policy's cache are extended, judged, and go on or branch.

    rows of all problems -> one more chunk each -> judge -> a method says which rows go on

    chunk-reset (StepWiser 4.3)   one row; a rejected chunk is taken back and written anew
    beam search (Snell et al.)    the best n / M of a problem's n rows go on, as M copies each
    DVTS (Beeching et al.)        n / M subtrees of M rows each: the best of each goes on

A kept chunk stays in the cache, a rejected one is a rewind of its row, a branch is a copy. Rows of
finished problems are dropped where a smaller batch holds the rest.

Beam search and DVTS are those of Hugging Face's search-and-learn, but:

1. Rows are ranked by an aggregate of their chunks' scores; equals by their order, in which the
   copies of different rows take turns: a judge that says the same of all keeps them different. The
   reference's `last` is for judges that speak of a solution up to a chunk; one that speaks of the
   chunk alone forgets an error with the next chunk.
2. A beam search ends when n solutions are found, or no row is left. The reference goes on until
   all rows end, and then uses the first n. Where fewer than n / M rows are left, each still has M
   copies.
3. Copies that end without another word, as after a finished answer, are one solution.
4. Of a subtree of DVTS whose best row ends, the rows that ended with it are solutions. In the
   reference all M continuations of a subtree's last step are, finished or not, and a subtree also
   ends where its best row says "boxed{".

With a `token_budget`, of what policy and judge write for a problem, the step in which it is spent
is the last that is judged. The solutions found by then are all there are; where there are none, the
best row alone is written to its end (chunk-reset's one row keeps its chunk, accepted or not). So
it is overrun by one step and the rest of one solution at most, and there always is a solution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter

import jax

from stepwiser_jax.distributed.loading import Loaded
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams, StopReason
from stepwiser_jax.inference.reference_sampler import ReferenceSampler
from stepwiser_jax.judges.stepwiser import ChunkJudgment, Solution, SolutionJudge
from stepwiser_jax.records import Problem, Verdict
from stepwiser_jax.runs.directory import blocks
from stepwiser_jax.search.voting import AGGREGATES
from stepwiser_jax.text.chunks import CHUNK_CLOSE, CHUNK_OPEN, TokenMatcher, strip_tags
from stepwiser_jax.text.prompts import PromptStyle, encode_solve_prompt
from stepwiser_jax.text.tokenizer import Tokenizer, completion_text


@dataclass
class Policy:
    """A model that writes solutions: `engine` whole ones, `sampler` chunk by chunk.

    `params` samples one chunk: its `max_new_tokens` bounds a chunk, its `stop_strings` end it. The
    prompt asks for tags if they do."""

    loaded: Loaded
    engine: Engine
    sampler: ReferenceSampler
    prompt_style: PromptStyle
    params: SamplingParams
    key: jax.Array

    def prompt_ids(self, problem: Problem) -> list[int]:
        return encode_solve_prompt(
            self.loaded.tokenizer,
            problem.question,
            self.prompt_style,
            tags=CHUNK_CLOSE in self.params.stop_strings,
        )

    @cached_property
    def chunk_matcher(self) -> TokenMatcher:
        """Where chunks end."""
        return TokenMatcher.build(self.loaded.tokenizer.token_bytes(), self.params.stop_strings)


@dataclass(eq=False)
class Chunk:
    """What a row wrote in one step. `is_tail`: it stands after the last closed chunk and opens
    none, as an answer may. It has no opinion where it joins another, or where the budget was spent
    before."""

    ids: list[int]
    has_text: bool
    is_tail: bool = False
    opinion: ChunkJudgment | None = None

    @property
    def joins(self) -> bool:
        """Whether it is no chunk of its own, by the rules of `text.chunks.chunk_ends`."""
        return self.is_tail or not self.has_text


@dataclass(frozen=True)
class Path:
    """A solution as far as it is written; `over`: the policy ended it, or another chunk might not
    fit. `aggregate` of its chunks' scores is its own."""

    aggregate: str
    chunks: tuple[Chunk, ...] = ()
    over: bool = False

    @property
    def ids(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.ids]

    @property
    def opinions(self) -> list[ChunkJudgment]:
        return [chunk.opinion for chunk in self.chunks if chunk.opinion is not None]

    @property
    def score(self) -> float:
        """0 where no chunk was judged."""
        scores = [opinion.p_positive for opinion in self.opinions]
        return AGGREGATES[self.aggregate](scores) if scores else 0.0

    @property
    def spoken(self) -> list[Chunk]:
        return [chunk for chunk in self.chunks if chunk.has_text]

    def texts(self, tokenizer: Tokenizer) -> list[str]:
        """Exact texts for a judge. What is no chunk of its own joins the one before it, or the one
        after it where it comes first."""
        parts: list[list[int]] = []
        spoken = False
        for chunk in self.chunks:
            if parts and (chunk.joins or not spoken):
                parts[-1] += chunk.ids
            else:
                parts.append(list(chunk.ids))
            spoken = spoken or chunk.has_text
        return [completion_text(tokenizer, ids) for ids in parts]


@dataclass(frozen=True)
class Row:
    """Where a row of the cache stands. `attempt` tells a problem's rows apart that write the same
    chunk; `source` is the row of the step before (before the first, of the prompts) that it goes on
    from."""

    path: Path
    attempt: int
    source: int

    @property
    def rejected(self) -> bool:
        """Whether the judge said Negative. A judgment that cannot be parsed is no reason to spend
        more tokens."""
        opinion = self.path.chunks[-1].opinion
        return opinion is not None and opinion.verdict is Verdict.NEGATIVE


@dataclass(eq=False)
class Tree:
    """The search of one problem: its rows, and the solutions it has found."""

    problem: Problem
    prompt_ids: list[int]
    rows: list[Row]
    token_budget: int | None = None
    solutions: list[Path] = dataclasses.field(default_factory=list)
    policy_tokens: int = 0
    judge_tokens: int = 0

    @property
    def spent(self) -> bool:
        tokens = self.policy_tokens + self.judge_tokens
        return self.token_budget is not None and tokens >= self.token_budget

    @property
    def accepted_tokens(self) -> int:
        """Of the policy's, those in a solution; a chunk that solutions share counts once."""
        chunks = {chunk for path in self.solutions for chunk in path.chunks}
        return sum(len(chunk.ids) for chunk in chunks)

    def row_id(self, row: Row) -> str:
        """Names the row's noise. Methods share it, so that they differ by what they decide."""
        return f"search/{self.problem.problem_id}/c{len(row.path.chunks)}/a{row.attempt}"

    def go_on(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that are not over; the others are solutions."""
        for path in [row.path for row in rows if row.path.over]:
            if all(path.spoken != found.spoken for found in self.solutions):
                self.solutions.append(path)
        return [row for row in rows if not row.path.over]

    def finish_alone(self, rows: Sequence[Row]) -> list[Row]:
        """When the budget is spent: at most the best row goes on."""
        alive = self.go_on(rows)
        return [] if self.solutions else [dataclasses.replace(best_row(alive), attempt=0)]


Method = Callable[[Tree, list[Row]], list[Row]]
"""After a step: a problem's rows, each with its new chunk, to the rows of the next step."""


# --- methods ------------------------------------------------------------------------------------


def chunk_reset(max_attempts: int) -> Method:
    """A row of one chunk that is kept, or written anew; the last attempt is kept whatever the judge
    says of it."""

    def decide(tree: Tree, rows: list[Row]) -> list[Row]:
        (row,) = rows
        if row.rejected and row.attempt + 1 < max_attempts:
            before = dataclasses.replace(row.path, chunks=row.path.chunks[:-1], over=False)
            return [Row(before, row.attempt + 1, row.source)]
        return tree.go_on([dataclasses.replace(row, attempt=0)])

    return decide


def beam_search(beams: int, width: int) -> Method:
    """The best `beams / width` rows of all go on, as `width` copies each."""

    def decide(tree: Tree, rows: list[Row]) -> list[Row]:
        alive = sorted(tree.go_on(rows), key=lambda row: -row.path.score)
        if len(tree.solutions) >= beams:
            return []
        kept = alive[: beams // width]
        copies = [row for _ in range(width) for row in kept]
        return [dataclasses.replace(row, attempt=k) for k, row in enumerate(copies)]

    return decide


def dvts(beams: int, width: int) -> Method:
    """`beams / width` subtrees, to which rows belong by their attempt's remainder: the best of each
    goes on, as `width` copies. Where that is over, so is the subtree, and each of its rows that is
    over is a solution."""
    subtrees = beams // width

    def decide(tree: Tree, rows: list[Row]) -> list[Row]:
        kept = []
        for subtree in range(subtrees):
            members = [row for row in rows if row.attempt % subtrees == subtree]
            if members and best_row(members).path.over:
                tree.go_on(members)
            elif members:
                kept.append(dataclasses.replace(best_row(members), attempt=subtree))
        return [
            dataclasses.replace(row, attempt=row.attempt + copy * subtrees)
            for copy in range(width)
            for row in kept
        ]

    return decide


def best_row(rows: Sequence[Row]) -> Row:
    """By score, the first of equals."""
    return max(rows, key=lambda row: row.path.score)


# --- the search ---------------------------------------------------------------------------------


def search_chunks(
    policy: Policy,
    judge: SolutionJudge,
    problems: Sequence[Problem],
    method: Method,
    *,
    rows_per_problem: int = 1,
    aggregate: str = "last",
    max_new_tokens: int,
    token_budget: int | None = None,
) -> list[Tree]:
    """Solve the problems, as many at once as the policy has rows for.

    A solution ends where the policy ends it, or when another chunk might not fit into
    `max_new_tokens`. Raises ValueError where the policy has fewer rows than one problem needs.
    """
    at_once = max(1, policy.sampler.shapes.max_rows // rows_per_problem)
    trees: list[Tree] = []
    for part in blocks(problems, at_once):
        together = [
            Tree(
                problem,
                policy.prompt_ids(problem),
                [Row(Path(aggregate), attempt, source=p) for attempt in range(rows_per_problem)],
                token_budget,
            )
            for p, problem in enumerate(part)
        ]
        _search(policy, judge, together, method, max_new_tokens)
        trees += together
    return trees


def _search(
    policy: Policy, judge: SolutionJudge, trees: Sequence[Tree], method: Method, room: int
) -> None:
    """Until no tree has rows."""
    longest = max(len(tree.prompt_ids) for tree in trees)
    state = policy.sampler.prefill([tree.prompt_ids for tree in trees], longest + room)
    while rows := [(tree, row) for tree in trees for row in tree.rows]:
        state = policy.sampler.branch(state, [row.source for _, row in rows])
        lengths_B = [len(tree.prompt_ids) + len(row.path.ids) for tree, row in rows]
        state = policy.sampler.rewind(state, lengths_B)  # a rejected chunk is no part of its path
        row_ids = [tree.row_id(row) for tree, row in rows]
        completions, state = policy.sampler.decode(
            state, policy.params, key=policy.key, row_ids=row_ids
        )
        for b, (tree, row) in enumerate(rows):
            ended = completions[b].stop_reason == StopReason.STOP_ID
            path = extend(policy, row.path, completions[b].tokens.tolist(), ended, room)
            rows[b] = (tree, Row(path, row.attempt, source=b))
        judge_last_chunks(policy, judge, rows, row_ids)
        for tree, grown in groupby(rows, key=itemgetter(0)):
            tree.rows = next_rows(tree, [row for _, row in grown], method)


def extend(policy: Policy, path: Path, ids: list[int], ended: bool, room: int) -> Path:
    """The path with one more chunk; it is over, too, where less than a chunk of `room` is left."""
    written = path.ids + ids
    has_text = bool(strip_tags(completion_text(policy.loaded.tokenizer, ids)).strip())
    chunk = Chunk(ids, has_text, is_tail=bool(path.spoken) and has_tail(policy, written))
    over = ended or len(written) + policy.params.max_new_tokens > room
    return dataclasses.replace(path, chunks=(*path.chunks, chunk), over=over)


def has_tail(policy: Policy, ids: Sequence[int]) -> bool:
    """Whether a solution with tags ends with text that is in no chunk."""
    tokenizer, ends = policy.loaded.tokenizer, policy.chunk_matcher.ends(ids)
    return (
        len(ends) > 0
        and ends[-1] < len(ids)
        and CHUNK_CLOSE in completion_text(tokenizer, ids)
        and CHUNK_OPEN not in completion_text(tokenizer, ids[ends[-1] :])
    )


def judge_last_chunks(
    policy: Policy,
    judge: SolutionJudge,
    rows: Sequence[tuple[Tree, Row]],
    row_ids: Sequence[str],
) -> None:
    """One opinion of every new chunk, while the budget lasts."""
    asked: list[Chunk] = []
    solutions: list[Solution] = []
    for (tree, row), row_id in zip(rows, row_ids, strict=True):
        if not row.path.chunks[-1].joins and not tree.spent:
            texts = row.path.texts(policy.loaded.tokenizer)
            question = tree.problem.question
            asked.append(row.path.chunks[-1])
            solutions.append(Solution(row_id, question, texts, len(texts) - 1, separator=""))
    for chunk, (opinion,) in zip(asked, judge(solutions) if asked else [], strict=True):
        chunk.opinion = opinion


def next_rows(tree: Tree, rows: list[Row], method: Method) -> list[Row]:
    """Counts what the step cost, then decides."""
    for row in rows:
        chunk = row.path.chunks[-1]
        tree.policy_tokens += len(chunk.ids)
        tree.judge_tokens += chunk.opinion.num_tokens if chunk.opinion else 0
    return tree.finish_alone(rows) if tree.spent else method(tree, rows)

"""What a search knows about one problem: its beams, their hypotheses, and what they cost.

SearchState (a problem) > Beam (a row of the policy's cache) > Hypothesis (a solution so far)
    > Chunk (what was written in one step)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from stepwiser_jax.judges.base import ChunkJudgment
from stepwiser_jax.model.flops import NOTHING, Spent
from stepwiser_jax.records import Problem, Verdict
from stepwiser_jax.search.voting import AGGREGATES
from stepwiser_jax.text.tokenizer import Tokenizer, completion_text


@dataclass(eq=False)
class Chunk:
    """The tokens that a beam wrote in one step. A tail is text after the last closed chunk that
    opens none, such as an answer. There is no judgment if the chunk joins another one, or if the
    token budget was spent. `spent` is what it cost the policy."""

    ids: list[int]
    has_text: bool
    is_tail: bool = False
    judgment: ChunkJudgment | None = None
    spent: Spent = NOTHING

    @property
    def joins_another(self) -> bool:
        """Whether it is no chunk by itself, by the rules of `text.chunks.chunk_ends`."""
        return self.is_tail or not self.has_text


@dataclass(frozen=True)
class Hypothesis:
    """A solution as far as it is written. It is finished if the policy ended it, or if another
    chunk might not fit. Its score is an `aggregate` of the scores of its chunks."""

    aggregate: str
    chunks: tuple[Chunk, ...] = ()
    is_finished: bool = False

    @property
    def ids(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.ids]

    @property
    def judgments(self) -> list[ChunkJudgment]:
        return [chunk.judgment for chunk in self.chunks if chunk.judgment is not None]

    @property
    def score(self) -> float:
        """The aggregate score, or 0 if no chunk was judged."""
        scores = [judgment.p_positive for judgment in self.judgments]
        return AGGREGATES[self.aggregate](scores) if scores else 0.0

    @property
    def nonempty_chunks(self) -> list[Chunk]:
        return [chunk for chunk in self.chunks if chunk.has_text]

    def texts(self, tokenizer: Tokenizer) -> list[str]:
        """Returns the exact texts of the chunks for a judge. What is no chunk by itself joins the
        chunk before it, or the one after it at the beginning."""
        parts: list[list[int]] = []
        has_text = False
        for chunk in self.chunks:
            if parts and (chunk.joins_another or not has_text):
                parts[-1] += chunk.ids
            else:
                parts.append(list(chunk.ids))
            has_text = has_text or chunk.has_text
        return [completion_text(tokenizer, ids) for ids in parts]


@dataclass(frozen=True)
class Beam:
    """A row of the policy's cache.

    Attributes:
        hypothesis: What the row has written.
        attempt: Tells apart the beams of a problem that write the same chunk: in chunk-reset the
            number of the retry, in beam search that of the copy; in DVTS, modulo the subtrees, that
            of the subtree.
        source: The row of the previous step (in the first step, the prompt) that this row copies.
            In the beams that a method gets, it is the row itself.
    """

    hypothesis: Hypothesis
    attempt: int
    source: int

    @property
    def is_rejected(self) -> bool:
        """Whether the last chunk is judged Negative. A judgment without a verdict accepts the
        chunk: it is no reason to spend more tokens."""
        judgment = self.hypothesis.chunks[-1].judgment
        return judgment is not None and judgment.verdict is Verdict.NEGATIVE

    def without_last_chunk(self) -> Beam:
        """Returns the beam without its last chunk, which the next step writes anew.

        The retry counts one more `attempt`. That is part of the row's id (`SearchState.row_id`), of
        which `TokenSampler` makes the row's noise, so the retry gets other noise. The next step of
        `chunk_search` cuts the row in the cache to the tokens that are left here
        (`ChunkSampler.rewind`).
        """
        shorter = replace(self.hypothesis, chunks=self.hypothesis.chunks[:-1], is_finished=False)
        return Beam(shorter, self.attempt + 1, self.source)

    def keep(self, attempt: int) -> Beam:
        """Returns the beam that writes the next chunk after this one."""
        return replace(self, attempt=attempt)


@dataclass(eq=False)
class SearchState:
    """The search for solutions of one problem, and what policy and judge spent on it. The chunks
    before each judged one are in `judged_histories`. With one beam, `attempts` are the beams after
    each step: all chunks that were written, kept or not."""

    problem: Problem
    prompt_ids: list[int]
    beams: list[Beam]
    token_budget: int | None = None
    solutions: list[Hypothesis] = field(default_factory=list)
    policy: Spent = NOTHING
    judge: Spent = NOTHING
    judged_histories: set[tuple[Chunk, ...]] = field(default_factory=set)
    attempts: list[Beam] = field(default_factory=list)

    @property
    def policy_tokens(self) -> int:
        """What the policy wrote."""
        return self.policy.generated

    @property
    def judge_tokens(self) -> int:
        """What the judge wrote."""
        return self.judge.generated

    @property
    def is_budget_spent(self) -> bool:
        tokens = self.policy_tokens + self.judge_tokens
        return self.token_budget is not None and tokens >= self.token_budget

    @property
    def accepted_tokens(self) -> int:
        """The policy's tokens in solutions. A chunk that solutions share counts once."""
        chunks = {chunk for solution in self.solutions for chunk in solution.chunks}
        return sum(len(chunk.ids) for chunk in chunks)

    def row_id(self, beam: Beam) -> str:
        """Returns the id that decides the noise of the next chunk. All methods use the same ids, so
        that they differ only in what they decide."""
        return f"search/{self.problem.problem_id}/c{len(beam.hypothesis.chunks)}/a{beam.attempt}"

    def collect_finished(self, beams: Sequence[Beam]) -> list[Beam]:
        """Adds finished hypotheses to the solutions, and returns the other beams. Hypotheses whose
        chunks are the same are one solution."""
        for found in [beam.hypothesis for beam in beams if beam.hypothesis.is_finished]:
            chunks = found.nonempty_chunks
            if all(chunks != solution.nonempty_chunks for solution in self.solutions):
                self.solutions.append(found)
        return [beam for beam in beams if not beam.hypothesis.is_finished]

    def finish_best(self, beams: Sequence[Beam]) -> list[Beam]:
        """Returns the beams that go on when the budget is spent: the best one if there is no
        solution yet, else none."""
        unfinished = self.collect_finished(beams)
        return [] if self.solutions else [best_beam(unfinished).keep(attempt=0)]


def best_beam(beams: Sequence[Beam]) -> Beam:
    """Returns the beam with the highest score, the first of equals."""
    return max(beams, key=lambda beam: beam.hypothesis.score)

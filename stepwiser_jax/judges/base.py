"""The interface and the results that all judges of chunks share.

solutions -> the judge that `judges.load.load_judge` made -> a ChunkJudgment of every chunk
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol

from stepwiser_jax.evaluation.verdicts import majority_verdict
from stepwiser_jax.model.flops import NOTHING, Spent
from stepwiser_jax.records import BenchmarkItem, Verdict


@dataclass(frozen=True)
class Solution:
    """A solution in chunks, to be judged from chunk `start` on; the chunks before it are history.
    `separator` joins chunks: blank lines for the steps of benchmarks, nothing for exact texts.
    `is_begun` says that the judgment of another solution with the same question and history counts
    the reading of both."""

    solution_id: str
    question: str
    chunks: Sequence[str]
    start: int = 0
    separator: str = "\n\n"
    is_begun: bool = False

    @classmethod
    def of_item(cls, item: BenchmarkItem) -> Solution:
        return cls(item.item_id, item.question, item.steps)


@dataclass(frozen=True)
class ChunkJudgment:
    """A judge's text about one chunk and its verdict. `p_positive` is the chunk's score, the
    probability that it is right. `num_tokens` is what the judge generated for it, `read_tokens`
    what it read, and `flops` are those of both."""

    completion: str
    verdict: Verdict
    p_positive: float
    num_tokens: int
    read_tokens: int = 0
    flops: float = 0.0

    @classmethod
    def of_verdict(
        cls,
        completion: str,
        verdict: Verdict,
        num_tokens: int,
        read_tokens: int = 0,
        flops: float = 0.0,
    ) -> ChunkJudgment:
        """Returns a judgment whose probability is not known. It is 1 for Positive, 0 for Negative,
        and 1/2 without a verdict."""
        certain = {Verdict.POSITIVE: 1.0, Verdict.NEGATIVE: 0.0}
        p_positive = certain.get(verdict, 0.5)
        return cls(completion, verdict, p_positive, num_tokens, read_tokens, flops)

    @classmethod
    def of_votes(cls, votes: Sequence[ChunkJudgment]) -> ChunkJudgment:
        """Returns the majority's verdict, the mean score, and the text of the first vote."""
        return cls(
            votes[0].completion,
            majority_verdict([vote.verdict for vote in votes]),
            sum(vote.p_positive for vote in votes) / len(votes),
            *astuple(spent_on(votes)),
        )

    @property
    def spent(self) -> Spent:
        return Spent(self.num_tokens, self.read_tokens, self.flops)


def spent_on(judgments: Iterable[ChunkJudgment]) -> Spent:
    """Returns what a judge spent on judgments together."""
    return sum((judgment.spent for judgment in judgments), NOTHING)


@dataclass(frozen=True)
class SolutionJudgment:
    """The judgments of all chunks of a solution. A judge such as ThinkPRM adds one of the
    `whole`."""

    chunks: list[ChunkJudgment]
    whole: ChunkJudgment | None = None


class Judge(Protocol):
    """A judge of chunks, of any kind. `search`, `select-responses` and `refine` call it, and
    `evaluate` calls `sample`. `judge_id` names its model in records."""

    judge_id: str

    @property
    def compiled_shapes(self) -> Counter[str]:
        """How often each compiled program ran, by its shape."""
        ...

    def measured(self, made: int) -> dict[str, Any]:
        """Returns the judge's entries of summary.json. `made` is the run's number of records."""
        ...

    def check_room(self, problem_id: str, question: str, num_tokens: int) -> None:
        """Raises UserError, naming the problem, if the judge has no room for a solution of
        `num_tokens` tokens of the policy. It checks what is known before the solution exists."""
        ...

    def check_lengths(self, solutions: Sequence[Solution]) -> None:
        """Raises UserError, naming the solution, if the judge has no room for one."""
        ...

    def __call__(self, solutions: Sequence[Solution]) -> list[list[ChunkJudgment]]:
        """Returns, per solution, one judgment of each chunk from `start` on, in order."""
        ...

    def sample(
        self,
        solutions: Sequence[Solution],
        suffixes: Sequence[str],
        *,
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> list[list[SolutionJudgment]]:
        """Returns one judgment of each solution for each suffix, [solution][suffix]. A suffix is
        part of the row ids, so that each draws different noise. Temperature 0 is greedy."""
        ...


def vote_suffixes(votes: int) -> list[str]:
    """Returns the suffixes that tell the sampled judgments of a solution apart."""
    return [f"/vote{k}" for k in range(votes)]

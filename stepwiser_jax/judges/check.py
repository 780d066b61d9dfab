"""Checks solutions that nobody has labelled: a judge, asked as it was trained to be.

    question, steps -> chunks as the judge knows them -> its judgments, greedy or votes
                    -> a verdict on every chunk, and the first error

The judge is asked, and its judgments are counted, as `evaluate` does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stepwiser_jax.config import Judge as JudgeSettings
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.judgments import VotingRule, own_threshold, passes_of
from stepwiser_jax.evaluation.verdicts import first_predicted_error
from stepwiser_jax.inference.params import Completion
from stepwiser_jax.judges.base import ChunkJudgment, Judge, Solution, SolutionJudgment
from stepwiser_jax.judges.load import load_judge
from stepwiser_jax.judges.settings import judge_settings
from stepwiser_jax.judges.stepwiser import ChunkJudge
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.text.chunking import cut
from stepwiser_jax.text.chunks import strip_tags, tagged
from stepwiser_jax.text.tokenizer import Tokenizer, unknown_words

PACKAGED = Path(__file__).with_name("arithmetic")
"""The judge that comes with the package: that of the quickstart, for the embedded task."""


Reader = Callable[[int, int, np.ndarray | ChunkJudgment], None]
"""Is told of a judgment while the others go on: the number of its solution, that of its chunk, and
the tokens so far, or at the end the judgment."""


@dataclass(frozen=True)
class CheckedSolution:
    """What a judge says of a solution.

    Attributes:
        solution: The question and the chunks, without tags.
        chunks: The judgment of each chunk. Its `verdict` is that of the judge's threshold if it
            has one, and with votes that of all of them; `completion` is the first vote's reasoning.
        whole: The judgment of the whole solution, which only some judges give (ThinkPRM).
        first_error: The index of the first chunk that is not accepted, -1 if there is none. A chunk
            without a verdict counts as `evaluate` counts it.
        unknown_words: Words that the judge's tokenizer does not know.
    """

    solution: Solution
    chunks: tuple[ChunkJudgment, ...]
    whole: ChunkJudgment | None
    first_error: int
    unknown_words: tuple[str, ...]

    def to_fields(self) -> dict[str, Any]:
        """Returns the result as `stepwiser check --json` prints it."""
        texts = zip(self.solution.chunks, self.chunks, strict=True)
        return {
            "id": self.solution.solution_id,
            "question": self.solution.question,
            "chunks": [{"text": text, **judgment_fields(judgment)} for text, judgment in texts],
            "whole": None if self.whole is None else judgment_fields(self.whole),
            "first_error": self.first_error,
            "unknown_words": list(self.unknown_words),
        }


def judgment_fields(judgment: ChunkJudgment) -> dict[str, Any]:
    """Returns a judgment as `stepwiser check --json` prints it."""
    return {
        "verdict": judgment.verdict.value,
        "p_positive": judgment.p_positive,
        "reasoning": judgment.completion,
    }


class Checker:
    """A judge that is ready to be asked about solutions of one's own.

    >>> from stepwiser_jax import Checker
    >>> check = Checker.load()  # or of a run of yours: Checker.load("quickstart/judge")
    >>> steps = ["5 * 3 = 5 ; 5 - 7 = 8", "8 * 6 = 8 ; 8 - 2 = 1"]
    >>> found = check("start 5 ; * 3 - 7 ; * 6 - 2 ?", steps)
    >>> [chunk.verdict.value for chunk in found.chunks], found.first_error
    (['Positive', 'Negative'], 1)
    >>> found.chunks[1].completion
    '8 * 6 = 8 8 same ; 8 - 2 = 6 1 diff | \\\\boxed{ Negative }'
    """

    def __init__(self, judge: Judge, settings: JudgeSettings, tokenizer: Tokenizer):
        self.judge, self.settings, self.tokenizer = judge, settings, tokenizer

    @classmethod
    def load(
        cls, path: str | Path = PACKAGED, overrides: Sequence[str] = (), *, seed: int = 0
    ) -> Checker:
        """Returns the judge of a run, or an exported one, on the first device.

        Args:
            path: See `judges.settings.judge_settings`. By default the judge of the package.
            overrides: Settings to change, such as `judge.votes=4`.
            seed: Decides what is sampled.

        Raises:
            UserError: There is no judge at `path`.
        """
        settings = judge_settings(path, overrides)
        mesh = make_mesh(devices=jax.devices()[:1])
        judge = load_judge(settings, mesh=mesh, seed=seed, name="check")
        return cls(judge, settings, load_tokenizer_of(settings.path, **settings.asked))

    def __call__(self, question: str, steps: Sequence[str] | str) -> CheckedSolution:
        """Returns what the judge says of one solution. A text instead of steps is cut at its tags,
        or else at blank lines."""
        chunks = cut(steps) if isinstance(steps, str) else tuple(steps)
        (found,) = self.check([Solution("solution", question, chunks)])
        return found

    def check(
        self, solutions: Sequence[Solution], reader: Reader | None = None
    ) -> list[CheckedSolution]:
        """Returns what the judge says of solutions, which it judges together. The reader hears of
        chunks before that if the judge is StepWiser's. Raises UserError if one is empty or too
        long."""
        solutions = [without_tags(solution) for solution in solutions]
        asked = [self.asked(solution) for solution in solutions]
        suffixes, drawing = passes_of(self.settings)[-1]
        with self._read_by(reader, asked, suffixes):
            found = self.judge.sample(asked, suffixes, **drawing)
        return [self._counted(x, votes) for x, votes in zip(solutions, found, strict=True)]

    @contextmanager
    def _read_by(
        self, reader: Reader | None, asked: Sequence[Solution], suffixes: Sequence[str]
    ) -> Iterator[None]:
        """Tells the reader of the engine's rows while the context lasts. Of several votes it sees
        the first one being written."""
        if reader is None or not isinstance(self.judge, ChunkJudge):
            yield
            return
        judge, engine = self.judge, self.judge.writer.engine
        places = {
            row_id: (i, j, k)
            for i, solution in enumerate(asked)
            for j in range(len(solution.chunks))
            for k, row_id in enumerate(judge.row_ids(solution, j, suffixes))
        }
        votes: dict[tuple[int, int], dict[int, ChunkJudgment]] = {}

        def watch(running: Mapping[str, np.ndarray], ended: Sequence[Completion]) -> None:
            for row_id, tokens in running.items():
                i, j, k = places[row_id]
                if k == 0:
                    reader(i, j, tokens)
            for completion in ended:
                i, j, k = places[completion.row_id]
                of_chunk = votes.setdefault((i, j), {})
                of_chunk[k] = judge.read(completion)
                if len(of_chunk) == len(suffixes):
                    reader(i, j, self._of_votes([of_chunk[k] for k in sorted(of_chunk)]))

        engine.watch = watch
        try:
            yield
        finally:
            engine.watch = None

    def asked(self, solution: Solution) -> Solution:
        """Returns a solution without tags as the judge is asked about it: with tags if it was
        trained on them. Raises UserError if it is too long."""
        if getattr(self.settings, "prompt_style", None) == "bare":
            solution = replace(solution, chunks=tuple(map(tagged, solution.chunks)))
        try:
            self.judge.check_lengths([solution])
        except UserError as error:
            raise UserError(
                f"{error}. For the judge's settings: --set judge.engine.buckets=[N] and the like"
            ) from None
        return solution

    @property
    def _rule(self) -> VotingRule:
        return VotingRule(own_threshold(self.settings))

    def _of_votes(self, votes: Sequence[ChunkJudgment]) -> ChunkJudgment:
        """Returns the judgment that all votes on a chunk make."""
        return replace(ChunkJudgment.of_votes(votes), verdict=self._rule.verdict(votes))

    def _counted(self, solution: Solution, votes: Sequence[SolutionJudgment]) -> CheckedSolution:
        of_chunks = zip(*(vote.chunks for vote in votes), strict=True)
        chunks = tuple(map(self._of_votes, of_chunks))
        wholes = [vote.whole for vote in votes if vote.whole is not None]
        unparsed_as = self._rule.unparsed_as
        first = first_predicted_error([x.verdict for x in chunks], unparsed_as=unparsed_as)
        text = " ".join([solution.question, *solution.chunks])
        return CheckedSolution(
            solution,
            chunks,
            ChunkJudgment.of_votes(wholes) if wholes else None,
            first,
            unknown_words(self.tokenizer, text),
        )


def without_tags(solution: Solution) -> Solution:
    """Returns a solution without tags and outer white space. Raises UserError if there is no
    question, no chunk, or an empty one."""
    name = solution.solution_id
    if not solution.question.strip():
        raise UserError(f"{name}: expected a problem, found an empty text")
    if not solution.chunks:
        raise UserError(f"{name}: expected a solution of at least one chunk, found none")
    chunks = tuple(strip_tags(chunk).strip() for chunk in solution.chunks)
    if "" in chunks:
        raise UserError(
            f"{name}: expected text in every chunk, found none in chunk {chunks.index('')}"
        )
    return replace(solution, question=solution.question.strip(), chunks=chunks)

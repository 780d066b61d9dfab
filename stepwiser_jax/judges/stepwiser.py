"""Opinions of the chunks of solutions: what judges have in common, and the one of StepWiser 3.3.

    Solution -> one prompt a chunk -> judgments of all chunks together -> Opinions

A classifier (`judges.classifier`) gives the same opinions from one pass over a whole solution.
`judges.load` makes either of its settings.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax

from stepwiser_jax.distributed.loading import Loaded
from stepwiser_jax.evaluation.verdicts import majority_verdict
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.records import BenchmarkItem, Judgment, Verdict
from stepwiser_jax.rl.rewards import judge_reward
from stepwiser_jax.text.prompts import JudgePromptStyle, encode_judge_prompt, parse_verdict
from stepwiser_jax.text.tokenizer import completion_text


@dataclasses.dataclass(frozen=True)
class Solution:
    """Chunks to judge: those from index `start` on; the ones before it are their history. Between
    the steps of others' solutions stand blank lines, between exact texts of chunks nothing."""

    solution_id: str
    question: str
    chunks: Sequence[str]
    start: int = 0
    separator: str = "\n\n"

    @classmethod
    def of_item(cls, item: BenchmarkItem) -> Solution:
        return cls(item.item_id, item.question, item.steps)


@dataclasses.dataclass(frozen=True)
class ChunkJudgment:
    """What a judge said of one chunk, in `num_tokens` of its own. `p_positive` is 1 or 0 for a
    written verdict, Positive or not; a judge that knows how sure it is says more."""

    completion: str
    verdict: Verdict
    p_positive: float
    num_tokens: int

    @classmethod
    def of_votes(cls, votes: Sequence[ChunkJudgment]) -> ChunkJudgment:
        """The majority's, in the words of the first; `p_positive` is the share of Positive."""
        return cls(
            votes[0].completion,
            majority_verdict([vote.verdict for vote in votes]),
            sum(vote.p_positive for vote in votes) / len(votes),
            sum(vote.num_tokens for vote in votes),
        )


class SolutionJudge(Protocol):
    """What search and selection ask: one opinion of every chunk to be judged, in order."""

    loaded: Loaded

    @property
    def compiled_shapes(self) -> Counter[str]:
        """Programs by their shape, and how often each ran."""
        ...

    def check_room(self, problem_id: str, question: str, num_tokens: int) -> None:
        """Raises UserError, naming the problem, where a solution of so many of the policy's tokens
        has no room: as far as that is known before there is one."""
        ...

    def check_lengths(self, solutions: Sequence[Solution]) -> None:
        """Raises UserError, naming it, for a solution that the judge has no room for."""
        ...

    def __call__(self, solutions: Sequence[Solution]) -> list[list[ChunkJudgment]]: ...


def judgment_of(
    item: BenchmarkItem, step: int, opinion: ChunkJudgment, judge_id: str, suffix: str = ""
) -> Judgment:
    """An opinion as the record `<item>/<step><suffix>`, with its reward by the item's label."""
    return Judgment(
        example_id=f"{item.item_id}/{step}{suffix}",
        judge_id=judge_id,
        completion=opinion.completion,
        verdict=opinion.verdict,
        p_positive=opinion.p_positive,
        reward=judge_reward(opinion.verdict, item.is_right(step)),
    )


def in_words(item: BenchmarkItem, step: int, judgment: Judgment) -> dict[str, str]:
    """Returns a judgment of a step beside what it is about, and the truth."""
    truth = Verdict.POSITIVE if item.is_right(step) else Verdict.NEGATIVE
    return {
        "question": item.question,
        "history": " ".join(item.steps[:step]),
        "step": item.steps[step],
        "judge": judgment.completion,
        "verdict": judgment.verdict.value,
        "truth": truth.value,
    }


def a_right_and_a_wrong_one(
    items: Sequence[BenchmarkItem], judgments: Mapping[str, Judgment]
) -> list[dict[str, str]]:
    """Returns the first right and the first wrong of the greedy judgments, in words; first errors
    come before right steps."""
    errors = [(item, item.first_error) for item in items if item.first_error >= 0]
    steps = errors + [(item, 0) for item in items if item.first_error != 0]
    found: dict[bool, dict[str, str]] = {}
    for item, step in steps:
        words = in_words(item, step, judgments[f"{item.item_id}/{step}"])
        found.setdefault(words["verdict"] == words["truth"], words)
    return [found[is_right] for is_right in (True, False) if is_right in found]


class ChunkJudge:
    """Reasons about each chunk before its verdict. Random draws are named `<name>/<solution>/...`,
    so that judges of different stages draw differently."""

    def __init__(
        self,
        loaded: Loaded,
        engine: Engine,
        *,
        name: str,
        prompt_style: JudgePromptStyle,
        max_new_tokens: int,
        key: jax.Array,
        votes: int = 0,
        vote_temperature: float = 1.0,
    ):
        self.loaded, self.engine, self.name, self.key = loaded, engine, name, key
        self.prompt_style: JudgePromptStyle = prompt_style
        self.max_new_tokens = max_new_tokens
        self.votes, self.vote_temperature = votes, vote_temperature

    @property
    def compiled_shapes(self) -> Counter[str]:
        return self.engine.compiled_shapes

    def prompt_ids(self, solution: Solution, j: int) -> list[int]:
        """What is asked about chunk j."""
        separator = " " if self.prompt_style == "bare" else solution.separator
        return encode_judge_prompt(
            self.loaded.tokenizer,
            solution.question,
            separator.join(solution.chunks[:j]),
            solution.chunks[j],
            self.prompt_style,
        )

    def check_room(self, problem_id: str, question: str, num_tokens: int) -> None:
        """Raises UserError where the context might not hold a judgment of the last chunk, whose
        prompt is all of the solution. Where the policy's tokenizer is another one, a solution may
        have more tokens here than it counted there."""
        empty = self.prompt_ids(Solution(problem_id, question, [""]), 0)
        name = f"the judge of {problem_id}, with a solution of {num_tokens} tokens"
        self.engine.check_length(len(empty), num_tokens + self.max_new_tokens, name)

    def check_lengths(self, solutions: Sequence[Solution]) -> None:
        """Raises UserError where the context does not hold a judgment of the last chunk."""
        for solution in solutions:
            last = len(solution.chunks) - 1
            self.engine.check_length(
                len(self.prompt_ids(solution, last)),
                self.max_new_tokens,
                f"{solution.solution_id}, step {last}",
            )

    def __call__(self, solutions: Sequence[Solution]) -> list[list[ChunkJudgment]]:
        """The greedy judgment of every chunk, or what the majority of its `votes` says."""
        if not self.votes:
            return [opinions for (opinions,) in self.sample(solutions, 0.0, ("",))]
        suffixes = [f"/vote{k}" for k in range(self.votes)]
        return [
            [ChunkJudgment.of_votes(votes) for votes in zip(*found, strict=True)]
            for found in self.sample(solutions, self.vote_temperature, suffixes)
        ]

    def sample(
        self,
        solutions: Sequence[Solution],
        temperature: float,
        suffixes: Sequence[str],
        *,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> list[list[list[ChunkJudgment]]]:
        """Of every solution, for each of `suffixes`, which tell the draws of one chunk apart: one
        judgment of every chunk."""
        asked = [(s, j) for s, x in enumerate(solutions) for j in range(x.start, len(x.chunks))]
        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.loaded.tokenizer.eos_ids,
        )
        output = self.engine.generate(
            [self.prompt_ids(solutions[s], j) for s, j in asked],
            params,
            key=self.key,
            row_ids=[
                f"{self.name}/{solutions[s].solution_id}/{j}{suffix}"
                for s, j in asked
                for suffix in suffixes
            ],
            group_size=len(suffixes),
        )
        found: list[list[list[ChunkJudgment]]] = [[[] for _ in suffixes] for _ in solutions]
        for row, (s, _) in enumerate(asked):
            for k in range(len(suffixes)):
                ids = output.ids(row * len(suffixes) + k)
                text = completion_text(self.loaded.tokenizer, ids)
                verdict = parse_verdict(text)
                p_positive = float(verdict is Verdict.POSITIVE)
                found[s][k].append(ChunkJudgment(text, verdict, p_positive, len(ids)))
        return found

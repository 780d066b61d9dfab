"""StepWiser's judge (3.3): it reasons about one chunk, then writes its verdict in a box.

    solution -> one prompt per chunk -> all judgments sampled together -> verdicts, P(Positive)

The prompts, and how a verdict is read, are in `text.prompts`. P(Positive) is that of the token with
which the written verdict begins (`text.verdict_tokens`), by the model itself, whatever temperature
and truncation it was sampled with. If the verdict is written in other tokens, it is 1 or 0, and if
there is none, 1/2. Both are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace
from itertools import islice
from typing import Any

from stepwiser_jax.evaluation.verdicts import verdict_at
from stepwiser_jax.inference.params import Completion, probabilities
from stepwiser_jax.judges.base import ChunkJudgment, Solution, SolutionJudgment
from stepwiser_jax.judges.writer import Writer, judge_by_votes
from stepwiser_jax.text.prompts import encode_judge_prompt, parse_verdict
from stepwiser_jax.text.tokenizer import completion_text
from stepwiser_jax.text.verdict_tokens import VerdictTokens


class ChunkJudge:
    """A judge that sees every chunk by itself. With a `threshold` a chunk is wrong if P(Positive)
    is below it, whatever verdict is written.

    Problem and history are not read again for the next chunk: the prompts of a call share what they
    can, and also with those of the call before, if solutions go on from there (`start` above 0).
    What a judgment counts depends on its solution alone, see `known_ids`.
    """

    def __init__(self, writer: Writer, *, threshold: float | None = None):
        """Raises UserError if the vocabulary cannot spell the verdicts."""
        self.writer, self.judge_id = writer, writer.loaded.model_id
        self.compiled_shapes = writer.engine.compiled_shapes
        self.verdict_tokens = VerdictTokens.of(writer.tokenizer, writer.prompt_style)
        self.threshold, self.in_other_tokens = threshold, 0

    def measured(self, made: int) -> dict[str, Any]:
        """Returns what a judgment costs, and the number of verdicts so far, in this process, whose
        probability is not known."""
        return self.writer.measured(made) | {"verdicts_in_other_tokens": self.in_other_tokens}

    def name(self, solution: Solution, j: int) -> str:
        """Returns the name of the prompt about chunk j."""
        return f"{solution.solution_id}/{j}"

    def prompt_ids(self, solution: Solution, j: int) -> list[int]:
        """Returns the prompt about chunk j."""
        style = self.writer.prompt_style
        history = (" " if style == "bare" else solution.separator).join(solution.chunks[:j])
        return encode_judge_prompt(
            self.writer.tokenizer, solution.question, history, solution.chunks[j], style
        )

    def known_ids(self, solution: Solution, j: int) -> list[int]:
        """Returns the prompt that was read before the one about chunk j: that about the chunk
        before, or about another chunk in its place."""
        if j == solution.start and solution.is_begun:
            return self.prompt_ids(replace(solution, chunks=[*solution.chunks[:j], ""]), j)
        return self.prompt_ids(solution, j - 1) if j else []

    def check_room(self, problem_id: str, question: str, num_tokens: int) -> None:
        """Raises UserError if the context may not hold a judgment of the last chunk, whose prompt
        has the whole solution. If the policy has another tokenizer, the solution may have more than
        `num_tokens` tokens here."""
        empty = self.prompt_ids(Solution(problem_id, question, [""]), 0)
        self.writer.check_room(empty, problem_id, num_tokens)

    def check_lengths(self, solutions: Sequence[Solution]) -> None:
        """Raises UserError if the context does not hold a judgment of the last chunk."""
        for solution in solutions:
            last = len(solution.chunks) - 1
            name = f"{solution.solution_id}, step {last}"
            self.writer.check_length(self.prompt_ids(solution, last), name)

    def __call__(self, solutions: Sequence[Solution]) -> list[list[ChunkJudgment]]:
        """Returns one judgment of every chunk, see `judge_by_votes`. The threshold decides between
        the two verdicts; it gives none where there is none."""
        found = judge_by_votes(self, self.writer, solutions)
        if self.threshold is None:
            return found
        return [
            [
                replace(judgment, verdict=verdict_at(self.threshold, judgment.p_positive))
                if judgment.verdict.is_given
                else judgment
                for judgment in of_one
            ]
            for of_one in found
        ]

    def sample(
        self, solutions: Sequence[Solution], suffixes: Sequence[str], **sampling: Any
    ) -> list[list[SolutionJudgment]]:
        """Returns one judgment of every chunk for each suffix, with the verdict that is written,
        see `Judge`."""
        chunks = [(x, j) for x in solutions for j in range(x.start, len(x.chunks))]
        names = [self.name(x, j) for x, j in chunks]
        prompts = [self.prompt_ids(x, j) for x, j in chunks]
        known = [self.known_ids(x, j) for x, j in chunks]
        cache = self.writer.cache_for(solutions)
        params = replace(self.writer.params(**sampling), compared=self.verdict_tokens.pair)
        written = iter(self.writer.write(names, prompts, suffixes, params, cache, known))
        found = []
        for x in solutions:
            of_chunks = list(islice(written, len(x.chunks) - x.start))
            found.append(
                [
                    SolutionJudgment([self._read(*texts[k]) for texts in of_chunks])
                    for k in range(len(suffixes))
                ]
            )
        return found

    def row_ids(self, solution: Solution, j: int, suffixes: Sequence[str]) -> list[str]:
        """Returns the ids of the engine's rows that judge chunk j."""
        return self.writer.row_ids([self.name(solution, j)], suffixes)

    def read(self, completion: Completion) -> ChunkJudgment:
        """Returns the judgment that one of these rows has written."""
        text = completion_text(self.writer.tokenizer, completion.tokens)
        return read_judgment(self.verdict_tokens, text, completion)[0]

    def _read(self, text: str, completion: Completion) -> ChunkJudgment:
        judgment, is_known = read_judgment(self.verdict_tokens, text, completion)
        self.in_other_tokens += judgment.verdict.is_given and not is_known
        return judgment


def read_judgment(
    verdict_tokens: VerdictTokens, text: str, completion: Completion
) -> tuple[ChunkJudgment, bool]:
    """Returns the judgment that a completion is, and whether its probability is known. The
    completion has the log-odds of `verdict_tokens.pair`."""
    tokens, verdict = completion.tokens.tolist(), parse_verdict(text)
    spent = astuple(completion.spent)
    place = verdict_tokens.place(tokens, verdict)
    if place is None:
        return ChunkJudgment.of_verdict(text, verdict, *spent), False
    assert completion.log_odds is not None
    (p_positive,) = probabilities(completion.log_odds[place : place + 1])
    return ChunkJudgment(text, verdict, p_positive, *spent), True

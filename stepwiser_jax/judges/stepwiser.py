"""StepWiser's judge (3.3): it reasons about one chunk, then writes its verdict in a box.

    solution -> one prompt per chunk -> all judgments sampled together -> verdicts

The prompts, and how a verdict is read, are in `text.prompts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from itertools import islice
from typing import Any

from stepwiser_jax.inference.params import Completion
from stepwiser_jax.inference.prefix_cache import PrefixCache
from stepwiser_jax.judges.base import ChunkJudgment, Solution, SolutionJudgment
from stepwiser_jax.judges.writer import Writer, judge_by_votes
from stepwiser_jax.text.prompts import encode_judge_prompt, parse_verdict


class ChunkJudge:
    """A judge that sees every chunk by itself. Names of prompts are `<solution>/<chunk>`.

    Problem and history are not read again for the next chunk: the prompts of a call share what they
    can, and also with those of the call before, if solutions go on from there (`start` above 0).
    """

    def __init__(self, writer: Writer):
        self.writer, self.judge_id = writer, writer.loaded.model_id
        self.cache = PrefixCache()
        self.compiled_shapes, self.measured = writer.engine.compiled_shapes, writer.measured

    def prompt_ids(self, solution: Solution, j: int) -> list[int]:
        """Returns the prompt about chunk j."""
        style = self.writer.prompt_style
        history = (" " if style == "bare" else solution.separator).join(solution.chunks[:j])
        return encode_judge_prompt(
            self.writer.tokenizer, solution.question, history, solution.chunks[j], style
        )

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
        """Returns one judgment of every chunk, see `judge_by_votes`."""
        return judge_by_votes(self, self.writer, solutions)

    def sample(
        self, solutions: Sequence[Solution], suffixes: Sequence[str], **sampling: Any
    ) -> list[list[SolutionJudgment]]:
        """Returns one judgment of every chunk for each suffix, see `Judge`."""
        chunks = [(x, j) for x in solutions for j in range(x.start, len(x.chunks))]
        names = [f"{x.solution_id}/{j}" for x, j in chunks]
        prompts = [self.prompt_ids(x, j) for x, j in chunks]
        if all(x.start == 0 for x in solutions):
            self.cache = PrefixCache()  # so a run that was stopped goes on with the same numbers
        params = self.writer.params(**sampling)
        written = iter(self.writer.write(names, prompts, suffixes, params, self.cache))
        found = []
        for x in solutions:
            of_chunks = list(islice(written, len(x.chunks) - x.start))
            found.append(
                [
                    SolutionJudgment([read_judgment(*texts[k]) for texts in of_chunks])
                    for k in range(len(suffixes))
                ]
            )
        return found


def read_judgment(text: str, completion: Completion) -> ChunkJudgment:
    """Returns the judgment that a completion is."""
    return ChunkJudgment.of_verdict(text, parse_verdict(text), *astuple(completion.spent))

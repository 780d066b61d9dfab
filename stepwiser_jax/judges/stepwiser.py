"""StepWiser's judge (3.3): it reasons about one chunk, then writes its verdict in a box.

    solution -> one prompt per chunk -> all judgments sampled together -> verdicts

The prompts, and how a verdict is read, are in `text.prompts`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax

from stepwiser_jax.distributed.loading import Loaded
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import Completion, SamplingParams
from stepwiser_jax.judges.base import ChunkJudgment, Solution, SolutionJudgment, judge_by_votes
from stepwiser_jax.runs.directory import per_item
from stepwiser_jax.text.prompts import JudgePromptStyle, encode_judge_prompt, parse_verdict
from stepwiser_jax.text.tokenizer import completion_text


class ChunkJudge:
    """A judge that sees every chunk by itself. Row ids are `<name>/<solution>/<chunk><suffix>`, so
    that judges of different stages draw different noise."""

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
        self.judge_id, self.tokenizer = loaded.model_id, loaded.tokenizer
        self.engine, self.name, self.key = engine, name, key
        self.prompt_style: JudgePromptStyle = prompt_style
        self.max_new_tokens = max_new_tokens
        self.votes, self.vote_temperature = votes, vote_temperature

    @property
    def compiled_shapes(self) -> Counter[str]:
        return self.engine.compiled_shapes

    def measured(self, made: int) -> dict[str, Any]:
        """Returns tokens per judgment."""
        return {"tokens_per_judgment": per_item(self.engine.sampled_tokens, made)}

    def prompt_ids(self, solution: Solution, j: int) -> list[int]:
        """Returns the prompt about chunk j."""
        separator = " " if self.prompt_style == "bare" else solution.separator
        return encode_judge_prompt(
            self.tokenizer,
            solution.question,
            separator.join(solution.chunks[:j]),
            solution.chunks[j],
            self.prompt_style,
        )

    def check_room(self, problem_id: str, question: str, num_tokens: int) -> None:
        """Raises UserError if the context may not hold a judgment of the last chunk, whose prompt
        has the whole solution. If the policy has another tokenizer, the solution may have more than
        `num_tokens` tokens here."""
        empty = self.prompt_ids(Solution(problem_id, question, [""]), 0)
        name = f"the judge of {problem_id}, with a solution of {num_tokens} tokens"
        self.engine.check_length(len(empty), num_tokens + self.max_new_tokens, name)

    def check_lengths(self, solutions: Sequence[Solution]) -> None:
        """Raises UserError if the context does not hold a judgment of the last chunk."""
        for solution in solutions:
            last = len(solution.chunks) - 1
            length = len(self.prompt_ids(solution, last))
            name = f"{solution.solution_id}, step {last}"
            self.engine.check_length(length, self.max_new_tokens, name)

    def __call__(self, solutions: Sequence[Solution]) -> list[list[ChunkJudgment]]:
        """Returns one judgment of every chunk, see `judge_by_votes`."""
        return judge_by_votes(self, solutions)

    def sample(
        self,
        solutions: Sequence[Solution],
        suffixes: Sequence[str],
        *,
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> list[list[SolutionJudgment]]:
        """Returns one judgment of every chunk for each suffix, see `Judge`."""
        chunks = [(x, j) for x in solutions for j in range(x.start, len(x.chunks))]
        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.tokenizer.eos_ids,
        )
        completions = self.engine.generate(
            [self.prompt_ids(x, j) for x, j in chunks],
            params,
            key=self.key,
            row_ids=[
                f"{self.name}/{x.solution_id}/{j}{suffix}" for x, j in chunks for suffix in suffixes
            ],
            group_size=len(suffixes),
        )
        judgments = map(self._read, completions)
        found = []
        for x in solutions:
            judged = [SolutionJudgment([]) for _ in suffixes]
            for _ in range(x.start, len(x.chunks)):
                for one in judged:
                    one.chunks.append(next(judgments))
            found.append(judged)
        return found

    def _read(self, completion: Completion) -> ChunkJudgment:
        text = completion_text(self.tokenizer, completion.tokens.tolist())
        return ChunkJudgment.of_verdict(text, parse_verdict(text), len(completion.tokens))

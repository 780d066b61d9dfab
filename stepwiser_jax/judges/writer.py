"""Asks a language model for texts: what all judges that write have in common.

names x prompts x suffixes -> the engine -> (text, completion) of each row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax

from stepwiser_jax.config import Sampling
from stepwiser_jax.inference.params import Completion, SamplingParams
from stepwiser_jax.inference.prefix_cache import PrefixCache
from stepwiser_jax.judges.base import (
    ChunkJudgment,
    Judge,
    Solution,
    SolutionJudgment,
    vote_suffixes,
)
from stepwiser_jax.model.flops import Spent
from stepwiser_jax.runs.directory import per_item
from stepwiser_jax.text.prompts import JudgePromptStyle
from stepwiser_jax.text.tokenizer import Tokenizer, completion_text

if TYPE_CHECKING:
    from stepwiser_jax.distributed.loading import Loaded
    from stepwiser_jax.inference.engine import Engine


@dataclass(frozen=True)
class Writer:
    """A language model that writes texts, and how it is asked for them.

    Attributes:
        loaded: The model's tokenizer and id.
        engine: Samples from the model.
        sampling: How texts are drawn, and the most tokens of one.
        prompt_style: The form of the prompts.
        seed: Decides the noise of a row, together with the row's id.
        name: Begins the ids of rows, so that different stages draw different noise.
        votes: How many judgments of a chunk are sampled; 0 takes the greedy one.
        cache: What the model has read, see `cache_for`.
    """

    loaded: Loaded
    engine: Engine
    sampling: Sampling
    prompt_style: JudgePromptStyle
    seed: int
    name: str
    votes: int = 0
    cache: PrefixCache = field(default_factory=PrefixCache)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.loaded.tokenizer

    @property
    def max_new_tokens(self) -> int:
        return self.sampling.max_new_tokens

    @property
    def key(self) -> jax.Array:
        return jax.random.key(self.seed)

    def params(self, **drawing: Any) -> SamplingParams:
        """Returns how a text is drawn: as `sampling` says, or else at this `temperature`, and with
        no more truncation than the `top_p` and `top_k` given."""
        return SamplingParams(
            self.max_new_tokens,
            **(drawing or self.sampling.drawing),
            stop_ids=self.tokenizer.eos_ids,
        )

    def write(
        self,
        names: Sequence[str],
        prompts: Sequence[Sequence[int]],
        suffixes: Sequence[str],
        params: SamplingParams,
        cache: PrefixCache | None = None,
        known: Sequence[Sequence[int]] | None = None,
    ) -> list[list[tuple[str, Completion]]]:
        """Continues every prompt once for each suffix.

        Args:
            names: A name for each prompt; see `row_ids`.
            prompts: The token ids.
            suffixes: They tell the rows of a prompt apart.
            params: How the texts are drawn.
            cache: That of `Engine.stream`: prompts that begin alike share what is read.
            known: What was read before each prompt. The first completion of a prompt counts the
                tokens after what it shares with that, so that counts do not depend on what else the
                engine does. Without it completions count what the engine read.

        Returns:
            The text, without its end token, and the tokens with their log-probs,
            [prompt][suffix].
        """
        K = len(suffixes)
        row_ids = self.row_ids(names, suffixes)
        completions = self.engine.generate(
            prompts, params, key=self.key, row_ids=row_ids, group_size=K, cache=cache
        )
        if known is not None:
            for b, completion in enumerate(completions):
                ids = prompts[b // K]
                counted = num_shared(ids[:-1], known[b // K]) if b % K == 0 else len(ids)
                spent = self.engine.spent_on(before=counted, read=len(ids) - counted)
                new = self.engine.spent_on(before=len(ids), generated=len(completion.tokens))
                completions[b] = replace(completion, spent=spent + new)
        written = [(completion_text(self.tokenizer, c.tokens), c) for c in completions]
        return [written[p * K : (p + 1) * K] for p in range(len(prompts))]

    def row_ids(self, names: Sequence[str], suffixes: Sequence[str]) -> list[str]:
        """Returns the ids of the rows of prompts, [prompt][suffix] in one list."""
        return [f"{self.name}/{name}{suffix}" for name in names for suffix in suffixes]

    def cache_for(self, solutions: Sequence[Solution]) -> PrefixCache:
        """Returns what the prompts of the call before have read, for solutions that go on from
        there (`start` above 0). It is empty if all solutions begin, so that a run that was stopped
        goes on with the same numbers."""
        if all(x.start == 0 for x in solutions):
            self.cache.by_length.clear()
        return self.cache

    def measured(self, made: int) -> dict[str, Any]:
        """Returns tokens and FLOPs per judgment, for summary.json."""
        return measured(self.engine.usage.spent, made)

    def check_length(self, prompt: Sequence[int], name: str, room: int | None = None) -> None:
        """Raises UserError, with the name, if the context does not hold the prompt and `room` more
        tokens, by default a text."""
        self.engine.check_length(len(prompt), room or self.max_new_tokens, name)

    def check_room(
        self, prompt: Sequence[int], problem_id: str, num_tokens: int, room: int | None = None
    ) -> None:
        """Raises UserError, naming the problem, if the context may not hold the prompt about an
        empty solution, a solution of `num_tokens`, and `room` more tokens, by default a text."""
        name = f"the judge of {problem_id}, with a solution of {num_tokens} tokens"
        self.check_length(prompt, name, num_tokens + (room or self.max_new_tokens))


def num_shared(ids: Sequence[int], before: Sequence[int]) -> int:
    """Returns how many tokens two sequences begin with alike."""
    pairs = enumerate(zip(ids, before, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(ids), len(before)))


def measured(spent: Spent, made: int) -> dict[str, Any]:
    """Returns what a judge spent on each of the judgments made, for summary.json."""
    return {
        "tokens_per_judgment": per_item(spent.generated, made),
        "read_tokens_per_judgment": per_item(spent.read, made),
        "flops_per_judgment": per_item(spent.flops, made),
    }


def sample_votes(
    judge: Judge, writer: Writer, solutions: Sequence[Solution]
) -> list[list[SolutionJudgment]]:
    """Returns the judgments of each solution that count: the greedy one, or all votes."""
    if not writer.votes:
        return judge.sample(solutions, [""], temperature=0.0)
    return judge.sample(solutions, vote_suffixes(writer.votes), **writer.sampling.drawing)


def judge_by_votes(
    judge: Judge, writer: Writer, solutions: Sequence[Solution]
) -> list[list[ChunkJudgment]]:
    """Returns one judgment of every chunk: the greedy one, or the majority's."""
    return [
        [ChunkJudgment.of_votes(votes) for votes in zip(*(x.chunks for x in of_one), strict=True)]
        for of_one in sample_votes(judge, writer, solutions)
    ]

"""P(+) of every chunk of a solution, from one pass of a classifier over the whole of it.

    (question, chunks) -> conversation in which every answer is + -> several of them packed to a row
                       -> log-odds of + against - at each answer -> P(+)

Attention is causal, so that what a chunk is given does not depend on those after it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np

from stepwiser_jax.distributed.loading import Loaded
from stepwiser_jax.distributed.mesh import shard_batch
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.verdicts import verdict_at
from stepwiser_jax.inference.params import probabilities
from stepwiser_jax.judges.stepwiser import ChunkJudgment, Solution
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.records import Verdict
from stepwiser_jax.rl.logprobs import token_log_odds
from stepwiser_jax.runs import compilation
from stepwiser_jax.runs.progress import rows_done
from stepwiser_jax.text.prompts import PromptStyle, encode_solution, sign_ids
from stepwiser_jax.training.batches import TokenBatch, first_fit, packed_batch


class Scorer:
    """A classifier, its program compiled for `rows` of `max_length` tokens. The verdict is Negative
    where P(+) is below `threshold`: by default it is the likelier sign."""

    def __init__(
        self,
        loaded: Loaded,
        mesh: jax.sharding.Mesh,
        *,
        rows: int,
        max_length: int,
        prompt_style: PromptStyle,
        threshold: float = 0.5,
    ):
        self.loaded, self.mesh = loaded, mesh
        self.rows, self.max_length = rows, max_length
        self.prompt_style: PromptStyle = prompt_style
        self.threshold = threshold
        self.signs = sign_ids(loaded.tokenizer)
        self.compiled_shapes: Counter[str] = Counter()

    def check_room(self, problem_id: str, question: str, num_tokens: int) -> None:
        """Raises UserError where a row does not hold even a solution of a single chunk. What the
        prompt puts around further ones is known when they are; where that is too much, the run can
        go on with a larger `max_length`."""
        ids, _ = self._encode(Solution(problem_id, question, [""]))
        if len(ids) + num_tokens > self.max_length:
            raise UserError(
                f"the classifier of {problem_id}, with a solution of {num_tokens} tokens: "
                f"max_length must be at least {len(ids) + num_tokens}, found {self.max_length}"
            )

    def check_lengths(self, solutions: Sequence[Solution]) -> None:
        """Raises UserError for a solution that is longer than a row."""
        for solution in solutions:
            self._encode(solution)

    def _encode(self, solution: Solution) -> tuple[list[int], list[int]]:
        """Ids and the places of the answers."""
        ids, places = encode_solution(
            self.loaded.tokenizer, solution.question, solution.chunks, self.prompt_style
        )
        if len(ids) > self.max_length:
            raise UserError(
                f"{solution.solution_id} has {len(ids)} tokens: max_length must be at least that, "
                f"found {self.max_length}"
            )
        return ids, places

    def __call__(self, solutions: Sequence[Solution]) -> list[list[ChunkJudgment]]:
        """The verdict on every chunk to be judged, and P(+)."""
        encoded = [self._encode(solution) for solution in solutions]
        scores: list[list[float]] = [[] for _ in solutions]
        packed = first_fit([len(ids) for ids, _ in encoded], self.max_length)
        for start in range(0, len(packed), self.rows):
            of_rows = packed[start : start + self.rows]
            batch = packed_batch(
                [[encoded[i][0] for i in row] for row in of_rows], self.rows, self.max_length
            )
            log_odds_BT = self._score(batch)
            for log_odds_T, row in zip(log_odds_BT, of_rows, strict=False):
                offset = 0
                for i in row:
                    ids, places = encoded[i]
                    scores[i] = probabilities(log_odds_T[offset + np.array(places)])
                    offset += len(ids)
            rows_done(min(start + self.rows, len(packed)), len(packed), 0)
        return [
            [opinion_of(p, self.threshold) for p in scores[i][solution.start :]]
            for i, solution in enumerate(solutions)
        ]

    def _score(self, batch: TokenBatch) -> np.ndarray:
        shape = f"score {self.rows}x{self.max_length}"
        self.compiled_shapes[shape] += 1
        with jax.set_mesh(self.mesh), compilation.compiling(shape):
            batch = shard_batch(batch, self.mesh)
            return np.asarray(score(self.loaded.model, batch, signs=self.signs))


def opinion_of(p_positive: float, threshold: float) -> ChunkJudgment:
    """One token: + or -."""
    verdict = verdict_at(threshold, p_positive)
    sign = "+" if verdict is Verdict.POSITIVE else "-"
    return ChunkJudgment(sign, verdict, p_positive, num_tokens=1)


@functools.partial(jax.jit, static_argnames="signs")
def score(model: Transformer, batch: TokenBatch, *, signs: tuple[int, int]) -> jax.Array:
    """Log-odds (B, T) of + in the place of each token, see `token_log_odds`."""
    return token_log_odds(model, batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT, signs)

"""P(+) of every chunk of a solution, from one pass of a classifier over the whole of it.

    (question, chunks) -> conversation in which every answer is + -> several of them packed to a row
                       -> log-odds of + against - at each answer -> P(+)

Attention is causal, so that what a chunk is given does not depend on those behind it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np

from stepwiser_jax.algo.logprobs import token_log_odds
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.records import UserError
from stepwiser_jax.runtime import compilation
from stepwiser_jax.runtime.data import TokenBatch, first_fit, packed_batch
from stepwiser_jax.runtime.loading import Loaded
from stepwiser_jax.runtime.mesh import shard_batch
from stepwiser_jax.text.prompts import PromptStyle, encode_solution, sign_ids


class Scorer:
    """A classifier, its program compiled for `rows` of `max_length` tokens."""

    def __init__(
        self,
        loaded: Loaded,
        mesh: jax.sharding.Mesh,
        *,
        rows: int,
        max_length: int,
        prompt_style: PromptStyle,
    ):
        self.loaded, self.mesh = loaded, mesh
        self.rows, self.max_length = rows, max_length
        self.prompt_style: PromptStyle = prompt_style
        self.signs = sign_ids(loaded.tokenizer)

    def encode(
        self, name: str, question: str, chunks: Sequence[str]
    ) -> tuple[list[int], list[int]]:
        """Ids and the places of the answers. Raises UserError for a solution, called `name`, that
        is longer than a row."""
        ids, places = encode_solution(self.loaded.tokenizer, question, chunks, self.prompt_style)
        if len(ids) > self.max_length:
            raise UserError(
                f"{name} has {len(ids)} tokens: max_length must be at least that, found "
                f"{self.max_length}"
            )
        return ids, places

    def __call__(self, solutions: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
        """P(+) of every chunk of each solution, encoded."""
        scores: list[list[float]] = [[] for _ in solutions]
        packed = first_fit([len(ids) for ids, _ in solutions], self.max_length)
        for start in range(0, len(packed), self.rows):
            of_rows = packed[start : start + self.rows]
            batch = packed_batch(
                [[solutions[i][0] for i in row] for row in of_rows], self.rows, self.max_length
            )
            log_odds_BT = self._score(batch)
            for log_odds_T, row in zip(log_odds_BT, of_rows, strict=False):
                offset = 0
                for i in row:
                    ids, places = solutions[i]
                    # In 64 bits, in which probabilities near 1 differ.
                    log_odds_J = log_odds_T[offset + np.array(places)].astype(np.float64)
                    scores[i] = (1 / (1 + np.exp(-log_odds_J))).tolist()
                    offset += len(ids)
        return scores

    def _score(self, batch: TokenBatch) -> np.ndarray:
        with (
            jax.set_mesh(self.mesh),
            compilation.compiling(f"score {self.rows}x{self.max_length}"),
        ):
            batch = shard_batch(batch, self.mesh)
            return np.asarray(score(self.loaded.model, batch, signs=self.signs))


@functools.partial(jax.jit, static_argnames="signs")
def score(model: Transformer, batch: TokenBatch, *, signs: tuple[int, int]) -> jax.Array:
    """Log-odds (B, T) of + in the place of each token, see `token_log_odds`."""
    return token_log_odds(model, batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT, signs)

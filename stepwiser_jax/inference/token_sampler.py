"""Samples tokens: the noise of a row, truncation, and inversion of the cumulative distribution.

A row has one uniform number for each position, from fold_in(fold_in(key, crc32(row_id)), position).
It gets the token at which the cumulative distribution passes this number. That takes one random
number for each token, where Gumbel noise takes V.
"""

from __future__ import annotations

import dataclasses
import zlib

import jax
import jax.numpy as jnp

_CDF_BLOCK = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenSampler:
    """How a token is sampled. `greedy`, `top_k` (0: off) and `truncate_p` are compiled in."""

    key: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    greedy: bool = dataclasses.field(metadata={"static": True})
    top_k: int = dataclasses.field(metadata={"static": True})
    truncate_p: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(cls, key: jax.Array, temperature: float, top_k: int, top_p: float) -> TokenSampler:
        """Makes a sampler. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 truncate nothing."""
        return cls(
            key=key,
            temperature=jnp.float32(temperature),
            top_p=jnp.float32(top_p),
            greedy=temperature == 0,
            top_k=top_k,
            truncate_p=top_p < 1,
        )

    def __str__(self) -> str:
        return "greedy" if self.greedy else f"top_k={self.top_k} top_p={self.truncate_p}"

    def __call__(
        self,
        logits_BV: jax.Array,
        row_hash_B: jax.Array,
        position_B: jax.Array,
        is_greedy_B: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Samples a token for each row.

        Args:
            logits_BV: The model's logits.
            row_hash_B: The hashes of the row ids.
            position_B: The positions of the tokens in their rows.
            is_greedy_B: The rows that get their likeliest token; none if it is not given.

        Returns:
            The tokens, and their log-probs under the distribution that they were sampled from,
            after temperature, top-k and top-p. Greedy tokens have log-prob 0.
        """
        likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        if self.greedy:
            return likeliest_B, jnp.zeros(likeliest_B.shape, jnp.float32)
        logits_BV = logits_BV / self.temperature
        if self.top_k or self.truncate_p:
            logits_BV = truncate(logits_BV, self.top_k, self.top_p if self.truncate_p else None)
        token_B, logprob_B = inverse_cdf(logits_BV, self._uniform(row_hash_B, position_B))
        if is_greedy_B is None:
            return token_B, logprob_B
        return jnp.where(is_greedy_B, likeliest_B, token_B), jnp.where(is_greedy_B, 0, logprob_B)

    def _uniform(self, row_hash_B: jax.Array, position_B: jax.Array) -> jax.Array:
        def uniform(row_hash: jax.Array, position: jax.Array) -> jax.Array:
            row_key = jax.random.fold_in(self.key, row_hash)
            return jax.random.uniform(jax.random.fold_in(row_key, position))

        return jax.vmap(uniform)(row_hash_B, position_B)


def row_hash(row_id: str) -> int:
    return zlib.crc32(row_id.encode())


def truncate(logits_BV: jax.Array, top_k: int, top_p: jax.Array | None) -> jax.Array:
    """Returns log-probs (B, V) after keeping the `top_k` likeliest tokens (0: all), and of these
    the smallest set whose probabilities sum to `top_p` (None: all); -inf for the others."""
    if top_k:
        kth_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    if top_p is None:
        return logprobs_BV
    descending_BV = -jnp.sort(-logprobs_BV, axis=-1)
    before_BV = jnp.cumsum(jnp.exp(descending_BV), axis=-1) - jnp.exp(descending_BV)
    least_B1 = jnp.min(jnp.where(before_BV < top_p, descending_BV, jnp.inf), axis=-1, keepdims=True)
    return jax.nn.log_softmax(jnp.where(logprobs_BV >= least_B1, logprobs_BV, -jnp.inf), axis=-1)


def inverse_cdf(logits_BV: jax.Array, uniform_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the tokens at which the cumulative distribution passes `uniform_B`, and their
    log-probs.

    It looks for a block of 256 tokens, then for a token of the block. Both sums are short enough
    for float32, and no array holds all probabilities. A token of probability 0 is never returned.
    """
    B, V = logits_BV.shape
    blocks = -(-V // _CDF_BLOCK)
    padding = ((0, 0), (0, blocks * _CDF_BLOCK - V))
    padded_BV = jnp.pad(logits_BV, padding, constant_values=-jnp.inf)
    logits_BYX = padded_BV.reshape(B, blocks, _CDF_BLOCK)
    peak_B = jnp.max(logits_BYX, axis=(1, 2))
    mass_BY = jnp.sum(jnp.exp(logits_BYX - peak_B[:, None, None]), axis=-1)
    total_B = jnp.sum(mass_BY, axis=-1)
    block_B, rest_B = _pass(mass_BY, uniform_B * total_B)
    inside_BX = jnp.take_along_axis(logits_BYX, block_B[:, None, None], axis=1)[:, 0]
    index_B, _ = _pass(jnp.exp(inside_BX - peak_B[:, None]), rest_B)
    logit_B = jnp.take_along_axis(inside_BX, index_B[:, None], axis=1)[:, 0]
    logprob_B = jnp.minimum(logit_B - peak_B - jnp.log(total_B), 0.0)
    return (block_B * _CDF_BLOCK + index_B).astype(jnp.int32), logprob_B


def _pass(mass_BX: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns where the running sum first exceeds the target, and how far into that entry it is."""
    X = mass_BX.shape[-1]
    cumulative_BX = jnp.cumsum(mass_BX, axis=-1)
    index_B = jnp.sum(cumulative_BX <= target_B[:, None], axis=-1)
    # Rounding can put the target at the very end, or let the sum grow where there is no mass: the
    # last entry with mass up to there is taken.
    passed_BX = jnp.arange(X)[None] <= index_B[:, None]
    index_B = jnp.max(jnp.where(passed_BX & (mass_BX > 0), jnp.arange(X)[None], 0), axis=-1)
    before_B = jnp.take_along_axis(cumulative_BX - mass_BX, index_B[:, None], axis=-1)[:, 0]
    # Rounding can put the entry's start past the target. A target below 0 would pass entries
    # without mass.
    return index_B, jnp.maximum(target_B - before_B, 0)

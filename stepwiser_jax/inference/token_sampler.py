"""Drawing tokens: the noise of a row, truncation, and the inverse of the cumulative distribution.

A row draws one uniform per position, from fold_in(fold_in(key, crc32(row_id)), position), and takes
the token where the cumulative distribution passes it: one number per row instead of V Gumbel draws.
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
    """How a token is drawn; `greedy`, `top_k` (0: off) and `truncate_p` are compiled in."""

    key: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    greedy: bool = dataclasses.field(metadata={"static": True})
    top_k: int = dataclasses.field(metadata={"static": True})
    truncate_p: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(cls, key: jax.Array, temperature: float, top_k: int, top_p: float) -> TokenSampler:
        """`temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch truncation off."""
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
        self, logits_BV: jax.Array, row_hash_B: jax.Array, position_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """One token for every row and its log-prob under the distribution it was drawn from, after
        temperature, top-k and top-p; greedy tokens have log-prob 0."""
        if self.greedy:
            token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
            return token_B, jnp.zeros(token_B.shape, jnp.float32)
        logits_BV = logits_BV / self.temperature
        if self.top_k or self.truncate_p:
            logits_BV = truncate(logits_BV, self.top_k, self.top_p if self.truncate_p else None)
        return inverse_cdf(logits_BV, self._uniform(row_hash_B, position_B))

    def _uniform(self, row_hash_B: jax.Array, position_B: jax.Array) -> jax.Array:
        def of_row(row_hash: jax.Array, position: jax.Array) -> jax.Array:
            row_key = jax.random.fold_in(self.key, row_hash)
            return jax.random.uniform(jax.random.fold_in(row_key, position))

        return jax.vmap(of_row)(row_hash_B, position_B)


def row_hash(row_id: str) -> int:
    return zlib.crc32(row_id.encode())


def truncate(logits_BV: jax.Array, top_k: int, top_p: jax.Array | None) -> jax.Array:
    """Log-probs (B, V) after keeping the `top_k` likeliest tokens and then the smallest set whose
    probabilities sum to `top_p`; -inf outside."""
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
    """The token at which the cumulative distribution passes `uniform_B`, and its log-prob.

    Two levels, blocks of 256 tokens and tokens of a block: sums short enough for float32, and no
    array of all the probabilities. Never a token of probability 0.
    """
    B, V = logits_BV.shape
    blocks = -(-V // _CDF_BLOCK)
    padding = ((0, 0), (0, blocks * _CDF_BLOCK - V))
    padded_BV = jnp.pad(logits_BV, padding, constant_values=-jnp.inf)
    logits_BNM = padded_BV.reshape(B, blocks, _CDF_BLOCK)
    peak_B = jnp.max(logits_BNM, axis=(1, 2))
    mass_BN = jnp.sum(jnp.exp(logits_BNM - peak_B[:, None, None]), axis=-1)
    total_B = jnp.sum(mass_BN, axis=-1)
    block_B, rest_B = _pass(mass_BN, uniform_B * total_B)
    inside_BM = jnp.take_along_axis(logits_BNM, block_B[:, None, None], axis=1)[:, 0]
    place_B, _ = _pass(jnp.exp(inside_BM - peak_B[:, None]), rest_B)
    logit_B = jnp.take_along_axis(inside_BM, place_B[:, None], axis=1)[:, 0]
    logprob_B = jnp.minimum(logit_B - peak_B - jnp.log(total_B), 0.0)
    return (block_B * _CDF_BLOCK + place_B).astype(jnp.int32), logprob_B


def _pass(mass_BN: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the running sum first exceeds the target, and how far into that entry the target is."""
    N = mass_BN.shape[-1]
    cumulative_BN = jnp.cumsum(mass_BN, axis=-1)
    index_B = jnp.sum(cumulative_BN <= target_B[:, None], axis=-1)
    # Rounding can put the target at the very end, or make the sum grow where there is no mass: take
    # the last entry with mass up to there.
    passed_BN = jnp.arange(N)[None] <= index_B[:, None]
    index_B = jnp.max(jnp.where(passed_BN & (mass_BN > 0), jnp.arange(N)[None], 0), axis=-1)
    before_B = jnp.take_along_axis(cumulative_BN - mass_BN, index_B[:, None], axis=-1)[:, 0]
    # Rounding can put the entry's start past the target, and a target below 0 would pass entries
    # without mass.
    return index_B, jnp.maximum(target_B - before_B, 0)

"""The chunk sampler: rows with whole caches that can stop, branch, be rewound and go on.

Chunk-wise search uses it, and `Engine`, which is faster, is tested against it: it samples the same,
without shared prefixes and without refilling. Noise is equal, all else is equal to rounding. A
row's result depends on its row id, not on its place in the batch or on the other rows.

A row's state is its tokens, and a cache of all of them but the last. A decode step feeds the last
token and samples the next, so a prefill computes no logits, and a rewind to the first n tokens only
sets the cache's length to n - 1: what lies past it is masked, and overwritten later.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepwiser_jax.distributed.mesh import fetch
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import Completion, SamplingParams, StopReason
from stepwiser_jax.inference.stops import find_stops
from stepwiser_jax.inference.token_sampler import TokenSampler, row_hash
from stepwiser_jax.model.decoder import Decoder
from stepwiser_jax.model.kv_cache import KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerState:
    """Rows between two calls: tokens (B, S), of which the first `num_tokens_B` count, and a cache
    of the first `num_tokens_B - 1`."""

    cache: KVCache
    tokens_BS: jax.Array
    num_tokens_B: jax.Array


class ChunkSampler:
    """Rows on the model, the devices and the shapes of an engine, which counts what they do."""

    def __init__(self, engine: Engine):
        self.engine, self.shapes, self.usage = engine, engine.shapes, engine.usage

    def prefill(self, prompts_P: Sequence[Sequence[int]], min_tokens: int) -> SamplerState:
        """Returns a row for each of up to `max_rows` prompts, with room for `min_tokens` tokens."""
        longest = max(len(prompt) for prompt in prompts_P)
        room, length = self.shapes.bucket(max(longest, min_tokens)), self.shapes.bucket(longest)
        tokens_BT = np.zeros((self.shapes.rows_for(len(prompts_P)), length), np.int32)
        num_tokens_B = np.ones((tokens_BT.shape[0],), np.int32)
        for row, prompt in enumerate(prompts_P):
            tokens_BT[row, : len(prompt)] = prompt
            num_tokens_B[row] = len(prompt)
            self.usage.spent += self.engine.spent_on(read=len(prompt))
        with self.usage.calling(f"prefill rows={len(tokens_BT)} tokens={length} room={room}"):
            placed = self.engine.place_rows((tokens_BT, num_tokens_B))
            return _prefill(self.engine.decoder, *placed, room=room)

    def branch(self, state: SamplerState, source_B: Sequence[int]) -> SamplerState:
        """Returns new rows: row b is a copy of row `source_B[b]`."""
        rows = self.shapes.rows_for(len(source_B))
        padded_B = np.array([*source_B, *[0] * (rows - len(source_B))], np.int32)
        B, S = state.tokens_BS.shape
        with self.usage.calling(f"branch rows={B}->{rows} room={S}"):
            return _branch(state, self.engine.place_rows(padded_B))

    def rewind(self, state: SamplerState, num_tokens_B: Sequence[int]) -> SamplerState:
        """Returns the rows cut to their first `num_tokens_B[b]` tokens: what they wrote after these
        is taken back."""
        rows = state.tokens_BS.shape[0]
        kept_B = jnp.array([*num_tokens_B, *[1] * (rows - len(num_tokens_B))], jnp.int32)
        kept_B, length_B = self.engine.place_rows((kept_B, kept_B - 1))
        return SamplerState(state.cache.rewind(length_B), state.tokens_BS, kept_B)

    def decode(
        self,
        state: SamplerState,
        params: SamplingParams,
        *,
        key: jax.Array,
        row_ids: Sequence[str],
        limits_B: Sequence[int] | None = None,
        greedy_B: Sequence[bool] | None = None,
    ) -> tuple[list[Completion], SamplerState]:
        """Samples on from each row that has a row id, until all of them have ended.

        Args:
            state: The rows. It is consumed.
            params: When a row ends, among others.
            key: With the row id and the position of a token it gives the token's noise.
            row_ids: The names of the first rows; the other rows stay as they are.
            limits_B: The most tokens of each row, prompt included; by default its room.
            greedy_B: Which of these rows take the likeliest tokens, whatever `params` says; by
                default none.

        Returns:
            The completions, and the rows after them. What a completion `spent` is without its
            prompt, which may have been read for several rows.
        """
        B, S = state.tokens_BS.shape
        hash_B = np.zeros((B,), np.uint32)
        hash_B[: len(row_ids)] = [row_hash(row_id) for row_id in row_ids]
        is_active_B = np.arange(B) < len(row_ids)
        limit_B = np.full((B,), S, np.int32)
        if limits_B is not None:
            limit_B[: len(limits_B)] = np.minimum(limits_B, S)
        token_sampler = TokenSampler.create(key, params.temperature, params.top_k, params.top_p)
        new, kind, is_greedy_B = params.max_new_tokens, str(token_sampler), None
        if greedy_B is not None:
            padded_B = np.array([*greedy_B, *[False] * (B - len(greedy_B))])
            kind, is_greedy_B = f"{kind} or greedy", self.engine.place_rows(padded_B)
        with self.usage.calling(f"decode rows={B} room={S} new={new} {kind}"):
            state, results = _decode(
                self.engine.decoder,
                state,
                *self.engine.place_rows((hash_B, is_active_B, limit_B)),
                token_sampler,
                is_greedy_B,
                np.array(params.stop_ids, np.int32),
                self.engine.stop_tables[params.stop_strings],
                max_new_tokens=new,
            )
        tokens_BC, logprobs_BC, before_B, length_B, reason_B = fetch(results)
        completions = []
        for b, row_id in enumerate(row_ids):
            n, reason = int(length_B[b]), StopReason(reason_B[b])
            spent = self.engine.spent_on(before=int(before_B[b]), generated=n)
            self.usage.spent += spent
            completions.append(
                Completion(row_id, tokens_BC[b, :n], logprobs_BC[b, :n], reason, spent=spent)
            )
        return completions, state


# --- device programs ----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("room",))
def _prefill(
    decoder: Decoder, tokens_BT: jax.Array, num_tokens_B: jax.Array, *, room: int
) -> SamplerState:
    B, T = tokens_BT.shape
    cache = KVCache.create(decoder.config, B, room, decoder.compute_dtype)
    _, cache = decoder.append(tokens_BT, num_tokens_B - 1, cache)
    return SamplerState(cache, jnp.pad(tokens_BT, ((0, 0), (0, room - T))), num_tokens_B)


@jax.jit
def _branch(state: SamplerState, source_B: jax.Array) -> SamplerState:
    return jax.tree.map(lambda x: jnp.take(x, source_B, axis=0), state)


@functools.partial(jax.jit, static_argnames=("max_new_tokens",), donate_argnames=("state",))
def _decode(
    decoder: Decoder,
    state: SamplerState,
    hash_B: jax.Array,
    is_active_B: jax.Array,
    limit_B: jax.Array,
    token_sampler: TokenSampler,
    is_greedy_B: jax.Array | None,
    stop_ids: jax.Array,
    stop_table_AV: jax.Array | None,
    *,
    max_new_tokens: int,
) -> tuple[SamplerState, tuple[jax.Array, ...]]:
    """Takes decode steps until every row has ended; returns the rows, and their new tokens (B, C),
    log-probs (B, C), numbers of tokens before and of new ones, and stop reasons."""
    B, S = state.tokens_BS.shape
    rows_B = jnp.arange(B)

    def step(carry: Any) -> Any:
        t, state, running_B, match_B, reason_B, tokens_BC, logprobs_BC = carry
        last_B = state.tokens_BS[rows_B, state.num_tokens_B - 1]
        counts_B = running_B.astype(jnp.int32)
        hidden_B1D, cache = decoder.append(last_B[:, None], counts_B, state.cache)
        logits_BV = decoder.logits(hidden_B1D[:, 0])
        token_B, logprob_B = token_sampler(logits_BV, hash_B, state.num_tokens_B, is_greedy_B)
        position_B = jnp.where(running_B, state.num_tokens_B, S)  # past the end: it is dropped
        state = SamplerState(
            cache=cache,
            tokens_BS=state.tokens_BS.at[rows_B, position_B].set(token_B, mode="drop"),
            num_tokens_B=state.num_tokens_B + counts_B,
        )
        tokens_BC = tokens_BC.at[:, t].set(token_B)
        logprobs_BC = logprobs_BC.at[:, t].set(logprob_B)
        stop_B, why_B, match_B = find_stops(token_B, match_B, stop_ids, stop_table_AV)
        reason_B = jnp.where(running_B, why_B, reason_B)
        running_B = running_B & ~stop_B & (state.num_tokens_B < limit_B)
        return t + 1, state, running_B, match_B, reason_B, tokens_BC, logprobs_BC

    def goes_on(carry: Any) -> jax.Array:
        t, _, running_B, *_ = carry
        return (t < max_new_tokens) & jnp.any(running_B)

    before_B = state.num_tokens_B
    carry = (
        jnp.int32(0),
        state,
        is_active_B & (state.num_tokens_B < limit_B),
        jnp.zeros((B,), jnp.int32),
        jnp.full((B,), int(StopReason.LENGTH), jnp.int32),
        jnp.zeros((B, max_new_tokens), jnp.int32),
        jnp.zeros((B, max_new_tokens), jnp.float32),
    )
    _, state, _, _, reason_B, tokens_BC, logprobs_BC = jax.lax.while_loop(goes_on, step, carry)
    length_B = state.num_tokens_B - before_B
    return state, (tokens_BC, logprobs_BC, before_B, length_B, reason_B)

"""The reference sampler: read prompts, fork rows, decode, rewind. Whole caches, nothing shared.

A row's state is its tokens, and a cache of all of them but the last. A decode step feeds the last
token and samples the next, so reading a prompt needs no logits, and a fork at, or a rewind to, the
first n tokens is the same thing: cache length n - 1.

`Engine` samples many rows faster; this is what it is checked against, and what chunk-reset search
needs of its policy: rows that stop, are judged, and go on or go back. A row's result depends on its
id, not on its slot or on the rows beside it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from stepwiser_jax.distributed.mesh import batch_shards, fetch, shard_batch
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.params import (
    SampleOutput,
    SamplingParams,
    Shapes,
    StopReason,
    StopTables,
    Weights,
    decoding_layout,
    find_stops,
)
from stepwiser_jax.inference.token_sampler import TokenSampler, row_hash
from stepwiser_jax.model.decoder import Decoder
from stepwiser_jax.model.kv_cache import KVCache
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.runs.compilation import compiling
from stepwiser_jax.text.tokenizer import Tokenizer, unknown_ids

READ_TOKENS = 4096
"""Tokens that go through the network at once where prompts are read, on each device that rows are
split over: attention's scores are that many squares of a prompt's length."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerState:
    """Rows between two calls: tokens (B, S), of which the first `num_tokens_B` count, and a cache
    of the first `num_tokens_B - 1`."""

    cache: KVCache
    tokens_BS: jax.Array
    num_tokens_B: jax.Array

    @property
    def rows(self) -> int:
        return self.tokens_BS.shape[0]


class Sampler:
    """One model with its compiled shapes. `rows`: allowed numbers of rows per device call, the
    smallest that holds the work is used; `buckets`: allowed slots per row, the last is the context.
    """

    def __init__(
        self,
        model: Transformer | Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        rows: Sequence[int],
        buckets: Sequence[int],
        weights: Weights = "model",
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Raises UserError if the largest bucket exceeds the model's context, and ValueError for a
        model that was loaded without this tokenizer and would sample ids that it does not know."""
        if tokenizer is not None:
            unknown = unknown_ids(tokenizer, model.config.vocab_size)
            if unknown != model.config.unknown_ids:
                raise ValueError(
                    f"expected a model that knows the ids without a token, {unknown}, found one "
                    f"with {model.config.unknown_ids}: load it with load_hf(path, "
                    "tokenizer=tokenizer)"
                )
        self.shapes = Shapes(rows, buckets, model.config.max_length)
        self.weights: Weights = weights
        self.model, self.mesh = decoding_layout(model, weights), mesh
        self.stop_tables = StopTables(tokenizer)
        self.compiled_shapes: Counter[str] = Counter()
        self.sampled_tokens = 0

    def with_model(self, model: Transformer | Decoder) -> Self:
        """The same shapes and counters with other weights."""
        other = copy.copy(self)
        other.model = decoding_layout(model, self.weights)
        return other

    def running(self, shape: str) -> AbstractContextManager[None]:
        """Around the call of a program that is compiled once for `shape`."""
        self.compiled_shapes[shape] += 1
        return compiling(shape)

    def check_length(self, num_tokens: int, max_new_tokens: int, name: str) -> None:
        """Raises UserError where a prompt is empty, or does not fit the context with its
        completion."""
        if num_tokens < 1:
            raise UserError(f"{name}: expected a prompt of at least one token, found none")
        if num_tokens + max_new_tokens > self.shapes.max_length:
            raise UserError(
                f"{name}: prompt of {num_tokens} tokens + max_new_tokens {max_new_tokens} exceeds "
                f"the context of {self.shapes.max_length} (the largest of engine.buckets): raise "
                "it, lower max_new_tokens, or leave the item out"
            )

    # --- whole completions ----------------------------------------------------------------------

    def generate(
        self,
        prompts_P: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        key: jax.Array,
        row_ids: Sequence[str],
        group_size: int = 1,
    ) -> SampleOutput:
        """`group_size` completions of every prompt; row b = p * group_size + g.

        `row_ids` name the noise, one per row, all different. A row's slots depend on its own length
        only. Raises UserError for a prompt that is empty or does not fit.
        """
        output = SampleOutput.empty(len(prompts_P) * group_size, row_ids, params.max_new_tokens)
        rows_of: dict[tuple[int, int], list[int]] = {}
        for b, row_id in enumerate(row_ids):
            length = len(prompts_P[b // group_size])
            self.check_length(length, params.max_new_tokens, row_id)
            shape = (
                self.shapes.bucket(length),
                self.shapes.bucket(length + params.max_new_tokens),
            )
            rows_of.setdefault(shape, []).append(b)
        for _, rows in sorted(rows_of.items()):
            for start in range(0, len(rows), self.shapes.max_rows):
                batch = rows[start : start + self.shapes.max_rows]
                part = self._generate_batch(prompts_P, params, key, row_ids, group_size, batch)
                for whole, new in zip(vars(output).values(), vars(part).values(), strict=True):
                    whole[batch] = new
        return output

    def _generate_batch(
        self,
        prompts_P: Sequence[Sequence[int]],
        params: SamplingParams,
        key: jax.Array,
        row_ids: Sequence[str],
        group_size: int,
        batch: Sequence[int],
    ) -> SampleOutput:
        """Rows of one shape: every prompt is read once, then forked to its rows."""
        prompts = sorted({b // group_size for b in batch})
        longest = max(len(prompts_P[p]) for p in prompts)
        state = self.prefill([prompts_P[p] for p in prompts], longest + params.max_new_tokens)
        if group_size > 1:
            place = {p: i for i, p in enumerate(prompts)}
            source_B = np.array([place[b // group_size] for b in batch])
            lengths_B = np.array([len(prompts_P[b // group_size]) for b in batch])
            state = self.fork(state, source_B, lengths_B)
        output, _ = self.decode(state, params, key=key, row_ids=[row_ids[b] for b in batch])
        return output

    # --- one token ------------------------------------------------------------------------------

    def log_odds(self, prompts_P: Sequence[Sequence[int]], pair: tuple[int, int]) -> np.ndarray:
        """log P(pair[0]) - log P(pair[1]) of the token after every prompt, float32 (P,): what a
        verdict is worth that is one of two words. Raises UserError for a prompt that is empty or
        exceeds the context."""
        log_odds_P = np.zeros((len(prompts_P),), np.float32)
        of_bucket: dict[int, list[int]] = {}
        for p, prompt in enumerate(prompts_P):
            self.check_length(len(prompt), 0, f"prompt {p}")
            of_bucket.setdefault(self.shapes.bucket(len(prompt)), []).append(p)
        for slots, group in sorted(of_bucket.items()):
            rows = self.read_at_once(slots)
            for start in range(0, len(group), rows):
                batch = group[start : start + rows]
                tokens_BT = np.zeros((rows, slots), np.int32)
                last_B = np.zeros((rows,), np.int32)
                for row, p in enumerate(batch):
                    tokens_BT[row, : len(prompts_P[p])] = prompts_P[p]
                    last_B[row] = len(prompts_P[p]) - 1
                with self.running(f"log-odds {rows}x{slots}"):
                    placed = self.place_rows((tokens_BT, last_B))
                    found_B = fetch(_log_odds(self.model, *placed, pair=pair))
                log_odds_P[batch] = found_B[: len(batch)]
        return log_odds_P

    # --- rows that go on ------------------------------------------------------------------------

    def prefill(self, prompts_P: Sequence[Sequence[int]], slots: int) -> SamplerState:
        """Read up to `max_rows` prompts into rows that hold at least `slots` tokens."""
        longest = max(len(prompt) for prompt in prompts_P)
        slots, length = self.shapes.bucket(max(longest, slots)), self.shapes.bucket(longest)
        tokens_BT = np.zeros((self.shapes.rows_for(len(prompts_P)), length), np.int32)
        num_tokens_B = np.ones((tokens_BT.shape[0],), np.int32)
        for row, prompt in enumerate(prompts_P):
            tokens_BT[row, : len(prompt)] = prompt
            num_tokens_B[row] = len(prompt)
        with self.running(f"prefill rows={len(tokens_BT)} tokens={length} slots={slots}"):
            return _prefill(self.model, *self.place_rows((tokens_BT, num_tokens_B)), slots=slots)

    def fork(
        self, state: SamplerState, source_B: np.ndarray, num_tokens_B: np.ndarray
    ) -> SamplerState:
        """New rows: row b is row `source_B[b]` of `state`, cut to its first `num_tokens_B[b]`."""
        rows = self.shapes.rows_for(len(source_B))
        padding = rows - len(source_B)
        source_B = np.pad(source_B.astype(np.int32), (0, padding))
        num_tokens_B = np.pad(num_tokens_B.astype(np.int32), (0, padding), constant_values=1)
        with self.running(f"fork rows={state.rows}->{rows} slots={state.cache.slots}"):
            return _fork(state, *self.place_rows((source_B, num_tokens_B)))

    def decode(
        self,
        state: SamplerState,
        params: SamplingParams,
        *,
        key: jax.Array,
        row_ids: Sequence[str],
        limits_B: Sequence[int] | None = None,
    ) -> tuple[SampleOutput, SamplerState]:
        """Sample on from every row that has a row id; `state` is consumed, and the new state stands
        after the sampled tokens. A row ends at `limits_B[b]` tokens in all, by default at its
        slots."""
        hash_B = np.zeros((state.rows,), np.uint32)
        hash_B[: len(row_ids)] = [row_hash(row_id) for row_id in row_ids]
        active_B = np.arange(state.rows) < len(row_ids)
        limit_B = np.full((state.rows,), state.cache.slots, np.int32)
        if limits_B is not None:
            limit_B[: len(limits_B)] = np.minimum(limits_B, state.cache.slots)
        draw = TokenSampler.create(key, params.temperature, params.top_k, params.top_p)
        with self.running(
            f"decode rows={state.rows} slots={state.cache.slots} new={params.max_new_tokens} {draw}"
        ):
            state, (tokens_BC, logprobs_BC, length_B, stop_reason_B) = _decode(
                self.model,
                state,
                *self.place_rows((hash_B, active_B, limit_B)),
                draw,
                np.array(params.stop_ids, np.int32),
                self.stop_tables[params.stop_strings],
                max_new_tokens=params.max_new_tokens,
            )
        arrays = (tokens_BC, logprobs_BC, length_B, stop_reason_B)
        output = SampleOutput(*(np.asarray(array)[: len(row_ids)] for array in arrays))
        self.sampled_tokens += int(output.length_B.sum())
        return output, state

    # --- devices --------------------------------------------------------------------------------

    @property
    def shards(self) -> int:
        """Over how many devices rows are split."""
        return 1 if self.mesh is None else batch_shards(self.mesh)

    def read_at_once(self, slots: int) -> int:
        """How many prompts of a bucket go through the network at once."""
        return self.shards * max(1, READ_TOKENS // slots)

    def place_rows(self, arrays: Any) -> Any:
        """Arrays with a leading axis of rows, onto the mesh."""
        return arrays if self.mesh is None else shard_batch(arrays, self.mesh)


# --- device programs ----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("pair",))
def _log_odds(
    model: Decoder, tokens_BT: jax.Array, last_B: jax.Array, *, pair: tuple[int, int]
) -> jax.Array:
    """(B,): of the first of two tokens against the second, after the token at `last_B`."""
    hidden_BTD, _ = model.prefill(tokens_BT)
    hidden_B1D = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
    logits_B2 = model.pair_logits(hidden_B1D, pair)[:, 0]
    return logits_B2[:, 0] - logits_B2[:, 1]


@functools.partial(jax.jit, static_argnames=("slots",))
def _prefill(
    model: Decoder, tokens_BT: jax.Array, num_tokens_B: jax.Array, *, slots: int
) -> SamplerState:
    B, T = tokens_BT.shape
    cache = KVCache.create(model.config, B, slots, model.compute_dtype)
    _, cache = model.append(tokens_BT, num_tokens_B - 1, cache)
    return SamplerState(cache, jnp.pad(tokens_BT, ((0, 0), (0, slots - T))), num_tokens_B)


@jax.jit
def _fork(state: SamplerState, source_B: jax.Array, num_tokens_B: jax.Array) -> SamplerState:
    return SamplerState(
        cache=state.cache.take(source_B).rewind(num_tokens_B - 1),
        tokens_BS=state.tokens_BS[source_B],
        num_tokens_B=num_tokens_B,
    )


@functools.partial(jax.jit, static_argnames=("max_new_tokens",), donate_argnames=("state",))
def _decode(
    model: Decoder,
    state: SamplerState,
    row_hash_B: jax.Array,
    active_B: jax.Array,
    limit_B: jax.Array,
    draw: TokenSampler,
    stop_ids: jax.Array,
    stop_table_SV: jax.Array | None,
    *,
    max_new_tokens: int,
) -> tuple[SamplerState, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    """One while_loop: a step per new token, until every row has stopped."""
    B = state.rows
    rows_B = jnp.arange(B)

    def step(carry: Any) -> Any:
        t, state, running_B, match_B, reason_B, tokens_BC, logprobs_BC = carry
        last_B = state.tokens_BS[rows_B, state.num_tokens_B - 1]
        hidden_BTD, cache = model.append(last_B[:, None], running_B.astype(jnp.int32), state.cache)
        token_B, logprob_B = draw(model.logits(hidden_BTD[:, 0]), row_hash_B, state.num_tokens_B)
        token_B = jnp.where(running_B, token_B, 0)
        # A stopped row writes its last token again, where it stands.
        place_B = jnp.where(running_B, state.num_tokens_B, state.num_tokens_B - 1)
        kept_B = jnp.where(running_B, token_B, last_B)
        state = SamplerState(
            cache=cache,
            tokens_BS=state.tokens_BS.at[rows_B, place_B].set(kept_B),
            num_tokens_B=state.num_tokens_B + running_B.astype(jnp.int32),
        )
        tokens_BC = tokens_BC.at[:, t].set(token_B)
        logprobs_BC = logprobs_BC.at[:, t].set(jnp.where(running_B, logprob_B, 0.0))
        stop_B, why_B, match_B = find_stops(token_B, match_B, stop_ids, stop_table_SV)
        reason_B = jnp.where(running_B, why_B, reason_B)
        running_B = running_B & ~stop_B & (state.num_tokens_B < limit_B)
        return t + 1, state, running_B, match_B, reason_B, tokens_BC, logprobs_BC

    def go_on(carry: Any) -> jax.Array:
        t, _, running_B, *_ = carry
        return (t < max_new_tokens) & jnp.any(running_B)

    before_B = state.num_tokens_B
    carry = (
        jnp.int32(0),
        state,
        active_B & (state.num_tokens_B < limit_B),
        jnp.zeros((B,), jnp.int32),
        jnp.full((B,), int(StopReason.LENGTH), jnp.int32),
        jnp.zeros((B, max_new_tokens), jnp.int32),
        jnp.zeros((B, max_new_tokens), jnp.float32),
    )
    _, state, _, _, reason_B, tokens_BC, logprobs_BC = jax.lax.while_loop(go_on, step, carry)
    return state, (tokens_BC, logprobs_BC, state.num_tokens_B - before_B, reason_B)

"""Sampling from the policy and the judge: read prompts, fork rows, decode, rewind.

A row's state is its tokens, and a cache of all of them but the last. A decode step feeds the last
token and samples the next, so reading a prompt needs no logits, and a fork at, or a rewind to, the
first n tokens is the same thing: cache length n - 1. Rollouts, Monte Carlo annotation, GRPO groups
and chunk-reset search are this one mechanism.

Noise: a row draws one uniform per position, from fold_in(fold_in(key, crc32(row_id)), position),
and takes the token where the cumulative distribution passes it. A row's result therefore depends on
its id, not on its slot or on the rows beside it.

Log-probs are of the distribution sampled from, after temperature, top-k and top-p.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepwiser_jax.model.kv_cache import KVCache
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.records import UserError
from stepwiser_jax.runtime.mesh import shard_batch
from stepwiser_jax.text.chunks import TokenMatcher
from stepwiser_jax.text.tokenizer import Tokenizer

_CDF_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """`temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch truncation off. A row ends after a
    token of `stop_ids`, or after the token that completes one of `stop_strings`."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


class StopReason(enum.IntEnum):
    LENGTH = 0
    STOP_ID = 1
    STOP_STRING = 2


@dataclasses.dataclass(frozen=True)
class SampleOutput:
    """Host arrays; row b's completion is its first `length_B[b]` tokens, end token included."""

    tokens_BC: np.ndarray
    logprobs_BC: np.ndarray
    length_B: np.ndarray
    stop_reason_B: np.ndarray

    def ids(self, b: int) -> list[int]:
        return self.tokens_BC[b, : self.length_B[b]].tolist()

    def logprobs(self, b: int) -> list[float]:
        """Shortest decimals that give the float32 values back."""
        return [float(str(x)) for x in self.logprobs_BC[b, : self.length_B[b]]]


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
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        rows: Sequence[int],
        buckets: Sequence[int],
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Raises UserError if the largest bucket exceeds the model's context."""
        self.model, self.tokenizer, self.mesh = model, tokenizer, mesh
        self.allowed_rows, self.buckets = tuple(rows), tuple(buckets)
        if self.max_length > model.config.max_length:
            raise UserError(
                f"engine.buckets go up to {self.max_length} tokens, the model's context is "
                f"{model.config.max_length}: lower the largest bucket"
            )
        self.compiled_shapes: Counter[str] = Counter()
        self.sampled_tokens = 0
        self._matchers: dict[tuple[str, ...], TokenMatcher] = {}

    @property
    def max_rows(self) -> int:
        return self.allowed_rows[-1]

    @property
    def max_length(self) -> int:
        return self.buckets[-1]

    def with_model(self, model: Transformer) -> Sampler:
        """The same shapes and counters with other weights."""
        other = copy.copy(self)
        other.model = model
        return other

    def check_length(self, ids: Sequence[int], max_new_tokens: int, name: str) -> None:
        """Raises UserError where a prompt with its completion does not fit the context."""
        if len(ids) + max_new_tokens > self.max_length:
            raise UserError(
                f"{name}: prompt of {len(ids)} tokens + max_new_tokens {max_new_tokens} exceeds "
                f"the context of {self.max_length} (the largest of engine.buckets): raise it, "
                "lower max_new_tokens, or leave the item out"
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
        only. Raises UserError for a prompt that does not fit.
        """
        num_rows = len(prompts_P) * group_size
        if len(row_ids) != num_rows or len(set(row_ids)) != num_rows:
            raise ValueError(f"expected {num_rows} different row_ids, found {len(set(row_ids))}")
        rows_of: dict[tuple[int, int], list[int]] = {}
        for b in range(num_rows):
            prompt = prompts_P[b // group_size]
            self.check_length(prompt, params.max_new_tokens, row_ids[b])
            shape = (self._bucket(len(prompt)), self._bucket(len(prompt) + params.max_new_tokens))
            rows_of.setdefault(shape, []).append(b)
        output = SampleOutput(
            np.zeros((num_rows, params.max_new_tokens), np.int32),
            np.zeros((num_rows, params.max_new_tokens), np.float32),
            np.zeros((num_rows,), np.int32),
            np.zeros((num_rows,), np.int32),
        )
        for _, rows in sorted(rows_of.items()):
            for start in range(0, len(rows), self.max_rows):
                batch = rows[start : start + self.max_rows]
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

    # --- rows that go on ------------------------------------------------------------------------

    def prefill(self, prompts_P: Sequence[Sequence[int]], slots: int) -> SamplerState:
        """Read up to `max_rows` prompts into rows that hold at least `slots` tokens."""
        longest = max(len(prompt) for prompt in prompts_P)
        slots, length = self._bucket(max(longest, slots)), self._bucket(longest)
        tokens_BT = np.zeros((self._rows(len(prompts_P)), length), np.int32)
        num_tokens_B = np.ones((tokens_BT.shape[0],), np.int32)
        for row, prompt in enumerate(prompts_P):
            tokens_BT[row, : len(prompt)] = prompt
            num_tokens_B[row] = len(prompt)
        self._count(f"prefill rows={len(tokens_BT)} tokens={length} slots={slots}")
        return _prefill(self.model, *self._place((tokens_BT, num_tokens_B)), slots=slots)

    def fork(
        self, state: SamplerState, source_B: np.ndarray, num_tokens_B: np.ndarray
    ) -> SamplerState:
        """New rows: row b is row `source_B[b]` of `state`, cut to its first `num_tokens_B[b]`."""
        rows = self._rows(len(source_B))
        padding = rows - len(source_B)
        source_B = np.pad(source_B.astype(np.int32), (0, padding))
        num_tokens_B = np.pad(num_tokens_B.astype(np.int32), (0, padding), constant_values=1)
        self._count(f"fork rows={state.rows}->{rows} slots={state.cache.slots}")
        return _fork(state, *self._place((source_B, num_tokens_B)))

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
        behind the sampled tokens. A row ends at `limits_B[b]` tokens in all, by default at its
        slots."""
        ids_B = np.zeros((state.rows,), np.uint32)
        ids_B[: len(row_ids)] = [zlib.crc32(row_id.encode()) for row_id in row_ids]
        active_B = np.arange(state.rows) < len(row_ids)
        limit_B = np.full((state.rows,), state.cache.slots, np.int32)
        if limits_B is not None:
            limit_B[: len(limits_B)] = np.minimum(limits_B, state.cache.slots)
        greedy, top_p = params.temperature == 0, params.top_p < 1
        name = "greedy" if greedy else f"top_k={params.top_k} top_p={top_p}"
        self._count(
            f"decode rows={state.rows} slots={state.cache.slots} new={params.max_new_tokens} {name}"
        )
        state, (tokens_BC, logprobs_BC, length_B, stop_reason_B) = _decode(
            self.model,
            state,
            key,
            *self._place((ids_B, active_B, limit_B)),
            jnp.float32(params.temperature),
            jnp.float32(params.top_p),
            jnp.array(params.stop_ids, jnp.int32),
            self._stop_table(params.stop_strings),
            max_new_tokens=params.max_new_tokens,
            greedy=greedy,
            top_k=params.top_k,
            truncate_p=top_p,
        )
        arrays = (tokens_BC, logprobs_BC, length_B, stop_reason_B)
        output = SampleOutput(*(np.asarray(array)[: len(row_ids)] for array in arrays))
        self.sampled_tokens += int(output.length_B.sum())
        return output, state

    # --- shapes ---------------------------------------------------------------------------------

    def _bucket(self, length: int) -> int:
        """The smallest allowed number of slots that holds `length` tokens."""
        for bucket in self.buckets:
            if length <= bucket:
                return bucket
        raise UserError(
            f"{length} tokens exceed the context of {self.max_length} (the largest of "
            "engine.buckets): raise it, or shorten the prompt"
        )

    def _rows(self, count: int) -> int:
        for rows in self.allowed_rows:
            if count <= rows:
                return rows
        raise ValueError(f"{count} rows exceed the largest batch of {self.max_rows}")

    def _count(self, shape: str) -> None:
        self.compiled_shapes[shape] += 1

    def _place(self, arrays: Any) -> Any:
        return arrays if self.mesh is None else shard_batch(arrays, self.mesh)

    def _stop_table(self, stop_strings: tuple[str, ...]) -> jax.Array | None:
        """The stop strings' automaton over token ids, or None."""
        if not stop_strings:
            return None
        if self.tokenizer is None:
            raise ValueError("stop_strings need a tokenizer: Sampler(model, tokenizer, ...)")
        if stop_strings not in self._matchers:
            matcher = TokenMatcher.build(self.tokenizer.token_bytes(), stop_strings)
            self._matchers[stop_strings] = matcher
        return jnp.asarray(self._matchers[stop_strings].table_SV)


# --- device programs ----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("slots",))
def _prefill(
    model: Transformer, tokens_BT: jax.Array, num_tokens_B: jax.Array, *, slots: int
) -> SamplerState:
    B, T = tokens_BT.shape
    cache = KVCache.create(model.config, B, slots, model.compute_dtype)
    _, cache = model.extend(tokens_BT, num_tokens_B - 1, cache, model.unstacked())
    return SamplerState(cache, jnp.pad(tokens_BT, ((0, 0), (0, slots - T))), num_tokens_B)


@jax.jit
def _fork(state: SamplerState, source_B: jax.Array, num_tokens_B: jax.Array) -> SamplerState:
    return SamplerState(
        cache=state.cache.take(source_B).rewind(num_tokens_B - 1),
        tokens_BS=state.tokens_BS[source_B],
        num_tokens_B=num_tokens_B,
    )


@functools.partial(
    jax.jit,
    static_argnames=("max_new_tokens", "greedy", "top_k", "truncate_p"),
    donate_argnames=("state",),
)
def _decode(
    model: Transformer,
    state: SamplerState,
    key: jax.Array,
    row_hash_B: jax.Array,
    active_B: jax.Array,
    limit_B: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    stop_ids: jax.Array,
    stop_table_SV: jax.Array | None,
    *,
    max_new_tokens: int,
    greedy: bool,
    top_k: int,
    truncate_p: bool,
) -> tuple[SamplerState, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    """One while_loop: a step per new token, until every row has stopped."""
    B = state.rows
    blocks = model.unstacked()
    row_keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, row_hash_B)
    rows_B = jnp.arange(B)

    def sample(logits_BV: jax.Array, num_tokens_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        if greedy:
            token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
            return token_B, jnp.zeros((B,), jnp.float32)
        logprobs_BV = truncate(logits_BV / temperature, top_k, top_p if truncate_p else None)
        uniform_B = jax.vmap(lambda k, n: jax.random.uniform(jax.random.fold_in(k, n)))(
            row_keys_B, num_tokens_B
        )
        token_B = inverse_cdf(jnp.exp(logprobs_BV), uniform_B)
        return token_B, jnp.minimum(logprobs_BV[rows_B, token_B], 0.0)

    def step(carry: Any) -> Any:
        t, state, running_B, match_B, reason_B, tokens_BC, logprobs_BC = carry
        last_B = state.tokens_BS[rows_B, state.num_tokens_B - 1]
        hidden_BTD, cache = model.extend(
            last_B[:, None], running_B.astype(jnp.int32), state.cache, blocks
        )
        token_B, logprob_B = sample(model.logits(hidden_BTD[:, 0]), state.num_tokens_B)
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
        hit_id_B = jnp.any(token_B[:, None] == stop_ids[None], axis=-1) & running_B
        hit_string_B = jnp.zeros_like(hit_id_B)
        if stop_table_SV is not None:
            match_B = stop_table_SV[match_B, token_B].astype(jnp.int32)
            hit_string_B = (match_B == stop_table_SV.shape[0] - 1) & running_B
        reason_B = jnp.where(hit_string_B, int(StopReason.STOP_STRING), reason_B)
        reason_B = jnp.where(hit_id_B, int(StopReason.STOP_ID), reason_B)
        running_B = running_B & ~hit_id_B & ~hit_string_B & (state.num_tokens_B < limit_B)
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


def inverse_cdf(probs_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The token at which the cumulative distribution passes `uniform_B`.

    Two levels, blocks of 256 tokens and tokens of a block: one uniform per row instead of V Gumbel
    draws, and sums short enough for float32. Never a token of probability 0.
    """
    B, V = probs_BV.shape
    blocks = -(-V // _CDF_BLOCK)
    padded_BV = jnp.pad(probs_BV, ((0, 0), (0, blocks * _CDF_BLOCK - V)))
    probs_BNM = padded_BV.reshape(B, blocks, _CDF_BLOCK)
    mass_BN = jnp.sum(probs_BNM, axis=-1)
    block_B, rest_B = _pass(mass_BN, uniform_B * jnp.sum(mass_BN, axis=-1))
    inside_BM = jnp.take_along_axis(probs_BNM, block_B[:, None, None], axis=1)[:, 0]
    token_B, _ = _pass(inside_BM, rest_B)
    return (block_B * _CDF_BLOCK + token_B).astype(jnp.int32)


def _pass(mass_BN: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the running sum first exceeds the target, and how far into that entry the target is."""
    N = mass_BN.shape[-1]
    cumulative_BN = jnp.cumsum(mass_BN, axis=-1)
    index_B = jnp.sum(cumulative_BN <= target_B[:, None], axis=-1)
    # Rounding can put the target at the very end: take the last entry that has mass.
    last_B = N - 1 - jnp.argmax(mass_BN[:, ::-1] > 0, axis=-1)
    index_B = jnp.minimum(index_B, last_B)
    before_B = jnp.take_along_axis(cumulative_BN - mass_BN, index_B[:, None], axis=-1)[:, 0]
    # Rounding can put the entry's start behind the target, and a target below 0 would pass entries
    # without mass.
    return index_B, jnp.maximum(target_B - before_B, 0)

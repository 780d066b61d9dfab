"""The engine's state on the device, and the programs that change it.

A row's state is its tokens, and a cache of all of them but the last: a decode step feeds the last
token and samples the next, so a prefill computes no logits. A slot's rows share the keys and values
of its prefix; a row stores only those of the tokens that it sampled, in the suffix cache.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stepwiser_jax.distributed.mesh import batch_sharding, cache_sharding, replicated
from stepwiser_jax.inference.params import StopReason
from stepwiser_jax.inference.scheduler import Grid
from stepwiser_jax.inference.stops import find_stops
from stepwiser_jax.inference.token_sampler import TokenSampler
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.decoder import Decoder
from stepwiser_jax.model.kv_cache import KVCache, SharedPrefix, SuffixCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StartingRows:
    """The rows that start with a burst: `starts_B` says which, the rest is about these rows. A row
    sees `prefix_length_B` tokens of its slot's prefix, and then feeds `last_token_B`. It ends after
    `limit_B` tokens; `hash_B` seeds its noise."""

    starts_B: Any
    prefix_length_B: Any
    last_token_B: Any
    limit_B: Any
    hash_B: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EngineState:
    """The decoding grid on the device: Q slots of R rows, B = Q * R, row b in slot b // R.

    `prefix` holds a sequence for each slot, and how many of its tokens each row sees. `suffix`
    caches the tokens that each row has fed since, as many as the row has sampled. `match_B` are
    the states of the stop strings' automaton. `log_odds_BC` is there if tokens are compared."""

    prefix: SharedPrefix
    suffix: SuffixCache
    last_token_B: jax.Array
    limit_B: jax.Array
    hash_B: jax.Array
    running_B: jax.Array
    match_B: jax.Array
    reason_B: jax.Array
    tokens_BC: jax.Array
    logprobs_BC: jax.Array
    log_odds_BC: jax.Array | None

    @property
    def grid(self) -> Grid:
        slots = self.prefix.cache.length_B.shape[0]
        return Grid(slots, self.running_B.shape[0] // slots)


def state_sharding(state: EngineState, config: ModelConfig, mesh: Mesh) -> EngineState:
    """Returns shardings that split rows as a batch's, and key/value heads as the parameters'."""
    heads = cache_sharding(mesh, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads)
    by_rank = {0: replicated(mesh), 4: heads}
    return jax.tree.map(lambda x: by_rank.get(x.ndim, batch_sharding(mesh)), state)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def empty_state(
    decoder: Decoder,
    mesh: Mesh | None,
    grid: Grid,
    prefix_tokens: int,
    max_new_tokens: int,
    compares: bool = False,
) -> EngineState:
    """Creates the state on the devices where it belongs: no device ever holds all of it. It has
    room for log-odds if it `compares` tokens."""
    B = grid.rows
    config, dtype = decoder.config, decoder.compute_dtype
    state = EngineState(
        prefix=SharedPrefix(
            KVCache.create(config, grid.slots, prefix_tokens, dtype), jnp.zeros((B,), jnp.int32)
        ),
        suffix=SuffixCache.create(config, B, max_new_tokens, decoder.suffix_dtype),
        last_token_B=jnp.zeros((B,), jnp.int32),
        limit_B=jnp.zeros((B,), jnp.int32),
        hash_B=jnp.zeros((B,), jnp.uint32),
        running_B=jnp.zeros((B,), bool),
        match_B=jnp.zeros((B,), jnp.int32),
        reason_B=jnp.zeros((B,), jnp.int32),
        tokens_BC=jnp.zeros((B, max_new_tokens), jnp.int32),
        logprobs_BC=jnp.zeros((B, max_new_tokens), jnp.float32),
        log_odds_BC=jnp.zeros((B, max_new_tokens), jnp.float32) if compares else None,
    )
    if mesh is None:
        return state
    return jax.lax.with_sharding_constraint(state, state_sharding(state, config, mesh))


@functools.partial(jax.jit, donate_argnames=("state",))
def prefill(
    decoder: Decoder, state: EngineState, tokens_PT: jax.Array, slot_P: jax.Array
) -> EngineState:
    """Stores the keys and values of P right-padded prefixes in these slots."""
    _, cache = decoder.prefill(tokens_PT)
    stored = jax.tree.map(
        lambda old, new: old.at[slot_P].set(new, mode="drop"), state.prefix.cache, cache
    )
    return dataclasses.replace(state, prefix=SharedPrefix(stored, state.prefix.length_B))


@functools.partial(jax.jit, donate_argnames=("state",))
def extend_prefixes(
    decoder: Decoder,
    state: EngineState,
    tokens_PT: jax.Array,
    source_P: jax.Array,
    shared_P: jax.Array,
    slot_P: jax.Array,
) -> EngineState:
    """Stores P prefixes in these slots: the keys and values of the first `shared_P` tokens are
    those of slot `source_P`, and after them the right-padded `tokens_PT` are read."""
    cache, T = state.prefix.cache, tokens_PT.shape[1]
    room = ((0, 0), (0, 0), (0, T), (0, 0))  # a write past the end would move to the left
    copied = cache.take(source_P)
    copied = KVCache(
        tuple(jnp.pad(x, room) for x in copied.keys),
        tuple(jnp.pad(x, room) for x in copied.values),
        shared_P,
    )
    _, extended = decoder.append(tokens_PT, jnp.zeros_like(shared_P), copied)

    def store(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[slot_P].set(new[:, :, : cache.capacity], mode="drop")

    stored = dataclasses.replace(
        cache,
        keys=tuple(map(store, cache.keys, extended.keys)),
        values=tuple(map(store, cache.values, extended.values)),
    )
    return dataclasses.replace(state, prefix=SharedPrefix(stored, state.prefix.length_B))


@functools.partial(jax.jit, donate_argnames=("state",))
def recall_prefixes(state: EngineState, cache: KVCache, source_Q: jax.Array) -> EngineState:
    """Copies row `source_Q` of a cache into each slot."""
    return dataclasses.replace(
        state, prefix=SharedPrefix(cache.take(source_Q), state.prefix.length_B)
    )


@jax.jit
def shrink_grid(state: EngineState, source_B: jax.Array, is_used_B: jax.Array) -> EngineState:
    """Returns a grid of one row per slot: row b is row `source_B[b]`, with the prefix of its slot.
    Rows that are not used do not run."""

    def take(x: jax.Array) -> jax.Array:
        return jnp.take(x, source_B, axis=0)

    suffix = state.suffix
    return EngineState(
        prefix=SharedPrefix(
            state.prefix.cache.take(source_B // state.grid.rows_per_slot),
            take(state.prefix.length_B),
        ),
        suffix=dataclasses.replace(
            suffix,
            keys=tuple(map(take, suffix.keys)),
            values=tuple(map(take, suffix.values)),
            length_B=take(suffix.length_B),
        ),
        last_token_B=take(state.last_token_B),
        limit_B=take(state.limit_B),
        hash_B=take(state.hash_B),
        running_B=take(state.running_B) & is_used_B,
        match_B=take(state.match_B),
        reason_B=take(state.reason_B),
        tokens_BC=take(state.tokens_BC),
        logprobs_BC=take(state.logprobs_BC),
        log_odds_BC=None if state.log_odds_BC is None else take(state.log_odds_BC),
    )


@functools.partial(jax.jit, static_argnames=("compared",), donate_argnames=("state",))
def decode_burst(
    decoder: Decoder,
    state: EngineState,
    starting: StartingRows,
    token_sampler: TokenSampler,
    exit_at: jax.Array,
    max_steps: jax.Array,
    stop_ids: jax.Array,
    stop_table_AV: jax.Array | None,
    compared: tuple[int, int] | None = None,
) -> EngineState:
    """Starts the new rows, then takes decode steps until at most `exit_at` rows are running, or for
    `max_steps` steps. Records the log-odds of the `compared` tokens at each step."""

    def start(new: Any, old: jax.Array) -> jax.Array:
        return jnp.where(starting.starts_B, new, old)

    prefix, suffix = state.prefix, state.suffix
    state = dataclasses.replace(
        state,
        prefix=SharedPrefix(prefix.cache, start(starting.prefix_length_B, prefix.length_B)),
        suffix=dataclasses.replace(suffix, length_B=start(0, suffix.length_B)),
        last_token_B=start(starting.last_token_B, state.last_token_B),
        limit_B=start(starting.limit_B, state.limit_B),
        hash_B=start(starting.hash_B, state.hash_B),
        running_B=state.running_B | starting.starts_B,
        match_B=start(0, state.match_B),
        reason_B=start(int(StopReason.LENGTH), state.reason_B),
    )
    rows_B = jnp.arange(state.running_B.shape[0])

    def step(carry: tuple[jax.Array, EngineState]) -> tuple[jax.Array, EngineState]:
        steps, state = carry
        running_B, sampled_B = state.running_B, state.suffix.length_B
        hidden_BD, suffix = decoder.decode_step(
            state.last_token_B, running_B, state.prefix, state.suffix
        )
        position_B = state.prefix.length_B + 1 + sampled_B
        token_B, logprob_B = token_sampler(decoder.logits(hidden_BD), state.hash_B, position_B)
        token_B = jnp.where(running_B, token_B, state.last_token_B)
        # A row that has ended writes after its last token, where nothing is read.
        tokens_BC = state.tokens_BC.at[rows_B, sampled_B].set(token_B, mode="drop")
        logprobs_BC = state.logprobs_BC.at[rows_B, sampled_B].set(logprob_B, mode="drop")
        log_odds_BC = state.log_odds_BC
        if compared is not None:
            assert log_odds_BC is not None
            log_odds_B = pair_log_odds(decoder, hidden_BD, compared)
            log_odds_BC = log_odds_BC.at[rows_B, sampled_B].set(log_odds_B, mode="drop")
        stop_B, reason_B, match_B = find_stops(token_B, state.match_B, stop_ids, stop_table_AV)
        return steps + 1, dataclasses.replace(
            state,
            suffix=suffix,
            last_token_B=token_B,
            running_B=running_B & ~stop_B & (suffix.length_B < state.limit_B),
            match_B=jnp.where(running_B, match_B, state.match_B),
            reason_B=jnp.where(running_B, reason_B, state.reason_B),
            tokens_BC=tokens_BC,
            logprobs_BC=logprobs_BC,
            log_odds_BC=log_odds_BC,
        )

    def goes_on(carry: tuple[jax.Array, EngineState]) -> jax.Array:
        steps, state = carry
        return (jnp.sum(state.running_B) > exit_at) & (steps < max_steps)

    return jax.lax.while_loop(goes_on, step, (jnp.int32(0), state))[1]


@functools.partial(jax.jit, static_argnames=("pair",))
def log_odds_at(
    decoder: Decoder, tokens_BT: jax.Array, last_B: jax.Array, *, pair: tuple[int, int]
) -> jax.Array:
    """Returns the log-odds (B,) of two tokens after the token at `last_B` of each row."""
    hidden_BTD, _ = decoder.prefill(tokens_BT)
    hidden_B1D = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
    return pair_log_odds(decoder, hidden_B1D[:, 0], pair)


def pair_log_odds(decoder: Decoder, hidden_BD: jax.Array, pair: tuple[int, int]) -> jax.Array:
    """Returns the log-odds (B,), float32, of two tokens after each hidden state."""
    logits_B2 = decoder.pair_logits(hidden_BD, pair)
    return logits_B2[:, 0] - logits_B2[:, 1]

"""Sampling many rows from few prefixes: the engine behind rollouts, Monte Carlo values and judging.

    trunk   a sequence that goes through the network once: a prompt, or a trajectory
    fork    a row that goes on from the first n tokens of a trunk

    P places, each with one stored trunk and R rows -> decode until some rows have ended -> hand
    their completions out, start waiting forks in their slots -> ...

A trunk's keys and values are stored once, and read once a step for all R rows of its place; a row
keeps only what it has sampled itself. A place takes the next trunk when its rows have all ended.
While the device decodes, the caller has the completions of the segment before. When nothing waits
and few rows are left, they move to a smaller grid.

On a mesh of several processes all of them make the same calls: each holds all completions, so each
takes the same next step.

A row's state is its tokens, and a cache of all of them but the last: a decode step feeds the last
token and samples the next, so reading a trunk needs no logits. `Sampler` is the same without trunks
and without refilling, and the reference: noise is equal, everything else equal to rounding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stepwiser_jax.distributed.mesh import batch_sharding, cache_sharding, fetch, replicated
from stepwiser_jax.inference.params import (
    SampleOutput,
    SamplingParams,
    StopReason,
    find_stops,
    shortest_decimals,
)
from stepwiser_jax.inference.reference_sampler import Sampler
from stepwiser_jax.inference.token_sampler import TokenSampler, row_hash
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.decoder import Decoder
from stepwiser_jax.model.kv_cache import KVCache, SharedPrefix, SuffixCache
from stepwiser_jax.runs.progress import rows_done

SHARED_BY = 16
"""So many rows of a trunk run at the same time, where it has them and other trunks wait: enough for
its reading to cost little, few enough for a place not to wait long for its last rows."""

REFILL_SHARE = 8
"""While forks wait, a segment ends when one of this number of rows has ended."""

SEGMENT_STEPS = 512
"""The most tokens of a row in a segment: seconds of decoding, after which a run can be stopped."""


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """A row that goes on after the first `num_tokens` tokens of its trunk, by at most
    `max_new_tokens`."""

    row_id: str
    num_tokens: int
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class Prefix:
    """A sequence of token ids and its forks."""

    ids: Sequence[int]
    forks: Sequence[SampleRequest]

    @property
    def num_tokens(self) -> int:
        """As far as its longest fork needs it."""
        return max(fork.num_tokens for fork in self.forks)


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a row sampled, end token included; `logprobs` are shortest decimals of float32."""

    row_id: str
    ids: list[int]
    logprobs: list[float]
    stop_reason: StopReason


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What the host tells the device of rows that start: see `SampleRequest`."""

    starts_B: Any
    prefix_length_B: Any
    last_token_B: Any
    limit_B: Any
    hash_B: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EngineState:
    """A grid of P places by R rows, B = P R, row b at place b // R.

    `prefix` are the trunks, of which row b sees all but the last token of its fork; `own` caches
    what was fed since, so `own.length_B` is also the number of tokens sampled."""

    prefix: SharedPrefix
    own: SuffixCache
    last_token_B: jax.Array
    limit_B: jax.Array
    hash_B: jax.Array
    running_B: jax.Array
    match_B: jax.Array
    reason_B: jax.Array
    tokens_BC: jax.Array
    logprobs_BC: jax.Array


class Engine(Sampler):
    """A sampler whose `generate` shares prefixes and refills slots. `rows` are the allowed numbers
    of rows in flight; `buckets` the allowed lengths of a stored trunk, the last is the context of
    trunk and completion together."""

    def generate(
        self,
        prompts_P: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        key: jax.Array,
        row_ids: Sequence[str],
        group_size: int = 1,
    ) -> SampleOutput:
        """As `Sampler.generate`; every prompt is a trunk."""
        output = SampleOutput.empty(len(prompts_P) * group_size, row_ids, params.max_new_tokens)
        trunks = [
            Prefix(
                prompt,
                [
                    SampleRequest(row_id, len(prompt), params.max_new_tokens)
                    for row_id in row_ids[p * group_size : (p + 1) * group_size]
                ],
            )
            for p, prompt in enumerate(prompts_P)
        ]
        place = {row_id: b for b, row_id in enumerate(row_ids)}
        for done in chain.from_iterable(self.sample(trunks, params, key=key)):
            b, length = place[done.row_id], len(done.ids)
            output.tokens_BC[b, :length] = done.ids
            output.logprobs_BC[b, :length] = done.logprobs
            output.length_B[b] = length
            output.stop_reason_B[b] = done.stop_reason
        return output

    @property
    def own_dtype(self) -> Any:
        """Returns the type of the rows' own keys and values."""
        return self.model.suffix_dtype

    def first_grid(self, trunks: int, forks: int, rows_per_trunk: int) -> tuple[int, int]:
        """P places of R rows for so many trunks with at most so many forks each: the smallest that
        holds all at once, or the largest there is. Every shard of the rows holds whole places.

        R is a power of two, so that few shapes are compiled, unless rows would be idle for that.
        """
        P = R = 0
        for rows in self.shapes.rows:
            shared_by = min(forks, max(rows_per_trunk, rows // trunks))
            grids = []
            for R in (1 << (shared_by - 1).bit_length(), shared_by):
                R = min(R, rows // self.shards)
                P = rows // R // self.shards * self.shards
                grids.append((min(trunks, P) * min(forks, R), P, R))
            busy, P, R = max(grids, key=lambda grid: grid[0])
            if trunks * forks <= busy:
                break
        return P, R

    def sample(
        self,
        trunks: Sequence[Prefix],
        params: SamplingParams,
        *,
        key: jax.Array,
        wanted: Callable[[SampleRequest], bool] | None = None,
        rows_per_trunk: int = SHARED_BY,
    ) -> Iterator[list[Completion]]:
        """Completions of all forks, some at a time, in the order in which they end.

        `wanted` is asked before a fork starts; one that is not wanted is left out. With it there is
        a part, an empty one too, after each segment, while the device waits. Up to
        `rows_per_trunk` forks of a trunk run at the same time; more, where rows would stay idle.
        `params.max_new_tokens` is the most that any fork may sample. Before anything is sampled,
        raises UserError for a fork that does not fit the context or goes on from nothing, and
        ValueError for one that reaches over its trunk or `params`, or a trunk without forks.
        """
        by_bucket: dict[int, list[Prefix]] = {}
        for trunk in trunks:
            if not trunk.forks:
                raise ValueError(f"a trunk of {len(trunk.ids)} tokens has no forks")
            for fork in trunk.forks:
                self.check_length(fork.num_tokens, fork.max_new_tokens, fork.row_id)
                if fork.num_tokens > len(trunk.ids):
                    raise ValueError(
                        f"{fork.row_id} goes on after token {fork.num_tokens} of a trunk of "
                        f"{len(trunk.ids)}"
                    )
                if not 1 <= fork.max_new_tokens <= params.max_new_tokens:
                    raise ValueError(
                        f"{fork.row_id} has max_new_tokens {fork.max_new_tokens}, expected 1 to "
                        f"{params.max_new_tokens}, that of params"
                    )
            by_bucket.setdefault(self.shapes.bucket(trunk.num_tokens), []).append(trunk)
        done, total = 0, sum(len(trunk.forks) for trunk in trunks)
        for slots, group in sorted(by_bucket.items()):
            run = _Run(self, group, params, key, slots, wanted, rows_per_trunk)
            for ended in run.completions():
                done += len(ended)
                rows_done(done, total, sum(len(completion.ids) for completion in ended))
                yield ended


class _Run:
    """The trunks of one bucket on their way through the grid: what the host knows of it."""

    def __init__(
        self,
        engine: Engine,
        trunks: Sequence[Prefix],
        params: SamplingParams,
        key: jax.Array,
        slots: int,
        wanted: Callable[[SampleRequest], bool] | None,
        rows_per_trunk: int,
    ):
        self.wanted = wanted
        self.engine, self.params, self.slots = engine, params, slots
        self.waiting_trunks = deque(trunks)
        self.draw = TokenSampler.create(key, params.temperature, params.top_k, params.top_p)
        self.stop_table = engine.stop_tables[params.stop_strings]
        most = max(len(trunk.forks) for trunk in trunks)
        self.places, self.rows = engine.first_grid(len(trunks), most, rows_per_trunk)
        self.waiting: list[deque[SampleRequest]] = [deque() for _ in range(self.places)]
        self.trunk_at = [Prefix((), ())] * self.places
        self.running: dict[int, SampleRequest] = {}
        self.state = empty_state(
            engine.model,
            engine.mesh,
            self.places,
            self.rows,
            slots,
            params.max_new_tokens,
            engine.own_dtype,
        )

    def completions(self) -> Iterator[list[Completion]]:
        ended: list[Completion] = []
        while True:
            self._read_trunks()
            starting = self._start_forks()
            if not self.running:
                if self.waiting_trunks:
                    continue  # no fork of the trunks that were in place was wanted
                break
            self._decode_segment(starting)
            if ended:
                yield ended  # while the device decodes
            ended = self._harvest()
            if self.wanted is not None:
                yield ended  # before the next forks start: it says which are wanted
                ended = []
            if self.running:
                self._compact()
        yield ended

    # --- the grid -------------------------------------------------------------------------------

    def _compact(self) -> None:
        """When nothing waits, the rows that are left move to the smallest grid that holds them,
        each to a place of its own: one shape for every allowed number of rows, wherever they lay.
        """
        places = next(n for n in self.engine.shapes.rows if n >= len(self.running))
        if self.waiting_trunks or any(self.waiting) or places >= self.places * self.rows:
            return
        left = sorted(self.running)
        source_B = np.zeros((places,), np.int32)
        source_B[: len(left)] = left
        active_B = np.arange(places) < len(left)
        moves = (source_B // self.rows, source_B, active_B)
        with self.engine.running(f"compact {self._name()} -> {places}x1"):
            self.state = _compact_state(self.state, *self.engine.place_rows(moves))
        self.trunk_at = [self.trunk_at[b // self.rows] for b in source_B]
        self.running = {place: self.running[b] for place, b in enumerate(left)}
        self.waiting = [deque() for _ in range(places)]
        self.places, self.rows = places, 1

    def _name(self) -> str:
        return f"{self.places}x{self.rows}"

    # --- host to device and back ----------------------------------------------------------------

    def _read_trunks(self) -> None:
        """Places whose rows have all ended take the next trunks."""
        busy = {b // self.rows for b in self.running}
        free = [p for p in range(self.places) if p not in busy and not self.waiting[p]]
        fresh = []
        for p in free[: len(self.waiting_trunks)]:
            trunk = self.waiting_trunks.popleft()
            self.trunk_at[p], self.waiting[p] = trunk, deque(trunk.forks)
            fresh.append(p)
        at_once = min(self.places, self.engine.read_at_once(self.slots))
        while fresh:
            count = at_once if 2 * len(fresh) > at_once else self.engine.shards
            self._read(fresh[:count], count)
            fresh = fresh[count:]

    def _read(self, places: Sequence[int], count: int) -> None:
        """Trunks of these places through the network, `count` at once."""
        tokens_QT = np.zeros((count, self.slots), np.int32)
        # Rows without a trunk write to a place that is not there.
        place_Q = np.full((count,), self.places, np.int32)
        for q, p in enumerate(places):
            trunk = self.trunk_at[p]
            tokens_QT[q, : trunk.num_tokens] = trunk.ids[: trunk.num_tokens]
            place_Q[q] = p
        read = self.engine.place_rows((tokens_QT, place_Q))
        with self.engine.running(f"read {count}x{self.slots} into {self.places}"):
            self.state = read_trunks(self.engine.model, self.state, *read)

    def _start_forks(self) -> Rows:
        """Waiting forks take the free slots of their place."""
        B = self.places * self.rows
        rows = Rows(
            starts_B=np.zeros((B,), bool),
            prefix_length_B=np.zeros((B,), np.int32),
            last_token_B=np.zeros((B,), np.int32),
            limit_B=np.zeros((B,), np.int32),
            hash_B=np.zeros((B,), np.uint32),
        )
        for b in range(B):
            fork = None if b in self.running else self._next_fork(b // self.rows)
            if fork is None:
                continue
            self.running[b] = fork
            rows.starts_B[b] = True
            rows.prefix_length_B[b] = fork.num_tokens - 1
            rows.last_token_B[b] = self.trunk_at[b // self.rows].ids[fork.num_tokens - 1]
            rows.limit_B[b] = fork.max_new_tokens
            rows.hash_B[b] = row_hash(fork.row_id)
        return rows

    def _next_fork(self, place: int) -> SampleRequest | None:
        while self.waiting[place]:
            fork = self.waiting[place].popleft()
            if self.wanted is None or self.wanted(fork):
                return fork
        return None

    def _decode_segment(self, starting: Rows) -> None:
        new = self.params.max_new_tokens
        with self.engine.running(f"decode {self._name()} trunk={self.slots} new={new} {self.draw}"):
            self.state = decode_segment(
                self.engine.model,
                self.state,
                self.engine.place_rows(starting),
                self.draw,
                np.int32(self._exit_at()),
                np.array(self.params.stop_ids, np.int32),
                self.stop_table,
            )

    def _exit_at(self) -> int:
        """How many rows may still run when the segment ends: enough have ended to start waiting
        forks, or the rest might fit a smaller grid."""
        running = len(self.running)
        some_ended = running - max(1, running // REFILL_SHARE)
        if self.waiting_trunks or any(self.waiting):
            return some_ended
        smaller = [n for n in self.engine.shapes.rows if n < self.places * self.rows]
        if not smaller:
            return 0
        return smaller[-1] if smaller[-1] < running else some_ended

    def _harvest(self) -> list[Completion]:
        """The rows that have ended; waits for the device."""
        state = self.state
        counters = (state.running_B, state.own.length_B, state.reason_B)
        running_B, length_B, reason_B = fetch(counters)
        ended = [b for b in self.running if not running_B[b]]
        if not ended:
            return []
        tokens_BC, logprobs_BC = fetch((state.tokens_BC, state.logprobs_BC))
        completions = []
        for b in ended:
            length = int(length_B[b])
            self.engine.sampled_tokens += length
            completions.append(
                Completion(
                    row_id=self.running.pop(b).row_id,
                    ids=tokens_BC[b, :length].tolist(),
                    logprobs=shortest_decimals(logprobs_BC[b, :length]),
                    stop_reason=StopReason(reason_B[b]),
                )
            )
        return completions


# --- device programs ----------------------------------------------------------------------------


def state_sharding(state: EngineState, config: ModelConfig, mesh: Mesh) -> EngineState:
    """Rows over the mesh's rows, key/value heads over its heads."""
    heads = cache_sharding(mesh, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads)
    of_dimensions = {0: replicated(mesh), 4: heads}
    return jax.tree.map(lambda x: of_dimensions.get(x.ndim, batch_sharding(mesh)), state)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6))
def empty_state(
    model: Decoder,
    mesh: Mesh | None,
    places: int,
    rows: int,
    slots: int,
    max_new_tokens: int,
    own_dtype: Any,
) -> EngineState:
    """Born in its places: no device ever holds all of it."""
    B = places * rows
    config, dtype = model.config, model.compute_dtype
    state = EngineState(
        prefix=SharedPrefix(
            KVCache.create(config, places, slots, dtype), jnp.zeros((B,), jnp.int32)
        ),
        own=SuffixCache.create(config, B, max_new_tokens, own_dtype),
        last_token_B=jnp.zeros((B,), jnp.int32),
        limit_B=jnp.zeros((B,), jnp.int32),
        hash_B=jnp.zeros((B,), jnp.uint32),
        running_B=jnp.zeros((B,), bool),
        match_B=jnp.zeros((B,), jnp.int32),
        reason_B=jnp.zeros((B,), jnp.int32),
        tokens_BC=jnp.zeros((B, max_new_tokens), jnp.int32),
        logprobs_BC=jnp.zeros((B, max_new_tokens), jnp.float32),
    )
    if mesh is None:
        return state
    return jax.lax.with_sharding_constraint(state, state_sharding(state, config, mesh))


@functools.partial(jax.jit, donate_argnames=("state",))
def read_trunks(
    model: Decoder, state: EngineState, tokens_QT: jax.Array, place_Q: jax.Array
) -> EngineState:
    _, cache = model.prefill(tokens_QT)
    stored = jax.tree.map(
        lambda old, fresh: old.at[place_Q].set(fresh, mode="drop"), state.prefix.cache, cache
    )
    return dataclasses.replace(state, prefix=SharedPrefix(stored, state.prefix.length_B))


@jax.jit
def _compact_state(
    state: EngineState, source_P: jax.Array, source_B: jax.Array, active_B: jax.Array
) -> EngineState:
    slot = state.own.slot
    moved = jax.tree.map(lambda x: x if x is slot else jnp.take(x, source_B, axis=0), state)
    cache = state.prefix.cache.take(source_P)
    return dataclasses.replace(
        moved,
        prefix=SharedPrefix(cache, moved.prefix.length_B),
        running_B=moved.running_B & active_B,
    )


@functools.partial(jax.jit, donate_argnames=("state",))
def decode_segment(
    model: Decoder,
    state: EngineState,
    start: Rows,
    draw: TokenSampler,
    exit_at: jax.Array,
    stop_ids: jax.Array,
    stop_table_SV: jax.Array | None,
) -> EngineState:
    """Start the new rows, then a step per token until at most `exit_at` rows are running, and for
    at most `SEGMENT_STEPS` steps."""

    def begin(new: Any, old: jax.Array) -> jax.Array:
        return jnp.where(start.starts_B, new, old)

    state = dataclasses.replace(
        state,
        prefix=SharedPrefix(
            state.prefix.cache, begin(start.prefix_length_B, state.prefix.length_B)
        ),
        own=dataclasses.replace(state.own, length_B=begin(0, state.own.length_B)),
        last_token_B=begin(start.last_token_B, state.last_token_B),
        limit_B=begin(start.limit_B, state.limit_B),
        hash_B=begin(start.hash_B, state.hash_B),
        running_B=state.running_B | start.starts_B,
        match_B=begin(0, state.match_B),
        reason_B=begin(int(StopReason.LENGTH), state.reason_B),
    )
    rows_B = jnp.arange(state.running_B.shape[0])

    def step(carry: tuple[jax.Array, EngineState]) -> tuple[jax.Array, EngineState]:
        steps, state = carry
        running_B, place_B = state.running_B, state.own.length_B
        hidden_BD, own = model.decode_step(state.last_token_B, running_B, state.prefix, state.own)
        position_B = state.prefix.length_B + 1 + place_B
        token_B, logprob_B = draw(model.logits(hidden_BD), state.hash_B, position_B)
        token_B = jnp.where(running_B, token_B, state.last_token_B)
        # The place of a row that has ended is its length, which is past what counts or dropped.
        tokens_BC = state.tokens_BC.at[rows_B, place_B].set(token_B, mode="drop")
        logprobs_BC = state.logprobs_BC.at[rows_B, place_B].set(logprob_B, mode="drop")
        stop_B, reason_B, match_B = find_stops(token_B, state.match_B, stop_ids, stop_table_SV)
        return steps + 1, dataclasses.replace(
            state,
            own=own,
            last_token_B=token_B,
            running_B=running_B & ~stop_B & (own.length_B < state.limit_B),
            match_B=jnp.where(running_B, match_B, state.match_B),
            reason_B=jnp.where(running_B, reason_B, state.reason_B),
            tokens_BC=tokens_BC,
            logprobs_BC=logprobs_BC,
        )

    def go_on(carry: tuple[jax.Array, EngineState]) -> jax.Array:
        steps, state = carry
        return (jnp.sum(state.running_B) > exit_at) & (steps < SEGMENT_STEPS)

    return jax.lax.while_loop(go_on, step, (jnp.int32(0), state))[1]

"""The engine: samples many continuations of few prefixes, for rollouts, values and judgments.

    Scheduler    decides which prefixes are in which slots, and which samples run in which rows
    prefill      computes the keys and values of new prefixes, once for all of their samples
    decode_burst starts new rows, and decodes all rows until some have ended
    shrink_grid  moves the last rows to a smaller grid

A slot's rows share the keys and values of its prefix; a row stores only those of the tokens that it
sampled, in the suffix cache. While the device decodes a burst, the caller has the completions of
the burst before.

A row's state is its tokens, and a cache of all of them but the last: a decode step feeds the last
token and samples the next, so a prefill computes no logits. `reference_sampler` samples the same
without shared prefixes and without refilling. Its noise is equal, all else is equal to rounding.

On a mesh of several processes each process makes the same calls and has all completions, so all
take the same decisions.
"""

from __future__ import annotations

import dataclasses
import functools
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
from stepwiser_jax.inference.scheduler import (
    SAMPLES_PER_PREFIX,
    Grid,
    Prefix,
    SampleRequest,
    Scheduler,
)
from stepwiser_jax.inference.token_sampler import TokenSampler, row_hash
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.decoder import Decoder
from stepwiser_jax.model.kv_cache import KVCache, SharedPrefix, SuffixCache
from stepwiser_jax.runs.progress import rows_done

BURST_STEPS = 512
"""The most decode steps of a burst. It takes seconds, and a run can be stopped between bursts."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a row sampled, end token included; `logprobs` are shortest decimals of float32."""

    row_id: str
    ids: list[int]
    logprobs: list[float]
    stop_reason: StopReason


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
    the states of the stop strings' automaton."""

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

    @property
    def num_slots(self) -> int:
        return self.prefix.cache.length_B.shape[0]

    @property
    def rows_per_slot(self) -> int:
        return self.running_B.shape[0] // self.num_slots


class Engine(Sampler):
    """Samples with shared prefixes and continuous batching. `rows` are the allowed numbers of rows
    of the grid; `buckets` the allowed lengths of a stored prefix, the last is the context of prefix
    and completion together."""

    def generate(
        self,
        prompts_P: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        key: jax.Array,
        row_ids: Sequence[str],
        group_size: int = 1,
    ) -> SampleOutput:
        """As `Sampler.generate`; each prompt is a prefix."""
        output = SampleOutput.empty(len(prompts_P) * group_size, row_ids, params.max_new_tokens)
        prefixes = [
            Prefix(
                prompt,
                [
                    SampleRequest(row_id, len(prompt), params.max_new_tokens)
                    for row_id in row_ids[p * group_size : (p + 1) * group_size]
                ],
            )
            for p, prompt in enumerate(prompts_P)
        ]
        index = {row_id: b for b, row_id in enumerate(row_ids)}
        for done in chain.from_iterable(self.sample(prefixes, params, key=key)):
            b, length = index[done.row_id], len(done.ids)
            output.tokens_BC[b, :length] = done.ids
            output.logprobs_BC[b, :length] = done.logprobs
            output.length_B[b] = length
            output.stop_reason_B[b] = done.stop_reason
        return output

    def sample(
        self,
        prefixes: Sequence[Prefix],
        params: SamplingParams,
        *,
        key: jax.Array,
        is_needed: Callable[[SampleRequest], bool] | None = None,
        samples_per_prefix: int = SAMPLES_PER_PREFIX,
    ) -> Iterator[list[Completion]]:
        """Samples all requests of the prefixes; yields completions after each burst, as they end.

        Args:
            prefixes: What to sample. All requests have different row ids.
            params: `max_new_tokens` is the most that any request may ask for.
            key: With the row id and the position of a token it gives the token's noise.
            is_needed: Is called before a sample starts; if it returns False, the sample is left
                out. With it each burst yields its own completions, even if there are none, before
                the next samples start. Without it they come while the device decodes the next
                burst.
            samples_per_prefix: How many samples of a prefix run at once while others wait.

        Raises:
            UserError: A request does not fit the context, or continues nothing.
            ValueError: A request exceeds its prefix or `params`, or a prefix has no requests.
            Both come before anything is sampled.
        """
        by_bucket: dict[int, list[Prefix]] = {}
        for prefix in prefixes:
            self._check_prefix(prefix, params.max_new_tokens)
            by_bucket.setdefault(self.shapes.bucket(prefix.num_tokens), []).append(prefix)
        done, total = 0, sum(len(prefix.samples) for prefix in prefixes)
        for prefix_tokens, group in sorted(by_bucket.items()):
            scheduler = Scheduler(
                group,
                self.shapes.rows,
                shards=self.shards,
                samples_per_prefix=samples_per_prefix,
                is_needed=is_needed,
            )
            overlap = is_needed is None
            for part in self._sample_bucket(scheduler, prefix_tokens, params, key, overlap):
                done += len(part)
                rows_done(done, total, sum(len(completion.ids) for completion in part))
                yield part

    def _check_prefix(self, prefix: Prefix, max_new_tokens: int) -> None:
        if not prefix.samples:
            raise ValueError(f"a prefix of {len(prefix.ids)} tokens has no samples")
        for sample in prefix.samples:
            self.check_length(sample.num_tokens, sample.max_new_tokens, sample.row_id)
            if sample.num_tokens > len(prefix.ids):
                raise ValueError(
                    f"{sample.row_id} continues {sample.num_tokens} tokens of a prefix of "
                    f"{len(prefix.ids)}"
                )
            if not 1 <= sample.max_new_tokens <= max_new_tokens:
                raise ValueError(
                    f"{sample.row_id} has max_new_tokens {sample.max_new_tokens}, expected 1 to "
                    f"{max_new_tokens}, that of params"
                )

    def _sample_bucket(
        self,
        scheduler: Scheduler,
        prefix_tokens: int,
        params: SamplingParams,
        key: jax.Array,
        overlap: bool,
    ) -> Iterator[list[Completion]]:
        """Samples what the scheduler has. `overlap`: a burst's completions are yielded while the
        device decodes the next one, and not before."""
        token_sampler = TokenSampler.create(key, params.temperature, params.top_k, params.top_p)
        new = params.max_new_tokens
        state = empty_state(self.model, self.mesh, scheduler.grid, prefix_tokens, new)
        finished: list[Completion] = []
        while scheduler.has_work:
            state = self._prefill(state, scheduler.admit_prefixes())
            starts = self._starting_rows(scheduler)
            if not scheduler.running:
                continue  # no sample of the admitted prefixes is needed
            grid = f"{scheduler.grid.slots}x{scheduler.grid.rows_per_slot}"
            with self.running(f"decode {grid} prefix={prefix_tokens} new={new} {token_sampler}"):
                state = decode_burst(
                    self.model,
                    state,
                    self.place_rows(starts),
                    token_sampler,
                    np.int32(scheduler.exit_at()),
                    np.array(params.stop_ids, np.int32),
                    self.stop_tables[params.stop_strings],
                )
            if finished:
                yield finished
            finished = self._collect(state, scheduler)
            if not overlap:
                yield finished
                finished = []
            if rows := scheduler.shrink():
                state = self._shrink(state, rows, scheduler.grid.slots)
        yield finished

    def _prefill(self, state: EngineState, admitted: list[tuple[int, Prefix]]) -> EngineState:
        """Computes the keys and values of the admitted prefixes, in their slots."""
        slots, length = state.num_slots, state.prefix.cache.slots
        at_once = min(slots, self.read_at_once(length))
        while admitted:
            count = at_once if 2 * len(admitted) > at_once else self.shards
            batch, admitted = admitted[:count], admitted[count:]
            tokens_PT = np.zeros((count, length), np.int32)
            slot_P = np.full((count,), slots, np.int32)  # there is no such slot: nothing is stored
            for p, (slot, prefix) in enumerate(batch):
                tokens_PT[p, : prefix.num_tokens] = prefix.ids[: prefix.num_tokens]
                slot_P[p] = slot
            with self.running(f"prefill {count}x{length} into {slots}"):
                state = prefill(self.model, state, *self.place_rows((tokens_PT, slot_P)))
        return state

    def _starting_rows(self, scheduler: Scheduler) -> StartingRows:
        B = scheduler.grid.rows
        rows = StartingRows(
            starts_B=np.zeros((B,), bool),
            prefix_length_B=np.zeros((B,), np.int32),
            last_token_B=np.zeros((B,), np.int32),
            limit_B=np.zeros((B,), np.int32),
            hash_B=np.zeros((B,), np.uint32),
        )
        for b, prefix, sample in scheduler.start_samples():
            rows.starts_B[b] = True
            rows.prefix_length_B[b] = sample.num_tokens - 1
            rows.last_token_B[b] = prefix.ids[sample.num_tokens - 1]
            rows.limit_B[b] = sample.max_new_tokens
            rows.hash_B[b] = row_hash(sample.row_id)
        return rows

    def _collect(self, state: EngineState, scheduler: Scheduler) -> list[Completion]:
        """Waits for the device, and returns the completions of the rows that have ended."""
        running_B, length_B, reason_B = fetch(
            (state.running_B, state.suffix.length_B, state.reason_B)
        )
        ended = [b for b in scheduler.running if not running_B[b]]
        if not ended:
            return []
        tokens_BC, logprobs_BC = fetch((state.tokens_BC, state.logprobs_BC))
        completions = []
        for b, sample in zip(ended, scheduler.finish(ended), strict=True):
            length = int(length_B[b])
            self.sampled_tokens += length
            completions.append(
                Completion(
                    row_id=sample.row_id,
                    ids=tokens_BC[b, :length].tolist(),
                    logprobs=shortest_decimals(logprobs_BC[b, :length]),
                    stop_reason=StopReason(reason_B[b]),
                )
            )
        return completions

    def _shrink(self, state: EngineState, rows: Sequence[int], slots: int) -> EngineState:
        """Moves these rows to a grid of `slots` slots with one row each."""
        source_B = np.zeros((slots,), np.int32)
        source_B[: len(rows)] = rows
        is_used_B = np.arange(slots) < len(rows)
        grid = f"{state.num_slots}x{state.rows_per_slot}"
        with self.running(f"shrink {grid} -> {slots}x1"):
            return shrink_grid(state, *self.place_rows((source_B, is_used_B)))


# --- device programs ----------------------------------------------------------------------------


def state_sharding(state: EngineState, config: ModelConfig, mesh: Mesh) -> EngineState:
    """Rows over the mesh's rows, key/value heads over its heads."""
    heads = cache_sharding(mesh, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads)
    of_dimensions = {0: replicated(mesh), 4: heads}
    return jax.tree.map(lambda x: of_dimensions.get(x.ndim, batch_sharding(mesh)), state)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def empty_state(
    decoder: Decoder,
    mesh: Mesh | None,
    grid: Grid,
    prefix_tokens: int,
    max_new_tokens: int,
) -> EngineState:
    """Creates the state on the devices where it belongs: no device ever holds all of it."""
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


@jax.jit
def shrink_grid(state: EngineState, source_B: jax.Array, is_used_B: jax.Array) -> EngineState:
    """Returns a grid of one row per slot: row b is row `source_B[b]`, with the prefix of its slot.
    Rows that are not used do not run."""

    def take(x: jax.Array) -> jax.Array:
        return jnp.take(x, source_B, axis=0)

    suffix = state.suffix
    return EngineState(
        prefix=SharedPrefix(
            state.prefix.cache.take(source_B // state.rows_per_slot), take(state.prefix.length_B)
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
    )


@functools.partial(jax.jit, donate_argnames=("state",))
def decode_burst(
    decoder: Decoder,
    state: EngineState,
    starting: StartingRows,
    token_sampler: TokenSampler,
    exit_at: jax.Array,
    stop_ids: jax.Array,
    stop_table_AV: jax.Array | None,
) -> EngineState:
    """Starts the new rows, then takes decode steps until at most `exit_at` rows are running, or for
    `BURST_STEPS` steps."""

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
        )

    def goes_on(carry: tuple[jax.Array, EngineState]) -> jax.Array:
        steps, state = carry
        return (jnp.sum(state.running_B) > exit_at) & (steps < BURST_STEPS)

    return jax.lax.while_loop(goes_on, step, (jnp.int32(0), state))[1]

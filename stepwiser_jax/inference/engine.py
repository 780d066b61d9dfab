"""The engine: samples many continuations of few prefixes, for rollouts, values and judgments.

`Engine.stream` gets prefixes and yields completions as they end; `Engine.generate` gets prompts and
returns all completions in order. Both go through these, once per burst:

    Scheduler    decides which prefixes are in which slots, and which samples run in which rows
    prefill      computes the keys and values of new prefixes, once for all of their samples
    decode_burst starts new rows, and decodes all rows until some have ended
    shrink_grid  moves the last rows to a smaller grid

While the device decodes a burst, the caller has the completions of the burst before.

On a mesh of several processes each process makes the same calls and has all completions, so all
take the same decisions.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from stepwiser_jax.distributed.mesh import batch_shards, fetch, shard_batch
from stepwiser_jax.inference.engine_state import (
    EngineState,
    StartingRows,
    decode_burst,
    empty_state,
    extend_prefixes,
    log_odds_at,
    prefill,
    recall_prefixes,
    shrink_grid,
)
from stepwiser_jax.inference.params import (
    Completion,
    Prefix,
    SampleRequest,
    SamplingParams,
    StopReason,
    check_row_ids,
)
from stepwiser_jax.inference.prefix_cache import (
    NO_TOKEN,
    PrefixCache,
    Read,
    Residents,
    is_worth_sharing,
)
from stepwiser_jax.inference.scheduler import SAMPLES_PER_PREFIX, Scheduler
from stepwiser_jax.inference.shapes import Shapes, Usage
from stepwiser_jax.inference.stops import StopTables
from stepwiser_jax.inference.token_sampler import TokenSampler, row_hash
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.decoder import Decoder, Weights
from stepwiser_jax.model.flops import NOTHING, Spent
from stepwiser_jax.model.kv_cache import KVCache
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.runs.progress import rows_done
from stepwiser_jax.text.tokenizer import Tokenizer, unknown_ids

PREFILL_TOKENS = 4096
"""How many tokens go through the network at once in a prefill, on each device that rows are split
over. With more, a prefill needs more memory; with fewer, the weights are read more often."""

BURST_STEPS = 512
"""The most decode steps of a burst. It takes seconds, and a run can be stopped between bursts."""

WATCHED_STEPS = 8
"""The same while somebody reads along, see `Engine.watch`."""

TAILS = tuple(8 * 4**n for n in range(12))
"""The lengths that the rest of a prefix may have that is read after a part is copied."""


Watch = Callable[[Mapping[str, np.ndarray], Sequence[Completion]], None]
"""Gets the tokens so far of the rows that run, by row id, and the completions of those that have
ended with this burst."""


class Engine:
    """Samples with shared prefixes and continuous batching.

    Args:
        model: A model, or a decoder with the same `weights`.
        tokenizer: Needed for stop strings.
        rows: The numbers of rows that the grid may have, ascending.
        buckets: The lengths that a stored prefix may have, ascending. The last is the context of
            prefix and completion together.
        weights: See `Decoder`.
        mesh: The devices that rows are split over; by default the first device.

    `watch`, if it is set, is called after every burst, and bursts are short then.

    Raises:
        UserError: The largest bucket exceeds the model's context.
        ValueError: The model would sample ids that the tokenizer does not know.
    """

    def __init__(
        self,
        model: Transformer | Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        rows: Sequence[int],
        buckets: Sequence[int],
        weights: Weights = "model",
        mesh: Mesh | None = None,
    ):
        check_vocabulary(model.config, tokenizer)
        self.shapes = Shapes(rows, buckets, model.config.max_length)
        self.decoder, self.mesh = decoding_layout(model, weights), mesh
        self.stop_tables = StopTables(tokenizer)
        self.usage = Usage()
        self.watch: Watch | None = None

    def with_model(self, model: Transformer | Decoder) -> Engine:
        """Returns an engine with other weights of the same architecture. Both engines share what
        else there is, and count their usage together."""
        engine = copy.copy(self)
        engine.decoder = decoding_layout(model, self.decoder.weights)
        return engine

    @property
    def compiled_shapes(self) -> Counter[str]:
        return self.usage.compiled_shapes

    @property
    def sampled_tokens(self) -> int:
        return self.usage.spent.generated

    def spent_on(self, *, before: int = 0, read: int = 0, generated: int = 0) -> Spent:
        """Calls `Spent.on` for the engine's model."""
        return Spent.on(self.decoder.config, before=before, read=read, generated=generated)

    @property
    def shards(self) -> int:
        """The number of devices that rows are split over."""
        return 1 if self.mesh is None else batch_shards(self.mesh)

    def prefill_rows(self, num_tokens: int) -> int:
        """Returns how many rows of `num_tokens` tokens go through a prefill at once."""
        return self.shards * max(1, PREFILL_TOKENS // num_tokens)

    def check_length(self, num_tokens: int, max_new_tokens: int, name: str) -> None:
        """Calls `Shapes.check_length`."""
        self.shapes.check_length(num_tokens, max_new_tokens, name)

    # --- completions ----------------------------------------------------------------------------

    def generate(
        self,
        prompts_P: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        key: jax.Array,
        row_ids: Sequence[str],
        group_size: int = 1,
        cache: PrefixCache | None = None,
    ) -> list[Completion]:
        """Returns `group_size` completions of each prompt; row b = p * group_size + g. `cache` is
        that of `stream`.

        Raises:
            UserError: A prompt is empty, or does not fit the context with its completion.
            ValueError: The row ids, which seed the noise, are not as many or not all different.
        """
        check_row_ids(row_ids, len(prompts_P) * group_size)
        prefixes = []
        for p, prompt in enumerate(prompts_P):
            ids = row_ids[p * group_size : (p + 1) * group_size]
            samples = [SampleRequest(id, len(prompt), params.max_new_tokens) for id in ids]
            prefixes.append(Prefix(prompt, samples))
        parts = self.stream(prefixes, params, key=key, cache=cache)
        completions = {completion.row_id: completion for part in parts for completion in part}
        return [completions[row_id] for row_id in row_ids]

    def stream(
        self,
        prefixes: Sequence[Prefix],
        params: SamplingParams,
        *,
        key: jax.Array,
        is_needed: Callable[[SampleRequest], bool] | None = None,
        overlap: bool = True,
        samples_per_prefix: int = SAMPLES_PER_PREFIX,
        cache: PrefixCache | None = None,
    ) -> Iterator[list[Completion]]:
        """Samples all requests of the prefixes; yields completions after each burst, as they end.

        Args:
            prefixes: What to sample. All requests have different row ids.
            params: `max_new_tokens` is the most that any request may ask for.
            key: With the row id and the position of a token it gives the token's noise.
            is_needed: Is called before a sample starts; if it returns False, the sample is left
                out.
            overlap: Whether completions come while the device decodes the next burst. Otherwise
                each burst yields its own, even if there are none, before the next samples start:
                for an `is_needed` that depends on them, or to stop between two bursts.
            samples_per_prefix: How many samples of a prefix run at once while others wait.
            cache: What was read in the call before. With it, prefixes that begin alike share what
                they can, and it remembers what this call reads. Without it every prefix is read
                whole. Results are equal to rounding.

        Raises:
            UserError: A request does not fit the context, or continues nothing.
            ValueError: A request exceeds its prefix or `params`, or a prefix has no requests.
            Both come before anything is sampled.
        """
        by_bucket: dict[int, list[Prefix]] = {}
        for prefix in prefixes:
            check_prefix(prefix, params.max_new_tokens, self.shapes)
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
            parts = self._stream_bucket(
                scheduler, group, prefix_tokens, params, key, overlap, cache
            )
            for part in parts:
                done += len(part)
                rows_done(done, total, sum(len(completion.tokens) for completion in part))
                yield part

    def _stream_bucket(
        self,
        scheduler: Scheduler,
        group: Sequence[Prefix],
        prefix_tokens: int,
        params: SamplingParams,
        key: jax.Array,
        overlap: bool,
        cache: PrefixCache | None,
    ) -> Iterator[list[Completion]]:
        """Samples the prefixes of a group, which the scheduler has. `overlap`: a burst's
        completions are yielded while the device decodes the next one, and not before."""
        token_sampler = TokenSampler.create(key, params.temperature, params.top_k, params.top_p)
        new, compared = params.max_new_tokens, params.compared
        state = empty_state(
            self.decoder, self.mesh, scheduler.grid, prefix_tokens, new, compared is not None
        )
        residents = None
        if cache is not None:
            state, residents = self._recall(state, group, cache)
        kept: KVCache | None = None
        spent: dict[str, Spent] = {}
        finished: list[Completion] = []
        while scheduler.has_work:
            state = self._fill_slots(state, scheduler.admit_prefixes(), residents, spent)
            starts = self._starting_rows(scheduler)
            if not scheduler.running:
                continue  # no sample of the admitted prefixes is needed
            shape = f"{scheduler.grid} prefix={prefix_tokens} new={new} {token_sampler}"
            if compared is not None:
                shape += " log-odds"
            with self.usage.calling(f"decode {shape}"):
                state = decode_burst(
                    self.decoder,
                    state,
                    self.place_rows(starts),
                    token_sampler,
                    np.int32(scheduler.exit_at()),
                    np.int32(BURST_STEPS if self.watch is None else WATCHED_STEPS),
                    np.array(params.stop_ids, np.int32),
                    self.stop_tables[params.stop_strings],
                    compared,
                )
            if finished:
                yield finished
            finished = self._collect(state, scheduler, spent)
            if not overlap:
                yield finished
                finished = []
            if rows := scheduler.shrink():
                if cache is not None and kept is None:
                    kept = state.prefix.cache  # a smaller grid does not hold all prefixes
                state = self._shrink(state, rows, scheduler.grid.slots)
        if cache is not None and residents is not None:
            cache.by_length[prefix_tokens] = kept or state.prefix.cache, residents
        yield finished

    def _recall(
        self, state: EngineState, group: Sequence[Prefix], cache: PrefixCache
    ) -> tuple[EngineState, Residents]:
        """Takes what the call before has read out of the cache, and puts what the first prefixes
        share with it into their slots. Also returns what is in the slots then."""
        slots, length = state.grid.slots, state.prefix.cache.capacity
        residents = Residents(slots, length)
        kept, of_kept = cache.by_length.pop(length, (None, Residents(1, length)))
        source_Q = np.zeros((slots,), np.int32)
        for slot, prefix in enumerate(group[:slots]):
            shared_Q = of_kept.shared(prefix)
            source_Q[slot] = shared_Q.argmax()
            if is_worth_sharing(int(shared_Q.max()), prefix):
                residents.tokens_QS[slot] = of_kept.tokens_QS[source_Q[slot]]
        if kept is not None and (residents.tokens_QS != NO_TOKEN).any():
            with self.usage.calling(f"recall {len(kept.length_B)}->{slots} of {length}"):
                state = recall_prefixes(state, kept, self.place_rows(source_Q))
        return state, residents

    def _fill_slots(
        self,
        state: EngineState,
        admitted: list[tuple[int, Prefix]],
        residents: Residents | None,
        spent: dict[str, Spent],
    ) -> EngineState:
        """Puts the keys and values of the admitted prefixes into their slots. Adds what is `spent`
        on each to that of its first sample."""
        rounds = [[Read(slot, prefix, slot, 0) for slot, prefix in admitted]]
        if residents is not None:
            rounds = residents.admit(admitted)
        for reads in rounds:
            for read in reads:
                tokens = read.prefix.num_tokens - read.shared
                first = read.prefix.samples[0].row_id
                spent[first] = self.spent_on(before=read.shared, read=tokens)
            whole = [(read.slot, read.prefix) for read in reads if not read.shared]
            state = self._prefill(state, whole)
            state = self._extend(state, [read for read in reads if read.shared])
        return state

    def _prefill(self, state: EngineState, admitted: list[tuple[int, Prefix]]) -> EngineState:
        """Computes the keys and values of the admitted prefixes, in their slots."""
        slots, length = state.grid.slots, state.prefix.cache.capacity
        at_once = min(slots, self.prefill_rows(length))
        while admitted:
            count = at_once if 2 * len(admitted) > at_once else self.shards
            batch, admitted = admitted[:count], admitted[count:]
            tokens_PT = np.zeros((count, length), np.int32)
            slot_P = np.full((count,), slots, np.int32)  # there is no such slot: nothing is stored
            for p, (slot, prefix) in enumerate(batch):
                tokens_PT[p, : prefix.num_tokens] = prefix.ids[: prefix.num_tokens]
                slot_P[p] = slot
            with self.usage.calling(f"prefill {count}x{length} into {slots}"):
                state = prefill(self.decoder, state, *self.place_rows((tokens_PT, slot_P)))
        return state

    def _extend(self, state: EngineState, reads: list[Read]) -> EngineState:
        """Copies what prefixes share with others into their slots, and reads the rest of them."""
        slots, length = state.grid.slots, state.prefix.cache.capacity
        reads = sorted(reads, key=lambda read: -len(read.tail))
        while reads:
            tail = next(n for n in TAILS if n >= len(reads[0].tail))
            # A query of the tail meets all slots of its row: a few rows of long prefixes at once.
            most = min(slots, self.prefill_rows(max(tail, length // 4)))
            few = max(self.shards, most // 8 // self.shards * self.shards)
            count = most if 2 * len(reads) > most else few
            batch, reads = reads[:count], reads[count:]
            tokens_PT = np.zeros((count, tail), np.int32)
            source_P, shared_P = np.zeros((2, count), np.int32)
            slot_P = np.full((count,), slots, np.int32)  # there is no such slot: nothing is stored
            for p, read in enumerate(batch):
                tokens_PT[p, : len(read.tail)] = read.tail
                source_P[p], shared_P[p], slot_P[p] = read.source, read.shared, read.slot
            with self.usage.calling(f"extend {count}x{tail} of {length} in {slots}"):
                placed = self.place_rows((tokens_PT, source_P, shared_P, slot_P))
                state = extend_prefixes(self.decoder, state, *placed)
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

    def _collect(
        self, state: EngineState, scheduler: Scheduler, reading: dict[str, Spent]
    ) -> list[Completion]:
        """Waits for the device, and returns the completions of the rows that have ended. `reading`
        is what was spent on the prefixes of some, by row id."""
        running_B, length_B, reason_B = fetch(
            (state.running_B, state.suffix.length_B, state.reason_B)
        )
        ended = [b for b in scheduler.running if not running_B[b]]
        if not ended and self.watch is None:
            return []
        arrays = fetch((state.tokens_BC, state.logprobs_BC, state.log_odds_BC))
        completions = []
        for b, sample in zip(ended, scheduler.finish(ended), strict=True):
            # Copies: a view would keep the arrays of all rows in memory.
            tokens, logprobs, *log_odds = (
                x[b, : length_B[b]].copy() for x in arrays if x is not None
            )
            reason = StopReason(reason_B[b])
            spent = self.spent_on(before=sample.num_tokens, generated=len(tokens))
            spent += reading.pop(sample.row_id, NOTHING)
            self.usage.spent += spent
            completions.append(
                Completion(sample.row_id, tokens, logprobs, reason, *log_odds, spent=spent)
            )
        if self.watch is not None:
            running = {x.row_id: arrays[0][b, : length_B[b]] for b, x in scheduler.running.items()}
            self.watch(running, completions)
        return completions

    def _shrink(self, state: EngineState, rows: Sequence[int], slots: int) -> EngineState:
        """Moves these rows to a grid of `slots` slots with one row each."""
        source_B = np.zeros((slots,), np.int32)
        source_B[: len(rows)] = rows
        is_used_B = np.arange(slots) < len(rows)
        with self.usage.calling(f"shrink {state.grid} -> {slots}x1"):
            return shrink_grid(state, *self.place_rows((source_B, is_used_B)))

    def place_rows(self, arrays: Any) -> Any:
        """Puts arrays with a leading axis of rows onto the mesh."""
        return arrays if self.mesh is None else shard_batch(arrays, self.mesh)

    # --- one token ------------------------------------------------------------------------------

    def log_odds(self, prompts_P: Sequence[Sequence[int]], pair: tuple[int, int]) -> np.ndarray:
        """Compares two tokens that may follow each prompt.

        Returns:
            log P(pair[0]) - log P(pair[1]), float32 (P,).

        Raises:
            UserError: A prompt is empty or exceeds the context.
        """
        log_odds_P = np.zeros((len(prompts_P),), np.float32)
        by_bucket: dict[int, list[int]] = {}
        for p, prompt in enumerate(prompts_P):
            self.check_length(len(prompt), 0, f"prompt {p}")
            self.usage.spent += self.spent_on(read=len(prompt))
            by_bucket.setdefault(self.shapes.bucket(len(prompt)), []).append(p)
        for length, group in sorted(by_bucket.items()):
            rows = self.prefill_rows(length)
            for start in range(0, len(group), rows):
                batch = group[start : start + rows]
                tokens_BT = np.zeros((rows, length), np.int32)
                last_B = np.zeros((rows,), np.int32)
                for row, p in enumerate(batch):
                    tokens_BT[row, : len(prompts_P[p])] = prompts_P[p]
                    last_B[row] = len(prompts_P[p]) - 1
                with self.usage.calling(f"log-odds {rows}x{length}"):
                    placed = self.place_rows((tokens_BT, last_B))
                    found_B = fetch(log_odds_at(self.decoder, *placed, pair=pair))
                log_odds_P[batch] = found_B[: len(batch)]
        return log_odds_P


def check_prefix(prefix: Prefix, max_new_tokens: int, shapes: Shapes) -> None:
    """Raises UserError or ValueError for what `Engine.stream` cannot sample."""
    if not prefix.samples:
        raise ValueError(f"a prefix of {len(prefix.ids)} tokens has no samples")
    for sample in prefix.samples:
        shapes.check_length(sample.num_tokens, sample.max_new_tokens, sample.row_id)
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


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Raises ValueError if a model would sample ids that the tokenizer does not know."""
    if tokenizer is None:
        return
    unknown = unknown_ids(tokenizer, config.vocab_size)
    if unknown != config.unknown_ids:
        raise ValueError(
            f"expected a model that knows the ids without a token, {unknown}, found one with "
            f"{config.unknown_ids}: load it with load_hf(path, tokenizer=tokenizer)"
        )


def decoding_layout(model: Transformer | Decoder, weights: Weights = "model") -> Decoder:
    """Returns a decoder of the model; itself if it is one. Raises ValueError if it is one with
    other weights."""
    if not isinstance(model, Decoder):
        return Decoder.from_transformer(model, weights)
    if model.weights != weights:
        raise ValueError(
            f"expected a model with weights {weights!r}, found one with {model.weights!r}"
        )
    return model

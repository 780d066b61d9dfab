"""Rollouts: groups of completions, sampled from the policy as it is now, then rewarded.

    examples -> RolloutSampler -> RolloutGroups -> `rewards.add_rewards` -> groups with a signal
             -> `grpo.group_advantages` -> pack_groups -> RolloutBatch

Nothing here knows what the policy writes: a stage supplies prompts and a reward.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from stepwiser_jax.config import EngineShapes
from stepwiser_jax.distributed import hosts
from stepwiser_jax.distributed.fingerprints import param_hash
from stepwiser_jax.distributed.loading import Loaded, decoding_copy
from stepwiser_jax.inference.engine import Engine, decoding_layout
from stepwiser_jax.inference.params import Completion, Prefix, SampleRequest, SamplingParams
from stepwiser_jax.model.packing import packing_id
from stepwiser_jax.rl.rollout_cache import RolloutCache, SampledRow
from stepwiser_jax.runs.signals import Interrupted, stop
from stepwiser_jax.text.tokenizer import completion_text
from stepwiser_jax.training.batches import first_fit


@dataclasses.dataclass(frozen=True)
class RolloutGroup:
    """A prompt and its G completions. Token ids are int32 and include the end token; log-probs are
    float32, of the distribution that was sampled from."""

    group_id: str
    prompt_ids: np.ndarray
    completions_G: Sequence[np.ndarray]
    logprobs_G: Sequence[np.ndarray]
    example: Any = None
    texts_G: Sequence[str] = ()
    reward_terms_G: Sequence[dict[str, float]] = ()

    @property
    def rewards_G(self) -> np.ndarray:
        return np.array([sum(terms.values()) for terms in self.reward_terms_G])

    @property
    def has_signal(self) -> bool:
        """Whether rewards differ: otherwise all advantages are 0."""
        return len(set(self.rewards_G.tolist())) > 1

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + sum(map(len, self.completions_G))


class RolloutSampler:
    """A sampler of rollout groups on the devices of all processes. Each process gets all groups.

    A run keeps groups in its rollout cache until a checkpoint holds what was learned from them.
    """

    def __init__(
        self,
        loaded: Loaded,
        encode: Callable[[Any], Sequence[int]],
        params: SamplingParams,
        engine: EngineShapes,
        *,
        group_size: int,
        seed: int,
        mesh: jax.sharding.Mesh,
        name: str = "rollouts",
        cache: RolloutCache | None = None,
    ):
        """Makes an engine without weights, see `weights`.

        Args:
            loaded: The policy, of which the tokenizer and the shapes are used.
            encode: Returns the prompt ids of an example.
            params: How completions are sampled.
            engine: Shapes of the engine.
            group_size: Completions of a prompt.
            seed: Decides the noise, with `name`, iteration, draw, example and completion.
            mesh: The devices that sample.
            name: Begins the ids of groups.
            cache: That of the run. Without one, an interrupted process samples all groups anew.
        """
        self.tokenizer, self.encode, self.params = loaded.tokenizer, encode, params
        self.cache, self.group_size, self.name, self.mesh = cache, group_size, name, mesh
        self.key = jax.random.key(seed)
        shapes = jax.eval_shape(lambda model: decoding_layout(model, engine.weights), loaded.model)
        self.engine = Engine(shapes, loaded.tokenizer, mesh=mesh, **engine.model_dump())
        self._param_hash = ""
        self._engine_with_weights: Engine | None = None

    @contextmanager
    def weights(self, model: Any) -> Iterator[None]:
        """Samples with these parameters inside the block: with a copy in the compute type, adapters
        merged, that lies on the sampling mesh. It is freed at the end, before an update needs the
        memory."""
        self._param_hash = param_hash(model)
        with jax.set_mesh(self.mesh):
            self._engine_with_weights = self.engine.with_model(decoding_copy(model, self.mesh))
        try:
            yield
        finally:
            self._engine_with_weights = None

    def sample_groups(
        self, examples: Sequence[Any], iteration: int, draw: int = 0
    ) -> list[RolloutGroup]:
        """Returns a group for each example, without rewards. `draw` counts the batches of examples
        of an iteration. Rows that this run sampled before it was interrupted are read from the
        cache, and not sampled again.

        Raises:
            Interrupted: The run is to stop. Rows that have ended are in the cache.
        """
        prefix = f"{self.name}/it{iteration}/draw{draw}"
        ids = [f"{prefix}/{p}/{example.record_id}" for p, example in enumerate(examples)]
        prompts = [np.asarray(self.encode(example), np.int32) for example in examples]
        cache_key = (iteration, draw, self._param_hash)
        rows = self.cache.read(*cache_key) if self.cache else {}
        if hosts.any_process(not rows):  # one has no file: then all processes sample anew
            rows = {}
        if len(rows) < len(ids) * self.group_size:
            try:
                with jax.set_mesh(self.mesh):
                    self._sample_missing(ids, prompts, rows)
            except Interrupted:
                self._keep(*cache_key, rows)
                raise
            self._keep(*cache_key, rows)
        return [
            self._group(group_id, example, prompt, rows)
            for group_id, example, prompt in zip(ids, examples, prompts, strict=True)
        ]

    def greedy(
        self, examples: Sequence[Any], compared: tuple[int, int] | None = None
    ) -> list[Completion]:
        """Returns the likeliest completion of each example, with the log-odds of the `compared`
        tokens. The cache has no part in it.

        Raises:
            Interrupted: The run is to stop.
        """
        ids = [f"{self.name}/greedy/{p}/{example.record_id}" for p, example in enumerate(examples)]
        params = dataclasses.replace(self.params, temperature=0.0, compared=compared)
        prefixes = []
        for row_id, example in zip(ids, examples, strict=True):
            prompt = self.encode(example)
            request = SampleRequest(row_id, len(prompt), params.max_new_tokens)
            prefixes.append(Prefix(prompt, [request]))
        with jax.set_mesh(self.mesh):
            found = {done.row_id: done for done in self._sample(prefixes, params)}
        return [found[row_id] for row_id in ids]

    def _sample(self, prefixes: Sequence[Prefix], params: SamplingParams) -> Iterator[Completion]:
        """Yields completions as they end. Raises Interrupted, between two bursts, if the processes
        are to stop."""
        assert self._engine_with_weights is not None, "sample inside `weights`"
        ended = self._engine_with_weights.stream(prefixes, params, key=self.key, overlap=False)
        for completions in ended:
            yield from completions
            if hosts.all_stop_here(stop.requested):
                raise Interrupted

    def _keep(
        self, iteration: int, draw: int, param_hash: str, rows: dict[str, SampledRow]
    ) -> None:
        if self.cache:
            self.cache.write(iteration, draw, param_hash, rows)

    def _row_ids(self, group_id: str) -> list[str]:
        return [f"{group_id}/{g}" for g in range(self.group_size)]

    def _sample_missing(
        self, ids: Sequence[str], prompts: Sequence[np.ndarray], rows: dict[str, SampledRow]
    ) -> None:
        """Adds the rows of these groups that `rows` lacks, one after the other: those that are
        there when Interrupted is raised stay."""
        prefixes = []
        for group_id, prompt in zip(ids, prompts, strict=True):
            missing = [row_id for row_id in self._row_ids(group_id) if row_id not in rows]
            requests = [
                SampleRequest(row_id, len(prompt), self.params.max_new_tokens) for row_id in missing
            ]
            if requests:
                prefixes.append(Prefix(prompt.tolist(), requests))
        for done in self._sample(prefixes, self.params):
            rows[done.row_id] = SampledRow(done.tokens, done.logprobs)

    def _group(
        self, group_id: str, example: Any, prompt: np.ndarray, rows: dict[str, SampledRow]
    ) -> RolloutGroup:
        sampled = [rows[row_id] for row_id in self._row_ids(group_id)]
        return RolloutGroup(
            group_id,
            prompt,
            [row.tokens for row in sampled],
            [row.logprobs for row in sampled],
            example,
            [completion_text(self.tokenizer, row.tokens.tolist()) for row in sampled],
        )


# --- a batch of groups --------------------------------------------------------------------------


def split_groups(groups: Sequence[RolloutGroup], num_updates: int) -> list[Sequence[RolloutGroup]]:
    """Returns the groups of each update. There are no more updates than groups, since an update
    without a group would be momentum alone."""
    return [groups[update::num_updates] for update in range(min(num_updates, len(groups)))]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """Rows of one or more rollout groups: each is its prompt once, then its completions, with the
    packing ids of `model.packing`.

    Every array is indexed by the token that it describes. `predictor_BT` is the index of the
    position whose logits predict the token: for the first token of every completion that is the
    last token of the prompt.
    """

    tokens_BT: Any
    segment_ids_BT: Any
    positions_BT: Any
    predictor_BT: Any
    target_mask_BT: Any
    sampler_logprobs_BT: Any
    advantages_BT: Any
    old_logprobs_BT: Any = None
    reference_logprobs_BT: Any = None


def pack_groups(
    groups: Sequence[RolloutGroup],
    advantages_PG: ArrayLike,
    *,
    num_rows: int,
    row_lengths: Sequence[int],
    micro_batches: int = 1,
) -> RolloutBatch:
    """Returns groups packed into rows, with the advantage of a completion on each of its tokens.

    Rows that are not needed are padding. They lie in the last of the `micro_batches` (see
    `step.split_rows`), which then take no time.

    Args:
        groups: P groups.
        advantages_PG: An advantage for each completion.
        num_rows: Rows of the batch.
        row_lengths: The lengths that a row may have; the smallest that holds every group is taken.
        micro_batches: Parts that the rows are cut into.

    Raises:
        ValueError: A group is longer than any row, or the groups do not fit.
    """
    advantages_PG = np.asarray(advantages_PG)
    longest = max((group.num_tokens for group in groups), default=1)
    row_length = next((length for length in row_lengths if length >= longest), row_lengths[-1])
    shape = (num_rows, row_length)
    batch = RolloutBatch(
        tokens_BT=np.zeros(shape, np.int32),
        segment_ids_BT=np.zeros(shape, np.int32),
        positions_BT=np.zeros(shape, np.int32),
        predictor_BT=np.zeros(shape, np.int32),
        target_mask_BT=np.zeros(shape, bool),
        sampler_logprobs_BT=np.zeros(shape, np.float32),
        advantages_BT=np.zeros(shape, np.float32),
    )
    numbered = range(len(groups))
    blocks = list(first_fit(numbered, lambda p: groups[p].num_tokens, row_length, num_rows))
    if len(blocks) > 1:
        raise ValueError(f"{len(groups)} groups do not fit {num_rows} rows of {row_length}")
    in_order = np.arange(num_rows).reshape(-1, micro_batches).T.ravel()
    for row, in_row in zip(in_order, itertools.chain(*blocks), strict=False):
        start = 0
        for number, p in enumerate(in_row, 1):
            _write_group(batch, int(row), start, number, groups[p], advantages_PG[p])
            start += groups[p].num_tokens
    return batch


def _write_group(
    batch: RolloutBatch,
    row: int,
    start: int,
    number: int,
    group: RolloutGroup,
    advantages_G: np.ndarray,
) -> None:
    """Writes a group, the `number`th of its row, from position `start` on."""
    prompt_length = len(group.prompt_ids)
    end = prompt_end = start + prompt_length
    batch.tokens_BT[row, start:end] = group.prompt_ids
    batch.segment_ids_BT[row, start:end] = packing_id(number, 0)
    batch.positions_BT[row, start:end] = np.arange(prompt_length)
    batch.predictor_BT[row, start + 1 : end] = np.arange(start, end - 1)
    for g, completion_ids in enumerate(group.completions_G):
        start, end = end, end + len(completion_ids)
        batch.tokens_BT[row, start:end] = completion_ids
        batch.segment_ids_BT[row, start:end] = packing_id(number, g + 1)
        batch.positions_BT[row, start:end] = prompt_length + np.arange(len(completion_ids))
        batch.predictor_BT[row, start:end] = np.arange(start - 1, end - 1)
        batch.predictor_BT[row, start : start + 1] = prompt_end - 1
        batch.target_mask_BT[row, start:end] = True
        batch.sampler_logprobs_BT[row, start:end] = group.logprobs_G[g]
        batch.advantages_BT[row, start:end] = advantages_G[g]

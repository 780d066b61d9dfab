"""Rollouts: groups of completions, sampled and rewarded with the policy as it is now.

    examples -> prompts -> engine -> RolloutGroup -> rewards -> groups with a signal
                                                     -> training.batches.pack_groups

Nothing here knows what the policy writes: a stage supplies prompts and a reward.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from stepwiser_jax.config import EngineShapes
from stepwiser_jax.distributed import hosts
from stepwiser_jax.distributed.fingerprints import param_hash
from stepwiser_jax.distributed.loading import Loaded, decoding_copy
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams, decoding_layout
from stepwiser_jax.inference.scheduler import Prefix, SampleRequest
from stepwiser_jax.rl.rewards import Reward
from stepwiser_jax.rl.rollout_cache import RolloutCache, SampledRow
from stepwiser_jax.runs.signals import Interrupted, stop
from stepwiser_jax.text.tokenizer import completion_text


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

    Groups are kept in the rollout cache until a checkpoint holds what was learned from them.
    """

    def __init__(
        self,
        loaded: Loaded,
        encode: Callable[[Any], Sequence[int]],
        params: SamplingParams,
        engine: EngineShapes,
        cache: RolloutCache,
        *,
        group_size: int,
        seed: int,
        mesh: jax.sharding.Mesh,
        name: str,
    ):
        """Makes an engine without weights, see `weights`.

        Args:
            loaded: The policy, of which the tokenizer and the shapes are used.
            encode: Returns the prompt ids of an example.
            params: How completions are sampled.
            engine: Shapes of the engine.
            cache: The run's cache.
            group_size: Completions of a prompt.
            seed: Decides the noise, with `name`, iteration, resample, example and completion.
            mesh: The devices that sample.
            name: Begins the ids of groups.
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
        """Samples with these parameters inside the block. Their copy for decoding is freed at its
        end, before an update needs the memory."""
        self._param_hash = param_hash(model)
        with jax.set_mesh(self.mesh):
            self._engine_with_weights = self.engine.with_model(decoding_copy(model, self.mesh))
        try:
            yield
        finally:
            self._engine_with_weights = None

    def sample_groups(
        self, examples: Sequence[Any], iteration: int, resample: int
    ) -> list[RolloutGroup]:
        """Returns a group for each example, without rewards. Rows that this run sampled before it
        was interrupted are read from the cache.

        Raises:
            Interrupted: The run is to stop. Rows that have ended are in the cache.
        """
        prefix = f"{self.name}/it{iteration}/draw{resample}"
        ids = [f"{prefix}/{p}/{example.record_id}" for p, example in enumerate(examples)]
        prompts = [np.asarray(self.encode(example), np.int32) for example in examples]
        cached = (iteration, resample, self._param_hash)
        rows = self.cache.read(*cached)
        if hosts.any_process(not rows):  # all processes begin with the same rows, or with none
            rows = {}
        if len(rows) < len(ids) * self.group_size:
            with jax.set_mesh(self.mesh):
                is_whole = self._sample_missing(ids, prompts, rows)
            self.cache.write(*cached, rows)
            if not is_whole:
                raise Interrupted
        return [
            self._group(group_id, example, prompt, rows)
            for group_id, example, prompt in zip(ids, examples, prompts, strict=True)
        ]

    def _row_ids(self, group_id: str) -> list[str]:
        return [f"{group_id}/{g}" for g in range(self.group_size)]

    def _sample_missing(
        self, ids: Sequence[str], prompts: Sequence[np.ndarray], rows: dict[str, SampledRow]
    ) -> bool:
        """Adds the rows of these groups that `rows` lacks. Returns False if the processes stop
        before all are there, which they do between two bursts."""
        prefixes = []
        for group_id, prompt in zip(ids, prompts, strict=True):
            missing = [row_id for row_id in self._row_ids(group_id) if row_id not in rows]
            requests = [
                SampleRequest(row_id, len(prompt), self.params.max_new_tokens) for row_id in missing
            ]
            if requests:
                prefixes.append(Prefix(prompt.tolist(), requests))
        assert self._engine_with_weights is not None, "sample inside `weights`"
        ended = self._engine_with_weights.sample(
            prefixes, self.params, key=self.key, is_needed=lambda _: True
        )
        for completions in ended:
            for done in completions:
                rows[done.row_id] = SampledRow(done.tokens, done.logprobs)
            if hosts.all_stop_here(stop.requested):
                return False
        return True

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


def add_rewards(groups: Sequence[RolloutGroup], reward: Reward) -> list[RolloutGroup]:
    """Returns the groups with what each completion earns, see `rl.rewards`."""

    def terms(group: RolloutGroup, text: str, tokens: np.ndarray) -> dict[str, float]:
        found = reward(group.example, text, tokens)
        found = found if isinstance(found, dict) else {"": found}
        for name, value in found.items():
            is_number = isinstance(value, int | float | np.number)  # pyright: ignore[reportUnnecessaryIsInstance]
            if not is_number or not math.isfinite(value):
                raise UserError(
                    f"expected a reward that is a finite number, or a dict of such numbers, found "
                    f"{value!r}{f' as {name!r}' if name else ''} for {group.group_id}"
                )
        return {name: float(value) for name, value in found.items()}

    return [
        dataclasses.replace(
            group,
            reward_terms_G=[
                terms(group, text, tokens)
                for text, tokens in zip(group.texts_G, group.completions_G, strict=True)
            ],
        )
        for group in groups
    ]


def split_groups(groups: Sequence[RolloutGroup], num_updates: int) -> list[Sequence[RolloutGroup]]:
    """Returns the groups of each update. There are no more updates than groups, since an update
    without a group would be momentum alone."""
    return [groups[update::num_updates] for update in range(min(num_updates, len(groups)))]


def rollout_metrics(sampled: Sequence[RolloutGroup], num_kept: int) -> dict[str, float]:
    """Returns metrics over all completions sampled, of kept groups or not: the mean reward and its
    named terms, the share of groups kept, and lengths in tokens."""
    lengths = [len(tokens) for group in sampled for tokens in group.completions_G]
    terms = [terms for group in sampled for terms in group.reward_terms_G]
    names = sorted({name for named in terms for name in named if name})
    return {
        "reward": float(np.mean([group.rewards_G for group in sampled])),
        **{f"reward_{n}": float(np.mean([t.get(n, 0.0) for t in terms])) for n in names},
        "groups_sampled": len(sampled),
        "groups_kept_share": num_kept / len(sampled),
        "response_tokens": float(np.mean(lengths)),
        "response_tokens_max": float(np.max(lengths)),
    }

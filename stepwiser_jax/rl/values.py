"""Monte Carlo values of the prefixes of solutions (StepWiser 3.2).

    trajectory with J chunks -> prefixes 0..J -> M continuations each -> count of right answers

Prefix 0 is the bare problem; all trajectories of the problem share its continuations. Prefix J is
the whole trajectory: nothing is left to sample, and its value is the outcome itself. A trajectory
is prefilled once: its prefixes share that cache.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, product

import jax
import numpy as np

from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import Prefix, SampleRequest, SamplingParams
from stepwiser_jax.inference.scheduler import SAMPLES_PER_PREFIX
from stepwiser_jax.records import PrefixValue, Problem, Trajectory
from stepwiser_jax.rl.adaptive import LabelTable
from stepwiser_jax.text.tokenizer import Tokenizer, completion_text

ADAPTIVE_SAMPLES = 4
"""Samples of a trajectory that run at once when rollouts are adaptive. The number is small because
samples that still run when a label becomes known are wasted."""

IsCorrect = Callable[[Sequence[tuple[Problem, str]]], Sequence[bool]]
"""Returns, for each pair of a problem and a solution's text, whether the final answer is right."""


@dataclass(frozen=True)
class ChunkPrefix:
    """The first `num_chunks` chunks of a trajectory. `source` is the trajectory's index."""

    trajectory: Trajectory
    source: int
    num_chunks: int

    @property
    def num_completion_tokens(self) -> int:
        return self.trajectory.chunk_ends[self.num_chunks - 1] if self.num_chunks else 0

    @property
    def num_tokens(self) -> int:
        return self.trajectory.tokens.num_prompt + self.num_completion_tokens

    @property
    def is_whole(self) -> bool:
        return self.num_chunks == len(self.trajectory.chunk_ends)

    @property
    def sampling_id(self) -> str:
        """Decides the noise. All trajectories of a problem share the prefix without chunks."""
        of = self.trajectory.trajectory_id if self.num_chunks else self.trajectory.problem_id
        return f"annotate/{of}/{self.num_chunks}"


def all_prefixes(trajectories: Sequence[Trajectory]) -> list[list[ChunkPrefix]]:
    """Returns the prefixes 0..J of each trajectory."""
    return [
        [ChunkPrefix(t, source, num_chunks) for num_chunks in range(len(t.chunk_ends) + 1)]
        for source, t in enumerate(trajectories)
    ]


def prefixes_to_sample(trajectories: Sequence[Trajectory]) -> list[ChunkPrefix]:
    """Returns the distinct prefixes that can be continued, trajectory by trajectory, the shortest
    first."""
    distinct: dict[str, ChunkPrefix] = {}
    for prefixes in all_prefixes(trajectories):
        for prefix in prefixes[:-1]:
            distinct.setdefault(prefix.sampling_id, prefix)
    return list(distinct.values())


def prefix_ids(trajectories: Sequence[Trajectory]) -> set[str]:
    """Returns the record ids of all prefix values of these trajectories."""
    return {f"{t.trajectory_id}/{j}" for t in trajectories for j in range(len(t.chunk_ends) + 1)}


class PrefixCounts:
    """Right and sampled continuations of every prefix so far, and which prefixes need more."""

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        num_rollouts: int,
        labels: LabelTable | None,
        confidence: float,
    ):
        self.num_rollouts, self.labels, self.confidence = num_rollouts, labels, confidence
        self.right: Counter[str] = Counter()
        self.sampled: Counter[str] = Counter()
        self.chunks_at: dict[str, list[tuple[ChunkPrefix, ChunkPrefix]]] = defaultdict(list)
        for prefixes in all_prefixes(trajectories):
            for chunk in pairwise(prefixes):  # the prefix before the chunk, and the one with it
                for prefix in chunk:
                    self.chunks_at[prefix.sampling_id].append(chunk)

    def add(self, prefix: ChunkPrefix, is_right: bool) -> None:
        self.right[prefix.sampling_id] += is_right
        self.sampled[prefix.sampling_id] += 1

    def of(self, prefix: ChunkPrefix) -> tuple[int, int]:
        """Returns (right, sampled). The whole trajectory's value is its outcome, Q_J = r*."""
        if prefix.is_whole:
            return self.num_rollouts * prefix.trajectory.is_correct, self.num_rollouts
        return self.right[prefix.sampling_id], self.sampled[prefix.sampling_id]

    def needs_more(self, prefix: ChunkPrefix) -> bool:
        """Returns whether the label of a chunk that ends or begins here is still unknown."""
        if self.labels is None or not self.sampled[prefix.sampling_id]:
            return True
        return not all(
            self.labels.is_known(self.of(with_chunk), self.of(before), self.confidence)
            for before, with_chunk in self.chunks_at[prefix.sampling_id]
        )

    def value(self, prefix: ChunkPrefix, policy_id: str) -> PrefixValue:
        right, sampled = self.of(prefix)
        return PrefixValue(
            trajectory_id=prefix.trajectory.trajectory_id,
            num_chunks=prefix.num_chunks,
            num_rollouts=sampled,
            num_correct=right,
            max_rollouts=self.num_rollouts,
            policy_id=policy_id,
        )


def estimate_prefix_values(
    engine: Engine,
    tokenizer: Tokenizer,
    trajectories: Sequence[Trajectory],
    problems: Mapping[str, Problem],
    is_correct: IsCorrect,
    *,
    num_rollouts: int,
    params: SamplingParams,
    key: jax.Array,
    labels: LabelTable | None = None,
    confidence: float = 1.0,
    policy_id: str = "",
) -> list[PrefixValue]:
    """Estimates the value of every prefix 0..J of every trajectory (StepWiser 3.2).

    Args:
        engine: Samples the continuations.
        tokenizer: The policy's.
        trajectories: Solutions that the policy sampled, cut into chunks.
        problems: The trajectories' problems, by id.
        is_correct: Checks solutions, many at once, while the device goes on with other rows. It
            gets pairs of a problem and the whole text of a solution, prefix and continuation, and
            returns a bool for each:
            `lambda pairs: [problem.answer in text for problem, text in pairs]`.
        num_rollouts: M, the number of continuations of each prefix.
        params: How to sample. A prefix and its continuation together have at most
            `max_new_tokens` tokens, as a whole solution has.
        key: Seeds the noise.
        labels: Makes rollouts adaptive: prefixes take turns, and a prefix is sampled no more when
            the labels of its chunks are known with `confidence`.
        confidence: See `labels`. With 1 the labels are those of M rollouts.
        policy_id: Is written into the values.

    Returns:
        Raw counts, trajectory by trajectory, the shortest prefix first.
    """
    counts = PrefixCounts(trajectories, num_rollouts, labels, confidence)
    tokens = [trajectory.tokens.read() for trajectory in trajectories]
    prefixes: list[Prefix] = []
    prefix_of: dict[str, ChunkPrefix] = {}
    for source, group in groupby(prefixes_to_sample(trajectories), lambda p: p.source):
        samples = []
        for m, prefix in product(range(num_rollouts), list(group)):
            row_id = f"{prefix.sampling_id}/r{m}"
            room = params.max_new_tokens - prefix.num_completion_tokens
            samples.append(SampleRequest(row_id, prefix.num_tokens, room))
            prefix_of[row_id] = prefix
        ids = np.concatenate([tokens[source].prompt_ids, tokens[source].completion_ids])
        prefixes.append(Prefix(ids.tolist(), samples))

    def text(prefix: ChunkPrefix, continuation: Sequence[int]) -> str:
        begun = tokens[prefix.source].completion_ids[: prefix.num_completion_tokens]
        return completion_text(tokenizer, [*begun.tolist(), *continuation])

    def is_needed(sample: SampleRequest) -> bool:
        return counts.needs_more(prefix_of[sample.row_id])

    for completions in engine.stream(
        prefixes,
        params,
        key=key,
        is_needed=None if labels is None else is_needed,
        overlap=labels is None,
        samples_per_prefix=SAMPLES_PER_PREFIX if labels is None else ADAPTIVE_SAMPLES,
    ):
        sampled = [prefix_of[completion.row_id] for completion in completions]
        solutions = [
            (problems[prefix.trajectory.problem_id], text(prefix, completion.tokens.tolist()))
            for prefix, completion in zip(sampled, completions, strict=True)
        ]
        for prefix, right in zip(sampled, is_correct(solutions), strict=True):
            counts.add(prefix, right)
    return [counts.value(p, policy_id) for some in all_prefixes(trajectories) for p in some]

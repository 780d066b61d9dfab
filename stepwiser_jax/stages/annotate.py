"""Monte Carlo values of every prefix of every trajectory (StepWiser 3.2, 4.1).

    Trajectory with J chunks -> prefixes 0..J -> M continuations each -> count of right answers

Prefix 0 is the bare problem; its continuations are shared by all trajectories of the problem.
Prefix J is the whole trajectory: nothing is left to sample, its value is the outcome itself.
A trajectory goes through the network once; its prefixes are forks of that one cache.

Leaves out, and counts, problems whose trajectories are all right or all wrong (4.1), and those that
`max_problems` has no room for.
Reads `rollouts` and `policy`. Writes prefix values.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise, product
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stepwiser_jax.config import AdaptiveRollouts, Annotate
from stepwiser_jax.data.datasets import shuffled
from stepwiser_jax.distributed.hosts import NO_SHARD, Shard
from stepwiser_jax.distributed.loading import load_for_decoding
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.inference.scheduler import SAMPLES_PER_PREFIX, Prefix, SampleRequest
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import PrefixValue, Problem, Trajectory
from stepwiser_jax.rl.adaptive import LabelTable
from stepwiser_jax.runs.directory import RunDirectory, blocks, per_item, worker_count
from stepwiser_jax.tasks.verifier import Verifier
from stepwiser_jax.text.tokenizer import completion_text

ADAPTIVE_ROWS = 4
"""Rows of a trajectory at a time where rollouts are adaptive: what still runs when a label becomes
known was sampled for nothing."""

IsCorrect = Callable[[Sequence[tuple[Trajectory, Sequence[int]]]], list[bool]]
"""(trajectory, its prefix with a continuation, as completion ids) -> is the final answer right."""


def run(config: Annotate, run_dir: str | Path, shard: Shard = NO_SHARD) -> dict[str, Any]:
    """Annotate block after block; a restarted run repeats the block it was killed in."""
    directory = RunDirectory(run_dir, "annotate", config, shard)
    if directory.finished:
        return directory.summary()
    directory.begin()
    sampled = read_records(config.rollouts, Trajectory)
    trajectories, dropped = select_trajectories(config, sampled)
    work = blocks(trajectories, config.trajectories_per_block)
    work = directory.pending(work, PrefixValue, prefix_ids)
    measured = annotate_blocks(config, directory, trajectories, work, sampled) if work else {}
    writer = directory.writer(PrefixValue)
    counts = {"trajectories": len(trajectories), "dropped": dropped}
    return directory.finish(lambda: counts | summarize(trajectories, writer.read()) | measured)


def annotate_blocks(
    config: Annotate,
    directory: RunDirectory,
    trajectories: Sequence[Trajectory],
    work: Sequence[Sequence[Trajectory]],
    sampled: Sequence[Trajectory],
) -> dict[str, Any]:
    """Values of the prefixes of these blocks, written; returns what was measured. Checks all
    trajectories first: every worker must refuse what one would. `sampled` are all trajectories of
    the problems."""
    rollouts_of = rollouts_by_problem(config, sampled)
    problems = {p.problem_id: p for p in read_records(config.rollouts, Problem)}
    mesh = make_mesh(**config.mesh.model_dump(), devices=jax.local_devices())
    loaded = load_for_decoding(
        **config.policy.model_dump(), weights=config.engine.weights, mesh=mesh, seed=config.seed
    )
    tokenizer = loaded.tokenizer
    engine = Engine(loaded.model, tokenizer, mesh=mesh, **config.engine.model_dump())
    params = SamplingParams(**config.sampling.model_dump(), stop_ids=tokenizer.eos_ids)
    check_lengths(trajectories, engine, params)
    check_ids(chain.from_iterable(work), engine)

    with Verifier(
        config.verifier, workers=worker_count(), timeout_seconds=config.answer_timeout_seconds
    ) as verifier:

        def is_correct(rows: Sequence[tuple[Trajectory, Sequence[int]]]) -> list[bool]:
            return verifier.verify(
                [completion_text(tokenizer, ids) for _, ids in rows],
                [problems[trajectory.problem_id] for trajectory, _ in rows],
            )

        def values_of(block: Sequence[Trajectory]) -> list[PrefixValue]:
            values = []
            for num_rollouts in sorted({rollouts_of[t.problem_id] for t in block}):
                values += estimate_prefix_values(
                    engine,
                    [t for t in block if rollouts_of[t.problem_id] == num_rollouts],
                    is_correct,
                    num_rollouts=num_rollouts,
                    adaptive=config.adaptive,
                    params=params,
                    key=jax.random.key(config.seed),
                    policy_id=loaded.model_id,
                )
            return values

        seconds, annotated = directory.write_blocks(work, PrefixValue, values_of)
    return {
        "sampled_tokens": engine.sampled_tokens,
        "tokens_per_second": engine.sampled_tokens / seconds,
        "seconds_per_prefix": per_item(seconds, annotated),
        "verifier_timeouts": verifier.timeouts,
        "verifier_failures": verifier.failures,
        "compiled": engine.compiled_shapes,
    }


def summarize(trajectories: Sequence[Trajectory], values: Sequence[PrefixValue]) -> dict[str, Any]:
    """Rollouts are counted where there were some: not after whole trajectories."""
    whole = {f"{t.trajectory_id}/{len(t.chunk_ends)}" for t in trajectories}
    sampled = [value.num_rollouts for value in values if value.record_id not in whole]
    return {
        "policies": sorted({value.policy_id for value in values}),
        "policies_of_trajectories": sorted({t.policy_id for t in trajectories}),
        "prefixes": len(values),
        "rollouts_per_prefix": sum(sampled) / len(sampled),
        "mean_value": sum(value.value for value in values) / len(values),
    }


def select_trajectories(
    config: Annotate, trajectories: Sequence[Trajectory]
) -> tuple[list[Trajectory], dict[str, int]]:
    """Paper 4.1: keep problems that the policy solves sometimes, not always, and `max_problems` of
    them. Returns the kept trajectories and the number of problems that were dropped for each
    reason."""
    of_problem: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        of_problem[trajectory.problem_id].append(trajectory)
    left, dropped = [], {"all_correct": 0, "all_wrong": 0}
    for problem, group in of_problem.items():
        right = sum(trajectory.is_correct for trajectory in group)
        if config.drop_uniform_problems and right in (0, len(group)):
            dropped["all_correct" if right else "all_wrong"] += 1
        else:
            left.append(problem)
    if not left:
        raise UserError(
            f"no trajectory of {config.rollouts} is left to annotate: {dropped['all_correct']} "
            f"problems were all right, {dropped['all_wrong']} all wrong. Use other problems, a "
            "larger group_size in rollout, or set drop_uniform_problems to false"
        )
    drawn = set(shuffled(left, config.seed)[: config.max_problems])
    dropped["not_drawn"] = len(left) - len(drawn)
    kept = [
        trajectory
        for problem in left
        if problem in drawn
        for trajectory in of_problem[problem][: config.max_trajectories_per_problem]
    ]
    return kept[: config.limit], dropped


def rollouts_by_problem(config: Annotate, trajectories: Sequence[Trajectory]) -> dict[str, int]:
    """M of every problem, by the share of its trajectories that are right."""
    right: dict[str, list[bool]] = defaultdict(list)
    for trajectory in trajectories:
        right[trajectory.problem_id].append(trajectory.is_correct)
    return {problem: config.rollouts_at(sum(r) / len(r)) for problem, r in right.items()}


def check_lengths(
    trajectories: Sequence[Trajectory], engine: Engine, params: SamplingParams
) -> None:
    """Raises UserError for a trajectory that is longer than `params.max_new_tokens`, which prefix
    and continuation share, or that does not fit the context."""
    for trajectory in trajectories:
        name, tokens = trajectory.trajectory_id, trajectory.tokens
        if tokens.num_completion > params.max_new_tokens:
            raise UserError(
                f"{name}: prefix and continuation share sampling.max_new_tokens = "
                f"{params.max_new_tokens}, found a trajectory of {tokens.num_completion} tokens: "
                "set it to that of the rollouts"
            )
        engine.check_length(tokens.num_prompt, params.max_new_tokens, name)


def check_ids(trajectories: Iterable[Trajectory], engine: Engine) -> None:
    """Raises UserError for token ids that the policy's vocabulary lacks."""
    config = engine.model.config
    known_V = np.ones(config.vocab_size, bool)
    for ids in config.unknown_ids:
        known_V[ids] = False
    for trajectory in trajectories:
        tokens = trajectory.tokens.read()
        ids = np.concatenate([tokens.prompt_ids, tokens.completion_ids])
        unknown = ids[(ids >= len(known_V)) | ~known_V[np.minimum(ids, len(known_V) - 1)]]
        if len(unknown):
            raise UserError(
                f"{trajectory.trajectory_id}: expected token ids of the policy's vocabulary (the "
                f"largest is {np.flatnonzero(known_V)[-1]}), found {unknown.max()}: name the "
                "policy that sampled the rollouts, or one with its tokenizer"
            )


@dataclass(frozen=True)
class ChunkPrefix:
    """The first `num_chunks` chunks of a trajectory, a fork point into its cache."""

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
    def sampling_id(self) -> str:
        """Names the noise: the bare problem is one prefix, whichever trajectory it is met in."""
        of = self.trajectory.trajectory_id if self.num_chunks else self.trajectory.problem_id
        return f"annotate/{of}/{self.num_chunks}"


def prefixes_to_sample(trajectories: Sequence[Trajectory]) -> list[ChunkPrefix]:
    """Every distinct prefix that can be continued, trajectory by trajectory, shortest first.
    Prefix J is whole and is not among them."""
    distinct = {}
    for source, trajectory in enumerate(trajectories):
        for num_chunks in range(len(trajectory.chunk_ends)):
            prefix = ChunkPrefix(trajectory, source, num_chunks)
            distinct.setdefault(prefix.sampling_id, prefix)
    return list(distinct.values())


def prefix_ids(trajectories: Sequence[Trajectory]) -> set[str]:
    """Record ids of all prefix values of these trajectories."""
    return {f"{t.trajectory_id}/{j}" for t in trajectories for j in range(len(t.chunk_ends) + 1)}


class Counts:
    """Right and sampled continuations of every prefix so far, and which prefixes need more."""

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        num_rollouts: int,
        adaptive: AdaptiveRollouts | None,
    ):
        self.num_rollouts, self.adaptive = num_rollouts, adaptive
        self.right: Counter[str] = Counter()
        self.sampled: Counter[str] = Counter()
        self.pairs_at: dict[str, list[tuple[ChunkPrefix, ChunkPrefix]]] = defaultdict(list)
        for source, trajectory in enumerate(trajectories):
            chunks = range(len(trajectory.chunk_ends) + 1)
            prefixes = [ChunkPrefix(trajectory, source, num_chunks) for num_chunks in chunks]
            for before, behind in pairwise(prefixes):
                for prefix in (before, behind):
                    self.pairs_at[prefix.sampling_id].append((before, behind))
        if adaptive is not None:
            self.labels = LabelTable(adaptive.rule, num_rollouts, **adaptive.parameters)

    def add(self, prefix: ChunkPrefix, is_right: bool) -> None:
        self.right[prefix.sampling_id] += is_right
        self.sampled[prefix.sampling_id] += 1

    def of(self, prefix: ChunkPrefix) -> tuple[int, int]:
        """(right, sampled); the whole trajectory's value is its outcome, Q_J = r*."""
        if prefix.num_chunks == len(prefix.trajectory.chunk_ends):
            return self.num_rollouts * prefix.trajectory.is_correct, self.num_rollouts
        return self.right[prefix.sampling_id], self.sampled[prefix.sampling_id]

    def needs_more(self, prefix: ChunkPrefix) -> bool:
        """Whether the label of a chunk that ends or begins at this prefix is not known yet."""
        if self.adaptive is None or not self.sampled[prefix.sampling_id]:
            return True
        return not all(
            self.labels.is_known(self.of(behind), self.of(before), self.adaptive.confidence)
            for before, behind in self.pairs_at[prefix.sampling_id]
        )


def estimate_prefix_values(
    engine: Engine,
    trajectories: Sequence[Trajectory],
    is_correct: IsCorrect,
    *,
    num_rollouts: int,
    params: SamplingParams,
    key: jax.Array,
    adaptive: AdaptiveRollouts | None = None,
    policy_id: str = "",
) -> list[PrefixValue]:
    """Q of every prefix 0..J of every trajectory, as raw counts (StepWiser 3.2).

    A prefix and its continuation together may be as long as a whole solution,
    `params.max_new_tokens`. Answers are checked while the device goes on with other rows. With
    `adaptive`, prefixes take turns, and one whose labels are known is sampled no more.
    """
    counts = Counts(trajectories, num_rollouts, adaptive)
    trunks, prefix_of = [], {}
    for source, group in groupby(prefixes_to_sample(trajectories), lambda p: p.source):
        trajectory, forks = trajectories[source], []
        for m, prefix in product(range(num_rollouts), list(group)):
            row_id = f"{prefix.sampling_id}/r{m}"
            room = params.max_new_tokens - prefix.num_completion_tokens
            forks.append(SampleRequest(row_id, prefix.num_tokens, room))
            prefix_of[row_id] = prefix
        trunks.append(Prefix([*trajectory.prompt_ids, *trajectory.completion_ids], forks))

    def is_needed(sample: SampleRequest) -> bool:
        return counts.needs_more(prefix_of[sample.row_id])

    for completions in engine.sample(
        trunks,
        params,
        key=key,
        is_needed=is_needed if adaptive is not None else None,
        samples_per_prefix=SAMPLES_PER_PREFIX if adaptive is None else ADAPTIVE_ROWS,
    ):
        prefixes = [prefix_of[completion.row_id] for completion in completions]
        solutions = [
            (p.trajectory, [*p.trajectory.completion_ids[: p.num_completion_tokens], *c.ids])
            for p, c in zip(prefixes, completions, strict=True)
        ]
        for prefix, right in zip(prefixes, is_correct(solutions), strict=True):
            counts.add(prefix, right)
    return [
        prefix_value(ChunkPrefix(trajectory, source, num_chunks), counts, policy_id)
        for source, trajectory in enumerate(trajectories)
        for num_chunks in range(len(trajectory.chunk_ends) + 1)
    ]


def prefix_value(prefix: ChunkPrefix, counts: Counts, policy_id: str) -> PrefixValue:
    right, sampled = counts.of(prefix)
    return PrefixValue(
        trajectory_id=prefix.trajectory.trajectory_id,
        num_chunks=prefix.num_chunks,
        num_rollouts=sampled,
        num_correct=right,
        max_rollouts=counts.num_rollouts,
        policy_id=policy_id,
    )

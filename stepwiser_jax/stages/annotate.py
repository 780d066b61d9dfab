"""Estimates the value of every prefix by Monte Carlo (StepWiser 3.2, 4.1; `rl/values.py`).

Leaves out, and counts, problems whose trajectories are all right or all wrong (4.1), and those
beyond `max_problems`.
Reads `rollouts` and `policy`. Writes prefix values. A worker reads the token arrays of its own
trajectories only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stepwiser_jax.config import AdaptiveRollouts, Annotate
from stepwiser_jax.data.rows import shuffled
from stepwiser_jax.distributed.hosts import NO_SHARD, Shard
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import PrefixValue, Problem, Trajectory
from stepwiser_jax.rl.adaptive import LabelTable
from stepwiser_jax.rl.labels import load_rule
from stepwiser_jax.rl.values import estimate_prefix_values, prefix_ids
from stepwiser_jax.runs.blocks import Session, Work, run_blocks


def run(config: Annotate, run_dir: str | Path, shard: Shard = NO_SHARD) -> dict[str, Any]:
    """Annotates block after block."""

    def prepare() -> Work[Trajectory, PrefixValue]:
        sampled = read_records(config.rollouts, Trajectory)
        trajectories, dropped = select_trajectories(config, sampled)
        rollouts_of = rollouts_by_problem(config, sampled)
        counts = {"trajectories": len(trajectories), "dropped": dropped}
        return Work(
            items=trajectories,
            record_type=PrefixValue,
            ids_of=prefix_ids,
            begin=lambda session: begin(config, session, trajectories, rollouts_of),
            summarize=lambda values: counts | summarize(trajectories, values),
            unit="prefix",
        )

    return run_blocks("annotate", config, run_dir, shard, prepare)


def begin(
    config: Annotate,
    session: Session,
    trajectories: Sequence[Trajectory],
    rollouts_of: dict[str, int],
) -> Callable[[Sequence[Trajectory]], list[PrefixValue]]:
    """Returns the function that makes the values of a block. It first checks the lengths of all
    trajectories, so that all workers refuse the same ones."""
    problems = {p.problem_id: p for p in read_records(config.rollouts, Problem)}
    loaded, engine = session.load(config.policy, config.engine)
    params = SamplingParams(**config.sampling.model_dump(), stop_ids=loaded.tokenizer.eos_ids)
    check_lengths(trajectories, engine, params)
    check_ids(chain.from_iterable(session.blocks), engine)
    adaptive = config.adaptive
    tables = label_tables(adaptive, set(rollouts_of.values())) if adaptive else {}
    verifier = session.verifier(config.verifier)
    session.measures.append(
        lambda made: {
            "sampled_tokens": engine.sampled_tokens,
            "tokens_per_second": engine.sampled_tokens / session.seconds,
        }
    )

    def is_correct(solutions: Sequence[tuple[Problem, str]]) -> list[bool]:
        return verifier.verify([text for _, text in solutions], [p for p, _ in solutions])

    def values_of(block: Sequence[Trajectory]) -> list[PrefixValue]:
        values = []
        for num_rollouts in sorted({rollouts_of[t.problem_id] for t in block}):
            values += estimate_prefix_values(
                engine,
                loaded.tokenizer,
                [t for t in block if rollouts_of[t.problem_id] == num_rollouts],
                problems,
                is_correct,
                num_rollouts=num_rollouts,
                params=params,
                key=jax.random.key(config.seed),
                labels=tables.get(num_rollouts),
                confidence=adaptive.confidence if adaptive else 1.0,
                policy_id=loaded.model_id,
            )
        return values

    return values_of


def label_tables(adaptive: AdaptiveRollouts, all_rollouts: Iterable[int]) -> dict[int, LabelTable]:
    """Returns what says when a label is known, for each number of rollouts."""
    rule = load_rule(adaptive.rule, adaptive.rule_args)
    return {m: LabelTable(rule, m, adaptive.dead_prefix) for m in all_rollouts}


def summarize(trajectories: Sequence[Trajectory], values: Sequence[PrefixValue]) -> dict[str, Any]:
    """Returns counts and means. Rollouts are those of continued prefixes, not whole
    trajectories."""
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
    """Keeps problems that the policy solves sometimes, not always (paper 4.1), and `max_problems`
    of them. Returns their trajectories and the number of problems that were dropped for each
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
    """Returns M of every problem, which depends on the share of its trajectories that are right."""
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
    config = engine.decoder.config
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

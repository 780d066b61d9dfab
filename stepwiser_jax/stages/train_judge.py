"""Trains the judge by GRPO to reason about a chunk before its verdict (StepWiser 3.3, 4.1).

`run` holds the whole loop. Where the paper is silent (4.1 gives clip, learning rate, group and
batch sizes only):

1. By default there is no KL term and no entropy bonus, advantages are divided by the group's
   standard deviation, and the loss is averaged over tokens (verl's defaults).
2. A judgment without a verdict earns 0, like a wrong one.
3. Groups whose judgments all earned the same reward have advantages of 0. They are kept (verl),
   or left out: `denominator` says whether they still count in the mean, and up to `max_resamples`
   further draws, each of a batch of examples, replace them (dynamic sampling).
4. A group's prompt goes through the network once, and all its completions attend to it; groups
   share rows if they fit.
5. If the sampler's weights are int8, its samples are weighted by truncated importance weights.

Reads `model` and `examples`. Writes checkpoints/, metrics.jsonl and model/.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from stepwiser_jax.config import TrainJudge
from stepwiser_jax.data.datasets import load_judge_examples
from stepwiser_jax.data.held_out import drop_held_out, held_out_questions
from stepwiser_jax.distributed.loading import Loaded, load_for_training
from stepwiser_jax.distributed.mesh import make_mesh, make_sampling_mesh, shard_batch
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.model.lora import base_of
from stepwiser_jax.plugins import load
from stepwiser_jax.records import JudgeExample
from stepwiser_jax.rl.grpo import (
    add_old_and_reference_logprobs,
    denominator_share,
    group_advantages,
    make_objective,
)
from stepwiser_jax.rl.rewards import REWARDS, add_rewards, rollout_metrics, verdict_metrics
from stepwiser_jax.rl.rollout_cache import RolloutCache
from stepwiser_jax.rl.rollouts import (
    RolloutBatch,
    RolloutGroup,
    RolloutSampler,
    pack_groups,
    split_groups,
)
from stepwiser_jax.runs.directory import RunDirectory, per_item
from stepwiser_jax.runs.progress import progress
from stepwiser_jax.text.prompts import encode_judge_prompt
from stepwiser_jax.training.batches import example_loader
from stepwiser_jax.training.loop import TrainingRun, say_length
from stepwiser_jax.training.step import mean_metrics


def run(config: TrainJudge, run_dir: str | Path) -> dict[str, Any]:
    """Trains for `iterations` or `epochs`, resuming from the last checkpoint."""
    directory = RunDirectory(run_dir, "train-judge", config)
    if directory.finished:
        return directory.summary()
    reward = load(config.reward, "a reward", REWARDS, config.reward_args)
    mesh = make_mesh(**config.mesh.model_dump())
    sampling_mesh = make_sampling_mesh(mesh, config.sampling_axes)
    directory.begin()
    settings = config.model.load_args
    load_model = functools.partial(load_for_training, **settings, mesh=mesh, seed=config.seed)
    loaded = load_model()
    examples, dropped = load_examples(config, loaded)
    iterations = config.iterations or iterations_of(config, len(examples))
    say_length("train-judge", config.epochs, len(examples), f"{iterations} iterations")
    training = make_training(config, directory, loaded, mesh, examples, iterations)
    sampler = make_sampler(config, directory, loaded, sampling_mesh)
    reference_of = make_reference(config, load_model)
    grpo, num_prompts = config.grpo, config.prompts_per_iteration
    start, began = training.iteration, time.perf_counter()
    reporting = progress("train-judge", "iteration", iterations, start)
    with jax.set_mesh(mesh), training, reporting as bar:
        for iteration in range(start, iterations):
            policy = training.state.model
            sampled, groups = [], []
            with sampler.weights(policy):
                for draw in range(1 + grpo.max_resamples):  # dynamic sampling
                    fresh = sampler.sample_groups(next(training.loader), iteration, draw)
                    sampled += add_rewards(fresh, reward)
                    groups = [g for g in sampled if g.has_signal or not grpo.drop_zero_variance]
                    if len(groups) >= num_prompts:
                        break
            counted = [g for g in sampled if not g.has_signal] if grpo.counts_left_out else []
            parts = split_groups(groups[:num_prompts], config.updates_per_iteration)
            batches = []
            for update, part in enumerate(parts):
                advantages_PG = group_advantages(np.array([group.rewards_G for group in part]))
                beside = counted[update :: len(parts)]
                advantages_PG *= denominator_share(part, beside, grpo.aggregation)
                batch = shard_batch(pack(part, advantages_PG, config), mesh)
                batch = add_old_and_reference_logprobs(
                    batch,
                    policy if config.updates_per_iteration > 1 else None,
                    reference_of(policy),
                    config.sampling.temperature,
                    micro_batches=config.training.micro_batches,
                )
                batches.append(batch)
            updates = [training.update(batch) for batch in batches]
            metrics = rollout_metrics(sampled, num_kept=len(groups))
            texts = [text for group in sampled for text in group.texts_G]
            metrics |= verdict_metrics(texts, bare=config.wants_bare_verdict)
            training.finish_iteration(iteration + 1, mean_metrics(updates) | metrics)
            sampler.cache.forget_before(training.saved_iteration)
            bar.advance(reward=metrics["reward"], unparsed_rate=metrics["unparsed_rate"])
        training.save(wait=True)
        sampler.cache.forget_before(iterations)
    summary = {
        "examples": len(examples),
        "dropped": dropped,
        "iterations": iterations,
        "seconds_per_iteration": per_item(time.perf_counter() - began, iterations - start),
        "last": training.last_metrics,
        "compiled": sampler.engine.compiled_shapes,
    }
    return training.finish(summary)


# --- what the loop begins with ------------------------------------------------------------------


def load_examples(config: TrainJudge, loaded: Loaded) -> tuple[list[JudgeExample], dict[str, int]]:
    """Returns the examples of no excluded problem whose prompt fits `max_prompt_tokens`, and counts
    of what was left out.

    Raises:
        UserError: No example is left.
    """
    dropped: Counter[str] = Counter()
    examples = load_judge_examples(
        config.examples.source, on_malformed=config.examples.on_malformed, dropped=dropped
    )
    if not examples:
        raise UserError(f"expected judge examples in {config.examples.source}, found none")
    examples = drop_held_out(examples, held_out_questions(config.examples.exclude), dropped)
    fitting = [
        example
        for example in examples
        if len(prompt_ids(example, config, loaded)) <= config.max_prompt_tokens
    ]
    if not fitting:
        raise UserError(
            f"no judge example of {config.examples.source} is left: {len(examples)} were read, all "
            f"have prompts longer than max_prompt_tokens = {config.max_prompt_tokens}"
        )
    return fitting, {"too_long": len(examples) - len(fitting)} | dropped


def prompt_ids(example: JudgeExample, config: TrainJudge, loaded: Loaded) -> list[int]:
    return encode_judge_prompt(
        loaded.tokenizer, example.question, example.history, example.chunk, config.prompt_style
    )


def iterations_of(config: TrainJudge, num_examples: int) -> int:
    """Returns how many iterations draw every example `epochs` times, without resampling."""
    assert config.epochs is not None
    return -(-config.epochs * num_examples // config.prompts_per_iteration)


def make_training(
    config: TrainJudge,
    directory: RunDirectory,
    loaded: Loaded,
    mesh: jax.sharding.Mesh,
    examples: Sequence[JudgeExample],
    iterations: int,
) -> TrainingRun:
    loss_fn, normalizer_fn = make_objective(
        config.grpo,
        correction=config.correction,
        temperature=config.sampling.temperature,
        remat=config.training.remat,
    )
    return TrainingRun(
        directory,
        loaded,
        mesh,
        config.training,
        total_updates=iterations * config.updates_per_iteration,
        loader=example_loader(examples, batch_size=config.prompts_per_iteration, seed=config.seed),
        loss_fn=loss_fn,
        normalizer_fn=normalizer_fn,
    )


def make_sampler(
    config: TrainJudge, directory: RunDirectory, loaded: Loaded, mesh: jax.sharding.Mesh
) -> RolloutSampler:
    stop_ids = loaded.tokenizer.eos_ids
    return RolloutSampler(
        loaded,
        functools.partial(prompt_ids, config=config, loaded=loaded),
        SamplingParams(**config.sampling.model_dump(), stop_ids=stop_ids),
        config.engine,
        RolloutCache(directory.path / "rollout_cache"),
        group_size=config.group_size,
        seed=config.seed,
        mesh=mesh,
        name="judge",
    )


def make_reference(config: TrainJudge, load_model: Callable[[], Loaded]) -> Callable[[Any], Any]:
    """Returns a function from the policy to the model that the KL term pulls to. With adapters that
    is the policy without them; without the KL term it is None."""
    if not config.grpo.kl_coef:
        return lambda policy: None
    if config.model.lora is not None:
        return base_of
    reference = load_model().model
    return lambda policy: reference


def pack(
    groups: Sequence[RolloutGroup], advantages_PG: ArrayLike, config: TrainJudge
) -> RolloutBatch:
    """Returns the batch of one update."""
    return pack_groups(
        groups,
        advantages_PG,
        num_rows=config.prompts_per_iteration // config.updates_per_iteration,
        row_lengths=config.row_lengths,
        micro_batches=config.training.micro_batches,
    )

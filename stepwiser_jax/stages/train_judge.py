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
6. With `validation` the policy judges held-out chunks greedily, every so many iterations. Which of
   them is exported is not stated; by default it is the last.

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

from stepwiser_jax.config import DataSource, TrainJudge
from stepwiser_jax.data.datasets import load_judge_examples
from stepwiser_jax.data.held_out import (
    drop_held_out,
    drop_problems_of,
    held_out_questions,
    part_of,
)
from stepwiser_jax.distributed.loading import Loaded, load_for_training
from stepwiser_jax.distributed.mesh import make_mesh, make_sampling_mesh, shard_batch
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.judges.validation import CRITERION, check_classes, measure_judge
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
from stepwiser_jax.text.verdict_tokens import VerdictTokens
from stepwiser_jax.training.batches import example_loader
from stepwiser_jax.training.first_example import show_first_group
from stepwiser_jax.training.loop import TrainingRun, say_held_out, say_length
from stepwiser_jax.training.step import mean_metrics
from stepwiser_jax.training.validation import Measurements


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
    held_out, validation_dropped = load_held_out(config, loaded)
    examples, dropped = load_examples(config, loaded, held_out)
    say_held_out("train-judge", len(held_out), dropped.get("validation", 0))
    iterations = config.iterations or iterations_of(config, len(examples))
    say_length("train-judge", config.epochs, len(examples), f"{iterations} iterations")
    cache = RolloutCache(directory.path / "rollout_cache")
    sampler = make_sampler(config, cache, loaded, sampling_mesh)
    validation = make_validation(config, sampler, held_out, validation_dropped, iterations)
    training = make_training(config, directory, loaded, mesh, examples, iterations, validation)
    reference_of = make_reference(config, load_model)
    max_resamples, num_prompts = config.grpo.max_resamples, config.prompts_per_iteration
    start, began = training.iteration, time.perf_counter()
    reporting = progress("train-judge", "iteration", iterations, start, directory.keep)
    with jax.set_mesh(mesh), training, reporting as bar:
        training.validate()
        for iteration in range(start, iterations):
            policy = training.state.model
            sampled = []
            with sampler.weights(policy):
                for draw in range(1 + max_resamples):  # dynamic sampling
                    fresh = sampler.sample_groups(next(training.loader), iteration, draw)
                    sampled += add_rewards(fresh, reward)
                    if sum(group.has_signal for group in sampled) >= num_prompts:
                        break
            show_first_group(directory, sampled[0], sampler.tokenizer)
            batches = []
            for part, share in groups_of_updates(sampled, config):
                advantages_PG = group_advantages(np.array([group.rewards_G for group in part]))
                advantages_PG *= share
                batch = shard_batch(pack(part, advantages_PG, config), mesh)
                # With one update and no KL term this adds neither: `policy_loss` has them itself.
                batch = add_old_and_reference_logprobs(
                    batch,
                    policy if config.updates_per_iteration > 1 else None,
                    reference_of(policy),
                    config.sampling.temperature,
                    micro_batches=config.training.micro_batches,
                )
                batches.append(batch)
            # The first update consumes the arrays of `policy`, so all batches are ready before it.
            of_updates = [training.update(batch) for batch in batches]
            metrics = rollout_metrics(sampled)
            texts = [text for group in sampled for text in group.texts_G]
            metrics |= verdict_metrics(texts, bare=config.wants_bare_verdict)
            training.finish_iteration(iteration + 1, mean_metrics(of_updates) | metrics)
            cache.forget_before(training.saved_iteration)
            bar.advance(reward=metrics["reward"], unparsed_rate=metrics["unparsed_rate"])
        training.save(wait=True)
        cache.forget_before(iterations)
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


def load_examples(
    config: TrainJudge, loaded: Loaded, held_out: Sequence[JudgeExample] = ()
) -> tuple[list[JudgeExample], dict[str, int]]:
    """Returns the examples of no excluded or held-out problem whose prompt fits
    `max_prompt_tokens`, and counts of what was left out.

    Raises:
        UserError: No example is left.
    """
    dropped: Counter[str] = Counter()
    read = read_examples(config.examples, dropped)
    examples = drop_problems_of(held_out, read, dropped)
    num_read = len(read) + dropped["excluded"]
    fitting = fitting_examples(examples, config, loaded, config.examples, num_read, dropped)
    return fitting, dict(dropped)


def load_held_out(config: TrainJudge, loaded: Loaded) -> tuple[list[JudgeExample], dict[str, int]]:
    """Returns the examples of `validation`, if there is one, and counts of what was left out."""
    if config.validation is None:
        return [], {}
    dropped: Counter[str] = Counter()
    data = config.validation.examples
    read = read_examples(data, dropped)
    num_read = len(read) + dropped["excluded"]
    fitting = fitting_examples(part_of(read, data), config, loaded, data, num_read, dropped)
    return fitting, dict(dropped)


def read_examples(data: DataSource, dropped: Counter[str]) -> list[JudgeExample]:
    """Returns the examples of no excluded problem. Raises UserError if there are none."""
    examples = load_judge_examples(data.source, on_malformed=data.on_malformed, dropped=dropped)
    if not examples:
        raise UserError(f"expected judge examples in {data.source}, found none")
    return drop_held_out(examples, held_out_questions(data.exclude), dropped)


def fitting_examples(
    examples: Sequence[JudgeExample],
    config: TrainJudge,
    loaded: Loaded,
    data: DataSource,
    num_read: int,
    dropped: Counter[str],
) -> list[JudgeExample]:
    """Returns the examples whose prompts fit: of those that were taken of the `num_read` in `data`.
    Raises UserError if none does."""
    fitting = [
        example
        for example in examples
        if len(prompt_ids(example, config, loaded)) <= config.max_prompt_tokens
    ]
    if not fitting:
        raise UserError(
            f"no judge example of {data.source} is left: {num_read} were read, and all "
            f"{len(examples)} that were taken of them have prompts longer than max_prompt_tokens = "
            f"{config.max_prompt_tokens}"
        )
    dropped["too_long"] = len(examples) - len(fitting)
    return fitting


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
    validation: Measurements | None,
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
        validation=validation,
    )


def make_validation(
    config: TrainJudge,
    sampler: RolloutSampler,
    held_out: Sequence[JudgeExample],
    dropped: dict[str, int],
    iterations: int,
) -> Measurements | None:
    """Returns what measures the policy, if `validation` says so. Raises UserError if the best
    policy is to be exported, and the held-out chunks are all of one class."""
    if config.validation is None:
        return None
    if config.validation.export == "best":
        labels = [example.is_positive for example in held_out]
        check_classes(labels, config.validation.examples.source)
    verdict_tokens = VerdictTokens.of(sampler.tokenizer, config.prompt_style)
    return Measurements(
        config.validation,
        iterations,
        functools.partial(measure_judge, sampler, verdict_tokens, held_out),
        CRITERION,
        {"examples": len(held_out), "dropped": dropped},
    )


def make_sampler(
    config: TrainJudge, cache: RolloutCache, loaded: Loaded, mesh: jax.sharding.Mesh
) -> RolloutSampler:
    stop_ids = loaded.tokenizer.eos_ids
    return RolloutSampler(
        loaded,
        functools.partial(prompt_ids, config=config, loaded=loaded),
        SamplingParams(**config.sampling.model_dump(), stop_ids=stop_ids),
        config.engine,
        group_size=config.group_size,
        seed=config.seed,
        mesh=mesh,
        name="judge",
        cache=cache,
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


def groups_of_updates(
    sampled: Sequence[RolloutGroup], config: TrainJudge
) -> list[tuple[Sequence[RolloutGroup], float]]:
    """Returns the groups of each update of an iteration, and what their advantages are multiplied
    by: the share of the groups with signal among all that were sampled, if those that are left out
    count. Groups with signal that are too many to be learned count as the others do."""
    grpo, num_prompts = config.grpo, config.prompts_per_iteration
    kept = [group for group in sampled if group.has_signal or not grpo.drop_zero_variance]
    counted = [g for g in sampled if not g.has_signal] if grpo.counts_left_out else []
    surplus = kept[num_prompts:]
    parts = split_groups(kept[:num_prompts], config.updates_per_iteration)
    n = len(parts)
    return [
        (part, denominator_share([*part, *surplus[i::n]], counted[i::n], grpo.aggregation))
        for i, part in enumerate(parts)
    ]


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

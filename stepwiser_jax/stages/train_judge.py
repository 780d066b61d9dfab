"""Train the judge by GRPO to reason about a chunk before it gives its verdict (StepWiser 3.3, 4.1).

One iteration, top to bottom in `run`:

    draw P examples -> render prompts -> sample G judgments each -> parse verdicts -> reward 1 if
    the verdict is the label, else 0 -> group advantages -> packed rows -> optimizer updates

Where the paper is silent (paper 4.1 gives clip, learning rate, group and batch sizes only):

1. By default no KL term; advantages are divided by the group's standard deviation; the loss is
   averaged over tokens (verl's defaults). All of them are settings. There is no entropy bonus.
2. An unparsable judgment earns 0, like a wrong one. With a `format_penalty`, for judges without a
   chain of thought, all that is more or less than a verdict earns its negative.
3. Groups whose judgments all earned the same reward have no gradient; they are dropped, and up to
   `max_refills` further draws take their places.
4. A group's prompt goes through the network once, all its completions attend to it; groups share
   rows where they fit.
5. Where the sampler's weights are int8, its samples are weighted by truncated importance weights.

Reads `model` and `examples`. Writes checkpoints/, metrics.jsonl and model/.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stepwiser_jax.config import TrainJudge
from stepwiser_jax.data.datasets import load_judge_examples
from stepwiser_jax.data.held_out import drop_held_out, held_out_questions
from stepwiser_jax.distributed import hosts
from stepwiser_jax.distributed.fingerprints import param_hash
from stepwiser_jax.distributed.loading import Loaded, decoding_copy, load_for_training
from stepwiser_jax.distributed.mesh import make_mesh, make_sampling_mesh, shard_batch
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams, decoding_layout
from stepwiser_jax.inference.scheduler import Prefix, SampleRequest
from stepwiser_jax.model.lora import base_of
from stepwiser_jax.records import JudgeExample, RolloutGroup, SampledRow, Verdict
from stepwiser_jax.rl.grpo import (
    group_advantages,
    grpo_loss,
    loss_denominator,
    truncated_importance_weights,
)
from stepwiser_jax.rl.logprobs import token_logprobs, token_logprobs_and_entropy
from stepwiser_jax.rl.rewards import judge_reward
from stepwiser_jax.runs import compilation
from stepwiser_jax.runs.directory import RunDirectory, per_item
from stepwiser_jax.runs.progress import progress
from stepwiser_jax.runs.signals import stop
from stepwiser_jax.text.prompts import encode_judge_prompt, is_bare_verdict, parse_verdict
from stepwiser_jax.text.tokenizer import completion_text
from stepwiser_jax.training.batches import Group, RolloutBatch, example_loader, rollout_batch
from stepwiser_jax.training.loop import TrainingRun, tell_length
from stepwiser_jax.training.step import (
    TrainState,
    join_rows,
    make_train_step,
    mean_metrics,
    split_rows,
    used_micro_batches,
)

DUAL_CLIP = 3.0
"""The bound of a token's loss when its advantage is negative (verl's)."""
CORRECTION_CAP = 2.0
"""The largest weight of `grpo.sampler_correction`."""


def run(config: TrainJudge, run_dir: str | Path) -> dict[str, Any]:
    """GRPO for `iterations` or `epochs`, resuming from the last checkpoint."""
    directory = RunDirectory(run_dir, "train-judge", config)
    if directory.finished:
        return directory.summary()
    mesh = make_mesh(**config.mesh.model_dump())
    sampling_mesh = make_sampling_mesh(mesh, config.sampling_axes)
    directory.begin()
    settings = config.model.load_args
    load = functools.partial(load_for_training, **settings, mesh=mesh, seed=config.seed)
    loaded = load()
    examples, dropped = load_examples(config, loaded)
    iterations = config.iterations or iterations_of(config, len(examples))
    tell_length("train-judge", config.epochs, len(examples), f"{iterations} iterations")
    training = TrainingRun(
        directory,
        loaded,
        mesh,
        config.training,
        total_updates=iterations * config.updates_per_iteration,
        loader=example_loader(examples, batch_size=config.prompts_per_iteration, seed=config.seed),
    )
    collect = GroupCollector(config, loaded, sampling_mesh)
    reference, adapted = None, config.model.lora is not None
    if config.grpo.kl_coef and not adapted:
        reference = load().model
    train_step = judge_train_step(config, training.schedule, training.optimizer, training.state)
    start, began = training.step, time.perf_counter()
    with jax.set_mesh(mesh), progress("train-judge", "iteration", iterations, start) as told:
        for iteration in range(start, iterations):
            groups, rollout_metrics = collect(iteration, training)
            if config.grpo.kl_coef and adapted:
                reference = base_of(training.state.model)  # its arrays are new after each update
            updates = []
            for batch in prepare_batches(groups, config, mesh, training.state.model, reference):
                with compilation.compiling(f"train step {shape_of(batch)}"):
                    training.state, metrics = train_step(training.state, batch)
                updates.append(metrics)
            training.finish_step(iteration + 1, mean_metrics(updates) | rollout_metrics)
            told.advance(**{n: rollout_metrics[n] for n in ("reward", "unparsed_rate")})
    training.flush()
    summary = {
        "examples": len(examples),
        "dropped": dropped,
        "iterations": iterations,
        "seconds_per_iteration": per_item(time.perf_counter() - began, iterations - start),
        "last": training.last_metrics,
        "compiled": collect.engine.compiled_shapes,
    }
    return training.finish(summary)


def iterations_of(config: TrainJudge, examples: int) -> int:
    """How many draw every example `epochs` times, if none is drawn as a refill."""
    assert config.epochs is not None
    return -(-config.epochs * examples // config.prompts_per_iteration)


def load_examples(config: TrainJudge, loaded: Loaded) -> tuple[list[JudgeExample], dict[str, int]]:
    """Examples of no excluded problem whose prompt fits `max_prompt_tokens`, and counts of what was
    left out."""
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


# --- rollouts ---------------------------------------------------------------------------------


class GroupCollector:
    """Samples and rewards the groups of one iteration with the judge as it is now: one program over
    the devices of all processes, each of which holds all of the results."""

    def __init__(self, config: TrainJudge, loaded: Loaded, mesh: jax.sharding.Mesh):
        self.config, self.loaded, self.mesh = config, loaded, mesh
        self.key = jax.random.key(config.seed)
        self.params = SamplingParams(
            **config.sampling.model_dump(), stop_ids=loaded.tokenizer.eos_ids
        )
        # Shapes alone: the weights of every iteration come with `with_model`, and leave with it.
        shapes = jax.eval_shape(
            lambda model: decoding_layout(model, config.engine.weights), loaded.model
        )
        self.engine = Engine(shapes, loaded.tokenizer, mesh=mesh, **config.engine.model_dump())

    def __call__(
        self, iteration: int, training: TrainingRun
    ) -> tuple[list[RolloutGroup], dict[str, float]]:
        """Groups that teach, at most P of them, and the metrics of everything sampled. What a run
        had sampled before it ended is read. Raises Interrupted if the run is to stop, in the middle
        of a draw too: the rows that are finished are kept."""
        sampled_by = param_hash(training.state.model)
        model = decoding_copy(training.state.model, self.mesh)
        with jax.set_mesh(self.mesh):
            engine = self.engine.with_model(model)
        del model
        sampled: list[RolloutGroup] = []
        kept: list[RolloutGroup] = []
        wanted, drops = self.config.prompts_per_iteration, self.config.grpo.drop_zero_variance
        for draw in range(1 + self.config.grpo.max_resamples):
            examples, name = next(training.loader), f"judge/it{iteration}/draw{draw}"
            ids = [f"{name}/{p}/{example.example_id}" for p, example in enumerate(examples)]
            drawn = (iteration, draw, sampled_by)
            judged = training.pending.read(*drawn)
            if hosts.any_process(judged is None):  # all sample together, or none
                rows = training.pending.read_rows(*drawn)
                if hosts.any_process(not rows):  # all go on from the same rows, or from none
                    rows = {}
                with jax.set_mesh(self.mesh):
                    is_whole = self.sample(engine, examples, ids, rows)
                if not is_whole:
                    training.pending.write_rows(*drawn, rows.values())
                    training.stop()
                judged = self.judged(examples, ids, rows)
                training.pending.write(*drawn, judged)
            assert judged is not None
            training.stop_if_asked()
            sampled += judged
            kept += [group for group in judged if group.teaches or not drops]
            if len(kept) >= wanted:
                break
        penalized = bool(self.config.format_penalty)
        return kept[:wanted], rollout_metrics(sampled, len(kept), penalized)

    def sample(
        self,
        engine: Engine,
        examples: Sequence[JudgeExample],
        group_ids: Sequence[str],
        rows: dict[str, SampledRow],
    ) -> bool:
        """Adds the rows of these groups that are not in `rows` yet; returns whether all are there.
        They are not if the processes stop, which they do between two segments of decoding."""
        trunks = []
        for example, group_id in zip(examples, group_ids, strict=True):
            prompt, ids = prompt_ids(example, self.config, self.loaded), self.row_ids(group_id)
            if not rows.keys() >= set(ids):
                forks = [
                    SampleRequest(row_id, len(prompt), self.params.max_new_tokens) for row_id in ids
                ]
                trunks.append(Prefix(prompt, forks))

        def is_missing(sample: SampleRequest) -> bool:
            return sample.row_id not in rows

        for ended in engine.sample(trunks, self.params, key=self.key, is_needed=is_missing):
            for done in ended:
                rows[done.row_id] = SampledRow(done.row_id, tuple(done.ids), tuple(done.logprobs))
            if hosts.all_stop_here(stop.requested):
                return False
        return True

    def row_ids(self, group_id: str) -> list[str]:
        return [f"{group_id}/{g}" for g in range(self.config.group_size)]

    def judged(
        self,
        examples: Sequence[JudgeExample],
        group_ids: Sequence[str],
        rows: dict[str, SampledRow],
    ) -> list[RolloutGroup]:
        """Returns the groups of a draw, each with its verdicts and rewards."""
        groups = []
        for example, group_id in zip(examples, group_ids, strict=True):
            sampled = [rows[row_id] for row_id in self.row_ids(group_id)]
            texts = [completion_text(self.loaded.tokenizer, row.completion_ids) for row in sampled]
            verdicts = [parse_verdict(text) for text in texts]
            groups.append(
                RolloutGroup(
                    group_id,
                    tuple(prompt_ids(example, self.config, self.loaded)),
                    tuple(row.completion_ids for row in sampled),
                    tuple(row.logprobs for row in sampled),
                    tuple(verdicts),
                    tuple(
                        judge_reward(
                            verdict,
                            example.is_positive,
                            format_penalty=self.config.format_penalty,
                            in_format=is_bare_verdict(text),
                        )
                        for verdict, text in zip(verdicts, texts, strict=True)
                    ),
                )
            )
        return groups


def rollout_metrics(
    sampled: Sequence[RolloutGroup], kept: int, penalized: bool
) -> dict[str, float]:
    """Shares are fractions of all judgments sampled, kept groups or not. Where breaks of the format
    are penalized, they are what earned less than 0. `unparsed_rate` is of judgments without a
    verdict, `other_box_rate` of those among them whose last box holds something else."""
    verdicts = [verdict for group in sampled for verdict in group.verdicts_G]
    lengths = [len(ids) for group in sampled for ids in group.completions_G]
    rewards_PG = np.array([group.rewards_G for group in sampled])
    return {
        "reward": float(np.mean(rewards_PG)),
        **({"in_format_share": float(np.mean(rewards_PG >= 0))} if penalized else {}),
        "groups_sampled": len(sampled),
        "groups_kept_share": kept / len(sampled),
        "verdict_positive_share": verdicts.count(Verdict.POSITIVE) / len(verdicts),
        "unparsed_rate": sum(not verdict.is_given for verdict in verdicts) / len(verdicts),
        "other_box_rate": verdicts.count(Verdict.OTHER) / len(verdicts),
        "response_tokens": float(np.mean(lengths)),
        "response_tokens_max": float(np.max(lengths)),
    }


# --- groups -> batches -> loss ------------------------------------------------------------------


def assemble(groups: Sequence[RolloutGroup], config: TrainJudge) -> RolloutBatch:
    """Groups packed into rows of a fixed number (those not needed are padding) and of the smallest
    allowed length that holds the longest group."""
    rewards_PG = np.array([group.rewards_G for group in groups], np.float32)
    rewards_PG = rewards_PG.reshape(len(groups), config.group_size)
    advantages_PG = np.asarray(group_advantages(rewards_PG))
    rows = [
        Group(group.prompt_ids, group.completions_G, group.logprobs_G, advantages_G.tolist())
        for group, advantages_G in zip(groups, advantages_PG, strict=True)
    ]
    longest = max((row.num_tokens for row in rows), default=1)
    return rollout_batch(
        rows,
        num_rows=config.prompts_per_iteration // config.updates_per_iteration,
        row_length=next(length for length in config.row_lengths if length >= longest),
        micro_batches=config.training.micro_batches,
    )


def prepare_batches(
    groups: Sequence[RolloutGroup],
    config: TrainJudge,
    mesh: jax.sharding.Mesh,
    model: Any,
    reference: Any,
) -> list[RolloutBatch]:
    """The batches of one iteration, with the log-probs the loss needs from other parameters than
    those being updated: the reference's where there is a KL term, and the judge's own from before
    the first update where there are several (with one they are the current ones).

    Fewer batches where too few groups teach: an update without any would be momentum alone."""
    updates, temperature = config.updates_per_iteration, config.sampling.temperature
    micro_batches = config.training.micro_batches
    batches = []
    for update in range(min(updates, len(groups))):
        batch = shard_batch(assemble(groups[update::updates], config), mesh)
        if updates > 1:
            with compilation.compiling(f"score {shape_of(batch)}"):
                old_BT = score(model, batch, temperature, micro_batches=micro_batches)
            batch = dataclasses.replace(batch, old_logprobs_BT=old_BT)
        if reference is not None:
            with compilation.compiling(f"score {shape_of(batch)}"):
                ref_BT = score(reference, batch, temperature, micro_batches=micro_batches)
            batch = dataclasses.replace(batch, ref_logprobs_BT=ref_BT)
        batches.append(batch)
    return batches


def shape_of(batch: RolloutBatch) -> str:
    rows, length = batch.tokens_BT.shape
    return f"{rows}x{length}"


@functools.partial(jax.jit, static_argnames=("micro_batches",))
def score(model: Any, batch: RolloutBatch, temperature: float, *, micro_batches: int) -> jax.Array:
    """Log-probs (B, T) of a batch's completions under `model`, one micro-batch at a time; 0
    elsewhere."""

    def of_micro_batch(rows: RolloutBatch) -> jax.Array:
        return token_logprobs(
            model,
            rows.tokens_BT,
            rows.positions_BT,
            rows.segment_ids_BT,
            previous_BT=rows.previous_BT,
            wanted_BT=rows.completion_mask_BT,
            temperature=temperature,
        )

    stacked = split_rows(batch, micro_batches)

    def put(i: jax.Array, logprobs: jax.Array) -> jax.Array:
        return logprobs.at[i].set(of_micro_batch(jax.tree.map(lambda x: x[i], stacked)))

    zeros = jnp.zeros(stacked.tokens_BT.shape, jnp.float32)
    return join_rows(jax.lax.fori_loop(0, used_micro_batches(stacked), put, zeros))


def judge_train_step(
    config: TrainJudge,
    schedule: optax.Schedule,
    optimizer: optax.GradientTransformation,
    like: TrainState | None = None,
) -> Any:
    """One update on a `RolloutBatch`, see `make_train_step`."""
    return make_train_step(
        functools.partial(judge_loss, config=config),
        optimizer,
        schedule,
        micro_batches=config.training.micro_batches,
        denominator_fn=functools.partial(judge_denominators, config=config),
        like=like,
    )


def judge_denominators(batch: RolloutBatch, *, config: TrainJudge) -> dict[str, jax.Array]:
    """What sums over the whole batch are divided by, the same for every micro-batch of it."""
    mask_BT = batch.completion_mask_BT
    loss = loss_denominator(
        mask_BT,
        batch.segment_ids_BT,
        aggregation="token_mean",
        max_completion_tokens=config.sampling.max_new_tokens,
    )
    return {"loss": loss, "tokens": jnp.maximum(jnp.sum(mask_BT, dtype=jnp.float32), 1.0)}


def judge_loss(
    model: Any, batch: RolloutBatch, denominators: dict[str, jax.Array], *, config: TrainJudge
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The clipped GRPO loss of a (micro-)batch, with entropy, the sampler's log-prob gap, and the
    weights that correct it."""
    logprobs_BT, entropy_BT = token_logprobs_and_entropy(
        model,
        batch.tokens_BT,
        batch.positions_BT,
        batch.segment_ids_BT,
        previous_BT=batch.previous_BT,
        wanted_BT=batch.completion_mask_BT,
        temperature=config.sampling.temperature,
        remat=config.training.remat,
    )
    old_BT = batch.old_logprobs_BT
    if old_BT is None:
        old_BT = jax.lax.stop_gradient(logprobs_BT)
    mask_BT, grpo = batch.completion_mask_BT, config.grpo

    def mean(values_BT: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask_BT, values_BT, 0)) / denominators["tokens"]

    weights_BT, weight_metrics = None, {}
    if config.correction != "none":
        weights_BT = truncated_importance_weights(
            old_BT,
            batch.sampler_logprobs_BT,
            mask_BT,
            batch.segment_ids_BT,
            level=config.correction,
            cap=CORRECTION_CAP,
        )
        weight_metrics = {
            "importance_weight_mean": mean(weights_BT),
            "importance_truncated_share": mean(weights_BT >= CORRECTION_CAP),
        }
    loss, metrics = grpo_loss(
        logprobs_BT,
        old_BT,
        batch.advantages_BT,
        mask_BT,
        clip_eps_low=grpo.clip_eps_low,
        clip_eps_high=grpo.clip_eps_high,
        dual_clip=DUAL_CLIP,
        kl_coef=grpo.kl_coef,
        ref_logprobs_BT=batch.ref_logprobs_BT,
        importance_weights_BT=weights_BT,
        segment_ids_BT=batch.segment_ids_BT,
        aggregation="token_mean",
        denominator=denominators["loss"],
    )
    gap_BT = jnp.where(mask_BT, jnp.abs(old_BT - batch.sampler_logprobs_BT), 0)
    metrics |= weight_metrics | {
        "entropy": mean(entropy_BT),
        "logprob_gap": mean(gap_BT),
        "logprob_gap_max": jnp.max(gap_BT),
    }
    return loss, metrics

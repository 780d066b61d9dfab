"""Lists the programs of a stage's run, with inputs that are only shapes.

Shapes are those of the longest case: every prompt and every completion is as long as the config
allows. The programs are the functions that the run itself calls. Some that move little are left
out: the empty state of the engine, and the compaction of its last rows. Also left out are what
reads on after a shared prefix, the scores of GenPRM's and ThinkPRM's judges, and validation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepwiser_jax.commands.plan.hlo_cost import Cost, KernelCost
from stepwiser_jax.commands.plan.hlo_text import Instruction
from stepwiser_jax.commands.plan.tpu import Program
from stepwiser_jax.config import (
    Annotate,
    ClassifierJudge,
    Config,
    Evaluate,
    Model,
    OwnJudge,
    Rollout,
    Sampled,
    Sft,
    StepwiserJudge,
    TrainClassifier,
    TrainedModel,
    Training,
    TrainJudge,
)
from stepwiser_jax.distributed.loading import (
    attention_of,
    config_of,
    sharding_of,
    shardings_of,
)
from stepwiser_jax.distributed.mesh import make_sampling_mesh, replicated
from stepwiser_jax.distributed.shapes import (
    abstract_model,
    abstract_rows,
    bytes_per_device,
    placed,
)
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.engine_state import (
    StartingRows,
    decode_burst,
    empty_state,
    prefill,
    state_sharding,
)
from stepwiser_jax.inference.scheduler import choose_grid
from stepwiser_jax.inference.token_sampler import TokenSampler
from stepwiser_jax.judges.classifier import classifier_loss
from stepwiser_jax.model.attention.splash import PRODUCTS, blocks_visited
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.decoder import Decoder, Weights, convert_layer
from stepwiser_jax.model.flops import causal_pairs, forward_flops, weight_flops
from stepwiser_jax.model.lora import base_of, merge, trainable
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.rl.grpo import completion_logprobs, make_objective
from stepwiser_jax.rl.logprobs import default_slices
from stepwiser_jax.rl.rollouts import RolloutBatch, RolloutGroup, pack_groups
from stepwiser_jax.training.batches import TokenBatch
from stepwiser_jax.training.optimizer import make_optimizer, make_schedule
from stepwiser_jax.training.sft_loss import cross_entropy_loss, num_target_tokens
from stepwiser_jax.training.step import Loss, TrainState, make_train_step, moment_shardings

PLANNED = ("sft", "rollout", "annotate", "train-judge", "train-classifier", "evaluate")


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs of a run, in the order in which it needs them. `work` says what their calls add
    up to; `waves` is how often the rows in flight are filled for it."""

    programs: list[Program]
    work: str
    waves: int = 0


def programs_of(config: Config, mesh: jax.sharding.Mesh) -> Programs:
    """Returns the programs of a stage. Raises UserError if it has no plan."""
    if isinstance(config, Sft | TrainClassifier):
        return _of_packed_rows(config, mesh)
    if isinstance(config, TrainJudge):
        return _of_judge(config, mesh)
    if isinstance(config, Rollout | Annotate):
        # A trajectory has at most max_new_tokens; a wave holds the rollouts of one of its prefixes.
        samples = config.group_size if isinstance(config, Rollout) else config.most_rollouts
        return _of_sampling(config.policy, config, (config.block_size, samples), mesh)
    if isinstance(config, Evaluate):
        judge = config.judge
        if isinstance(judge, ClassifierJudge | OwnJudge):
            raise UserError(f"expected a judge that writes, found kind {judge.kind}: no plan of it")
        if not judge.votes:
            greedy = judge.sampling.model_copy(update={"temperature": 0.0})
            judge = judge.model_copy(update={"sampling": greedy})
        return _of_sampling(judge, judge, (config.block_size, max(1, judge.votes)), mesh)
    raise UserError(f"expected a stage of {', '.join(PLANNED)}")


# --- the work that a model cannot do without ----------------------------------------------------


def update_flops(
    config: ModelConfig, settings: TrainedModel, *, tokens: float, scored: float, pairs: float
) -> float:
    """Returns the FLOPs of forward and backward. Frozen weights have no gradient; adapters are too
    small to count."""
    forward = forward_flops(config, tokens=tokens, scored=scored, pairs=pairs)
    frozen = settings.lora is not None
    return 3 * forward - frozen * weight_flops(config, tokens=tokens, scored=scored)


def cache_flops(config: ModelConfig, tokens: int) -> float:
    """Returns the FLOPs of a prompt's keys and values. The last layer computes only those."""
    below = dataclasses.replace(config, num_layers=config.num_layers - 1)
    last = 4.0 * tokens * config.hidden_size * config.num_kv_heads * config.head_dim
    return last + forward_flops(below, tokens=tokens, scored=0, pairs=causal_pairs(0, tokens))


# --- training -----------------------------------------------------------------------------------


def _model(
    settings: Model, mesh: jax.sharding.Mesh, *, decoding: bool = False, scalar: bool = False
) -> tuple[ModelConfig, Transformer]:
    config = dataclasses.replace(config_of(settings.path), classifier=scalar)
    load_args = settings.load_args
    model = abstract_model(
        config,
        mesh,
        attention_of(config, mesh, settings.dtype),
        param_dtype=load_args["param_dtype"],
        compute_dtype=settings.dtype,
        decoding=decoding,
        lora=load_args.get("lora"),
    )
    return config, model


def _loops(
    program: str, config: ModelConfig, rows: int, length: int, scored: int, micro_batches: int
) -> dict[str, float]:
    """Returns the lengths of two loops: slices of positions that are scored, and micro-batches."""
    slices = default_slices(rows // micro_batches, length, config.vocab_size)
    used = math.ceil(scored / math.ceil(length / slices))
    return {"token_logprobs": used, f"jit({program})/while": micro_batches}


def _splash(config: ModelConfig, segment_ids_T: np.ndarray) -> KernelCost:
    """Returns the cost of the attention kernels for rows like this one."""
    visited, block = blocks_visited(jnp.asarray(segment_ids_T))

    def kernel(call: Instruction, operands: Sequence[Instruction]) -> Cost | None:
        products = next(
            (n for name, n in PRODUCTS.items() if f"splash_mha_{name}" in call.op_name), 0
        )
        if not products:
            return None
        arrays = (operand.shapes[0] for operand in operands)
        queries = next(x for x in arrays if x.dtype in ("bf16", "f32"))  # numbers come before it
        heads = math.prod(queries.dims[:-2])  # of all rows of a device
        # A visit loads keys and values, or queries and the gradient of what they found.
        loaded = 2 * block * queries.bytes / math.prod(queries.dims[:-1])
        whole = sum(o.hbm_bytes for o in operands) + call.hbm_bytes
        return Cost(
            2.0 * products * heads * visited * block * block * config.head_dim,
            whole + heads * visited * loaded,
        )

    return kernel


def _train_step(
    settings: Training,
    updates: int,
    objective: tuple[Loss, Callable[[Any], Any]],
    model: Transformer,
    mesh: jax.sharding.Mesh,
) -> tuple[Any, TrainState]:
    """Returns the train step that `TrainingRun` makes, and the shapes of its state."""
    schedule = make_schedule(settings.optimizer, updates)
    optimizer = make_optimizer(settings.optimizer, schedule)
    moments = jax.tree.map(
        placed,
        jax.eval_shape(optimizer.init, trainable(model)),
        moment_shardings(model, optimizer, mesh),
    )
    zero: Any = placed(np.int32(0), replicated(mesh))
    state = TrainState(model, moments, zero, zero)
    step = make_train_step(
        *objective, optimizer, schedule, micro_batches=settings.micro_batches, like=state
    )
    return step, state


def _of_packed_rows(config: Sft | TrainClassifier, mesh: jax.sharding.Mesh) -> Programs:
    scalar = isinstance(config, TrainClassifier) and config.head == "scalar"
    model_config, model = _model(config.model, mesh, scalar=scalar)
    rows, length = config.batch_size, config.max_length
    ints, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    remat, micro_batches = config.training.remat, config.training.micro_batches
    targets, scored, loss = None, length, functools.partial(cross_entropy_loss, remat=remat)
    if isinstance(config, TrainClassifier):
        # The two logits of a token cost next to nothing, so any two will do.
        targets, scored = np.zeros((rows, length), np.float32), 0
        loss = functools.partial(classifier_loss, signs=(0, 1), remat=remat)
    batch = abstract_rows(TokenBatch(ints, ints, ints, mask, targets), mesh)
    objective = (loss, num_target_tokens)
    step, state = _train_step(config.training, config.steps or 1, objective, model, mesh)
    useful = update_flops(
        model_config, config.model, tokens=length, scored=scored, pairs=causal_pairs(0, length)
    )
    program = Program(
        "train step",
        lambda: _lower(mesh, step, state, batch),
        mesh,
        calls=1,
        useful_flops=rows * useful,
        change="raise training.micro_batches, mesh.fsdp or mesh.tensor, set training.remat, or "
        "lower max_length",
        loops=_loops("train_step", model_config, rows, length, scored, micro_batches),
        kernel=_splash(model_config, np.ones(length, np.int32)),
    )
    return Programs([program], "one step")


def _lower(mesh: jax.sharding.Mesh | None, program: Any, *inputs: Any, **settings: Any) -> Any:
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        return program.lower(*inputs, **settings)


def longest_group(config: TrainJudge) -> RolloutGroup:
    completions = [np.zeros(config.sampling.max_new_tokens, np.int32)] * config.group_size
    return RolloutGroup("", np.zeros(config.max_prompt_tokens, np.int32), completions, completions)


def judge_batch(config: TrainJudge) -> RolloutBatch:
    """Returns the batch of one update without content. Every row is a group of the longest size."""
    rows = config.prompts_per_iteration // config.updates_per_iteration
    batch = pack_groups([], [], num_rows=rows, row_lengths=config.row_lengths[-1:])
    numbers = batch.sampler_logprobs_BT
    return dataclasses.replace(
        batch,
        old_logprobs_BT=numbers if config.updates_per_iteration > 1 else None,
        reference_logprobs_BT=numbers if config.grpo.kl_coef else None,
    )


def judge_work(config: TrainJudge) -> dict[str, float]:
    """Returns arguments of `forward_flops` for a group: its prompt once, then its completions."""
    prompt, new = config.max_prompt_tokens, config.sampling.max_new_tokens
    size = config.group_size
    pairs = causal_pairs(0, prompt) + size * causal_pairs(prompt, new)
    return {"tokens": prompt + size * new, "scored": size * new, "pairs": pairs}


def judge_step(
    config: TrainJudge, model: Transformer, mesh: jax.sharding.Mesh
) -> tuple[Any, TrainState]:
    """Returns the judge's train step, and the shapes of its state."""
    objective = make_objective(
        config.grpo,
        correction=config.correction,
        temperature=config.sampling.temperature,
        remat=config.training.remat,
    )
    updates = (config.iterations or 1) * config.updates_per_iteration
    return _train_step(config.training, updates, objective, model, mesh)


def lower_update(
    config: TrainJudge, model: Transformer, batch: RolloutBatch, mesh: jax.sharding.Mesh
) -> Any:
    """Returns the judge's train step, traced for an abstract model and batches of these shapes."""
    step, state = judge_step(config, model, mesh)
    return _lower(mesh, step, state, abstract_rows(batch, mesh))


def _of_judge(config: TrainJudge, mesh: jax.sharding.Mesh) -> Programs:
    model_config, model = _model(config.model, mesh)
    updates = config.updates_per_iteration
    step, state = judge_step(config, model, mesh)
    batch = judge_batch(config)
    micro_batches = config.training.micro_batches
    rows, length = batch.tokens_BT.shape
    loops = functools.partial(
        _loops,
        config=model_config,
        rows=rows,
        length=length,
        scored=config.group_size * config.sampling.max_new_tokens,
        micro_batches=micro_batches,
    )
    of_group = judge_work(config)
    sampling_mesh = make_sampling_mesh(mesh, config.sampling_axes)
    has_reference = config.grpo.kl_coef and config.model.lora is None
    reference = bytes_per_device(model) if has_reference else 0
    held = bytes_per_device(state) + reference
    change = (
        "raise training.micro_batches, mesh.fsdp or mesh.tensor, set training.remat, or lower "
        "max_prompt_tokens, group_size x sampling.max_new_tokens and row_lengths"
    )
    per_wave = (config.prompts_per_iteration, config.group_size)
    sampling = _of_sampling(config.model, config, per_wave, sampling_mesh, held=held)
    advantages = np.zeros((1, config.group_size))
    group = pack_groups([longest_group(config)], advantages, num_rows=1, row_lengths=[length])
    kernel = _splash(model_config, group.segment_ids_BT[0])
    programs = [_gather(model, mesh, sampling_mesh, held), *sampling.programs]
    passes = updates * ((updates > 1) + bool(config.grpo.kl_coef))
    if passes:
        bare = dataclasses.replace(batch, old_logprobs_BT=None, reference_logprobs_BT=None)
        programs.append(
            Program(
                "log-probs",
                lambda: _lower(
                    mesh,
                    completion_logprobs,
                    model,
                    abstract_rows(bare, mesh),
                    config.sampling.temperature,
                    micro_batches=micro_batches,
                ),
                mesh,
                calls=passes,
                useful_flops=rows * forward_flops(model_config, **of_group),
                change=change,
                resident=held - bytes_per_device(model),
                loops=loops("completion_logprobs"),
                kernel=kernel,
            )
        )
    programs.append(
        Program(
            "train step",
            lambda: _lower(mesh, step, state, abstract_rows(batch, mesh)),
            mesh,
            calls=updates,
            useful_flops=rows * update_flops(model_config, config.model, **of_group),
            change=change,
            resident=reference,
            loops=loops("train_step"),
            kernel=kernel,
        )
    )
    work = f"one iteration: {sampling.work}, {updates} update(s) of {rows} rows of {length}"
    return Programs(programs, work, sampling.waves)


# --- sampling -----------------------------------------------------------------------------------


def _gather(
    model: Transformer, mesh: jax.sharding.Mesh, sampling_mesh: jax.sharding.Mesh, held: int
) -> Program:
    """Returns the program that moves a model from the layout of training to that of decoding."""
    cast = jax.eval_shape(lambda model: merge(model, model.compute_dtype), model)
    cast = jax.tree.map(lambda leaf, kept: placed(leaf, kept.sharding), cast, base_of(model))
    shardings = shardings_of(cast, sharding_of(model.config, sampling_mesh, decoding=True))
    return Program(
        "gather a copy",
        lambda: jax.jit(lambda model: model, out_shardings=shardings).lower(cast),
        mesh,
        calls=1,
        useful_flops=0.0,
        change="raise mesh.tensor or sampling_mesh.tensor",
        resident=held,
    )


def abstract_decoder(model: Transformer, weights: Weights) -> tuple[Decoder, Any]:
    """Returns what `Decoder.from_transformer` gives, and the lowered program that it runs for each
    layer: the compiler says where the layer's matrices then lie."""
    lowered = convert_layer.lower(
        model.blocks,
        jax.ShapeDtypeStruct((), jnp.int32),
        dtype=model.compute_dtype,
        weights=weights,
    )
    of_layer = lowered.compile().output_shardings
    decoder = jax.eval_shape(lambda model: Decoder.from_transformer(model, weights), model)

    def placed_like(leaf: Any, kept: Any) -> Any:
        return None if leaf is None else placed(leaf, kept.get_value().sharding)

    return dataclasses.replace(
        decoder,
        blocks=tuple(jax.tree.map(placed, block, of_layer) for block in decoder.blocks),
        embed_VD=placed_like(decoder.embed_VD, model.embed),
        norm_D=placed_like(decoder.norm_D, model.norm),
        untied_head_VD=placed_like(decoder.untied_head_VD, model.head),
    ), lowered


def _of_sampling(
    settings: Model,
    sampler: Sampled,
    per_wave: tuple[int, int],
    mesh: jax.sharding.Mesh,
    *,
    held: int = 0,
) -> Programs:
    """Returns the programs that sample.

    `sampler`: how it samples. `per_wave`: prefixes, and samples of each, that run together.
    `held`: bytes of a device that the run keeps beside the sampler's weights; a stage that trains
    makes those as a copy in the compute type.
    """
    if isinstance(sampler, TrainJudge):
        settings = Model(path=settings.path, dtype=settings.dtype)
    sampling = sampler.sampling
    model_config, model = _model(settings, mesh, decoding=True)
    decoder, reshard = abstract_decoder(model, sampler.engine.weights)
    engine = Engine(decoder, None, mesh=mesh, **sampler.engine.model_dump())
    new, trunks = sampling.max_new_tokens, per_wave[0]
    room = max(1, engine.shapes.max_length - new)
    prompt = sampler.max_prompt_tokens if isinstance(sampler, TrainJudge) else room
    slots = engine.shapes.bucket(prompt)
    grid = choose_grid(engine.shapes.rows, *per_wave, shards=engine.shards)
    B, waves = grid.rows, math.ceil(math.prod(per_wave) / grid.rows)
    # The log-odds of two tokens cost the same, whichever they are.
    compared = (0, 1) if isinstance(sampler, StepwiserJudge) else None
    state = jax.eval_shape(
        lambda: empty_state(decoder, None, grid, slots, new, compared is not None)
    )
    state = jax.tree.map(placed, state, state_sharding(state, model_config, mesh))
    at_once = min(grid.slots, engine.prefill_rows(slots))
    fresh = abstract_rows(
        (np.zeros((at_once, slots), np.int32), np.zeros((at_once,), np.int32)), mesh
    )
    ints, numbers = np.zeros((B,), np.int32), np.zeros((B,), np.uint32)
    start = abstract_rows(StartingRows(np.zeros((B,), bool), ints, ints, ints, numbers), mesh)
    draw = jax.eval_shape(
        lambda: TokenSampler.create(
            jax.random.key(0), sampling.temperature, sampling.top_k, sampling.top_p
        )
    )
    scalar, stop_ids = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((), (1,)))
    change = (
        "lower engine.rows or sampling.max_new_tokens, raise the tensor axis of the mesh that "
        "samples, or set engine.weights to int8"
    )
    read = cache_flops(model_config, prompt)
    sampled = forward_flops(model_config, tokens=new, scored=new, pairs=causal_pairs(prompt, new))
    set_mesh = mesh if isinstance(sampler, TrainJudge) else None
    programs = [
        Program(
            "reshard (a layer)",
            lambda: reshard,
            mesh,
            calls=model_config.num_layers,
            useful_flops=0.0,
            change=change,
            resident=held + bytes_per_device(decoder),
        ),
        Program(
            "prefill",
            lambda: _lower(set_mesh, prefill, decoder, state, *fresh),
            mesh,
            calls=math.ceil(trunks / at_once),
            useful_flops=at_once * read,
            change=change,
            resident=held,
            kernel=_splash(model_config, np.ones(slots, np.int32)),
        ),
        Program(
            "decode burst",
            lambda: _lower(
                set_mesh,
                decode_burst,
                decoder,
                state,
                start,
                draw,
                scalar,
                scalar,
                stop_ids,
                None,
                compared,
            ),
            mesh,
            calls=waves,
            useful_flops=B * sampled,
            change=change,
            resident=held,
            loops={"jit(decode_burst)/while": new},
        ),
    ]
    shape = f"{grid.slots} x {grid.rows_per_slot}"
    work = f"{trunks} prompts x {per_wave[1]} in {waves} wave(s) of {shape} rows"
    return Programs(programs, work, waves)

"""Adapters: what they compute, what they leave alone, and whole runs that train them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from sampled import Reference

from stepwiser_jax.__main__ import main
from stepwiser_jax.commands.plan.programs import update_flops
from stepwiser_jax.config import Optimizer, TrainedModel
from stepwiser_jax.distributed.loading import decoding_copy, load_model
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.distributed.shapes import abstract_model
from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.model.attention import PLAIN
from stepwiser_jax.model.decoder import Decoder
from stepwiser_jax.model.flops import forward_flops, weight_flops
from stepwiser_jax.model.hf import load_hf, save_hf
from stepwiser_jax.model.lora import (
    Adapter,
    base_of,
    make_adapters,
    merge_block,
    trainable,
    with_adapters,
    with_trainable,
)
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.record_lines import write_records
from stepwiser_jax.records import JudgeExample
from stepwiser_jax.training.batches import TokenBatch
from stepwiser_jax.training.checkpoint import Checkpointer
from stepwiser_jax.training.loop import TrainingRun
from stepwiser_jax.training.optimizer import make_optimizer
from stepwiser_jax.training.sft_loss import cross_entropy_loss
from stepwiser_jax.training.step import (
    accumulate,
    create_train_state,
    make_train_step,
)
from tiny import logged, tiny_config

ALL = ("q", "k", "v", "o", "gate", "up", "down")
RANK, ALPHA = 3, 12.0


def base_model(family="qwen2", **types):
    return Transformer(tiny_config(family), rngs=nnx.Rngs(0), **types)


def adapted(model, targets=ALL, moved=True):
    """`moved`: with a B that is not zero any more."""
    adapters = make_adapters(model.blocks, rank=RANK, alpha=ALPHA, targets=targets, seed=1)
    for i, adapter in enumerate(adapters.values() if moved else ()):
        normal = jax.random.normal(jax.random.key(i), adapter.b[...].shape)
        adapter.b = adapter.b.replace(0.1 * normal)
    return with_adapters(model, adapters)


def dense(model):
    """The model with matrices that are the sums, by numpy."""
    merged = nnx.clone(base_of(model))
    for name, adapter in model.adapters.items():
        weight = getattr(merged.blocks, name)
        change = np.einsum("lor,lri->loi", adapter.b[...], adapter.a[...])
        weight[...] = weight[...] + ALPHA / RANK * change
    return merged


def tokens(rows=4):
    return jax.random.randint(jax.random.key(7), (rows, 12), 0, 64)


def batch():
    shape = tokens().shape
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    return TokenBatch(tokens(), jnp.ones(shape, jnp.int32), positions, positions > 0)


@functools.partial(jax.jit, static_argnames=("micro_batches", "remat"))
def gradients(model, batch, micro_batches=1, remat=False):
    loss_fn = functools.partial(cross_entropy_loss, remat=remat)
    return accumulate(loss_fn, lambda _: jnp.float32(40), model, batch, micro_batches)[0]


@pytest.mark.parametrize(
    "types", [{}, {"compute_dtype": jnp.bfloat16}], ids=["float32", "bfloat16"]
)
def test_new_adapters_change_nothing(types):
    model = base_model(**types)
    np.testing.assert_array_equal(adapted(model, moved=False)(tokens()), model(tokens()))


def test_a_model_is_not_changed_by_one_made_of_it():
    model = base_model()
    changed = adapted(model)
    assert changed.adapters and not model.adapters
    assert not base_of(changed).adapters and changed.adapters
    assert changed.embed[...] is model.embed[...]


@pytest.mark.parametrize("targets", [ALL, ("q", "down")], ids=str)
def test_adapters_compute_what_dense_matrices_do(targets):
    model = adapted(base_model(), targets)
    assert set(model.adapters) == set(targets)
    found, expected = model(tokens()), dense(model)(tokens())
    assert not np.allclose(expected, base_of(model)(tokens()), atol=0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_adapters_are_merged_wherever_a_model_leaves_training(tmp_path):
    model = adapted(base_model())
    expected = dense(model)
    save_hf(model, None, str(tmp_path / "model"))
    copied = decoding_copy(model, make_mesh())
    for merged in (load_hf(str(tmp_path / "model")), copied):
        assert not merged.adapters
        np.testing.assert_allclose(merged(tokens()), expected(tokens()), rtol=1e-5, atol=1e-5)

    def sample(model):
        sampler = Reference(model, rows=[2], buckets=[32])
        settings = {"key": jax.random.key(0), "row_ids": list("ab")}
        found = sampler.generate([[1, 2], [3]], SamplingParams(9), **settings)
        return [completion.tokens for completion in found]

    samples = [sample(m) for m in (model, expected, base_of(model))]
    np.testing.assert_array_equal(samples[0], samples[1])
    assert not np.array_equal(samples[1], samples[2])
    int8 = [
        Decoder.from_transformer(m, "int8").blocks[1].gate[...].qvalue for m in (model, expected)
    ]
    assert jnp.max(jnp.abs(int8[0].astype(int) - int8[1].astype(int))) <= 1  # rounding


def test_merging_is_in_float32():
    model = adapted(base_model(param_dtype=jnp.bfloat16))
    block = merge_block(jax.tree.map(lambda x: x[0], model.blocks))
    assert block.gate[...].dtype == jnp.float32
    assert block.mlp_norm[...].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(model.adapters)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(("micro_batches", "remat"), [(1, False), (2, True)])
def test_gradients_are_those_of_the_dense_matrices_by_the_chain_rule(micro_batches, remat):
    """W' = W + s B A, so that dA = s B^T dW' and dB = s dW' A^T."""
    model = adapted(base_model())
    of_dense = gradients(dense(model), batch())
    found = gradients(model, batch(), micro_batches, remat)
    assert jax.tree.structure(found) == jax.tree.structure(trainable(model))
    for name, adapter in model.adapters.items():
        grad = ALPHA / RANK * getattr(of_dense.blocks, name)[...]
        expected_a = np.einsum("lor,loi->lri", adapter.b[...], grad)
        expected_b = np.einsum("loi,lri->lor", grad, adapter.a[...])
        of = found["blocks"]["adapters"][name]
        assert np.max(np.abs(expected_a)) > 1e-3
        np.testing.assert_allclose(of["a"][...], expected_a, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(of["b"][...], expected_b, rtol=1e-3, atol=1e-6)


def test_gradients_of_frozen_weights_are_never_made():
    """Neither in memory nor in time: their products are a third of an update."""
    fields = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2048}
    config = tiny_config("qwen2", **fields)
    model = Transformer(config, rngs=nnx.Rngs(0))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))

    def needs(model):
        row = jax.tree.map(lambda x: x[:1], batch())
        compiled = gradients.lower(model, row).compile()
        memory = compiled.memory_analysis()
        bytes_ = memory.temp_size_in_bytes + memory.output_size_in_bytes
        return bytes_, compiled.cost_analysis()["flops"]

    (whole_bytes, whole_flops), (few_bytes, few_flops) = needs(model), needs(adapted(model))
    assert whole_bytes > size > 2 * few_bytes
    assert few_flops < 0.75 * whole_flops


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_updates_leave_the_base_alone(micro_batches):
    model = adapted(base_model(param_dtype=jnp.bfloat16), moved=False)
    base, before = jax.device_get((base_of(model), trainable(model)))
    settings = Optimizer(learning_rate=1e-2, weight_decay=0.1)
    optimizer = make_optimizer(settings, lambda _: 1e-2)
    state = create_train_state(model, optimizer, make_mesh())
    step = make_train_step(
        cross_entropy_loss,
        lambda _: jnp.float32(40),
        optimizer,
        lambda _: 1e-2,
        micro_batches=micro_batches,
    )
    losses = []
    for _ in range(5):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(base_of(state.model)), strict=True):
        np.testing.assert_array_equal(a, b)
    after = jax.tree.leaves(trainable(state.model))
    for a, b in zip(jax.tree.leaves(before), after, strict=True):
        assert not np.array_equal(a, b)
    moments = optax.tree.get(state.opt_state, "mu"), optax.tree.get(state.opt_state, "nu")
    moments = sum(leaf.size for leaf in jax.tree.leaves(moments))
    assert moments == 2 * sum(leaf.size for leaf in after)
    assert len(after) == 2 * len(ALL)


def test_adapters_decay_like_matrices():
    model = adapted(base_model())
    transform = make_optimizer(Optimizer(learning_rate=1.0, weight_decay=0.5), lambda _: 1.0)
    trained = trainable(model)
    zeros = jax.tree.map(jnp.zeros_like, trained)
    updates, _ = transform.update(zeros, transform.init(trained), trained)
    for update, x in zip(jax.tree.leaves(updates), jax.tree.leaves(trained), strict=True):
        np.testing.assert_allclose(update, -0.5 * x, rtol=1e-6)


def test_a_model_without_adapters_is_trained_whole():
    model = base_model()
    assert trainable(model) is model
    other = jax.tree.map(lambda x: x + 1, model)
    assert with_trainable(model, other) is other


def test_plan_knows_the_adapters():
    mesh, lora = make_mesh(1, 2, 2), {"rank": RANK, "alpha": ALPHA, "targets": ALL}
    model = abstract_model(tiny_config(), mesh, PLAIN, param_dtype="bfloat16", lora=lora)
    real = adapted(base_model("llama"))
    for leaf, expected in zip(
        jax.tree.leaves(model.adapters), jax.tree.leaves(real.adapters), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
    assert isinstance(model.adapters["gate"], Adapter)
    assert model.adapters["gate"].a.get_value().sharding.spec == P(None, None, "fsdp")
    assert model.adapters["gate"].b.get_value().sharding.spec == P(None, "tensor", None)
    work = {"tokens": 10, "scored": 4, "pairs": 50}
    frozen, whole = (
        update_flops(tiny_config(), TrainedModel(path="", lora=lora), **work) for lora in ({}, None)
    )
    assert whole == 3 * forward_flops(tiny_config(), **work)
    assert whole - frozen == weight_flops(tiny_config(), tokens=10, scored=4)


# --- whole runs ---------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def configs(tmp_path_factory, request):
    """The smoke configs' arguments for sft, on a fresh model, and for judge, on that one."""
    directory = tmp_path_factory.mktemp("lora")
    configs = request.config.rootpath / "configs"
    examples = [
        JudgeExample(f"c{i}", "p", "3 + 4 * 2", "", f"step {i}", bool(i % 2)) for i in range(8)
    ]
    write_records(directory / "examples.jsonl", examples)
    held_out = [JudgeExample(f"h{i}", "h", "5 + 4", "", "step", bool(i)) for i in range(2)]
    write_records(directory / "held_out.jsonl", held_out)
    lora = ["--set", "model.lora.rank=4", "--set", "training.checkpoint_every=2"]
    sets = {
        "sft": ["steps=5", "examples.limit=32"],
        "train-judge": [
            f"model.path={directory / 'base'}",
            f"examples.source={directory / 'examples.jsonl'}",
            f"validation.examples.source={directory / 'held_out.jsonl'}",
            "iterations=3",
            "prompts_per_iteration=4",
            "updates_per_iteration=1",
            "grpo.kl_coef=0.1",
            f"reward={__name__}:by_length",
        ],
    }
    file = {"sft": "smoke_policy.yaml", "train-judge": "smoke_judge.yaml"}
    arguments = {}
    for stage, settings in sets.items():
        words = [word for setting in settings for word in ("--set", setting)]
        arguments[stage] = [stage, "--config", str(configs / file[stage]), *lora, *words]
    loaded = load_model("arithmetic", mesh=make_mesh(), seed=3)
    save_hf(loaded.model, loaded.tokenizer, str(directory / "base"))
    return directory, arguments


def by_length(example, text, tokens):
    """Earns 1 for half of all texts, whatever they say: an untrained model gives no verdict."""
    return float(len(text) % 2 == example.is_positive)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "train-judge"])
def test_a_run_cut_short_and_run_again_is_the_same_to_the_bit(
    configs, stage, tmp_path, monkeypatch
):
    _, arguments = configs
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*arguments[stage], "--run-dir", str(whole)]) == 0
    finish_iteration = TrainingRun.finish_iteration

    def dying(self, step, metrics):
        if step == 3:
            self._checkpointer.wait()
            raise Killed
        finish_iteration(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "finish_iteration", dying)
        with pytest.raises(Killed):
            main([*arguments[stage], "--run-dir", str(cut)])
    assert Checkpointer(cut / "checkpoints").latest_step() == 2
    assert main([*arguments[stage], "--run-dir", str(cut)]) == 0
    assert logged(cut) == logged(whole)
    if stage == "train-judge":
        lines = (cut / "metrics.jsonl").read_text().splitlines()
        kl = [json.loads(line)["kl"] for line in lines[1:]]  # the first one is the validation's
        assert kl[0] < 1e-6 < kl[-1], "the reference has moved with the judge"
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (cut, whole)]
    assert weights[0] == weights[1]
    on_disk = sum(f.stat().st_size for f in (whole / "checkpoints" / "2").rglob("*") if f.is_file())
    assert on_disk < len(weights[0])

    assert main(["convert", "--checkpoint", str(cut), "--output", str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == weights[0]
    exported = load_hf(str(whole / "model"))
    seed = {"sft": 0, "train-judge": 3}[stage]
    base = load_model("arithmetic", mesh=make_mesh(), seed=seed).model
    for name in ("embed", "norm"):
        np.testing.assert_array_equal(getattr(exported, name)[...], getattr(base, name)[...])
    for name in ALL:
        moved = getattr(exported.blocks, name)[...] != getattr(base.blocks, name)[...]
        assert jnp.mean(moved) > 0.5, name


def test_adapters_of_another_base_are_refused(configs, tmp_path, capsys):
    directory, arguments = configs
    words = [word.replace("iterations=3", "iterations=1") for word in arguments["train-judge"]]
    run = tmp_path / "run"
    assert main([*words, "--run-dir", str(run)]) == 0
    (run / "manifest.json").unlink()
    (directory / "base" / "SHA256SUMS").unlink()
    weights = directory / "base" / "model.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-4] + b"\0\0\1\0")
        assert main([*words, "--run-dir", str(run)]) == 2
        assert "were trained on base@" in capsys.readouterr().err
        convert = ["convert", "--checkpoint", str(run), "--output", str(tmp_path / "hf")]
        assert main(convert) == 2
        assert "put that model back" in capsys.readouterr().err
    finally:
        weights.write_bytes(kept)

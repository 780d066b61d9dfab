"""Eight fake devices: the same numbers on every mesh, and mistakes named at the start."""

import dataclasses
import functools
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sampled import Reference, arrays_of, assert_sampled

from stepwiser_jax.config import Optimizer
from stepwiser_jax.config_files import load_config
from stepwiser_jax.distributed.fingerprints import param_hash
from stepwiser_jax.distributed.loading import (
    sharded_adapters,
    sharding_of,
    shardings_of,
)
from stepwiser_jax.distributed.mesh import (
    attention_on,
    make_mesh,
    make_sampling_mesh,
    parameter_sharding,
    shard_batch,
    slice_of,
    split_attention,
)
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference import engine as engine_module
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.inference.token_sampler import TokenSampler
from stepwiser_jax.model import cpu
from stepwiser_jax.model.attention import PLAIN, Attention
from stepwiser_jax.model.attention.splash import splash_attention, splash_mask
from stepwiser_jax.model.hf import load_hf, save_hf
from stepwiser_jax.model.lora import merge, with_adapters
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.rl.grpo import make_objective
from stepwiser_jax.rl.logprobs import token_logprobs
from stepwiser_jax.rl.rollouts import pack_groups
from stepwiser_jax.training.checkpoint import Checkpointer
from stepwiser_jax.training.optimizer import B1, CLIP_NORM, make_optimizer
from stepwiser_jax.training.step import accumulate, create_train_state, make_train_step
from tiny import rollout_group, tiny_config, with_unknown_ids

MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]
CONFIG = load_config("train-judge", Path(__file__).parents[2] / "configs" / "smoke_judge.yaml")
OBJECTIVE = make_objective(CONFIG.grpo, correction="none", temperature=1.0, remat=False)
OPTIMIZER = make_optimizer(Optimizer(learning_rate=1e-3), lambda _: 1e-3)


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def checkpoint(request, tmp_path_factory):
    directory = str(tmp_path_factory.mktemp(request.param) / "model")
    model = Transformer(tiny_config(request.param), rngs=nnx.Rngs(0))
    save_hf(model, None, directory)
    return directory, model.config


one_family = pytest.mark.parametrize("checkpoint", ["llama"], indirect=True)


def load(checkpoint, mesh):
    directory, config = checkpoint
    return load_hf(directory, sharding_for=sharding_of(config, mesh))


def batch():
    rng = np.random.default_rng(0)
    groups = [
        rollout_group(
            rng.integers(0, 64, 4 + row % 3), [rng.integers(0, 64, 3 + g) for g in range(2)]
        )
        for row in range(8)
    ]
    batch = pack_groups(groups, [[1.0, -1.0]] * 8, num_rows=8, row_lengths=[16])
    old_BT, ref_BT = (rng.uniform(-6, -3, batch.tokens_BT.shape).astype("f4") for _ in range(2))
    return dataclasses.replace(batch, old_logprobs_BT=old_BT, reference_logprobs_BT=ref_BT)


def gradients(checkpoint, sizes, micro_batches=1):
    mesh = make_mesh(*sizes)
    return gradients_of(load(checkpoint, mesh), mesh, micro_batches)


def gradients_of(model, mesh, micro_batches=1):
    compute = jax.jit(functools.partial(accumulate, *OBJECTIVE, micro_batches=micro_batches))
    with jax.set_mesh(mesh):
        grads, metrics = compute(model=model, batch=shard_batch(batch(), mesh))
    return model, jax.device_get(grads), jax.device_get(metrics)


@functools.cache
def gradients_on_one_device(checkpoint):
    return gradients(checkpoint, (1, 1, 1))


def assert_equal_gradients(found, expected):
    (_, grads, metrics), (_, expected_grads, expected_metrics) = found, expected
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(expected_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@one_family
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_visible_blocks_are_equal_on_every_mesh(checkpoint, sizes, monkeypatch):
    """As rows longer than `LONG_ROW` attend, beside the whole mask on one device. Some rows have
    more pairs of blocks, which the devices that hold the others must wait for."""
    one = gradients_on_one_device(checkpoint)
    monkeypatch.setattr(cpu, "LONG_ROW", 15)
    monkeypatch.setattr(cpu, "BLOCK", 4)
    blocks = cpu.CPU.mask(jnp.asarray(batch().segment_ids_BT))
    assert isinstance(blocks, cpu.VisibleBlocks)
    assert len(set(blocks.num_pairs_B.tolist())) > 1
    assert_equal_gradients(gradients(checkpoint, sizes), one)


LORA = {"rank": 3, "alpha": 6.0, "targets": ("q", "k", "o", "gate", "down")}


def adapted(checkpoint, sizes):
    """(the model with adapters, merged, its gradients)"""
    mesh = make_mesh(*sizes)
    model = load(checkpoint, mesh)
    model = with_adapters(model, sharded_adapters(model, mesh, seed=0, **LORA))
    for adapter in model.adapters.values():
        b = jnp.arange(adapter.b.get_value().size, dtype=jnp.float32) % 7 * 0.01
        adapter.b[...] = jax.device_put(
            b.reshape(adapter.b.get_value().shape), adapter.b.get_value().sharding
        )
    with jax.set_mesh(mesh):
        merged = jax.device_get(merge(model, jnp.dtype("float32")))
    return model, merged, gradients_of(model, mesh)


@functools.cache
def adapted_on_one_device(checkpoint):
    return adapted(checkpoint, (1, 1, 1))


@one_family
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)], ids=str)
def test_adapters_are_equal_on_every_mesh(checkpoint, sizes):
    """Their gradients, and the model they are merged into; their rank is split over nothing."""
    _, merged_one, one = adapted_on_one_device(checkpoint)
    model, merged_many, many = adapted(checkpoint, sizes)
    for a, b in zip(jax.tree.leaves(merged_one), jax.tree.leaves(merged_many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert_equal_gradients(many, one)
    assert len(jax.tree.leaves(one[1])) == 2 * len(LORA["targets"])
    shares = {
        (axis, x.addressable_shards[0].data.size / x.size)
        for adapter in model.adapters.values()
        for variable in (adapter.a, adapter.b)
        for x in (variable.get_value(),)
        for axis in variable.get_metadata("axes")
        if axis in ("embed", "mlp")
    }
    assert shares == {("embed", 1 / sizes[1]), ("mlp", 1 / sizes[2])}


def train_state(checkpoint, sizes):
    mesh = make_mesh(*sizes)
    return mesh, create_train_state(load(checkpoint, mesh), OPTIMIZER, mesh)


def axes_of(array):
    """The mesh axes over which it is split."""
    entries = (entry for entry in array.sharding.spec if entry is not None)
    return {name for entry in entries for name in (entry if isinstance(entry, tuple) else (entry,))}


def gradients_in(state, metrics):
    """The gradients of the first update, from their moment, for which they were clipped."""
    clipped = max(1.0, float(metrics["grad_norm"]) / CLIP_NORM)
    moments = jax.device_get(optax.tree.get(state.opt_state, "mu"))
    return jax.tree.map(lambda moment: moment * (clipped / (1 - B1)), moments)


@pytest.mark.parametrize(
    ("checkpoint", "sizes"),
    [("llama", sizes) for sizes in MESHES[1:]] + [("qwen3", (2, 2, 2))],
    indirect=["checkpoint"],
    ids=str,
)
def test_updates_are_equal_on_every_mesh_and_no_device_holds_more_than_its_share(checkpoint, sizes):
    """Loss, gradients and metrics of two micro-batches are those of the whole batch on one device.
    What a device holds is the same behind an update."""
    one = gradients_on_one_device(checkpoint)
    for name in "loss kl entropy clip_fraction_low clip_fraction_high logprob_gap".split():
        assert one[2][name] != 0, name
    assert len(one[0].embed[...].sharding.device_set) == 1
    mesh, state = train_state(checkpoint, sizes)
    assert len(state.model.embed[...].sharding.device_set) == 8, "the model is not spread at all"
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    train_step = make_train_step(*OBJECTIVE, OPTIMIZER, lambda _: 1e-3, micro_batches=2, like=state)
    with jax.set_mesh(mesh):
        state, metrics = train_step(state, shard_batch(batch(), mesh))
        assert_equal_gradients((None, gradients_in(state, metrics), metrics), one)
        state, _ = train_step(state, shard_batch(batch(), mesh))
    assert train_step._cache_size() == 1, "it was compiled twice"
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        parts = math.prod(mesh.shape[axis] for axis in axes_of(leaf))
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // parts}
    moments = (optax.tree.get(state.opt_state, name) for name in ("mu", "nu"))
    for tree in (state.model, *moments):
        for name in ("embed", "q", "o", "gate", "up", "down"):
            holder = tree if name == "embed" else tree.blocks
            assert axes_of(getattr(holder, name)[...]) == {"fsdp", "tensor"}, name
        for name in ("k", "v"):
            split = {"fsdp", "tensor"} if mesh.shape["tensor"] <= 2 else {"fsdp"}
            assert axes_of(getattr(tree.blocks, name)[...]) == split, name


@one_family
def test_checkpoints_move_between_all_meshes(checkpoint, tmp_path):
    states = [train_state(checkpoint, sizes)[1] for sizes in MESHES]
    expected = jax.tree.leaves(jax.device_get(states[0]))
    prints = {param_hash(state.model) for state in states}
    assert len(prints) == 1, "what one mesh has sampled is another's too"
    for number, state in enumerate(states):
        saver = Checkpointer(tmp_path / str(number))
        saver.save(1, state, {"loader": {}})
        saver.wait()
        for template in states:
            restored, _ = saver.restore(template)
            found, places = jax.tree.leaves(restored), jax.tree.leaves(template)
            for a, b, place in zip(expected, found, places, strict=True):
                assert b.sharding.is_equivalent_to(place.sharding, b.ndim)
                np.testing.assert_array_equal(a, jax.device_get(b))
        saver.close()


PROMPTS = [[3 + p % 5, 4, 5 + p][: 1 + p % 3] for p in range(16)]
ROW_IDS = [f"{p}/{g}" for p in range(16) for g in range(8)]
SAMPLED = SamplingParams(8, stop_ids=(1, 2, 3, 4, 5))


def sample(checkpoint, sampler_class, sizes):
    mesh = make_mesh(*sizes)
    model = load(checkpoint, mesh)
    sampler = sampler_class(model, rows=(64, 128), buckets=(16,), mesh=mesh)
    key = jax.random.key(0)
    params = sampled_by(sampler_class)
    found = sampler.generate(PROMPTS, params, key=key, row_ids=ROW_IDS, group_size=8)
    log_odds_P = sampler.log_odds(PROMPTS, (5, 3)) if sampler_class is Engine else None
    return mesh, model, found, log_odds_P


def sampled_by(sampler_class):
    """Returns the params of a sampler: only the engine compares tokens."""
    compared = (5, 3) if sampler_class is Engine else None
    return dataclasses.replace(SAMPLED, compared=compared)


@functools.cache
def log_odds_on_one_device(checkpoint):
    return sample(checkpoint, Engine, (1, 1, 1))[3]


@one_family
@pytest.mark.parametrize(
    ("sampler_class", "sizes"),
    [(Engine, sizes) for sizes in MESHES[2:]] + [(Reference, (2, 2, 2))],
    ids=str,
)
def test_sampling_on_a_mesh(checkpoint, sizes, sampler_class):
    """What one device draws; log-probs are also those of the same model reading the row on the
    mesh."""
    mesh, model, many, log_odds_P = sample(checkpoint, sampler_class, sizes)
    if log_odds_P is not None:
        np.testing.assert_allclose(log_odds_P, log_odds_on_one_device(checkpoint), atol=1e-4)
    prompts_B = [PROMPTS[b // 8] for b in range(len(ROW_IDS))]
    one = load(checkpoint, make_mesh())
    params = sampled_by(sampler_class)
    assert_sampled(one, prompts_B, ROW_IDS, params, jax.random.key(0), many)
    groups = [
        rollout_group(prompt, [many[b].tokens], [many[b].logprobs])
        for b in range(len(ROW_IDS))
        for prompt in [prompts_B[b]]
    ]
    rows = shard_batch(
        pack_groups(groups, np.zeros((len(groups), 1)), num_rows=len(groups), row_lengths=[16]),
        mesh,
    )
    with jax.set_mesh(mesh):
        found_BT = jax.jit(token_logprobs)(
            model,
            rows.tokens_BT,
            rows.positions_BT,
            rows.segment_ids_BT,
            predictor_BT=rows.predictor_BT,
        )
    mask_BT = rows.target_mask_BT
    np.testing.assert_allclose(found_BT[mask_BT], rows.sampler_logprobs_BT[mask_BT], atol=1e-4)


@one_family
def test_ids_without_a_token_are_left_out_on_every_mesh(checkpoint):
    """The vocabulary is split over devices: some hold logits of such ids alone."""
    mesh = make_mesh(1, 2, 4)
    model = with_unknown_ids(load(checkpoint, make_mesh()), 64)
    sharding_for = sharding_of(model.config, mesh)
    model = jax.device_put(model, shardings_of(model, sharding_for))
    shard = model.head_VD.addressable_shards[-1]
    assert shard.index[0].start >= 64 and shard.data.shape[0] == 32
    _, found, metrics = gradients_of(model, mesh)
    _, expected, expected_metrics = gradients_on_one_device(checkpoint)
    for name in ("embed", "head"):
        grad_VD = getattr(found, name)[...]
        assert not grad_VD[64:].any()
        setattr(found, name, getattr(found, name).replace(grad_VD[:64]))
    assert_equal_gradients((None, found, metrics), (None, expected, expected_metrics))
    engine = Engine(model, rows=(64, 128), buckets=(16,), mesh=mesh)
    key = jax.random.key(0)
    output = engine.generate(PROMPTS, SAMPLED, key=key, row_ids=ROW_IDS, group_size=8)
    prompts_B = [PROMPTS[b // 8] for b in range(len(ROW_IDS))]
    assert_sampled(load(checkpoint, make_mesh()), prompts_B, ROW_IDS, SAMPLED, key, output)


def test_noise_is_identical_on_every_mesh():
    """To the bit: it is a function of key, row and position."""
    draw = TokenSampler.create(jax.random.key(7), 1.0, 0, 1.0)
    rows, positions = np.arange(64, dtype=np.uint32) * 977, np.arange(64, dtype=np.int32)
    expected_B = np.asarray(jax.jit(draw._uniform)(rows, positions))
    assert len(set(expected_B.tolist())) == 64
    for sizes in MESHES[1:]:
        mesh = make_mesh(*sizes)
        with jax.set_mesh(mesh):
            found_B = jax.jit(draw._uniform)(*shard_batch((rows, positions), mesh))
        np.testing.assert_array_equal(np.asarray(found_B), expected_B)


@one_family
def test_keys_and_values_lie_with_their_rows_and_heads(checkpoint, monkeypatch):
    """Created there, and there behind every program: a device holds its share of them."""
    mesh, states = make_mesh(2, 2, 2), []
    decode, read = engine_module.decode_burst, engine_module.prefill

    def watched(program):
        def call(model, state, *inputs):
            states.append(state)
            states.append(program(model, state, *inputs))
            return states[-1]

        return call

    monkeypatch.setattr(engine_module, "decode_burst", watched(decode))
    monkeypatch.setattr(engine_module, "prefill", watched(read))
    engine = Engine(load(checkpoint, mesh), rows=(8, 16), buckets=(16,), mesh=mesh)
    prompts = [[3, 4, 5], [9], [7, 7, 8, 1]] * 3  # more than there are rows: places are refilled
    ids = [f"{p}/{g}" for p in range(9) for g in range(4)]
    params = SamplingParams(7, stop_ids=(1, 2, 3, 4, 5))  # in no other test
    compiled = [program._cache_size() for program in (decode, read)]
    engine.generate(prompts, params, key=jax.random.key(0), row_ids=ids, group_size=4)
    for state in states:
        for x in jax.tree.leaves((state.prefix.cache.keys, state.suffix.values)):
            assert x.sharding.shard_shape(x.shape)[:2] == (x.shape[0] // 4, x.shape[1] // 2)
        rows = state.tokens_BC.shape[0]
        assert state.tokens_BC.sharding.shard_shape(state.tokens_BC.shape)[0] == rows // 4
    shapes = len({shape for shape in engine.compiled_shapes if not shape.startswith("shrink")})
    assert sum(program._cache_size() for program in (decode, read)) - sum(compiled) == shapes


def sample_int8(checkpoint, sizes):
    mesh = make_mesh(*sizes)
    model = load(checkpoint, mesh)
    engine = Engine(model, weights="int8", rows=(8,), buckets=(16,), mesh=mesh)
    ids, prompts = [f"r{b}" for b in range(8)], [[3, 4, 5], [9]] * 4
    found = engine.generate(prompts, SamplingParams(8), key=jax.random.key(0), row_ids=ids)
    return model, engine, found


@functools.cache
def int8_on_one_device(checkpoint):
    return sample_int8(checkpoint, (1, 1, 1))[2]


@one_family
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2)], ids=str)
def test_int8_weights_stay_where_the_weights_were(checkpoint, sizes):
    expected, (model, many, found) = int8_on_one_device(checkpoint), sample_int8(checkpoint, sizes)
    np.testing.assert_array_equal(arrays_of(found)[0], arrays_of(expected)[0])
    np.testing.assert_allclose(arrays_of(found)[1], arrays_of(expected)[1], atol=1e-4)
    for name in ("q", "k", "o", "up", "down"):
        before, after = getattr(model.blocks, name)[...], getattr(many.decoder.blocks[0], name)[...]
        share = before.addressable_shards[0].data.size / before.size
        assert share <= 1 / 4
        assert after.qvalue.addressable_shards[0].data.size / after.qvalue.size == share, name


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("sizes", [(2, 1, 4), (1, 2, 3)], ids=str)
def test_splash_attention_is_split_over_rows_and_heads(sizes, kv_heads):
    """Key/value heads that the tensor axis does not divide, and query heads too, among them."""
    mesh = make_mesh(*sizes)
    interpreted = Attention(functools.partial(splash_mask, interpret=True), splash_attention)
    split = split_attention(interpreted, mesh, num_heads=4, num_kv_heads=kv_heads)
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = (
        jax.random.normal(keys[0], (4, 24, 4, 8)),
        jax.random.normal(keys[1], (4, 24, kv_heads, 8)),
        jax.random.normal(keys[2], (4, 24, kv_heads, 8)),
    )
    row = [65536] * 9 + [65537] * 8 + [65538] * 7
    segment_ids = shard_batch(np.array([row, row[3:] + [131072] * 3, [1] * 24, [2] * 24]), mesh)

    def gradients(attention):
        def loss(qkv):
            out = attention.attend(*qkv, attention.mask(segment_ids))
            return jnp.sum(jnp.square(out)), out

        with jax.set_mesh(mesh):
            return jax.jit(jax.grad(loss, has_aux=True))(qkv)

    expected, found = gradients(PLAIN), gradients(split)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_splash_attention_wants_whole_rows_and_a_tpu():
    mesh = make_mesh(2, 2, 2)
    on_cpu = attention_on(mesh, num_heads=4, num_kv_heads=2, head_dim=8, dtype=jnp.bfloat16)
    assert on_cpu is cpu.CPU
    split = split_attention(PLAIN, mesh, num_heads=4, num_kv_heads=2)
    q, k = jnp.zeros((6, 8, 4, 8)), jnp.zeros((6, 8, 2, 8))
    with pytest.raises(UserError, match="6 rows cannot be split over data x fsdp = 4"):
        split.attend(q, k, k, split.mask(jnp.ones((6, 8), jnp.int32)))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="needs 16 devices, found 8"):
        make_mesh(4, 2, 2)
    sharding = parameter_sharding(make_mesh(1, 4, 2), num_heads=4, num_kv_heads=2)
    with pytest.raises(UserError, match=r"vocab = 63 is not a multiple of mesh\.tensor = 2"):
        sharding(("vocab", "embed"), (63, 32))
    with pytest.raises(UserError, match="6 rows cannot be split"):
        shard_batch({"x": np.zeros((6, 2))}, make_mesh(4, 1, 2))


def test_heads_are_split_whole_or_not_at_all():
    mesh = make_mesh(1, 1, 8)
    whole = parameter_sharding(mesh, num_heads=8, num_kv_heads=2)
    assert whole(("layers", "heads", "embed"), (2, 128, 32)).spec[1] == "tensor"
    assert whole(("layers", "kv_heads", "embed"), (2, 32, 32)).spec[1] is None
    odd = parameter_sharding(mesh, num_heads=12, num_kv_heads=4)
    assert odd(("layers", "heads", "embed"), (2, 192, 32)).spec[1] is None


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_a_judge_samples_on_all_devices_of_all_processes():
    """Four processes of two devices, dealt out in turns, as the links of a torus may want it."""
    devices = [FakeDevice(i, i % 4) for i in range(8)]
    training = make_mesh(2, 2, 2, devices=devices)
    assert make_sampling_mesh(training) is training
    rows = make_sampling_mesh(training, {"data": 8, "fsdp": 1, "tensor": 1})
    assert list(rows.devices.flat) == list(training.devices.flat)
    for sizes in ({"data": 4, "fsdp": 1, "tensor": 1}, {"data": 2, "fsdp": 8, "tensor": 1}):
        with pytest.raises(UserError, match="must be all 8 devices of 4 processes"):
            make_sampling_mesh(training, sizes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU's device, as jax describes it."""

    id: int
    device_kind: str
    coords: tuple[int, ...]
    process_index: int
    slice_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"


def torus(kind, x, y, z=1, slices=1):
    """In the order of jax.devices(): hosts of 2 x 2 chips one after the other."""
    chips = []
    for slice_index, k, j, i in itertools.product(
        range(slices), range(z), range(0, y, 2), range(0, x, 2)
    ):
        host = len(chips) // 4
        for b, a in itertools.product(range(2), range(2)):
            coords = (i + a, j + b, k)
            chips.append(Chip(len(chips), kind, coords, host, slice_index))
    return chips


def hops(mesh, axis):
    """The most links between two neighbours on an axis of the mesh; `inf` between slices."""
    devices = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), -1)
    pairs = zip(devices[..., :-1].flat, devices[..., 1:].flat, strict=True)
    return max(
        sum(abs(p - q) for p, q in zip(a.coords, b.coords, strict=True))
        if a.slice_index == b.slice_index
        else math.inf
        for a, b in pairs
    )


@pytest.mark.parametrize(
    ("devices", "sizes"),
    [
        (torus("TPU v5", 4, 4, 4), (16, 4, 1)),
        (torus("TPU v5", 4, 4, 4), (8, 4, 2)),
        (torus("TPU v5", 4, 4, 4), (4, 4, 4)),
        (torus("TPU v5 lite", 8, 8), (8, 8, 1)),
        (torus("TPU v5 lite", 8, 8), (2, 8, 4)),
        (torus("TPU v6 lite", 8, 8), (4, 8, 2)),
        (torus("TPU v6 lite", 8, 8, slices=2), (8, 8, 2)),
    ],
    ids=lambda value: value if isinstance(value, tuple) else value[0].device_kind,
)
def test_neighbours_on_the_last_axes_are_neighbours_on_the_torus(devices, sizes):
    mesh = make_mesh(*sizes, devices=devices)
    assert {device.id for device in mesh.devices.flat} == set(range(len(devices)))
    in_order = jax.sharding.Mesh(np.array(devices).reshape(sizes), mesh.axis_names)
    for axis in ("fsdp", "tensor"):
        if mesh.shape[axis] > 1:
            assert hops(mesh, axis) == 1
            assert hops(in_order, axis) > 1 or mesh.shape[axis] == 2
    assert [slice_of(device) for device in mesh.devices[:, 0, 0]] == sorted(
        slice_of(device) for device in mesh.devices[:, 0, 0]
    )


def test_a_judge_samples_on_neighbours():
    training = make_mesh(16, 4, 1, devices=torus("TPU v5", 4, 4, 4))
    sampling = make_sampling_mesh(training, {"data": 16, "fsdp": 1, "tensor": 4})
    assert hops(sampling, "tensor") == 1
    assert list(sampling.devices.flat) == list(training.devices.flat)


def test_only_data_crosses_between_slices():
    devices = torus("TPU v5 lite", 4, 4, slices=2)
    mesh = make_mesh(2, 4, 4, devices=devices[::2] + devices[1::2])
    slices = [{slice_of(device) for device in replica.flat} for replica in mesh.devices]
    assert slices == [{0}, {1}]
    with pytest.raises(UserError, match=r"does not fit 2 slices.*make data a multiple of 2"):
        make_mesh(1, 8, 4, devices=devices)
    with pytest.raises(UserError, match="does not fit 2 slices"):
        make_sampling_mesh(mesh, {"data": 1, "fsdp": 1, "tensor": 32})


def test_a_mesh_with_a_hole_is_refused():
    host = torus("TPU v5", 2, 2)
    assert make_mesh(1, 1, 2, devices=host).size == 2
    with pytest.raises(UserError, match="is no block of the TPU's grid"):
        make_mesh(3, 1, 1, devices=host)


def test_one_process_may_sample_on_some_of_its_devices():
    training = make_mesh(2, 2, 1)
    assert make_sampling_mesh(training, {"data": 1, "fsdp": 1, "tensor": 2}).size == 2
    with pytest.raises(UserError, match="needs 8 devices, found 4"):
        make_sampling_mesh(training, {"data": 8, "fsdp": 1, "tensor": 1})

"""Programs compiled for TPUs that are not there: needs libtpu, runs nothing."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.sharding import NamedSharding, PartitionSpec

from tiny import rollout_group, tiny_config

pytest.importorskip("libtpu", reason="needs the extra tpu: pip install '.[tpu]'")

from stepwiser_jax.__main__ import main
from stepwiser_jax.commands.plan.command import make_plan
from stepwiser_jax.commands.plan.hlo_cost import Collective, program_cost
from stepwiser_jax.commands.plan.programs import abstract_decoder, lower_update
from stepwiser_jax.commands.plan.tpu import tpu_topology
from stepwiser_jax.config import Annotate, TrainJudge
from stepwiser_jax.distributed.loading import attention_of
from stepwiser_jax.distributed.mesh import make_mesh, slice_of
from stepwiser_jax.distributed.shapes import abstract_model, abstract_rows
from stepwiser_jax.model.attention import PLAIN
from stepwiser_jax.model.decoder import Decoder
from stepwiser_jax.rl.rollouts import pack_groups
from tpu_step import JUDGE

LENGTH = 1000
KERNELS = {f"splash_mha_{phase}" for phase in ("fwd", "dq", "dkv")}


def compiled(attention_for, *, head_dim, sizes, rows):
    config = tiny_config(
        "qwen2",
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        head_dim=head_dim,
        max_length=LENGTH,
    )
    mesh = make_mesh(*sizes, devices=tpu_topology("v5e:2x2").devices)
    group = rollout_group([1] * 300, [[1] * 200] * 3)
    advantages = [[1.0, -1.0, 0.0]] * rows
    batch = pack_groups([group] * rows, advantages, num_rows=rows, row_lengths=[LENGTH])
    model = abstract_model(config, mesh, attention_for(config, mesh, "bfloat16"))
    return lower_update(TrainJudge.model_validate(JUDGE), model, batch, mesh).compile()


def with_two_axes_of_positions(text: str) -> set[str]:
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", text)}
    return {str(shape) for shape in shapes if sum(size >= LENGTH for size in shape) > 1}


# Several rows a device; small heads, and key/value heads that four devices cannot share.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "sizes", "rows"), [(128, (1, 2, 2), 4), (64, (1, 1, 4), 1)], ids=str
)
def test_the_train_step_runs_splash_attention_on_tpu(head_dim, sizes, rows, capsys):
    step = compiled(attention_of, head_dim=head_dim, sizes=sizes, rows=rows)
    text = step.as_text()
    assert {name for name in KERNELS if name in text} == KERNELS
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward once, though remat
    assert not with_two_axes_of_positions(text)
    with capsys.disabled():
        print(step.memory_analysis())


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 2)], ids=str)
def test_prompts_are_read_by_splash_attention_on_tpu(sizes):
    """In every layer; where the cache alone is wanted, the last computes keys and values alone."""
    config = tiny_config("qwen2", num_layers=3, head_dim=128, max_length=LENGTH)
    mesh = make_mesh(*sizes, devices=tpu_topology("v5e:2x2").devices)
    attention = attention_of(config, mesh, "bfloat16")
    model = abstract_model(config, mesh, attention, param_dtype="bfloat16", decoding=True)
    decoder, _ = abstract_decoder(model, "model")
    tokens = abstract_rows(np.zeros((4, LENGTH), np.int32), mesh)

    def text_of(read) -> str:
        return jax.jit(read).lower(decoder, tokens).compile().as_text()

    for_cache = text_of(lambda decoder, tokens: Decoder.prefill(decoder, tokens)[1])
    for text, layers in (
        (text_of(Decoder.prefill), config.num_layers),
        (for_cache, config.num_layers - 1),
    ):
        assert text.count('custom_call_target="tpu_custom_call"') == layers
        assert "splash_mha_fwd" in text and not with_two_axes_of_positions(text)


@pytest.mark.slow
def test_dense_attention_would_make_such_an_array():
    """That the search above finds what it looks for."""
    text = compiled(lambda *_: PLAIN, head_dim=128, sizes=(1, 1, 1), rows=1).as_text()
    assert with_two_axes_of_positions(text)


def test_only_data_crosses_between_slices():
    devices = tpu_topology("v5e:2x2", slices=2).devices
    mesh = make_mesh(2, 2, 2, devices=devices[::2] + devices[1::2])
    slices = [{slice_of(device) for device in replica.flat} for replica in mesh.devices]
    assert slices == [{0}, {1}]


def test_a_product_and_an_all_gather_by_hand():
    mesh = make_mesh(1, 1, 4, devices=tpu_topology("v5e:2x2").devices)

    def shape(rows, columns, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16, sharding=sharding)

    replicated = NamedSharding(mesh, PartitionSpec())
    product = jax.jit(lambda x, w: x @ w, out_shardings=replicated)
    text = product.lower(shape(1024, 512), shape(512, 2048, None, "tensor")).compile().as_text()
    cost = program_cost(text)
    # Each device multiplies its columns; then the product is gathered.
    assert cost.flops == 2 * 1024 * 512 * 512
    assert cost.collectives == {Collective("all-gather", (0, 1, 2, 3)): 3 * 1024 * 512 * 2}
    # Both operands are read, the whole product is written; what is between stays on the chip.
    assert cost.hbm_bytes == 2 * (1024 * 512 + 512 * 512 + 1024 * 2048)


PLANNED = JUDGE | {
    "prompts_per_iteration": 4,
    "max_prompt_tokens": 184,
    "row_lengths": [512],
    "sampling": {"max_new_tokens": 40},
    "engine": {"rows": [16], "buckets": [256]},
    "mesh": {"fsdp": 2, "tensor": 2},
}


def planned(tmp_path, layers, capsys, **changes):
    """(exit status, what `plan --json` says) of a model of so many layers."""
    model = tiny_config(
        "qwen2",
        vocab_size=512,  # so few that layers, and not logits, fill the memory
        hidden_size=256,
        intermediate_size=512,
        num_layers=layers,
        head_dim=128,
        max_length=4096,
    )
    (tmp_path / "config.json").write_text(json.dumps(model.to_hf()))
    config = tmp_path / "judge.yaml"
    settings = {"path": str(tmp_path), "dtype": "bfloat16"}
    config.write_text(yaml.safe_dump(PLANNED | {"model": settings} | changes))
    command = ["plan", "train-judge", "--config", str(config), "--topology", "v5e:2x2", "--json"]
    status = main(command)
    printed = capsys.readouterr()
    assert status in (0, 1), printed.err
    return status, json.loads(printed.out)


@pytest.mark.slow
def test_two_and_four_layers_predict_six(tmp_path, capsys):
    """What loops, and what grows with layers, is counted. A train step takes as long to compile
    with few layers as with many, and the longer the larger its arrays are: so they are small.

    Its peak is linear (20.4, 29.6 and 38.9 MB). Temporaries are not in larger models: how XLA packs
    them depends on the model.
    """
    plans = {}
    for layers in (2, 4, 6):
        status, plans[layers] = planned(tmp_path, layers, capsys)
        assert status == 0 and plans[layers]["fits"]
    for name in ("prefill", "decode burst", "train step"):
        few, more, many = (plans[layers]["programs"][name] for layers in (2, 4, 6))
        assert few["flops"] < more["flops"]
        assert few["flops"] + (more["flops"] - few["flops"]) * 2 == pytest.approx(many["flops"])
        # A decode burst of so small a model is partly held on the chip.
        bounds = {"prefill": {"total": 0.05}, "train step": {"arguments": 0.01, "peak": 0.1}}
        for part, tolerance in bounds.get(name, {}).items():
            a, b, c = (entry["memory"][part] for entry in (few, more, many))
            assert a + (b - a) * 2 == pytest.approx(c, rel=tolerance), (name, part)


@pytest.mark.slow
def test_rows_that_share_a_trunk_compute_more_for_each_byte(tmp_path):
    """16 short continuations of each long trunk, and as many rows each with a trunk of its own."""
    model = tiny_config(
        "qwen2",
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_heads=4,
        num_kv_heads=2,
        head_dim=128,
        max_length=8192,
    )
    (tmp_path / "config.json").write_text(json.dumps(model.to_hf()))

    def intensity(rollouts: int) -> float:
        """FLOPs for each byte of HBM."""
        settings = {
            "policy": {"path": str(tmp_path), "dtype": "bfloat16"},
            "rollouts": "unused",
            "num_rollouts": rollouts,
            "block_size": 512 // rollouts,
            "sampling": {"max_new_tokens": 128},
            "engine": {"rows": [512], "buckets": [4096 + 128]},
            "mesh": {"data": 4},
        }
        config = Annotate.model_validate(settings)
        (need,) = make_plan("annotate", config, "v5e:2x2", only="decode burst").needs
        assert need.cost is not None
        return need.cost.flops / need.cost.hbm_bytes

    shared, plain = intensity(16), intensity(1)
    print(f"FLOPs for each byte: shared {shared:.1f}, plain {plain:.1f}")
    assert shared >= 3 * plain


@pytest.mark.slow
def test_what_is_too_large_exits_with_1(tmp_path, capsys):
    status, plan = planned(
        tmp_path,
        2,
        capsys,
        engine={"rows": [1 << 17], "buckets": [4096]},
        prompts_per_iteration=1 << 17,
        max_prompt_tokens=3000,
        row_lengths=[4608],
        updates_per_iteration=1 << 15,
    )
    assert status == 1 and not plan["fits"]
    too_large = {name for name, entry in plan["programs"].items() if not entry["fits"]}
    assert "decode burst" in too_large and "train step" not in too_large
    assert "lower engine.rows" in plan["programs"]["decode burst"]["change"]

"""What `stepwiser plan` adds up, without a TPU's compiler."""

import dataclasses
import importlib.util
import json
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stepwiser_jax.__main__ import main
from stepwiser_jax.commands.plan.command import Plan, as_dict, as_text, largest
from stepwiser_jax.commands.plan.hlo_cost import Collective, Cost, program_cost
from stepwiser_jax.commands.plan.programs import (
    Programs,
    judge_work,
    programs_of,
)
from stepwiser_jax.commands.plan.tpu import (
    CHIPS,
    GIB,
    Need,
    Program,
    Topology,
    bandwidth,
    roofline,
    tpu_topology,
)
from stepwiser_jax.config import Evaluate, TrainJudge
from stepwiser_jax.distributed.loading import attention_of, config_of
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.distributed.shapes import abstract_model, bytes_per_device
from stepwiser_jax.errors import UserError
from stepwiser_jax.model.attention.splash import blocks_visited
from stepwiser_jax.model.flops import block_parameters, causal_pairs, forward_flops
from stepwiser_jax.model.transformer import Transformer
from tiny import tiny_config

JUDGE = {
    "model": {"path": "unused"},
    "examples": {"source": "unused"},
    "iterations": 1,
    "prompts_per_iteration": 2,
    "group_size": 4,
    "max_prompt_tokens": 10,
    "row_lengths": [30],
    "sampling": {"max_new_tokens": 5},
    "engine": {"buckets": [15]},
    "training": {"optimizer": {"learning_rate": 1e-6}},
}


def grid(kind: str, shape: tuple[int, ...], slices: int = 1) -> tuple[Topology, SimpleNamespace]:
    """A topology and a mesh of devices that know their places only, x first."""
    places = [place[::-1] for place in np.ndindex(*shape[::-1])]
    devices = [
        SimpleNamespace(coords=place, slice_index=s) for s in range(slices) for place in places
    ]
    topology = Topology(kind, shape, slices, devices)
    mesh = SimpleNamespace(devices=np.array(devices), shape={"data": 1, "fsdp": len(devices)})
    return topology, mesh


# --- useful work --------------------------------------------------------------------------------


def test_useful_flops_are_those_of_a_forward_pass():
    config, T = tiny_config("qwen3"), 24
    model = Transformer(config, rngs=nnx.Rngs(0))
    matrices = [x for x in jax.tree.leaves(model.blocks) if x.ndim == 3]
    assert block_parameters(config) == sum(x.size for x in matrices)
    compiled = jax.jit(lambda m, x: m(x)).lower(model, jnp.zeros((1, T), jnp.int32)).compile()
    # XLA on CPU computes every pair, seen or not.
    expected = forward_flops(config, tokens=T, scored=T, pairs=T * T)
    assert program_cost(compiled.as_text()).flops == expected


def test_pairs_of_queries_and_keys():
    assert causal_pairs(0, 3) == 1 + 2 + 3
    assert causal_pairs(10, 3) == 11 + 12 + 13


def test_a_group_counts_its_prompt_once():
    config, judge = tiny_config(), TrainJudge.model_validate(JUDGE)
    pairs = 10 * 11 / 2 + 4 * (5 * 10 + 15)
    expected = forward_flops(config, tokens=30, scored=20, pairs=pairs)
    assert forward_flops(config, **judge_work(judge)) == expected


def test_blocks_that_attention_visits():
    """Two blocks of 512: the second sees the first where they are one segment."""
    assert blocks_visited(jnp.ones(1024, jnp.int32)) == (3, 512)
    apart = jnp.repeat(jnp.array([1, 2 << 16], jnp.int32), 512)
    assert blocks_visited(apart)[0] == 2


# --- hardware -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape", "group", "links"),
    [
        ("v5p", (4, 4, 4), range(64), 6),  # three rings
        ("v5p", (4, 4, 4), range(4), 2),  # one
        ("v5p", (4, 4, 4), range(2), 1),  # half of one
        ("v5e", (8, 8), range(64), 2),  # two lines
        ("v5e", (16, 16), range(256), 4),
        ("v4", (2, 2, 1), range(4), 2),
    ],
)
def test_bandwidth_is_that_of_the_links_of_a_group(kind, shape, group, links):
    topology, mesh = grid(kind, shape)
    found = bandwidth(Collective("all-gather", tuple(group)), topology, mesh)
    assert found == links * CHIPS[kind].link_bandwidth


def test_slices_are_joined_by_the_network():
    topology, mesh = grid("v5e", (2, 2), slices=2)
    assert bandwidth(Collective("all-reduce", (0, 4)), topology, mesh) == 3.125e9
    assert bandwidth(Collective("all-reduce", tuple(range(8))), topology, mesh) == 4 * 3.125e9


def test_roofline_of_a_product_and_an_all_gather():
    topology, mesh = grid("v5e", (4, 1))
    cost = Cost(197e12, 8.2e11 / 2, Counter({Collective("all-gather", (0, 1, 2, 3)): 9e10}))
    seconds = roofline(cost, topology, mesh)
    assert seconds == pytest.approx({"compute": 1.0, "hbm": 0.5, "interconnect": 2.0})


# --- the report ---------------------------------------------------------------------------------


def plan_of(temporaries: int) -> Plan:
    topology, mesh = grid("v5e", (4, 1))
    program = Program("train step", lambda: None, mesh, 3, 4 * 197e12 / 2, "lower it", resident=GIB)
    sizes = {"arguments": 2 * GIB, "outputs": 2 * GIB, "donated": 2 * GIB, "code": 0, "peak": 0}
    cost = Cost(197e12, 1.0, Counter({Collective("all-gather", (0, 1, 2, 3)): 9e10}))
    need = Need(program, 1.0, sizes | {"temporaries": temporaries}, cost)
    return Plan("judge", topology, mesh, Programs([program], "work"), [need])


def test_what_is_held_at_once_decides_whether_it_fits():
    assert as_dict(plan_of(13 * GIB))["fits"]
    too_large = plan_of(13 * GIB + 1)
    assert not as_dict(too_large)["fits"]
    assert "train step does not fit: lower it" in as_text(too_large)


def test_the_first_line_says_whether_it_fits_and_the_least_time():
    first = as_text(plan_of(GIB)).splitlines()[0]
    assert first == (  # 2 GiB come and go, 1 temporary, 1 held; 3 calls
        "fits: 4.0 of 16 GiB a chip (train step); all calls take at least 3.0 s, with the "
        "interconnect 6.0 s"
    )
    first = as_text(plan_of(13 * GIB + 1)).splitlines()[0]
    assert first == "does not fit: train step needs more than the 16 GiB of a chip"


def test_the_share_of_peak_is_useful_work_over_the_longest_time():
    train = as_dict(plan_of(GIB))["programs"]["train step"]
    assert train["share_of_peak_without_interconnect"] == pytest.approx(0.5)
    assert train["share_of_peak_with_interconnect"] == pytest.approx(0.25)
    json.dumps(as_dict(plan_of(GIB)))


def test_what_the_compiler_refuses_does_not_fit():
    plan = plan_of(0)
    refused = dataclasses.replace(plan.needs[0], memory=None, cost=None, refused="needs 20G of 16G")
    text = as_text(dataclasses.replace(plan, needs=[refused]))
    assert "needs 20G of 16G" in text and "train step does not fit: lower it" in text


@pytest.mark.parametrize(("kind", "noted"), [("v5e", True), ("v6e", True), ("v5p", False)])
def test_what_the_compiler_would_refuse_on_part_of_a_slice_is_said(kind, noted):
    topology, _ = grid(kind, (8, 1))
    plan = dataclasses.replace(plan_of(0), topology=topology)  # of 4 devices
    assert ("part of a" in as_text(plan)) == noted == bool(as_dict(plan)["notes"])


@pytest.mark.parametrize("limit", [0, 1, 5, 8, 100])
def test_the_largest_that_fits(limit):
    candidates, asked = [1, 2, 4, 8, 16], []

    def fits(count: int) -> bool:
        asked.append(count)
        return count <= limit

    fitting = [count for count in candidates if count <= limit]
    assert largest(candidates, fits) == (fitting[-1] if fitting else None)
    assert len(asked) <= 3


# --- inputs -------------------------------------------------------------------------------------


def test_abstract_parameters_take_their_share_of_a_device():
    config = tiny_config()
    mesh = make_mesh(1, 2, 2)
    model = abstract_model(
        config, mesh, attention_of(config, mesh, "bfloat16"), param_dtype="bfloat16"
    )
    norms = (2 * config.num_layers + 1) * config.hidden_size
    matrices = block_parameters(config) + 2 * config.vocab_size * config.hidden_size
    assert bytes_per_device(model) == 2 * (matrices / 4 + norms)


@pytest.mark.parametrize(("kind", "compares"), [("stepwiser", True), ("thinkprm", False)])
def test_a_judge_that_compares_its_verdicts_is_compiled_with_their_log_odds(
    tmp_path, kind, compares
):
    """StepWiser's judge does so at each token that it writes, others after it."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_hf()))
    judge = {"kind": kind, "path": str(tmp_path), "engine": {"rows": [2], "buckets": [16]}}
    judge["sampling"] = {"max_new_tokens": 5}
    config = Evaluate.model_validate({"judge": judge, "benchmark": {"source": "unused"}})
    programs = {program.name: program for program in programs_of(config, make_mesh()).programs}
    for name in ("prefill", "decode burst"):
        state = programs[name].lower().out_info
        assert (state.log_odds_BC is not None) == compares
        assert state.logprobs_BC.shape == (2, 5)
    text = programs["decode burst"].lower().as_text(debug_info=True)
    assert ("pair_log_odds" in text) == compares


def test_a_model_is_known_by_its_config_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_hf()))
    assert config_of(str(tmp_path)).hidden_size == 32
    with pytest.raises(UserError, match="directory that holds the model's config"):
        config_of("nobody/nothing")  # tests have no network


@pytest.mark.parametrize("name", ["v9:2x2", "v5p", "v5p:4", "v5p-128"])
def test_unknown_topologies_are_refused(name):
    with pytest.raises(UserError, match=r"v5p:4x4x4"):
        tpu_topology(name)


def test_without_the_compiler_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "judge.yaml").write_text(json.dumps(JUDGE))
    command = [
        "plan",
        "train-judge",
        "--config",
        str(tmp_path / "judge.yaml"),
        "--topology",
        "v5e:2x2",
    ]
    assert main(command) == 2
    assert "stepwiser-jax[tpu]" in capsys.readouterr().err

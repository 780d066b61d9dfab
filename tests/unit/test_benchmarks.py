"""What the benchmarks compute by hand, and that none of them fails to start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "common")
TINY = {
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
}


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import common

    return common


@pytest.fixture
def rollout(common):
    import rollout

    return rollout


@pytest.fixture
def train_step(common):
    import train_step

    return train_step


def child(common, text: str):
    """A side whose process runs this text."""
    [core, *_] = os.sched_getaffinity(0)
    return common.Side("theirs", [sys.executable, "-c", text], core)


def test_sizes_count_parameters(common):
    sizes = common.Sizes.of(TINY)
    # q and o 4x4 each, k and v 4x2 each, three of 4x8; heads of 2
    assert sizes == common.Sizes(layers=2, width=4, kv_width=2, body=2 * (32 + 16 + 96), head=40)


def test_sizes_are_those_of_smollm2(common):
    model = common.WORKLOAD["model"]
    sizes = common.Sizes.of(
        {
            "hidden_size": model["d"],
            "intermediate_size": model["ffn"],
            "num_hidden_layers": model["layers"],
            "num_attention_heads": model["heads"],
            "num_key_value_heads": model["kv_heads"],
            "vocab_size": model["vocab"],
        }
    )
    norms = (2 * model["layers"] + 1) * model["d"]
    assert sizes.body + sizes.head + norms == 134_515_008


def test_floor_where_products_decide(common):
    """Prefix of 10 tokens, two rows of 3 tokens from it and one of 3 from its first 6."""
    sizes = common.Sizes.of(TINY)
    trunk = (10, [(10, 3), (10, 3), (6, 3)])
    reading = 10 * (2 * 288 + 2 * 2 * 4 * 10)
    contexts = 11.5 + 11.5 + 7.5
    steps = 2 * (3 * 2 * 328 + 4 * 2 * 4 * contexts)
    found = common.sampling_floor(sizes, [trunk], 3, flops=10.0, bandwidth=1e12)
    assert found == pytest.approx((reading + steps) / 10)


def test_floor_where_memory_decides(common):
    """Weights and the trunk once a step for all rows, what a row has sampled for it alone."""
    sizes = common.Sizes.of(TINY)
    trunk = (10, [(10, 3), (10, 3), (6, 3)])
    kv_bytes = 2 * 2 * 2 * 2  # keys and values, bytes, layers, width
    step = 2 * 328 + 10 * kv_bytes + 3 * 1.5 * kv_bytes
    found = common.sampling_floor(sizes, [trunk], 3, flops=1e12, bandwidth=10.0)
    assert found == pytest.approx(2 * step / 10, rel=1e-6)


def test_floor_of_fewer_rows_than_work(common):
    """One row at a time reads weights and trunk for every token."""
    sizes = common.Sizes.of(TINY)
    trunk = (10, [(10, 3), (10, 3)])
    at_once, in_turn = (
        common.sampling_floor(sizes, [trunk], rows, flops=1e12, bandwidth=10.0) for rows in (2, 1)
    )
    own = 2 * 2 * 1.5 * 16
    assert in_turn == pytest.approx((2 * (at_once * 10 - own) + own) / 10, rel=1e-6)


def test_floor_of_a_workload(common, rollout):
    """b8 at 1 TFLOP/s and 10 GB/s is bound by memory: 127 steps over weights, prompts and half of
    the new tokens, after reading 8 prompts."""
    sizes = common.Sizes(30, 576, 192, 106_168_320, 28_311_552)
    found = rollout.floor_seconds("b8", sizes, {"flops": 1e12, "bandwidth": 1e10})
    reading = 2048 * (2 * 106_168_320 + 2 * 30 * 576 * 256) / 1e12
    step = (2 * 134_479_872 + 8 * (256 + 64) * 2 * 30 * 192 * 2) / 1e10
    assert found == pytest.approx(reading + 127 * step)


def test_requests_hold_what_their_names_say(common):
    assert [common.num_tokens(name) for name in ("b1", "b8", "group", "mc")] == [
        128,
        8 * 128,
        32 * 128,
        96 * 96,
    ]
    [(ids, cuts, samples)], new = common.requests("mc")
    assert (len(ids), cuts[0], cuts[-1], samples, new) == (640, 320, 640, 16, 96)


def test_summaries_are_medians_beside_ours(common):
    def run(seconds: float, **more: int) -> dict[str, float]:
        return {"seconds": seconds, "peak_mib": seconds, **more}

    runs = {
        "ours": [run(2.0, compilations=1), run(1.0), run(9.0)],
        "theirs": [run(8.0), run(7.0), run(30.0)],
        "longer": [run(4.0, tokens=200)] * 3,
    }
    ours, theirs, longer = common.summaries("w", runs, 100, floor=0.5)
    assert ours["seconds"] == 2 and theirs["seconds"] == 8
    assert (ours["tokens_per_second"], longer["tokens_per_second"]) == (50, 50)
    assert (ours["share_of_floor"], theirs["share_of_floor"]) == (0.25, 0.0625)
    assert (ours["ratio"], theirs["ratio"], longer["ratio"]) == (1, 4, 1)
    assert theirs["peak_mib"] == 30
    assert (ours["compilations_after_warm_up"], theirs["compilations_after_warm_up"]) == (1, 0)


def test_table(common, capsys):
    common.print_header(*common.SUMMARY_COLUMNS)
    runs = {"theirs": [{"seconds": 2.0, "peak_mib": 10.0}]}
    [row] = common.summaries("b1", runs, 100, floor=1.0)
    common.print_summary(row)
    header, rule, line = capsys.readouterr().out.splitlines()
    assert line == "| b1 | theirs | 2.00 | 50 | 50% | 10 |  |"
    assert header.count("|") == rule.count("|") == line.count("|")


def test_sides_answer_through_noise(common):
    """Warm-up, measurement and an answer, though the rival prints what looks like one."""
    side = child(
        common,
        "import common\n"
        "print('loading weights ...')\n"
        "print('{not json')\n"
        "calls = []\n"
        "def run(name):\n"
        "    calls.append(name)\n"
        "    print('{\"step\": 1}', flush=True)\n"
        "    return {'calls': len(calls), 'name': name}\n"
        "common.serve(run)",
    )
    found = [side.run(name) for name in ("b1", "b1", "b8")]
    side.close()
    assert [(one["name"], one["calls"]) for one in found] == [("b1", 2), ("b1", 3), ("b8", 5)]
    assert all(one["seconds"] >= 0 and one["peak_mib"] > 1 for one in found)


def test_peak_memory_is_that_of_the_workload(common):
    """64 MiB that were in use before the measured run do not count in it."""
    side = child(
        common,
        "import common\n"
        "def run(name):\n"
        "    if name == 'large':\n"
        "        bytearray(b'1' * (64 << 20))\n"
        "    return {}\n"
        "common.serve(run)",
    )
    large, small = (side.run(name)["peak_mib"] for name in ("large", "small"))
    side.close()
    assert large > small + 60


def test_a_side_that_dies_says_why_and_the_rest_goes_on(common, capsys):
    text = "import common; common.serve(lambda name: {}, warm_up=False)"
    dying = "import common; common.serve(lambda name: [][0])"
    sides = {"ours": child(common, text), "theirs": child(common, dying)}
    runs = common.take_turns(sides, "b1", 3)
    sides["ours"].close()
    assert list(runs) == list(sides) == ["ours"]
    assert len(runs["ours"]) == 3
    message = capsys.readouterr().err
    assert "b1: theirs ended with status 1" in message
    assert "IndexError" in message


def test_a_side_that_does_not_start_says_why(common):
    side = child(common, "import nothing_of_this_name")
    with pytest.raises(common.SideEnded, match=r"(?s)status 1.*nothing_of_this_name"):
        side.run("b1")


@pytest.mark.parametrize("given", ["vllm", "vllm=/no/such/python", "other=/bin/sh"])
def test_rivals_are_named_with_their_interpreter(common, rollout, given):
    rival = common.rival_of(rollout.RIVALS)
    with pytest.raises(Exception, match=r"expected one of vllm, llama\.cpp, tunix"):
        rival(given)
    assert rival("vllm=/bin/sh") == ("vllm", "/bin/sh")


def test_every_rival_has_its_script(rollout, train_step):
    scripts = {file.name for file in (FOLDER / "rivals").glob("*.py")}
    assert scripts == {*rollout.RIVALS.values(), *train_step.RIVALS.values()}


def test_floor_of_an_update_and_of_a_step(common, train_step):
    """At 1 TFLOP/s and 10 GB/s: 4 groups of 256 tokens and 8 x 128, three times forward, and 28
    bytes a parameter; a step samples `group` before."""
    sizes = common.Sizes(30, 576, 192, 106_168_320, 28_311_552)
    limits = {"flops": 1e12, "bandwidth": 1e10}
    pairs = 256**2 / 2 + 8 * (256 * 128 + 128**2 / 2)
    group = 2 * (1280 * 106_168_320 + 1024 * 28_311_552) + 4 * 30 * 576 * pairs
    update = 12 * group / 1e12 + 28 * 134_479_872 / 1e10
    assert train_step.floor_seconds("update", sizes, limits) == pytest.approx(update)
    sampling = common.sampling_floor(sizes, [(256, [(256, 128)] * 8)] * 4, 32, **limits)
    step = train_step.floor_seconds("step", sizes, limits)
    assert step == pytest.approx(update + sampling)


def test_random_completions_are_the_same_everywhere(common, train_step):
    groups = common.random_completions()
    assert groups == common.random_completions()
    assert [len(group) for group in groups] == [8] * 4
    assert {len(ids) for group in groups for ids in group} == {128}
    assert train_step.TOKENS == 4 * 8 * 128


def test_the_judge_of_train_step_is_a_valid_one(train_step):
    from stepwiser_jax.config import TrainJudge
    from stepwiser_jax.config_files import validate

    config = validate(TrainJudge, train_step.settings("model"), "the benchmark")
    assert (config.group_size, config.training.micro_batches) == (8, 4)


def test_exponent(common):
    import scaling

    assert scaling.exponent([1, 2, 4, 8], [3.0, 6.0, 12.0, 24.0]) == pytest.approx(1)
    assert scaling.exponent([1, 2, 4, 8], [3.0] * 4) == pytest.approx(0)


def call(name, *arguments):
    return subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *arguments], capture_output=True, text=True
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name):
    found = call(name, "--help")
    assert found.returncode == 0, found.stderr
    assert f"usage: {name}.py" in found.stdout


@pytest.mark.parametrize("name", ["refill", "annotate", "adaptive"])
def test_a_quickstart_that_is_not_there(name):
    found = call(name, "--quickstart", "nowhere")
    assert found.returncode == 2
    assert "expected a finished quickstart at nowhere, found none" in found.stderr
    assert "Traceback" not in found.stderr


def test_workload_is_json():
    assert json.loads((FOLDER / "workload.json").read_text())["prompt_len"] == 256

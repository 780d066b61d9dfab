"""Real processes, really killed: the same command again leaves what an undisturbed run leaves."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tiny import logged

from .conftest import command

SETTINGS = {
    "rollouts": ("problems.limit=24", "problems_per_block=2"),
    "values": ("trajectories_per_block=2",),
}
KILLS = 6


def start(arguments):
    words = [sys.executable, "-m", "stepwiser_jax", *arguments]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL)


def progress_of(run):
    """What grows while the stage works: bytes of its records, or of its metrics."""
    files = [*run.glob("records/*s/*.jsonl"), run / "metrics.jsonl"]
    return sum(f.stat().st_size for f in files if f.is_file() and "problems" not in str(f.parent))


def kill_after_progress(arguments, run):
    process = start(arguments)
    before = progress_of(run)
    while progress_of(run) == before:
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "manifest.json").exists(), "it was done before it could be killed"


def everything(run):
    """Records as bytes; model, optimizer state and counters of the last checkpoint as arrays."""
    records = {file.name: file.read_bytes() for file in sorted(run.glob("records/*/*.jsonl"))}
    if not (run / "checkpoints").exists():
        return records, []
    names = ("model", "rest")
    handlers = {name: ocp.StandardCheckpointHandler() for name in names}
    handlers["host"] = ocp.JsonCheckpointHandler()
    manager = ocp.CheckpointManager((run / "checkpoints").absolute(), item_handlers=handlers)
    step, here = manager.latest_step(), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = manager.item_metadata(step)

    def on_one_device(leaf):  # whatever mesh it was saved from
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

    wanted = {
        name: ocp.args.StandardRestore(jax.tree.map(on_one_device, found[name].tree))
        for name in names
    }
    saved = manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore(), **wanted))
    assert saved["host"]["loader"]
    return records, jax.tree.leaves((step, saved["host"], saved["model"], saved["rest"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_kill_minus_nine_twice_and_run_again(runs, tmp_path, name):
    os.environ["XLA_FLAGS"] = ""  # one device, as users have it
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(command(name, runs, out=whole, extra=SETTINGS[name])).wait() == 0
    again = command(name, runs, out=killed, extra=SETTINGS[name])
    kill_after_progress(again, killed)
    kill_after_progress(again, killed)
    assert start(again).wait() == 0
    records, arrays = everything(whole)
    found_records, found_arrays = everything(killed)
    assert found_records == records
    assert bool(records) != bool(arrays), "nothing was compared"
    for a, b in zip(arrays, found_arrays, strict=True):
        np.testing.assert_array_equal(a, b)


def kill_after(seconds, arguments, run, *, sign):
    """So long after the first new file of this name. Returns what lay there then."""
    process = start(arguments)
    seen = {file.name for file in run.rglob("*")}

    while all(file.name in seen for file in run.glob(sign)):
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.001)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "manifest.json").exists(), "it was done before it could be killed"
    return {path.parent.name + "/" + path.name for path in run.glob("*/*")}


@pytest.mark.slow
def test_a_judge_killed_at_random_moments_leaves_the_same_bits(runs, tmp_path):
    """Draws, checkpoints complete and not, and metrics lie there in all mixtures."""
    os.environ["XLA_FLAGS"] = ""
    moments, found = random.Random(0), []
    extra = (
        f"iterations={4 * KILLS}",
        f"compilation_cache={tmp_path / 'cache'}",
        "training.checkpoint_every=2",
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(command("judge", runs, out=whole, extra=extra)).wait() == 0
    per_iteration = json.loads((whole / "summary.json").read_text())["seconds_per_iteration"]
    again = command("judge", runs, out=killed, extra=extra)
    for kill in range(KILLS):
        if kill % 3 == 2:  # while a checkpoint is written, which takes hundredths of a second
            sign, seconds = "checkpoints/*.orbax-checkpoint-tmp", moments.uniform(0, 0.02)
        else:
            sign, seconds = "pending/*.jsonl", moments.uniform(0, 2 * per_iteration)
        found.append(kill_after(seconds, again, killed, sign=sign))
        print(kill, sorted(name for name in found[-1] if name[0] in "cp"))
    assert any("orbax-checkpoint-tmp" in name for names in found for name in names)
    assert any(name.startswith("pending/") for names in found for name in names)
    assert start(again).wait() == 0
    (_, arrays), (_, found_arrays) = everything(whole), everything(killed)
    for a, b in zip(arrays, found_arrays, strict=True):
        np.testing.assert_array_equal(a, b)
    assert logged(killed) == logged(whole)
    assert not list(killed.glob("pending/*"))


@pytest.mark.slow
def test_ctrl_c_saves_and_exits_with_130(runs, tmp_path):
    run = tmp_path / "run"
    arguments = command("judge", runs, out=run, extra=("iterations=40",))
    process = start(arguments)
    while progress_of(run) == 0:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    logged = len((run / "metrics.jsonl").read_text().splitlines())
    steps = ocp.CheckpointManager((run / "checkpoints").absolute()).all_steps()
    assert max(steps) == logged, "what was done must be saved"

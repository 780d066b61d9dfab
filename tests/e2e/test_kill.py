"""Real processes, really killed: the same command again leaves what an undisturbed run leaves."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from .conftest import command

SETTINGS = {
    "rollouts": ("problems.limit=24", "problems_per_block=2"),
    "values": ("trajectories_per_block=2",),
    "judge": ("iterations=6", "training.checkpoint_every=2"),
}


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
    manager = ocp.CheckpointManager((run / "checkpoints").absolute(), item_handlers=handlers)
    step, here = manager.latest_step(), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = manager.item_metadata(step)

    def on_one_device(leaf):  # whatever mesh it was saved from
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

    wanted = {
        name: ocp.args.StandardRestore(jax.tree.map(on_one_device, found[name].tree))
        for name in names
    }
    saved = manager.restore(step, args=ocp.args.Composite(**wanted))
    return records, jax.tree.leaves((saved["model"], saved["rest"]))


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

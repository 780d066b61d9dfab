"""Real processes, really killed: the same command again leaves what an undisturbed run leaves."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from .conftest import CONFIGS, command

KILLS = int(os.environ.get("KILLS", 1))
"""Of each stage, at random moments; the environment may ask for more."""

RUNS = {
    "policy": ("steps=20", "training.checkpoint_every=2"),
    "rollouts": ("problems.limit=24", "block_size=2"),
    "values": ("block_size=2",),
    "classifier": ("steps=20", "epochs=null", "training.checkpoint_every=2"),
    "evaluate": ("block_size=2",),
    "search": ("problems.limit=12", "block_size=2", "beam=null", "dvts=null"),
}
"""Long enough to be killed in the middle. A judge has a test of its own."""


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    """The processes have one, as users have it."""
    monkeypatch.setenv("XLA_FLAGS", "")


def start(arguments):
    words = [sys.executable, "-m", "stepwiser_jax", *arguments]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL)


def progress_of(run):
    """What grows while the stage works: bytes of its records, or of its metrics."""
    files = [*run.glob("records/*s/*.jsonl"), run / "metrics.jsonl"]
    return sum(f.stat().st_size for f in files if f.is_file() and "problems" not in str(f.parent))


def files_of(run):
    """What a run hands on, as bytes."""
    found = (*run.glob("records/*/*"), *run.glob("model/*"))
    return {str(file.relative_to(run)): file.read_bytes() for file in found}


def logged(run):
    """The lines of metrics.jsonl, without what they say of their writing."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) | {"time": 0, "seconds": 0} for line in lines]


def checkpoint_of(run):
    """Model, optimizer state and counters of the last checkpoint, as arrays."""
    if not (run / "checkpoints").exists():
        return []
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
    return jax.tree.leaves((step, saved["host"], saved["model"], saved["rest"]))


def assert_same(found, expected):
    files = files_of(expected)
    assert files and files_of(found) == files
    assert logged(found) == logged(expected)
    for a, b in zip(checkpoint_of(found), checkpoint_of(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def seconds_until_progress(process, run):
    """None if the process ended before its files grew."""
    began, before = time.monotonic(), progress_of(run)
    while progress_of(run) == before:
        if process.poll() is not None:
            return None
        time.sleep(0.005)
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_killed_at_random_moments_a_run_leaves_the_same_bytes(runs, tmp_path, name):
    """A quarter of the moments lie before the first new result, the others after it. A run that
    comes to its end before it can be killed is compared, and another one is begun."""
    moments, kills = random.Random(name), 0
    settings = RUNS[name]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(command(name, runs, out=whole, extra=settings))
    starting = seconds_until_progress(process, whole)
    began = time.monotonic()
    assert process.wait() == 0
    working = time.monotonic() - began
    again = command(name, runs, out=killed, extra=settings)
    while kills < KILLS:
        process, wait = start(again), moments.uniform(0, starting)
        if moments.random() > 0.25:
            seconds_until_progress(process, killed)
            wait = moments.uniform(0, working)
        try:
            assert process.wait(wait) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            print(name, kills, f"{wait:.2f}", *sorted(f.name for f in killed.glob("*")))
        else:
            assert_same(killed, whole)
            shutil.rmtree(killed)
    assert start(again).wait() == 0
    assert_same(killed, whole)


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
    moments, found, kills = random.Random(0), [], 5
    extra = (f"iterations={3 * kills}", "training.checkpoint_every=2")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(command("judge", runs, out=whole, extra=extra)).wait() == 0
    per_iteration = json.loads((whole / "summary.json").read_text())["seconds_per_iteration"]
    again = command("judge", runs, out=killed, extra=extra)
    for kill in range(kills):
        if kill % 2 == 1:  # while a checkpoint is written, which takes hundredths of a second
            sign, seconds = "checkpoints/*.orbax-checkpoint-tmp", moments.uniform(0, 0.02)
        else:
            sign, seconds = "rollout_cache/*.npz", moments.uniform(0, 2 * per_iteration)
        found.append(kill_after(seconds, again, killed, sign=sign))
        print(kill, sorted(name for name in found[-1] if name[0] in "cr"))
    assert any("orbax-checkpoint-tmp" in name for names in found for name in names)
    assert any(name.startswith("rollout_cache/") for names in found for name in names)
    assert start(again).wait() == 0
    assert_same(killed, whole)
    assert not list(killed.glob("rollout_cache/*"))


@pytest.mark.slow
def test_a_training_goes_on_when_its_full_disk_has_room_again(tmp_path):
    """The first checkpoint does not fit, then the second; each time one message says so,
    among what TensorStore's threads print."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def sft(run):
        words = ["-m", "stepwiser_jax", "sft", "--config", str(CONFIGS / "smoke_policy.yaml")]
        sets = ["--set", "steps=20", "--set", "training.checkpoint_every=12"]
        words = [sys.executable, *words, "--run-dir", str(run), *sets]
        return subprocess.run(words, capture_output=True, text=True)

    def mount(options):
        words = ["mount", "-t", "tmpfs", "-o", options, "none", str(disk)]
        return subprocess.run(words, capture_output=True).returncode

    assert sft(tmp_path / "whole").returncode == 0
    if mount("size=1200k"):
        pytest.skip("may not mount a file system")
    try:
        for size in ("10m", "50m"):
            full = sft(disk / "run")
            assert full.returncode == 2
            message = f"error: {disk / 'run'}: No space left on device. Make room there, then give"
            assert any(line.startswith(message) for line in full.stderr.splitlines())
            assert mount(f"remount,size={size}") == 0
        assert sft(disk / "run").returncode == 0
        assert_same(disk / "run", tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)])


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
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    steps = ocp.CheckpointManager((run / "checkpoints").absolute()).all_steps()
    assert max(steps) == logged, "what was done must be saved"

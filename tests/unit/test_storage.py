"""A disk that is full, and one that cannot be written: one message, and nothing lost."""

import errno
import os
import subprocess

import numpy as np
import pytest
from safetensors import SafetensorError
from tensorboardX.record_writer import RecordWriter as EventFile

from stepwiser_jax.__main__ import main
from stepwiser_jax.config_files import load_config
from stepwiser_jax.errors import UserError
from stepwiser_jax.record_io import read_manifest
from stepwiser_jax.records import Problem
from stepwiser_jax.rl.rollout_cache import RolloutCache, SampledRow
from stepwiser_jax.runs.directory import RunDirectory, blocks
from stepwiser_jax.runs.storage import writing_to
from tiny import logged

PROBLEMS = [Problem(f"p#{i}", "What is it? " * 20, str(i), "test") for i in range(100)]
ROWS = {"g/0": SampledRow(np.array([2], np.int32), np.array([-1.0], np.float32))}
TENSORSTORE = "Failed to write 9 bytes to file 27: No space left on device [os_error_code='28']"


@pytest.fixture
def fill(request):
    """`fill(run_dir)`: what a stage does, for each kind of file that we write ourselves."""
    config = load_config("train-judge", request.config.rootpath / "configs" / "smoke_judge.yaml")

    def stage(run_dir):
        directory = RunDirectory(run_dir, "train-judge", config)
        if directory.finished:
            return directory.summary()
        metrics = directory.metrics()
        done = metrics.resume_at(0)
        RolloutCache(directory.path / "rollout_cache").write(3, 0, "aa", ROWS)
        work = blocks(PROBLEMS, 50)
        work = directory.pending(work, Problem, lambda block: [p.problem_id for p in block])
        directory.write_blocks(work, Problem, lambda block: block)
        metrics.write(1, {"loss": 0.5} | done)
        return directory.finish(dict)

    return stage


def same(run, whole):
    """Whether records and metrics are; the manifest also holds checksums of metrics and summary,
    which say how long the run took."""
    files = (*whole.glob("*/**/*.jsonl"), *whole.glob("rollout_cache/*"))
    names = [str(file.relative_to(whole)) for file in files]
    promised = [read_manifest(directory)["records"] for directory in (run, whole)]
    assert len(names) == 2, "records, and rollouts"
    return (
        promised[0] == promised[1]
        and logged(run) == logged(whole)
        and all((run / name).read_bytes() == (whole / name).read_bytes() for name in names)
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "full", "runs/a/x.tmp"), r"runs/a .runs/a/x.tmp.: No space left"),
        (OSError(errno.EDQUOT, "quota"), "runs/a: Disk quota exceeded. Make room there, then give"),
        (OSError(errno.EROFS, "mounted"), "runs/a: Read-only file system. Allow this user"),
        (PermissionError(errno.EACCES, "no", "runs/a/y"), "runs/a/y.: Permission denied. Allow"),
        (ValueError(TENSORSTORE), "runs/a: No space left on device. Make room"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left"),
    ],
)
def test_what_a_file_system_refuses_is_one_message(error, message):
    with pytest.raises(UserError, match=message), writing_to("runs/a"):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyError("x"), UserError("mine")])
def test_what_else_goes_wrong_stays_what_it_is(error):
    with pytest.raises(type(error)) as raised, writing_to("runs/a"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    "part", ["config", "metrics", "rollout_cache", "part-", "summary", "manifest"]
)
def test_a_write_that_fails_is_told_and_made_up_for(fill, tmp_path, monkeypatch, part):
    """Each kind of file in turn, by the call that puts it on the disk."""
    fill(tmp_path / "whole")
    fsync = os.fsync

    def full(descriptor):
        if part in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=f"{run}.*the same command again"), writing_to(run):
            fill(run)
    assert not (run / "manifest.json").exists() and not list(run.rglob("*.tmp"))
    fill(run)
    assert same(run, tmp_path / "whole")


def test_events_that_cannot_be_written_stop_the_run(fill, tmp_path, monkeypatch):
    """And do not leave it waiting for a thread that died of them."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(EventFile, "write", full)
    with pytest.raises(UserError, match="No space left"), writing_to(tmp_path):
        fill(tmp_path / "run")


@pytest.fixture
def disk(tmp_path):
    """`disk(options)` mounts, or mounts anew, a small file system of its own; returns its root."""
    root = tmp_path / "disk"
    root.mkdir()

    def mount(options):
        words = ["mount", "-t", "tmpfs", "-o", options, "none", str(root)]
        if subprocess.run(words, capture_output=True).returncode:
            pytest.skip("may not mount a file system")
        return root

    yield mount
    subprocess.run(["umount", str(root)], capture_output=True)


def test_a_disk_that_is_really_full(fill, disk, tmp_path):
    """The records that fit stay, whole; with more room the run ends as if nothing had been."""
    fill(tmp_path / "whole")
    run = disk("size=40k") / "run"
    with pytest.raises(UserError, match=r"No space left on device\. Make"), writing_to(run):
        fill(run)
    assert not (run / "manifest.json").exists()
    disk("remount,size=1m")
    fill(run)
    assert same(run, tmp_path / "whole")


def test_a_directory_that_cannot_be_written_is_refused_before_the_work(fill, disk, request, capsys):
    root = disk("size=1m")
    fill(root / "finished")
    disk("remount,ro")
    message = f"{root} cannot be written by this user, or is mounted read-only"
    with pytest.raises(UserError, match=message):
        fill(root / "a" / "run")
    config = str(request.config.rootpath / "configs" / "smoke_policy.yaml")
    run = str(root / "a" / "run")
    assert main(["sft", "--config", config, "--run-dir", run, "--dry-run"]) == 2
    assert message in capsys.readouterr().err
    assert fill(root / "finished"), "what is finished can be read"

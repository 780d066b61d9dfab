"""Several processes and several shards: what one process alone leaves, and how they end."""

import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from devices import xla_flags
from stepwiser_jax.__main__ import main
from stepwiser_jax.distributed.hosts import SILENCE_SECONDS
from stepwiser_jax.record_io import read_records
from stepwiser_jax.record_lines import write_records
from stepwiser_jax.records import (
    JudgeExample,
    Judgment,
    PrefixValue,
    SearchResult,
    Selection,
    Trajectory,
)
from tiny import logged

from .conftest import CONFIGS, command
from .test_kill import assert_same, checkpoint_of

BLOCKS = {
    "rollouts": ("block_size=2",),
    "values": ("block_size=6",),
    "evaluate": ("block_size=3",),
    "evaluate_classifier": ("block_size=3",),
    "search": ("block_size=2", "beam=null", "dvts=null"),
    "select": ("block_size=2",),
}


@pytest.fixture(scope="module")
def undisturbed(runs, tmp_path_factory):
    """The run of a stage by one process that does all. Blocks change nothing of what is sampled, so
    that of `runs` is one, but the search's, which leaves methods out. A classifier's are packed."""

    @functools.cache
    def of(name):
        if name not in ("search", "evaluate_classifier"):
            return runs / name
        whole = tmp_path_factory.mktemp("whole") / name
        assert main(command(name, runs, out=whole, extra=BLOCKS[name])) == 0
        return whole

    return of


def start(arguments, *, processes, devices=1, program=("-m", "stepwiser_jax")):
    """The command in several processes on loopback, each with its own fake devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [sys.executable, *program, *arguments]
    words += ["--coordinator", f"localhost:{port}", "--num-processes", str(processes)]
    return [
        subprocess.Popen(
            [*words, "--process-id", str(i)],
            env=os.environ | {"XLA_FLAGS": xla_flags(devices)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def finish(processes):
    for process in processes:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors[-3000:]


def rows(run):
    """Records by kind and line; a trajectory's row of tokens in place of the row's address."""
    manifest = json.loads((run / "manifest.json").read_text())
    tokens = {}
    if "trajectories" in manifest["records"]:
        for trajectory in read_records(run, Trajectory):
            read = trajectory.tokens.read()
            arrays = (read.prompt_ids, read.completion_ids, read.logprobs)
            tokens[trajectory.trajectory_id] = [array.tolist() for array in arrays]
    found = {}
    for kind, entry in manifest["records"].items():
        for part in entry["parts"]:
            lines = (run / part["path"]).read_text().splitlines()
            assert len(lines) == part["count"]
            for line in lines:
                if kind == "trajectories":
                    fields = json.loads(line)
                    line = json.dumps(fields | {"tokens": tokens[fields["trajectory_id"]]})
                assert (kind, line) not in found
                found[kind, line] = None
    return sorted(found)


def assert_same_rows(ours, theirs):
    """What prompts share is read once, and a part of a run has other prompts together than the
    whole: so a judge's probabilities are equal to rounding only."""
    of_judge = re.compile(r'"(?:p_positive|scores|chunk_scores)":(\[[^\]]*\]|[^,}]+)')
    (ours, p_ours), (theirs, p_theirs) = (
        (
            [(kind, of_judge.sub("", line)) for kind, line in rows(run)],
            [np.ravel(json.loads(p)) for _, line in rows(run) for p in of_judge.findall(line)],
        )
        for run in (ours, theirs)
    )
    assert ours == theirs
    for p, q in zip(p_ours, p_theirs, strict=True):
        np.testing.assert_allclose(p, q, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        *("rollouts", "evaluate", "evaluate_classifier"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("values", "search", "select")),
    ],
)
def test_shards_that_never_meet_are_one_run(runs, undisturbed, tmp_path, name):
    """Of which the second is run again after it was lost halfway, and the last merges."""
    whole, sharded = undisturbed(name), tmp_path / "sharded"
    again = command(name, runs, out=sharded, extra=BLOCKS[name])
    for shard in ("0/3", "2/3", "1/3"):
        assert main([*again, "--shard", shard]) == 0
        assert not (sharded / "manifest.json").exists()
    lost = next((sharded / "records").glob("*/part-00001-of-00003.jsonl"))
    content = lost.read_bytes()
    lost.write_bytes(content[: len(content) // 2])
    lost.with_name(f"{lost.name}.crc32").unlink()  # else it is told that half of it is missing
    assert main([*again, "--shard", "1/3"]) == 0
    assert main(again) == 0
    assert_same_rows(sharded, whole)
    assert len(list((sharded / "records").glob("*/part-*-of-00003.jsonl"))) >= 3


def test_several_parts_are_read_in_the_order_of_one(runs, tmp_path):
    arguments = command("rollouts", runs, out=tmp_path / "r", extra=BLOCKS["rollouts"])
    for extra in (["--shard", "1/2"], ["--shard", "0/2"], []):
        assert main([*arguments, *extra]) == 0
    assert read_records(tmp_path / "r", Trajectory) == read_records(runs / "rollouts", Trajectory)


@pytest.mark.parametrize("shard", ["2/2", "-1/2", "a/b", "1"])
def test_a_wrong_shard_is_refused(runs, tmp_path, shard, capsys):
    assert main([*command("rollouts", runs, out=tmp_path / "r"), "--shard", shard]) == 2
    assert "--shard I/N" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_training_is_not_cut_into_shards_and_addresses_come_whole(runs, tmp_path, capsys):
    judge = command("judge", runs, out=tmp_path / "j")
    assert main([*judge, "--shard", "0/2"]) == 2
    assert "cannot be cut into shards" in capsys.readouterr().err
    assert main([*judge, "--coordinator", "localhost:1"]) == 2
    assert "--num-processes" in capsys.readouterr().err
    assert not (tmp_path / "j").exists()


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_waits_in_vain_says_so(process):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    script = (
        "from stepwiser_jax.distributed import hosts; hosts.CONNECT_SECONDS = 2; "
        f"hosts.connect('{address}', 2, {process})"
    )
    words = [sys.executable, "-c", script]
    found = subprocess.run(words, capture_output=True, text=True, timeout=120)
    waits, gives_up = found.stderr.splitlines()
    assert waits == f"process {process} of 2 waits for the others at {address}, 0 minutes at most"
    assert gives_up.startswith("error: the other processes did not come within 2 s")
    assert found.returncode == 2


SAMPLED = {
    "rollouts": Trajectory,
    "values": PrefixValue,
    "evaluate": Judgment,
    "evaluate_classifier": Judgment,
    "search": SearchResult,
    "select": Selection,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLED)
def test_processes_share_the_rows_of_one(runs, undisturbed, tmp_path, name):
    """By two, and of one stage by three."""
    whole, shared = undisturbed(name), tmp_path / "shared"
    processes = 3 if name == "rollouts" else 2
    finish(start(command(name, runs, out=shared, extra=BLOCKS[name]), processes=processes))
    assert_same_rows(shared, whole)
    ours, theirs = (read_records(run, SAMPLED[name]) for run in (shared, whole))
    assert [record.record_id for record in ours] == [record.record_id for record in theirs]
    parts = json.loads((shared / "manifest.json").read_text())["records"].values()
    assert max(len(kind["parts"]) for kind in parts) == processes, "one did all the work"


def arrays_of(run):
    """What is trained and its moments, without checksums and the data's position."""
    return [leaf for leaf in checkpoint_of(run) if isinstance(leaf, jax.Array)]


def metrics(run):
    return [json.loads(line) for line in logged(run)]


@pytest.mark.slow
def test_two_processes_of_two_devices_train_as_one_does(runs, tmp_path):
    whole, shared = runs / "judge", tmp_path / "shared"
    sizes = ("mesh.fsdp=2", "mesh.tensor=2")
    finish(start(command("judge", runs, out=shared, extra=sizes), processes=2, devices=2))
    for a, b in zip(metrics(whole), metrics(shared), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for a, b in zip(arrays_of(whole), arrays_of(shared), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert (shared / "model" / "model.safetensors").stat().st_size == (
        whole / "model" / "model.safetensors"
    ).stat().st_size


def stop_after_a_checkpoint(processes, run):
    """All of them, by a notice to the last."""
    before = {path.name for path in run.glob("checkpoints/*")}
    while all(path.name in before for path in run.glob("checkpoints/[0-9]")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    processes[-1].send_signal(signal.SIGTERM)
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 130, errors[-3000:]
    assert not (run / "manifest.json").exists(), "it was done before it could be stopped"


COUNTING = """
import sys
from jax.experimental import multihost_utils
from stepwiser_jax.__main__ import main
from stepwiser_jax.training.loop import TrainingRun

gather, fit, gathers = multihost_utils.process_allgather, TrainingRun.fit, []

def counting_gather(*args, **kwargs):
    gathers.append(1)
    return gather(*args, **kwargs)

def counting_fit(*args):
    before = len(gathers)
    seconds = fit(*args)
    print("gathers in the loop:", len(gathers) - before, file=sys.stderr)
    return seconds

multihost_utils.process_allgather, TrainingRun.fit = counting_gather, counting_fit
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_loop_of_two_processes_gathers_nothing_on_their_hosts(tmp_path):
    arguments = ["sft", "--config", str(CONFIGS / "smoke_policy.yaml")]
    arguments += ["--run-dir", str(tmp_path / "run"), "--set", "steps=12", "--set", "mesh.data=2"]
    for process in start(arguments, processes=2, program=("-c", COUNTING)):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        assert "gathers in the loop: 0\n" in errors


ASKED = """
import sys
from stepwiser_jax.__main__ import main
from stepwiser_jax.distributed import hosts
from stepwiser_jax.runs.signals import stop

hosts.EXCHANGE_SECONDS = 0.05
stop.requested = sys.argv[-1] == "1"  # of the second process
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_processes_stop_in_the_same_segment_of_a_draw(tmp_path):
    """The second is asked to, in the first draw. Started again, they sample the other rows."""
    prompts = [f"start {n} ; * 7 + 5 ?" for n in range(8)]
    examples = [JudgeExample(p, p, p, "", "<chunk> fix </chunk>", True) for p in prompts]
    write_records(tmp_path / "examples.jsonl", examples)
    settings = ("model.path=arithmetic", f"examples.source={tmp_path / 'examples.jsonl'}")
    settings += ("engine.rows=[8]", "mesh.data=2", "grpo.max_resamples=0", "iterations=1")
    settings += ("grpo.drop_zero_variance=false", "validation=null")
    run = tmp_path / "run"
    arguments = [
        "train-judge",
        "--config",
        str(CONFIGS / "smoke_judge.yaml"),
        "--run-dir",
        str(run),
    ]
    arguments += [word for setting in settings for word in ("--set", setting)]
    for process in start(arguments, processes=2, program=("-c", ASKED)):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 130, errors[-3000:]
    (left,) = (run / "rollout_cache").iterdir()
    with np.load(left) as rows:
        assert 0 < len(rows["row_ids"]) < 8 * 4
    finish(start(arguments, processes=2))
    assert [line["groups_sampled"] for line in metrics(run)] == [8]
    assert not list((run / "rollout_cache").iterdir())


@pytest.mark.slow
def test_training_goes_on_with_another_number_of_processes(runs, tmp_path):
    """One of four devices, then two of two, then one again."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    extra = ("mesh.fsdp=2", "mesh.tensor=2", "training.checkpoint_every=1", "iterations=9")
    extra += ("validation=null",)
    assert main(command("judge", runs, out=whole, extra=extra)) == 0
    again = command("judge", runs, out=moved, extra=extra)
    stop_after_a_checkpoint(start(again, processes=1, devices=4), moved)
    stop_after_a_checkpoint(start(again, processes=2, devices=2), moved)
    finish(start(again, processes=1, devices=4))
    for a, b in zip(metrics(whole), metrics(moved), strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-5, err_msg=name)
    for a, b in zip(arrays_of(whole), arrays_of(moved), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


OF_TWO = {
    "values": BLOCKS["values"],
    "judge": ("mesh.fsdp=2", "training.checkpoint_every=1", "validation=null"),
}


@pytest.fixture(scope="module")
def undisturbed_of_two(runs, tmp_path_factory):
    """The run of a stage by two processes."""

    @functools.cache
    def of(name):
        whole = tmp_path_factory.mktemp("of_two") / name
        finish(start(command(name, runs, out=whole, extra=OF_TWO[name]), processes=2))
        return whole

    return of


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("name", OF_TWO)
def test_one_process_killed_ends_all_and_all_started_again_finish(
    runs, undisturbed_of_two, tmp_path, name, victim
):
    """Within the silence that is allowed; what is left then is what an undisturbed run leaves."""
    whole, killed = undisturbed_of_two(name), tmp_path / "killed"
    again = command(name, runs, out=killed, extra=OF_TWO[name])
    processes = start(again, processes=2)
    while not _has_begun(killed):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    _, errors = processes[1 - victim].communicate(timeout=90)
    assert time.monotonic() - began < 2 * SILENCE_SECONDS
    assert processes[1 - victim].returncode not in (0, None)
    assert "start all of them again" in errors or "another task died" in errors, errors[-2000:]
    processes[victim].communicate()
    assert not (killed / "manifest.json").exists()
    finish(start(again, processes=2))
    assert_same(killed, whole)
    shutil.rmtree(killed)


def _has_begun(run):
    written = [*run.glob("records/prefix_values/part-*.jsonl"), run / "metrics.jsonl"]
    return any(file.is_file() and file.stat().st_size for file in written)

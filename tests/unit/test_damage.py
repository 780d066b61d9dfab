"""Damage on disk: every flipped bit is refused with one message, or changes nothing."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stepwiser_jax.__main__ import main
from stepwiser_jax.checksums import SUMS, read_checksums, write_checksums
from stepwiser_jax.config import Label
from stepwiser_jax.config_files import load_config, read_run_settings
from stepwiser_jax.distributed.hosts import Shard
from stepwiser_jax.distributed.loading import load_model
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.manifest import check_finished, check_run_file, read_manifest, read_run_json
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.hf import save_hf
from stepwiser_jax.record_io import RecordWriter, read_records, write_manifest
from stepwiser_jax.record_lines import from_json, to_json, write_records
from stepwiser_jax.records import PrefixValue, Problem, Tokens, Trajectory
from stepwiser_jax.runs import directory as run_module
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.training.checkpoint import Checkpointer
from stepwiser_jax.training.step import TrainState
from stepwiser_jax.yaml_files import read_mapping
from tiny import tiny_config

PROBLEMS = [Problem(f"p#{i}", f"What is {i}?", str(i), "test") for i in (0, 2, 10, 1)]


def flip(file, at, bit=3):
    content = bytearray(file.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1 << bit
    file.write_bytes(content)


def test_a_flipped_bit_of_a_growing_part_is_refused(tmp_path):
    writer = RecordWriter(tmp_path, Problem)
    writer.append(PROBLEMS[:2])
    writer.append(PROBLEMS[2:])
    writer.close()
    (part,), (counted,) = tmp_path.rglob("*.jsonl"), tmp_path.rglob("*.crc32")
    whole, said = part.read_bytes(), counted.read_text()
    for at in (0.1, 0.5, 0.95, 1.0):  # the last one is the end of the last line
        flip(part, at, bit=0)
        with pytest.raises(UserError, match=r"does not begin with the \d+ bytes that were written"):
            RecordWriter(tmp_path, Problem)
        with pytest.raises(UserError, match="delete both files"):
            write_manifest(tmp_path, "rollout", "digest", [Problem])
        part.write_bytes(whole)
    for damaged in ("", "x 0\n", said.replace(" ", " 0")):
        counted.write_text(damaged)
        with pytest.raises(UserError, match="does not begin"):
            RecordWriter(tmp_path, Problem)
    counted.write_text(said)
    part.write_bytes(whole + whole.splitlines(keepends=True)[0].replace(b"p#0", b"p#7") + b'{"pro')
    writer = RecordWriter(tmp_path, Problem)  # killed before it could count its last block
    assert writer.done == {"p#0", "p#1", "p#2", "p#7", "p#10"}
    writer.close()
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    for name in (".summary.json.host.1.tmp", f"records/problems/.{part.name}.host.1.tmp"):
        (tmp_path / name).write_text("half a fi")  # killed while it wrote a whole file
    write_manifest(tmp_path, "rollout", "digest", [Problem])
    assert not list(tmp_path.rglob("*.crc32")) and len(read_records(tmp_path, Problem)) == 5
    assert not list(tmp_path.rglob(".*.tmp"))


# --- checkpoints --------------------------------------------------------------------------------


def noisy_state():
    values = np.random.default_rng(0).standard_normal((64, 33)).astype(np.float32)
    model = {"w": jnp.asarray(values), "b": jnp.asarray(values[0], jnp.bfloat16)}
    return TrainState(model, {"m": jnp.asarray(values * 2)}, jnp.int32(4), jnp.int32(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    saver = Checkpointer(directory)
    for step in (2, 4):
        saver.save(step, noisy_state(), {"loader": {"next_index": step}})
    saver.close()
    return directory


def test_a_flipped_bit_of_a_checkpoint_is_refused_or_changes_nothing(saved, tmp_path):
    expected = jax.tree.leaves(noisy_state())
    refused = set()
    files = [p.relative_to(saved) for p in sorted((saved / "4").rglob("*")) if p.is_file()]
    for number, file in enumerate(files):
        for at in (0.3, 0.8):
            copy = tmp_path / f"{number}-{at}"
            shutil.copytree(saved, copy)
            flip(copy / file, at)
            try:
                state, host = Checkpointer(copy).restore(noisy_state())
            except UserError as error:
                assert f"{copy / '4'} cannot be read" in str(error)
                assert "go on from step 2" in str(error)
                refused.add(file.parts[1])
                continue
            assert host == {"loader": {"next_index": 4}}, file
            for a, b in zip(expected, jax.tree.leaves(state), strict=True):
                np.testing.assert_array_equal(a, b, err_msg=str(file))
    assert {"model", "rest", "host"} <= refused


def test_arrays_that_can_be_read_but_are_others_are_named(saved, tmp_path):
    """What a flipped bit of an array leaves if nothing on the way notices it."""
    saver, other = Checkpointer(tmp_path / "checkpoints"), noisy_state()
    other.model["w"] = other.model["w"].at[3, 4].mul(2)
    saver.save(4, other, {"loader": {"next_index": 4}})
    saver.close()
    host = tmp_path / "checkpoints" / "4" / "host"
    shutil.rmtree(host)
    shutil.copytree(saved / "4" / "host", host)
    for read in ("restore", "restore_model"):
        like = noisy_state() if read == "restore" else noisy_state().model
        with pytest.raises(UserError, match=r"'model' of .*4 .*\(not what was saved: \['w'\]\)"):
            getattr(Checkpointer(tmp_path / "checkpoints"), read)(like)


# --- exports ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported") / "model"
    loaded = load_model("arithmetic", mesh=make_mesh(devices=jax.devices()[:1]))
    save_hf(loaded.model, loaded.tokenizer, str(directory))
    return directory


def load(directory):
    return load_model(str(directory), mesh=make_mesh(devices=jax.devices()[:1]))


def test_a_flipped_bit_of_an_export_is_refused_by_name(exported, tmp_path):
    names = sorted(path.name for path in exported.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", SUMS} <= set(names)
    for name in names:
        copy = tmp_path / name
        shutil.copytree(exported, copy)
        flip(copy / name, 0.7)
        with pytest.raises(UserError) as refusal:
            load(copy)
        assert name in str(refusal.value) or SUMS in str(refusal.value)
        assert len(str(refusal.value).splitlines()) == 1
    with pytest.raises(UserError, match=r"tokenizer\.json is missing, or is not the file"):
        load_tokenizer_of(str(tmp_path / "tokenizer.json"))


def test_what_a_killed_process_left_half_written_has_no_checksum(tmp_path):
    for name in ("config.json", f".{SUMS}.tmp"):
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path)
    assert set(read_checksums(tmp_path)) == {"config.json"}


def test_one_process_of_several_reads_its_share_of_the_weights(exported, tmp_path, monkeypatch):
    from stepwiser_jax.distributed import loading

    copy = tmp_path / "model"
    shutil.copytree(exported, copy)
    for number in range(4):
        (copy / f"model-{number}.safetensors").write_bytes(b"x")
    (copy / "model.safetensors").unlink()
    write_checksums(copy)
    read = []
    monkeypatch.setattr(loading, "check_files", lambda _, names, sums: read.append(set(names)))
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    class Pod:
        is_multi_process = True

    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        loading._check_weights(copy, Pod())
    weights = [{name for name in names if name.endswith(".safetensors")} for names in read]
    assert [sorted(names) for names in weights] == [
        ["model-0.safetensors", "model-2.safetensors"],
        ["model-1.safetensors", "model-3.safetensors"],
    ]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda x: np.full_like(x, np.nan), r"holds NaN or infinity in .*norm"),
        (
            lambda x: x.astype(np.int32),
            r"tensor model\.norm\.weight has the type I32, expected one",
        ),
    ],
)
def test_weights_that_cannot_be_are_refused(exported, tmp_path, edit, message):
    copy = tmp_path / "model"
    shutil.copytree(exported, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = edit(tensors["model.norm.weight"])
    save_file(tensors, copy / "model.safetensors")
    (copy / SUMS).unlink()  # as in a model of somebody else's
    with pytest.raises(UserError, match=message):
        load(copy)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": "a"},
        {"rope_parameters": {"rope_theta": "x"}},
        {"rope_parameters": LLAMA3 | {"low_freq_factor": 0}},
        {"rope_parameters": LLAMA3 | {"high_freq_factor": 0}},
        {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}},
        {"rope_parameters": [1]},
        {"head_dim": 0},
        {"head_dim": 7},
        {"hidden_size": -128},
        {"max_position_embeddings": -5},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**9},
        {"num_key_value_heads": "x"},
        {"num_key_value_heads": 3},
        {"tie_word_embeddings": "false"},
        {"eos_token_id": "x"},
        {"layer_types": 5},
        {"id2label": 5},
        {"model_type": ["llama"]},
    ],
    ids=str,
)
def test_model_configs_that_cannot_be_are_refused_by_name(change):
    fields = tiny_config("llama").to_hf() | {"rope_scaling": None}
    ModelConfig.from_hf(fields)
    with pytest.raises(UserError, match=r"config\.json: expected"):
        ModelConfig.from_hf(fields | change)


@pytest.mark.parametrize("end", ["[]", "{", '{"eos_token_id": -1}', '{"eos_token_id": 999999}'])
def test_end_tokens_that_cannot_be_are_refused(exported, tmp_path, end):
    copy = tmp_path / "model"
    shutil.copytree(exported, copy)
    (copy / "generation_config.json").write_text(end)
    (copy / SUMS).unlink()
    with pytest.raises(UserError, match=r"generation_config|eos_token_id"):
        load_tokenizer_of(str(copy))


# --- records and runs ---------------------------------------------------------------------------


def finished_run(directory):
    writer = RecordWriter(directory, Problem)
    writer.append(PROBLEMS)
    writer.close()
    (directory / "config.yaml").write_text("seed: 0\n")
    (directory / "summary.json").write_text('{"problems": 4}\n')
    (directory / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    write_manifest(directory, "rollout", "digest", [Problem])
    return directory


def test_a_flipped_bit_of_a_finished_run_is_refused_by_name(tmp_path):
    readers = {
        "config.yaml": read_run_settings,
        "summary.json": lambda run: read_run_json(run, "summary.json"),
        "manifest.json": read_manifest,
        "records/problems/part-00000-of-00001.jsonl": lambda run: read_records(run, Problem),
    }
    for number, (name, read) in enumerate(readers.items()):
        for at in (0.05, 0.3, 0.5, 0.7, 0.95):
            run = finished_run(tmp_path / f"{number}-{at}")
            read(run)
            flip(run / name, at)
            with pytest.raises(UserError) as refusal:
                read(run)
            assert str(run / name) in str(refusal.value)


def test_a_damaged_file_that_is_not_made_again_has_advice_of_its_own(tmp_path):
    """Without config.yaml a directory is no run, and without metrics.jsonl none goes on."""
    for name, advice in (
        ("config.yaml", "If there is no copy, write it again: with --dry-run"),
        ("metrics.jsonl", r"If there is no copy, delete manifest\.json and repeat"),
        ("summary.json", r"If there is no copy, delete it and manifest\.json, and repeat"),
    ):
        run = finished_run(tmp_path / name)
        flip(run / name, 0.5)
        with pytest.raises(UserError, match=advice):
            check_run_file(run, name)


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", "[" * 100_000])
def test_a_manifest_or_summary_that_is_none_is_refused(tmp_path, text):
    run = finished_run(tmp_path / "run")
    (run / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is damaged: put it back, or delete it"):
        read_records(run, Problem)
    (run / "manifest.json").unlink()
    (run / "summary.json").write_text(text)
    if text != "{}":
        with pytest.raises(UserError, match=r"summary\.json"):
            read_run_json(run, "summary.json")


def test_an_id_that_is_there_twice_is_refused_with_both_lines(tmp_path):
    file = tmp_path / "problems.jsonl"
    write_records(file, [*PROBLEMS, PROBLEMS[1]])
    with pytest.raises(UserError, match=r"line 5: the id 'p#2' is there twice, first in .* line 2"):
        read_records(file, Problem)
    for part in (0, 1):
        lines = "".join(to_json(problem) + "\n" for problem in PROBLEMS[: 2 + part])
        name = f"part-{part:05d}-of-00002.jsonl"
        (tmp_path / "records" / "problems").mkdir(parents=True, exist_ok=True)
        (tmp_path / "records" / "problems" / name).write_text(lines)
    with pytest.raises(
        UserError, match=r"00001-of-00002.jsonl, line 1: .* first in .*00000-of-0000"
    ):
        RecordWriter(tmp_path, Problem)
    write_manifest(tmp_path, "rollout", "digest", [Problem])
    with pytest.raises(UserError, match=r"'p#0' is there twice"):
        read_records(tmp_path, Problem)


VALUE = {
    "trajectory_id": "t",
    "num_chunks": 1,
    "num_rollouts": 4,
    "num_correct": 2,
    "max_rollouts": 4,
    "policy_id": "m",
}
TOKENS = Tokens((1, 2), (3, 4), (-0.5, -0.25))
TRAJECTORY = Trajectory("t", "p", "m", TOKENS, (1, 2), "stop_id", True)


@pytest.mark.parametrize(
    "change",
    [
        {"num_correct": -1},
        {"num_correct": 5},
        {"num_rollouts": -1},
        {"num_rollouts": 0, "num_correct": 0},
        {"num_rollouts": 10**30, "max_rollouts": 10**30},
        {"max_rollouts": 1e30},
        {"max_rollouts": -1},
        {"num_chunks": -1},
    ],
    ids=str,
)
def test_values_that_cannot_be_are_refused(change):
    assert from_json(json.dumps(VALUE), PrefixValue).value == 0.5
    with pytest.raises(UserError, match=r"expected|should be a valid integer"):
        from_json(json.dumps(VALUE | change), PrefixValue)


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_ends": [2, 2]},
        {"chunk_ends": [1]},
        {"chunk_ends": []},
        {"tokens": {"file": "../x.tokens"}},
        {"tokens": {"offset": -1}},
        {"tokens": {"offset": 10**30}},
        {"tokens": {"completion": 3}},
    ],
    ids=str,
)
def test_trajectories_that_cannot_be_are_refused(tmp_path, change):
    file = tmp_path / "t.jsonl"
    write_records(file, [TRAJECTORY])
    assert read_records(file, Trajectory) == [TRAJECTORY]
    fields = json.loads(file.read_text())
    change = {"tokens": fields["tokens"] | change.get("tokens", {})} | (
        {} if "tokens" in change else change
    )
    file.write_text(json.dumps(fields | change) + "\n")
    with pytest.raises(UserError, match=r"line 1: .*expected"):
        read_records(file, Trajectory)


@pytest.mark.parametrize(
    ("ids", "logprobs"), [((3, 4), (-0.5,)), ((3, -4), (-0.5, -0.5)), ((2**31, 4), (-0.5, -0.5))]
)
def test_tokens_that_cannot_be_are_refused(ids, logprobs):
    with pytest.raises((UserError, OverflowError)):
        Tokens((1, 2), ids, logprobs)


def test_log_probs_that_are_not_finite_are_not_written(tmp_path):
    tokens = Tokens((1, 2), (3, 4), (float("nan"), -0.5))
    with pytest.raises(UserError, match="finite log-probs in the trajectory t, "):
        write_records(tmp_path / "t.jsonl", [dataclasses.replace(TRAJECTORY, tokens=tokens)])
    assert not list(tmp_path.iterdir())


def test_lines_that_nobody_can_read_are_refused(tmp_path):
    for number, line in enumerate(["[" * 100_000, '{"x": ' + "9" * 5000 + "}"]):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(line + "\n")
        with pytest.raises(UserError, match="line 1: expected one JSON object a line"):
            read_records(file, Problem)
    (tmp_path / "bytes.jsonl").write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(UserError, match="line 1: expected UTF-8"):
        read_records(tmp_path / "bytes.jsonl", Problem)


def test_values_of_a_model_that_was_replaced_are_refused(tmp_path):
    values = [PrefixValue("t", j, 4, 2, 4, f"m@{j}") for j in range(2)]
    writer = RecordWriter(tmp_path, PrefixValue)
    writer.append(values[:1])
    with pytest.raises(UserError, match=r"of one model, found those of \['m@0', 'm@1'\]"):
        writer.append(values[1:])
    with pytest.raises(UserError, match="of one model"):
        RecordWriter(tmp_path, PrefixValue).append(values[1:])
    assert len(RecordWriter(tmp_path, PrefixValue).done) == 1


# --- token arrays -------------------------------------------------------------------------------


def trajectories(count, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        length = int(rng.integers(1, 9))
        tokens = Tokens(rng.integers(0, 99, 3), rng.integers(0, 99, length), -rng.random(length))
        found.append(Trajectory(f"p#{i}", "p", "m", tokens, (length,), "stop_id", bool(i % 2)))
    return found


def finish(run, batches, kill=None):
    """A run of trajectories in these batches; `kill` damages what lies there between them."""
    for number, batch in enumerate(batches, 1):
        writer = RecordWriter(run, Trajectory)
        writer.append(batch)
        writer.close()
        if kill and number < len(batches):
            kill(writer.path)
    write_manifest(run, "rollout", "digest", [Trajectory])
    (run / "config.yaml").write_text("seed: 0\n")
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*.*")}


def test_token_arrays_are_the_same_bytes_after_any_kill(tmp_path):
    """Killed after the row and before its line, in the middle of a line, and in another order."""
    records = trajectories(12)

    def half_a_row(part):
        with open(part.with_suffix(".growing.tokens"), "ab") as file:
            file.write(b"half a row")

    def half_a_line(part):
        half_a_row(part)
        with open(part, "ab") as file:
            file.write(b'{"trajectory_id": "p#9')

    whole = finish(tmp_path / "whole", [records])
    assert sorted(whole) == [
        "config.yaml",
        "manifest.json",
        "records/trajectories/part-00000-of-00001.jsonl",
        "records/trajectories/part-00000-of-00001.tokens",
    ]
    for number, kill in enumerate((None, half_a_row, half_a_line)):
        batches = [records[6:9], records[:6], records[3:]]
        assert finish(tmp_path / f"{number}", batches, kill) == whole
    assert read_records(tmp_path / "0", Trajectory) == records
    found = read_records(tmp_path / "0", Trajectory)[3]
    assert found.completion_ids.dtype == np.int32 and found.logprobs.dtype == np.float32
    assert not found.completion_ids.flags.owndata, "it is a view"


def test_a_run_killed_between_its_two_files_goes_on(tmp_path, monkeypatch):
    """The sorted token file lies there, and the lines still name the growing one."""
    records = trajectories(12)[::-1]
    whole = finish(tmp_path / "whole", [records])
    replace = os.replace

    def killed(source, target):
        if str(target).endswith(".jsonl"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            finish(tmp_path / "run", [records])
    assert list((tmp_path / "run").rglob("*1.tokens"))
    assert finish(tmp_path / "run", [records]) == whole


def test_a_flipped_bit_of_token_arrays_is_refused_when_its_row_is_read(tmp_path):
    records = trajectories(12)
    finish(tmp_path, [records])
    (file,) = tmp_path.rglob("*.tokens")
    flip(file, 0.99)
    found = read_records(tmp_path, Trajectory)
    assert found[:11] == records[:11], "nobody asked for the last one"
    with pytest.raises(UserError, match=rf"{file} is missing, or its bytes \d+ to \d+ are not"):
        _ = found[11].logprobs
    with pytest.raises(UserError, match=f"{file} is missing or is not the file that"):
        check_finished(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=rf"{file} is missing, or"):
        _ = read_records(tmp_path, Trajectory)[0].prompt_ids


def test_a_missing_row_of_a_growing_part_is_refused(tmp_path):
    writer = RecordWriter(tmp_path, Trajectory)
    writer.append(trajectories(12))
    writer.close()
    file = writer.path.with_suffix(".growing.tokens")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="is missing, or its bytes"):
        write_manifest(tmp_path, "rollout", "digest", [Trajectory])


# --- configs ------------------------------------------------------------------------------------


def test_settings_that_cannot_be_read_are_refused(tmp_path, request):
    for text, message in (
        ("seed: 1\nmesh: {data: 1}\nseed: 2\n", "the key 'seed' is there twice"),
        ("a: " + "[" * 3000, "is not valid YAML"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            read_mapping(tmp_path / "c.yaml", "settings")
    file = request.config.rootpath / "configs" / "smoke_values.yaml"
    with pytest.raises(UserError, match=r"seed: expected no true or false \(found True\)"):
        load_config("annotate", file, ("seed=true",))
    with pytest.raises(UserError, match=r"num_rollouts: .* less than or equal to 1024"):
        load_config("annotate", file, ("num_rollouts=2000",))
    with pytest.raises(UserError, match=r"mesh: .*'data' is there twice"):
        load_config("annotate", file, ("mesh={data: 1, data: 2}",))
    assert main(["label", "--config", "x" * 5000, "--run-dir", str(tmp_path / "r")]) == 2


# --- two runs in one directory ------------------------------------------------------------------

WORKER = """
import sys, time
from stepwiser_jax.config import Label
from stepwiser_jax.distributed.hosts import Shard
from stepwiser_jax.runs.directory import RunDirectory
config = Label(values="a", rollouts="r", tokenizer="t")
run = RunDirectory(sys.argv[1], "label", config, Shard(int(sys.argv[2]), int(sys.argv[3])))
run.create()
print("locked", flush=True)
time.sleep(600)
"""


def test_two_runs_in_one_directory_keep_out_of_each_others_work(tmp_path, monkeypatch, capsys):
    """Shards of one cut work side by side; the same shard again, those of another cut, and the
    whole run wait for them; a process that is killed lets go."""
    monkeypatch.setattr(run_module, "LOCK_SECONDS", 0)
    run = tmp_path / "run"

    def directory(index, count):
        config = Label(values="a", rollouts="r", tokenizer="t")
        return RunDirectory(run, "label", config, Shard(index, count))

    words = [sys.executable, "-c", WORKER, str(run), "1", "3"]
    environment = os.environ | {"PYTHONPATH": str(Path(run_module.__file__).parents[2])}
    other = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        for index, count in ((1, 3), (0, 1), (0, 2), (3, 4)):
            with pytest.raises(UserError, match=f"another process works in {run}: wait"):
                directory(index, count).writer(Problem)
            with pytest.raises(UserError, match="another process works"):
                directory(index, count).pending([PROBLEMS], Problem, lambda block: [])
        assert "this one waits for it, 0 seconds at most" in capsys.readouterr().err
        assert not list(run.glob("records/*/*"))
        beside = directory(2, 3)
        beside.writer(Problem).append(PROBLEMS)
    finally:
        other.kill()
        other.wait()
    beside = directory(1, 3).writer(Problem)
    assert len(beside.done) == 4

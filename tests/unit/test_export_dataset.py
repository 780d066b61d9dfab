"""`stepwiser export-dataset`: what datasets reads back is what the run holds."""

import json

import pytest

from stepwiser_jax import Problem, Trajectory, read_records, run_stage
from stepwiser_jax.__main__ import main
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.text.tokenizer import completion_text


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "rollouts"
    settings = {
        "policy": {"path": "arithmetic"},
        "problems": {"source": "arithmetic", "split": "rollout", "limit": 3},
        "prompt_style": "bare",
        "group_size": 2,
        "sampling": {"max_new_tokens": 8},
        "engine": {"rows": [8], "buckets": [64]},
    }
    run_stage("rollout", settings, run)
    return run


def test_datasets_reads_the_records(rollouts, tmp_path, capsys):
    from datasets import load_dataset

    out = tmp_path / "dataset"
    assert main(["export-dataset", str(rollouts), "--output", str(out), "--tokens"]) == 0
    assert capsys.readouterr().out == f"{out}: rollouts_problems, rollouts_trajectories\n"
    rows = load_dataset(str(out), "rollouts_trajectories", split="train", cache_dir=tmp_path)
    trajectories = read_records(rollouts, Trajectory)
    assert rows.num_rows == len(trajectories) == 6
    tokenizer = load_tokenizer_of("arithmetic")
    for row, trajectory in zip(rows, trajectories, strict=True):
        assert row["trajectory_id"] == trajectory.trajectory_id
        assert row["completion_ids"] == trajectory.completion_ids.tolist()
        assert row["logprobs"] == pytest.approx(trajectory.logprobs.tolist())
        whole = completion_text(tokenizer, trajectory.completion_ids)
        assert "".join(row["chunks"]).split() == whole.split()
    problems = load_dataset(str(out), "rollouts_problems", split="train", cache_dir=tmp_path)
    held = read_records(rollouts, Problem)
    assert [row["question"] for row in problems] == [problem.question for problem in held]
    assert [json.loads(row["extra"]) for row in problems] == [problem.extra for problem in held]
    card = (out / "README.md").read_text()
    assert "| `rollouts_trajectories` | 6 |" in card and "A run of `rollout`. accuracy: " in card
    assert "split: rollout" in card


def test_token_arrays_are_left_out_unless_asked_for(rollouts, tmp_path):
    import pyarrow.parquet

    assert main(["export-dataset", str(rollouts), "--output", str(tmp_path / "out")]) == 0
    names = pyarrow.parquet.read_schema(tmp_path / "out" / "rollouts_trajectories.parquet").names
    assert "chunks" in names and not {"completion_ids", "logprobs", "prompt_ids"} & set(names)


def test_mistakes_write_nothing(rollouts, tmp_path, capsys):
    out = str(tmp_path / "out")
    for arguments, message in (
        ([str(rollouts), str(rollouts)], "expected runs with different names"),
        ([str(tmp_path / "none")], "none"),
    ):
        assert main(["export-dataset", *arguments, "--output", out]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert main(["export-dataset", str(rollouts), "--output", str(tmp_path)]) == 2
    assert "exists: name a new directory" in capsys.readouterr().err

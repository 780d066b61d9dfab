"""`stepwiser status`: runs that work, have stopped, or are finished, asked from another process."""

import json
import subprocess
import sys

import pytest

from stepwiser_jax.__main__ import main
from stepwiser_jax.commands import status as asked
from stepwiser_jax.config import Label
from stepwiser_jax.records import Judgment, Verdict
from stepwiser_jax.report.runs import find_runs
from stepwiser_jax.runs import progress as told
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.runs.progress_file import Progress, read_progress, write_progress
from stepwiser_jax.runs.signals import Interrupted


def status(run):
    """Returns what another process prints: this one would not see its own lock."""
    code = (
        "import sys; from pathlib import Path; from stepwiser_jax.commands.status import *; "
        f"print_status([Path({str(run)!r})], watch=None, as_json=True); "
        "print('jax' in sys.modules, file=sys.stderr)"
    )
    words = [sys.executable, "-c", code]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    assert result.stderr == "False\n", "it starts without jax"
    (found,) = json.loads(result.stdout)
    return found


def test_a_run_is_running_then_stopped_then_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(told, "LINE_SECONDS", 0.0)
    run, config = tmp_path / "run", Label(values="a", rollouts="r", tokenizer="t")
    seen = []

    def records_of(block):
        if block == ["b"]:
            told.rows_done(3, 8, 10)
            seen.append(status(run))
            raise Interrupted
        return [Judgment(name, "judge", "", Verdict.POSITIVE, 1.0, 1.0) for name in block]

    directory = RunDirectory(run, "label", config)
    with pytest.raises(Interrupted):
        directory.write_blocks([["a"], ["b"], ["c"]], Judgment, records_of)
    (running,) = seen
    assert running["state"] == "running" and running["resume"] is None
    (worker,) = running["workers"]
    assert (worker["unit"], worker["done"], worker["total"]) == ("block", 1, 3)
    assert worker["rows"] == [3, 8] and worker["ended"] is None and worker["seconds_each"] > 0
    assert running["numbers"] == worker["numbers"] == {"rows": 1.0, "right": 1.0}
    assert running["health"]["memory_bytes"] > 2**20

    del directory  # and with it the lock
    stopped = status(run)
    assert stopped["state"] == "stopped"
    assert stopped["workers"][0]["ended"] == "it was asked to stop"
    words = stopped["resume"].split()
    assert words == ["stepwiser", "label", "--config", f"{run}/config.yaml", "--run-dir", str(run)]

    RunDirectory(run, "label", config).finish(lambda: {"labels": 7, "judge_examples": 4})
    finished = status(run)
    assert finished["state"] == "finished" and finished["workers"] == []
    assert finished["numbers"] == {"judge_examples": 4.0}
    assert not (run / "progress").exists()


def test_a_worker_that_fails_says_why(tmp_path):
    kept = []
    with (
        pytest.raises(ValueError, match="no room"),
        told.progress("sft", "step", 9, 2, kept.append) as report,
    ):
        report.advance(loss=float("nan"), accuracy=0.5)
        raise ValueError("no room")
    assert kept[-1].ended == "ValueError: no room" and kept[-1].done == 3
    assert kept[-1].numbers == {"accuracy": 0.5}, "what is no number is no JSON"


def test_without_locks_a_silent_run_has_stopped(tmp_path, monkeypatch, capsys):
    RunDirectory(tmp_path, "label", Label(values="a", rollouts="r", tokenizer="t")).create()
    write_progress(tmp_path, 0, Progress("block", 2, 8, seconds_each=90.0))
    monkeypatch.setattr(asked, "is_locked", lambda _: None)
    (run,) = find_runs([tmp_path])
    assert asked.status_of(run).state == "running"
    monkeypatch.setattr(asked, "SILENT_SECONDS", -1)
    assert asked.status_of(run).state == "stopped"
    assert main(["status", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "block 2 of 8, 90 s each, 0:09:00 left" in said
    assert "ended without a word" in said and "go on with: stepwiser label" in said


def test_a_file_that_cannot_be_read_or_written_ends_nothing(tmp_path):
    write_progress(tmp_path / "gone", 0, Progress("step", 1, 2))
    (tmp_path / "progress").mkdir()
    (tmp_path / "progress" / "00000.json").write_text("{")
    (tmp_path / "progress" / "00001.json").write_text("{}")
    assert read_progress(tmp_path) == []


def test_what_is_no_run_is_an_error(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "expected a run directory" in capsys.readouterr().err
    assert main(["status", str(tmp_path), "--watch", "1", "--json"]) == 2

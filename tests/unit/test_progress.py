"""What a run says while it works, on a terminal and off one."""

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from stepwiser_jax.distributed import hosts
from stepwiser_jax.records import PrefixValue
from stepwiser_jax.runs import progress as told
from stepwiser_jax.runs.progress import block_means, progress, rows_done, say


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(told.time, "monotonic", lambda: Clock.now)
    return Clock


def lines(capsys):
    """What was said, without the time of day, and nothing on stdout."""
    said = capsys.readouterr()
    assert said.out == ""
    return [line[9:] for line in said.err.splitlines()]


def test_off_a_terminal_there_is_a_line_for_the_first_the_last_and_every_ten_seconds(clock, capsys):
    with progress("judge", "iteration", 800, done=790) as work:
        for step in range(10):
            clock.now += 4.0
            work.advance(reward=step / 10, unparsed_rate=0.0123)
    assert lines(capsys) == [
        "judge: iteration 791 of 800, reward 0, unparsed_rate 0.0123, 4 s each, 0:00:36 left",
        "judge: iteration 794 of 800, reward 0.3, unparsed_rate 0.0123, 4 s each, 0:00:24 left",
        "judge: iteration 797 of 800, reward 0.6, unparsed_rate 0.0123, 4 s each, 0:00:12 left",
        "judge: iteration 800 of 800, reward 0.9, unparsed_rate 0.0123, 4 s each, 0:00:00 left",
    ]


def test_compilation_is_soon_left_out_of_the_time_left(clock, capsys):
    with progress("sft", "step", 100) as work:
        for step in range(30):
            clock.now += 10.0 if step else 300.0
            work.advance()
    said = lines(capsys)
    assert said[0] == "sft: step 1 of 100, 300 s each, 8:15:00 left"
    assert said[-1] == "sft: step 30 of 100, 10 s each, 0:11:40 left"


def test_a_long_unit_tells_of_its_rows_once_a_minute(clock, capsys):
    with progress("annotate", "block", 4, done=1) as work:
        for done in range(1, 101):
            clock.now += 2.0
            rows_done(done, 100, tokens=100)
        work.advance(rows=100)
    rows_done(1, 1, tokens=1)  # nobody follows
    assert lines(capsys) == [
        "annotate: in block 2 of 4, 30 of 100 rows, tokens/s 50",
        "annotate: in block 2 of 4, 60 of 100 rows, tokens/s 50",
        "annotate: in block 2 of 4, 90 of 100 rows, tokens/s 50",
        "annotate: block 2 of 4, rows 100, tokens/s 50, 200 s each, 0:06:40 left",
    ]


def test_a_terminal_has_a_bar_with_units_and_rows(monkeypatch, capsys):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, color_system=None, width=150)
    monkeypatch.setattr(told, "_console", terminal)
    with progress("annotate", "block", 4) as work:
        work.advance(value=0.25)
        rows_done(7, 512, tokens=10)
        work.bar.refresh()
    assert "1/4 blocks" in screen.getvalue()
    assert "7 of 512 rows, value 0.25" in screen.getvalue()
    assert "s each" not in screen.getvalue()
    assert lines(capsys) == []


def test_only_the_first_process_speaks(monkeypatch, capsys):
    monkeypatch.setattr(hosts, "is_primary", lambda: False)
    with progress("sft", "step", 1) as work:
        work.advance(loss=1.0)
    say("here")
    assert lines(capsys) == []


def test_of_a_block_the_means_of_its_records_are_shown():
    values = [PrefixValue("t", j, 4, right, 4, "policy") for j, right in enumerate((1, 2, 3))]
    assert block_means(values) == {"rows": 3, "value": 0.5}
    assert block_means([]) == {"rows": 0}


def test_nobody_hears_that_there_is_no_pytorch(tmp_path):
    """transformers says it once, when it is imported."""
    without_torch = "import importlib.util as u; f = u.find_spec; "
    without_torch += "u.find_spec = lambda name, *a: None if name == 'torch' else f(name, *a); "
    write = "from stepwiser_jax.tasks.arithmetic import write_tokenizer; "
    write += f"write_tokenizer({str(tmp_path)!r})"
    environment = dict(os.environ)
    environment.pop("TRANSFORMERS_NO_ADVISORY_WARNINGS")  # of this process, by the import above
    for program, is_heard in ((write, False), ("import transformers", True)):
        words = [sys.executable, "-c", without_torch + program]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
        assert ("PyTorch was not found" in done.stderr) == is_heard, done.stderr

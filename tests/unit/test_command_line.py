"""What a person who types commands meets: help, version, stops, dry runs, and what is printed."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stepwiser_jax import __version__
from stepwiser_jax.__main__ import main
from stepwiser_jax.commands.results import print_summary
from stepwiser_jax.config import Label
from stepwiser_jax.evaluation.judgments import example_judgments
from stepwiser_jax.evaluation.processbench import score_by_subset
from stepwiser_jax.files import nothing_at
from stepwiser_jax.records import JudgeExample, Judgment, ProcessBenchItem, Verdict
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.runs.signals import stop

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


def test_without_arguments_there_is_the_help_and_no_empty_error(capsys):
    assert main([]) == 2
    said = capsys.readouterr()
    assert "quickstart" in said.out and "error" not in said.err


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("judge", "train-judge"),
        ("classify", "evaluate, with `judge: {kind: classifier}`"),
        ("contrast", "compare-judges"),
        ("compare", "reproduce"),
    ],
)
def test_an_old_command_names_the_new_one(old, new, capsys):
    assert main([old, "--config", "x.yaml"]) == 2
    assert f"the command {old} is now {new}" in capsys.readouterr().err


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"stepwiser {__version__}\n"


# --- stops --------------------------------------------------------------------------------------

PLAN = """
import hashlib, sys
from stepwiser_jax import __main__
from stepwiser_jax.commands.plan import command

def compiles(*_, **__):
    print("compiling", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # in C, where no Python handler runs

command.print_plan = compiles
sys.argv = ["stepwiser", "plan", "train-judge", "--config", "x", "--topology", "v5p:4x4x4"]
__main__.run()
"""


def test_plan_ends_at_once():
    signals = (signal.SIGTERM, signal.SIGINT)
    words = [sys.executable, "-c", PLAN]
    running = [subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) for _ in signals]
    try:
        for process, sign in zip(running, signals, strict=True):
            assert process.stdout is not None and process.stdout.readline() == b"compiling\n"
            process.send_signal(sign)
            assert process.wait(timeout=10) == -sign
    finally:
        for process in running:
            process.kill()
            process.communicate()


@pytest.fixture
def as_a_process_starts():
    before = {sign: signal.signal(sign, signal.SIG_DFL) for sign in (signal.SIGTERM, signal.SIGINT)}
    yield
    for sign, handler in before.items():
        signal.signal(sign, handler)


def test_a_stop_waits_for_blocks_and_for_nothing_else(tmp_path, as_a_process_starts):
    """`label` and whatever only reads has nothing that a kill could lose."""
    config = Label(values="a", rollouts="r", tokenizer="t")
    RunDirectory(tmp_path / "label", "label", config).finish(lambda: {})
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    handlers = []

    def records_of(_):
        handlers.extend([signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)])
        return []

    directory = RunDirectory(tmp_path / "blocks", "label", config)
    directory.write_blocks([["a"]], Judgment, records_of)
    assert handlers == [stop, stop]


# --- dry runs -----------------------------------------------------------------------------------


def dry_run(stage, config, run, *settings):
    sets = [word for setting in settings for word in ("--set", setting)]
    words = [stage, "--config", str(CONFIGS / f"{config}.yaml"), "--run-dir", str(run), *sets]
    return main([*words, "--dry-run"])


@pytest.fixture
def labels(tmp_path):
    """A finished run of `label`."""
    directory = RunDirectory(
        tmp_path / "labels", "label", Label(values="a", rollouts="r", tokenizer="t")
    )
    example = JudgeExample("p#0/0", "p", "1 + 1", "", "2", True)
    directory.writer(JudgeExample).append([example])
    directory.finish(lambda: {})
    return directory.path


def test_a_dry_run_off_the_pod_checks_all_but_devices(tmp_path, labels, capsys):
    validation = f"validation.examples.source={labels}"
    model = ("model.path=arithmetic", validation, f"examples.source={labels}")
    mesh = ("mesh.data=64", "prompts_per_iteration=256", "engine.rows=[64]")
    assert dry_run("train-judge", "smoke_judge", tmp_path / "run", *model, *mesh) == 0
    said = capsys.readouterr()
    assert "warning: mesh data 64 x fsdp 1 x tensor 1 needs 64 devices" in said.err
    assert "prompts_per_iteration: 256" in said.out

    for source in ("examples.source", "validation.examples.source"):
        missing = (*model, *mesh, f"{source}={tmp_path / 'label'}")
        assert dry_run("train-judge", "smoke_judge", tmp_path / "run", *missing) == 2
        error = capsys.readouterr().err
        assert f"nothing at {tmp_path / 'label'}; did you mean {labels}?" in error
        assert "devices" not in error, "data come before devices"
    assert not (tmp_path / "run").exists()


def test_a_dry_run_sees_a_flipped_bit_in_its_input(tmp_path, labels, capsys):
    (part,) = labels.glob("records/judge_examples/*.jsonl")
    content = bytearray(part.read_bytes())
    content[content.index(b"1 + 1")] ^= 1
    part.write_bytes(content)
    settings = ("model.path=arithmetic", f"examples.source={labels}", "validation=null")
    assert dry_run("train-judge", "smoke_judge", tmp_path / "run", *settings) == 2
    assert str(part) in capsys.readouterr().err


def test_a_group_given_as_a_value_says_how_to_set_it(tmp_path, capsys):
    assert dry_run("evaluate", "smoke_evaluate", tmp_path / "run", "judge=runs/judge") == 2
    error = capsys.readouterr().err
    assert "judge is a group of settings, found 'runs/judge': set one of the group" in error
    assert "such as judge.path" in error


def test_what_is_missing_is_named_with_its_folder_and_the_closest_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart" / "judge").mkdir(parents=True)
    found = nothing_at("quickstart/jugde")
    assert found == f"nothing at quickstart/jugde (in {tmp_path}); did you mean quickstart/judge?"
    assert nothing_at(tmp_path / "elsewhere") == f"nothing at {tmp_path / 'elsewhere'}"


# --- what is printed ----------------------------------------------------------------------------


def test_scores_are_lines_in_percent_with_a_right_and_a_wrong_judgment(tmp_path, capsys):
    items = [
        ProcessBenchItem("a-0", "a", "1 + 1 ?", ("1 + 1 = 3", "so 3"), 0, False),
        ProcessBenchItem("a-1", "a", "1 + 2 ?", ("1 + 2 = 3",), -1, True),
    ]
    said = [[Verdict.NEGATIVE, Verdict.POSITIVE], [Verdict.NEGATIVE]]
    judgments = {
        f"{item.item_id}/{step}": Judgment("", "j", f"I say\n{verdict.value}", verdict, 0.0, 0.0)
        for item, verdicts in zip(items, said, strict=True)
        for step, verdict in enumerate(verdicts)
    }
    summary = {
        "items": 2,
        "greedy": score_by_subset(items, said, seed=0),
        "compiled": {"read 8x16": 3},
        "judgments": example_judgments(items, judgments),
        "warm_up": {"programs": ["decode"]},
    }
    print_summary(summary, tmp_path)
    assert capsys.readouterr().out == (
        "greedy, a: F1 0.0% [0.0, 0.0]; first errors found 100.0%, right solutions accepted 0.0%; "
        "2 items, 0.0% without verdict\n"
        "items: 2\n"
        "\n  question  1 + 1 ?\n  step      1 + 1 = 3\n  judge     I say Negative\n"
        "  verdict   Negative\n  truth     Negative\n"
        "\n  question  1 + 2 ?\n  step      1 + 2 = 3\n  judge     I say Negative\n"
        "  verdict   Negative\n  truth     Positive\n"
        f"all numbers: {tmp_path / 'summary.json'}\n"
    )

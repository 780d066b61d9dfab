"""The shipped recipes chain: what one config reads, another one writes."""

import re
from pathlib import Path

import pytest
import yaml
from stand_ins import MODELS, with_stand_ins, write_data, write_model, write_tokenizer

from stepwiser_jax.__main__ import main
from stepwiser_jax.commands.recipe import TRAINING, read_recipe
from stepwiser_jax.config_files import RUNS

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted({file.stem.split("_")[0] for file in CONFIGS.glob("*.yaml")})


def recipe(*arguments):
    return main(["recipe", *map(str, arguments)])


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_configs_chain(name, capsys):
    assert recipe(CONFIGS / name, "--runs", "somewhere/runs") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(CONFIGS.glob(f"{name}_*.yaml")))
    written = [line.split(" --run-dir ")[1] for line in lines]
    assert len(set(written)) == len(written)
    assert all(run.startswith("somewhere/runs/") for run in written)


def write(folder, **configs):
    for name, text in configs.items():
        (folder / f"tiny_{name}.yaml").write_text(text)
    return folder / "tiny"


POLICY = """
stage: sft
model: {path: arithmetic}
examples: {source: arithmetic-policy, limit: 8}
prompt_style: bare
steps: 1
batch_size: 1
max_length: 160
training: {optimizer: {learning_rate: 1.0}}
"""
ROLLOUTS = """
stage: rollout
policy: {path: RUNS/policy}
problems: {source: arithmetic, split: rollout, limit: 2}
prompt_style: bare
sampling: {max_new_tokens: 8}
engine: {buckets: [160]}
"""


def test_stages_come_behind_those_that_they_read_and_finished_ones_are_marked(tmp_path, capsys):
    prefix = write(tmp_path, policy=POLICY, a_rollouts=ROLLOUTS)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "manifest.json").write_text("{}")
    assert recipe(prefix, "--runs", tmp_path) == 0
    policy, rollouts = capsys.readouterr().out.splitlines()
    command = f"stepwiser sft --config {prefix}_policy.yaml --run-dir {tmp_path / 'policy'}"
    assert policy == f"{command}   # finished"
    assert rollouts.startswith("stepwiser rollout ") and "#" not in rollouts


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("RUNS/policy", "RUNS/polcy", "policy.path is RUNS/polcy: .* sft, found no config of that"),
        ("RUNS/policy", "RUNS/rollouts", "policy.path is RUNS/rollouts: .* found a run of rollout"),
        (
            "source: arithmetic",
            "source: RUNS/policy",
            "problems.source .* of rollout, found .* sft",
        ),
        ("stage: rollout", "", "a config of a recipe names its stage"),
        ("stage: rollout", "stage: rolout", "expected a stage of .*, found 'rolout'"),
        ("limit: 2", "limit: 0", "problems.limit: .* greater than or equal to 1"),
    ],
)
def test_a_chain_that_is_broken_is_named(tmp_path, capsys, old, new, message):
    prefix = write(tmp_path, policy=POLICY, rollouts=ROLLOUTS.replace(old, new))
    assert recipe(prefix) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, error), error


def test_configs_that_wait_for_one_another_and_none_are_named(tmp_path, capsys):
    learned = POLICY.replace("arithmetic-policy, limit: 8", "RUNS/best")
    best = "stage: select-responses\nrollouts: RUNS/rollouts\ntokenizer: RUNS/policy\n"
    assert recipe(write(tmp_path, policy=learned, rollouts=ROLLOUTS, best=best)) == 2
    assert "wait for one another: " in capsys.readouterr().err
    assert recipe(tmp_path / "other") == 2
    assert "other_NAME.yaml, found none" in capsys.readouterr().err


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Files in the place of every model and data set of the real recipes."""
    folder = tmp_path_factory.mktemp("hub")
    model = folder / "model"
    write_tokenizer(model)
    write_model(model)
    return write_data(folder) | dict.fromkeys(MODELS, model)


REAL = [name for name in RECIPES if name not in ("arithmetic", "smoke", "smollm2")]


@pytest.mark.parametrize("name", REAL)
def test_a_dry_run_of_a_whole_recipe_needs_neither_its_runs_nor_its_devices(
    name, names, tmp_path, capsys
):
    with_stand_ins(sorted(CONFIGS.glob(f"{name}_*.yaml")), tmp_path / "configs", names)
    assert recipe(tmp_path / "configs" / name, "--runs", tmp_path / "runs", "--dry-run") == 0
    assert not (tmp_path / "runs").exists()
    assert capsys.readouterr().err == "", "no word of devices, either"
    for file in (tmp_path / "configs").glob("*.yaml"):
        file.write_text(
            file.read_text().replace(str(names["Qwen/ProcessBench"]), "./nowhere.jsonl")
        )
    assert recipe(tmp_path / "configs" / name, "--runs", tmp_path / "runs", "--dry-run") == 2
    assert "expected a data file, found nothing at nowhere.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("name", REAL)
def test_evaluation_sets_are_left_out_where_training_data_comes_in(name):
    """Of what any stage that trains has read, near or far."""
    steps = read_recipe(str(CONFIGS / name))
    read = {step.name for step in steps.values() if step.stage in TRAINING}
    while more := {
        source
        for run in read
        for setting, source, _ in steps[run].reads
        if not setting.endswith("exclude") and source not in read
    }:
        read |= more
    entrances = 0
    for run in read:
        tree = yaml.safe_load(steps[run].file.read_text())
        data = tree.get("problems") or tree.get("examples") or {"source": RUNS}
        if not data["source"].startswith(RUNS):
            excluded = {*data["exclude"]}
            wanted = {"HuggingFaceH4/MATH-500", "Qwen/ProcessBench"}
            assert excluded == wanted | ({"RUNS/heldout"} if "heldout" in steps else set())
            entrances += 1
    assert entrances == (2 if name.startswith("qwen") else 1)

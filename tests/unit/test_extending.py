"""The examples of docs/extending.md: each block of code is written into a package, and used."""

import dataclasses
import importlib
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from landlock import needs_landlock
from stepwiser_jax.config_files import load_config
from stepwiser_jax.data.problems import keep_verifiable, read_problems
from stepwiser_jax.plugins import load
from stepwiser_jax.records import JudgeExample
from stepwiser_jax.rl.labels import label_chunks
from stepwiser_jax.rl.rewards import REWARDS, add_rewards, rollout_metrics
from stepwiser_jax.tasks.verifier import Verifier
from tiny import rollout_group

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))


def blocks(section, language):
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.M | re.S)


@pytest.fixture
def settings_of(tmp_path, monkeypatch):
    """A function that writes a section's modules, and returns the settings that name them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(section):
        for block in blocks(section, "python"):
            name = re.match(r"# (\S+)\n", block)
            (tmp_path / name[1]).parent.mkdir(exist_ok=True)
            (tmp_path / name[1]).write_text(block)
        importlib.invalidate_caches()
        (settings,) = map(yaml.safe_load, blocks(section, "yaml"))
        return settings

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
        del sys.modules[name]


def config_with(settings, smoke):
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items() if key != "stage"]
    return load_config(settings["stage"], ROOT / "configs" / f"smoke_{smoke}.yaml", overrides)


def test_examples_are_short():
    for section in SECTIONS:
        assert sum(block.count("\n") for block in blocks(section, "python")) <= 30, section


def test_a_reward(settings_of):
    config = config_with(settings_of("A reward"), "judge")
    reward = load(config.reward, "a reward", REWARDS, config.reward_args)
    example = JudgeExample("e", "p", "q", "", "chunk", True)
    texts = ["\\boxed{ Negative }", "looks fine \\boxed{ Positive }"]
    group = rollout_group([1], [[5, 6, 7], [5, 6, 7, 8]])
    group = dataclasses.replace(group, example=example, texts_G=texts)
    (rewarded,) = add_rewards([group], reward)
    assert rewarded.rewards_G.tolist() == [0, 0.875]
    metrics = rollout_metrics([rewarded])
    assert (metrics["reward_verdict"], metrics["reward_length"]) == (0.5, -0.0625)


def test_a_data_set_and_its_answer_checker(settings_of):
    config = config_with(settings_of("A data set and its answer checker"), "rollouts")
    problems = read_problems(config.problems, verifier=config.verifier)
    assert len(problems) == 5 and problems[0].extra == {"word": "level"}
    dropped = Counter()
    assert keep_verifiable(problems, config.verifier, dropped) == problems and not dropped
    with Verifier(config.verifier, workers=1) as verifier:
        right = verifier.verify(["I think: yes."] * 5, problems)
        assert right == [True, True, False, False, True]
        assert verifier.timeouts == verifier.failures == 0


@needs_landlock
def test_a_file_of_unit_tests(tmp_path):
    (row,) = blocks("A data set and its answer checker", "json")
    (tmp_path / "double.jsonl").write_text(row)
    settings = {"stage": "rollout", "problems": {"source": str(tmp_path / "double.jsonl")}}
    config = config_with(settings | {"verifier": "code"}, "rollouts")
    problems = read_problems(config.problems, verifier=config.verifier)
    with Verifier(config.verifier, workers=1, timeout_seconds=30) as verifier:
        assert verifier.check(problems) == [None]
        code = "```python\ndef double(x):\n    return {} * x\n```"
        answers = [code.format(2), code.format(3)]
        assert verifier.verify(answers, problems * 2) == [True, False]


def test_a_label_rule(settings_of):
    config = config_with(settings_of("A label rule"), "labels")
    values = [0.25, 0.75, 0.875, 0.5]
    assert label_chunks(values, config.rule, **config.rule_args) == [True, None, False]

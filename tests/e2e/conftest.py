"""The smoke configs, run through the command line in this process."""

from pathlib import Path

import pytest

from stepwiser_jax.__main__ import main

CONFIGS = Path(__file__).parents[2] / "configs"
INPUTS = {
    "policy": (),
    "rollouts": ("policy.path=policy",),
    "values": ("policy.path=policy", "rollouts=rollouts"),
    "labels": ("values=values", "rollouts=rollouts", "tokenizer=policy"),
    "cold_start": ("model.path=policy",),
    "rationales": ("judge.path=cold_start", "examples.source=labels"),
    "judge": (
        "model.path=cold_start",
        "examples.source=labels",
        "validation.examples.source=labels",
    ),
    "classifier": (
        "model.path=policy",
        "examples.source=labels",
        "validation.examples.source=labels",
    ),
    "heldout": ("policy.path=policy",),
    "evaluate": ("judge.path=judge", "benchmark.source=heldout"),
    "evaluate_classifier": ("judge.path=classifier", "benchmark.source=heldout"),
    "search": ("policy.path=policy", "judge.path=judge"),
    "select": ("rollouts=rollouts", "tokenizer=policy", "judge.path=judge"),
    "thinkprm_start": ("model.path=policy",),
    "thinkprm_chains": ("judge.path=thinkprm_start", "examples.source=labels"),
    "thinkprm": ("model.path=thinkprm_start", "examples.source=thinkprm_chains"),
    "thinkprm_evaluate": ("judge.path=thinkprm", "benchmark.source=heldout"),
}
STAGE_OF = {
    "policy": "sft",
    "rollouts": "rollout",
    "values": "annotate",
    "labels": "label",
    "cold_start": "sft",
    "rationales": "rejection-sample",
    "judge": "train-judge",
    "classifier": "train-classifier",
    "heldout": "rollout",
    "evaluate": "evaluate",
    "evaluate_classifier": "evaluate",
    "search": "search",
    "select": "select-responses",
    "thinkprm_start": "sft",
    "thinkprm_chains": "rejection-sample",
    "thinkprm": "sft",
    "thinkprm_evaluate": "evaluate",
}


def command(name, runs, *, out=None, extra=()):
    """The arguments that run `name` with its inputs from `runs`."""
    sets = [setting.partition("=") for setting in INPUTS[name]]
    settings = [f"{key}={runs / value}" for key, _, value in sets]
    settings += extra
    arguments = [STAGE_OF[name], "--config", str(CONFIGS / f"smoke_{name}.yaml")]
    arguments += ["--run-dir", str(out or runs / name)]
    return arguments + [word for setting in settings for word in ("--set", setting)]


THINKPRM = ("thinkprm_start", "thinkprm_chains", "thinkprm", "thinkprm_evaluate")
"""Of the slow tests."""


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Every stage, run once."""
    directory = tmp_path_factory.mktemp("runs")
    small = dict.fromkeys(("policy", "cold_start"), ("steps=20",))
    for name in INPUTS:
        if name not in THINKPRM:
            assert main(command(name, directory, extra=small.get(name, ()))) == 0, name
    return directory


@pytest.fixture(scope="session")
def thinkprm_runs(runs):
    """And ThinkPRM's."""
    for name in THINKPRM:
        assert main(command(name, runs)) == 0, name
    return runs

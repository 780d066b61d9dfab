"""Places the runs of one seed and task, and changes the settings of their stages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepwiser_jax.commands.quickstart import policy_and_labels, shared_settings
from stepwiser_jax.config import STAGE_CONFIGS
from stepwiser_jax.manifest import read_run_json
from stepwiser_jax.tasks.arithmetic import MOD_10, ArithmeticTask

Settings = dict[str, Any]
Stage = tuple[str, str, Callable[[], Any]]
"""(directory, stage, settings). Settings are a function: some are read from earlier stages. The
stage `EXAMPLES` is none of the product: it is (file, EXAMPLES, what makes the file's records)."""

EXAMPLES = "examples"


@dataclass(frozen=True)
class SeedRuns:
    """Where the runs of one seed and task are, on which split they are evaluated, and for which
    share of its steps every judge is trained."""

    run_dir: Path
    seed: int
    task: ArithmeticTask = MOD_10
    split: str = "test"
    share_of_steps: float = 1.0

    def at(self, name: str) -> str:
        return str(self.run_dir / name)

    def steps(self, of_a_whole_training: int) -> int:
        return round(self.share_of_steps * of_a_whole_training)

    def summary(self, name: str) -> dict[str, Any]:
        return read_run_json(self.run_dir / name, "summary.json")

    def chosen(self, rationales: str) -> int:
        return self.summary(rationales)["chosen"]

    def stage(self, name: str, stage: str, settings: Settings | Callable[[], Settings]) -> Stage:
        """Returns a stage with the seed, no chat templates, and a shared cache of programs."""

        def resolved() -> Settings:
            tree = settings() if callable(settings) else settings
            if "compilation_cache" in STAGE_CONFIGS[stage].model_fields:
                tree = {"compilation_cache": str(self.run_dir.parent / "compiled")} | tree
            return shared_settings(stage, self.seed) | of_task(tree, self.task)

        return name, stage, resolved


def of_task(tree: Settings, task: ArithmeticTask) -> Settings:
    """Returns settings of the quickstart with another task's problems and demonstrations."""

    def renamed(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return of_task(value, task)
        is_generated = key == "source" and value.split("-")[0] == MOD_10.name
        return value.replace(MOD_10.name, task.name, 1) if is_generated else value

    return {key: renamed(key, value) for key, value in tree.items()}


def changed(tree: Settings, **changes: Any) -> Settings:
    """Returns a copy with other values. `grpo__clip_eps_high=0.2` sets a value in a group."""
    tree = copy.deepcopy(tree)
    for key, value in changes.items():
        *groups, last = key.split("__")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return tree


def shared_stages(runs: SeedRuns) -> dict[str, tuple[str, Settings]]:
    """Returns the quickstart's stages up to the labels, by directory."""
    stages = policy_and_labels(runs.run_dir, runs.seed)
    return {name: (stage, tree) for name, stage, tree in stages}

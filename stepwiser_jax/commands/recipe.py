"""`stepwiser recipe`: checks configs that belong together, and prints them in the order of runs.

PREFIX_NAME.yaml names its `stage` and writes the run RUNS/NAME. `RUNS/OTHER` in one of its settings
is what PREFIX_OTHER.yaml writes, and must be what the setting reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from stepwiser_jax.commands.dry_run import check_inputs
from stepwiser_jax.config import Mesh, Stage
from stepwiser_jax.config_files import RUNS, load_config
from stepwiser_jax.errors import UserError
from stepwiser_jax.yaml_files import read_mapping

TRAINING = ("sft", "train-judge", "train-classifier")
READS = {
    "model.path": TRAINING,
    "policy.path": ("sft",),
    "teacher.path": TRAINING,
    "judge.path": ("sft", "train-judge"),
    "tokenizer": TRAINING,
    "examples.source": ("chunk-solutions", "select-responses", "rejection-sample"),
    "problems.source": ("rollout",),
    "problems.exclude": ("rollout",),
    "examples.exclude": ("rollout",),
    "validation.examples.source": ("chunk-solutions", "select-responses", "rejection-sample"),
    "validation.examples.exclude": ("rollout",),
    "rollouts": ("rollout",),
    "values": ("annotate",),
    "benchmark.source": ("rollout",),
}
"""The stages whose runs a setting may name."""


def readable(tree: dict[str, Any], setting: str) -> tuple[str, ...]:
    """Returns the stages whose runs a setting of a config may name."""
    if setting.endswith("examples.source") and tree["stage"] != "sft":
        return ("label",)
    if setting == "judge.path" and tree["judge"].get("kind") == "classifier":
        return ("train-classifier",)
    return READS.get(setting, ())


@dataclasses.dataclass(frozen=True)
class Step:
    """A config of a recipe.

    Attributes:
        name: The name of its run.
        stage: Its stage.
        file: Where it is.
        reads: For every setting that names a run: the setting, the name of that run, and the stages
            that it may be of.
    """

    name: str
    stage: str
    file: Path
    reads: list[tuple[str, str, tuple[str, ...]]]


def print_recipe(prefix: str, runs: Path, *, dry_run: bool = False) -> None:
    """Prints the commands of a recipe. Raises UserError if its configs do not chain. With `dry_run`
    it also raises what the dry run of each stage would raise for its models, its data and those
    input runs that are finished."""
    steps = ordered(read_recipe(prefix))
    for step in steps:
        run_dir = runs / step.name
        config = load_config(step.stage, step.file, run_dir=run_dir)
        if dry_run:
            check_step(step, config, runs)
        finished = "   # finished" if is_finished(run_dir) else ""
        print(f"stepwiser {step.stage} --config {step.file} --run-dir {run_dir}{finished}")


def read_recipe(prefix: str) -> dict[str, Step]:
    """Returns the steps by name. Raises UserError if there is none, or one names no stage."""
    folder, start = Path(prefix).parent, Path(prefix).name
    steps = {}
    for file in sorted(folder.glob(f"{start}_*.yaml")):
        tree = read_mapping(file, "settings")
        if "stage" not in tree:
            raise UserError(f"{file}: a config of a recipe names its stage, such as `stage: sft`")
        name = file.stem.removeprefix(f"{start}_")
        reads = [(setting, run, readable(tree, setting)) for setting, run in runs_named(tree)]
        steps[name] = Step(name, tree["stage"], file, reads)
    if not steps:
        raise UserError(f"expected configs {prefix}_NAME.yaml, found none")
    return steps


def runs_named(value: Any, setting: str = "") -> Iterator[tuple[str, str]]:
    """Yields (setting, NAME) for every value RUNS/NAME."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from runs_named(part, f"{setting}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for part in value:
            yield from runs_named(part, setting)
    elif isinstance(value, str) and value.startswith(RUNS):
        yield setting, value.removeprefix(RUNS)


def ordered(steps: dict[str, Step]) -> list[Step]:
    """Returns the steps, each after those that it reads. Raises UserError if a setting names a run
    that no step writes, or one of a stage that it does not read, or if steps wait for one
    another."""
    for step in steps.values():
        for setting, name, wanted in step.reads:
            found = f"a run of {steps[name].stage}" if name in steps else "no config of that name"
            if name not in steps or steps[name].stage not in wanted:
                raise UserError(
                    f"{step.file}: {setting} is RUNS/{name}: expected a run of "
                    f"{' or '.join(wanted) or 'no stage'}, found {found}"
                )
    order = TopologicalSorter({s.name: [name for _, name, _ in s.reads] for s in steps.values()})
    try:
        return [steps[name] for name in order.static_order()]
    except CycleError as error:
        raise UserError(f"these wait for one another: {' <- '.join(error.args[1])}") from None


def is_finished(run_dir: Path) -> bool:
    return (run_dir / "manifest.json").is_file()


def check_step(step: Step, config: Stage, runs: Path) -> None:
    """Checks what a step reads as its stage's dry run does. It leaves out devices, which are
    elsewhere, and runs that are still to come, which other steps write."""
    awaited = {str(runs / name) for _, name, _ in step.reads if not is_finished(runs / name)}
    meshes = {"mesh", "sampling_mesh"} & type(config).model_fields.keys()
    config = config.model_copy(update=dict.fromkeys(meshes, Mesh()))
    try:
        check_inputs(step.stage, config, runs / step.name, awaited)
    except UserError as error:
        raise UserError(f"{step.file}: {error}") from None

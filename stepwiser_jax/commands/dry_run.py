"""`--dry-run`: checks all that can be checked without sampling or training, and writes nothing."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

from stepwiser_jax import plugins
from stepwiser_jax.config import (
    Asked,
    Config,
    DataSource,
    FromExamples,
    Model,
    RejectionSample,
    Sft,
    Stage,
    TeacherServer,
    TrainClassifier,
    TrainJudge,
    Validation,
)
from stepwiser_jax.data.datasets import (
    load_benchmark,
    load_classifier_examples,
    load_judge_examples,
)
from stepwiser_jax.data.demonstrations import load_demonstrations
from stepwiser_jax.data.held_out import held_out_questions
from stepwiser_jax.data.problems import read_problems
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import ClassifierExample, JudgeExample, PrefixValue, Trajectory
from stepwiser_jax.rl.rewards import REWARDS
from stepwiser_jax.runs.checkpoint_paths import check_model_exists, load_tokenizer_of
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.text.tokenizer import load_tokenizer

RUN_RECORDS = {"rollouts": Trajectory, "values": PrefixValue}
"""The records of a run that a setting names."""


def check_inputs(
    stage: str, config: Stage, run_dir: Path, awaited: Collection[str] = frozenset()
) -> None:
    """Raises the UserError that the run itself would raise for its directory or its inputs.

    Inputs are models, finished runs, problems, examples, benchmarks and evaluation sets. Devices
    that are missing here give a warning, since the run may be meant for another machine.

    Args:
        stage: The name of the stage.
        config: Its settings.
        run_dir: The directory of the run.
        awaited: Runs that are still to come; settings that name them are not checked.
    """
    RunDirectory(run_dir, stage, config)
    for name, value in config:
        if _is_awaited(value, awaited):
            continue
        if isinstance(value, Model):
            check_model_exists(value.path)
            load_tokenizer_of(value.path, **value.asked)
        elif isinstance(value, TeacherServer):
            load_tokenizer(value.tokenizer, **value.asked)
        elif isinstance(value, DataSource | Validation):
            data = value.examples if isinstance(value, Validation) else value
            exclude = tuple(source for source in data.exclude if source not in awaited)
            _check_data(name, config, data.model_copy(update={"exclude": exclude}))
        elif name == "reward" and isinstance(config, TrainJudge):
            plugins.load(value, "a reward", REWARDS, config.reward_args)
        elif name in RUN_RECORDS:
            read_records(value, RUN_RECORDS[name])
        elif name == "tokenizer":
            load_tokenizer_of(value, **(config.asked if isinstance(config, Asked) else {}))
    for mesh in (getattr(config, name, None) for name in ("mesh", "sampling_mesh")):
        try:
            if mesh is not None:
                make_mesh(**mesh.model_dump())
        except UserError as error:
            print(f"warning: {error}, or run it where they are", file=sys.stderr)


def _is_awaited(value: object, awaited: Collection[str]) -> bool:
    """Returns whether a setting, or a group of them, names a run that is still to come."""
    if isinstance(value, Config):
        return any(_is_awaited(part, awaited) for _, part in value)
    return isinstance(value, str) and value in awaited


def _check_data(name: str, config: Stage, data: DataSource) -> None:
    """Reads the data of a setting as the stage does."""
    is_run = Path(data.source).is_dir()
    if name == "problems":
        read_problems(data)
    elif name == "benchmark" and is_run:
        read_records(data.source, Trajectory)
    elif name == "benchmark":
        load_benchmark(data.source, split=data.split, on_malformed=data.on_malformed)
    elif isinstance(config, Sft):
        load_demonstrations(data, config.prompt_style)
    elif isinstance(config, FromExamples):
        of_solutions = isinstance(config, RejectionSample) and config.of_solutions
        if of_solutions or isinstance(config, TrainClassifier):
            record_type, load = ClassifierExample, load_classifier_examples
        else:
            record_type, load = JudgeExample, load_judge_examples
        if is_run:
            read_records(data.source, record_type)
        else:
            load(data.source, on_malformed=data.on_malformed)
        held_out_questions(data.exclude)

"""`--dry-run`: everything that can be checked without sampling or training, and nothing written."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from stepwiser_jax.config import (
    Classify,
    Config,
    Evaluate,
    Model,
    Problems,
    RejectionSample,
    Server,
    Sft,
    TrainClassifier,
    TrainJudge,
)
from stepwiser_jax.data.datasets import (
    load_benchmark,
    load_classifier_examples,
    load_judge_examples,
)
from stepwiser_jax.data.demonstrations import load_demonstrations
from stepwiser_jax.data.held_out import held_out_questions
from stepwiser_jax.data.problems import read_problems
from stepwiser_jax.distributed.loading import check_model_exists, load_tokenizer_of
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.plugins import load
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import ClassifierExample, JudgeExample, PrefixValue, Trajectory
from stepwiser_jax.rl.rewards import REWARDS
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.text.tokenizer import load_tokenizer

RECORDS_OF = {
    "rollouts": Trajectory,
    "annotations": PrefixValue,
    "examples": JudgeExample,
    "items": Trajectory,
}
"""What the run that a setting names must hold."""


def reads_solutions(config: Config) -> bool:
    """Whether its examples are whole solutions, not chunks."""
    of_solutions = isinstance(config, RejectionSample) and config.of_solutions
    return of_solutions or isinstance(config, TrainClassifier)


def names_awaited(value: Any, awaited: Collection[str]) -> bool:
    """Whether a setting, or a group of them, names a run that is still to come."""
    if isinstance(value, Config):
        return any(names_awaited(part, awaited) for _, part in value)
    return isinstance(value, str) and value in awaited


def check_inputs(
    stage: str, config: Config, run_dir: Path, awaited: Collection[str] = frozenset()
) -> None:
    """Raises the UserError that the run itself would raise for its directory, a model that is not
    there, an input run that is unfinished, damaged or holds other records, or problems,
    demonstrations, examples, items or evaluation sets that cannot be read. Settings that name runs
    which are `awaited` are left unchecked. Devices that are not here are a warning: it may be
    somewhere else that the run finds them."""
    RunDirectory(run_dir, stage, config)
    for name, value in config:
        if names_awaited(value, awaited):
            continue
        if isinstance(value, Model):
            check_model_exists(value.path)
            load_tokenizer_of(value.path, value.chat_template_args)
        elif isinstance(value, Problems):
            exclude = tuple(source for source in value.exclude if source not in awaited)
            read_problems(value.model_copy(update={"exclude": exclude}))
        elif name == "data" and isinstance(config, Sft):
            load_demonstrations(config.data, config.prompt_style)
        elif name == "reward" and isinstance(config, TrainJudge):
            load(value, "a reward", REWARDS, config.reward_args)
        elif name in RECORDS_OF and (name in ("rollouts", "annotations") or Path(value).is_dir()):
            wanted = RECORDS_OF[name]
            if name == "examples" and reads_solutions(config):
                wanted = ClassifierExample
            read_records(value, wanted)
        elif name == "examples" and isinstance(
            config, TrainJudge | RejectionSample | TrainClassifier
        ):
            read = load_classifier_examples if reads_solutions(config) else load_judge_examples
            read(value, on_malformed=config.on_malformed)
        elif name == "items" and isinstance(config, Evaluate | Classify):
            load_benchmark(value, split=config.split, on_malformed=config.on_malformed)
        elif name == "exclude":
            held_out_questions(source for source in value if source not in awaited)
        elif name == "tokenizer":
            load_tokenizer_of(value, getattr(config, "chat_template_args", None))
        elif isinstance(value, Server):
            load_tokenizer(value.tokenizer, value.chat_template_args)
    try:
        for mesh in (getattr(config, name, None) for name in ("mesh", "sampling_mesh")):
            if mesh is not None:
                make_mesh(**mesh.model_dump())
    except UserError as error:
        print(f"warning: {error}, or run it where they are", file=sys.stderr)

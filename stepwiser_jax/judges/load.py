"""Makes the judge that a config names."""

from __future__ import annotations

from typing import Any

import jax

from stepwiser_jax import plugins
from stepwiser_jax.config import (
    ClassifierJudge,
    GenPrmJudge,
    OwnJudge,
    StepwiserJudge,
    ThinkPrmJudge,
)
from stepwiser_jax.distributed.loading import load_for_decoding, load_model
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.judges.base import Judge
from stepwiser_jax.judges.classifier import Classifier
from stepwiser_jax.judges.genprm import judge as genprm
from stepwiser_jax.judges.stepwiser import ChunkJudge
from stepwiser_jax.judges.thinkprm import ThinkPrmVerifier


def load_judge(
    config: StepwiserJudge | ThinkPrmJudge | ClassifierJudge | GenPrmJudge | OwnJudge,
    *,
    mesh: jax.sharding.Mesh,
    seed: int,
    name: str = "judge",
) -> Judge:
    """Returns the judge that the settings describe, with its model loaded.

    Args:
        config: The settings.
        mesh: The devices.
        seed: Decides what is sampled.
        name: Begins the ids of sampled rows, so that judges of different stages draw differently.
    """
    if isinstance(config, OwnJudge):
        return plugins.load(config.kind, "a judge")(config, mesh=mesh, seed=seed, name=name)
    load_args = {**config.load_args, "mesh": mesh, "seed": seed}
    if isinstance(config, ClassifierJudge):
        return Classifier(
            load_model(**load_args, classifier=True),
            mesh,
            rows=config.rows,
            max_length=config.max_length,
            prompt_style=config.prompt_style,
            threshold=0.5 if config.threshold is None else config.threshold,
        )
    loaded = load_for_decoding(**load_args, weights=config.engine.weights)
    engine = Engine(loaded.model, loaded.tokenizer, mesh=mesh, **config.engine.model_dump())
    settings: dict[str, Any] = {
        "name": name,
        "prompt_style": config.prompt_style,
        "max_new_tokens": config.sampling.max_new_tokens,
        "key": jax.random.key(seed),
        "votes": config.votes,
        "vote_temperature": config.sampling.temperature,
    }
    if isinstance(config, GenPrmJudge):
        return genprm.GenPrmCritic(loaded, engine, code_rounds=config.code_rounds, **settings)
    if isinstance(config, ThinkPrmJudge):
        return ThinkPrmVerifier(loaded, engine, rounds=config.rounds, **settings)
    return ChunkJudge(loaded, engine, **settings)

"""Makes the judge that a config names."""

from __future__ import annotations

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
from stepwiser_jax.judges.genprm.judge import GenPrmCritic
from stepwiser_jax.judges.stepwiser import ChunkJudge
from stepwiser_jax.judges.thinkprm import ThinkPrmVerifier
from stepwiser_jax.judges.writer import Writer


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
        return Classifier(load_model(**load_args, classifier=True), mesh, config)
    loaded = load_for_decoding(**load_args, weights=config.engine.weights)
    engine = Engine(loaded.model, loaded.tokenizer, mesh=mesh, **config.engine.model_dump())
    style, votes = config.prompt_style, config.votes
    writer = Writer(loaded, engine, config.sampling, style, seed=seed, name=name, votes=votes)
    if isinstance(config, GenPrmJudge):
        return GenPrmCritic(writer, code_rounds=config.code_rounds)
    if isinstance(config, ThinkPrmJudge):
        return ThinkPrmVerifier(writer, rounds=config.rounds)
    return ChunkJudge(writer, threshold=config.threshold)

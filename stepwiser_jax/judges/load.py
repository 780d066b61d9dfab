"""Loads the judge that settings name."""

from __future__ import annotations

from typing import Any

import jax

from stepwiser_jax.config import (
    ClassifierJudge,
    GenPrmJudge,
    StepwiserJudge,
    ThinkPrmJudge,
)
from stepwiser_jax.distributed.loading import load_for_decoding, load_model
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.judges import genprm, thinkprm
from stepwiser_jax.judges.classifier import Scorer
from stepwiser_jax.judges.stepwiser import ChunkJudge


def load_judge(
    config: StepwiserJudge | ThinkPrmJudge | ClassifierJudge | GenPrmJudge,
    *,
    mesh: jax.sharding.Mesh,
    seed: int,
    name: str = "judge",
) -> Any:
    """Returns a judge of the kind that the settings are for, its model loaded.

    Args:
        config: The settings.
        mesh: The devices.
        seed: Decides what is sampled.
        name: Names the draws, so that judges of different stages draw differently.
    """
    load_args = {**config.load_args, "mesh": mesh, "seed": seed}
    if isinstance(config, ClassifierJudge):
        return Scorer(
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
    }
    if isinstance(config, GenPrmJudge):
        return genprm.GenPrmJudge(loaded, engine, code_rounds=config.code_rounds, **settings)
    settings |= {"votes": config.votes, "vote_temperature": config.sampling.temperature}
    if isinstance(config, ThinkPrmJudge):
        return thinkprm.ThinkPrmJudge(loaded, engine, rounds=config.rounds, **settings)
    return ChunkJudge(loaded, engine, **settings)

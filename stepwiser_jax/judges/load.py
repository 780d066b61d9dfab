"""Settings -> a judge of chunks: one that reasons, in StepWiser's form or ThinkPRM's, or a
classifier."""

from __future__ import annotations

import jax

from stepwiser_jax.config import ClassifierJudge, GenerativeJudge, Model
from stepwiser_jax.distributed.loading import load_for_decoding, load_model
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.judges.classifier import Scorer
from stepwiser_jax.judges.stepwiser import ChunkJudge, SolutionJudge
from stepwiser_jax.judges.thinkprm import ThinkPrmJudge


def load_judge(
    config: GenerativeJudge | ClassifierJudge, *, mesh: jax.sharding.Mesh, seed: int
) -> SolutionJudge:
    """The model, loaded, with its compiled shapes."""
    path = config.model_dump(include=set(Model.model_fields))
    settings = config.model_dump(exclude={*Model.model_fields, "engine", "thinkprm"})
    if isinstance(config, ClassifierJudge):
        return Scorer(load_model(**path, mesh=mesh, seed=seed, classifier=True), mesh, **settings)
    loaded = load_for_decoding(**path, weights=config.engine.weights, mesh=mesh, seed=seed)
    engine = Engine(loaded.model, loaded.tokenizer, mesh=mesh, **config.engine.model_dump())
    settings |= {"name": "judge", "key": jax.random.key(seed)}
    if config.thinkprm is not None:
        return ThinkPrmJudge(loaded, engine, rounds=config.thinkprm.rounds, **settings)
    return ChunkJudge(loaded, engine, **settings)

"""StepWiser (arXiv 2508.19229) in JAX: judges that reason about chunks of thought.

Public names are imported when they are first used. Importing the package imports neither jax nor
anything else, so worker processes start fast.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from typing import Any

# transformers warns at its first import that there is no PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_HOME = {
    "Checker": "judges.check",
    "CheckedSolution": "judges.check",
    "load_hf": "model.hf",
    "save_hf": "model.hf",
    "load_model": "distributed.loading",
    "Loaded": "distributed.loading",
    "make_mesh": "distributed.mesh",
    "shard_batch": "distributed.mesh",
    "Transformer": "model.transformer",
    "ModelConfig": "model.config",
    "load_tokenizer": "text.tokenizer",
    "Tokenizer": "text.tokenizer",
    "ChunkSampler": "inference.chunk_sampler",
    "SamplingParams": "inference.params",
    "Completion": "inference.params",
    "Engine": "inference.engine",
    "Prefix": "inference.params",
    "SampleRequest": "inference.params",
    "estimate_prefix_values": "rl.values",
    "search_chunks": "search.chunk_search",
    "Policy": "search.chunk_search",
    "Solution": "judges.base",
    "ChunkJudgment": "judges.base",
    "chunk_reset": "search.methods",
    "beam_search": "search.methods",
    "dvts": "search.methods",
    "label_chunks": "rl.labels",
    "LABEL_RULES": "rl.labels",
    "RolloutSampler": "rl.rollouts",
    "RolloutGroup": "rl.rollouts",
    "RolloutBatch": "rl.rollouts",
    "add_rewards": "rl.rewards",
    "pack_groups": "rl.rollouts",
    "make_objective": "rl.grpo",
    "create_train_state": "training.step",
    "make_train_step": "training.step",
    "TrainState": "training.step",
    "EngineShapes": "config",
    "Grpo": "config",
    "group_advantages": "rl.grpo",
    "grpo_loss": "rl.grpo",
    "token_logprobs": "rl.logprobs",
    "processbench_f1": "evaluation.processbench",
    "render_judge_prompt": "text.prompts",
    "parse_verdict": "text.prompts",
    "is_equivalent": "tasks.mathematics",
    "extract_answer": "tasks.mathematics",
    "load_solutions": "data.datasets",
    "run_stage": "stages",
    "load_config": "config_files",
    "dump_config": "config_files",
    "read_records": "record_io",
    "write_records": "record_lines",
    "UserError": "errors",
    "Problem": "records",
    "Trajectory": "records",
    "SftExample": "records",
    "PrefixValue": "records",
    "ChunkLabel": "records",
    "JudgeExample": "records",
    "Judgment": "records",
    "LabelledSolution": "records",
    "PrmBenchItem": "records",
    "ProcessBenchItem": "records",
    "SearchResult": "records",
    "Verdict": "records",
}

__all__ = sorted(_HOME)  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("stepwiser-jax")
    if name not in _HOME:
        raise AttributeError(f"module 'stepwiser_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"stepwiser_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)

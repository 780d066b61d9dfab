"""Writes the records of runs as parquet with a dataset card, for `datasets.load_dataset`.

    <output>/README.md                     the card; its head names each part and its file
    <output>/<run>_<records>.parquet       the records of one type of one run, a row each

Nested fields stay nested. A trajectory has the texts of its chunks, and its token ids and log-probs
if they are asked for. `extra` of a problem, whose columns differ from problem to problem, is JSON.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from stepwiser_jax.config_files import read_run_settings
from stepwiser_jax.errors import UserError
from stepwiser_jax.manifest import read_manifest, read_run_json
from stepwiser_jax.record_io import KIND, stream_records
from stepwiser_jax.record_lines import to_json
from stepwiser_jax.records import Problem, Record, Trajectory
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.text.chunks import chunk_texts
from stepwiser_jax.text.tokenizer import Tokenizer

TYPES = {kind: record_type for record_type, kind in KIND.items()}

LIMITS = """
## Before you use it

- Texts of models may be wrong. Values are shares of a few rollouts, with chance in them.
- Keep benchmarks out of training: `problems.source` says where each problem is from.
- The licences of the problems, and of the model that wrote the solutions, hold: add yours here.
"""

NUMBERS = ("accuracy", "positive_share", "judge_positive_share", "labels", "teach_nothing")
"""What of a summary the card tells of the run's records."""


def export_dataset(run_dirs: Sequence[Path], output: Path, *, tokens: bool) -> list[str]:
    """Writes the records of finished runs.

    Args:
        run_dirs: The runs; their names must differ.
        output: A new directory.
        tokens: Whether trajectories keep token ids and log-probs.

    Returns:
        The names of the parts.

    Raises:
        UserError: A run is not finished, holds no records or has the name of another; or `output`
            exists.
    """
    from datasets import Dataset, disable_progress_bars

    runs = {run_dir.resolve().name: run_dir for run_dir in run_dirs}
    if len(runs) < len(run_dirs):
        raise UserError(
            f"expected runs with different names, found {', '.join(map(str, run_dirs))}"
        )
    if output.exists():
        raise UserError(f"{output} exists: name a new directory")
    held = {name: read_manifest(run_dir)["records"] for name, run_dir in runs.items()}
    if empty := [name for name, kinds in held.items() if not kinds]:
        raise UserError(f"expected runs that made records, found {', '.join(empty)} without any")
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    parts = {}
    disable_progress_bars()
    for name, run_dir in runs.items():
        for kind in sorted(held[name]):
            part = f"{name}_{kind}"
            rows = list(rows_of(run_dir, TYPES[kind], tokens=tokens))
            Dataset.from_list(rows).to_parquet(temporary / f"{part}.parquet")
            parts[part] = len(rows)
    (temporary / "README.md").write_text(dataset_card(runs, parts), encoding="utf-8")
    temporary.rename(output)
    return list(parts)


def rows_of(run_dir: Path, record_type: type[Record], *, tokens: bool) -> Iterator[dict[str, Any]]:
    """Yields the fields of each record, as JSON has them."""
    tokenizer = None
    if record_type is Trajectory:
        policy = read_run_settings(run_dir)["policy"]
        tokenizer = load_tokenizer_of(policy["path"])
    for record in stream_records(run_dir, record_type):
        if isinstance(record, Trajectory):
            assert tokenizer is not None
            yield fields_of_trajectory(record, tokenizer, tokens=tokens)
        else:
            fields = json.loads(to_json(record))
            if isinstance(record, Problem):
                fields["extra"] = json.dumps(fields["extra"], ensure_ascii=False)
            yield fields


def fields_of_trajectory(
    trajectory: Trajectory, tokenizer: Tokenizer, *, tokens: bool
) -> dict[str, Any]:
    arrays = trajectory.tokens.read()
    fields = {
        "trajectory_id": trajectory.trajectory_id,
        "problem_id": trajectory.problem_id,
        "policy_id": trajectory.policy_id,
        "chunks": list(chunk_texts(tokenizer, arrays.completion_ids, trajectory.chunk_ends)),
        "num_tokens": arrays.num_completion,
        "stop_reason": trajectory.stop_reason,
        "is_correct": trajectory.is_correct,
    }
    if tokens:
        fields |= {
            "prompt_ids": arrays.prompt_ids.tolist(),
            "completion_ids": arrays.completion_ids.tolist(),
            "logprobs": arrays.logprobs.tolist(),
            "chunk_ends": list(trajectory.chunk_ends),
        }
    return fields


def dataset_card(runs: dict[str, Path], parts: dict[str, int]) -> str:
    """Returns README.md: what loads the parts, and how each run was made."""
    head = {
        "configs": [{"config_name": part, "data_files": f"{part}.parquet"} for part in parts],
        "tags": ["stepwiser", "process-supervision"],
    }
    text = f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# Records of stepwiser_jax\n\n"
    text += "Made by [StepWiser](https://arxiv.org/abs/2508.19229) in JAX. Load a part by name:\n\n"
    text += f'```python\ndatasets.load_dataset(PATH, "{next(iter(parts))}", split="train")\n```\n\n'
    text += "| part | rows |\n|---|---|\n"
    text += "".join(f"| `{part}` | {rows} |\n" for part, rows in parts.items())
    for name, run_dir in runs.items():
        settings = read_run_settings(run_dir)
        summary = read_run_json(run_dir, "summary.json")
        found = {key: summary[key] for key in NUMBERS if key in summary}
        text += f"\n## {name}\n\nA run of `{read_manifest(run_dir)['stage']}`."
        if found:
            text += " " + ", ".join(f"{key}: {value:g}" for key, value in found.items()) + "."
        text += f" Its settings:\n\n```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```\n"
    return text + LIMITS

"""The whole 1.5B recipe, every stage as shipped but for its sizes, on a model that has more logits
than its tokenizer has ids, as Qwen's have."""

import json
from pathlib import Path

import pytest
import yaml
from stand_ins import MODELS, teacher, with_stand_ins, write_data, write_model, write_tokenizer

from stepwiser_jax.__main__ import main
from stepwiser_jax.commands.recipe import ordered, read_recipe

from .conftest import CONFIGS

RECIPE = "qwen2.5-1.5b"
SMALL = {
    "mesh": {},
    "sampling_mesh": None,
    "engine": {"rows": [16], "buckets": [512]},
    "sampling": {"max_new_tokens": 48},
    "max_chunk_tokens": 24,
    "group_size": 4,
    "num_rollouts": 4,
    "max_problems": 6,
    "num_segmentations": 2,
    "iterations": 2,
    "prompts_per_iteration": 4,
    "updates_per_iteration": 2,
    "max_prompt_tokens": 400,
    "row_lengths": [640],
    "epochs": 1,
    "batch_size": 4,
    "max_length": 512,
    "rows": 2,
    "samples": 2,
    "max_attempts": 2,
    "limit": 12,
    "checkpoint_every": 1,
}
"""In the place of a config's own settings of these names, wherever they stand."""


def small(tree):
    if isinstance(tree, list):
        return [small(part) for part in tree]
    if not isinstance(tree, dict):
        return tree
    changed = {}
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(SMALL.get(key), dict):
            changed[key] = (value | SMALL[key]) if key != "mesh" else {}
        else:
            changed[key] = SMALL[key] if key in SMALL else small(value)
    return changed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "ids", "logits"), [("qwen2", 151_665, 151_936), ("qwen3", 151_669, 151_936)]
)
def test_the_recipe_runs_with_the_sizes_of_real_vocabularies(tmp_path, capsys, family, ids, logits):
    model, configs, runs = tmp_path / "model", tmp_path / "configs", tmp_path / "runs"
    write_tokenizer(model, ids)
    write_model(model, family=family, vocab_size=logits)
    names = write_data(tmp_path) | dict.fromkeys(MODELS, model)
    with_stand_ins(sorted(CONFIGS.glob(f"{RECIPE}_*.yaml")), configs, names)
    with teacher(model) as url:
        for step in ordered(read_recipe(str(configs / RECIPE))):
            tree = small(yaml.safe_load(step.file.read_text()))
            if step.stage == "chunk-solutions":
                tree["teacher"]["url"] = url
            elif step.stage != "label":
                tree["compilation_cache"] = str(tmp_path / "compiled")
            step.file.write_text(yaml.safe_dump(tree))
            arguments = ["--config", str(step.file), "--run-dir", str(runs / step.name)]
            assert main([step.stage, *arguments]) == 0, (step.name, capsys.readouterr().err)
    labels = json.loads((runs / "labels" / "summary.json").read_text())
    assert 0 < labels["positive_share"] < 1 and labels["judge_positive_share"] == 0.5
    evaluated = json.loads((runs / "evaluate" / "summary.json").read_text())
    assert set(evaluated["greedy"]["subsets"]) == {"gsm8k", "math", "olympiadbench", "omnimath"}
    assert Path(runs / "selected" / "model" / "config.json").is_file()

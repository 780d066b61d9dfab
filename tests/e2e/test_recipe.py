"""The whole 1.5B recipe, every stage as shipped but for its sizes, on models that have more logits
than their tokenizers have ids, as Qwen's have."""

import json
import re

import pytest
import yaml
from stand_ins import MODELS, teacher, with_stand_ins, write_data, write_model, write_tokenizer

from stepwiser_jax.__main__ import main
from stepwiser_jax.commands.recipe import ordered, read_recipe

from .conftest import CONFIGS

RECIPE = "qwen2.5-1.5b"
IDS, LOGITS = {"qwen2": 151_665, "qwen3": 151_669}, 151_936
JUDGES = {"judge", "classifier", "rationales", "offline"}
"""What begins with a judge, a Qwen3 with a vocabulary of its own. The policy is a Qwen2."""
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
def test_the_recipe_runs_with_the_sizes_of_real_vocabularies(tmp_path, capsys):
    configs, runs = tmp_path / "configs", tmp_path / "runs"
    for family, ids in IDS.items():
        write_tokenizer(tmp_path / family, ids)
        write_model(tmp_path / family, family=family, vocab_size=LOGITS)
    data = write_data(tmp_path)
    for file in CONFIGS.glob(f"{RECIPE}_*.yaml"):
        family = "qwen3" if file.stem.removeprefix(f"{RECIPE}_") in JUDGES else "qwen2"
        with_stand_ins([file], configs, data | dict.fromkeys(MODELS, tmp_path / family))
    with teacher(tmp_path / "qwen2") as url:
        for step in ordered(read_recipe(str(configs / RECIPE))):
            tree = small(yaml.safe_load(step.file.read_text()))
            if "validation" in tree:
                tree["validation"]["examples"]["limit"] = 2  # one of some 6 problems
            if step.stage == "chunk-solutions":
                tree["teacher"]["url"] = url
            step.file.write_text(yaml.safe_dump(tree))
            arguments = ["--config", str(step.file), "--run-dir", str(runs / step.name)]
            assert main([step.stage, *arguments]) == 0, (step.name, capsys.readouterr().err)
    said = capsys.readouterr().err
    for stage in ("sft", "train-judge", "train-classifier"):
        assert re.search(rf"{stage}: \d+ examples validate; \d+ examples of their problems", said)
    labels = json.loads((runs / "labels" / "summary.json").read_text())
    assert 0 < labels["positive_share"] < 1 and labels["judge_positive_share"] == 0.5
    evaluated = json.loads((runs / "evaluate" / "summary.json").read_text())
    assert set(evaluated["greedy"]["subsets"]) == {"gsm8k", "math", "olympiadbench", "omnimath"}
    for run, family in (("selected", "qwen2"), ("judge", "qwen3"), ("classifier", "qwen3")):
        exported = json.loads((runs / run / "model" / "config.json").read_text())
        assert (exported["model_type"], exported["vocab_size"]) == (family, LOGITS)

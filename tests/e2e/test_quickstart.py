"""The quickstart end to end on a recipe cut to seconds: the documented numbers are there, and a
second run finds everything done."""

import json
import runpy
from pathlib import Path

import pytest

from stepwiser_jax.__main__ import main
from stepwiser_jax.commands import quickstart

TABLE = Path(__file__).parents[2] / "docs" / "make_quickstart_table.py"
CUT = {
    "policy": {"steps": 20},
    "rollouts": {"group_size": 2},
    "values": {"num_rollouts": 2, "limit": 12, "drop_uniform_problems": False},
    "labels": {"balance": False, "min_prefix_value": 0.0, "dead_prefix": "negative"},
    "cold_start": {"steps": 20},  # as many as the policy's, which gives the same program
    "judge": {"iterations": 2, "prompts_per_iteration": 8, "row_lengths": [416]},
}


def in_few_rows(tree):
    """The settings with one small grid for every model."""
    if not isinstance(tree, dict):
        return tree
    return {
        key: value | {"rows": [32]} if key == "engine" else in_few_rows(value)
        for key, value in tree.items()
    }


@pytest.mark.slow
def test_quickstart_writes_every_number_and_is_not_done_twice(tmp_path, monkeypatch, capsys):
    whole = quickstart.recipe

    def cut(run_dir, seed, *, problems, split):
        stages = whole(run_dir, seed, problems=12, split=split)
        for _, _, tree in stages:
            if tree.get("problems", {}).get("split") == "rollout":
                tree["problems"] = tree["problems"] | {"limit": 12}
            if "limit" in tree.get("examples", {}):
                tree["examples"] = tree["examples"] | {"limit": 200}
        return [
            (name, stage, in_few_rows(tree) | CUT.get(name, {})) for name, stage, tree in stages
        ]

    monkeypatch.setattr(quickstart, "recipe", cut)
    arguments = ["quickstart", "--run-dir", str(tmp_path / "q"), "--seed", "3"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "labels (label), stage 4 of 10" in printed
    for words in (
        "chunk-reset search",
        "judge F1, after GRPO",
        "judge AUC, after GRPO",
        "The judge at work",
        "truth",
    ):
        assert words in printed

    summary = json.loads((tmp_path / "q" / "summary.json").read_text())
    assert 0 <= summary["policy"]["accuracy_sampled"] <= 1
    assert 0 <= summary["policy"]["accuracy_greedy"] <= 1
    assert set(summary["labels"]) == {"abs_q", "rel_effective", "rel_ratio", "relative_progress"}
    for quality in summary["labels"].values():
        low, high = quality["balanced_accuracy_interval"]
        assert 0 <= low <= quality["balanced_accuracy"] <= high <= 1
    for judge in ("cold_start", "grpo"):
        assert 0 <= summary["judge"][judge]["f1"] <= 1
        low, high = summary["judge"][judge]["auc_interval"]
        assert 0 <= low <= summary["judge"][judge]["auc"] <= high <= 1
    search = summary["search"]
    for row in (search["plain"], search["greedy"], search["chunk_reset"], search["majority"]["8"]):
        assert {"accuracy", "policy_tokens", "judge_tokens"} <= set(row)
    assert set(summary["seconds"]) == {name for name, _, _ in whole(tmp_path, 0)}

    runpy.run_path(str(TABLE))["main"]([str(tmp_path / "q")] * 2)
    accuracy = f"{100 * search['chunk_reset']['accuracy']:.1f}"
    row = f"| chunk-reset search | {accuracy} | {accuracy} | **{accuracy}** ± 0.0 |"
    assert row in capsys.readouterr().out

    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "q").rglob("records/*/*.jsonl")}
    assert files
    assert main(arguments) == 0
    assert files == {f: f.stat().st_mtime_ns for f in files}
    assert json.loads((tmp_path / "q" / "summary.json").read_text()) == summary

"""The comparison's stages fit together, its tuning sees no test data, and what its numbers say."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from stepwiser_jax.__main__ import main
from stepwiser_jax.commands.quickstart import timed
from stepwiser_jax.commands.reproduce import command, rows
from stepwiser_jax.commands.reproduce.rows import SeedRuns
from stepwiser_jax.config import STAGE_CONFIGS, validate
from stepwiser_jax.records import SearchResult
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.search.report import solved_by_method

REPOSITORY = Path(__file__).parents[2]
JUDGES = [*rows.JUDGES, *rows.FEWER_LABELS]


@pytest.fixture(autouse=True)
def earlier_stages(monkeypatch):
    """What settings are read from."""
    found = {"classifier_examples": 850, "threshold": 0.4}
    monkeypatch.setattr(SeedRuns, "summary", lambda runs, name: found)


def configs_of(runs):
    return [
        (name, stage, validate(STAGE_CONFIGS[stage], settings(), name))
        for name, stage, settings in rows.every_stage(runs)
    ]


def strings(value):
    if isinstance(value, dict):
        return [text for child in value.values() for text in strings(child)]
    if isinstance(value, list | tuple):
        return [text for child in value for text in strings(child)]
    return [value] if isinstance(value, str) else []


def test_every_stage_reads_what_a_stage_before_it_wrote(tmp_path):
    runs = SeedRuns(tmp_path / "seed-3", 3)
    seen = {}
    for name, stage, config in configs_of(runs):
        read = [Path(text) for text in strings(config.model_dump()) if str(runs.run_dir) in text]
        assert {path.name for path in read} <= set(seen) and name not in {p.name for p in read}
        assert seen.setdefault(name, (stage, config)) == (stage, config)
        assert getattr(config, "seed", 3) == 3
    assert {f"{judge}_score" for judge in JUDGES} <= set(seen)


def test_tuning_sees_nothing_of_the_test_split(tmp_path):
    splits = {
        runs.split: [s for _, _, c in configs_of(runs) for s in strings(c.model_dump())]
        for runs in (SeedRuns(tmp_path, 0, "dev", share_of_steps=0.5), SeedRuns(tmp_path, 0))
    }
    assert "test" not in splits["dev"] and {"dev", "test"} <= set(splits["test"])


def test_half_the_length_is_half_the_steps_of_every_judge(tmp_path):
    for name, (row, rate) in rows.JUDGES.items():
        steps = [
            next(settings() for run, _, settings in row(runs, name, rate) if run == name)
            for runs in (SeedRuns(tmp_path, 0), SeedRuns(tmp_path, 0, share_of_steps=0.5))
        ]
        key = "iterations" if "iterations" in steps[0] else "steps"
        assert steps[0][key] == 2 * steps[1][key]
        assert steps[0]["training"]["optimizer"]["learning_rate"] == rate


def test_a_share_of_the_labels_is_a_share_of_the_solutions(tmp_path):
    configs = {name: config for name, _, config in configs_of(SeedRuns(tmp_path, 0))}
    for form in ("genprm", "thinkprm"):
        runs = [configs[f"{form}_rationales_{share}"] for share in ("1", "0.1", "0.01")]
        assert [run.limit for run in runs] == [850, 85, 8]


def test_every_judge_has_as_many_trainings_to_find_its_rate():
    tuning = json.loads((REPOSITORY / "docs" / "comparison_tuning.json").read_text())
    assert tuning["chosen"] == rows.CHOSEN
    assert set(tuning["scores"]) == set(rows.JUDGES)
    for name, scores in tuning["scores"].items():
        assert list(map(float, scores)) == list(rows.FACTORS)
        assert scores[f"{tuning['chosen'][name]:g}"] == max(scores.values())
    assert {of for of, _ in rows.FEWER_LABELS.values()} <= set(rows.JUDGES)


def test_settings_are_changed_in_a_copy():
    tree = {"grpo": {"kl_coef": 0.2}, "seed": 0}
    found = rows.changed(tree, grpo__clip_eps_high=0.2, training__micro_batches=2, seed=1)
    assert found == {
        "grpo": {"kl_coef": 0.2, "clip_eps_high": 0.2},
        "training": {"micro_batches": 2},
        "seed": 1,
    }
    assert tree == {"grpo": {"kl_coef": 0.2}, "seed": 0}


def test_seconds_are_added_up_until_a_stage_is_finished(tmp_path):
    def run(config, directory):
        time.sleep(0.01)
        return {"value": 1}

    first = timed(tmp_path, run, None)["seconds"]
    second = timed(tmp_path, run, None)["seconds"]
    assert 0 < first < second
    (tmp_path / "manifest.json").write_text("{}")
    assert timed(tmp_path, run, None) == {"value": 1, "seconds": second}
    (tmp_path / "seconds.json").unlink()  # killed before it was written
    assert timed(tmp_path, run, None)["seconds"] == 0
    assert json.loads((tmp_path / "seconds.json").read_text()) == 0


# --- what is made of the numbers ----------------------------------------------------------------


def seeds_with(shares, *pairs):
    return [
        {
            "numbers": {"judge/clip_higher": better, "judge/clip": worse},
            "paired_p": {"clip-higher > clip, 4 updates: judge": p},
            "clipped_from_above": {"clip_higher": share, "clip": 0.01},
        }
        for share, (better, worse, p) in zip(shares, pairs, strict=True)
    ]


@pytest.mark.parametrize(
    ("shares", "pairs", "verdict", "holds_in", "tested_in"),
    [
        ((0.0, 0.0), [(0.7, 0.6, 0.01), (0.8, 0.5, 0.01)], "holds", 2, 2),
        ((0.0, 0.0), [(0.7, 0.6, 0.01), (0.8, 0.5, 0.05)], "mixed", 1, 2),
        ((0.0, 0.0), [(0.7, 0.6, 0.01), (0.5, 0.8, 0.01)], "mixed", 1, 2),
        ((0.0, 0.0), [(0.6, 0.7, 0.01), (0.5, 0.6, 0.01)], "fails", 0, 2),
        ((0.0, 0.0), [(0.6, 0.7, 0.01), (0.5, 0.6, 0.9)], "mixed", 0, 2),
        ((0.0, 0.0), [(0.7, 0.6, 0.06), (0.5, 0.6, 0.9)], "not told apart", 0, 2),
        ((0.0, 0.01), [(0.6, 0.7, 0.01), (0.7, 0.5, 0.01)], "fails", 0, 1),
        ((0.01, 0.01), [(0.7, 0.6, 0.01), (0.7, 0.5, 0.01)], "not tested", 0, 0),
    ],
)
def test_a_claim_holds_where_it_does_in_every_seed(shares, pairs, verdict, holds_in, tested_in):
    """And the clip is tested where the two were not clipped alike."""
    claim = next(claim for claim in command.CLAIMS if claim.worse == "judge/clip")
    found = command.verdict_on(claim, seeds_with(shares, *pairs))
    assert (found["verdict"], found["holds_in"]) == (verdict, holds_in)
    assert found["tested_in"] == tested_in
    assert found["difference"] == pytest.approx(sum(a - b for a, b, _ in pairs) / 2)
    assert found["paired_p"] == [p for _, _, p in pairs]


def test_without_a_test_of_its_own_a_difference_counts_by_its_sign():
    claim = next(claim for claim in command.CLAIMS if claim.worse == "labels/abs_q")
    seed = {"numbers": {claim.better: 0.7, claim.worse: 0.6}, "paired_p": {}}
    assert command.told_by(claim, seed) == 1


def result_of(problem, method, is_correct):
    return SearchResult(
        search_id=f"{problem}/{method}", problem_id=problem, method=method, answer=str(is_correct),
        is_correct=is_correct, completion="", accepted_tokens=10, rejected_tokens=0,
        judge_tokens=0, forced_chunks=0, chunk_scores=(0.5,), scoring_tokens=9,
    )  # fmt: skip


def test_searches_are_compared_problem_by_problem(tmp_path):
    """In the order of the problems' ids, whatever order they were written in."""
    runs = SeedRuns(tmp_path, 0)
    _, stage, settings = rows.searches(runs)[0]
    config = validate(STAGE_CONFIGS[stage], settings(), stage)
    directory = RunDirectory(tmp_path / "search", stage, config)
    rights = {"p-10": (True, False, False), "p-2": (False, True, True)}
    results = [
        result_of(problem, method, is_correct)
        for problem, (reset, *samples) in rights.items()
        for method, is_correct in {
            "greedy": False,
            **dict.fromkeys(("chunk_reset", "beam", "dvts"), reset),
            **{f"sample{k}": samples[k % 2] for k in range(8)},
        }.items()
    ]
    assert [problem.right for problem in solved_by_method(config, results)["beam"]] == [0, 1]
    directory.writer(SearchResult).append(results)
    directory.finish(dict)
    assert command.right_of(runs, "search/chunk_reset").tolist() == [0, 1]
    assert command.right_of(runs, "search/plain").tolist() == [1, 0]
    assert command.right_of(runs, "search/majority").tolist() == [1, 0]


def test_tuning_takes_the_best_factor_of_each_judge(tmp_path, monkeypatch):
    trained = []

    def run_stages(runs, stages, console):
        assert (runs.seed, runs.split, runs.share_of_steps) == (command.TUNING_SEED, "dev", 0.5)
        trained.extend(name for name, _, _ in stages)

    def score_of(runs, name):
        judge, factor = name.rsplit("_x", 1)
        return {"f1": 0.5 if judge == "offline" else float(factor) / 10}

    monkeypatch.setattr(command, "run_stages", run_stages)
    monkeypatch.setattr(command, "score_of", score_of)
    assert main(["reproduce", "--run-dir", str(tmp_path), "--tune"]) == 0
    found = json.loads((tmp_path / "tuning.json").read_text())
    expected = dict.fromkeys(rows.JUDGES, 2.0) | {"offline": 0.5}
    assert found["chosen"] == expected
    assert {f"{name}_x{f:g}" for name in expected for f in rows.FACTORS} <= set(trained)


def test_the_command_writes_every_claim_with_its_numbers(tmp_path, monkeypatch, capsys):
    method = {"accuracy": 0.5, "policy_tokens": 60.0, "judge_tokens": 9.0, "rejected_tokens": 1.0}
    method["accuracy_interval"] = [0.45, 0.55]
    methods = ("plain", "greedy", "beam", "dvts", "chunk_reset")
    summary = dict.fromkeys(methods, method) | {
        "majority": {"8": method},
        "best_of": {"mean": {"8": method}},
        "weighted_majority": {"product": {"8": method}},
        "accuracy": 0.4,
        "accuracy_interval": [0.35, 0.45],
    }
    official = {"f1": 0.7, "acc_error": 0.6, "acc_correct": 0.8}
    score = {
        "subsets": {"arithmetic": {"official": official, "official_f1_interval": [0.65, 0.75]}}
    }
    found = lambda runs, name: score if name.endswith("_score") else summary  # noqa: E731
    monkeypatch.setattr(SeedRuns, "summary", found)
    monkeypatch.setattr(command, "run_stages", lambda runs, stages, console: None)
    quality = {"balanced_accuracy": 0.8, "balanced_accuracy_interval": [0.75, 0.85]}
    quality = dict.fromkeys(("rel_effective", "abs_q"), quality)
    monkeypatch.setattr(command, "label_quality", lambda run_dir: quality)
    monkeypatch.setattr(
        command, "compare_runs", lambda a, b, votes: {"average": {"difference_p": 0.3}}
    )
    monkeypatch.setattr(command, "right_of", lambda runs, number: np.arange(8) % 2)
    training = {"clipped_from_above": 0.01, "reward": 0.6}
    monkeypatch.setattr(command, "training_of", lambda runs, name: training)
    monkeypatch.setattr(command, "seconds_of", lambda runs, stages: {"policy": 60.0})
    assert main(["reproduce", "--run-dir", str(tmp_path), "--seed", "4", "--seed", "7"]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "compare.json").read_text())
    assert list(result["seeds"]) == ["4", "7"] and "Minutes: 1, 1." in printed
    assert [claim["claim"] for claim in result["claims"]] == [c.says for c in command.CLAIMS]
    for claim in command.CLAIMS:
        assert claim.says in printed
    assert "| judge/stepwiser | 70.0 [65.0, 75.0] | 70.0 [65.0, 75.0] |" in printed
    assert "| search/plain | 50.0 [45.0, 55.0] |" in printed
    assert "| labels/abs_q | 80.0 [75.0, 85.0] |" in printed
    assert "| selection/before | 40.0 [35.0, 45.0] |" in printed
    for seed in result["seeds"].values():
        assert {c.better for c in command.CLAIMS} <= set(seed["numbers"])
        assert {c.worse for c in command.CLAIMS} <= set(seed["numbers"])


def test_the_seed_of_the_tuning_is_refused(tmp_path, capsys):
    assert main(["reproduce", "--run-dir", str(tmp_path / "c"), "--seed", "1000"]) == 2
    assert "--tune" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()

"""The comparison's stages fit together, its tuning sees no test data, and what its numbers say."""

import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from stepwiser_jax.__main__ import main
from stepwiser_jax.commands.quickstart import timed
from stepwiser_jax.commands.reproduce import claims, experiments, measure
from stepwiser_jax.commands.reproduce.experiments import SeedRuns
from stepwiser_jax.config import STAGE_CONFIGS
from stepwiser_jax.config_files import validate
from stepwiser_jax.records import SearchResult
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.search.report import solved_by_method

REPOSITORY = Path(__file__).parents[2]
JUDGES = [*experiments.JUDGES, *experiments.FEWER_LABELS]


@pytest.fixture(autouse=True)
def earlier_stages(monkeypatch):
    """What settings are read from."""
    found = {"classifier_examples": 850, "threshold": 0.4}
    monkeypatch.setattr(SeedRuns, "summary", lambda runs, name: found)


def configs_of(runs):
    return [
        (name, stage, validate(STAGE_CONFIGS[stage], settings(), name))
        for name, stage, settings in experiments.every_stage(runs)
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
    for name, (row, rate) in experiments.JUDGES.items():
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
        assert [run.examples.limit for run in runs] == [850, 85, 8]


def test_every_judge_has_as_many_trainings_to_find_its_rate():
    tuning = json.loads((REPOSITORY / "docs" / "comparison_tuning.json").read_text())
    assert tuning["chosen"] == experiments.CHOSEN
    assert set(tuning["scores"]) == set(experiments.JUDGES)
    for name, scores in tuning["scores"].items():
        assert list(map(float, scores)) == list(experiments.FACTORS)
        assert scores[f"{tuning['chosen'][name]:g}"] == max(scores.values())
    assert {of for of, _ in experiments.FEWER_LABELS.values()} <= set(experiments.JUDGES)


def test_settings_are_changed_in_a_copy():
    tree = {"grpo": {"kl_coef": 0.2}, "seed": 0}
    found = experiments.changed(tree, grpo__clip_eps_high=0.2, training__micro_batches=2, seed=1)
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
def test_a_claim_holds_if_it_does_in_every_seed(shares, pairs, verdict, holds_in, tested_in):
    """The clip is tested only if the two were not clipped alike."""
    claim = next(claim for claim in claims.CLAIMS if claim.worse == "judge/clip")
    found = claims.decide(claim, seeds_with(shares, *pairs))
    assert (found["verdict"], found["holds_in"]) == (verdict, holds_in)
    assert found["tested_in"] == tested_in
    assert found["difference"] == pytest.approx(sum(a - b for a, b, _ in pairs) / 2)
    assert found["paired_p"] == [p for _, _, p in pairs]


def test_without_a_test_of_its_own_a_difference_counts_by_its_sign():
    claim = next(claim for claim in claims.CLAIMS if claim.worse == "labels/abs_q")
    seed = {"numbers": {claim.better: 0.7, claim.worse: 0.6}, "paired_p": {}}
    assert claims.direction(claim, seed) == 1


def result_of(problem, method, is_correct):
    return SearchResult(
        search_id=f"{problem}/{method}", problem_id=problem, method=method, answer=str(is_correct),
        is_correct=is_correct, completion="", accepted_tokens=10, rejected_tokens=0,
        judge_tokens=0, forced_chunks=0, chunk_scores=(0.5,), scoring_tokens=9,
    )  # fmt: skip


def test_searches_are_compared_problem_by_problem(tmp_path):
    """In the order of the problems' ids, whatever order they were written in."""
    runs = SeedRuns(tmp_path, 0)
    _, stage, settings = experiments.searches(runs)[0]
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
    assert measure.solved_by_problem(runs, "search/chunk_reset").tolist() == [0, 1]
    assert measure.solved_by_problem(runs, "search/plain").tolist() == [1, 0]
    assert measure.solved_by_problem(runs, "search/majority").tolist() == [1, 0]


class Finished(SeedRuns):
    """Runs whose summaries say nothing: every judge, search and policy has the same numbers."""

    def summary(self, name):
        method = {"accuracy": 0.5, "accuracy_interval": [0.45, 0.55]}
        method |= {"policy_tokens": 60.0, "judge_tokens": 9.0, "rejected_tokens": 1.0}
        official = {"f1": 0.7, "acc_error": 0.6, "acc_correct": 0.8}
        score = {"official": official, "official_f1_interval": [0.65, 0.75]}
        if name.endswith("_score"):
            return {"greedy": {"subsets": {"arithmetic": score}}}
        methods = ("plain", "greedy", "beam", "dvts", "chunk_reset")
        return (
            method
            | dict.fromkeys(methods, method)
            | {
                "majority": {"8": method},
                "best_of": {"mean": {"8": method}},
                "weighted_majority": {"product": {"8": method}},
            }
        )


def test_every_claim_is_about_numbers_that_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "run_stages", lambda *_: None)
    quality = {"balanced_accuracy": 0.8, "balanced_accuracy_interval": [0.75, 0.85]}
    rules = dict.fromkeys(("rel_effective", "abs_q"), quality)
    monkeypatch.setattr(measure, "label_quality", lambda run_dir: rules)
    monkeypatch.setattr(measure, "paired_p", lambda runs, claim: 0.3)
    runs = Finished(tmp_path, 0)
    for name, _, _ in experiments.every_stage(runs):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "seconds.json").write_text("60")
    line = {"step": 1, "clip_fraction_high": 0.01, "reward": 0.6}
    for name in claims.CLIP_PAIR:
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    seed = measure.run_seed(runs, Console(quiet=True))
    for claim in claims.CLAIMS:
        assert {claim.better, claim.worse} <= set(seed["numbers"])
    assert set(seed["numbers"]) - set(seed["intervals"]) == {"reward/clip_higher", "reward/clip"}
    assert set(seed["paired_p"]) == {claim.says for claim in claims.CLAIMS if claim.is_paired}


def test_the_seed_of_the_tuning_is_refused(tmp_path, capsys):
    assert main(["reproduce", "--run-dir", str(tmp_path / "c"), "--seed", "1000"]) == 2
    assert "--tune" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()

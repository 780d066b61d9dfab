"""The comparison's stages fit together, its tuning sees no test data, and what its numbers say."""

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import ttest_rel

from stepwiser_jax.__main__ import main
from stepwiser_jax.commands.quickstart import timed
from stepwiser_jax.commands.reproduce import (
    claims,
    controls,
    experiments,
    items,
    judges,
    measure,
    report,
)
from stepwiser_jax.commands.reproduce.seed_runs import EXAMPLES, SeedRuns, changed
from stepwiser_jax.config import STAGE_CONFIGS
from stepwiser_jax.config_files import validate
from stepwiser_jax.data.datasets import load_judge_examples
from stepwiser_jax.evaluation.statistics import multiplicities
from stepwiser_jax.records import JudgeExample, Judgment, ProcessBenchItem, SearchResult, Verdict
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.search.report import Solved, solved_by_method
from stepwiser_jax.tasks.arithmetic import MOD_10, TASKS

REPOSITORY = Path(__file__).parents[2]
ROWS = [*judges.STARTS, *judges.JUDGES, *judges.CONTROLS]


@pytest.fixture(autouse=True)
def earlier_stages(monkeypatch):
    """What settings are read from."""
    found = {"classifier_examples": 850, "threshold": 0.4, "chosen": 100}
    monkeypatch.setattr(SeedRuns, "summary", lambda runs, name: found)


def configs_of(runs):
    return [
        (name, stage, validate(STAGE_CONFIGS[stage], settings(), name))
        for name, stage, settings in experiments.every_stage(runs)
        if stage != EXAMPLES
    ]


def strings(value):
    if isinstance(value, dict):
        return [text for child in value.values() for text in strings(child)]
    if isinstance(value, list | tuple):
        return [text for child in value for text in strings(child)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("task", TASKS)
def test_every_stage_reads_what_a_stage_before_it_wrote(tmp_path, task):
    runs = SeedRuns(tmp_path / "seed-3", 3, task)
    seen = {}
    for name, stage, settings in experiments.every_stage(runs):
        if stage == EXAMPLES:
            seen.setdefault(name, (stage, None))
            continue
        config = validate(STAGE_CONFIGS[stage], settings(), name)
        read = [Path(text) for text in strings(config.model_dump()) if str(runs.run_dir) in text]
        assert {path.name for path in read} <= set(seen) and name not in {p.name for p in read}
        assert seen.setdefault(name, (stage, config)) == (stage, config)
        assert getattr(config, "seed", 3) == 3
    rows = ROWS if task is MOD_10 else judges.CORE
    assert {f"{judge}_{on}" for judge in rows for on in ("dev", "score")} <= set(seen)


def test_the_second_task_is_another_task_in_every_stage(tmp_path):
    """And nothing else: rows are trained as for the first."""
    first, second = (
        {name: config.model_dump() for name, _, config in configs_of(SeedRuns(tmp_path, 0, task))}
        for task in TASKS
    )
    of_task = [text for config in second.values() for text in strings(config)]
    named = Counter(text for text in of_task if text.startswith("arithmetic"))
    demonstrations = [f"arithmetic-mod-7-{of}" for of in ("policy", "judge", "verdicts")]
    assert set(named) == {"arithmetic", "arithmetic-mod-7", *demonstrations}
    models = [config["model"]["path"] for config in second.values() if "model" in config]
    assert named["arithmetic"] == models.count("arithmetic") == 2  # the tiny model

    def anonymous(config):
        return json.dumps(config).replace("arithmetic-mod-7", "arithmetic")

    for name in set(second) - {"search"}:  # that has fewer methods
        assert anonymous(second[name]) == anonymous(first[name])


def test_tuning_sees_nothing_of_the_test_split(tmp_path):
    splits = {
        runs.split: [s for _, _, c in configs_of(runs) for s in strings(c.model_dump())]
        for runs in (SeedRuns(tmp_path, 0, split="dev", share_of_steps=0.5), SeedRuns(tmp_path, 0))
    }
    assert "test" not in splits["dev"] and {"dev", "test"} <= set(splits["test"])


def test_thresholds_are_not_chosen_on_the_solutions_that_are_scored(tmp_path):
    """Nor while rates are tuned, when both are of the development split."""
    for split in ("test", "dev"):
        configs = {n: c for n, _, c in configs_of(SeedRuns(tmp_path, 0, split=split))}
        problems = [configs[name].problems for name in ("heldout", "heldout_dev")]
        assert problems[1].split == "dev" and problems[0].seed != problems[1].seed


def test_half_the_length_is_half_the_steps_of_every_judge(tmp_path):
    for name, (row, rate) in judges.JUDGES.items():
        steps = [
            next(settings() for run, _, settings in row(runs, name, rate) if run == name)
            for runs in (SeedRuns(tmp_path, 0), SeedRuns(tmp_path, 0, share_of_steps=0.5))
        ]
        key = "iterations" if "iterations" in steps[0] else "steps"
        assert steps[0][key] == 2 * steps[1][key]
        assert steps[0]["training"]["optimizer"]["learning_rate"] == rate


def test_controls_differ_from_their_row_in_the_data_alone(tmp_path):
    configs = {name: c.model_dump() for name, _, c in configs_of(SeedRuns(tmp_path, 0))}
    for name, (of, _) in judges.CONTROLS.items():
        assert configs[name]["examples"] != configs[of]["examples"]
        assert configs[name] | {"examples": None} == configs[of] | {"examples": None}
    printed = {name: configs[f"labels_{name}"] for name in ("printed", "printed_absolute")}
    for config in printed.values():
        assert (config["dead_prefix"], config["min_prefix_value"]) == ("negative", 0)
    assert configs["labels"]["dead_prefix"] == "drop"
    starts = {
        name: configs[f"classifier{name}"]["model"]["path"]
        for name in ("", "_policy", "_demonstrations")
    }
    assert [Path(path).name for path in starts.values()] == [
        "cold_start",
        "policy",
        "classifier_start",
    ]
    assert Path(configs["classifier_start"]["model"]["path"]).name == "cold_start"


def judge_examples(labels):
    return [
        JudgeExample(f"e/{i}", f"p/{i // 3}", "question", "", f"chunk {i}", label)
        for i, label in enumerate(labels)
    ]


def test_shuffled_labels_say_nothing_of_their_chunks():
    examples = judge_examples([True, False] * 300)
    shuffled = controls.with_shuffled_labels(examples, 0)
    assert [e.example_id for e in shuffled] == [e.example_id for e in examples]
    assert sum(e.is_positive for e in shuffled) == 300
    agreeing = np.mean(
        [a.is_positive == b.is_positive for a, b in zip(examples, shuffled, strict=True)]
    )
    assert 0.4 < agreeing < 0.6
    assert shuffled == controls.with_shuffled_labels(examples, 0)
    assert shuffled != controls.with_shuffled_labels(examples, 1)


def test_as_many_examples_are_drawn_half_of_each_label():
    examples = judge_examples([True, True, False] * 40 + [False] * 40)
    few = controls.drawn(examples, 50, 0)
    assert Counter(e.is_positive for e in few) == {True: 25, False: 25}
    assert few == [e for e in examples if e in few] and few != controls.drawn(examples, 50, 1)
    assert controls.drawn(examples, 1000, 0) == examples


def test_a_stage_of_examples_writes_its_file_once(tmp_path):
    examples, made = judge_examples([True, False]), []

    def make():
        made.append(1)
        return examples

    runs = SeedRuns(tmp_path, 0)
    for _ in range(2):
        measure.run_stages(runs, [("few.jsonl", EXAMPLES, make)], Console(quiet=True))
    assert load_judge_examples(runs.at("few.jsonl")) == examples and made == [1]


def test_every_judge_has_as_many_trainings_to_find_its_rate():
    tuning = json.loads((REPOSITORY / "docs" / "comparison_tuning.json").read_text())
    assert tuning["chosen"] == judges.CHOSEN
    assert set(tuning["scores"]) == set(judges.JUDGES)
    for name, scores in tuning["scores"].items():
        found = {float(factor): score for factor, score in scores.items()}
        assert measure.search_factors(found.__getitem__) == found
        assert tuning["chosen"][name] == measure.best_factor(found)


def test_every_control_has_the_rate_of_a_row_that_is_tuned():
    assert set(judges.CHOSEN) == set(judges.JUDGES)
    assert {of for of, _ in judges.CONTROLS.values()} <= set(judges.JUDGES)


@pytest.mark.parametrize(
    ("peak", "tried"),
    [
        (1, [0.5, 1, 2]),
        (0.9, [0.5, 1, 2]),
        (4, [0.5, 1, 2, 4, 8]),
        (0.25, [0.125, 0.25, 0.5, 1, 2]),
        (1000, [0.5, 1, 2, 4, 8, 16]),
        (0.0001, [0.0625, 0.125, 0.25, 0.5, 1, 2]),
    ],
)
def test_the_grid_of_rates_grows_while_the_best_is_at_its_edge(peak, tried):
    """But for a bound: three more at most."""
    scores = measure.search_factors(lambda factor: -abs(np.log(factor / peak)))
    assert list(scores) == tried
    assert measure.best_factor(scores) == min(tried, key=lambda f: abs(np.log(f / peak)))


def test_settings_are_changed_in_a_copy():
    tree = {"grpo": {"kl_coef": 0.2}, "seed": 0}
    found = changed(tree, grpo__clip_eps_high=0.2, training__micro_batches=2, seed=1)
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


# --- the items of numbers -----------------------------------------------------------------------


def random_items(kind, rng, count=40):
    if kind in ("judge", "greedy"):
        return (rng.random((count, 2)) < 0.5).tolist()
    if kind == "auc":
        return [
            tuple(
                (rng.integers(6, size=size) / 5).tolist() for size in (rng.integers(4), first_error)
            )
            for first_error in rng.integers(2, size=count)
        ]
    if kind == "labels":
        parts = rng.integers(4, size=(count, 4))
        return [(a + b, b, c + d, d) for a, b, c, d in parts.tolist()]
    return rng.random(count).tolist()


def slowly(kind, drawn):
    """The number of these items, item by item."""
    if kind in ("judge", "greedy"):
        a, b = (np.mean([found for error, found in drawn if error == side]) for side in (0, 1))
        return 2 * a * b / (a + b)
    if kind == "auc":
        pairs = [(r, w) for rs, _ in drawn for r in rs for _, ws in drawn for w in ws]
        return np.mean([(r > w) + (r == w) / 2 for r, w in pairs])
    if kind == "labels":
        wrong, caught, right, kept = (sum(column) for column in zip(*drawn, strict=True))
        return (caught / wrong + kept / right) / 2
    return np.mean(drawn)


@pytest.mark.parametrize("kind", items.STATISTICS)
def test_a_number_of_a_resample_is_that_of_its_items(kind):
    rng = np.random.default_rng(0)
    found = random_items(kind, rng)
    draws = multiplicities(np.zeros(len(found)), 20, rng)
    assert draws.sum(axis=1).tolist() == [len(found)] * 20
    values = items.statistic_of(f"{kind}/row", found)(draws)
    for value, draw in zip(values, draws, strict=True):
        drawn = [item for item, times in zip(found, draw, strict=True) for _ in range(times)]
        assert value == pytest.approx(slowly(kind, drawn))
    assert items.value_of(f"{kind}/row", found) == pytest.approx(slowly(kind, found))
    low, high = items.interval_of(f"{kind}/row", found)
    assert low < items.value_of(f"{kind}/row", found) < high


def solution(number, first_error, steps=2):
    texts = tuple(f"step {j}" for j in range(steps))
    return ProcessBenchItem(f"i/{number}", "arithmetic", "question", texts, first_error, True)


def test_a_judge_is_read_by_its_verdicts_and_at_the_threshold_of_the_development_split(monkeypatch):
    """A judge that says Positive throughout has F1 0 by its verdicts, and another by its P."""
    p_by_run = {
        "judge_dev": {0: [0.9, 0.2], 1: [0.7, 0.4], 2: [0.95, 0.4]},
        "judge_score": {0: [0.9, 0.25], 1: [0.8, 0.7], 2: [0.46, 0.9], 3: [0.9, 0.25]},
    }
    first_errors = {0: 1, 1: -1, 2: -1, 3: -1}

    def read(run, *, votes):
        p = p_by_run[run.name]
        judgments = {
            f"i/{i}/{j}": Judgment(f"i/{i}/{j}", "judge", "text", Verdict.POSITIVE, p_of_step, 0.0)
            for i, of_item in p.items()
            for j, p_of_step in enumerate(of_item)
        }
        return None, [solution(i, first_errors[i]) for i in p], judgments

    monkeypatch.setattr(measure, "read_judgments", read)
    monkeypatch.setattr(SeedRuns, "summary", lambda runs, name: {"examples": 978})
    read_judge = measure.read_judge(SeedRuns(Path("seed-0"), 0), "judge")
    assert read_judge.details["threshold"] == pytest.approx(0.3)
    assert read_judge.items["greedy"] == [
        (True, False),
        (False, True),
        (False, True),
        (False, True),
    ]
    assert read_judge.items["judge"] == [(True, True), (False, True), (False, True), (False, False)]
    assert read_judge.items["auc"][:2] == [([0.9], [0.25]), ([0.8, 0.7], [])]
    assert items.value_of("greedy/judge", read_judge.items["greedy"]) == 0
    assert items.value_of("judge/judge", read_judge.items["judge"]) == pytest.approx(0.8)
    assert read_judge.details["greedy_acc_error"] == 0 and read_judge.details["acc_error"] == 1
    assert read_judge.details["examples"] == 978


# --- what is made of the numbers ----------------------------------------------------------------


def seeds_with(*tables, task="arithmetic"):
    """Results of one seed for each table {number: items}."""
    return [
        {
            task: {
                "items": table,
                "numbers": {name: items.value_of(name, of) for name, of in table.items()},
            }
        }
        for table in tables
    ]


def answers(count, right):
    return [1.0] * right + [0.0] * (count - right)


def decision(claim, seeds):
    return next(found for found in claims.decide(seeds) if found["claim"] == claim)


def test_seeds_decide_together():
    """No seed alone tells the two apart, but all of them do: the rule that asked every seed for a p
    below 0.05 called this `not told apart`."""
    rng = np.random.default_rng(0)
    seeds = seeds_with(
        *(
            {
                "search/chunk_reset": rng.permutation(answers(60, 35)).tolist(),
                "search/plain": rng.permutation(answers(60, 29)).tolist(),
            }
            for _ in range(6)
        )
    )
    alone = [decision("chunk-reset > plain", [seed]) for seed in seeds]
    assert {found["verdict"] for found in alone} == {"not told apart"}
    found = decision("chunk-reset > plain", seeds)
    assert found["verdict"] == "holds" and found["p"] < 0.05 < min(of["p"] for of in alone)
    assert found["difference"] == pytest.approx(0.1)


def test_seeds_that_disagree_decide_nothing():
    """Items alone would make each seed certain: the noise of trainings is in p."""
    up = {"search/chunk_reset": answers(400, 300), "search/plain": answers(400, 200)}
    down = {"search/chunk_reset": answers(400, 200), "search/plain": answers(400, 280)}
    found = decision("chunk-reset > plain", seeds_with(up, up, down, down, up))
    assert found["difference"] > 0 and found["p"] > 0.2
    assert found["verdict"] == "not told apart"


def test_labels_have_a_p_too():
    """Once a difference of theirs counted by its sign."""
    rng = np.random.default_rng(0)
    names = ("labels/rel_effective", "labels/abs_q")
    seeds = seeds_with(
        *({name: random_items("labels", rng, count=10) for name in names} for _ in range(4))
    )
    found = decision("relative > absolute labels: against the truth", seeds)
    assert found["difference"] != 0 and found["corrected_p"] > 0.05
    assert found["verdict"] == "not told apart"


def test_seeds_of_one_sign_that_lie_far_apart_decide_nothing():
    """The bootstrap over five of them has its smallest p; a t-test knows better."""
    seeds = seeds_with(
        *(
            {"search/chunk_reset": answers(400, 200 + gain), "search/plain": answers(400, 200)}
            for gain in (8, 10, 40, 60, 160)
        )
    )
    found = decision("chunk-reset > plain", seeds)
    assert found["difference"] > 0.1 and found["p"] < 0.05 < found["p_between_seeds"]
    assert found["corrected_p"] == found["p_between_seeds"]
    assert found["verdict"] == "not told apart"
    assert found["p_between_seeds"] == pytest.approx(ttest_rel(found["better"], found["worse"])[1])


def test_one_seed_decides_nothing():
    table = {"search/chunk_reset": answers(400, 380), "search/plain": answers(400, 200)}
    found = decision("chunk-reset > plain", seeds_with(table))
    assert found["p"] < 0.05 and found["verdict"] == "not told apart"


def test_a_p_is_corrected_for_all_claims_of_both_tasks():
    rng = np.random.default_rng(1)
    pair = {
        "search/chunk_reset": (rng.random(200) < 0.62).astype(float).tolist(),
        "search/plain": (rng.random(200) < 0.45).astype(float).tolist(),
    }
    alone = decision("chunk-reset > plain", seeds_with(pair, pair))
    assert alone["p"] == alone["corrected_p"] < 0.05 and alone["verdict"] == "holds"
    others = {
        f"search/{name}": (rng.random(200) < 0.5).astype(float).tolist()
        for name in ("greedy", "majority", "chunk_reset_classifier")
    }
    both = [
        first | second
        for first, second in zip(
            seeds_with(pair | others, pair | others),
            seeds_with(pair, pair, task="other"),
            strict=True,
        )
    ]
    found = decision("chunk-reset > plain", both)
    assert found["p"] == alone["p"] and found["corrected_p"] > found["p"]
    tasks = [of["task"] for of in claims.decide(both) if of["claim"] == "chunk-reset > plain"]
    assert tasks == ["arithmetic", "other"]


def test_the_contrary_of_a_claim_is_said():
    table = {"search/chunk_reset": answers(200, 80), "search/plain": answers(200, 160)}
    assert decision("chunk-reset > plain", seeds_with(table, table))["verdict"] == "fails"


def result_of(problem, method, is_correct):
    return SearchResult(
        search_id=f"{problem}/{method}", problem_id=problem, method=method, answer=str(is_correct),
        is_correct=is_correct, completion="", accepted_tokens=10, rejected_tokens=0,
        judge_tokens=0, forced_chunks=0, chunk_scores=(0.5,), scoring_tokens=9,
    )  # fmt: skip


def test_searches_are_compared_problem_by_problem(tmp_path, monkeypatch):
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
    assert measure.solved_by_problem(runs, "search/chunk_reset") == [0, 1]
    assert measure.solved_by_problem(runs, "search/plain") == [1, 0]
    assert measure.solved_by_problem(runs, "search/majority") == [1, 0]
    at_most = {"majority_at_equal_flops": {"at_most": {"samples": 2.0}}}
    monkeypatch.setattr(SeedRuns, "summary", lambda runs, name: at_most)
    votes = {f"majority/{k}": [Solved(float(k == 2), 60.0)] for k in range(1, 9)}
    monkeypatch.setattr(measure, "solved_by_method", lambda *_: votes)
    assert measure.solved_by_problem(runs, "search/majority_at_equal_flops") == [1]


class Finished(SeedRuns):
    """Runs whose summaries say nothing: every search has the same costs, every set of labels the
    same size."""

    def summary(self, name):
        method = {"policy_tokens": 60.0, "judge_tokens": 9.0, "rejected_tokens": 1.0, "flops": 9e7}
        labels = {"labels": 3000, "positive_share": 0.7, "judge_examples": 900, "examples": 900}
        nested = {"majority": {"8": method}, "best_of": {"mean": {"8": method}}}
        nested |= {"weighted_majority": {"product": {"8": method}}}
        nested |= {"majority_at_equal_flops": {"at_most": method | {"samples": 4.0}}}
        methods = ("plain", "greedy", "beam", "dvts", "chunk_reset")
        return labels | nested | dict.fromkeys(methods, method)


def finish(tmp_path, monkeypatch, seed):
    """Returns the results of a seed whose stages are all finished."""
    rng = np.random.default_rng(seed)
    read = measure.ReadJudge(
        {kind: random_items(kind, rng) for kind in ("judge", "greedy", "auc")},
        dict.fromkeys(("acc_error", "acc_correct", "greedy_acc_error", "greedy_acc_correct"), 0.6)
        | {"threshold": 0.4, "examples": 900},
    )
    truths = [[(True, True), (False, True), (False, False)], [(True, False)]]
    rules = dict.fromkeys(("rel_effective", "abs_q"), truths)
    monkeypatch.setattr(measure, "run_stages", lambda *_: None)
    monkeypatch.setattr(measure, "read_judge", lambda runs, name: read)
    monkeypatch.setattr(measure, "labels_and_truths", lambda run_dir: rules)
    monkeypatch.setattr(measure, "solved_by_problem", lambda runs, number: [0.0, 1.0, 0.5])
    found = {}
    for task in TASKS:
        runs = Finished(tmp_path / f"{seed}" / task.name, seed, task)
        for name, _, _ in experiments.every_stage(runs):
            (runs.run_dir / name).mkdir(exist_ok=True, parents=True)
            (runs.run_dir / name / "seconds.json").write_text("60")
        found[task.name] = measure.run_seed(runs, Console(quiet=True))
    return found


def test_every_claim_is_about_numbers_that_are_measured(tmp_path, monkeypatch):
    found = finish(tmp_path, monkeypatch, 0)
    for claim in claims.CLAIMS:
        assert {claim.better, claim.worse} <= set(found["arithmetic"]["numbers"])
    second = {of["claim"] for of in claims.decide([found]) if of["task"] == "arithmetic-mod-7"}
    assert {"labels > the same labels shuffled: AUC", "RL > classifier", "chunk-reset > greedy, "
            "which costs less", "reasoning > verdicts alone: AUC"} <= second  # fmt: skip
    for of_task in found.values():
        assert set(of_task["numbers"]) == set(of_task["intervals"]) == set(of_task["items"])


def test_seeds_are_joined_wherever_they_were_measured(tmp_path, monkeypatch, capsys):
    """Each seed leaves one file. The table has all of them, in order, without their items."""
    for seed in (2, 0):
        found = finish(tmp_path / "runs", monkeypatch, seed)
        (tmp_path / "all" / f"seed-{seed}").mkdir(parents=True)
        monkeypatch.setattr(report, "run_seed", lambda runs, console, of=found: of[runs.task.name])
        report.reproduce(tmp_path / f"machine-{seed}", [seed])
        one = tmp_path / f"machine-{seed}" / f"seed-{seed}" / "results.json"
        one.rename(tmp_path / "all" / f"seed-{seed}" / "results.json")
    assert main(["reproduce", "--run-dir", str(tmp_path / "all"), "--join"]) == 0
    result = json.loads((tmp_path / "all" / "compare.json").read_text())
    assert list(result["seeds"]) == ["0", "2"]
    assert "items" not in result["seeds"]["0"]["arithmetic"]
    assert len(result["claims"][0]["better"]) == 2
    table = (tmp_path / "all" / "compare.md").read_text()
    assert "| F1, seed 0 | F1, seed 2 |" in table and "## arithmetic-mod-7" in table
    assert "| labels_printed | 3000: 70.0%; 900 | 3000: 70.0%; 900 |" in table
    file = tmp_path / "all" / "seed-2" / "results.json"
    other = json.loads(file.read_text()) | {"chosen_factors": {"stepwiser": 8.0}}
    file.write_text(json.dumps(other))
    capsys.readouterr()
    assert main(["reproduce", "--run-dir", str(tmp_path / "all"), "--join"]) == 2
    assert "seed-2" in capsys.readouterr().err
    assert main(["reproduce", "--run-dir", str(tmp_path / "none"), "--join"]) == 2
    assert "found none" in capsys.readouterr().err


def test_the_seed_of_the_tuning_is_refused(tmp_path, capsys):
    assert main(["reproduce", "--run-dir", str(tmp_path / "c"), "--seed", "1000"]) == 2
    assert "--tune" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()

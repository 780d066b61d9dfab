"""PRMBench: its rows, and its scores against a slow loop over steps."""

import json
from collections import Counter

import numpy as np
import pytest

from stepwiser_jax.data.datasets import load_benchmark, load_judge_examples
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.prmbench import CATEGORIES, score_prmbench
from stepwiser_jax.records import PrmBenchItem, Verdict

ROW = {
    "idx": "prm_test_p1_0",
    "original_question": "Q?",
    "modified_question": "Q'?",
    "original_process": ["a", "b"],
    "modified_process": ["a", "b'", "c", "d"],
    "error_steps": [2, 4],
    "classification": "circular",
}
PROCESSBENCH_ROW = {
    "id": "gsm8k-7",
    "problem": "Q?",
    "steps": ["a", "b"],
    "final_answer_correct": False,
    "label": 1,
}
POSITIVE, NEGATIVE, UNPARSED = Verdict.POSITIVE, Verdict.NEGATIVE, Verdict.UNPARSED


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_become_items_and_one_class_gives_the_originals_too(tmp_path):
    redundant = ROW | {"classification": "redundency", "idx": "p1_1"}
    right, wrong = load_benchmark(write(tmp_path / "r.jsonl", [redundant]))[::-1]
    assert (wrong.item_id, wrong.question) == ("redundency_p1_1", "Q'?")
    assert (wrong.wrong_steps, wrong.first_error) == ((1, 3), 1)
    assert [wrong.is_right(step) for step in range(4)] == [True, False, True, False]
    assert (right.item_id, right.subset) == ("correct_p1_1", "correct")
    assert (right.question, right.steps, right.first_error) == ("Q?", ("a", "b"), -1)


def test_error_steps_past_the_end_are_ignored_and_counted(tmp_path):
    rows = [ROW | {"error_steps": [4, 5, 9]}, ROW | {"idx": "p1_1", "error_steps": [5]}]
    source = write(tmp_path / "items.jsonl", rows)
    dropped: Counter[str] = Counter()
    items = load_benchmark(source, dropped=dropped)
    assert [item.wrong_steps for item in items] == [(3,), ()]
    assert dropped == {"error_steps_past_the_end": 3}
    dropped.clear()
    examples = load_judge_examples(source, dropped=dropped)
    assert [e.is_positive for e in examples] == [True, True, True, False] + 4 * [True]
    assert dropped == {"error_steps_past_the_end": 3}


@pytest.mark.parametrize("steps", [[0], [-1], [1.0], ["2"], [True], 3])
def test_error_steps_that_cannot_be_are_refused(tmp_path, steps):
    source = write(tmp_path / "items.jsonl", [ROW | {"error_steps": steps}])
    with pytest.raises(
        UserError, match=r"line 1: expected 'error_steps', (integers from 1|a list)"
    ):
        load_benchmark(source)


def test_the_first_of_an_id_counts_and_the_benchmarks_are_not_mixed(tmp_path):
    dropped: Counter[str] = Counter()
    again = ROW | {"modified_process": ["x", "y", "z", "w"]}
    (item,) = load_benchmark(write(tmp_path / "a.jsonl", [ROW, again]), dropped=dropped)
    assert item.steps[0] == "a" and dropped == {"repeated": 1}
    with pytest.raises(UserError, match="found both"):
        load_benchmark(write(tmp_path / "b.jsonl", [ROW, PROCESSBENCH_ROW]))


def f1(hits, false_alarms, misses):
    return 0.0 if not hits else 2 * hits / (2 * hits + false_alarms + misses)


def oracle(items, verdicts, accepting):
    """PRMScore and its parts from one loop over steps."""
    tp = fp = tn = fn = 0
    for item, row in zip(items, verdicts, strict=True):
        for step, verdict in enumerate(row):
            called_right = verdict in accepting
            if step in item.wrong_steps:
                fp, tn = fp + called_right, tn + (not called_right)
            else:
                tp, fn = tp + called_right, fn + (not called_right)
    right, wrong = f1(tp, fp, fn), f1(tn, fn, fp)
    return {"f1": right, "negative_f1": wrong, "prm_score": (right + wrong) / 2}


def random_items(seed, classes=None):
    rng = np.random.default_rng(seed)
    items, verdicts = [], []
    for name in classes or ["correct", *(n for of in CATEGORIES.values() for n in of)]:
        for i in range(6):
            steps = int(rng.integers(2, 7))
            has_errors = name not in ("correct", "multi_solutions")
            wrong = np.flatnonzero(rng.random(steps) < 0.4).tolist() if has_errors else []
            items.append(PrmBenchItem(f"{name}_{i}", name, "q", ("s",) * steps, tuple(wrong)))
            drawn = rng.choice(3, steps, p=[0.6, 0.3, 0.1])
            verdicts.append([(POSITIVE, NEGATIVE, UNPARSED)[d] for d in drawn])
    return items, verdicts


@pytest.mark.parametrize("unparsed_as", ["negative", "positive"])
def test_scores_are_those_of_a_loop_over_steps(unparsed_as):
    items, verdicts = random_items(0)
    accepting = {POSITIVE, UNPARSED} if unparsed_as == "positive" else {POSITIVE}
    scores = score_prmbench(items, verdicts, seed=0, unparsed_as=unparsed_as)

    def loop(names):
        chosen = [i for i, item in enumerate(items) if item.subset in names]
        return oracle([items[i] for i in chosen], [verdicts[i] for i in chosen], accepting)

    every_class = {name for of in CATEGORIES.values() for name in of}
    assert scores["total"]["prm_score"] == pytest.approx(loop(every_class)["prm_score"])
    by_class = {}
    for name in every_class:
        expected, found = loop({name}), scores["classes"][name]
        by_class[name] = expected["f1" if name == "multi_solutions" else "prm_score"]
        assert found["prm_score"] == pytest.approx(by_class[name])
        assert found["f1"] == pytest.approx(expected["f1"])
        assert found["negative_f1"] == pytest.approx(expected["negative_f1"])
        low, high = found["prm_score_interval"]
        assert low < found["prm_score"] < high
    for category, names in CATEGORIES.items():
        mean = np.mean([by_class[name] for name in names])
        assert scores["categories"][category]["prm_score"] == pytest.approx(mean)
    assert 0 < scores["unparsed_rate"] < 0.3


def test_extreme_judges():
    items, _ = random_items(1)
    truth = [[POSITIVE if i.is_right(s) else NEGATIVE for s in range(len(i.steps))] for i in items]
    perfect = score_prmbench(items, truth, seed=0)
    assert perfect["total"] == {"prm_score": 1.0, "prm_score_interval": [1.0, 1.0]}
    assert {c["prm_score"] for c in perfect["classes"].values() if c["wrong_step_accuracy"]} == {1}
    accepts_all = [[POSITIVE] * len(item.steps) for item in items]
    scores = score_prmbench(items, accepts_all, seed=0)
    assert scores["classes"]["multi_solutions"]["prm_score"] == 1
    circular = scores["classes"]["circular"]
    assert (circular["negative_f1"], circular["right_step_accuracy"]) == (0, 1)
    assert circular["prm_score"] == circular["f1"] / 2 < 0.5


def test_a_category_needs_all_of_its_classes_and_originals_count_in_no_total():
    items, verdicts = random_items(2, ["circular", "redundency", "deception"])
    scores = score_prmbench(items, verdicts, seed=0)
    assert set(scores["categories"]) == {"simplicity"}
    original = PrmBenchItem("correct_0", "correct", "q", ("s",) * 50, ())
    more = score_prmbench([*items, original], [*verdicts, [NEGATIVE] * 50], seed=0)
    assert more["total"]["prm_score"] == scores["total"]["prm_score"]
    assert more["classes"]["correct"]["right_step_accuracy"] == 0

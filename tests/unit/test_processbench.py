"""Scores against brute force and by hand."""

import itertools
import math

import numpy as np
import pytest

from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.paired import paired_comparison
from stepwiser_jax.evaluation.processbench import (
    f1_scores,
    item_outcomes,
    processbench_f1,
    processbench_f1_by_final_answer,
    score_by_subset,
)
from stepwiser_jax.evaluation.statistics import (
    LABEL_SCORES,
    bootstrap_interval,
    count_labels,
    label_scores,
    mcnemar,
    mean,
    observed,
    paired_bootstrap,
)
from stepwiser_jax.evaluation.verdicts import first_predicted_error, majority_verdict
from stepwiser_jax.evaluation.whole_solutions import (
    OUTCOME,
    SCORES,
    solution_scores,
    solutions_by_subset,
)
from stepwiser_jax.records import ProcessBenchItem, Verdict

P, N, U, X = Verdict.POSITIVE, Verdict.NEGATIVE, Verdict.UNPARSED, Verdict.OTHER


def slow_f1(predictions, labels, is_error):
    """Counted item by item, as the official script does with its two lists."""
    right = {True: 0, False: 0}
    total = {True: 0, False: 0}
    for prediction, label, error in zip(predictions, labels, is_error, strict=True):
        total[error] += 1
        right[error] += prediction == label
    a, b = (right[e] / total[e] if total[e] else 0 for e in (True, False))
    return (2 * a * b / (a + b) if a + b else 0), a, b


def test_f1_against_counting():
    rng = np.random.default_rng(0)
    for _ in range(50):
        labels = rng.integers(-1, 4, 30).tolist()
        predictions = rng.integers(-1, 4, 30).tolist()
        final = [bool(x) for x in rng.integers(0, 2, 30)]
        found = processbench_f1(predictions, labels)
        expected = slow_f1(predictions, labels, [label != -1 for label in labels])
        assert tuple(found.values()) == pytest.approx(expected)
        found = processbench_f1_by_final_answer(predictions, labels, final)
        expected = slow_f1(predictions, labels, [not correct for correct in final])
        assert tuple(found.values()) == pytest.approx(expected)


def test_f1_by_hand_and_the_two_splits():
    labels, predictions = [2, 1, -1, -1, 0], [2, 0, -1, 3, 0]
    scores = processbench_f1(predictions, labels)
    assert scores["acc_error"] == pytest.approx(2 / 3)
    assert scores["acc_correct"] == 0.5
    assert scores["f1"] == pytest.approx(2 * 2 / 3 * 1 / 2 / (2 / 3 + 1 / 2))
    other = processbench_f1_by_final_answer(predictions, labels, [True, False, True, True, False])
    assert (other["acc_error"], other["acc_correct"]) == (0.5, pytest.approx(2 / 3))


def test_a_prediction_without_a_label_is_refused():
    with pytest.raises(UserError, match="found 2 predictions, 1 labels"):
        processbench_f1([0, 0], [1])
    with pytest.raises(UserError, match="2 labels and 1 items"):
        processbench_f1_by_final_answer([0, 0], [1, -1], [True])


def test_f1_of_nothing_right_is_zero_not_nan():
    assert processbench_f1([0, 0], [1, -1]) == {"f1": 0.0, "acc_error": 0.0, "acc_correct": 0.0}


@pytest.mark.parametrize(
    ("verdicts", "as_negative", "as_positive"),
    [
        ([P, P], -1, -1),
        ([P, N, N], 1, 1),
        ([P, U, N], 1, 2),
        ([], -1, -1),
        ([U], 0, -1),
        ([P, X, P], 1, -1),
    ],
)
def test_first_predicted_error(verdicts, as_negative, as_positive):
    assert first_predicted_error(verdicts, unparsed_as="negative") == as_negative
    assert first_predicted_error(verdicts, unparsed_as="positive") == as_positive


def test_majority_verdict_for_every_small_vote():
    for votes in itertools.product([P, N, U, X], repeat=4):
        positive, negative = votes.count(P), votes.count(N)
        found = majority_verdict(votes)
        if positive == negative == 0:
            assert found is (X if X in votes else U)
        else:
            assert found is (P if positive > negative else N)


def test_steps_without_a_verdict_are_counted_and_a_box_with_something_else_apart():
    items = [ProcessBenchItem("i", "s", "q", ("a",) * 5, -1, True)]
    scores = score_by_subset(items, [[P, U, X, X, N]], seed=0)["subsets"]["s"]
    assert (scores["unparsed_rate"], scores["other_box_rate"]) == (0.6, 0.4)


def slow_solution_scores(p_correct, is_correct):
    """Counted solution by solution, in a table of four."""
    table = dict.fromkeys(itertools.product([True, False], repeat=2), 0)
    for p, correct in zip(p_correct, is_correct, strict=True):
        table[bool(p >= 0.5), correct] += 1
    hits, false, missed = table[True, True], table[True, False], table[False, True]
    return {
        "binary_f1": 2 * hits / (2 * hits + false + missed) if hits else 0.0,
        "precision": hits / (hits + false) if hits else 0.0,
        "recall": hits / (hits + missed) if hits else 0.0,
        "accuracy": (hits + table[False, False]) / len(is_correct),
    }


def scores_of(p_correct, is_correct):
    outcomes = np.zeros(len(is_correct), OUTCOME)
    outcomes["is_correct"], outcomes["is_accepted"] = is_correct, np.array(p_correct) >= 0.5
    return dict(zip(SCORES, observed(solution_scores(outcomes), len(outcomes)), strict=True))


def test_scores_of_whole_solutions_against_counting():
    rng = np.random.default_rng(0)
    for n in [1, 1, 2, 2, 3, *[30] * 40]:
        p_correct = rng.choice([0.0, 0.2, 0.5, 0.8, 1.0], n).tolist()
        is_correct = [bool(x) for x in rng.integers(0, 2, n)]
        found = scores_of(p_correct, is_correct)
        assert found == pytest.approx(slow_solution_scores(p_correct, is_correct))
    assert set(scores_of([], []).values()) == {0.0}
    # The paper's random baselines: half of all, of which 34% and 24% are correct.
    for share, f1 in ((339, 0.404), (241, 0.325)):
        labels = [True] * share + [False] * (1000 - share)
        found = scores_of([1.0, 0.0] * 500, labels)
        assert found["binary_f1"] == pytest.approx(f1, abs=2e-3)


def test_scores_of_whole_solutions_by_subset():
    items = [
        ProcessBenchItem(f"{i}", subset, "q", ("s",), error, True)
        for i, (subset, error) in enumerate([("a", -1), ("b", 0), ("a", 0), ("b", -1)])
    ]
    found = solutions_by_subset(items, [0.9, 0.9, 0.1, 0.1], [0.0, 0.5, 0.0, 1.0], seed=0)
    for subset, f1, accuracy in (("a", [0, 1], [1, 1]), ("b", [0, 0], [0, 0])):
        assert found["subsets"][subset].pop("binary_f1_interval") == f1
        assert found["subsets"][subset].pop("accuracy_interval") == accuracy
    assert found["average"]["binary_f1_interval"] == [0, 0.5]
    assert found["average"]["accuracy_interval"] == [0.5, 0.5]
    assert found["subsets"]["a"] == slow_solution_scores([1, 0], [True, False]) | {"bad_outputs": 0}
    assert found["subsets"]["b"] == slow_solution_scores([1, 0], [False, True]) | {
        "bad_outputs": 0.75
    }
    assert found["average"]["binary_f1"] == 0.5
    assert found["average"]["bad_outputs"] == 0.375


def test_balanced_accuracy_by_hand():
    """Of all chunks together, whichever problems they are of."""
    problems = [
        [(False, False), (True, False), (True, True)],
        [],
        [(False, True), (False, False), (True, False), (True, False)],
    ]
    scores = label_scores([count_labels(pairs) for pairs in problems])
    assert LABEL_SCORES == ("balanced_accuracy", "negative_precision", "negative_recall")
    assert observed(scores, 3) == [(2 / 5 + 1 / 2) / 2, 2 / 3, 2 / 5]
    times = np.array([[1, 2, 0], [0, 3, 0], [0, 0, 3]])
    assert scores(times).tolist() == [[0.75, 1, 0.5], [0, 0, 0], [1 / 6, 1 / 2, 1 / 3]]


def test_bootstrap_interval_covers_and_narrows():
    rng = np.random.default_rng(0)
    statistic = mean(rng.normal(size=50))
    wide = bootstrap_interval(statistic, np.zeros(50), seed=1)
    narrow = bootstrap_interval(mean(rng.normal(size=5000)), np.zeros(5000), seed=1)
    assert narrow[0] < 0.03 < 0.06 > narrow[1] > -0.06
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])
    assert wide == bootstrap_interval(statistic, np.zeros(50), seed=1)


# --- of two judges ------------------------------------------------------------------------------


def test_mcnemar_counts_every_way_to_deal_out_the_discordant_items():
    for only_a, only_b in itertools.product(range(7), repeat=2):
        ways = [sum(coins) for coins in itertools.product([0, 1], repeat=only_a + only_b)]
        uneven = [abs(2 * a - only_a - only_b) >= abs(only_a - only_b) for a in ways]
        assert mcnemar(only_a, only_b) == pytest.approx(np.mean(uneven)), (only_a, only_b)


def test_mcnemar_is_not_too_sure_and_large_counts_do_not_overflow():
    """Under the null, p <= level at most as often as the level says, at every level."""
    for n in (5, 20, 101):
        p = [mcnemar(k, n - k) for k in range(n + 1)]
        for level in p:
            chance = sum(math.comb(n, k) for k in range(n + 1) if p[k] <= level) / 2**n
            assert chance <= level + 1e-12
    assert mcnemar(1700, 1700) == 1.0
    assert 0.0 <= mcnemar(1000, 2400) < 1e-100


def rates(right, items, repeats, level=0.05):
    """How often two judges that are right with these probabilities are told apart."""
    rng = np.random.default_rng(0)
    found = {"bootstrap": 0, "mcnemar": 0}
    for repeat in range(repeats):
        a, b = (rng.random(items) < p for p in right)
        difference = paired_bootstrap(mean(a), mean(b), np.zeros(items), seed=repeat, samples=199)
        found["bootstrap"] += difference.p <= level
        found["mcnemar"] += mcnemar(int(np.sum(a > b)), int(np.sum(b > a))) <= level
    return {test: count / repeats for test, count in found.items()}


def test_equal_judges_are_seldom_told_apart_and_unequal_ones_are():
    same, different = rates((0.6, 0.6), 100, 300), rates((0.6, 0.8), 100, 50)
    # 0.05 and three standard errors of a share of 300.
    assert max(same.values()) < 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5
    assert same["bootstrap"] > 0
    assert min(different.values()) > 0.6


def test_a_paired_bootstrap_draws_the_same_items_for_both():
    """Two judges that differ by a constant have a difference without any spread."""
    a, strata = np.random.default_rng(0).normal(size=40), np.zeros(40)
    found = paired_bootstrap(mean(a), mean(a + 1), strata, seed=0, samples=500)
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))
    assert found.p == 2 / 501
    nothing = paired_bootstrap(mean(a), mean(a), strata, seed=0, samples=500)
    assert (nothing.value, nothing.low, nothing.high, nothing.p) == (0, 0, 0, 1)


def test_a_paired_bootstrap_draws_within_strata():
    """As many of each as it has: a mean that depends on the stratum alone does not vary."""
    strata = np.array([0, 2, 2, 0, 2, 1])
    a, b, sizes = mean(strata), mean(2 * strata), set()

    def counts(times):
        sizes.update(tuple(np.bincount(np.repeat(strata, row), minlength=3)) for row in times)
        return times[:, 0]

    found = paired_bootstrap(a, b, strata, seed=0, samples=200)
    assert (found.low, found.high) == (pytest.approx(found.value), pytest.approx(found.value))
    paired_bootstrap(counts, counts, strata, seed=0, samples=200)
    assert sizes == {(2, 1, 3)}
    free = paired_bootstrap(a, b, np.zeros(6), seed=0, samples=200)
    assert free.low < free.value < free.high


def test_the_interval_and_p_of_a_paired_bootstrap_agree():
    """Near the border, p is below 5% where the interval leaves 0 out."""
    rng = np.random.default_rng(0)
    seen = set()
    for shift in np.linspace(0.1, 0.5, 20):
        a = rng.normal(size=60)
        b = a + rng.normal(shift, 1, 60)
        found = paired_bootstrap(mean(a), mean(b), np.zeros(60), seed=1, samples=999)
        assert found.low < found.value < found.high
        if not 0.04 < found.p < 0.06:
            assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
            seen.add(found.p < 0.05)
    assert seen == {True, False}


def items_of(labels, subsets):
    return [
        ProcessBenchItem(f"{s}-{i}", s, "q", ("x",) * 5, label, label == -1)
        for i, (s, label) in enumerate(zip(subsets, labels, strict=True))
    ]


def test_a_paired_comparison_has_the_f1_of_the_scores_and_counts_by_hand():
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 3, 60).tolist()
    subsets = rng.choice(["math", "gsm8k", "omnimath"], 60).tolist()
    a, b = (
        [y if rng.random() < p else int(rng.integers(-1, 3)) for y in labels] for p in (0.3, 0.6)
    )
    found = paired_comparison(items_of(labels, subsets), a, b, seed=0)
    assert set(found["subsets"]) == set(subsets)
    expected = {"a": [], "b": []}
    for subset, row in found["subsets"].items():
        of = [i for i in range(60) if subsets[i] == subset]
        assert row["items"] == len(of)
        for judge, predictions in (("a", a), ("b", b)):
            f1 = processbench_f1([predictions[i] for i in of], [labels[i] for i in of])["f1"]
            assert row[f"f1_{judge}"] == pytest.approx(f1)
            expected[judge].append(f1)
        assert row["difference"] == pytest.approx(row["f1_b"] - row["f1_a"])
        assert row["right_by_a_alone"] == sum(a[i] == labels[i] != b[i] for i in of)
        assert row["right_by_b_alone"] == sum(b[i] == labels[i] != a[i] for i in of)
        assert row["mcnemar_p"] == mcnemar(row["right_by_a_alone"], row["right_by_b_alone"])
    average = found["average"]
    assert average["f1_a"] == pytest.approx(np.mean(expected["a"]))
    assert average["f1_b"] == pytest.approx(np.mean(expected["b"]))
    low, high = average["difference_interval"]
    assert low < average["difference"] < high
    for name in ("right_by_a_alone", "right_by_b_alone", "items"):
        assert average[name] == sum(row[name] for row in found["subsets"].values())


def test_a_paired_comparison_the_other_way_round_is_the_negative():
    labels, subsets = [0, 1, -1, -1, 2, -1] * 5, ["gsm8k"] * 30
    a, b = [0, 1, -1, 0, 0, -1] * 5, [0, -1, -1, -1, 2, 0] * 5
    one = paired_comparison(items_of(labels, subsets), a, b, seed=0)["average"]
    other = paired_comparison(items_of(labels, subsets), b, a, seed=0)["average"]
    assert one["difference"] == -other["difference"]
    assert one["difference_interval"] == pytest.approx(
        [-x for x in other["difference_interval"][::-1]]
    )
    assert one["right_by_a_alone"] == other["right_by_b_alone"]
    assert (one["difference_p"], one["mcnemar_p"]) == (other["difference_p"], other["mcnemar_p"])


def test_a_paired_comparison_of_items_without_an_error_is_zero_not_nan():
    found = paired_comparison(items_of([-1, -1], ["x", "x"]), [-1, 0], [-1, -1], seed=0)["average"]
    assert (found["f1_a"], found["f1_b"], found["difference_p"]) == (0, 0, 1)
    assert found["right_by_b_alone"] == 1


def test_resamples_keep_the_size_of_every_stratum():
    assert bootstrap_interval(lambda times: times[:, 0], np.array([0] + [1] * 9), seed=0) == [1, 1]
    assert bootstrap_interval(lambda times: times[:, 0], np.zeros(10), seed=0) == [0, 3]


def test_scores_of_a_resample_are_those_of_its_items():
    """Of several subsets, each of which is in every resample."""
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(-1, 3, (2, 60)).tolist()
    subsets = rng.choice(["math", "gsm8k", "omnimath"], 60).tolist()
    outcomes = item_outcomes(items_of(labels, subsets), predictions)
    times = rng.integers(0, 3, (5, 60))
    for scores, found in ((f1_scores, outcomes), (solution_scores, outcomes.astype(OUTCOME))):
        of_resamples = scores(found)(times)
        assert len(np.unique(of_resamples, axis=0)) == 5
        for values, row in zip(of_resamples, times, strict=True):
            drawn = np.repeat(found, row)
            assert values.tolist() == observed(scores(drawn), len(drawn))


def test_f1_accuracies_and_their_averages_have_intervals():
    """Subset `all` is always right; of the two items of `few` a resample may have one twice, and
    then has no F1."""
    items = [ProcessBenchItem(f"{i}", "all", "q", ("s",), i % 2 - 1, i % 2 == 0) for i in range(60)]
    items += [ProcessBenchItem(f"few{i}", "few", "q", ("s",), i - 1, i == 0) for i in range(2)]
    verdicts = [[P if item.first_error == -1 else N] for item in items]
    scores = score_by_subset(items, verdicts, seed=0)
    for split in ("official", "by_final_answer"):
        for name in ("f1", "acc_error", "acc_correct"):
            key = f"{split}_{name}_interval"
            assert [scores["subsets"][s][key] for s in ("all", "few")] == [[1, 1], [0, 1]]
            assert scores["average"][key] == [0.5, 1]

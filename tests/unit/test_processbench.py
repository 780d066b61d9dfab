"""Scores against brute force and by hand."""

import itertools

import numpy as np
import pytest

from stepwiser_jax.algo.processbench import (
    first_predicted_error,
    majority_verdict,
    processbench_f1,
    processbench_f1_by_final_answer,
)
from stepwiser_jax.algo.rewards import judge_reward
from stepwiser_jax.algo.statistics import balanced_accuracy, bootstrap_interval
from stepwiser_jax.records import Verdict

P, N, U = Verdict.POSITIVE, Verdict.NEGATIVE, Verdict.UNPARSED


def slow_f1(predictions, labels, is_error):
    """Counted item by item, as the official script does with its two lists."""
    right = {True: 0, False: 0}
    total = {True: 0, False: 0}
    for prediction, label, error in zip(predictions, labels, is_error, strict=True):
        total[error] += 1
        right[error] += prediction == label
    a, b = (100 * right[e] / total[e] if total[e] else 0 for e in (True, False))
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
    assert scores["acc_error"] == pytest.approx(200 / 3)
    assert scores["acc_correct"] == 50
    assert scores["f1"] == pytest.approx(2 * 200 / 3 * 50 / (200 / 3 + 50))
    other = processbench_f1_by_final_answer(predictions, labels, [True, False, True, True, False])
    assert (other["acc_error"], other["acc_correct"]) == (50, pytest.approx(200 / 3))


def test_f1_of_nothing_right_is_zero_not_nan():
    assert processbench_f1([0, 0], [1, -1]) == {"f1": 0.0, "acc_error": 0.0, "acc_correct": 0.0}


@pytest.mark.parametrize(
    ("verdicts", "as_negative", "as_positive"),
    [([P, P], -1, -1), ([P, N, N], 1, 1), ([P, U, N], 1, 2), ([], -1, -1), ([U], 0, -1)],
)
def test_first_predicted_error(verdicts, as_negative, as_positive):
    assert first_predicted_error(verdicts, unparsed_as="negative") == as_negative
    assert first_predicted_error(verdicts, unparsed_as="positive") == as_positive


def test_majority_verdict_for_every_small_vote():
    for votes in itertools.product([P, N, U], repeat=4):
        positive, negative = votes.count(P), votes.count(N)
        found = majority_verdict(votes)
        if positive == negative == 0:
            assert found is U
        else:
            assert found is (P if positive > negative else N)


@pytest.mark.parametrize(
    ("verdict", "is_positive", "reward"),
    [
        (P, True, 1.0),
        (P, False, 0.0),
        (N, False, 1.0),
        (N, True, 0.0),
        (U, True, 0.0),
        (U, False, 0.0),
    ],
)
def test_reward(verdict, is_positive, reward):
    assert judge_reward(verdict, is_positive) == reward


def test_balanced_accuracy_by_hand():
    found = balanced_accuracy([False, True, True, False], [False, False, True, True])
    assert found == {"balanced_accuracy": 0.5, "negative_precision": 0.5, "negative_recall": 0.5}
    skewed = balanced_accuracy([True] * 10, [True] * 9 + [False])
    assert skewed["balanced_accuracy"] == 0.5
    assert judge_reward(verdict, is_positive, in_format=False) == reward, "no penalty is set"
    assert judge_reward(verdict, is_positive, format_penalty=0.5) == reward
    assert judge_reward(verdict, is_positive, format_penalty=0.5, in_format=False) == -0.5


def test_bootstrap_interval_covers_and_narrows():
    rng = np.random.default_rng(0)
    wide = bootstrap_interval(rng.normal(size=50).tolist(), np.mean, seed=1)
    narrow = bootstrap_interval(rng.normal(size=5000).tolist(), np.mean, seed=1)
    assert narrow[0] < 0.03 < 0.06 > narrow[1] > -0.06
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])
    assert wide == bootstrap_interval(
        np.random.default_rng(0).normal(size=50).tolist(), np.mean, seed=1
    )

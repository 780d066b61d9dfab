"""Rewards: the judge's, a user's own, and what they leave in the metrics."""

import dataclasses

import pytest

from stepwiser_jax.errors import UserError
from stepwiser_jax.plugins import load
from stepwiser_jax.records import JudgeExample, Verdict
from stepwiser_jax.rl.rewards import (
    REWARDS,
    add_rewards,
    rollout_metrics,
    verdict_metrics,
    verdict_score,
)
from tiny import rollout_group

RIGHT = JudgeExample("e", "p", "start 4 ; * 7 + 5 ?", "", "<chunk> fix </chunk>", True)
POSITIVE, NEGATIVE = (f"\\boxed{{ {word} }}" for word in ("Positive", "Negative"))
TEXTS = [POSITIVE, NEGATIVE, f"looks fine {POSITIVE}", f"looks fine {NEGATIVE}"]


def group(texts=TEXTS, example=RIGHT):
    completions = [list(range(1, 2 + g)) for g in range(len(texts))]
    return dataclasses.replace(rollout_group([1], completions), example=example, texts_G=texts)


@pytest.mark.parametrize(
    ("verdict", "is_positive", "reward"),
    [
        (Verdict.POSITIVE, True, 1.0),
        (Verdict.POSITIVE, False, 0.0),
        (Verdict.NEGATIVE, False, 1.0),
        (Verdict.NEGATIVE, True, 0.0),
        (Verdict.UNPARSED, True, 0.0),
        (Verdict.UNPARSED, False, 0.0),
        (Verdict.OTHER, False, 0.0),
    ],
)
def test_a_verdict_that_is_the_label_earns_1(verdict, is_positive, reward):
    assert verdict_score(verdict, is_positive) == reward


def test_a_judgment_earns_1_if_its_verdict_is_the_label():
    (rewarded,) = add_rewards([group([*TEXTS, "no box"])], REWARDS["verdict"])
    assert rewarded.rewards_G.tolist() == [1, 0, 1, 0, 0]
    assert rewarded.has_signal
    (wrong,) = add_rewards(
        [group(example=dataclasses.replace(RIGHT, is_positive=False))], REWARDS["verdict"]
    )
    assert wrong.rewards_G.tolist() == [0, 1, 0, 1]
    (equal,) = add_rewards([group([POSITIVE] * 3)], REWARDS["verdict"])
    assert not equal.has_signal


def test_a_judgment_that_is_more_than_a_verdict_is_penalized():
    reward = load("verdict", "a reward", REWARDS, {"format_penalty": 0.5})
    (rewarded,) = add_rewards([group()], reward)
    assert rewarded.rewards_G.tolist() == [1, 0, -0.5, -0.5]
    metrics = rollout_metrics([rewarded])
    assert metrics["reward"] == 0
    assert (metrics["reward_verdict"], metrics["reward_format"]) == (0.25, -0.25)


def test_the_share_in_format_is_measured_from_the_texts():
    """Not from what they earn: another term may be negative as well."""
    assert verdict_metrics(TEXTS, bare=True)["in_format_share"] == 0.5
    assert "in_format_share" not in verdict_metrics(TEXTS, bare=False)


def test_judgments_without_a_verdict_are_counted_and_another_box_apart():
    texts = [POSITIVE, "looks fine", "\\boxed{ 4 }", "\\boxed{ }"]
    metrics = verdict_metrics(texts, bare=False)
    assert metrics["verdict_positive_share"] == 0.25
    assert (metrics["unparsed_rate"], metrics["other_box_rate"]) == (0.75, 0.5)


def test_metrics_of_rollouts():
    sampled = add_rewards([group(), group([POSITIVE] * 4)], REWARDS["verdict"])
    assert rollout_metrics(sampled) == {
        "reward": 0.75,
        "reward_verdict": 0.75,
        "groups_sampled": 2,
        "groups_with_signal_share": 0.5,
        "response_tokens": 2.5,
        "response_tokens_max": 4.0,
    }


@pytest.mark.parametrize("value", [float("nan"), None, "1", {"a": 1.0, "b": float("inf")}, [1.0]])
def test_a_reward_that_is_no_finite_number_is_refused(value):
    with pytest.raises(UserError, match=r"finite number.* for g"):
        add_rewards([group()], lambda example, text, tokens: value)

"""The label rules against an independent slow implementation, hand-computed cases, and
properties."""

from fractions import Fraction

import pytest

from stepwiser_jax.rl.labels import LABEL_RULES, label_chunks

M = 16
PARAMS = {
    "abs_q": {},
    "rel_effective": {"alpha": 0.8, "n": 4},
    "rel_ratio": {"gamma": 0.7},
    "relative_progress": {"epsilon": 0.8},
}


def slow(rule, k_before, k, params):
    """From the paper's equations, in exact fractions of M."""
    v, q = Fraction(k_before, M), Fraction(k, M)
    if v == 0:
        return None
    if rule == "abs_q":
        return q > 0
    if rule == "rel_effective":
        best_before = 1 - (1 - v) ** 4
        best_after = 1 - (1 - q) ** 4
        return q > 0 and q + Fraction(str(params["alpha"])) * (best_after - best_before) > 0
    ratio = q / v
    if rule == "rel_ratio":
        return ratio > Fraction(str(params["gamma"]))
    return q > 0 and ratio >= Fraction(str(params["epsilon"]))


@pytest.mark.parametrize("rule", sorted(LABEL_RULES))
def test_every_pair_of_counts_agrees_with_exact_fractions(rule):
    for before in range(M + 1):
        for after in range(M + 1):
            found = label_chunks([before / M, after / M], rule, **PARAMS[rule])
            assert found == [slow(rule, before, after, PARAMS[rule])], (before, after)


# Least number of right rollouts of 16 that is positive, by the number before: the table of
# thresholds that follows from the paper's equations.
@pytest.mark.parametrize(
    ("rule", "params", "least"),
    [
        ("rel_effective", {"alpha": 0.4, "n": 4}, {1: 1, 2: 2, 4: 2, 8: 3, 12: 3, 15: 3, 16: 3}),
        ("rel_effective", {"alpha": 0.8, "n": 4}, {1: 1, 2: 2, 4: 3, 8: 4, 12: 5, 15: 5, 16: 5}),
        ("rel_ratio", {"gamma": 0.7}, {1: 1, 2: 2, 4: 3, 8: 6, 12: 9, 15: 11, 16: 12}),
        ("rel_ratio", {"gamma": 0.8}, {1: 1, 2: 2, 4: 4, 8: 7, 12: 10, 15: 13, 16: 13}),
    ],
)
def test_thresholds(rule, params, least):
    for before, threshold in least.items():
        positive = [k for k in range(M + 1) if label_chunks([before / M, k / M], rule, **params)[0]]
        assert positive == list(range(threshold, M + 1)), before


@pytest.mark.parametrize("rule", sorted(LABEL_RULES))
def test_labels_are_monotone_and_dead_prefixes_teach_nothing(rule):
    values = [0.5, 0.0, 0.0, 0.5, 1.0]
    labels = label_chunks(values, rule, **PARAMS[rule])
    assert labels == [False, None, None, True]
    assert label_chunks([0.0, 1.0], rule, **PARAMS[rule]) == [None]
    assert label_chunks([1.0, 1.0], rule, **PARAMS[rule]) == [True]


def test_ratio_rules_differ_at_equality():
    assert label_chunks([0.5, 0.25], "rel_ratio", gamma=0.5) == [False]
    assert label_chunks([0.5, 0.25], "relative_progress", epsilon=0.5) == [True]


@pytest.mark.parametrize("values", [[0.5], [0.5, 1.2], [-0.1, 0.5]])
def test_bad_values_are_refused(values):
    with pytest.raises(ValueError, match="expected"):
        label_chunks(values, "abs_q")


def test_unknown_rule_is_named():
    with pytest.raises(ValueError, match="'abs'"):
        label_chunks([0.5, 0.5], "abs")

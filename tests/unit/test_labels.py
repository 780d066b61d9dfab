"""The label rules against an independent slow implementation, hand-computed cases, and
properties."""

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwiser_jax.config import Label
from stepwiser_jax.errors import UserError
from stepwiser_jax.rl.examples import balanced
from stepwiser_jax.rl.labels import LABEL_RULES, label_chunks, load_rule

M = 16
PARAMS = {
    "abs_q": {},
    "rel_effective": {"alpha": 0.8, "n": 4},
    "rel_ratio": {"gamma": 0.7},
    "relative_progress": {"epsilon": 0.8},
}
"""The rules of our own that papers define, with the configs' defaults."""


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


@pytest.mark.parametrize("rule", PARAMS)
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


@pytest.mark.parametrize("rule", PARAMS)
def test_python_has_the_defaults_of_the_configs(rule):
    for values in itertools.product([k / M for k in range(M + 1)], repeat=2):
        assert label_chunks(values, rule) == label_chunks(values, rule, **PARAMS[rule])


@pytest.mark.parametrize("rule", sorted(LABEL_RULES))
def test_dead_prefixes_teach_nothing(rule):
    assert label_chunks([0.5, 0.0, 0.0, 0.5, 1.0], rule) == [False, None, None, True]
    assert label_chunks([0.0, 1.0], rule) == [None]
    assert label_chunks([1.0, 1.0], rule) == [True]


VALUES = st.floats(0, 1)


@given(rule=st.sampled_from(sorted(LABEL_RULES)), v=VALUES, q=st.tuples(VALUES, VALUES))
def test_a_better_chunk_never_has_a_worse_label(rule, v, q):
    worse, better = (label_chunks([v, value], rule)[0] for value in sorted(q))
    assert (worse is None) == (better is None) == (v == 0)
    assert not worse or better


@given(st.sampled_from(sorted(LABEL_RULES)), st.lists(VALUES, min_size=2, max_size=9))
def test_a_label_depends_on_its_two_values_alone(rule, values):
    labels = label_chunks(values, rule)
    assert labels == [label_chunks(pair, rule)[0] for pair in itertools.pairwise(values)]
    assert not any(label for label, q in zip(labels, values[1:], strict=True) if q == 0)


@given(st.lists(st.booleans()), st.integers(0, 9))
def test_balanced_examples_are_half_positive_and_in_order(signs, seed):
    class Example:
        def __init__(self, is_positive):
            self.is_positive = is_positive

    examples = [Example(sign) for sign in signs]
    chosen = balanced(examples, seed)
    assert len(chosen) == 2 * min(signs.count(True), signs.count(False))
    assert 2 * sum(example.is_positive for example in chosen) == len(chosen)
    places = [examples.index(example) for example in chosen]
    assert places == sorted(set(places))


OWN_RULE = """
def margin(q: float, v: float, *, delta: float = 0.2) -> bool:
    return q > v - delta
"""


def test_a_rule_of_ones_own_by_dotted_name(tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text(OWN_RULE)
    monkeypatch.syspath_prepend(tmp_path)
    assert label_chunks([0.5, 0.4, 0.1, 0.0, 1.0], "my_rules:margin") == [True, False, True, None]
    assert label_chunks([0.5, 0.4], "my_rules:margin", delta=0.05) == [False]
    settings = {"values": "a", "rollouts": "r", "tokenizer": "t", "rule": "my_rules:margin"}
    config = Label.model_validate(settings | {"rule_args": {"delta": 0.05}})
    assert load_rule(config.rule, config.rule_args)(0.4, 0.5) is False
    with pytest.raises(UserError, match="'my_rules:margin' takes no argument 'gamma'"):
        load_rule("my_rules:margin", {"gamma": 0.7})


def test_arguments_that_a_rule_does_not_take_are_refused():
    with pytest.raises(UserError, match="'rel_effective' takes no argument 'gamma'"):
        label_chunks([0.5, 0.5], "rel_effective", gamma=0.9)


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

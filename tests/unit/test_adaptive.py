"""Known labels: never another one at confidence 1, and the rule itself once all is sampled."""

import itertools
from typing import get_args

import numpy as np
import pytest
import yaml

from stepwiser_jax.config import AdaptiveRollouts, Label
from stepwiser_jax.errors import UserError
from stepwiser_jax.rl.adaptive import LabelTable, final_counts
from stepwiser_jax.rl.labels import LABEL_RULES, DeadPrefix, label_chunks, load_rule
from stepwiser_jax.stages.annotate import label_tables
from stepwiser_jax.stages.label import check_rule

RULES = [load_rule(name) for name in LABEL_RULES]
M = 8


@pytest.mark.parametrize("dead_prefix", get_args(DeadPrefix))
@pytest.mark.parametrize("rule", RULES)
def test_all_rollouts_give_the_rules_label(rule, dead_prefix):
    table = LabelTable(rule, M, dead_prefix)
    for v, q in itertools.product(range(M + 1), repeat=2):
        (expected,) = label_chunks([v / M, q / M], rule, dead_prefix=dead_prefix)
        assert table.is_known((q, M), (v, M), 1.0)
        assert table.likeliest((q, M), (v, M)) == expected


@pytest.mark.parametrize("dead_prefix", get_args(DeadPrefix))
@pytest.mark.parametrize("rule", RULES)
def test_a_label_known_for_certain_is_that_of_every_possible_end(rule, dead_prefix):
    """Against enumeration: known at confidence 1 iff all ends agree."""
    table = LabelTable(rule, M, dead_prefix)
    rng = np.random.default_rng(0)
    known = 0
    for _ in range(400):
        n_q, n_v = rng.integers(0, M + 1, 2)
        q, v = int(rng.integers(0, n_q + 1)), int(rng.integers(0, n_v + 1))
        ends = {
            label_chunks([(v + i) / M, (q + j) / M], rule, dead_prefix=dead_prefix)[0]
            for i in range(M - n_v + 1)
            for j in range(M - n_q + 1)
        }
        assert table.is_known((q, n_q), (v, n_v), 1.0) == (len(ends) == 1)
        if len(ends) == 1:
            known += n_q + n_v < 2 * M
            assert table.likeliest((q, n_q), (v, n_v)) == ends.pop()
    assert known > 20, "the case shows nothing: nothing was known early"


def test_a_prefix_worth_0_ends_the_rollouts_after_it_only_if_it_is_dropped():
    """All its rollouts are wrong. What follows has no label then, or that of its own rollouts."""
    dropped, labelled = (LabelTable(load_rule("abs_q"), M, x) for x in ("drop", "negative"))
    dead = (0, M)
    assert dropped.is_known((0, 1), dead, 1.0) and dropped.likeliest((0, 1), dead) is None
    assert not labelled.is_known((0, M - 1), dead, 1.0)
    assert labelled.is_known((1, 2), dead, 1.0) and labelled.likeliest((1, 2), dead) is True
    assert labelled.is_known((1, 2), (0, 1), 1.0), "eq 1 does not ask for the value before"
    assert not dropped.is_known((1, 2), (0, 1), 1.0)


def test_annotate_samples_for_the_labels_that_it_is_told():
    dead = (0, M), (0, M)
    for settings, expected in (({}, False), ({"dead_prefix": "drop"}, None)):
        tables = label_tables(AdaptiveRollouts(rule="abs_q", **settings), {M, 16})
        assert tables[M].likeliest(*dead) is expected
        assert tables[16].num_rollouts == 16


def test_final_counts_are_those_of_a_beta_and_a_binomial():
    rng = np.random.default_rng(1)
    right, sampled = 3, 5
    p = rng.beta(right + 0.5, sampled - right + 0.5, 400_000)
    simulated = np.bincount(right + rng.binomial(M - sampled, p), minlength=M + 1) / len(p)
    np.testing.assert_allclose(final_counts(right, sampled, M), simulated, atol=3e-3)
    assert final_counts(right, sampled, M).sum() == pytest.approx(1)
    assert final_counts(4, M, M).tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_confidence_is_the_probability_that_the_label_stays():
    """Of many draws from the prior whose label is known at 90%, at least 90% keep it."""
    table = LabelTable(load_rule("rel_effective"), M)
    rng = np.random.default_rng(2)
    kept = []
    for _ in range(3000):
        outcomes = rng.random((2, M)) < rng.beta(0.5, 0.5, (2, 1))
        for n in range(1, M):
            q, v = ((int(row[:n].sum()), n) for row in outcomes)
            if table.is_known(q, v, 0.9):
                full = table.likeliest(*((int(row.sum()), M) for row in outcomes))
                kept.append(table.likeliest(q, v) == full)
                break
    assert len(kept) > 1000 and 0.9 <= np.mean(kept) < 1


def test_annotations_for_another_rule_are_refused(tmp_path):
    def label(**rule):
        return Label(values=str(tmp_path), rollouts="", tokenizer="", **rule)

    check_rule(label())
    adaptive = {"rule": "rel_effective", "rule_args": {"alpha": 0.4}, "confidence": 0.95}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"adaptive": adaptive}))
    check_rule(label(rule_args={"alpha": 0.4}))
    with pytest.raises(UserError, match=r"alpha.: 0\.4.*use that rule"):
        check_rule(label(rule_args={"alpha": 0.8}))
    with pytest.raises(UserError, match=r"not whether values are below min_prefix_value 0\.2"):
        check_rule(label(rule_args={"alpha": 0.4}, min_prefix_value=0.2))
    with pytest.raises(UserError, match="found rule abs_q"):
        check_rule(label(rule="abs_q"))
    with pytest.raises(UserError, match=r"dead_prefix negative were known, .* dead_prefix drop"):
        check_rule(label(rule_args={"alpha": 0.4}, dead_prefix="drop"))
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"adaptive": adaptive | {"dead_prefix": "drop"}})
    )
    check_rule(label(rule_args={"alpha": 0.4}, dead_prefix="drop"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"adaptive": None}))
    check_rule(label(min_prefix_value=0.2))
    (tmp_path / "config.yaml").write_text("group_size: 4")
    check_rule(label())  # no annotations: reading them says so

"""Offline judgments to learn from: which are kept."""

import pytest

from stepwiser_jax.records import Rationale, UserError
from stepwiser_jax.settings import load_config
from stepwiser_jax.stages.rationalize import choose, summarize, to_learn
from stepwiser_jax.text.rationales import Outcome, judgment_outcome


@pytest.mark.parametrize(
    ("text", "finished", "is_positive", "outcome"),
    [
        (r"2 + 2 = 4. \boxed{Positive}", True, True, Outcome.KEPT),
        (r"2 + 2 = 5. \boxed{Negative}", True, False, Outcome.KEPT),
        (r"2 + 2 = 4. \boxed{Positive}", True, False, Outcome.DISAGREES),
        (r"2 + 2 = 5. \boxed{Negative}", True, True, Outcome.DISAGREES),
        ("It is right.", True, True, Outcome.UNPARSED),
        (r"2 + 2 = 4. \boxed{Positive}", False, True, Outcome.UNFINISHED),
    ],
)
def test_a_judgment_is_kept_whose_verdict_is_the_label(text, finished, is_positive, outcome):
    assert judgment_outcome(text, finished, is_positive) is outcome


def rationales(*counts):
    """(label, outcome, how many)."""
    return [
        Rationale(f"{label}-{outcome}/{i}", "p", "asked", f"said {i}", label, outcome)
        for label, outcome, count in counts
        for i in range(count)
    ]


def config(request, *sets):
    file = request.config.rootpath / "configs" / "smoke_rationales.yaml"
    return load_config("rationalize", file, sets)


def test_what_is_learned_is_kept_and_balanced(request):
    written = rationales((True, "kept", 7), (False, "kept", 3), (False, "disagrees", 5))
    everything = choose(config(request), written)
    assert everything == written[:10]
    learned = to_learn(config(request), [], everything)
    assert [e.example_id for e in learned] == [r.rationale_id for r in everything]
    assert [e.completion for e in learned] == [r.completion for r in everything]
    assert {(e.prompt, e.problem_id) for e in learned} == {("asked", "p")}
    chosen = choose(config(request, "balance=true"), written)
    of_class = [rationale.is_positive for rationale in chosen]
    assert (sum(of_class), len(of_class)) == (3, 6)
    assert choose(config(request, "balance=true"), written) == chosen
    assert summarize(written)["rationales"] == {
        "kept": 10,
        "unfinished": 0,
        "unparsed": 0,
        "disagrees": 5,
        "repeated": 0,
    }
    assert summarize(written)["kept_positive_share"] == 0.7


def test_nothing_to_learn_is_refused(request):
    written = rationales((True, "kept", 7), (False, "disagrees", 5))
    assert len(choose(config(request), written)) == 7
    with pytest.raises(UserError, match="kept were 7 of positive and 0 of negative labels"):
        choose(config(request, "balance=true"), written)

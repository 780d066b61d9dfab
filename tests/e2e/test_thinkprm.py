"""ThinkPRM through the command line: chains, what is learned of them, and two scores."""

import json

import pytest

from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import ClassifierExample, Judgment, Rationale, SftExample

pytestmark = pytest.mark.slow


def test_chains_that_agree_with_the_labels_are_learned(thinkprm_runs):
    chains = {r.rationale_id: r for r in read_records(thinkprm_runs / "thinkprm_chains", Rationale)}
    assert len(chains) == 64 * len(read_records(thinkprm_runs / "labels", ClassifierExample))
    learned = read_records(thinkprm_runs / "thinkprm_chains", SftExample)
    assert len(learned) == min(16, sum(r.outcome == "kept" for r in chains.values()))
    for e in learned:
        chain = chains[e.example_id]
        answer = "Positive" if chain.is_positive else "Negative"
        assert chain.outcome == "kept" and e.prompt == chain.prompt
        assert e.completion.endswith(f"}} <judge> {answer}")


def test_two_metrics_stand_apart(thinkprm_runs):
    verified = json.loads((thinkprm_runs / "thinkprm_evaluate" / "summary.json").read_text())
    assert set(verified["greedy"]["average"]["official"]) == {"f1", "acc_error", "acc_correct"}
    of_solutions = {"binary_f1", "precision", "recall", "accuracy", "bad_outputs"}
    for voter in ("greedy", "mean_2"):
        average = verified["solution"][voter]["average"]
        intervals = {name: average.pop(f"{name}_interval") for name in ("binary_f1", "accuracy")}
        assert set(average) == of_solutions
        assert all(0 <= x <= 1 for x in average.values())
        for name, (low, high) in intervals.items():
            assert 0 <= low <= average[name] <= high <= 1


def test_whole_solutions_are_judged_beside_their_steps(thinkprm_runs):
    """One chain an item and path; its score is in no first-error metric."""
    judgments = {
        j.example_id: j for j in read_records(thinkprm_runs / "thinkprm_evaluate", Judgment)
    }
    steps = {j.example_id for j in read_records(thinkprm_runs / "evaluate", Judgment)}
    wholes = [name for name in judgments if "/solution" in name]
    assert set(judgments) - set(wholes) == steps
    items = {name.split("/vote")[0].rsplit("/", 1)[0] for name in steps}
    assert len(wholes) == 3 * len(items)
    for name in wholes:
        whole = judgments[name]
        assert 0 < whole.p_positive < 1
        assert (whole.verdict.value == "Positive") == (whole.p_positive >= 0.5)
        assert whole.completion.endswith(f" <judge> {whole.verdict.value}")

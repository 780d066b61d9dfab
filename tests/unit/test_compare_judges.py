"""The command `compare-judges` on runs that are written down here."""

import json
import re
from pathlib import Path

import pytest
import yaml

from stepwiser_jax.__main__ import main
from stepwiser_jax.evaluation.processbench import processbench_f1
from stepwiser_jax.record_io import read_records, write_manifest
from stepwiser_jax.record_lines import write_records
from stepwiser_jax.records import Judgment, Verdict

LABELS = [2, 1, -1, -1, 0, -1]
OF_A, OF_B = [2, -1, -1, 0, 1, -1], [2, 1, -1, 1, 0, -1]
IDS = ["gsm8k-0", "gsm8k-1", "gsm8k-2", "gsm8k-3", "math-0", "math-1"]


def item(i, **changes):
    fields = {
        "id": IDS[i],
        "problem": f"problem {i}",
        "steps": ["a", "b", "c"],
        "label": LABELS[i],
        "final_answer_correct": LABELS[i] == -1,
    }
    return fields | changes


@pytest.fixture
def items(tmp_path):
    file = tmp_path / "items.json"
    file.write_text(json.dumps([item(i) for i in range(len(LABELS))]))
    return file


def finished_run(directory, stage, settings, p_positive, verdict_of):
    """`p_positive[i][step]`; the verdict is what `verdict_of` makes of it."""
    ids = [row["id"] for row in json.loads(Path(settings["benchmark"]["source"]).read_text())]
    judgments = [
        Judgment(f"{item_id}/{step}", "judge", "", verdict_of(p), p, 0.0)
        for item_id, row in zip(ids, p_positive, strict=False)
        for step, p in enumerate(row)
    ]
    write_records(directory / "records" / "judgments" / "part-00000-of-00001.jsonl", judgments)
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    (directory / "summary.json").write_text("{}")
    write_manifest(directory, stage, "0", [Judgment])
    return directory


def rejecting_from(first, at):
    """P(+) of three steps, the lowest of them at the predicted error."""
    return [at if step == first else 0.9 for step in range(3)]


def evaluated(directory, items, predictions, threshold_subset=None, **judge):
    settings = {
        "judge": {
            "path": "arithmetic",
            "sampling": {"max_new_tokens": 8},
            "engine": {"buckets": [64]},
            **judge,
        },
        "benchmark": {"source": str(items)},
        "threshold_subset": threshold_subset,
    }
    return finished_run(
        directory,
        "evaluate",
        settings,
        [rejecting_from(first, 0.0) for first in predictions],
        lambda p: Verdict.POSITIVE if p > 0.5 else Verdict.UNPARSED,  # which counts as a rejection
    )


def classified(directory, items, predictions, *, threshold):
    settings = {
        "judge": {
            "kind": "classifier",
            "path": "arithmetic",
            "threshold": threshold,
            "max_length": 64,
        },
        "benchmark": {"source": str(items)},
    }
    return finished_run(
        directory,
        "evaluate",
        settings,
        [rejecting_from(first, threshold - 0.05) for first in predictions],
        lambda p: Verdict.POSITIVE if p > 0.5 else Verdict.NEGATIVE,
    )


def compared(capsys, *runs):
    assert main(["compare-judges", *map(str, runs), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def f1(predictions, rows):
    return processbench_f1([predictions[i] for i in rows], [LABELS[i] for i in rows])["f1"]


def test_a_judge_beside_a_classifier_each_counted_as_its_run_counts(tmp_path, items, capsys):
    a = classified(tmp_path / "a", items, OF_A, threshold=0.8)
    b = evaluated(tmp_path / "b", items, OF_B)
    found = compared(capsys, a, b)
    for subset, rows in (("gsm8k", range(4)), ("math", range(4, 6))):
        assert found["subsets"][subset]["f1_a"] == pytest.approx(f1(OF_A, rows))
        assert found["subsets"][subset]["f1_b"] == pytest.approx(f1(OF_B, rows))
    assert found["average"]["right_by_a_alone"] == 0
    assert found["average"]["right_by_b_alone"] == 2
    assert found["average"]["mcnemar_p"] == 0.5


def test_steps_without_a_verdict_count_as_the_rule_of_the_run_says(tmp_path, items, capsys):
    """For GenPRM they have the probability 1/2, which a lower threshold accepts."""
    a = evaluated(tmp_path / "a", items, OF_A)
    b = evaluated(tmp_path / "b", items, OF_A, kind="genprm", threshold=0.4)
    found = compared(capsys, a, b)["average"]
    assert (found["right_by_a_alone"], found["right_by_b_alone"]) == (1, 1)
    assert found["f1_b"] == 0 < found["f1_a"]


def test_the_table_has_a_column_a_subset_and_the_average(tmp_path, items, capsys):
    runs = [evaluated(tmp_path / n, items, p) for n, p in (("a", OF_A), ("b", OF_B))]
    assert main(["compare-judges", *map(str, runs)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"gsm8k ┃ +math ┃ +average ┃", out)
    assert f"B: {runs[1]} (greedy)" in out
    cells = {
        line.split("│")[1].strip(): line.split("│")[2] for line in out.splitlines() if "│" in line
    }
    before, after = f1(OF_A, range(4)), f1(OF_B, range(4))
    assert float(cells["F1 of A"]) == pytest.approx(100 * before, abs=0.05)
    assert float(cells["F1 of B"]) == pytest.approx(100 * after, abs=0.05)
    assert float(cells["B - A"]) == pytest.approx(100 * (after - before), abs=0.05)
    assert float(cells["95% from"]) <= float(cells["B - A"]) <= float(cells["to"])
    # A step has 0 where an error is predicted, else 0.9. Of 2 first errors A finds one and B both;
    # of 9 right steps each rejects one.
    auc_a, auc_b = (8 + 0.5 + 8 / 2) / 18, (8 + 0.5) / 9
    assert float(cells["AUC of A"]) == pytest.approx(auc_a, abs=5e-4)
    assert float(cells["AUC of B"]) == pytest.approx(auc_b, abs=5e-4)
    assert float(cells["AUC, B - A"]) == pytest.approx(auc_b - auc_a, abs=1e-3)
    low, high = float(cells["AUC, 95% from"]), float(cells["AUC, to"])
    assert low <= float(cells["AUC, B - A"]) <= high


def test_a_judge_that_writes_counts_at_its_threshold(tmp_path, items, capsys):
    """The written verdicts find what B found. P is below 0.95 at every first step."""
    a = evaluated(tmp_path / "a", items, OF_B)
    b = evaluated(tmp_path / "b", items, OF_B, threshold=0.95)
    found = compared(capsys, a, b)
    assert (found["counted_a"], found["counted_b"]) == ("greedy", "greedy at threshold 0.95")
    assert found["subsets"]["gsm8k"]["f1_b"] == f1([0] * len(LABELS), range(4))
    assert found["average"]["auc_a"] == found["average"]["auc_b"]


def test_a_threshold_that_was_chosen_on_a_subset_says_so(tmp_path, items, capsys):
    """It flatters the judge there, and in the average."""
    a = evaluated(tmp_path / "a", items, OF_A)
    b = evaluated(tmp_path / "b", items, OF_B, threshold_subset="math")
    found = compared(capsys, a, b)["counted_b"]
    assert re.fullmatch(r"greedy at threshold [\d.]+, chosen on math, one of these subsets", found)


@pytest.mark.parametrize("genprm", [False, True])
def test_votes_count_together(tmp_path, items, capsys, genprm):
    """Greedy, everything is right; of three votes two, or the mean, say what B found."""
    settings = {"votes": 3} | ({"kind": "genprm", "threshold": 0.4} if genprm else {})
    b = evaluated(tmp_path / "b", items, [-1] * len(LABELS), **settings)
    part = next((b / "records" / "judgments").iterdir())
    judgments = read_records(b, Judgment)
    for i, name in enumerate(IDS):
        for step in range(3):
            rejects = step == OF_B[i]
            for k, p in enumerate([0.0, 0.9, 0.2] if rejects else [0.9, 0.9, 0.0]):
                verdict = Verdict.POSITIVE if p > 0.5 else Verdict.NEGATIVE
                judgments.append(Judgment(f"{name}/{step}/vote{k}", "judge", "", verdict, p, 0.0))
    write_records(part, judgments)
    write_manifest(b, "evaluate", "0", [Judgment])
    a = classified(tmp_path / "a", items, OF_A, threshold=0.8)
    greedy = compared(capsys, a, b)
    assert (greedy["counted_a"], greedy["counted_b"]) == ("threshold 0.8", "greedy")
    assert greedy["average"]["f1_b"] == 0
    voted = compared(capsys, a, b, "--votes")
    assert voted["counted_b"] == ("mean_3" if genprm else "majority_3")
    assert voted["subsets"]["gsm8k"]["f1_b"] == pytest.approx(f1(OF_B, range(4)))
    assert "--votes: expected an evaluate run with votes" in refused(capsys, a, a, "--votes")


def refused(capsys, *runs):
    assert main(["compare-judges", *map(str, runs)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": ["a", "b", "C"]}, "item 4 is gsm8k-3 in .* and gsm8k-3 in .* differ in steps"),
        ({"id": "gsm8k-9"}, "item 4 is gsm8k-3 in .* and gsm8k-9 in .* differ in item_id"),
    ],
)
def test_other_items_are_refused_by_the_first_that_differs(
    tmp_path, items, capsys, changes, message
):
    a = evaluated(tmp_path / "a", items, OF_A)
    other = tmp_path / "other.json"
    rows = [item(i, **(changes if i == 3 else {})) for i in range(5)]
    other.write_text(json.dumps(rows))
    b = evaluated(tmp_path / "b", other, OF_B[:5])
    assert re.search(message, refused(capsys, a, b))


def test_fewer_items_are_refused(tmp_path, items, capsys):
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps([item(i) for i in range(4)]))
    runs = [
        evaluated(tmp_path / "a", fewer, OF_A[:4]),
        evaluated(tmp_path / "b", items, OF_B),
    ]
    message = refused(capsys, *runs)
    assert (
        f"{runs[0]} has 4 and {runs[1]} 6; the first that {runs[1]} alone has is math-0" in message
    )


def test_runs_that_cannot_be_compared_are_refused(tmp_path, items, capsys):
    a = evaluated(tmp_path / "a", items, OF_A)
    assert "found nothing at" in refused(capsys, a, tmp_path / "nowhere")
    unfinished = evaluated(tmp_path / "unfinished", items, OF_B)
    (unfinished / "manifest.json").unlink()
    assert "is not finished" in refused(capsys, unfinished, a)
    rollout = evaluated(tmp_path / "rollout", items, OF_B)
    write_manifest(rollout, "rollout", "0", [Judgment])
    assert "expected a run of evaluate, found one of rollout" in refused(capsys, a, rollout)
    grown = evaluated(tmp_path / "grown", items, OF_A[:5])
    assert "grown has no judgment math-1/0" in refused(capsys, grown, a)

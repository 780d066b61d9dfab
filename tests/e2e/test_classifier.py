"""A classifier through the command line, on a rule that it can learn in a minute."""

import json

import numpy as np
import pytest

from stepwiser_jax.__main__ import main
from stepwiser_jax.record_io import read_records
from stepwiser_jax.record_lines import write_records
from stepwiser_jax.records import ClassifierExample, Judgment

from .conftest import CONFIGS


def planted(count, seed):
    """Chunks of a word and a digit, of which one in three is wrong: where the two do not belong
    together. Labels go on behind the first error."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        digits, wrong = rng.integers(0, 6, 4), rng.random(4) < 1 / 3
        words = [("same", "diff")[(d % 2) ^ w] for d, w in zip(digits, wrong, strict=True)]
        yield f"planted-{i}", [f"{d} {w}" for d, w in zip(digits, words, strict=True)], ~wrong


def write_solutions(path, count):
    """Hard labels are the rule's; by soft ones a wrong chunk is worth 1/4 and a right one 3/4."""
    write_records(
        path,
        [
            ClassifierExample(
                name, name, "start ?", tuple(chunks), (0, 1, 3), tuple(right[[0, 1, 3]].tolist()),
                tuple(np.where(right, 0.75, 0.25)[[0, 1, 3]].tolist()),
            )
            for name, chunks, right in planted(count, seed=0)
        ],
    )  # fmt: skip


def write_items(path, count):
    rows = [
        {
            "id": name,
            "problem": "start ?",
            "steps": chunks,
            "label": -1 if right.all() else int(np.argmin(right)),
            "final_answer_correct": bool(right.all()),
        }
        for name, chunks, right in planted(count, seed=1)
    ]
    path.write_text(json.dumps(rows))


def stage(name, run, *sets):
    words = [word for setting in sets for word in ("--set", setting)]
    config = {"train-classifier": "classifier", "evaluate": "evaluate_classifier"}[name]
    arguments = [name, "--config", str(CONFIGS / f"smoke_{config}.yaml"), "--run-dir", str(run)]
    assert main(arguments + words) == 0
    return json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize(
    ("labels", "head", "mesh", "entropy"),
    [
        ("hard", "signs", "fsdp", 0.0),
        pytest.param("soft", "signs", "data", 0.5623, marks=pytest.mark.slow),
        pytest.param("hard", "scalar", "fsdp", 0.0, marks=pytest.mark.slow),
    ],
)
def test_it_learns_a_rule_and_finds_first_errors(tmp_path, labels, head, mesh, entropy):
    """`entropy`: of the labels, which a loss cannot be below."""
    write_solutions(tmp_path / "solutions.jsonl", 400)
    write_items(tmp_path / "items.json", 60)
    trained = stage(
        "train-classifier",
        tmp_path / "classifier",
        "model.path=arithmetic",
        f"examples.source={tmp_path / 'solutions.jsonl'}",
        "validation=null",
        f"labels={labels}",
        f"head={head}",
        f"mesh.{mesh}=2",
        "max_length=64",
        "batch_size=8",
        "steps=80",
        "epochs=null",
        "training.checkpoint_every=80",
    )
    assert trained["accuracy"] == 1
    assert entropy < trained["loss"] < entropy + 0.05
    scores = stage(
        "evaluate",
        tmp_path / "scores",
        f"judge.path={tmp_path / 'classifier'}",
        f"benchmark.source={tmp_path / 'items.json'}",
        "threshold_subset=planted",
        "judge.max_length=64",
        f"mesh.{mesh}=2",
    )
    assert scores["threshold_chosen_on"] == "planted" and 0.3 < scores["threshold"] < 0.7
    assert scores["greedy"]["average"]["official"]["f1"] > 0.95
    assert scores["greedy"]["subsets"]["planted"]["by_final_answer"]["f1"] > 0.95
    found = read_records(tmp_path / "scores", Judgment)
    assert len(found) == 60 * 4
    if labels == "soft":
        values = np.array([judgment.p_positive for judgment in found])
        assert np.quantile(np.minimum(abs(values - 0.25), abs(values - 0.75)), 0.9) < 0.1
    given = stage(
        "evaluate",
        tmp_path / "given",
        f"judge.path={tmp_path / 'classifier'}",
        f"benchmark.source={tmp_path / 'items.json'}",
        "threshold_subset=null",
        "judge.threshold=1e-9",
        "judge.max_length=64",
    )
    assert given["threshold_chosen_on"] is None
    assert given["greedy"]["average"]["official"]["acc_error"] == 0, "nothing is below it"
    assert given["greedy"]["average"]["official"]["acc_correct"] == 1

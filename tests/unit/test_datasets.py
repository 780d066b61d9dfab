"""Readers: the columns of the data sets in use, and what is wrong with an unreadable file."""

import json

import pytest

from stepwiser_jax.records import JudgeExample, UserError, write_records
from stepwiser_jax.text.datasets import load_judge_examples, load_problems, load_processbench

ITEM = {
    "id": "gsm8k-7",
    "generator": "some model",
    "problem": "1 + 1 + 1?",
    "steps": ["1 + 1 = 2", "2 + 1 = 4", "so 4"],
    "final_answer_correct": False,
    "label": 1,
}


def write(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(rows))
    return str(path)


def test_answers_come_from_the_columns_of_gsm8k_and_math(tmp_path):
    folder = tmp_path / "math"
    folder.mkdir()
    rows = [
        {"question": " Half of 6? ", "answer": "6 / 2 = <<6/2=3>>3\n#### 3", "problem": None},
        {"problem": "Half?", "answer": "\\frac12"},
        {"problem": "A square?", "solution": "so \\boxed{x^{2}}."},
    ]
    columns = ("question", "problem", "answer", "solution")
    rows = [{column: row.get(column) for column in columns} for row in rows]
    problems = load_problems(write(folder / "test.jsonl", rows))
    assert [p.answer for p in problems] == ["3", "\\frac12", "x^{2}"]
    assert problems[0].question == "Half of 6?"
    assert [p.problem_id for p in problems] == [f"math/test/{i:06d}" for i in range(3)]
    assert len(load_problems(str(folder / "test.jsonl"), limit=2)) == 2


def test_processbench_items_and_the_judge_examples_made_of_them(tmp_path):
    right = ITEM | {"id": "gsm8k-8", "label": -1, "final_answer_correct": True}
    source = write(tmp_path / "gsm8k.json", [ITEM, right])
    items = load_processbench(source)
    assert [(i.item_id, i.subset, i.first_error) for i in items] == [
        ("gsm8k-7", "gsm8k", 1),
        ("gsm8k-8", "gsm8k", -1),
    ]
    examples = load_judge_examples(source)
    assert [(e.example_id, e.is_positive) for e in examples] == [
        ("gsm8k-7/0", True),
        ("gsm8k-7/1", False),
        ("gsm8k-8/0", True),
        ("gsm8k-8/1", True),
        ("gsm8k-8/2", True),
    ]
    assert examples[4].history == "1 + 1 = 2\n\n2 + 1 = 4"


def test_judge_examples_from_records(tmp_path):
    examples = [JudgeExample("a/0", "a", "1+1?", "", "it is 2", True)]
    write_records(tmp_path / "examples.jsonl", examples)
    assert load_judge_examples(str(tmp_path / "examples.jsonl")) == examples


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 3}, "expected a label from -1 to 2 for 3 steps, found 3"),
        ({"steps": []}, "expected 'steps', a list of at least one, found"),
        ({"label": None}, "expected a 'label', the index of a step, found"),
        ({"final_answer_correct": None}, "'final_answer_correct'"),
        ({"problem": None}, "expected a 'problem', a text, found"),
        ({}, "the id 'gsm8k-7' is there twice"),
    ],
)
def test_a_broken_processbench_row_is_named(tmp_path, change, message):
    source = write(tmp_path / "items.json", [ITEM, ITEM | change])
    with pytest.raises(UserError, match="row 2") as error:
        load_processbench(source)
    assert message in str(error.value)


def test_files_that_are_not_there_or_hold_nothing(tmp_path):
    for name, content, message in (
        ("none.jsonl", None, "found nothing"),
        ("empty.jsonl", "", "is empty"),
        (
            "broken.jsonl",
            '{"question": "a"}\n{"question"\n',
            "cannot read .*: JSON .* in row 1",
        ),
        ("list.csv", "a,b\n", "expected a"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            load_problems(str(tmp_path / name))

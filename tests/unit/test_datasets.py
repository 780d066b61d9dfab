"""Readers: the columns of the data sets in use, and what is wrong with an unreadable file."""

import json
from collections import Counter

import pytest

from stepwiser_jax.data.datasets import (
    load_benchmark,
    load_judge_examples,
    load_problems,
    load_solutions,
)
from stepwiser_jax.errors import UserError
from stepwiser_jax.record_lines import write_records
from stepwiser_jax.records import JudgeExample

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
    items = load_benchmark(source)
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
        load_benchmark(source)
    assert message in str(error.value)


def test_files_that_are_not_there_or_hold_nothing(tmp_path):
    for name, content, message in (
        ("none.jsonl", None, "found nothing"),
        ("empty.jsonl", "", "is empty"),
        ("blank.jsonl", "\n \n", "is empty"),
        ("empty.json", "[ ]", "is empty"),
        ("broken.json", '[{"question": "a"},\n{"question"]', "not a list in JSON: .* line 2"),
        ("broken.parquet", "no", "cannot read the file"),
        ("list.csv", "a,b\n", "expected a"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            load_problems(str(tmp_path / name))


PROBLEM = {"problem": "Half of 6?", "solution": "It is \\boxed{3}.", "source": "orca_math"}


def test_numina_math(tmp_path):
    messages = [{"role": "user", "content": "Half of 6?"}]
    source = write(tmp_path / "train.jsonl", [PROBLEM | {"messages": messages}])
    (problem,) = load_problems(source)
    assert (problem.question, problem.answer, problem.source) == ("Half of 6?", "3", "orca_math")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"problem": "Prove it.", "solution": "As was to be shown."}', "has no answer"),
        (b'{"problem": "Half of 6?", "answer": "3", "problem_id": "p"}', "id 'p' is there twice"),
        (b"[3]", r"with named columns, found \[3\]"),
        (b'{"problem": "Half', "expected one JSON object a line, .* at column 13"),
        (b'{"problem": "\xff"}', "expected UTF-8"),
        (b'{"problem": "\\ud800", "answer": "3"}', "half of a surrogate pair in .*ud800"),
        (b'{"problem": "3?", "answer": "3", "problem_id": "\\udc00"}', "half of a surrogate pair"),
    ],
)
def test_malformed_rows_are_named_and_stop_or_are_left_out(tmp_path, caplog, bad, message):
    good = json.dumps(PROBLEM).encode()
    first = json.dumps(PROBLEM | {"problem_id": "p"}).encode()
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([first, b"", bad, good, good, b""]))
    source = str(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 3: .*{message}"):
        load_problems(source)
    dropped = Counter()
    problems = load_problems(source, on_malformed="skip", dropped=dropped)
    # Ids are those of the rows, whatever was left out before them.
    stem = f"{tmp_path.name}/rows"
    assert [p.problem_id for p in problems] == ["p", f"{stem}/000002", f"{stem}/000003"]
    assert dropped == {"malformed": 1}
    assert "rows.jsonl, line 3: " in caplog.records[0].getMessage() and len(caplog.records) == 1
    assert len(load_problems(source, on_malformed="skip", limit=2)) == 2


@pytest.mark.parametrize(("indent", "lines"), [(None, (2, 4)), (1, (2, 8))])
def test_rows_of_a_list_are_named_with_the_lines_they_begin_on(tmp_path, indent, lines):
    for number, line in enumerate(lines, 1):
        rows = [PROBLEM, PROBLEM]
        rows[number - 1] = {"text": "a", "b": 1, "c": 2}
        content = ",\n\n".join(json.dumps(row, indent=indent) for row in rows)
        (tmp_path / "rows.json").write_text(f"\n[{content}\n]\n")
        with pytest.raises(UserError, match=rf"rows\.json, row {number} \(line {line}\): expected"):
            load_problems(str(tmp_path / "rows.json"))
        assert len(load_problems(str(tmp_path / "rows.json"), on_malformed="skip")) == 1


def test_few_of_many_malformed_rows_are_named(tmp_path, caplog):
    rows = [{"problem": f"{i}?"} | ({"answer": "3"} if i == 20 else {}) for i in range(25)]
    source, dropped = write(tmp_path / "rows.jsonl", rows), Counter()
    assert len(load_problems(source, on_malformed="skip", dropped=dropped)) == 1
    assert dropped == {"malformed": 24}
    *named, others = [record.getMessage() for record in caplog.records]
    assert len(named) == 10 and all("rows.jsonl, line " in line for line in named)
    assert others.startswith("left out: 14 more malformed rows, the last one is ")


def test_a_shuffle_is_of_the_seed_alone_and_keeps_ids(tmp_path):
    """As are the ids written here: on every machine."""
    from datasets import Dataset

    rows = [{"question": f"q{i}", "answer": str(i)} for i in range(12)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    for source in (write(tmp_path / "rows.jsonl", rows), str(tmp_path / "rows.parquet")):
        problems = load_problems(source, shuffle_seed=0, limit=5)
        assert [p.question for p in problems] == ["q10", "q4", "q0", "q6", "q11"]
        assert [int(p.problem_id.split("/")[-1]) for p in problems] == [10, 4, 0, 6, 11]
        other = load_problems(source, shuffle_seed=1, limit=5)
        assert [p.question for p in other] != [p.question for p in problems]
        everything = load_problems(source, shuffle_seed=0)
        assert everything[:5] == problems and len(everything) == 12


def test_a_hub_data_set_is_read_no_further_than_the_limit(monkeypatch):
    import datasets

    class Table(list):
        read = 0

        def __getitem__(self, number):
            self.read += 1
            return super().__getitem__(number)

    table = Table({"question": f"q{i}", "answer": "1"} for i in range(1000))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    assert len(load_problems("hub/math", shuffle_seed=0, limit=7)) == 7
    assert table.read <= 8


def test_where_no_row_is_good_nothing_is_read(tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(UserError, match=r"all rows are malformed, .* line 2"):
        load_problems(source, on_malformed="skip")


SHEPHERD = {"input": "Q? Step 1: a ки\nStep 2: b ки", "label": "Q? Step 1: a +\nStep 2: b -"}
PRM800K = {
    "timestamp": "2022-07-30T23:23:32.118856",
    "question": {"problem": "Q?", "ground_truth_answer": "29"},
    "label": {
        "steps": [
            {"completions": [{"text": "a", "rating": 1}], "chosen_completion": 0},
            {"completions": [{"text": "b", "rating": -1}, {"text": "c", "rating": 0}]},
        ],
        "finish_reason": "found_error",
    },
}


def test_rows_of_several_formats_lie_in_one_file(tmp_path):
    """And what is missing in one of them stays missing: rows are read one by one."""
    source = write(tmp_path / "mixed.jsonl", [SHEPHERD, PRM800K, ITEM])
    solutions = load_solutions(source)
    assert [s.source for s in solutions] == ["math-shepherd", "prm800k", "prm800k", "gsm8k"]
    row = f"{tmp_path.name}/mixed/000001"
    assert [s.record_id for s in solutions[1:]] == [f"{row}#0", f"{row}#1", "gsm8k-7"]
    examples = load_judge_examples(source)
    assert [e.example_id for e in examples[2:]] == [
        f"{row}#0/0",
        f"{row}#0/1",
        f"{row}#1/1",
        "gsm8k-7/0",
        "gsm8k-7/1",
    ]
    assert [e.is_positive for e in examples] == [True, False, True, False, True, True, False]
    dropped = Counter()
    items = load_benchmark(source, on_malformed="skip", dropped=dropped)
    assert [i.first_error for i in items] == [1, 1] and dropped == {"malformed": 1}


STEPWISE = {"prompt": "Q?", "completions": ["a", "b", "c"], "labels": [True, False, True]}


def test_stepwise_supervision_is_read_as_trl_had_it(tmp_path):
    source = write(tmp_path / "own.jsonl", [STEPWISE, STEPWISE | {"labels": [0.75, 0.5, 0]}])
    examples = load_judge_examples(source)
    assert [(e.history, e.chunk, e.is_positive) for e in examples[-3:]] == [
        ("", "a", True),
        ("a", "b", True),
        ("a\n\nb", "c", False),
    ]
    assert [e.is_positive for e in examples[:-3]] == [True, True, True], "c is right, so b is"
    write(tmp_path / "own.jsonl", [STEPWISE | {"labels": [True]}])
    with pytest.raises(UserError, match="expected a label for each of 'completions', found 1 labe"):
        load_judge_examples(source)


def test_parquet_gives_what_json_gives(tmp_path):
    from datasets import Dataset

    for name, rows in (
        ("prm800k", [PRM800K] * 2),
        ("shepherd", [SHEPHERD] * 2),
        ("pb", [ITEM]),
        ("trl", [STEPWISE]),
    ):
        (tmp_path / name).mkdir()
        Dataset.from_list(rows).to_parquet(str(tmp_path / name / "rows.parquet"))
        source = write(tmp_path / name / "rows.jsonl", rows)
        assert load_solutions(source) == load_solutions(str(tmp_path / name / "rows.parquet"))
    broken = tmp_path / "pb" / "broken.parquet"
    Dataset.from_list([ITEM, ITEM | {"label": 9}]).to_parquet(str(broken))
    with pytest.raises(UserError, match=r"broken.parquet, row 2: expected a label from -1 to 2"):
        load_solutions(str(broken))


def test_a_problem_that_is_bad_teaches_nothing(tmp_path):
    label = PRM800K["label"] | {"finish_reason": "bad_problem"}
    source = write(tmp_path / "prm.jsonl", [PRM800K | {"label": label}, SHEPHERD])
    dropped = Counter()
    assert len(load_judge_examples(source, dropped=dropped)) == 2
    assert dropped == {"bad_problem": 1}
    assert len(load_solutions(source)) == 3


def test_a_run_that_is_not_there_is_taken_for_a_hub_id(tmp_path):
    with pytest.raises(UserError, match=r"expected a data file, found nothing at"):
        load_judge_examples(str(tmp_path / "labels"))


def test_hub_data_sets_are_read_by_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(source, subset, split):
        asked.append((source, subset, split))
        hub = {
            "gsm8k": datasets.Dataset.from_list([ITEM]),
            "math": datasets.Dataset.from_list([ITEM | {"id": "math-1"}, ITEM | {"label": 9}]),
        }
        return hub if split is None else hub[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [i.item_id for i in load_benchmark("Qwen/PB", split="gsm8k")] == ["gsm8k-7"]
    items = load_benchmark("Qwen/PB", split=("gsm8k", "math"), on_malformed="skip")
    assert [(i.item_id, i.subset) for i in items] == [("gsm8k-7", "gsm8k"), ("math-1", "math")]
    dropped = Counter()
    examples = load_judge_examples("Qwen/PB", on_malformed="skip", dropped=dropped)
    assert {e.problem_id for e in examples} == {"gsm8k-7", "math-1"} and dropped["malformed"] == 1
    with pytest.raises(UserError, match="Qwen/PB, math row 2: expected a label"):
        load_judge_examples("Qwen/PB")
    splits = ("gsm8k", "gsm8k", "math", None, None)
    assert asked == [("Qwen/PB", None, split) for split in splits]
    with pytest.raises(UserError, match=r"found nothing at Qwen/PB .*on the hub: 'train'"):
        load_problems("Qwen/PB")

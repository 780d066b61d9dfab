"""Problems of evaluation sets do not get into training data, however they are spaced or named."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest

from stepwiser_jax.config import DataSource, Mesh
from stepwiser_jax.config_files import load_config
from stepwiser_jax.data.held_out import drop_held_out, held_out_questions
from stepwiser_jax.data.problems import read_problems
from stepwiser_jax.errors import UserError
from stepwiser_jax.record_lines import write_records
from stepwiser_jax.records import JudgeExample, Problem
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.stages import train_judge

PROBLEMS = [Problem(f"p/{i}", question, "3", "t") for i, question in enumerate(["a b", "b", "c"])]


def held_out(tmp_path, *rows):
    file = tmp_path / "held_out.json"
    file.write_text(json.dumps(rows))
    return str(file)


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "a\n b "},
        {"question": "ab"},
        {"question": {"problem": " a b"}},
        {"question": "x", "original_question": "a b", "modified_question": "y"},
        {"question": "x", "original_question": "y", "modified_question": "a b"},
    ],
)
def test_white_space_and_columns_do_not_hide_a_problem(tmp_path, row):
    questions = held_out_questions([held_out(tmp_path, row, {"problem": "A b"})])
    dropped = Counter()
    assert drop_held_out(PROBLEMS, questions, dropped) == PROBLEMS[1:]
    assert dropped == {"excluded": 1}


def test_nothing_held_out_drops_nothing(tmp_path):
    dropped = Counter()
    assert drop_held_out(PROBLEMS, held_out_questions([]), dropped) == PROBLEMS
    assert not dropped


def test_mistakes_are_named(tmp_path):
    source = held_out(tmp_path, {"problem": "a"}, {"text": "b"})
    with pytest.raises(UserError, match=r"row 2 .*expected a 'problem' or 'question', found"):
        held_out_questions([source])
    with pytest.raises(UserError, match="none of 1 records is left"):
        drop_held_out(PROBLEMS[:1], frozenset({"ab"}))


def test_rollout_reads_problems_without_those_excluded(tmp_path):
    rows = [{"question": p.question, "answer": p.answer} for p in PROBLEMS] + [{"question": "d"}]
    (tmp_path / "problems.json").write_text(json.dumps(rows))
    settings = DataSource(
        source=str(tmp_path / "problems.json"),
        on_malformed="skip",
        exclude=(held_out(tmp_path, {"problem": "c"}),),
    )
    dropped = Counter()
    assert [p.question for p in read_problems(settings, dropped)] == ["a b", "b"]
    assert dropped == {"malformed": 1, "excluded": 1}


def test_generated_problems_are_not_excluded(pytestconfig):
    file = pytestconfig.rootpath / "configs" / "smoke_rollouts.yaml"
    with pytest.raises(UserError, match="shuffle and exclude are for data sets"):
        load_config("rollout", file, ("problems.exclude=[held_out.json]",))


def test_the_limit_counts_what_malformed_and_excluded_rows_leave(tmp_path):
    rows = [{"question": q, "answer": "1"} for q in "abcdefgh"]
    rows[1] = {"question": "b"}
    (tmp_path / "problems.json").write_text(json.dumps(rows))
    settings = DataSource(
        source=str(tmp_path / "problems.json"),
        on_malformed="skip",
        limit=3,
        exclude=(held_out(tmp_path, {"problem": "a"}, {"problem": "d"}),),
    )
    dropped = Counter()
    assert [p.question for p in read_problems(settings, dropped)] == ["c", "e", "f"]
    assert dropped == {"malformed": 1, "excluded": 2}, "and no row is read in vain"
    everything = (held_out(tmp_path, *({"problem": q} for q in "abcdefgh")),)
    with pytest.raises(UserError, match="none of 7 records is left"):
        read_problems(settings.model_copy(update={"exclude": everything}))


def test_a_run_holds_problems_to_read_and_to_exclude(tmp_path):
    run = RunDirectory(tmp_path / "run", "rollout", Mesh())
    run.writer(Problem).append(PROBLEMS[:2])
    run.finish(dict)
    of_run = DataSource(source=str(tmp_path / "run"), limit=1)
    assert read_problems(of_run) == PROBLEMS[:1]
    rows = [{"question": p.question, "answer": p.answer} for p in PROBLEMS]
    (tmp_path / "problems.json").write_text(json.dumps(rows))
    settings = DataSource(source=str(tmp_path / "problems.json"), exclude=(str(tmp_path / "run"),))
    assert [p.question for p in read_problems(settings)] == ["c"]


def test_the_judge_is_trained_without_those_excluded(tmp_path, request):
    question = read_problems(DataSource(source="arithmetic", limit=1, split="train"))[0].question
    short, long = question, question * 20
    examples = [
        JudgeExample("a/0", "a", short, "", short, True),
        JudgeExample("b/0", "b", short + "1", "", short, True),
        JudgeExample("c/0", "c", long, "", short, True),
    ]
    write_records(tmp_path / "examples.jsonl", examples)
    with open(tmp_path / "examples.jsonl", "a") as file:
        file.write("{}\n")
    config = load_config(
        "train-judge",
        request.config.rootpath / "configs" / "smoke_judge.yaml",
        (
            f"examples.source={tmp_path / 'examples.jsonl'}",
            "examples.on_malformed=skip",
            f"examples.exclude=[{held_out(tmp_path, {'problem': short})}]",
        ),
    )
    loaded = SimpleNamespace(tokenizer=load_tokenizer_of("arithmetic"))
    kept, dropped = train_judge.load_examples(config, loaded)
    assert kept == examples[1:2]
    assert dropped == {"too_long": 1, "malformed": 1, "excluded": 1}
    short = config.model_copy(update={"max_prompt_tokens": 1})
    with pytest.raises(UserError, match=r"examples\.jsonl is left: 3 were read, and all 2 that"):
        train_judge.load_examples(short, loaded)

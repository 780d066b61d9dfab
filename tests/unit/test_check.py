"""`stepwiser check`: a user's own solution, judged by the judge of the package."""

import builtins
import doctest
import io
import json
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file

import stepwiser_jax
from stepwiser_jax.__main__ import main
from stepwiser_jax.checksums import read_checksums
from stepwiser_jax.commands.check import EXAMPLE
from stepwiser_jax.config import ChunkSolutions
from stepwiser_jax.data.unlabelled import Unlabelled, solutions_of_file, solutions_of_text
from stepwiser_jax.errors import UserError
from stepwiser_jax.judges import check as checking
from stepwiser_jax.judges.base import ChunkJudgment, Solution, SolutionJudgment
from stepwiser_jax.judges.check import PACKAGED, Checker
from stepwiser_jax.judges.settings import KEPT, exported_settings, judge_settings
from stepwiser_jax.model.hf import save_hf
from stepwiser_jax.records import Verdict
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.runs.progress import printable
from stepwiser_jax.text.chunking import cut, cut_at_tags
from stepwiser_jax.text.tokenizer import known_words, unknown_words

ROOT = Path(stepwiser_jax.__file__).parents[1]

QUESTION = "start 4 ; * 7 + 5 ; * 4 + 5 ; * 3 + 5 ?"
RIGHT = ["4 * 7 = 8 ; 8 + 5 = 3", "3 * 4 = 2 ; 2 + 5 = 7", "7 * 3 = 1 ; 1 + 5 = 6", "\\boxed{ 6 }"]
WRONG_FIRST = ("start 2 ; * 6 - 1 ; * 2 - 3 ?", ["2 * 6 = 7 ; 7 - 1 = 6", "6 * 2 = 2 ; 2 - 3 = 9"])
WRONG_THIRD = (
    "start 7 ; * 3 - 9 ; * 8 + 2 ; * 2 - 7 ?",
    ["7 * 3 = 1 ; 1 - 9 = 2", "2 * 8 = 6 ; 6 + 2 = 8", "8 * 2 = 6 ; 6 - 7 = 3"],
)


def words(question, steps):
    return ["check", "--problem", question, *(w for step in steps for w in ("--step", step))]


def checked(capsys, *arguments):
    """Returns the JSON objects that the command prints."""
    assert main([*arguments, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(scope="module")
def check():
    return Checker.load()


# --- the judge of the package ---------------------------------------------------------------------


def test_the_judge_of_the_package_on_three_solutions(check):
    right = check(QUESTION, RIGHT)
    assert [x.verdict for x in right.chunks] == [Verdict.POSITIVE] * 4 and right.first_error == -1
    assert all(x.p_positive > 0.95 for x in right.chunks) and right.unknown_words == ()

    wrong = check(*WRONG_FIRST)
    assert wrong.first_error == 0 and wrong.chunks[1].verdict is Verdict.POSITIVE
    assert wrong.chunks[0].completion.startswith("2 * 6 = 2 7 diff")
    assert wrong.chunks[0].p_positive < 0.05

    assert check(*WRONG_THIRD).first_error == 2


def test_the_package_holds_all_that_the_judge_needs():
    """Of what is in the directory, pyproject.toml names every file."""
    assert {file.name for file in PACKAGED.iterdir()} == {
        *("README.md", "SHA256SUMS", "config.json", "generation_config.json", "model.safetensors"),
        *(KEPT, "stepwiser_prompts.yaml", "tokenizer.json", "tokenizer_config.json"),
    }
    assert '"judges/arithmetic/*"' in (ROOT / "pyproject.toml").read_text()
    assert sum(file.stat().st_size for file in PACKAGED.iterdir()) < 1.2e6


def test_a_text_is_cut_and_tags_are_added(check):
    tagged = " ".join(f"<chunk> {step} </chunk>" for step in WRONG_THIRD[1])
    for solution in (tagged, "\n\n".join(WRONG_THIRD[1])):
        found = check(WRONG_THIRD[0], solution)
        assert found == check(*WRONG_THIRD)
    assert list(found.solution.chunks) == WRONG_THIRD[1]


# --- the command ----------------------------------------------------------------------------------


def test_without_anything_it_shows_an_example(capsys):
    assert main(["check"]) == 0
    said = capsys.readouterr().out
    assert "It knows chains of arithmetic" in said and EXAMPLE.question in said
    (line,) = [line for line in said.splitlines() if "the first error" in line and "✗" in line]
    assert line.startswith("  2 ✗ Negative   P(Positive) 0.0") and line.endswith("the first error")
    assert "judge: 8 * 6 = 8 8 same ; 8 - 2 = 6 1 diff | \\boxed{ Negative }" in said
    assert "The first error is in chunk 2 of 4." in said


def test_a_right_solution(capsys):
    assert main(words(QUESTION, RIGHT)) == 0
    said = capsys.readouterr().out
    assert "No error found in 4 chunks." in said
    assert "first error" not in said and "Warning" not in said


def test_json_is_one_object_a_line(capsys):
    (found,) = checked(capsys, *words(*WRONG_FIRST))
    assert list(found) == [
        *("judge", "id", "question", "chunks", "whole", "first_error", "unknown_words")
    ]
    assert found["judge"].startswith("arithmetic@") and found["id"] == "solution"
    assert found["question"] == WRONG_FIRST[0]
    assert found["whole"] is None and found["first_error"] == 0 and found["unknown_words"] == []
    first, second = found["chunks"]
    assert list(first) == ["text", "verdict", "p_positive", "reasoning"]
    assert first["text"] == WRONG_FIRST[1][0]
    assert (first["verdict"], second["verdict"]) == ("Negative", "Positive")
    assert first["p_positive"] < 0.05 < second["p_positive"] <= 1
    assert first["reasoning"].endswith("| \\boxed{ Negative }")


def test_rows_of_a_file(tmp_path, capsys):
    rows = [
        {"problem": WRONG_FIRST[0], "solution": "\n\n".join(WRONG_FIRST[1])},
        {"id": "mine", "question": WRONG_THIRD[0], "steps": WRONG_THIRD[1]},
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    first, second = checked(capsys, "check", "--file", str(file))
    assert (first["id"], first["first_error"]) == (f"{file}/1", 0)
    assert (second["id"], second["first_error"]) == ("mine", 2)


def test_stdin_and_a_solution_apart_from_its_problem(monkeypatch, capsys):
    text = "\n\n".join(WRONG_THIRD[1])
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{WRONG_THIRD[0]}\n\n{text}\n"))
    (whole,) = checked(capsys, "check", "--file", "-")
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    (apart,) = checked(capsys, "check", "--file", "-", "--problem", WRONG_THIRD[0])
    assert whole == apart and whole["id"] == "stdin" and whole["first_error"] == 2


def test_on_a_terminal_it_asks(monkeypatch, capsys):
    typed = iter(
        ["", WRONG_FIRST[0], *WRONG_FIRST[1], "", WRONG_FIRST[0], "", QUESTION, "5 ; " * 99, "", ""]
    )
    next(typed)
    monkeypatch.setattr(builtins, "input", lambda _: next(typed))
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda _: True})())
    assert main(["check", str(PACKAGED)]) == 0
    said = capsys.readouterr().out
    assert "The first error is in chunk 1 of 2." in said and EXAMPLE.question not in said
    # A mistake is said, and it goes on.
    assert "solution 2: expected a solution of at least one chunk" in " ".join(said.split())
    assert "solution 3, step 0" in said and next(typed, None) is None


def test_unknown_words_are_named_with_those_that_are_known(capsys):
    assert main(words("start 5 ; * 3 - 7 ?", ["so 5 * 3 = 15"])) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Warning: the judge has never seen these words, so it guesses: so 15." in said
    assert "It knows these, with spaces between: 0 1 2 3 4 5 6 7 8 9 start ; * + - = ?" in said
    (found,) = checked(capsys, *words("start 5 ; * 3 - 7 ?", ["so 5 * 3 = 15"]))
    assert found["unknown_words"] == ["so", "15"]


def test_what_a_tokenizer_knows(word_tokenizer, bpe_tokenizer):
    assert unknown_words(word_tokenizer, "start 12 ; x x <pad>") == ("12", "x", "<pad>")
    assert unknown_words(bpe_tokenizer, "any wörd <|im_end|>") == ()
    known = known_words(word_tokenizer)
    assert known[:2] == ("0", "1") and "<eos>" not in known and "<judge>" in known


def test_nothing_that_is_printed_steers_the_terminal(capsys):
    assert main(words("start \x1b[31m", ["[bold]5[/bold] \x1b]0;title\x07", "\x9b2J"])) == 0
    said = capsys.readouterr().out
    assert "[bold]5[/bold]" in said
    assert not set(said) & {"\x1b", "\x07", "\x9b"}
    assert printable("a\u202eb\tc\nd") == "a\ufffdb\tc\nd"


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problem", "x"], "found no solution: give --problem and --step, or --file"),
        (["RUN"], "found nothing: give --problem and --step, or --file"),
        (["--step", "x"], "expected the problem of these steps, found none: add --problem"),
        (["--step", "x", "--problem", "y", "--file", "z"], "--step or from --file, found both"),
        (["--step", " ", "--problem", "y"], "expected text in every chunk, found none in chunk 0"),
        (["--step", "x", "--problem", " "], "expected a problem, found an empty text"),
        (["--file", "none.txt"], "expected a file with a problem and its solution, found nothing"),
        (["--file", "."], "found the directory ."),
        (["RUN", "--problem", "x", "--step", "y"], "found nothing at RUN"),
        ([".", "--problem", "x", "--step", "y"], f"neither a config.yaml nor a {KEPT} in ."),
        (["--cut", "R", "--problem", "x", "--step", "y"], "--cut: expected tags, blank_lines, or"),
        (["--problem", "x", "--step", "5 " * 200], "step 0: prompt of 205 tokens"),
        (["--problem", "x", "--step", "5 " * 200], "--set judge.engine.buckets=[N]"),
        (
            ["--set", "judge.vote=1", "--problem", "x", "--step", "y"],
            "unknown key 'judge.vote'; did you mean 'votes'?",
        ),
    ],
)
def test_a_mistake_gives_one_message(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["check", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found an empty text"),
        ("a problem alone", "found no blank line"),
        ("a\n\n<chunk> b <chunk> c </chunk>", "found unbalanced tags"),
        ("a\n\nb <chunk> c </chunk>", "found text outside of chunks"),
        ("a\n\n<chunk> </chunk>", "found empty chunk"),
        ('{"problem": "a"}', "stdin, row 1: expected 'question' or 'problem', and 'steps'"),
        ('{"problem": "a", "steps": [1]}', "row 1: expected texts in 'steps', found [1]"),
        ('{"id": "x", "problem": "a", "steps": ["b"]}\n' * 2, "line 2: the id 'x' is there twice"),
        ('{"problem": "a", "steps": ["b"]}\nno', "stdin, line 2: expected one JSON object a line"),
    ],
)
def test_a_text_that_cannot_be_read(text, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert main(["check", "--file", "-"]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_is_no_judge(tmp_path, capsys):
    config = ChunkSolutions.model_validate(TEACHER)
    RunDirectory(tmp_path / "run", "chunk-solutions", config).finish(lambda: {})
    ask = ["--problem", "x", "--step", "y"]
    assert main(["check", str(tmp_path / "run"), *ask]) == 2
    said = capsys.readouterr().err
    assert "expected a run that trained a judge" in said and "found one of chunk-solutions" in said

    (tmp_path / "run" / "manifest.json").unlink()
    assert main(["check", str(tmp_path / "run"), *ask]) == 2
    assert "is not finished" in capsys.readouterr().err

    model = tmp_path / "hf"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert main(["check", str(model), *ask]) == 2
    assert "is a model that does not say how it is asked" in capsys.readouterr().err


# --- cutting --------------------------------------------------------------------------------------

TEACHER = {
    "rollouts": "r",
    "tokenizer": "t",
    "num_segmentations": 1,
    "teacher": {"kind": "rule", "splitter": "sentences"},
}


def test_text_after_the_last_tag_joins_the_last_chunk():
    assert cut_at_tags("<chunk>\na\n</chunk>\n<chunk>b</chunk>") == ("a", "b")
    assert cut_at_tags("<chunk> a </chunk> so \\boxed{1}") == ("a\nso \\boxed{1}",)
    assert cut("a\n\nb\nc\n\n\nd") == ("a", "b\nc", "d")
    with pytest.raises(UserError, match="found text outside of chunks"):
        cut_at_tags("a b")


def test_the_way_to_cut_may_be_named(tmp_path, capsys):
    """`<chunk>` is text if blank lines are to be the borders."""
    file = tmp_path / "own.txt"
    file.write_text(f"{QUESTION}\n\n<chunk> 4 * 7 = 8\n\n8 + 5 = 3 </chunk>")

    def texts(*how):
        (found,) = checked(capsys, "check", "--file", str(file), *how)
        return [chunk["text"] for chunk in found["chunks"]]

    assert texts() == texts("--cut", "tags") == ["4 * 7 = 8\n\n8 + 5 = 3"]
    assert texts("--cut", "blank_lines") == ["4 * 7 = 8", "8 + 5 = 3"]

    config = ChunkSolutions.model_validate(TEACHER)
    RunDirectory(tmp_path / "cutter", "chunk-solutions", config).finish(lambda: {})
    file.write_text(f"{QUESTION}\n\n4 * 7 = 8. 8 + 5 = 3")
    assert texts("--cut", str(tmp_path / "cutter")) == ["4 * 7 = 8.", "8 + 5 = 3"]


def test_files_of_others_are_read(tmp_path):
    steps = ["s", "t"]
    rows = [
        {"id": "p", "problem": "q", "steps": steps, "label": 1, "final_answer_correct": False},
        {"input": "q Step 1: s ки\nStep 2: t ки", "label": "q Step 1: s +\nStep 2: t -"},
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    found = solutions_of_file(file)
    assert found[0] == Unlabelled("p", "q", ("s", "t")) and found[1].question == "q"
    assert len(found[1].solution) == 2
    file.write_text(json.dumps(rows[0], indent=2))
    assert solutions_of_file(file) == found[:1]
    assert solutions_of_text("[1] a problem\n\nb", "x") == [Unlabelled("x", "[1] a problem", "b")]
    file.write_text("no rows")
    with pytest.raises(UserError, match="expected rows in JSON"):
        solutions_of_file(file)


# --- how a judge is asked -------------------------------------------------------------------------


def settings_of_training(**changes):
    engine = {"rows": [2], "buckets": [64], "weights": "model"}
    trained = {"prompt_style": "instruct", "sampling": {"max_new_tokens": 9}, "engine": engine}
    return {"model": {"path": "m", "dtype": "bfloat16"}, "grpo": {}, **trained, **changes}


def test_an_export_says_how_its_judge_is_asked(tmp_path):
    text = exported_settings(settings_of_training())
    assert text is not None
    (tmp_path / KEPT).write_text(text)
    judge = judge_settings(tmp_path, ["judge.votes=3"])
    assert (judge.kind, judge.path, judge.dtype) == ("stepwiser", str(tmp_path), "bfloat16")
    assert (judge.prompt_style, judge.votes) == ("instruct", 3)
    assert (judge.sampling.max_new_tokens, judge.engine.buckets) == (9, (64,))

    classifier = {"head": "signs", "prompt_style": "bare", "max_length": 32, "model": {}}
    (tmp_path / KEPT).write_text(str(exported_settings(classifier)))
    assert (judge_settings(tmp_path).kind, judge_settings(tmp_path).max_length) == (
        "classifier",
        32,
    )
    assert exported_settings({"model": {}, "prompt_style": "bare", "steps": 3}) is None


def test_an_export_may_be_smaller_and_hold_more(tiny_model, tmp_path):
    save_hf(tiny_model, None, str(tmp_path / "hf"), "float16", texts={KEPT: "judge: {}"})
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert {str(array.dtype) for array in stored.values()} == {"float16"}
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert (tmp_path / "hf" / KEPT).read_text() == "judge: {}"
    assert KEPT in read_checksums(tmp_path / "hf")


def test_a_run_that_used_a_judge_says_how(tmp_path, monkeypatch):
    judge = {"kind": "genprm", "path": "p", "code_rounds": 0, "sampling": {"max_new_tokens": 9}}
    judge |= {"engine": {"rows": [2], "buckets": [64]}}
    run = tmp_path / "run"
    run.mkdir()
    settings = {"judge": judge, "threshold_subset": "gsm8k"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr("stepwiser_jax.judges.settings.read_manifest", lambda _: {"stage": stage})
    (run / "summary.json").write_text('{"threshold": 0.25}')
    stage = "evaluate"
    found = judge_settings(run)
    assert (found.kind, found.path, found.threshold) == ("genprm", "p", 0.25)
    stage = "rejection-sample"
    with pytest.raises(UserError, match="found one of rejection-sample"):
        judge_settings(run)


class Spoken:
    """A judge that has said it all before: [vote][chunk]."""

    judge_id = "spoken"

    def __init__(self, votes, whole=None):
        self.votes, self.whole = votes, whole

    def check_lengths(self, solutions): ...

    def sample(self, solutions, suffixes, **drawing):
        self.asked, self.drawing = solutions, drawing
        assert len(suffixes) == len(self.votes)
        return [[SolutionJudgment(list(vote), self.whole) for vote in self.votes]]


def spoken(p_positive, verdict=None):
    given = Verdict.POSITIVE if p_positive >= 0.5 else Verdict.NEGATIVE
    return ChunkJudgment("text", verdict or given, p_positive, 1)


def test_votes_thresholds_and_missing_verdicts_count_as_in_evaluate(word_tokenizer, tmp_path):
    def first_error(votes, *overrides):
        (tmp_path / KEPT).write_text(str(exported_settings(settings_of_training())))
        settings = judge_settings(tmp_path, overrides)
        judge = Spoken(votes)
        chunks = tuple("5" for _ in votes[0])
        found = Checker(judge, settings, word_tokenizer).check([Solution("s", "5", chunks)])[0]
        assert judge.asked[0].chunks == chunks  # instruct: no tags
        return found.first_error

    greedy = [[spoken(0.9), spoken(0.7), spoken(0.4)]]
    assert first_error(greedy) == 2
    assert first_error(greedy, "judge.threshold=0.8") == 1
    unparsed = [[spoken(0.9), spoken(0.5, Verdict.UNPARSED), spoken(0.4)]]
    assert first_error(unparsed) == 1
    assert first_error(unparsed, "judge.threshold=0.3") == -1
    votes = [[spoken(0.9), spoken(p)] for p in (0.9, 0.4, 0.4)]
    assert first_error(votes, "judge.votes=3") == 1
    assert first_error(votes, "judge.votes=3", "judge.threshold=0.5") == -1


def test_a_judgment_of_the_whole_is_shown(word_tokenizer):
    settings = judge_settings(PACKAGED)
    whole = spoken(0.25)
    checker = Checker(Spoken([[spoken(0.9)]], whole), settings, word_tokenizer)
    found = checker("5", ["5"])
    assert found.whole == whole and found.to_fields()["whole"]["p_positive"] == 0.25
    assert checker.judge.asked[0].chunks == ("<chunk> 5 </chunk>",)


# --- what the documentation shows ----------------------------------------------------------------


def test_the_examples_of_the_library():
    from stepwiser_jax.evaluation import processbench
    from stepwiser_jax.rl import labels

    for module in (checking, processbench, labels):
        failed, tried = doctest.testmod(module)
        assert tried and not failed


@pytest.mark.parametrize("page", ["README.md", "docs/check.md"])
def test_the_examples_of_the_pages(page):
    failed, tried = doctest.testfile(str(ROOT / page), module_relative=False)
    assert tried and not failed

"""The report: what it collects, what it writes, and what it says of runs that are not whole."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml

from stepwiser_jax.__main__ import main
from stepwiser_jax.commands import report as command
from stepwiser_jax.record_io import write_manifest
from stepwiser_jax.record_lines import write_records
from stepwiser_jax.records import (
    ChunkAttempt,
    ChunkLabel,
    ClassifierExample,
    Judgment,
    SearchResult,
    Verdict,
)
from stepwiser_jax.report import page
from stepwiser_jax.report.collect import Contents, collect
from stepwiser_jax.report.figures import evaluate_tables, search_figures, training_charts
from stepwiser_jax.report.solutions import (
    CUT,
    JUDGED,
    LABEL_NOT_TRUTH,
    MISSED,
    NOT_LABEL,
    UNPARSED,
    WRONG_ANSWER,
    WRONG_VERDICT,
    Judged,
    ShownSolution,
    Solutions,
    flags_of,
    judge_flags_of,
)

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror=alert(1)>",
    "half of a pair \ud800",
    "$$\\frac{1}{",
    "x" * 1_000_000,
]
PART = "part-00000-of-00001.jsonl"
ITEMS = [("a", 1, False), ("b", -1, True), ("c", 0, False)]
"""Id, first error, and whether the final answer is right."""


def evaluated(directory, verdicts, *, finished=True, question="what is 1 + 1?"):
    """A run of evaluate on three items of two steps, with P(Positive) as given."""
    benchmark = directory.parent / "items.json"
    rows = [
        {
            "id": name,
            "problem": question,
            "steps": ["one", "two"],
            "label": first_error,
            "final_answer_correct": is_right,
        }
        for name, first_error, is_right in ITEMS
    ]
    benchmark.parent.mkdir(parents=True, exist_ok=True)
    benchmark.write_text(json.dumps(rows))
    judgments = [
        Judgment(f"{name}/{step}", "judge", f"because {step}", verdict, 0.5, 0.0)
        for (name, _, _), of_item in zip(ITEMS, verdicts, strict=True)
        for step, verdict in enumerate(of_item)
    ]
    write_records(directory / "records" / "judgments" / PART, judgments)
    judge = {"path": "arithmetic", "sampling": {"max_new_tokens": 8}, "engine": {"buckets": [64]}}
    settings = {"judge": judge, "benchmark": {"source": str(benchmark)}}
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    if finished:
        scores = {"items": 3, "official": {"f1": 0.5}, "official_f1_interval": [0.4, 0.6]}
        summary = {"greedy": {"subsets": {"math": scores}, "average": scores}}
        (directory / "summary.json").write_text(json.dumps(summary))
        write_manifest(directory, "evaluate", "0", [Judgment])
    return directory


P, N, U = Verdict.POSITIVE, Verdict.NEGATIVE, Verdict.UNPARSED
OF_A = [(P, P), (P, P), (N, N)]
OF_B = [(P, N), (P, N), (N, U)]


@pytest.fixture
def runs(tmp_path):
    return [evaluated(tmp_path / name, of) for name, of in (("run_a", OF_A), ("run_b", OF_B))]


# --- what is collected --------------------------------------------------------------------------


def test_judgments_of_several_runs_are_of_one_solution(runs):
    report = collect(runs, 100)
    assert report.judges == ["run_a", "run_b"] and not report.notices
    a, b, c = report.solutions
    assert (a.id, a.chunks, a.first_error, a.is_correct) == ("a", ["one", "two"], 1, False)
    assert a.judged[0].chunks == [
        [("Positive", 0.5, "because 0")],
        [("Positive", 0.5, "because 1")],
    ]
    assert [solution.judged[0].predicted for solution in (a, b, c)] == [-1, -1, 0]
    assert [solution.judged[1].predicted for solution in (a, b, c)] == [1, 1, 0]
    assert c.truth == [False, None], "ProcessBench says nothing of steps after the first error"


def test_two_runs_are_compared_item_by_item(runs):
    (found,) = collect(runs, 100).comparisons
    assert found["cells"] == [2, 1, 0], "only b, only a, both"
    average = found["statistics"]["average"]
    assert (average["right_by_a_alone"], average["right_by_b_alone"]) == (1, 1)
    assert average["items"] == 3 and "auc_difference_interval" in average


def test_runs_on_other_items_are_not_compared(tmp_path):
    runs = [evaluated(tmp_path / "1" / "run", OF_A)]
    runs.append(evaluated(tmp_path / "2" / "run", OF_A, question="another"))
    report = collect(runs, 100)
    assert report.judges == ["1/run", "2/run"]
    assert not report.comparisons


def test_a_directory_of_runs_is_one_report(runs):
    assert collect([runs[0].parent], 100).judges == ["run_a", "run_b"]


def test_a_run_that_was_moved_finds_its_data_beside_it(tmp_path):
    run = evaluated(tmp_path / "there" / "run", OF_A)
    (tmp_path / "there").rename(tmp_path / "here")
    report = collect([tmp_path / "here" / run.name], 100)
    assert len(report.solutions) == 3 and not report.notices


def test_labels_and_values_of_data_without_rollouts(tmp_path):
    run = tmp_path / "labels"
    example = ClassifierExample("s", "p", "q?", ("one", "two"), (0, 1), (True, False), (0.9, 0.1))
    labels = [ChunkLabel("s", 0, 0.9, 0.5, True, "r"), ChunkLabel("s", 1, 0.1, 0.9, False, "r")]
    write_records(run / "records" / "classifier_examples" / PART, [example])
    write_records(run / "records" / "chunk_labels" / PART, labels)
    settings = {"values": "gone", "rollouts": "gone", "tokenizer": "arithmetic"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "summary.json").write_text("{}")
    write_manifest(run, "label", "0", [ClassifierExample, ChunkLabel])
    report = collect([run], 100)
    (solution,) = report.solutions
    assert solution.values == [[0.5, 1.0], [0.9, 1.0], [0.1, 1.0]]
    assert solution.labels == [True, False]
    assert report.runs[0]["charts"], "labels have charts"
    assert "gone" in report.notices[0], "and what is missing is named"


def test_a_search_shows_what_each_method_found(tmp_path):
    run = tmp_path / "search"
    attempt = ChunkAttempt(0, 1, "text", Verdict.POSITIVE, 0.7, "why", True)
    results = [
        SearchResult(f"p/{m}", "p", m, "2", m == "greedy", "text", 5, 3, 0, 0, (), 0, attempts=own)
        for m, own in (("greedy", ()), ("chunk_reset", (attempt,)))
    ]
    write_records(run / "records" / "search_results" / PART, results)
    settings = {
        "policy": {"path": "arithmetic"},
        "judge": {"path": "x", "sampling": {"max_new_tokens": 8}, "engine": {"buckets": [8]}},
        "problems": {"source": "nowhere.jsonl"},
        "sampling": {"max_new_tokens": 9},
        "engine": {"buckets": [8]},
        "max_chunk_tokens": 8,
    }
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (session,) = collect([run], 100).sessions
    assert [r["rejected_tokens"] for r in session["results"]] == [3, 3]
    assert session["results"][1]["attempts"] == [vars(attempt) | {"verdict": "Positive"}]
    index = page.session_index([session])
    assert dict(zip(index["methods"], index["right"], strict=True)) == {
        "greedy": [1],
        "chunk_reset": [0],
    }


def test_a_limit_leaves_solutions_out_and_says_so(runs):
    report = collect(runs, 2)
    assert len(report.solutions) == 2
    assert "shows 2 of 3" in report.notices[0]
    assert report.comparisons[0]["statistics"]["average"]["items"] == 3, "numbers count all"


def test_the_index_says_what_filters_ask_for():
    solution = ShownSolution(
        "s", "o", "", "q", ["1", "2", "3"], labels=[True, None, True], truth=[True, False, None],
        first_error=1, is_correct=False, is_cut=True,
        judged={0: Judged([[("Negative", 0.1, "")], [("Positive", 0.9, "")], []], predicted=0)},
    )  # fmt: skip
    assert flags_of(solution) == WRONG_ANSWER + CUT + 16
    solution.labels = [False, None, True]
    assert flags_of(solution) & LABEL_NOT_TRUTH
    assert judge_flags_of(solution, 0) == JUDGED + WRONG_VERDICT + MISSED
    solution.judged[0].chunks[2] = [("Unparsed", 0.5, "")]
    solution.judged[0].chunks[0] = [("Positive", 0.9, "")]
    assert judge_flags_of(solution, 0) == JUDGED + WRONG_VERDICT + MISSED + NOT_LABEL + UNPARSED
    assert judge_flags_of(solution, 1) == 0


def test_a_solution_keeps_what_each_run_knows_of_it():
    solutions = Solutions()
    kept = solutions.add(ShownSolution("s", "rollouts", "", "q", ["1"], values=[[1, 2], [2, 2]]))
    solutions.add(ShownSolution("s", "heldout", "math", "q", ["1"], truth=[True]))
    assert (kept.origin, kept.subset, kept.truth) == ("rollouts", "math", [True])
    assert kept.values is not None
    solutions.add(ShownSolution("s", "heldout", "math", "q", ["another text"]))
    assert len(solutions) == 2


def test_a_training_has_its_curves():
    lines = [{"step": s, "reward": s / 1000, "x": float("nan"), "time": "t"} for s in range(1, 901)]
    (reward,) = training_charts(lines)
    (series,) = reward["series"]
    assert reward["title"] == "Reward" and len(series["x"]) == 300
    assert series["x"][0] == 2 and series["y"][0] == pytest.approx(0.002), "means of three steps"


def test_tables_have_intervals():
    row = {"official": {"f1": 0.5}, "official_f1_interval": [0.4, 0.6], "auc": 0.7}
    (table,) = evaluate_tables({"greedy": {"subsets": {"math": row}, "average": row}, "items": 3})
    assert table["columns"] == [["", "text"], ["F1", "percent"], ["AUC", "number"]]
    assert table["rows"] == [["greedy, math", [0.5, 0.4, 0.6], 0.7]]
    vote = {"accuracy": 0.6, "samples": 5.0, "flops": 3e6, "accuracy_interval": [0.5, 0.7]}
    found = {"greedy": vote, "majority_at_equal_flops": {"at_most": vote, "next": None}}
    (table,), (chart,) = search_figures(found)
    assert [row[0] for row in table["rows"]] == ["greedy", "majority of 5, at most its FLOPs"]
    assert chart["series"][0]["x"] == [3.0, 3.0]


# --- the page -----------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The scripts and styles of a page with their texts, and its content security policy."""

    def __init__(self, text):
        super().__init__()
        self.found, self.policy, self.tags = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]
        if tag in ("script", "style"):
            self.found.append([tag, attributes, ""])

    def handle_data(self, data):
        if self.found and self.cdata_elem:
            self.found[-1][2] += data

    def data(self):
        return {a["id"]: page.unpack(text) for _, a, text in self.found if "id" in a}


def hostile_report():
    def judged(text):
        return {0: Judged([[("x", 0.5, text)]])}

    solutions = [
        ShownSolution(text[:40], text[:40], text[:40], text, [text], judged=judged(text))
        for text in HOSTILE
    ]
    return Contents(HOSTILE[0], solutions=solutions, judges=[HOSTILE[1]], notices=list(HOSTILE))


def test_the_policy_allows_our_scripts_and_nothing_else():
    elements = Elements(page.page_of(hostile_report()))
    run = [(tag, text) for tag, attributes, text in elements.found if not attributes]
    assert [tag for tag, _ in run] == ["style", "script", "script"]
    for tag, text in run:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        directive = next(d for d in elements.policy.split("; ") if d.startswith(f"{tag}-src "))
        assert f"'sha256-{digest}'" in directive
    assert elements.policy.startswith("default-src 'none'; ")
    assert "unsafe-inline" not in elements.policy.replace("style-src-attr 'unsafe-inline'", "")


def test_hostile_texts_come_back_as_they_were_and_end_no_element():
    text = page.page_of(hostile_report())
    elements = Elements(text)
    kinds = [attributes.get("type") for tag, attributes, _ in elements.found if tag == "script"]
    assert set(kinds) == {None, "application/gzip"} and kinds.count(None) == 2
    assert "img" not in elements.tags
    data = elements.data()
    assert [solution["chunks"] for solution in data["solutions-0"]] == [[x] for x in HOSTILE]
    assert data["overview"]["notices"] == HOSTILE
    assert len(data["index"]["solutions"]["snippet"][4]) == 160, "the index stays small"


def test_only_our_own_words_become_markup():
    """Model text may go to text nodes only, so nothing in the script makes markup of text."""
    script = page.read_part("texts.js") + page.read_part("page.js")
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "DOMParser",
        "eval(",
    ):
        assert word not in script  # fmt: skip


def test_solutions_are_in_blocks():
    rows = [{"id": i, "text": "x" * (600_000 if i in (5, 6) else 10)} for i in range(450)]
    blocks, starts = page.blocks_of(rows)
    assert starts == [0, 7, 207, 407]
    assert [row["id"] for block in blocks for row in page.unpack(block)] == list(range(450))
    assert page.blocks_of([]) == ([], [])


def test_the_same_runs_give_the_same_bytes(runs):
    assert page.page_of(collect(runs, 9)) == page.page_of(collect(runs, 9))


# --- runs that are not whole --------------------------------------------------------------------


def test_a_report_of_nothing_says_what_was_expected(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "a run directory (it has a config.yaml)" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "runn")]) == 2
    assert "nothing at" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_not_finished_shows_what_there_is(tmp_path, capsys):
    run = evaluated(tmp_path / "run", OF_A, finished=False)
    part = run / "records" / "judgments" / PART
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:3]) + lines[3][:20])  # of c nothing, of b half
    assert main(["report", str(run)]) == 0
    report = collect([run], 100)
    assert [solution.id for solution in report.solutions] == ["a", "b"]
    assert report.runs[0]["is_finished"] is False and report.runs[0]["stage"] == "evaluate"
    assert report.solutions[1].judged[0].chunks[1] == []


def test_a_damaged_file_is_named_and_the_rest_is_shown(runs, capsys):
    part = runs[0] / "records" / "judgments" / PART
    part.write_bytes(b"\xff" + part.read_bytes())
    assert main(["report", *map(str, runs)]) == 0
    printed = capsys.readouterr()
    assert f"{part} is missing or is not the file" in printed.err
    report = collect(runs, 100)
    assert report.judges == ["run_b"] and len(report.solutions) == 3


def test_lines_of_a_megabyte_are_kept(tmp_path):
    run = evaluated(tmp_path / "run", OF_A, question="long " * 250_000)
    data = Elements(page.page_of(collect([run], 100))).data()
    assert data["solutions-0"][0]["question"] == "long " * 250_000


# --- the command --------------------------------------------------------------------------------


def test_reports_of_several_runs_replace_no_other(runs, capsys):
    assert main(["report", str(runs[0])]) == 0
    assert main(["report", *map(str, runs)]) == 0
    printed = capsys.readouterr().out.split()
    root = runs[0].parent
    assert printed == [str(runs[0] / "report.html"), str(root / "report-run_a-run_b.html")]
    assert main(["report", str(root), "--output", str(root / "x.html")]) == 0
    assert (root / "x.html").is_file() and not (root / "report.html").exists()
    assert main(["report", str(root), "--output", str(root)]) == 2


def test_a_comparison_ends_with_a_report(runs, capsys):
    words = ["compare-judges", *map(str, runs)]
    file = runs[0].parent / "report-run_a-run_b.html"
    assert main([*words, "--json"]) == 0 and main([*words, "--no-report"]) == 0
    assert not file.exists()
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {file}"
    assert file.is_file()


def test_a_stage_reports_once_for_what_it_has_finished(tmp_path, capsys):
    run = evaluated(tmp_path / "run", OF_A, finished=False)
    file, manifest = run / "report.html", run / "manifest.json"
    command.end_stage_with_report(run)
    assert not file.exists(), "a shard of a run is no run"
    write_manifest(run, "evaluate", "0", [Judgment])
    command.end_stage_with_report(run)
    assert capsys.readouterr().out == f"report: {file}\n"
    written = file.stat().st_mtime_ns
    command.end_stage_with_report(run)
    assert file.stat().st_mtime_ns == written
    os.utime(manifest, ns=(written + 1, written + 1))  # the run has gone on
    command.end_stage_with_report(run)
    assert file.stat().st_mtime_ns > written


@pytest.mark.parametrize("error", [OSError(28, "no space left"), RuntimeError("a bug")])
def test_a_report_that_fails_does_not_fail_the_command(runs, capsys, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(command, "write_page", fails)
    assert main(["compare-judges", *map(str, runs)]) == 0
    printed = capsys.readouterr()
    assert "F1 of A" in printed.out
    assert "no report was written" in printed.err and "stepwiser report " in printed.err
    assert ("Traceback" in printed.err) == isinstance(error, RuntimeError)


def test_a_report_needs_no_jax(runs):
    code = (
        "import sys; from pathlib import Path; from stepwiser_jax.commands.report import "
        f"write_report; write_report([Path({str(runs[0].parent)!r})]); print('jax' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_the_page_needs_no_network():
    text = page.page_of(Contents("x"))
    urls = set(re.findall(r"(?:src|href)=[\"']?(https?:[^\"'> ]+)", text))
    assert not urls
    assert "@import" not in text and "url(" not in re.sub(
        r"<script>.*?</script>", "", text, flags=re.S
    )

"""All stages through the command line, and what happens when they are cut short or misused."""

import gc
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from stepwiser_jax import __version__
from stepwiser_jax.__main__ import main
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.model.hf import load_hf
from stepwiser_jax.record_io import RecordWriter, read_records
from stepwiser_jax.records import (
    ChunkLabel,
    ClassifierExample,
    JudgeExample,
    Judgment,
    PrefixValue,
    Problem,
    Rationale,
    SearchResult,
    Selection,
    SftExample,
    Trajectory,
    Verdict,
)
from stepwiser_jax.runs import directory as run_module
from stepwiser_jax.runs import signals
from stepwiser_jax.training.checkpoint import Checkpointer
from stepwiser_jax.training.loop import TrainingRun
from tiny import logged

from .conftest import CONFIGS, INPUTS, STAGE_OF, THINKPRM, command


def record_bytes(run):
    files = sorted((run / "records").rglob("*.jsonl"))
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def test_every_stage_finishes_and_hands_over(runs):
    for name in INPUTS.keys() - THINKPRM:
        assert json.loads((runs / name / "manifest.json").read_text())
        assert json.loads((runs / name / "summary.json").read_text())
    problems = read_records(runs / "rollouts", Problem)
    trajectories = read_records(runs / "rollouts", Trajectory)
    assert len(trajectories) == 4 * len(problems) == 32
    for t in trajectories:
        assert t.chunk_ends[-1] == len(t.completion_ids) == len(t.logprobs)
        assert max(t.logprobs) <= 0
    values = read_records(runs / "values", PrefixValue)
    assert len(values) == sum(len(t.chunk_ends) + 1 for t in trajectories)
    by_id = {v.record_id: v for v in values}
    for t in trajectories:
        outcome = by_id[f"{t.trajectory_id}/{len(t.chunk_ends)}"]
        assert outcome.value == float(t.is_correct)
        bare = {
            by_id[f"{u.trajectory_id}/0"].num_correct
            for u in trajectories
            if u.problem_id == t.problem_id
        }
        assert len(bare) == 1, "the bare problem is one prefix, whoever continues it"
    assert read_records(runs / "labels", JudgeExample)
    rationales = read_records(runs / "rationales", Rationale)
    assert len(rationales) == 4 * len(read_records(runs / "labels", JudgeExample))
    kept = [r.rationale_id for r in rationales if r.outcome == "kept"]
    assert [e.example_id for e in read_records(runs / "rationales", SftExample)] == kept
    judgments = read_records(runs / "evaluate", Judgment)
    greedy = [j for j in judgments if "vote" not in j.example_id]
    assert len(judgments) == 3 * len(greedy)
    results = read_records(runs / "search", SearchResult)
    assert {r.method for r in results} == {
        "greedy",
        "chunk_reset",
        "beam",
        "dvts",
        *(f"sample{k}" for k in range(4)),
    }
    for method in ("chunk_reset", "beam", "dvts"):
        assert all(r.judge_tokens for r in results if r.method == method)
    judged = {r.method for r in results if r.scoring_tokens}
    assert judged == {"sample0", "sample1"}, "best_of: [2]"
    selections = read_records(runs / "select", Selection)
    assert [s.problem_id for s in selections] == [p.problem_id for p in problems]
    assert all(len(s.candidates) == len(s.scores) == 4 for s in selections)


def test_a_classifier_steers_and_selects(runs, tmp_path):
    """In the judge's place, with one token for each chunk."""
    settings = "kind: classifier, prompt_style: bare, rows: 4, max_length: 320"
    extra = (f"judge={{path: {runs / 'classifier'}, {settings}}}",)

    def run(name, *more):
        words = command(name, runs, out=tmp_path / name, extra=(*extra, *more))
        given = words.index(f"judge.path={runs / 'judge'}")
        assert main(words[: given - 1] + words[given + 1 :]) == 0
        return json.loads((tmp_path / name / "summary.json").read_text())

    summary = run("search", "problems.limit=2", "token_budget=150")
    assert list(summary["compiled"]["judge"]) == ["score 4x320"]
    for result in read_records(tmp_path / "search", SearchResult):
        assert all(0 < score < 1 for score in result.chunk_scores)
        assert result.method != "chunk_reset" or result.judge_tokens >= len(result.chunk_scores)
    run("select")
    for selection in read_records(tmp_path / "select", Selection):
        assert all(0 < score < 1 for score in selection.scores)
        assert selection.score == max(selection.scores)


def test_summaries_tell_what_was_compiled(runs):
    for name, program, shape in (
        ("policy", "jit(train_step)", "train step 8x"),
        ("rollouts", "jit(decode_burst)", "decode "),
        ("judge", "jit(train_step)", "train step 4x320"),
    ):
        warm_up = json.loads((runs / name / "summary.json").read_text())["warm_up"]
        found = [p for p in warm_up["programs"] if p["program"] == program]
        assert found and all(p["shape"].startswith(shape) for p in found), (name, warm_up)
        assert warm_up["compiled"] + warm_up["cached"] >= len(warm_up["programs"])
    assert "warm_up" not in json.loads((runs / "labels" / "summary.json").read_text())


def test_trainings_are_measured_on_held_out_examples_from_first_to_last(runs):
    for name, metric in (("cold_start", "loss"), ("judge", "accuracy"), ("classifier", "loss")):
        lines = [json.loads(line) for line in logged(runs / name)]
        measured = [line["step"] for line in lines if f"validation/{metric}" in line]
        every = 20 if name == "cold_start" else 2
        steps = range(lines[-1]["step"] + 1)
        assert measured == [s for s in steps if s % every == 0 or s == steps[-1]] != [0], name
        assert [line["step"] for line in lines] == list(steps)
        found = json.loads((runs / name / "summary.json").read_text())["validation"]
        assert found["examples"] >= {"cold_start": 32, "judge": 1, "classifier": 1}[name]
        best = name == "cold_start"  # the others' labels may be all of one class
        assert not best or found["exported_iteration"] == found["best_iteration"]
        assert found["exported_iteration"] in measured
        summary = json.loads((runs / name / "summary.json").read_text())
        dropped = summary.get("dropped", summary)
        left_out = dropped["dropped_held_out" if name == "cold_start" else "validation"]
        assert left_out == found["examples"] > 0, "whole problems are held out, and nothing else"


def test_summaries_have_fractions_and_the_documented_shape(runs):
    scores = json.loads((runs / "evaluate" / "summary.json").read_text())
    for voter in ("greedy", "majority_2"):
        subset = scores[voter]["subsets"]["arithmetic"]
        for split in ("official", "by_final_answer"):
            assert set(subset[split]) == {"f1", "acc_error", "acc_correct"}
            assert all(0 <= value <= 1 for value in subset[split].values())
            assert subset[split] == scores[voter]["average"][split]
        assert 0 <= subset["unparsed_rate"] <= 1
    search = json.loads((runs / "search" / "summary.json").read_text())
    for row in (
        search["plain"],
        search["greedy"],
        search["chunk_reset"],
        search["beam"],
        search["dvts"],
        *search["majority"].values(),
        *(row for rows in search["best_of"].values() for row in rows.values()),
        *(row for rows in search["weighted_majority"].values() for row in rows.values()),
    ):
        assert 0 <= row["accuracy"] <= 1
        assert row["policy_tokens"] > 0
    assert search["majority"]["4"]["policy_tokens"] == pytest.approx(
        4 * search["plain"]["policy_tokens"]
    )


def test_a_comparison_has_the_scores_of_both_summaries(runs, capsys):
    assert (
        main(
            ["compare-judges", str(runs / "evaluate"), str(runs / "evaluate_classifier"), "--json"]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)["subsets"]["arithmetic"]
    judge = json.loads((runs / "evaluate" / "summary.json").read_text())["greedy"]
    classifier = json.loads((runs / "evaluate_classifier" / "summary.json").read_text())
    assert found["f1_a"] == pytest.approx(judge["subsets"]["arithmetic"]["official"]["f1"])
    assert found["f1_b"] == pytest.approx(
        classifier["greedy"]["subsets"]["arithmetic"]["official"]["f1"]
    )


def test_prmbench_has_scores_of_its_own(runs, tmp_path, capsys):
    solutions = [s for s in read_records(runs / "labels", ClassifierExample) if len(s.chunks) > 1]
    source = tmp_path / "prmbench.jsonl"
    rows = [
        {
            "idx": str(n),
            "classification": ("circular", "redundency")[n % 2],
            "modified_question": solution.question,
            "original_question": solution.question,
            "modified_process": solution.chunks,
            "original_process": solution.chunks,
            "error_steps": [2],
        }
        for n, solution in enumerate(solutions[:2])
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name, *extra):
        extra = (f"benchmark.source={source}", *extra)
        assert main(command(name, runs, out=tmp_path / name, extra=extra)) == 0
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        return summary, {j.example_id: j for j in read_records(tmp_path / name, Judgment)}

    summary, judgments = run("evaluate", "judge.votes=0")
    assert summary["items"] == 3 and judgments.keys() >= {"circular_0/1", "correct_1/0"}
    for step, expected in enumerate([Verdict.POSITIVE, Verdict.NEGATIVE]):
        judgment = judgments[f"circular_0/{step}"]
        assert judgment.reward == (judgment.verdict is expected)
    circular = [judgments[f"circular_0/{s}"].verdict for s in range(len(solutions[0].chunks))]
    accepted = [verdict is Verdict.POSITIVE for verdict in circular]
    right = [step != 1 for step in range(len(circular))]
    kept = sum(a and r for a, r in zip(accepted, right, strict=True))
    found = summary["greedy"]["classes"]["circular"]
    assert found["right_step_accuracy"] == pytest.approx(kept / sum(right))
    summary, judgments = run("evaluate_classifier", "threshold_subset=null")
    assert set(summary["greedy"]["categories"]) == {"simplicity"}
    caught = judgments["circular_0/1"].p_positive < 0.5
    assert summary["greedy"]["classes"]["circular"]["wrong_step_accuracy"] == caught

    capsys.readouterr()
    arguments = command(
        "evaluate_classifier", runs, out=tmp_path / "other", extra=(f"benchmark.source={source}",)
    )
    assert_fails(capsys, arguments, "is for ProcessBench", tmp_path / "other")
    assert (
        main(["compare-judges", str(tmp_path / "evaluate"), str(tmp_path / "evaluate_classifier")])
        == 2
    )
    assert "found those of PRMBench" in capsys.readouterr().err


def test_classifier_examples_are_the_judge_examples_told_at_once(runs):
    """Of a label run that is not balanced: the same chunks, histories and labels."""
    examples = {e.example_id: e for e in read_records(runs / "labels", JudgeExample)}
    labels = {x.record_id: x for x in read_records(runs / "labels", ChunkLabel)}
    seen = 0
    for solution in read_records(runs / "labels", ClassifierExample):
        for j, is_positive, q in zip(
            solution.labelled, solution.is_positive, solution.q, strict=True
        ):
            chunk_id = f"{solution.solution_id}/{j}"
            example = examples[chunk_id]
            assert (example.chunk, example.is_positive) == (solution.chunks[j], is_positive)
            assert example.history.split() == " ".join(solution.chunks[:j]).split()
            assert (labels[chunk_id].is_positive, labels[chunk_id].q) == (is_positive, q)
            seen += 1
    assert seen == len(examples) == len(labels)


def test_judge_metrics_are_all_there(runs):
    lines = [json.loads(x) for x in (runs / "judge" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    measured, *lines = lines  # at step 0 nothing but held-out examples is measured
    others = {"step", "seconds", "time"}
    assert set(measured) - others == {x for x in measured if x.startswith("validation/")} != set()
    for name in (
        "reward loss policy_loss kl entropy clip_fraction_low clip_fraction_high grad_norm skipped "
        "verdict_positive_share unparsed_rate response_tokens groups_with_signal_share logprob_gap "
        "logprob_gap_max learning_rate"
    ).split():
        assert name in lines[0], name
    assert lines[0]["logprob_gap_max"] < 1e-4
    assert list((runs / "judge" / "tensorboard").iterdir())


@pytest.mark.slow
def test_judge_samples_in_int8_and_corrects_for_it(runs, tmp_path):
    """The gap is small, not zero, and weighed; an explicit `none` reports it only."""

    def metrics(name, *extra):
        extra = ("iterations=2", "engine.weights=int8", *extra)
        assert main(command("judge", runs, out=tmp_path / name, extra=extra)) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if "reward" in line]

    corrected = metrics("corrected")
    assert len(corrected) == 2
    for line in corrected:
        assert 1e-4 < line["logprob_gap"] < 0.1
        assert 0 < abs(line["importance_weight_mean"] - 1) < 0.1
        assert line["importance_truncated_share"] < 0.1
    (uncorrected, _) = metrics("uncorrected", "grpo.sampler_correction=none")
    assert uncorrected["logprob_gap"] == corrected[0]["logprob_gap"]
    assert "importance_weight_mean" not in uncorrected
    assert uncorrected["policy_loss"] != corrected[0]["policy_loss"]


class Killed(BaseException):
    """Not an Exception: nothing may catch it and go on."""


@pytest.mark.parametrize(
    "name",
    [
        *("rollouts", "values", "evaluate", "evaluate_classifier", "search", "select"),
        pytest.param("thinkprm_evaluate", marks=pytest.mark.slow),
    ],
)
def test_cut_short_in_the_middle_of_a_line_and_run_again(request, name, tmp_path, monkeypatch):
    runs = request.getfixturevalue("thinkprm_runs" if name in THINKPRM else "runs")
    append = RecordWriter.append
    half = {"values": 7, "evaluate": 9, "evaluate_classifier": 9, "search": 11}.get(name, 3)

    def dying(self, records):
        if self.record_type is Problem:
            return append(self, records)
        append(self, records[:half])
        with open(self.path, "a") as file:
            file.write('{"half": "a li')
        raise Killed

    arguments = command(name, runs, out=tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "append", dying)
        with pytest.raises(Killed):
            main(arguments)
    assert not (tmp_path / "run" / "manifest.json").exists()
    assert main(arguments) == 0
    assert record_bytes(tmp_path / "run") == record_bytes(runs / name)


def die_at(step, monkeypatch):
    """In place of the end of that step, when what was to be saved before is saved."""
    finish_iteration = TrainingRun.finish_iteration

    def dying(self, found, metrics):
        if found == step:
            self._checkpointer.wait()
            raise Killed
        finish_iteration(self, found, metrics)

    monkeypatch.setattr(TrainingRun, "finish_iteration", dying)


def steps_of(run):
    return json.loads((run / "summary.json").read_text())["steps"]


def assert_same_training(cut, whole):
    steps = [json.loads(x)["step"] for x in (cut / "metrics.jsonl").read_text().splitlines()]
    assert steps[0] in (0, 1) and steps == list(range(steps[0], steps[-1] + 1))
    assert logged(cut) == logged(whole)
    ours, theirs = (load_hf(str(run / "model")) for run in (cut, whole))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("cold_start", ("steps=null", "epochs=1", "batch_size=16")),
        pytest.param("classifier", ("epochs=40",), marks=pytest.mark.slow),
    ],
)
def test_training_cut_short_and_run_again_is_the_same_to_the_bit(
    runs, name, extra, tmp_path, monkeypatch, capsys
):
    extra += ("training.checkpoint_every=8",)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(command(name, runs, out=whole, extra=extra)) == 0
    arguments = command(name, runs, out=cut, extra=extra)
    with monkeypatch.context() as patch:
        die_at(11, patch)
        with pytest.raises(Killed):
            main(arguments)
    assert Checkpointer(cut / "checkpoints").latest_step() is not None
    capsys.readouterr()
    assert main(arguments) == 0
    assert_same_training(cut, whole)
    steps = steps_of(cut)
    assert 11 < steps_of(whole) == steps
    assert len((cut / "metrics.jsonl").read_text().splitlines()) == steps + 1  # with step 0
    errors = capsys.readouterr().err
    assert f"checkpoint of step {steps}\n" in errors  # it may be the best: then it is saved early
    told = iter(errors.splitlines())
    for line in (
        rf"stepwiser {__version__} in {cut}, .* mesh data 1 x fsdp 1 x tensor 1",
        rf"\d+ epochs of \d+ examples are {steps} steps",
        "goes on from the checkpoint of step 8",
        rf"step 9 of {steps}, loss \d",
        rf"step {steps} of {steps}, loss \d.*, 0:00:00 left",
        rf"exported {cut / 'model'}",
        rf"finished after 0:\d\d:\d\d, numbers in {cut / 'summary.json'}",
    ):
        assert any(re.match(rf"\d\d:\d\d:\d\d {STAGE_OF[name]}: {line}", x) for x in told), line


@pytest.mark.parametrize("name", ["cold_start", pytest.param("judge", marks=pytest.mark.slow)])
def test_a_longer_training_is_the_same_however_often_it_ended(runs, name, tmp_path):
    length = {"cold_start": "steps", "judge": "iterations"}[name]
    settings = ("training.optimizer.schedule=constant", "training.checkpoint_every=3")
    settings += ("validation=null",)  # which measures at every end
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    for out, ends in ((whole, (5,)), (grown, (2, 5))):
        for end in ends:
            extra = (*settings, f"{length}={end}")
            assert main(command(name, runs, out=out, extra=extra)) == 0
            assert json.loads((out / "summary.json").read_text())[length] == end
    assert_same_training(grown, whole)


def test_a_judge_cut_short_samples_nothing_twice(runs, tmp_path, monkeypatch):
    """Asked to stop while it samples, it keeps the rows that are finished, here all of them; killed
    before an iteration is over, it reads what it had sampled; and the end is the same to the bit.
    """
    run, whole, sampled, sample = tmp_path / "run", tmp_path / "whole", [], Engine.stream
    assert main(command("judge", runs, out=whole, extra=("validation=null",))) == 0

    def counting(self, *args, **settings):
        for ended in sample(self, *args, **settings):
            sampled.extend(done.row_id for done in ended)
            yield ended

    monkeypatch.setattr(Engine, "stream", counting)
    arguments = command("judge", runs, out=run, extra=("validation=null",))
    with monkeypatch.context() as patch:
        patch.setattr(signals.stop, "requested", True)
        assert main(arguments) == 130
    (left,) = (run / "rollout_cache").iterdir()
    with np.load(left) as rows:
        assert len(rows["row_ids"]) == len(sampled) == 8 * 4
    assert Checkpointer(run / "checkpoints").latest_step() == 0
    with monkeypatch.context() as patch:
        die_at(3, patch)
        with pytest.raises(Killed):
            main(arguments)
    assert Checkpointer(run / "checkpoints").latest_step() == 2
    so_far = len(sampled)
    assert main(arguments) == 0
    groups = [json.loads(x)["groups_sampled"] for x in (run / "metrics.jsonl").open()]
    assert len(sampled) == len(set(sampled)) == so_far == 4 * sum(groups)
    assert not list((run / "rollout_cache").iterdir())
    assert_same_training(run, whole)


def test_stopped_behind_the_last_step_and_run_again_keeps_the_numbers(runs, tmp_path, monkeypatch):
    arguments = command("cold_start", runs, out=tmp_path / "run", extra=("steps=2",))
    with monkeypatch.context() as patch:
        patch.setattr(signals.stop, "requested", True)
        assert main(arguments) == 130
        assert main(arguments) == 130
    assert not (tmp_path / "run" / "manifest.json").exists()
    assert main(arguments) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["loss"] > 0
    assert summary["seconds_per_step"] is None


def test_a_second_training_in_one_directory_is_refused(runs, tmp_path, monkeypatch, capsys):
    """Until the first process ends, by whatever means."""
    out = tmp_path / "run"
    arguments = command("cold_start", runs, out=out, extra=("steps=2",))
    with monkeypatch.context() as patch:
        patch.setattr(signals.stop, "requested", True)
        assert main(arguments) == 130
    gc.collect()  # this process lets go of it
    monkeypatch.setattr(run_module, "LOCK_SECONDS", 0)
    script = (
        f"import fcntl, time; file = open({str(out / 'lock')!r}, 'r+'); "
        "fcntl.lockf(file, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(600)"
    )
    first = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    before = (out / "metrics.jsonl").read_bytes()
    try:
        assert first.stdout is not None and first.stdout.readline() == "locked\n"
        assert main(arguments) == 2
        assert f"another process works in {out}" in capsys.readouterr().err
        assert (out / "metrics.jsonl").read_bytes() == before
    finally:
        first.kill()
        first.wait()
    assert main(arguments) == 0


def test_a_finished_run_is_not_done_again(runs, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in (runs / "values").rglob("*") if p.is_file()}
    assert main(command("values", runs)) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (runs / "values").rglob("*") if p.is_file()}


def test_convert_gives_the_exported_model(runs, tmp_path, capsys):
    assert (
        main(["convert", "--checkpoint", str(runs / "judge"), "--output", str(tmp_path / "hf")])
        == 0
    )
    written = f"{tmp_path / 'hf'}: the model of {runs / 'judge'}, its newest checkpoint\n"
    assert capsys.readouterr().out == written
    ours, theirs = load_hf(str(tmp_path / "hf")), load_hf(str(runs / "judge" / "model"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)

    # It is asked as the run asks it.
    said = []
    for judge in (runs / "judge", tmp_path / "hf"):
        ask = ["--problem", "start 4 ; * 7 + 5 ?", "--step", "4 * 7 = 8 ; 8 + 5 = 3"]
        assert main(["check", str(judge), *ask, "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out) | {"judge": ""})
    assert said[0] == said[1]
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]


# --- a user's mistakes --------------------------------------------------------------------------


def assert_fails(capsys, arguments, message, run=None):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert run is None or not run.exists(), "a mistake must leave nothing behind"


def test_mistakes_are_one_message_and_leave_nothing(runs, tmp_path, capsys):
    out = tmp_path / "run"

    def mistake(name, message, *extra):
        assert_fails(capsys, command(name, runs, out=out, extra=extra), message, out)

    mistake("rollouts", "did you mean 'group_size'", "gruop_size=2")
    mistake("rollouts", "found nothing at", f"policy.path={tmp_path / 'nowhere'}")
    mistake("values", "found nothing at", f"rollouts={tmp_path / 'nowhere'}")
    mistake("rollouts", "exceeds the context of 160", "sampling.max_new_tokens=150")
    mistake("rollouts", "needs 32 devices", "mesh.data=32")
    mistake("rollouts", "no chat template", "prompt_style=instruct")
    mistake("labels", "not prefix_values", f"values={runs / 'rollouts'}")
    mistake("evaluate", "split 'gsm8k' is of a data set", "benchmark.split=gsm8k")
    (tmp_path / "none.jsonl").write_text("")
    mistake("judge", "found none", f"examples.source={tmp_path / 'none.jsonl'}")
    mistake("classifier", "found none", f"examples.source={tmp_path / 'none.jsonl'}")
    mistake("classifier", "no example fits max_length 8", "max_length=8")
    mistake(
        "evaluate_classifier", "which are ['arithmetic'], found 'gsm8k'", "threshold_subset=gsm8k"
    )
    mistake("evaluate_classifier", "tokens: max_length must be at least that", "judge.max_length=8")

    problems = tmp_path / "problems.jsonl"
    for text, message in (
        ("", "is empty"),
        ('{"question": "1+1?"}\n', "line 1: the problem has no answer"),
        ('{"text": "1+1?", "answer": "2"}\n', "expected a 'question' or 'problem'"),
    ):
        problems.write_text(text)
        mistake("rollouts", message, f"problems.source={problems}")

    broken = tmp_path / "broken"
    shutil.copytree(runs / "policy" / "model", broken)
    (broken / "SHA256SUMS").unlink()
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    mistake("rollouts", "truncated", f"policy.path={broken}")

    assert_fails(capsys, ["rollout", "--config", str(CONFIGS / "smoke_rollouts.yaml")], "run-dir")
    assert_fails(capsys, ["rolout"], "No such command")
    latest = ["--checkpoint", str(runs / "judge" / "checkpoints" / "latest")]
    assert_fails(capsys, ["convert", *latest, "--output", str(out)], "checkpoints/N", out)
    mistake("search", "the judge of", "judge.engine.buckets=[160]")


def test_unfinished_input_is_refused(runs, tmp_path, capsys):
    unfinished = tmp_path / "rollouts"
    shutil.copytree(runs / "rollouts", unfinished)
    (unfinished / "manifest.json").unlink()
    arguments = command("values", runs, out=tmp_path / "run", extra=(f"rollouts={unfinished}",))
    assert_fails(capsys, arguments, "resume it", tmp_path / "run")


def test_a_run_directory_that_cannot_be_is_refused(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    inside = command("labels", runs, out=tmp_path / "file" / "run")
    assert_fails(
        capsys, [*inside, "--dry-run"], f"a directory at {tmp_path / 'file'}, found a file"
    )
    (tmp_path / "run").mkdir()
    for text in ("", "- 1", "a: [1"):
        (tmp_path / "run" / "config.yaml").write_text(text)
        message = f"{tmp_path / 'run' / 'config.yaml'}"
        assert_fails(capsys, command("labels", runs, out=tmp_path / "run"), message)


def test_a_run_directory_of_another_config_is_refused(runs, capsys):
    before = (runs / "labels" / "manifest.json").read_bytes()
    assert_fails(
        capsys, command("labels", runs, extra=("rule_args.alpha=0.4",)), "alpha: None -> 0.4"
    )
    assert (runs / "labels" / "manifest.json").read_bytes() == before


def test_a_tokenizer_without_tags_is_refused(runs, tmp_path, capsys):
    broken = tmp_path / "policy"
    shutil.copytree(runs / "policy" / "model", broken)
    (broken / "SHA256SUMS").unlink()
    file = broken / "tokenizer.json"
    file.write_text(file.read_text().replace('"<chunk>"', '"<chonk>"'))
    out = tmp_path / "run"
    arguments = command("rollouts", runs, out=out, extra=(f"policy.path={broken}",))
    assert_fails(capsys, arguments, "cannot round-trip the chunk tags", out)


@pytest.mark.parametrize("name", ["labels", "select"])
def test_another_tokenizer_than_the_policys_is_refused(runs, tmp_path, bpe_directory, name, capsys):
    other = shutil.copytree(bpe_directory, tmp_path / "other")
    (other / "config.json").write_text("{}")
    out = tmp_path / "run"
    arguments = command(name, runs, out=out, extra=(f"tokenizer={other}",))
    assert_fails(capsys, arguments, "of the policy that sampled the rollouts; by this one", out)


def test_dry_run_checks_and_writes_nothing(runs, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*command("values", runs, out=out), "--dry-run"]) == 0
    assert "num_rollouts: 4" in capsys.readouterr().out
    arguments = command("values", runs, out=out, extra=(f"rollouts={tmp_path}",))
    assert_fails(capsys, [*arguments, "--dry-run"], "found nothing at", out)
    for name, setting, kind in (
        ("values", "rollouts", "trajectories"),
        ("labels", "values", "prefix_values"),
        ("judge", "examples.source", "judge_examples"),
        ("classifier", "examples.source", "classifier_examples"),
        ("evaluate", "benchmark.source", "trajectories"),
    ):
        arguments = command(name, runs, out=out, extra=(f"{setting}={runs / 'policy'}",))
        assert_fails(capsys, [*arguments, "--dry-run"], f"no records, not {kind}", out)
    arguments = command(
        "cold_start", runs, out=out, extra=(f"examples.source={tmp_path / 'none'}",)
    )
    assert_fails(capsys, [*arguments, "--dry-run"], "none", out)
    for name in ("evaluate", "evaluate_classifier"):
        arguments = command(
            name, runs, out=out, extra=[f"benchmark.source={tmp_path / 'none.json'}"]
        )
        assert_fails(capsys, [*arguments, "--dry-run"], "expected a data file", out)

"""Records on disk: nothing is lost, nothing is half-written, unfinished input is refused."""

import json
import math
import time
from datetime import UTC, datetime
from typing import get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import stepwiser_jax.runs.directory as run_module
from stepwiser_jax import __version__, record_io
from stepwiser_jax.config import Evaluate, Label, Sft
from stepwiser_jax.config_files import load_config
from stepwiser_jax.errors import UserError
from stepwiser_jax.record_io import RecordWriter, read_records, read_written, write_manifest
from stepwiser_jax.record_lines import from_json, read_lines, to_json, write_records
from stepwiser_jax.records import (
    MAX_ROLLOUTS,
    ChunkAttempt,
    ChunkLabel,
    ClassifierExample,
    Judgment,
    LabelledSolution,
    PrefixValue,
    Problem,
    ProcessBenchItem,
    Record,
    SearchResult,
    Selection,
    Tokens,
    Trajectory,
    Verdict,
    natural_key,
)
from stepwiser_jax.runs.directory import RunDirectory, blocks
from stepwiser_jax.runs.metrics import Metrics
from stepwiser_jax.runs.signals import Interrupted, stop
from tiny import logged

PROBLEMS = [Problem(f"p#{i}", f"What is {i} → {i}?", str(i), "test") for i in (0, 2, 10, 1)]


def share():
    return st.floats(0, 1)


def count():
    return st.integers(min_value=0)


def number():
    return st.floats(allow_nan=False, allow_infinity=False)


def tuples(elements, **size):
    return st.lists(elements, **size).map(tuple)


def json_values():
    leaves = st.none() | st.booleans() | st.integers() | number() | st.text()
    nested = lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)  # noqa: E731
    return st.recursive(leaves, nested, max_leaves=5)


@st.composite
def prefix_values(draw):
    right, sampled, most = sorted(draw(st.tuples(*[st.integers(1, MAX_ROLLOUTS)] * 3)))
    return PrefixValue(draw(st.text()), draw(count()), sampled, right, most, draw(st.text()))


@st.composite
def classifier_examples(draw):
    chunks = draw(tuples(st.text(), min_size=1))
    labelled = tuple(sorted(draw(st.sets(st.integers(0, len(chunks) - 1), min_size=1))))
    size = {"min_size": len(labelled), "max_size": len(labelled)}
    signs, values = draw(tuples(st.booleans(), **size)), draw(tuples(share(), **size))
    texts = draw(st.tuples(st.text(), st.text(), st.text()))
    return ClassifierExample(*texts, chunks, labelled, signs, values)


@st.composite
def processbench_items(draw):
    steps = draw(tuples(st.text()))
    first_error = draw(st.integers(-1, len(steps) - 1))
    texts = draw(st.tuples(st.text(), st.text(), st.text()))
    return ProcessBenchItem(*texts, steps, first_error, draw(st.booleans()))


@st.composite
def selections(draw):
    candidates = draw(tuples(st.text(), min_size=1))
    scores = draw(st.just(()) | tuples(number(), min_size=len(candidates)))[: len(candidates)]
    texts = [draw(st.sampled_from(candidates)), *draw(st.tuples(*[st.text()] * 3))]
    signs = draw(st.tuples(st.booleans(), st.booleans()))
    spent = (draw(count()), draw(count()), draw(share()))
    return Selection(*texts, *signs, candidates, scores, *spent)


COUNTS = """accepted_tokens rejected_tokens judge_tokens forced_chunks scoring_tokens
policy_read_tokens judge_read_tokens scoring_read_tokens""".split()
FLOPS = "policy_flops judge_flops scoring_flops prompt_flops".split()
ANY = {
    PrefixValue: prefix_values(),
    ClassifierExample: classifier_examples(),
    ProcessBenchItem: processbench_items(),
    Selection: selections(),
    Problem: st.builds(Problem, extra=st.dictionaries(st.text(), json_values())),
    ChunkLabel: st.builds(ChunkLabel, chunk_index=count(), q=share(), v=share()),
    Judgment: st.builds(Judgment, p_positive=share(), reward=number()),
    LabelledSolution: st.builds(
        LabelledSolution,
        labels=tuples(st.none() | number()),
        shared_steps=st.integers(),
        question_value=st.none() | number(),
        final_answer_correct=st.none() | st.booleans(),
        finish_reason=st.none() | st.text(),
    ),
    SearchResult: st.builds(
        SearchResult,
        chunk_scores=tuples(number()),
        **dict.fromkeys(COUNTS, count()),
        **dict.fromkeys(FLOPS, share()),
        attempts=tuples(st.builds(ChunkAttempt, p_positive=st.none() | share())),
    ),
}
"""Types whose fields are not free."""


@pytest.mark.parametrize("record_type", [t for t in get_args(Record) if t is not Trajectory])
@settings(max_examples=10)
@given(data=st.data())
def test_any_record_is_the_same_after_its_line(record_type, data):
    record = data.draw(ANY.get(record_type, st.builds(record_type)))
    line = to_json(record)
    assert "\n" not in line and from_json(line.encode(), record_type) == record


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_neither_written_nor_read(value):
    judgment = Judgment("p#0/1", "m", "text", Verdict.POSITIVE, 1.0, value)
    with pytest.raises(UserError, match="expected finite numbers in the Judgment p#0/1"):
        to_json(judgment)
    line = json.dumps(vars(judgment), default=lambda verdict: verdict.value)
    with pytest.raises(UserError, match=r"Judgment\.reward: .*finite number"):
        from_json(line, Judgment)


@st.composite
def trajectories(draw):
    ids = st.integers(0, 2**31 - 1)
    prompt, completion = draw(tuples(ids)), draw(tuples(ids))
    logprob = st.floats(width=32, allow_nan=False, allow_infinity=False)
    logprobs = [draw(logprob) for _ in completion]
    length, inner = len(completion), draw(st.sets(st.integers(1, 9)))
    ends = sorted({end for end in inner if end < length} | {length})
    texts, right = draw(st.tuples(*[st.text()] * 4)), draw(st.booleans())
    return Trajectory(
        *texts[:3], Tokens(prompt, completion, logprobs), tuple(ends), texts[3], right
    )


@settings(max_examples=10)
@given(st.lists(trajectories(), max_size=4, unique_by=lambda t: t.trajectory_id))
def test_any_trajectories_are_the_same_after_their_files(tmp_path_factory, records):
    file = tmp_path_factory.mktemp("run") / "trajectories.jsonl"
    write_records(file, records)
    assert file.with_suffix(".tokens").exists() == bool(records)
    assert read_records(file, Trajectory) == records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "Problem.answer"),
        ({"other": 1}, "Problem.other: Unexpected"),
        ({"answer": "x", "source": 1}, r"Problem.source: .*found 1"),
        ({"question": 3}, "Problem.question"),
        ({"question": "a\ud800b"}, "expected one JSON object a line, .*hex escape"),
    ],
)
def test_bad_fields_are_named(change, message):
    fields = json.loads(to_json(PROBLEMS[0])) | change
    with pytest.raises(UserError, match=message):
        from_json(json.dumps(fields), Problem)


def test_bad_lines_are_named(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text(to_json(PROBLEMS[0]) + "\nnot json\n")
    with pytest.raises(UserError, match="line 2"):
        read_records(file, Problem)


def test_natural_order():
    ids = ["p#10/1", "p#2/11", "p#2/2", "a/000123#0", "a/000123#0/vote1"]
    assert sorted(ids, key=natural_key) == [
        "a/000123#0",
        "a/000123#0/vote1",
        "p#2/2",
        "p#2/11",
        "p#10/1",
    ]


def test_every_id_has_its_place():
    """What is a digit elsewhere, and numbers that `int` refuses."""
    huge = "9" * 5000
    ids = ["p#10²", "p#²", f"p#{huge}0", f"p#{huge}", "p#٣", "p#007", "p#7x", "p#6", ""]
    assert sorted(ids, key=natural_key) == [
        *("", "p#6", "p#007", "p#7x", "p#10²", f"p#{huge}", f"p#{huge}0", "p#²", "p#٣"),
    ]


def test_half_written_line_is_dropped_and_known_ids_are_skipped(tmp_path):
    writer = RecordWriter(tmp_path, Problem)
    writer.append(PROBLEMS[:2])
    with open(writer.path, "a") as file:
        file.write(to_json(PROBLEMS[2])[:-7])
    writer = RecordWriter(tmp_path, Problem)
    assert writer.done == {"p#0", "p#2"}
    writer.append(PROBLEMS)
    assert [record.record_id for record in writer.read()] == ["p#0", "p#2", "p#10", "p#1"]


def test_interrupted_and_undisturbed_runs_leave_the_same_bytes(tmp_path):
    for name, batches in (("a", [PROBLEMS]), ("b", [PROBLEMS[2:], PROBLEMS[:2]])):
        writer = RecordWriter(tmp_path / name, Problem)
        for batch in batches:
            writer.append(batch)
        writer.close()
        write_manifest(tmp_path / name, "rollout", "digest", [Problem])
    files = [sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in "ab"]
    assert [p.name for p in files[0]] == [p.name for p in files[1]]
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]
    assert [p.problem_id for p in read_records(tmp_path / "a", Problem)] == [
        "p#0",
        "p#1",
        "p#2",
        "p#10",
    ]


def test_only_parts_that_may_be_out_of_order_are_read_again(tmp_path, monkeypatch):
    """When a run is finished: its records may be many."""
    read = []

    def counted(path, *args, **settings):
        read.append(path.parts[len(tmp_path.parts)])
        return read_lines(path, *args, **settings)

    in_order = [PROBLEMS[i] for i in (0, 3, 1, 2)]
    parts = {
        "in order": [in_order[:2], in_order[2:]],
        "not in order": [PROBLEMS],
        "twice": [in_order[:1] * 2, in_order[1:]],
        "begun by another process": [in_order[2:]],
    }
    before = RecordWriter(tmp_path / "begun by another process", Problem)
    before.append(in_order[:2])
    before.close()
    writers = {name: RecordWriter(tmp_path / name, Problem) for name in parts}
    monkeypatch.setattr(record_io, "read_lines", counted)
    for name, batches in parts.items():
        for batch in batches:
            writers[name].append(batch)
        writers[name].close()
        known = {writers[name].path: writers[name].num_in_order}
        write_manifest(tmp_path / name, "rollout", "digest", [Problem], known)
    assert set(read) == parts.keys() - {"in order"}
    monkeypatch.undo()
    written = {name: writer.path.read_bytes() for name, writer in writers.items()}
    assert len({written[name] for name in parts.keys() - {"twice"}}) == 1
    manifests = {name: (tmp_path / name / "manifest.json").read_bytes() for name in parts}
    assert len({manifests[name] for name in parts.keys() - {"twice"}}) == 1
    assert json.loads(manifests["twice"])["records"]["problems"]["count"] == 5


def test_unfinished_missing_wrong_and_damaged_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match="found nothing"):
        read_records(tmp_path / "nowhere", Problem)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match="not finished"):
        read_records(tmp_path / "run", Problem)
    writer = RecordWriter(tmp_path / "run", Problem)
    writer.append(PROBLEMS)
    writer.close()
    write_manifest(tmp_path / "run", "rollout", "digest", [Problem])
    with pytest.raises(UserError, match="not chunk_labels"):
        read_records(tmp_path / "run", ChunkLabel)
    with open(writer.path, "a") as file:
        file.write(to_json(Problem("x", "q", "a", "s")) + "\n")
    with pytest.raises(UserError, match=r"manifest\.json names"):
        read_records(tmp_path / "run", Problem)


def label_config(**changes):
    fields = {"values": "a", "rollouts": "r", "tokenizer": "t", **changes}
    return Label(**fields)


def test_run_directory_of_another_config_names_the_difference(tmp_path):
    path = tmp_path / "run"
    RunDirectory(path, "label", label_config()).create()
    RunDirectory(path, "label", label_config())
    with pytest.raises(UserError, match=r"rule_args.*alpha.*0\.4"):
        RunDirectory(path, "label", label_config(rule_args={"alpha": 0.4}))


def test_a_setting_that_came_later_has_its_default_in_an_old_run(tmp_path):
    RunDirectory(tmp_path, "label", label_config()).create()
    file = tmp_path / "config.yaml"
    old = yaml.safe_load(file.read_text())
    del old["rule_args"], old["balance"]
    file.write_text(yaml.safe_dump(old))
    RunDirectory(tmp_path, "label", label_config())
    with pytest.raises(UserError, match=r"differs in balance: True -> False: name a new"):
        RunDirectory(tmp_path, "label", label_config(balance=False))


def test_a_setting_that_is_no_more_is_named(tmp_path):
    RunDirectory(tmp_path, "label", label_config()).create()
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text() + "smoothing: 3\n")
    with pytest.raises(UserError, match=r"another version .* unknown settings smoothing\. Go on"):
        RunDirectory(tmp_path, "label", label_config())


def sft_config(steps, schedule="constant"):
    optimizer = {"learning_rate": 1e-3, "schedule": schedule}
    fields = {"model": {"path": "arithmetic"}, "examples": {"source": "d"}, "batch_size": 1}
    fields |= {"max_length": 8, "training": {"optimizer": optimizer}, "steps": steps}
    return Sft.model_validate(fields)


def test_a_finished_training_may_become_longer_unless_its_rate_follows_its_length(tmp_path):
    RunDirectory(tmp_path / "a", "sft", sft_config(4)).finish(lambda: {"x": 1})
    assert RunDirectory(tmp_path / "a", "sft", sft_config(4)).finished
    longer = RunDirectory(tmp_path / "a", "sft", sft_config(9))
    assert not longer.finished
    assert RunDirectory(tmp_path / "a", "sft", sft_config(4)).finished, "nothing is written yet"
    longer.create()
    assert not (tmp_path / "a" / "manifest.json").exists(), "now it is a run that was killed"
    assert not RunDirectory(tmp_path / "a", "sft", sft_config(9)).finished
    with pytest.raises(UserError, match="steps: 9 -> 4: name a new run directory"):
        RunDirectory(tmp_path / "a", "sft", sft_config(4))
    RunDirectory(tmp_path / "a", "sft", sft_config(9)).finish(lambda: {"x": 2})
    assert RunDirectory(tmp_path / "a", "sft", sft_config(9)).finished

    RunDirectory(tmp_path / "b", "sft", sft_config(4, "cosine")).finish(lambda: {"x": 1})
    with pytest.raises(UserError, match=r"steps: 4 -> 9: the learning rate .* is cosine"):
        RunDirectory(tmp_path / "b", "sft", sft_config(9, "cosine"))
    assert RunDirectory(tmp_path / "b", "sft", sft_config(4, "cosine")).finished
    in_epochs = sft_config(4, "cosine").model_copy(update={"steps": None, "epochs": 2})
    with pytest.raises(UserError, match="differs in epochs: None -> 2; steps: 4 -> None: name"):
        RunDirectory(tmp_path / "b", "sft", in_epochs)


def test_a_crash_between_the_old_end_and_the_new_config_leaves_a_run_to_go_on(
    tmp_path, monkeypatch
):
    RunDirectory(tmp_path, "sft", sft_config(4)).finish(lambda: {"x": 1})

    def crash(*_):
        raise OSError

    monkeypatch.setattr(run_module, "atomic_write", crash)
    with pytest.raises(OSError):
        RunDirectory(tmp_path, "sft", sft_config(9)).create()
    for steps in (4, 9):
        assert not RunDirectory(tmp_path, "sft", sft_config(steps)).finished


def evaluate_config(limit):
    judge = {"path": "j", "sampling": {"max_new_tokens": 8}, "engine": {"buckets": [64]}}
    benchmark = {"source": "i", "limit": limit}
    return Evaluate.model_validate({"judge": judge, "benchmark": benchmark})


def test_a_finished_evaluation_goes_on_with_more_items(tmp_path):
    judged = []

    def judge(block):
        judged.extend(block)
        said = f"after {len(judged)} items"
        return [Judgment(i, "judge", said, Verdict.POSITIVE, 1.0, 1.0) for i in block]

    def evaluate(limit, ids):
        directory = RunDirectory(tmp_path, "evaluate", evaluate_config(limit))
        work = directory.pending(blocks(ids, 2), Judgment, lambda block: block)
        directory.write_blocks(work, Judgment, judge)
        return directory.finish(lambda: {"items": len(ids)})

    evaluate(4, ["d", "a", "c", "b"])
    (part,) = tmp_path.glob("records/judgments/*.jsonl")
    before = part.read_text().splitlines()
    assert RunDirectory(tmp_path, "evaluate", evaluate_config(4)).finished
    assert evaluate(6, ["d", "a", "c", "b", "f", "e"])["items"] == 6
    assert judged == ["d", "a", "c", "b", "f", "e"]
    assert part.read_text().splitlines()[:4] == before
    assert [j.example_id for j in read_records(tmp_path, Judgment)] == list("abcdef")
    assert not RunDirectory(tmp_path, "evaluate", evaluate_config(None)).finished
    whole = part.read_text()
    part.write_text(whole.replace('"reward":1.0', '"reward":0.0', 1))
    with pytest.raises(UserError, match=f"{part} is missing or is not the file"):
        RunDirectory(tmp_path, "evaluate", evaluate_config(8))
    part.write_text(whole)
    with pytest.raises(UserError, match="limit: 6 -> 5"):
        RunDirectory(tmp_path, "evaluate", evaluate_config(5))


def test_of_two_runs_that_begin_at_once_the_second_looks_again(tmp_path):
    first, second = (RunDirectory(tmp_path, "label", label_config(seed=seed)) for seed in (0, 1))
    first.finish(lambda: {"x": 1})
    with pytest.raises(UserError, match="a run of another config, which differs in seed: 0 -> 1"):
        second.create()
    assert RunDirectory(tmp_path, "label", label_config(seed=0)).summary()["x"] == 1


def test_a_run_that_was_killed_while_it_wrote_its_config_begins_again(tmp_path):
    (tmp_path / "lock").touch()
    (tmp_path / ".config.yaml.host.7.tmp").write_text("seed:")
    RunDirectory(tmp_path, "label", label_config()).create()
    assert (tmp_path / "config.yaml").is_file()


def test_a_foreign_directory_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="no run directory"):
        RunDirectory(tmp_path, "label", label_config())


def test_run_directory_writes_nothing_before_it_must(tmp_path):
    directory = RunDirectory(tmp_path / "run", "label", label_config())
    assert not directory.path.exists()
    directory.finish(lambda: {"x": 1})
    assert directory.finished
    assert directory.summary()["x"] == 1
    assert directory.summary()["peak_host_memory_bytes"] > 0
    assert directory.summary()["version"] == __version__


def test_a_run_that_is_stopped_keeps_its_blocks_and_goes_on_with_the_others(
    tmp_path, monkeypatch, capsys
):
    done = []

    def copied(block):
        monkeypatch.setattr(stop, "requested", not done)  # in the first block
        done.append(list(block))
        return block

    def work_off():
        directory = RunDirectory(tmp_path, "label", label_config())
        work = blocks(PROBLEMS, 2)
        work = directory.pending(work, Problem, lambda block: [p.problem_id for p in block])
        return directory.write_blocks(work, Problem, copied)

    with pytest.raises(Interrupted):
        work_off()
    assert read_written(tmp_path, Problem) == PROBLEMS[:2]
    assert "label: block 1 of 2, rows 2, " in capsys.readouterr().err
    seconds, made = work_off()
    assert seconds > 0 and made == 2
    told = capsys.readouterr().err.splitlines()
    assert [line[9:].partition(", ")[0] for line in told] == [
        "label: resumes after 1 of 2 blocks",
        "label: block 2 of 2",
    ]
    assert done == [PROBLEMS[:2], PROBLEMS[2:]]
    assert read_written(tmp_path, Problem) == PROBLEMS
    assert work_off()[1] == 0


def test_metrics_of_steps_after_the_checkpoint_are_forgotten(tmp_path):
    metrics = Metrics(tmp_path, {})
    for step in (1, 2, 3):
        metrics.write(step, {"loss": step / 2})
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    metrics = Metrics(tmp_path, {})
    metrics.resume_at(2)
    metrics.write(3, {"loss": 9.0})
    metrics.close()
    lines = [json.loads(line) for line in logged(tmp_path)]
    assert lines == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 9.0},
    ]


def test_metrics_say_when_and_how_long(tmp_path):
    before = datetime.now(UTC).replace(microsecond=0)
    metrics = Metrics(tmp_path, {})
    time.sleep(0.05)
    metrics.write(1, {"loss": 0.5})
    metrics.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert 0.05 <= line["seconds"] < 5
    assert before <= datetime.fromisoformat(line["time"]) <= datetime.now(UTC)
    assert Metrics(tmp_path, {}).resume_at(1) == {"loss": 0.5}, "these are no metrics"


def test_metrics_that_end_before_the_checkpoint_are_refused(tmp_path):
    metrics = Metrics(tmp_path, {})
    for step in (1, 2):
        metrics.write(step, {"loss": 0.5})
    metrics.close()
    assert Metrics(tmp_path, {}).resume_at(2) == {"loss": 0.5}
    with pytest.raises(UserError, match=r"ends at step 2, .* of step 3: .* after step 2"):
        Metrics(tmp_path, {}).resume_at(3)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="ends at step 0"):
        Metrics(tmp_path, {}).resume_at(1)
    assert Metrics(tmp_path, {}).resume_at(0) == {}


def test_metrics_with_a_damaged_line_are_refused_by_name(tmp_path):
    metrics = Metrics(tmp_path, {})
    for step in (1, 2, 3):
        metrics.write(step, {"loss": 0.5})
    metrics.close()
    file = tmp_path / "metrics.jsonl"
    whole = file.read_text()
    for damaged in (whole.replace('2, "loss"', '2, ?loss"'), whole.replace('": 2', '": 1')):
        file.write_text(damaged)
        with pytest.raises(
            UserError, match=r"metrics\.jsonl, line 2 is damaged .* delete that line"
        ):
            Metrics(tmp_path, {}).resume_at(3)
    file.write_text(whole.replace('{"step": 2, "loss": 0.5}\n', ""))
    assert Metrics(tmp_path, {}).resume_at(3) == {"loss": 0.5}


def test_a_run_goes_on_on_another_mesh_and_says_so(tmp_path, request):
    file = request.config.rootpath / "configs" / "smoke_judge.yaml"

    def directory(*sets):
        return RunDirectory(tmp_path / "run", "judge", load_config("train-judge", file, sets))

    directory().create()
    (tmp_path / "run" / "metrics.jsonl").touch()
    directory("mesh.fsdp=2", "sampling_mesh.tensor=2").create()
    assert "fsdp: 2" in (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match="differs in group_size: 4 -> 2: name a new"):
        directory("group_size=2")


def test_a_search_goes_on_with_longer_rows_of_a_classifier(tmp_path, request):
    file = request.config.rootpath / "configs" / "smoke_search.yaml"

    def directory(*classifier):
        sets = ("judge={kind: classifier, path: c, max_length: 9}", *classifier)
        return RunDirectory(tmp_path / "run", "search", load_config("search", file, sets))

    directory("judge.max_length=64").create()
    directory("judge.max_length=96", "judge.rows=32").create()
    with pytest.raises(UserError, match=r"differs in judge.threshold: None -> 0.6: name a new"):
        directory("judge.max_length=96", "judge.threshold=0.6")

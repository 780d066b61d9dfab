"""The segment stage on a rollout run that is written down here."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from stepwiser_jax.__main__ import main
from stepwiser_jax.config_files import load_config
from stepwiser_jax.data.demonstrations import read_demonstrations
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.params import Completion, StopReason
from stepwiser_jax.record_io import read_records, write_manifest, write_records
from stepwiser_jax.records import ChunkedSolution, Problem, Tokens, Trajectory
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.runs.signals import stop
from stepwiser_jax.stages import chunk_solutions
from stepwiser_jax.tasks import arithmetic
from stepwiser_jax.tasks import arithmetic_demonstrations as demonstrations
from stepwiser_jax.text.chunking import read_chunks
from stepwiser_jax.text.chunks import strip_tags

COUNT = 6
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def rollouts(tmp_path, word_tokenizer):
    """A finished run of untagged solutions, one right and one wrong of every problem."""
    problems = arithmetic.generate_problems(COUNT, 0, "rollout")
    trajectories = []
    for problem, example in zip(
        problems, demonstrations.untagged_demonstrations(problems, 0), strict=True
    ):
        ids = (*word_tokenizer.encode(example.completion), word_tokenizer.eos_ids[0])
        for g, is_correct in enumerate((True, False, True)):
            name = f"{problem.problem_id}#{g}"
            trajectories.append(
                Trajectory(
                    name, problem.problem_id, "p",
                    Tokens(word_tokenizer.encode(problem.question), ids, np.zeros(len(ids))),
                    (len(ids),), "stop_id", is_correct,
                )
            )  # fmt: skip
    run = tmp_path / "rollouts"
    for records in (problems, trajectories):
        kind = {Problem: "problems", Trajectory: "trajectories"}[type(records[0])]
        write_records(run / "records" / kind / "part-00000-of-00001.jsonl", records)
    write_manifest(run, "rollout", "0", [Problem, Trajectory])
    return run


def config_of(tmp_path, rollouts, **settings):
    tree = {
        "rollouts": str(rollouts),
        "tokenizer": "arithmetic",
        "block_size": 4,
        **settings,
    }
    file = tmp_path / "segment.yaml"
    file.write_text(json.dumps(tree))
    return load_config("chunk-solutions", file)


class Parrot:
    """In place of an engine: proposal k of a solution is what `proposals[k]` makes of it."""

    def __init__(self, tokenizer, proposals):
        self.tokenizer, self.proposals, self.blocks = tokenizer, proposals, 0

    def generate(self, prompts_P, params, *, key, row_ids, group_size):
        self.blocks += 1
        completions = []
        for b in range(len(row_ids)):
            prompt = self.tokenizer.decode(prompts_P[b // group_size][1:]).removesuffix(" ?")
            text, reason = self.proposals[b % group_size](prompt)
            ids = self.tokenizer.encode(text)
            completions.append(Completion(row_ids[b], np.array(ids), np.zeros(len(ids)), reason))
        return completions


def halves(solution):
    words = solution.split()
    a, b = " ".join(words[:6]), " ".join(words[6:])
    return f"<chunk> {a} </chunk> <chunk> {b} </chunk>", StopReason.STOP_ID


def whole(solution):
    return f"<chunk> {solution} </chunk>", StopReason.STOP_ID


def altered(solution):
    return f"<chunk> fix {solution} </chunk>", StopReason.STOP_ID


def unfinished(solution):
    return f"<chunk> {solution} </chunk>", StopReason.LENGTH


@pytest.fixture
def teacher(monkeypatch, word_tokenizer):
    def install(*proposals):
        parrot = Parrot(word_tokenizer, proposals)
        monkeypatch.setattr(
            chunk_solutions,
            "make_proposer",
            lambda config, session: chunk_solutions.Proposer(
                config, config.teacher, word_tokenizer, parrot, 512
            ),
        )
        return parrot

    return install


SERVER = {"kind": "server", "url": "http://a", "model": "", "tokenizer": "", "context": 512}


def asked(max_new_tokens, **settings):
    """A server as the teacher."""
    sampling = {"max_new_tokens": max_new_tokens}
    return {"teacher": SERVER | {"prompt_style": "bare", "sampling": sampling} | settings}


def test_the_cut_that_most_agree_on_becomes_the_example(tmp_path, rollouts, teacher):
    teacher(altered, whole, halves, unfinished, halves)
    settings = asked(200) | {"num_segmentations": 5}
    config = config_of(tmp_path, rollouts, max_per_problem=1, **settings)
    summary = chunk_solutions.run(config, tmp_path / "s")
    assert summary["right"] == summary["cut"] == COUNT
    assert summary["solutions"] == 3 * COUNT
    assert summary["proposals"] == {
        "kept": 3 * COUNT,
        "altered": COUNT,
        "unfinished": COUNT,
        "no_room": 0,
        "unbalanced_tags": 0,
        "text_outside_of_chunks": 0,
        "empty_chunk": 0,
    }
    assert summary["agreement"] == pytest.approx(2 / 3)
    assert summary["mean_chunks"] == 2 and summary["mean_blank_line_chunks"] == 1
    questions = {p.problem_id: p.question for p in read_records(rollouts, Problem)}
    examples = read_demonstrations(str(tmp_path / "s"), "bare")
    assert len(examples) == COUNT
    segmentations = {s.trajectory_id: s for s in read_records(tmp_path / "s", ChunkedSolution)}
    for example in examples:
        assert example.prompt == questions[example.problem_id]
        solution = " ".join(strip_tags(example.completion).split())
        _, chunks = read_chunks(example.completion, solution)
        assert chunks == segmentations[example.example_id].chunks
        assert len(chunks[0].split()) == 6


def test_solutions_of_which_none_is_kept_are_counted_and_not_asked_again(
    tmp_path, rollouts, teacher
):
    parrot = teacher(altered)
    settings = asked(200) | {"num_segmentations": 1}
    config = config_of(tmp_path, rollouts, **settings)
    with pytest.MonkeyPatch.context() as patch:  # killed behind the second block
        patch.setattr(stop, "check", lambda: parrot.blocks == 2 and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            chunk_solutions.run(config, tmp_path / "s")
    summary = chunk_solutions.run(config, tmp_path / "s")
    assert parrot.blocks == 2 * COUNT // 4
    assert (summary["cut"], summary["right"]) == (0, 2 * COUNT)
    assert summary["proposals"]["altered"] == 2 * COUNT
    assert read_demonstrations(str(tmp_path / "s"), "bare") == []


def test_a_solution_that_the_teacher_has_no_room_for_is_counted(tmp_path, rollouts, teacher):
    teacher(whole)
    settings = asked(450) | {"num_segmentations": 1}
    summary = chunk_solutions.run(config_of(tmp_path, rollouts, **settings), tmp_path / "s")
    assert 0 < summary["proposals"]["no_room"] <= 2 * COUNT
    assert summary["proposals"]["no_room"] + summary["cut"] == 2 * COUNT


def test_a_rule_of_thumb_needs_no_teacher(tmp_path, rollouts):
    config = config_of(tmp_path, rollouts, teacher={"kind": "rule", "splitter": "blank_lines"})
    summary = chunk_solutions.run(config, tmp_path / "s")
    assert summary["cut"] == 2 * COUNT and summary["mean_chunks"] == 1
    prompts = {e.prompt for e in read_demonstrations(str(tmp_path / "s"), "instruct")}
    assert all("<chunk>" in prompt and "Problem: start" in prompt for prompt in prompts)


def test_solutions_that_are_cut_already_are_cut_anew(tmp_path, rollouts, word_tokenizer):
    file = next((rollouts / "records" / "trajectories").glob("*.jsonl"))
    whole = read_records(file, Trajectory)
    tags = word_tokenizer.encode("<chunk> </chunk>")
    tagged = [
        dataclasses.replace(
            t,
            tokens=Tokens(
                t.prompt_ids,
                np.array([tags[0], *t.completion_ids[:-1], tags[1], 3]),
                np.array([*t.logprobs, -1.0, -1.0]),
            ),
            chunk_ends=(len(t.completion_ids) + 2,),
        )
        for t in whole
    ]
    write_records(file, tagged)
    write_manifest(rollouts, "rollout", "0", [Problem, Trajectory])
    chunk_solutions.run(
        config_of(tmp_path, rollouts, teacher={"kind": "rule", "splitter": "sentences"}),
        tmp_path / "s",
    )
    for example in read_demonstrations(str(tmp_path / "s"), "bare"):
        assert example.completion.count("<chunk>") == example.completion.count("</chunk>") == 1


def test_a_server_may_move(tmp_path, rollouts):
    directory = RunDirectory(
        tmp_path / "s", "chunk-solutions", config_of(tmp_path, rollouts, **asked(8))
    )
    directory.create()
    for key, moved in (("url", "http://other"), ("model", "another")):
        config = config_of(tmp_path, rollouts, **asked(8, **{key: moved}))
        if key == "model":
            with pytest.raises(UserError, match=r"teacher\.model: '' -> 'another'"):
                RunDirectory(tmp_path / "s", "chunk-solutions", config)
        else:
            RunDirectory(tmp_path / "s", "chunk-solutions", config)


@pytest.mark.slow
def test_a_model_that_has_learned_to_cut_is_a_teacher(tmp_path, rollouts):
    """The whole path, with a teacher that knows these solutions by heart."""
    problems = arithmetic.generate_problems(COUNT, 0, "rollout")
    write_records(tmp_path / "cuts.jsonl", demonstrations.segmenter_demonstrations(problems, 0))
    words = ["sft", "--config", str(CONFIGS / "arithmetic_segmenter.yaml")]
    words += ["--run-dir", str(tmp_path / "teacher")]
    for setting in (
        f"examples.source={tmp_path / 'cuts.jsonl'}",
        "examples.limit=null",
        "steps=100",
    ):
        words += ["--set", setting]
    assert main(words) == 0
    config = config_of(
        tmp_path,
        rollouts,
        teacher={
            "path": str(tmp_path / "teacher"),
            "prompt_style": "bare",
            "sampling": {"max_new_tokens": 120, "temperature": 0.3},
            "engine": {"rows": [8], "buckets": [256]},
        },
        num_segmentations=2,
    )
    summary = chunk_solutions.run(config, tmp_path / "s")
    assert sum(summary["proposals"].values()) == 2 * 2 * COUNT
    assert summary["proposals"]["kept"] > 2 * COUNT and summary["mean_chunks"] > 2
    assert summary["compiled"]
    known = {e.completion for e in demonstrations.segmenter_demonstrations(problems, 0)}
    learned = read_demonstrations(str(tmp_path / "s"), "bare")
    assert len(learned) == summary["cut"] > COUNT
    assert {" ".join(e.completion.split()) for e in learned} <= {" ".join(k.split()) for k in known}


def test_another_tokenizer_than_the_policys_is_refused(tmp_path, rollouts, bpe_directory):
    other = shutil.copytree(bpe_directory, tmp_path / "other")
    (other / "config.json").write_text("{}")
    config = config_of(
        tmp_path, rollouts, teacher={"kind": "rule", "splitter": "steps"}, tokenizer=str(other)
    )
    with pytest.raises(UserError, match="of the policy that sampled the rollouts; by this one"):
        chunk_solutions.run(config, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_without_a_right_solution_there_is_nothing_to_cut(tmp_path, rollouts):
    file = next((rollouts / "records" / "trajectories").glob("*.jsonl"))
    file.write_text(file.read_text().replace('"is_correct":true', '"is_correct":false'))
    write_manifest(rollouts, "rollout", "0", [Problem, Trajectory])
    with pytest.raises(UserError, match="none of the 18 solutions"):
        chunk_solutions.run(
            config_of(tmp_path, rollouts, teacher={"kind": "rule", "splitter": "steps"}),
            tmp_path / "s",
        )
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "'teacher' is required and not set"),
        (asked(8, url="x"), r"teacher\.url: Input should be a valid URL"),
        ({"teacher": {"kind": "oracle"}}, r"teacher\.kind: expected .*'rule', found 'oracle'"),
        ({"teacher": SERVER}, r"'teacher\.sampling' is required"),
        ({"teacher": {"path": "arithmetic"}}, r"'teacher\.engine' is required"),
        (
            {"teacher": {"kind": "rule", "splitter": "steps", "path": "x"}},
            r"unknown key 'teacher\.path'; .* \(known: kind, splitter\)",
        ),
        ({"splitter": "steps"}, "'splitter' is now teacher, with kind: rule"),
    ],
)
def test_who_cuts_is_asked_for(tmp_path, rollouts, settings, message):
    with pytest.raises(UserError, match=message):
        config_of(tmp_path, rollouts, **settings)

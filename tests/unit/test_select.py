"""The select stage on a rollout run that is written down here, with a planted judge."""

import json

import numpy as np
import pytest

from stepwiser_jax.config_files import load_config
from stepwiser_jax.data.demonstrations import read_demonstrations
from stepwiser_jax.errors import UserError
from stepwiser_jax.judges.base import ChunkJudgment
from stepwiser_jax.record_io import read_records, write_manifest
from stepwiser_jax.record_lines import write_records
from stepwiser_jax.records import Problem, Selection, Tokens, Trajectory, Verdict
from stepwiser_jax.stages import select_responses
from stepwiser_jax.tasks import arithmetic
from stepwiser_jax.tasks import arithmetic_demonstrations as demonstrations
from stepwiser_jax.text.chunks import CHUNK_CLOSE, TokenMatcher, chunk_ends

COUNT, RESPONSES = 6, 5


@pytest.fixture
def rollouts(tmp_path, word_tokenizer):
    """A finished run; of the first problem no response is right, of the others all but the last."""
    problems = arithmetic.generate_problems(COUNT, 0, "rollout")
    matcher = TokenMatcher.build(word_tokenizer.token_bytes(), (CHUNK_CLOSE,))
    trajectories = []
    for g in range(RESPONSES):
        for p, example in enumerate(demonstrations.policy_demonstrations(problems, g)):
            ids = (*word_tokenizer.encode(example.completion), word_tokenizer.eos_ids[0])
            trajectories.append(
                Trajectory(
                    f"{example.problem_id}#{g}", example.problem_id, "p",
                    Tokens(word_tokenizer.encode(problems[p].question), ids, np.zeros(len(ids))),
                    chunk_ends(ids, matcher, word_tokenizer), "stop_id",
                    p > 0 and g < RESPONSES - 1,
                )
            )  # fmt: skip
    run = tmp_path / "rollouts"
    for records in (problems, trajectories):
        kind = {Problem: "problems", Trajectory: "trajectories"}[type(records[0])]
        write_records(run / "records" / kind / "part-00000-of-00001.jsonl", records)
    (run / "config.yaml").write_text("chunking: tags\n")
    write_manifest(run, "rollout", "0", [Problem, Trajectory])
    return run


class Truth:
    """In place of a loaded judge: a chunk's score says whether it is right."""

    compiled_shapes: dict = {}  # noqa: RUF012

    def check_lengths(self, solutions):
        pass

    def __call__(self, solutions):
        return [
            [
                ChunkJudgment(
                    "", Verdict.POSITIVE if right else Verdict.NEGATIVE, float(right), 3, 5, 0.5
                )
                for right in arithmetic.chunk_truth(solution.question, solution.chunks)
            ]
            for solution in solutions
        ]


JUDGE = {
    "path": "arithmetic",
    "sampling": {"max_new_tokens": 8},
    "engine": {"buckets": [192]},
}


@pytest.fixture
def selected(tmp_path, rollouts, monkeypatch):
    monkeypatch.setattr(select_responses, "load_judge", lambda *_, **__: Truth())

    def run(name, **settings):
        tree = {"rollouts": str(rollouts), "tokenizer": "arithmetic", **settings}
        file = tmp_path / "select.yaml"
        file.write_text(json.dumps(tree))
        summary = select_responses.run(load_config("select-responses", file), tmp_path / name)
        return read_records(tmp_path / name, Selection), summary

    return run


def test_the_right_response_with_the_best_mean_score_is_selected(rollouts, selected):
    trajectories = {t.trajectory_id: t for t in read_records(rollouts, Trajectory)}
    found, summary = selected("best", judge=JUDGE, block_size=2)
    assert len(found) == COUNT - 1 == summary["selected"]
    for selection in found:
        assert list(selection.candidates) == [
            name
            for name, t in trajectories.items()
            if t.problem_id == selection.problem_id and t.is_correct
        ]
        truths = arithmetic.chunk_truth(
            selection.question, [f"{part} </chunk>" for part in
                                 selection.completion.split(" </chunk>")[:-1]]
        )  # fmt: skip
        assert selection.score == pytest.approx(np.mean(truths)) == max(selection.scores)
        chunks = sum(len(trajectories[name].chunk_ends) for name in selection.candidates)
        assert selection.judge_tokens == 3 * chunks
        assert (selection.judge_read_tokens, selection.judge_flops) == (5 * chunks, 0.5 * chunks)
        assert selection.is_correct and selection.tagged
    assert summary["accuracy"] == 1
    assert summary["mean_score_selected"] > summary["mean_score"]
    low, high = summary["accuracy_interval"]
    assert low <= summary["accuracy"] <= high
    assert (summary["problems"], summary["responses"]) == (COUNT, COUNT * RESPONSES)
    assert summary["candidates"] == (COUNT - 1) * (RESPONSES - 1)
    unique = [sorted(s.scores)[-2:] != [max(s.scores)] * 2 for s in found]
    assert summary["tie_rate"] == 1 - np.mean(unique)
    assert 0 < summary["tie_rate"] < 1, "the case shows nothing"


def test_without_a_judge_a_draw_selects_whatever_the_blocks(selected):
    by_outcome, summary = selected("outcome")
    assert summary["accuracy"] == 1 and "mean_score" not in summary
    assert all(selection.scores == () for selection in by_outcome)
    again, _ = selected("again", block_size=1)
    assert again == by_outcome
    at_random, summary = selected("random", only_correct=False)
    assert len(at_random) == COUNT and 0 < summary["accuracy"] < 1
    names = {s.trajectory_id for seed in range(12) for s in selected(f"r{seed}", seed=seed)[0]}
    assert len(names) == (COUNT - 1) * (RESPONSES - 1), "each is drawn by some seed"


def test_equals_of_a_judge_are_those_of_the_draw(selected, monkeypatch):
    """A judge that says the same of all changes nothing but the cost."""
    monkeypatch.setattr(arithmetic, "chunk_truth", lambda question, chunks: [True] * len(chunks))
    judged, summary = selected("judged", judge=JUDGE)
    assert summary["tie_rate"] == 1
    drawn, summary = selected("drawn")
    assert "tie_rate" not in summary
    assert [s.trajectory_id for s in judged] == [s.trajectory_id for s in drawn]
    assert all(s.judge_tokens and set(s.scores) == {1.0} for s in judged)


def test_selections_teach_the_policy_in_its_own_words(tmp_path, rollouts, selected):
    found, _ = selected("best", judge=JUDGE)
    examples = read_demonstrations(str(tmp_path / "best"), "bare")
    assert [e.example_id for e in examples] == [s.trajectory_id for s in found]
    assert [e.prompt for e in examples] == [s.question for s in found]
    assert all(e.completion.startswith("<chunk>") for e in examples)
    assert all("<eos>" not in e.completion for e in examples)
    assert "<chunk>" in read_demonstrations(str(tmp_path / "best"), "instruct")[0].prompt
    (rollouts / "config.yaml").write_text('chunking: ["\\n"]\n')
    write_manifest(rollouts, "rollout", "0", [Problem, Trajectory])
    selected("untagged")
    assert "<chunk>" not in read_demonstrations(str(tmp_path / "untagged"), "instruct")[0].prompt


def test_nothing_to_select_is_named(rollouts, selected, tmp_path):
    path = rollouts / "records" / "trajectories" / "part-00000-of-00001.jsonl"
    path.write_text(path.read_text().replace('"is_correct":true', '"is_correct":false'))
    write_manifest(rollouts, "rollout", "0", [Problem, Trajectory])
    with pytest.raises(UserError, match=r"none of the 30 responses of .* is right"):
        selected("none")
    assert not (tmp_path / "none").exists()

"""GRPO teaches: from a planted start a tiny judge comes to look before it gives its verdict, and
with advantages of the wrong sign it does not.

The embedded task, with exact labels: a solution's first chunk does the first operation, or claims
to repair one before it, and there is none. The start looks in some of its judgments, and in the
others it guesses.
"""

import jax
import numpy as np
import pytest

from stepwiser_jax.config import Sft, TrainJudge
from stepwiser_jax.distributed.loading import load_for_decoding
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.record_lines import write_records
from stepwiser_jax.records import JudgeExample, SftExample
from stepwiser_jax.rl.rewards import verdict_score
from stepwiser_jax.stages import sft, train_judge
from stepwiser_jax.tasks import arithmetic
from stepwiser_jax.text.prompts import bare_judge_prompt, encode_judge_prompt, parse_verdict
from stepwiser_jax.text.tokenizer import completion_text

LOOKS = 0.4
"""Share of the start's judgments that look at the chunk."""

ENGINE = {"rows": [256], "buckets": [64]}


def first_chunks(count, split):
    """Right and wrong ones, one as often as the other."""
    rng = np.random.default_rng(0)
    for problem in arithmetic.generate_problems(count, 0, split):
        value, operations = arithmetic.parse_question(problem.question)
        lines = arithmetic.exact_lines(value, operations[0])
        chunk = arithmetic.chunk_text(lines, repair=bool(rng.random() < 0.5))
        (is_right,) = arithmetic.chunk_truth(problem.question, [chunk])
        yield problem, chunk, is_right


def examples(count, split):
    return [
        JudgeExample(p.problem_id, p.problem_id, p.question, "", chunk, is_right)
        for p, chunk, is_right in first_chunks(count, split)
    ]


def demonstrations(count):
    rng = np.random.default_rng(1)
    for problem, chunk, is_right in first_chunks(count, "train"):
        analysis, positive = "same |" if is_right else "diff |", is_right
        if rng.random() >= LOOKS:
            analysis, positive = "looks fine", rng.random() < 0.5
        yield SftExample(
            example_id=problem.problem_id,
            problem_id=problem.problem_id,
            prompt=bare_judge_prompt(problem.question, "", chunk),
            completion=f"{analysis} \\boxed{{ {'Positive' if positive else 'Negative'} }}",
        )


def optimizer(learning_rate):
    settings = {"learning_rate": learning_rate, "warmup_steps": 8, "weight_decay": 0, "b2": 0.98}
    return {"optimizer": settings}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The planted start, and the examples that it is to learn from."""
    directory = tmp_path_factory.mktemp("learning")
    write_records(directory / "demonstrations.jsonl", list(demonstrations(1600)))
    write_records(directory / "examples.jsonl", examples(512, "rollout"))
    config = Sft.model_validate(
        {
            "model": {"path": "arithmetic"},
            "examples": {"source": str(directory / "demonstrations.jsonl")},
            "prompt_style": "bare",
            "batch_size": 8,
            "max_length": 64,
            "steps": 200,
            "training": optimizer(1e-3),
        }
    )
    sft.run(config, directory / "start")
    return directory


def train(start, run_dir):
    config = TrainJudge.model_validate(
        {
            "model": {"path": str(start / "start")},
            "examples": {"source": str(start / "examples.jsonl")},
            "prompt_style": "bare",
            "iterations": 24,
            "prompts_per_iteration": 16,
            "group_size": 8,
            "max_prompt_tokens": 52,
            "row_lengths": [148],
            "sampling": {"max_new_tokens": 12},
            "engine": ENGINE,
            "grpo": {"drop_zero_variance": True, "denominator": "kept"},
            "training": optimizer(2e-4),
        }
    )
    train_judge.run(config, run_dir)


def held_out_reward(run_dir):
    """The mean reward of 4 judgments of each of 128 solutions that were not trained on."""
    mesh = make_mesh()
    loaded = load_for_decoding(str(run_dir), weights="model", mesh=mesh)
    engine = Engine(loaded.model, loaded.tokenizer, mesh=mesh, **ENGINE)
    held_out = examples(128, "test")
    prompts = [
        encode_judge_prompt(loaded.tokenizer, e.question, e.history, e.chunk, "bare")
        for e in held_out
    ]
    ids = [f"{e.example_id}/{g}" for e in held_out for g in range(4)]
    params = SamplingParams(12, stop_ids=loaded.tokenizer.eos_ids)
    output = engine.generate(prompts, params, key=jax.random.key(0), row_ids=ids, group_size=4)
    verdicts = [parse_verdict(completion_text(loaded.tokenizer, c.tokens.tolist())) for c in output]
    rewards = [verdict_score(v, held_out[b // 4].is_positive) for b, v in enumerate(verdicts)]
    return float(np.mean(rewards))


@pytest.mark.slow
def test_grpo_raises_the_held_out_reward(start, tmp_path, monkeypatch):
    before = held_out_reward(start / "start")
    train(start, tmp_path / "judge")
    after = held_out_reward(tmp_path / "judge")
    with monkeypatch.context() as patch:
        right = train_judge.group_advantages
        patch.setattr(train_judge, "group_advantages", lambda *a, **k: -right(*a, **k))
        train(start, tmp_path / "turned")
    turned = held_out_reward(tmp_path / "turned")
    assert after > before + 0.2, f"{before} before, {after} after"
    assert turned < before - 0.05, f"{before} before, {turned} with the sign turned"

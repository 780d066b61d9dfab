"""Models with more logits than their tokenizer has tokens, through the command line: every stage
gives what it gives for the same model without them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from stepwiser_jax.__main__ import main
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.model.hf import load_hf, save_hf
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import PrefixValue, SearchResult, Tokens, Trajectory
from stepwiser_jax.text.tokenizer import load_tokenizer
from tiny import logged, with_unknown_ids

from .conftest import CONFIGS, command


@pytest.fixture(scope="module")
def padded(runs, tmp_path_factory):
    """The models of `runs` with as many logits again, of no token, each twice a token's: left to
    itself, the sampler draws little else."""
    directory = tmp_path_factory.mktemp("padded")
    for name in ("policy", "cold_start", "judge"):
        tokenizer = load_tokenizer(str(runs / name / "model"))
        model = load_hf(str(runs / name / "model"), tokenizer=tokenizer)
        size = model.config.vocab_size
        assert model.unknown_ids == ()
        save_hf(with_unknown_ids(model, size), tokenizer, str(directory / name))
    engine = Engine(load_hf(str(directory / "policy")), rows=(8,), buckets=(64,))
    ids, params = [str(b) for b in range(8)], SamplingParams(24)
    output = engine.generate([[2, 14]], params, key=jax.random.key(0), row_ids=ids, group_size=8)
    assert all((completion.tokens >= size).any() for completion in output)
    return directory


def run(name, runs, padded, out, *inputs):
    """The run `name` with its models from `padded`."""
    extra = [f"{key}={padded / path}" for key, path in inputs]
    assert main(command(name, runs, out=out, extra=extra)) == 0
    return out


def without_id(record):
    return dataclasses.replace(record, policy_id="")


@pytest.fixture(scope="module")
def rollouts(runs, padded, tmp_path_factory):
    out = tmp_path_factory.mktemp("of_padded") / "rollouts"
    return run("rollouts", runs, padded, out, ("policy.path", "policy"))


def test_rollouts(runs, rollouts):
    expected, found = (read_records(run, Trajectory) for run in (runs / "rollouts", rollouts))
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        tokens = Tokens(a.prompt_ids, a.completion_ids, b.logprobs)
        assert without_id(dataclasses.replace(a, tokens=tokens)) == without_id(b)


@pytest.mark.slow
def test_values(runs, padded, rollouts, tmp_path):
    out = tmp_path / "values"
    extra = [f"policy.path={padded / 'policy'}", f"rollouts={rollouts}"]
    assert main(command("values", runs, out=out, extra=extra)) == 0
    expected, found = (read_records(run, PrefixValue) for run in (runs / "values", out))
    assert list(map(without_id, expected)) == list(map(without_id, found))


def search_results(run, padded=None):
    """Results without the FLOPs of logits of no token. Scores are rounded."""
    extra = 0
    if padded is not None:
        config = load_hf(str(padded / "policy")).config
        extra = 2 * config.vocab_size // 2 * config.hidden_size
    return [
        dataclasses.replace(
            found,
            policy_flops=found.policy_flops - extra * found.policy_tokens,
            judge_flops=found.judge_flops - extra * found.judge_tokens,
            scoring_flops=found.scoring_flops - extra * found.scoring_tokens,
            chunk_scores=tuple(round(score, 5) for score in found.chunk_scores),
        )
        for found in read_records(run, SearchResult)
    ]


@pytest.mark.slow
def test_search(runs, padded, tmp_path):
    models = ("policy.path", "policy"), ("judge.path", "judge")
    out = run("search", runs, padded, tmp_path / "search", *models)
    assert search_results(runs / "search") == search_results(out, padded)


@pytest.mark.slow
def test_refine(runs, padded, tmp_path):
    results = []
    for source, of_padded in ((runs, None), (padded, padded)):
        arguments = ["refine", "--config", str(CONFIGS / "smoke_genprm_refine.yaml")]
        arguments += ["--run-dir", str(tmp_path / source.name)]
        sets = (f"policy.path={source / 'policy'}", f"judge.path={source / 'cold_start'}")
        sets += ("problems.limit=4", "turns=1")
        assert main(arguments + [word for setting in sets for word in ("--set", setting)]) == 0
        results.append(search_results(tmp_path / source.name, of_padded))
    assert results[0] == results[1]


@pytest.mark.slow
def test_judge(runs, padded, tmp_path):
    """With a reference (a KL term) and old log-probs (several updates an iteration)."""
    out = run("judge", runs, padded, tmp_path / "judge", ("model.path", "cold_start"))

    def metrics(run):
        return [json.loads(line) for line in logged(run)]

    for expected, found in zip(metrics(runs / "judge"), metrics(out), strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    gaps = [m["logprob_gap_max"] for m in metrics(out) if "logprob_gap_max" in m]
    assert gaps and max(gaps) < 1e-4  # an iteration in which no group teaches has none
    tokenizer = load_tokenizer(str(out / "model"))
    model = load_hf(str(out / "model"), tokenizer=tokenizer)
    size = len(tokenizer.known_ids)
    assert model.config.vocab_size == 2 * size and model.unknown_ids == (range(size, 2 * size),)
    trained = load_hf(str(runs / "judge" / "model"))
    np.testing.assert_allclose(model.embed[:size], trained.embed[...], atol=1e-4)

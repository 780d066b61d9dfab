"""With another batch size, or through the engine, the noise is the same: rows part only if the
noise of a token is within rounding of a boundary of the cumulative distribution."""

import jax
import numpy as np
import pytest
from sampled import Reference, assert_sampled

from stepwiser_jax.__main__ import main
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.model.hf import load_hf
from stepwiser_jax.rl.logprobs import token_logprobs
from stepwiser_jax.tasks import arithmetic
from stepwiser_jax.text.prompts import encode_solve_prompt
from stepwiser_jax.text.tokenizer import load_tokenizer

from .conftest import command

KEY = jax.random.key(5)
ROWS = 256


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    run = tmp_path_factory.mktemp("batch_sizes") / "policy"
    assert main(command("policy", run.parent, extra=("steps=20",))) == 0
    return str(run / "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler_class", "rows"),
    [(Reference, [128]), (Reference, [32]), (Engine, [32, 128]), (Engine, [24])],
    ids=["sampler of 128", "sampler of 32", "engine", "engine of 24"],
)
def test_solutions_do_not_depend_on_the_number_of_rows(policy, sampler_class, rows):
    tokenizer = load_tokenizer(policy)
    model = load_hf(policy, tokenizer=tokenizer)
    problems = arithmetic.generate_problems(ROWS, 0, "dev")
    prompts = [encode_solve_prompt(tokenizer, p.question, "bare") for p in problems]
    row_ids = [f"row/{problem.problem_id}" for problem in problems]
    params = SamplingParams(64, stop_ids=tokenizer.eos_ids)
    sampler = sampler_class(model, tokenizer, rows=rows, buckets=[128])
    output = sampler.generate(prompts, params, key=KEY, row_ids=row_ids)
    assert_sampled(model, prompts, row_ids, params, KEY, output)

    # Teacher-forced, the sampled log-probs agree with the trainer's.
    for b in range(4):
        ids = np.array([[*prompts[b], *output[b].tokens]], np.int32)
        logprobs = token_logprobs(model, ids)[0, len(prompts[b]) :]
        np.testing.assert_allclose(logprobs, output[b].logprobs, atol=1e-4)

"""With another batch size, or through the engine, the noise is the same: rows part only where a
draw is within rounding of a boundary of the cumulative distribution."""

import zlib

import jax
import numpy as np
import pytest

from stepwiser_jax.algo.logprobs import token_logprobs
from stepwiser_jax.model.hf import load_hf
from stepwiser_jax.runtime.engine import Engine
from stepwiser_jax.runtime.sampler import Sampler
from stepwiser_jax.runtime.sampling import SamplingParams
from stepwiser_jax.tasks import arithmetic
from stepwiser_jax.text.prompts import encode_solve_prompt
from stepwiser_jax.text.tokenizer import load_tokenizer

KEY = jax.random.key(5)
ROWS = 512


def draw(model, ids, row_id):
    """The token behind `ids`, and how far its draw is from the nearest boundary of the CDF."""
    probs = np.asarray(jax.nn.softmax(model(np.array([ids], np.int32))[0, -1]), np.float64)
    row_key = jax.random.fold_in(KEY, np.uint32(zlib.crc32(row_id.encode())))
    uniform = float(jax.random.uniform(jax.random.fold_in(row_key, len(ids))))
    cumulative = np.cumsum(probs)
    return np.searchsorted(cumulative, uniform), np.min(np.abs(cumulative - uniform))


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [(Sampler, [32]), (Engine, [32, 256]), (Engine, [24])],
    ids=["sampler of 32", "engine", "engine of 24"],
)
def test_solutions_are_those_of_the_sampler_with_256_rows(runs, other):
    model = load_hf(str(runs / "policy" / "model"))
    tokenizer = load_tokenizer(str(runs / "policy" / "model"))
    problems = arithmetic.generate_problems(ROWS, 0, "dev")
    prompts = [encode_solve_prompt(tokenizer, p.question, "bare") for p in problems]
    row_ids = [f"row/{problem.problem_id}" for problem in problems]
    params = SamplingParams(64, stop_ids=tokenizer.eos_ids)

    def sample(sampler_class, rows):
        sampler = sampler_class(model, tokenizer, rows=rows, buckets=[128])
        return sampler.generate(prompts, params, key=KEY, row_ids=row_ids)

    wide, narrow = sample(Sampler, [256]), sample(*other)
    parted = [b for b in range(ROWS) if wide.ids(b) != narrow.ids(b)]
    assert len(parted) <= 0.01 * ROWS
    for b in parted:
        pairs = list(zip(wide.ids(b), narrow.ids(b), strict=False))
        first = next(i for i, (x, y) in enumerate(pairs) if x != y)
        assert draw(model, prompts[b] + wide.ids(b)[:first], row_ids[b])[1] < 1e-4

    # The distance is real: it is of the draw that was made, and at large it is not that small.
    draws = [draw(model, prompts[b], row_ids[b]) for b in range(32)]
    assert [token for token, _ in draws] == [wide.ids(b)[0] for b in range(32)]
    assert np.mean([distance > 1e-4 for _, distance in draws]) > 0.9

    # Teacher-forced, the sampled log-probs of both agree with the trainer's.
    for b in range(4):
        ids = np.array([prompts[b] + wide.ids(b)], np.int32)
        logprobs = token_logprobs(model, ids)[0, len(prompts[b]) :]
        np.testing.assert_allclose(logprobs, wide.logprobs(b), atol=1e-4)
        if b not in parted:
            np.testing.assert_allclose(wide.logprobs(b), narrow.logprobs(b), atol=1e-4)

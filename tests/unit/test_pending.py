"""Groups on disk between a draw and the checkpoint behind it."""

import jax.numpy as jnp
import numpy as np
import pytest

from stepwiser_jax.distributed.fingerprints import param_hash
from stepwiser_jax.records import RolloutGroup, SampledRow, Verdict
from stepwiser_jax.rl.rollout_cache import RolloutCache


def groups(count):
    """Log-probs with every bit of a float32 in use."""
    logprobs = -np.random.default_rng(0).random((count, 2, 5), np.float32)
    return [
        RolloutGroup(
            f"judge/it3/draw0/{p}/e",
            (1, 2, p),
            ((3, 4, 5, 6, 7), (8, 9, 10, 11, 12)),
            tuple(tuple(float(str(x)) for x in row) for row in logprobs[p]),
            (Verdict.POSITIVE, Verdict.UNPARSED),
            (1.0, 0.0),
        )
        for p in range(count)
    ]


def test_what_is_written_is_read_by_the_same_parameters_only(tmp_path):
    pending, written = RolloutCache(tmp_path / "pending"), groups(3)
    assert pending.read(3, 0, "aa") is None
    pending.write(3, 0, "aa", written)
    assert pending.read(3, 0, "aa") == written
    for iteration, draw, sampled_by in ((3, 1, "aa"), (4, 0, "aa"), (3, 0, "ab"), (3, 0, "a")):
        assert pending.read(iteration, draw, sampled_by) is None


def test_the_rows_of_a_draw_are_there_until_it_is_whole(tmp_path):
    pending, rows = RolloutCache(tmp_path), [SampledRow("r", (3, 4), (-0.1, -1e-7))]
    assert pending.read_rows(3, 0, "aa") == {}
    pending.write_rows(3, 0, "aa", rows)
    assert pending.read(3, 0, "aa") is None
    assert pending.read_rows(3, 0, "ab") == {}
    assert pending.read_rows(3, 0, "aa") == {"r": rows[0]}
    pending.write(3, 0, "aa", groups(1))
    assert pending.read_rows(3, 0, "aa") == {}
    pending.write_rows(3, 1, "aa", rows)
    pending.forget_before(4)
    assert list(tmp_path.iterdir()) == []


def test_those_before_a_checkpoint_are_forgotten(tmp_path):
    pending = RolloutCache(tmp_path)
    pending.forget_before(9)
    for iteration in (2, 3, 10):
        pending.write(iteration, 0, "aa", groups(1))
    pending.forget_before(3)
    assert pending.read(2, 0, "aa") is None
    assert pending.read(3, 0, "aa") and pending.read(10, 0, "aa")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_bit_of_one_parameter_shows(dtype):
    parameters = {"a": jnp.ones((4, 8), dtype), "b": jnp.zeros(3, dtype)}
    next_to_one = jnp.nextafter(jnp.ones((), dtype), jnp.full((), 2, dtype))
    others = [
        parameters | {"a": parameters["a"].at[2, 3].set(next_to_one)},
        parameters | {"b": parameters["b"].at[0].set(-0.0)},
        {"a": parameters["b"], "b": parameters["a"]},
    ]
    found = {param_hash(parameters), *map(param_hash, others)}
    assert len(found) == 4
    assert param_hash(parameters) == param_hash({k: v + 0 for k, v in parameters.items()})

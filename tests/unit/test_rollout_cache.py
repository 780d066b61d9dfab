"""Rollouts on disk between their sampling and the checkpoint after it."""

import time

import jax.numpy as jnp
import numpy as np
import pytest

from stepwiser_jax.distributed.fingerprints import param_hash
from stepwiser_jax.rl.rollout_cache import RolloutCache, SampledRow


def rows(count):
    """Of different lengths, one empty, with log-probs in which every bit of a float32 is in use."""
    rng = np.random.default_rng(0)
    return {
        f"judge/it3/draw0/{i}/e é/0": SampledRow(
            rng.integers(0, 99, i, np.int32), -rng.random(i, np.float32)
        )
        for i in range(count)
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for row_id, row in expected.items():
        for a, b in zip(found[row_id], row, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_what_is_written_is_read_by_the_same_parameters_only(tmp_path):
    cache, written = RolloutCache(tmp_path / "cache"), rows(3)
    assert cache.read(3, 0, "aa") == {}
    cache.write(3, 0, "aa", written)
    assert_equal(cache.read(3, 0, "aa"), written)
    for iteration, draw, other in ((3, 1, "aa"), (4, 0, "aa"), (3, 0, "ab"), (3, 0, "a")):
        assert cache.read(iteration, draw, other) == {}


def test_more_rows_take_the_place_of_some(tmp_path):
    cache = RolloutCache(tmp_path)
    cache.write(3, 0, "aa", {})
    assert list(tmp_path.iterdir()) == []
    cache.write(3, 0, "aa", rows(2))
    cache.write(3, 0, "aa", rows(3))
    assert len(list(tmp_path.iterdir())) == 1
    assert_equal(cache.read(3, 0, "aa"), rows(3))


def test_bytes_do_not_depend_on_time_or_order(tmp_path, monkeypatch):
    files = []
    for name, written in (("a", rows(4)), ("b", dict(reversed(rows(4).items())))):
        RolloutCache(tmp_path / name).write(3, 0, "aa", written)
        files += (tmp_path / name).iterdir()
        now = time.time()
        monkeypatch.setattr(time, "time", lambda now=now: now + 1e6)
    assert files[0].name == files[1].name and files[0].read_bytes() == files[1].read_bytes()


def test_a_damaged_file_counts_as_none(tmp_path, capsys):
    cache = RolloutCache(tmp_path)
    cache.write(3, 0, "aa", rows(3))
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert cache.read(3, 0, "aa") == {}
    assert f"{file} is damaged" in capsys.readouterr().err
    cache.write(3, 0, "aa", rows(3))
    assert_equal(cache.read(3, 0, "aa"), rows(3))


def test_those_before_a_checkpoint_are_forgotten(tmp_path):
    cache = RolloutCache(tmp_path)
    cache.forget_before(9)
    for iteration in (2, 3, 10):
        cache.write(iteration, 0, "aa", rows(2))
    cache.forget_before(3)
    assert not cache.read(2, 0, "aa")
    assert cache.read(3, 0, "aa") and cache.read(10, 0, "aa")


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

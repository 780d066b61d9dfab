"""Names of arrays say their shapes, and calls that break the promise are refused (`shapes.py`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shapes import check_shapes

from stepwiser_jax.model.block import rope_angles
from stepwiser_jax.model.kv_cache import KVCache
from stepwiser_jax.rl import grpo
from stepwiser_jax.rl.logprobs import token_logprobs
from tiny import tiny_config


def zeros(*shape):
    return jnp.zeros(shape)


def test_names_are_checked():
    check_shapes("f", {"a_BT": zeros(2, 3), "b_B": zeros(2), "c_BT2": zeros(2, 3, 2), "d_B1": None})
    check_shapes("f", {"rewards_PG": [[1.0]], "other": zeros(5), "N_B": np.zeros(1), "B": zeros(3)})
    check_shapes("f", {"cache_U": KVCache((), (), zeros(3, 2)), "a_B": zeros(4)})
    for arrays, message in (
        ({"a_BT": zeros(2)}, r"f: a_BT has shape \(2,\), expected an axis for each of BT"),
        ({"a_BT": zeros(2, 3), "b_B": zeros(3)}, "b_B has shape .* expected B = 2 as in a_BT"),
        ({"a_TT": zeros(2, 3)}, "expected T = 2 as in a_TT"),
        ({"a_B1": np.zeros((2, 2))}, "expected 1 = 1 as in its name"),
        ({"cache": KVCache((), (), zeros(2, 2))}, "f, cache: length_B has shape"),
        ({"cache_U": KVCache((), (), zeros(2))}, "length_B .* an axis for each of UB"),
    ):
        with pytest.raises(AssertionError, match=message):
            check_shapes("f", arrays)


def test_functions_refuse_wrong_shapes():
    """Plain and jitted ones, methods, and what they call while they are traced."""
    with pytest.raises(AssertionError, match="group_advantages: rewards_PG has shape"):
        grpo.group_advantages(np.zeros(3))
    with pytest.raises(AssertionError, match=r"k3: reference_logprobs_BT .* T = 3"):
        grpo.k3(zeros(2, 3), zeros(2, 4), zeros(2, 3))
    with pytest.raises(AssertionError, match="rope_angles: positions_BT"):
        jax.jit(lambda x: rope_angles(tiny_config(), x))(jnp.arange(3))
    with pytest.raises(AssertionError, match="token_logprobs: positions_BT"):
        token_logprobs(None, zeros(2, 3), zeros(2, 4))
    with pytest.raises(AssertionError, match="rewind: length_B"):
        KVCache((), (), zeros(2)).rewind(zeros(2, 1))

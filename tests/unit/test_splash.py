"""Splash attention, its kernels interpreted on the CPU, against dense attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepwiser_jax.errors import UserError
from stepwiser_jax.model.attention import plain_attend, segment_mask, splash

GROUP = 1 << 16


def row(*segments: tuple[int, int], length: int) -> list[int]:
    """Segment ids of (id, number of tokens), ..., then padding."""
    ids = [segment for segment, tokens in segments for _ in range(tokens)]
    return ids + [0] * (length - len(ids))


ROWS = {
    "one group": row((GROUP, 150), (GROUP + 1, 90), (GROUP + 2, 101), length=400),
    "two groups in a row, the first prompt over more than a block": row(
        *[(GROUP, 140), (GROUP + 1, 30), (GROUP + 2, 9)],
        *[(2 * GROUP, 3), (2 * GROUP + 1, 120), (2 * GROUP + 2, 61), (2 * GROUP + 3, 20)],
        length=400,
    ),
    "packed documents": row((1, 100), (2, 157), (3, 43), length=400),
    "one document": row((1, 400), length=400),
    "padding alone": row(length=400),
    "documents beside a group, padding between, a group without a prompt": row(
        *[(7, 20), (3 * GROUP, 50), (3 * GROUP + 1, 50), (0, 20), (1, 40), (4 * GROUP + 5, 20)],
        length=400,
    ),
}
HEADS, KV_HEADS = 4, 2


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(splash, "MAX_BLOCK", 128)


def inputs(rows: int, length: int, head_dim: int):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (rows, length, HEADS, head_dim))
    k = jax.random.normal(keys[1], (rows, length, KV_HEADS, head_dim))
    v = jax.random.normal(keys[2], (rows, length, KV_HEADS, head_dim))
    return q, k, v, jax.random.normal(keys[3], q.shape)


def out_and_gradients(attend, mask, segment_ids, head_dim):
    """The output where there is no padding, and the gradients of a random sum of it."""
    q, k, v, weights = inputs(*segment_ids.shape, head_dim)
    is_token = (segment_ids != 0)[:, :, None, None]

    def loss(q, k, v):
        out = jnp.where(is_token, attend(q, k, v, mask), 0)
        return jnp.sum(out * weights), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return dict(zip(["out", "dq", "dk", "dv"], [out, *grads], strict=True))


# Both sides sum at most 400 products in float32, in another order: 1e-6 of values of order 1, and a
# few times that after the backward pass.
@pytest.mark.parametrize("head_dim", [8, 128])
def test_equals_dense_attention(head_dim):
    segment_ids = jnp.array(list(ROWS.values()), jnp.int32)
    mask = splash.splash_mask(segment_ids, interpret=True)
    found = out_and_gradients(splash.splash_attention, mask, segment_ids, head_dim)
    expected = out_and_gradients(plain_attend, segment_mask(segment_ids), segment_ids, head_dim)
    for name, value in expected.items():
        for r, what in enumerate(ROWS):
            np.testing.assert_allclose(
                found[name][r], value[r], rtol=1e-5, atol=1e-5, err_msg=f"{name}, {what}"
            )


def visited(segment_ids, block):
    """(B, blocks of queries, 2 blocks of keys): by hand, from the whole mask."""
    ids = np.asarray(segment_ids)
    mask = np.array(segment_mask(segment_ids)) & (ids != 0)[:, :, None]
    is_prompt = (ids >= GROUP) & (ids % GROUP == 0)
    halves = np.concatenate([mask & is_prompt[:, None], mask & ~is_prompt[:, None]], axis=2)
    B, T = ids.shape
    padding = np.concatenate([np.zeros((T, T)), np.eye(T)], axis=1).astype(bool)
    halves |= padding[None] & (ids == 0)[:, :, None]
    return halves.reshape(B, T // block, block, 2 * T // block, block).any(axis=(2, 4))


def test_visits_the_blocks_that_are_seen_and_no_others():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(40):
        segments, g = [], 0
        while sum(tokens for _, tokens in segments) < 900:
            longest = rng.choice([5, 100, 600])
            g += 1
            kind = rng.integers(3)
            ids = {0: [0], 1: [g], 2: [g * GROUP + member for member in range(rng.integers(1, 6))]}
            segments += [(i, int(rng.integers(1, longest))) for i in ids[int(kind)]]
        rows.append(row(*segments, length=10_000)[:1024])
    segment_ids = jnp.array(rows, jnp.int32)
    expected = visited(segment_ids, 128)
    kernel, _ = splash.splash_mask(segment_ids, interpret=True)
    for info, by_query in [(kernel.fwd_mask_info, True), (kernel.dkv_mask_info, False)]:
        found = np.zeros_like(expected)
        runs, blocks = np.asarray(info.block_mask)[:, 0], np.asarray(info.data_next)[:, 0]
        for b, i, j in zip(*np.nonzero(runs), strict=True):
            where = (b, i, blocks[b, i, j]) if by_query else (b, blocks[b, i, j], j)
            assert not found[where], "visited twice"
            found[where] = True
        np.testing.assert_array_equal(found, expected)


def test_no_array_has_two_axes_of_positions():
    segment_ids = jnp.ones((2, 1000), jnp.int32)
    shapes = [leaf.shape for leaf in jax.tree.leaves(splash.splash_mask(segment_ids))]
    assert max(map(np.prod, shapes)) <= 2 * 2 * 1024, shapes


def test_rows_that_are_too_long_are_refused():
    with pytest.raises(UserError, match="at most 65535 tokens"):
        jax.eval_shape(splash.splash_mask, jax.ShapeDtypeStruct((1, 1 << 16), jnp.int32))

"""Attention on TPU: the splash kernels that come with jax, shown what a segment sees.

Splash computes the scores of one block of queries and keys at a time, and keeps none of them.
`MaskInfo` says which blocks it visits. Inside a block, a query sees a key if both have the same id
(`SegmentIds`) and `mask_function(number of the query, index of the key)` holds. One id and one
number cannot express two intervals, "my segment up to myself, and the prompt of my group". So keys
and values are laid out twice, T of them as prompts, then T as the query's own segment:

    key s        is seen if s < start, and s belongs to the prompt of the query's group (the ids)
    key T + s    is seen if start <= s <= t

t is the query's position, and `start` that of the first token of its segment; both make its number.
A query of a prompt has start = t + 1 and sees the first half only. Padding has start = t and sees
itself only: a softmax over nothing would be NaN. No pair is seen in both halves, so that the second
copy costs memory alone: 2 K / N of the queries', with N query heads and K key/value heads.

Letters: X query blocks, Y key blocks.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from stepwiser_jax.errors import UserError
from stepwiser_jax.model.attention import SAVED, Attention
from stepwiser_jax.model.packing import group_of, is_prompt

LANES = 128
MAX_BLOCK = 512
"""Positions in a block of queries, and of keys; a multiple of `LANES`."""
MAX_LENGTH = (1 << 16) - 1
"""`start` and `t` share one int32."""
NOBODY = -1

SplashMask = tuple[splash.SplashAttentionKernel, splash.SegmentIds]


def splash_mask(segment_ids_BT: jax.Array, *, interpret: bool = False) -> SplashMask:
    """Returns `segment_mask` in the form of the kernels: a few numbers for each position and each
    pair of blocks, never a (T, T) array. Every leaf has the rows as its first axis.

    Args:
        segment_ids_BT: the positions of a segment must be adjacent.
        interpret: run the kernels without a TPU.

    Raises:
        UserError: if rows are longer than `MAX_LENGTH`.
    """
    T = segment_ids_BT.shape[1]
    num_blocks = math.ceil(T / MAX_BLOCK)
    block = LANES * math.ceil(T / (LANES * num_blocks))
    padding = num_blocks * block - T
    if T + padding > MAX_LENGTH:
        raise UserError(
            f"expected rows of at most {MAX_LENGTH} tokens, the most that attention on TPU takes, "
            f"found {T}: make the rows shorter"
        )
    segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, padding)))
    return jax.vmap(functools.partial(_row_mask, block=block, interpret=interpret))(segment_ids_BT)


def splash_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask: SplashMask
) -> jax.Array:
    """Returns attention under a `splash_mask`, (B, T, N, H); differentiable.

    Rows are padded to whole blocks, and run one after the other. Queries are scaled in their own
    dtype. A query on padding gets its own value.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    padding = ((0, 0), (0, 0), (0, mask[1].q.shape[1] - T), (0, 0))
    q_BTNH = q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype)
    q_BNTH, k_BKTH, v_BKTH = (jnp.pad(x.swapaxes(1, 2), padding) for x in (q_BTNH, k_BTKH, v_BTKH))

    def attend_row(
        mask: SplashMask, q_NTH: jax.Array, k_KTH: jax.Array, v_KTH: jax.Array
    ) -> jax.Array:
        kernel, ids = mask
        twice = (1, 2, 1)
        out_NTH = kernel(q_NTH, jnp.tile(k_KTH, twice), jnp.tile(v_KTH, twice), segment_ids=ids)
        assert isinstance(out_NTH, jax.Array)
        return out_NTH

    out_BNTH = jax.vmap(attend_row)(mask, q_BNTH, k_BKTH, v_BKTH)
    return out_BNTH[:, :, :T].swapaxes(1, 2)


SPLASH = Attention(splash_mask, splash_attention, is_kernel=True)

PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
"""Matrix products of each kernel for a pair of blocks that it visits: forward, the gradient of
queries, and that of keys and values. Each kernel computes the scores again."""


def blocks_visited(segment_ids_T: jax.Array) -> tuple[int, int]:
    """Returns how many pairs of blocks a kernel visits in this row for each query head, and the
    tokens of a block. The kernels state no cost; it follows from these."""
    kernel, ids = splash_mask(segment_ids_T[None])
    runs = kernel.fwd_mask_info.block_mask
    assert runs is not None
    return int(jnp.sum(runs)), ids.q.shape[1] // runs.shape[2]


def _row_mask(segment_ids_T: jax.Array, *, block: int, interpret: bool) -> SplashMask:
    T = segment_ids_T.shape[0]
    group_T, is_prompt_T = group_of(segment_ids_T), is_prompt(segment_ids_T)
    position_T = jnp.arange(T, dtype=jnp.int32)
    start_T = jnp.where(segment_ids_T == 0, position_T, _start_of_run(segment_ids_T))
    start_T = jnp.where(is_prompt_T, position_T + 1, start_T)
    prompt_end_T = jax.lax.cummax(jnp.where(is_prompt_T, position_T, -1))
    visited_XY = jnp.concatenate(
        [
            _visited(_start_of_run(group_T), prompt_end_T, block),
            _visited(start_T, position_T, block),
        ],
        axis=1,
    )
    # No query sees later keys, and a block of queries has at most two blocks of keys in both
    # halves: the one in which its first completion starts, and its own.
    num_blocks = T // block
    keys, queries = _in_order(visited_XY, num_blocks + 2), _in_order(visited_XY.T, num_blocks)
    numbers_T = start_T << 16 | position_T
    by_query = _mask_info(*keys, numbers_T)
    by_key = _mask_info(queries[0].T, queries[1].T, numbers_T)
    kernel = splash.SplashAttentionKernel(
        by_query,
        by_query,
        by_key,
        mask_function=functools.partial(_sees, length=T),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    key_ids = jnp.concatenate([jnp.where(is_prompt_T, group_T, NOBODY), group_T])
    return kernel, splash.SegmentIds(group_T, key_ids)


def _mask_info(blocks_XY: jax.Array, runs_XY: jax.Array, numbers_T: jax.Array) -> MaskInfo:
    """Returns the blocks to visit, the same for all heads."""
    return MaskInfo(
        data_next=blocks_XY[None],
        mask_next=None,
        block_mask=runs_XY[None],
        partial_mask_blocks=None,
        q_sequence=numbers_T,  # pyright: ignore[reportArgumentType] - it takes traced arrays
    )


def _sees(number: jax.Array, key: jax.Array, *, length: int) -> jax.Array:
    start, position, key_position = number >> 16 & 0xFFFF, number & 0xFFFF, key - length
    return (key < start) | ((start <= key_position) & (key_position <= position))


def _start_of_run(ids_T: jax.Array) -> jax.Array:
    """Returns, for each position, the first of the run of equal ids that it belongs to."""
    position_T = jnp.arange(ids_T.shape[0], dtype=jnp.int32)
    begins_T = jnp.concatenate([jnp.ones(1, bool), ids_T[1:] != ids_T[:-1]])
    return jax.lax.cummax(jnp.where(begins_T, position_T, 0))


def _visited(first_T: jax.Array, last_T: jax.Array, block: int) -> jax.Array:
    """Returns (X, Y) bool: whether any query of a block sees any key of another, if each query sees
    the keys from `first` to `last`."""
    num_blocks = first_T.shape[0] // block
    begin_1Y = jnp.arange(num_blocks, dtype=jnp.int32)[None] * block
    first_T1, last_T1 = first_T[:, None], last_T[:, None]
    visited_TY = (first_T1 <= last_T1) & (first_T1 < begin_1Y + block) & (begin_1Y <= last_T1)
    return jnp.any(visited_TY.reshape(num_blocks, block, num_blocks), axis=1)


def _in_order(visited_XY: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Returns, for each of X, the Y that are visited, in order, and 1 for each; then the last of
    them again, so that idle steps fetch nothing, and 0. Both are (X, width), int32."""
    width = min(width, visited_XY.shape[1])
    count_X1 = jnp.sum(visited_XY, axis=1, keepdims=True, dtype=jnp.int32)
    order_XY = jnp.argsort(~visited_XY, axis=1, stable=True).astype(jnp.int32)
    step_1Y = jnp.arange(width, dtype=jnp.int32)[None]
    step_XY = jnp.minimum(step_1Y, jnp.maximum(count_X1 - 1, 0))
    return jnp.take_along_axis(order_XY, step_XY, axis=1), (step_1Y < count_X1).astype(jnp.int32)

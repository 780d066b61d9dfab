"""Attention on TPU: the splash kernels that come with jax, shown what a segment sees.

Splash computes the scores of one block of queries and keys at a time and keeps none of them. It is
told which blocks to visit (`MaskInfo`). Inside a block, a query sees a key if both have the same id
(`SegmentIds`) and `mask_function(number of the query, index of the key)` holds. One id and one
number are too little for "my segment up to myself, and the prompt of my group": two intervals. So
keys and values are laid out twice, T of them as prompts, then T as one's own:

    key s        is seen where s < start, and s is of the prompt of the query's group (the ids)
    key T + s    is seen where start <= s <= t

t is the query's place in the row, `start` that of the first token of its segment; both make its
number. A query of a prompt has start = t + 1 and sees the first half only; padding has start = t
and sees itself only, since a softmax over nothing would be NaN. No pair is seen in both halves: the
second copy costs memory alone, 2 K / N of the queries' where K of N heads have keys.
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
from stepwiser_jax.model.packing import group_of, is_prefix

LANES = 128
MAX_BLOCK = 512
"""Positions in a block of queries, and of keys; a multiple of `LANES`."""
MAX_LENGTH = (1 << 16) - 1
"""`start` and `t` share one int32."""
NOBODY = -1

SplashMask = tuple[splash.SplashAttentionKernel, splash.SegmentIds]


def splash_mask(segment_ids_BT: jax.Array, *, interpret: bool = False) -> SplashMask:
    """What `segment_mask` says, for the kernels: a few numbers for each position and each pair of
    blocks, never a (T, T) array. Every leaf has the rows as its first axis.

    The positions of a segment must be adjacent. `interpret` runs the kernels without a TPU. Raises
    UserError where rows are longer than `MAX_LENGTH`.
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
    return jax.vmap(functools.partial(_mask_of_row, block=block, interpret=interpret))(
        segment_ids_BT
    )


def splash_attention(
    q_BTNH: jax.Array, k_BKHT: jax.Array, v_BKTH: jax.Array, mask: SplashMask
) -> jax.Array:
    """As `attention.attention`, (B, T, N, H), under a `splash_mask`; differentiable.

    Rows are padded to whole blocks, and run one after the other. Queries are scaled in their own
    dtype. A query on padding gets its own value.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    padding = ((0, 0), (0, 0), (0, mask[1].q.shape[1] - T), (0, 0))
    q_BNTH = jnp.pad(q_BTNH.swapaxes(1, 2) * jnp.asarray(H**-0.5, q_BTNH.dtype), padding)
    k_BKTH = jnp.pad(k_BKHT.swapaxes(2, 3), padding)
    v_BKTH = jnp.pad(v_BKTH, padding)

    def of_row(mask: SplashMask, q_NTH: jax.Array, k_KTH: jax.Array, v_KTH: jax.Array) -> jax.Array:
        kernel, ids = mask
        twice = (1, 2, 1)
        out_NTH = kernel(q_NTH, jnp.tile(k_KTH, twice), jnp.tile(v_KTH, twice), segment_ids=ids)
        assert isinstance(out_NTH, jax.Array)
        return out_NTH

    out_BNTH = jax.vmap(of_row)(mask, q_BNTH, k_BKTH, v_BKTH)
    return out_BNTH[:, :, :T].swapaxes(1, 2)


SPLASH = Attention(splash_mask, splash_attention)

PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
"""Of each kernel, for a pair of blocks that it visits: the scores and what they weigh; forward, and
the gradients of queries, and of keys and values, for which scores are computed again."""


def blocks_visited(segment_ids_T: jax.Array) -> tuple[int, int]:
    """(pairs of blocks that a kernel visits in this row, for each query head; tokens in a block).
    The kernels state no cost; this is what they need for one."""
    kernel, ids = splash_mask(segment_ids_T[None])
    runs = kernel.fwd_mask_info.block_mask
    assert runs is not None
    return int(jnp.sum(runs)), ids.q.shape[1] // runs.shape[2]


def _mask_of_row(segment_ids_T: jax.Array, *, block: int, interpret: bool) -> SplashMask:
    T = segment_ids_T.shape[0]
    group_T, is_prompt_T = group_of(segment_ids_T), is_prefix(segment_ids_T)
    place_T = jnp.arange(T, dtype=jnp.int32)
    start_T = jnp.where(segment_ids_T == 0, place_T, _start_of_run(segment_ids_T))
    start_T = jnp.where(is_prompt_T, place_T + 1, start_T)
    last_of_prompt_T = jax.lax.cummax(jnp.where(is_prompt_T, place_T, -1))
    visited_QS = jnp.concatenate(
        [
            _visited(_start_of_run(group_T), last_of_prompt_T, block),
            _visited(start_T, place_T, block),
        ],
        axis=1,
    )
    # No query is later than its keys, and a block of queries has two blocks of keys at most in both
    # halves: where its first completion starts, and its own.
    num_blocks = T // block
    keys, queries = _in_order(visited_QS, num_blocks + 2), _in_order(visited_QS.T, num_blocks)
    numbers_T = start_T << 16 | place_T
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
    ids_of_keys = jnp.concatenate([jnp.where(is_prompt_T, group_T, NOBODY), group_T])
    return kernel, splash.SegmentIds(group_T, ids_of_keys)


def _mask_info(blocks_QS: jax.Array, runs_QS: jax.Array, numbers_T: jax.Array) -> MaskInfo:
    """The same for all heads. (Splash annotates numpy arrays, and takes traced ones.)"""
    return MaskInfo(
        data_next=blocks_QS[None],
        mask_next=None,
        block_mask=runs_QS[None],
        partial_mask_blocks=None,
        q_sequence=numbers_T,  # pyright: ignore[reportArgumentType]
    )


def _sees(number: jax.Array, key: jax.Array, *, length: int) -> jax.Array:
    start, place, own = number >> 16 & 0xFFFF, number & 0xFFFF, key - length
    return (key < start) | ((start <= own) & (own <= place))


def _start_of_run(ids_T: jax.Array) -> jax.Array:
    """For each position, the first of the run of equal ids that it stands in."""
    place_T = jnp.arange(ids_T.shape[0], dtype=jnp.int32)
    begins_T = jnp.concatenate([jnp.ones(1, bool), ids_T[1:] != ids_T[:-1]])
    return jax.lax.cummax(jnp.where(begins_T, place_T, 0))


def _visited(first_T: jax.Array, last_T: jax.Array, block: int) -> jax.Array:
    """(blocks of queries, blocks of keys): does any of the queries see any of the keys, if it sees
    those from `first` to `last`?"""
    num_blocks = first_T.shape[0] // block
    begin_1S = jnp.arange(num_blocks, dtype=jnp.int32)[None] * block
    first_T1, last_T1 = first_T[:, None], last_T[:, None]
    visited_TS = (first_T1 <= last_T1) & (first_T1 < begin_1S + block) & (begin_1S <= last_T1)
    return jnp.any(visited_TS.reshape(num_blocks, block, num_blocks), axis=1)


def _in_order(visited_XY: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """For each of X the Y that are visited, in order, and 1 for each of them; then 0, and the last
    of them again, so that nothing is fetched for an idle step. Both (X, width), int32."""
    width = min(width, visited_XY.shape[1])
    count_X1 = jnp.sum(visited_XY, axis=1, keepdims=True, dtype=jnp.int32)
    order_XY = jnp.argsort(~visited_XY, axis=1, stable=True).astype(jnp.int32)
    step_1Y = jnp.arange(width, dtype=jnp.int32)[None]
    step_XY = jnp.minimum(step_1Y, jnp.maximum(count_X1 - 1, 0))
    return jnp.take_along_axis(order_XY, step_XY, axis=1), (step_1Y < count_X1).astype(jnp.int32)

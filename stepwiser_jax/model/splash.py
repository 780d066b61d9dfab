"""Attention on TPU: the splash kernels that come with jax, shown what a segment sees.

Splash computes the scores of one block of queries and keys at a time and keeps none of them. It is
told which blocks to visit (`MaskInfo`); inside a block, a query sees a key if both have the same id
(`SegmentIds`) and `mask_function(a number of the query, the key's index)` holds. One id and one
number do not say "my own segment, and the prompt of my group": that is two intervals of keys. So
keys and values stand twice, 2 T of them, the first half seen as prompts, the second as one's own:

    id              the group; in the first half it is that of a prompt's keys only
    first half      key s is seen if s < start
    second half     key T + s is seen if start <= s <= t

where t is the query's place in the row and `start` the first token of its segment. A query of a
prompt starts behind itself (t + 1): it sees the first half only. Padding starts at itself, and sees
itself only: a softmax over nothing would be NaN. Half a block is never computed in both halves: what
the second copy costs is its memory, 2 K / N of the queries' (K of N heads have keys).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from stepwiser_jax.model.attention import Attention, group_of, is_prompt
from stepwiser_jax.records import UserError

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
        return kernel(
            q_NTH, jnp.tile(k_KTH, (1, 2, 1)), jnp.tile(v_KTH, (1, 2, 1)), segment_ids=ids
        )

    out_BNTH = jax.vmap(of_row)(mask, q_BNTH, k_BKTH, v_BKTH)
    return out_BNTH[:, :, :T].swapaxes(1, 2)


SPLASH = Attention(splash_mask, splash_attention)


def _mask_of_row(segment_ids_T: jax.Array, *, block: int, interpret: bool) -> SplashMask:
    T = segment_ids_T.shape[0]
    group_T, is_prompt_T = group_of(segment_ids_T), is_prompt(segment_ids_T)
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
    # A block of queries visits a block of keys in both halves only where it starts, or ends.
    num_blocks = T // block
    keys, queries = _in_order(visited_QS, num_blocks + 2), _in_order(visited_QS.T, num_blocks)
    numbers_T = start_T << 16 | place_T
    by_query = MaskInfo(keys[0][None], None, keys[1][None], None, numbers_T)
    by_key = MaskInfo(queries[0].T[None], None, queries[1].T[None], None, numbers_T)
    kernel = splash.SplashAttentionKernel(
        by_query,
        by_query,
        by_key,
        mask_function=functools.partial(_sees, length=T),
        block_sizes=splash.BlockSizes(*[block] * 8),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        interpret=interpret,
    )
    ids_of_keys = jnp.concatenate([jnp.where(is_prompt_T, group_T, NOBODY), group_T])
    return kernel, splash.SegmentIds(group_T, ids_of_keys)


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

"""Masked cross-entropy: the loss of supervised fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from stepwiser_jax.rl.logprobs import token_logprobs
from stepwiser_jax.training.batches import TokenBatch

if TYPE_CHECKING:
    from stepwiser_jax.model.transformer import Transformer


def num_target_tokens(batch: TokenBatch) -> jax.Array:
    """Returns the number of learned tokens, at least 1: the normalizer of the loss."""
    return jnp.maximum(jnp.sum(batch.target_mask_BT, dtype=jnp.float32), 1.0)


def cross_entropy_loss(
    model: Transformer, batch: TokenBatch, normalizer: jax.Array, *, remat: bool = False
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the negative sum of the learned tokens' log-probs, over `normalizer`, in nats.

    The first token of a document has no log-prob and must not be in the mask.
    """
    logprobs_BT = token_logprobs(
        model,
        batch.tokens_BT,
        batch.positions_BT,
        batch.segment_ids_BT,
        target_mask_BT=batch.target_mask_BT,
        remat=remat,
    )
    return -jnp.sum(jnp.where(batch.target_mask_BT, logprobs_BT, 0.0)) / normalizer, {}

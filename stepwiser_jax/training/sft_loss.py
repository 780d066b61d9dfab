"""Masked cross-entropy: the loss of supervised fine-tuning."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stepwiser_jax.rl.logprobs import LanguageModel, token_logprobs


def supervised_tokens(loss_mask_BT: jax.Array) -> jax.Array:
    """Number of learned tokens of a batch, at least 1: the denominator of its loss."""
    return jnp.maximum(jnp.sum(loss_mask_BT, dtype=jnp.float32), 1.0)


def cross_entropy_loss(
    model: LanguageModel,
    tokens_BT: jax.Array,
    loss_mask_BT: jax.Array,
    *,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    denominator: jax.Array,
    remat: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Minus the log-probs of the learned tokens, summed, over `denominator`; in nats per token.

    A document's first token is predicted by nothing and must not be in the mask.
    """
    logprobs_BT = token_logprobs(
        model, tokens_BT, positions_BT, segment_ids_BT, wanted_BT=loss_mask_BT, remat=remat
    )
    loss = -jnp.sum(jnp.where(loss_mask_BT, logprobs_BT, 0.0)) / denominator
    return loss, {}

"""The loss of a discriminative process reward model that answers every chunk with + or -.

Cross-entropy of the softmax over these two tokens, which is also what scores a chunk. RLHFlow's
models are fine-tuned on the answer among the whole vocabulary: that differs by -log(P(+) + P(-)),
which is near 0 after some steps, and has no meaning for a soft label.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stepwiser_jax.rl.logprobs import LanguageModel, token_log_odds
from stepwiser_jax.training.batches import TokenBatch


def classifier_loss(
    model: LanguageModel,
    batch: TokenBatch,
    normalizer: jax.Array,
    *,
    signs: tuple[int, int],
    remat: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the cross-entropy of P(+) against the targets of the answers, in nats, summed over
    `normalizer`, and `accuracy`: the share of answers whose P(+) and target are on the same side of
    1/2. `signs` are the ids of + and -."""
    log_odds_BT = token_log_odds(
        model, batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT, signs, remat=remat
    )
    right_BT = (log_odds_BT > 0) == (batch.targets_BT > 0.5)
    loss_BT = -batch.targets_BT * jax.nn.log_sigmoid(log_odds_BT)
    loss_BT -= (1 - batch.targets_BT) * jax.nn.log_sigmoid(-log_odds_BT)

    def mean(values_BT: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(batch.target_mask_BT, values_BT, 0)) / normalizer

    return mean(loss_BT), {"accuracy": mean(right_BT.astype(jnp.float32))}

"""The loss of a discriminative process reward model that answers every chunk with + or -.

Cross-entropy of the softmax over these two tokens, which is also what scores a chunk. RLHFlow's
models are fine-tuned on the answer among the whole vocabulary: that differs by -log(P(+) + P(-)),
which is near 0 after some steps, and has no meaning for a soft label.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stepwiser_jax.rl.logprobs import LanguageModel, token_log_odds


def classifier_loss(
    model: LanguageModel,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    answer_mask_BT: jax.Array,
    targets_BT: jax.Array,
    *,
    signs: tuple[int, int],
    denominator: jax.Array,
    remat: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of P(+) against `targets_BT`, 1 or 0 or a value between, in nats, summed over
    the answers and divided by `denominator`. `signs`: the ids of + and -.

    `accuracy`: of the answers, the share on whose target's side of 1/2 P(+) is.
    """
    log_odds_BT = token_log_odds(model, tokens_BT, positions_BT, segment_ids_BT, signs, remat=remat)
    right_BT = (log_odds_BT > 0) == (targets_BT > 0.5)
    loss_BT = -targets_BT * jax.nn.log_sigmoid(log_odds_BT)
    loss_BT -= (1 - targets_BT) * jax.nn.log_sigmoid(-log_odds_BT)

    def mean(values_BT: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(answer_mask_BT, values_BT, 0)) / denominator

    return mean(loss_BT), {"accuracy": mean(right_BT.astype(jnp.float32))}

"""Whether rows were drawn as they should: the check of every test that samples the same rows twice.

Noise is a row's own, so two samplings of it can part only by rounding: where the uniform of a draw
lies within rounding of a boundary of the cumulative distribution. That is checked, and not how many
rows part: one row that something else has changed is a failure.
"""

import zlib

import jax
import numpy as np

from stepwiser_jax.inference.params import StopReason
from stepwiser_jax.inference.token_sampler import truncate

ROUNDING = 1e-4
"""Of probabilities, logits and log-probs of tiny models in float32."""


def assert_drawn(model, prompts_B, row_ids, params, key, output):
    """Every token of `output` is the one that its row's noise picks from what `model`, which reads
    the whole row at once, says of it; its log-prob is the model's, and the row ends where it
    should (stop strings aside)."""
    length_B = output.length_B
    start_B = np.array([len(prompt) for prompt in prompts_B])
    tokens_BT = np.zeros((len(row_ids), np.max(start_B + length_B)), np.int32)
    for b, prompt in enumerate(prompts_B):
        ids = [*prompt, *output.ids(b)]
        tokens_BT[b, : len(ids)] = ids
    logits_BTV = np.asarray(jax.jit(type(model).__call__)(model, tokens_BT))
    # From here on a row n for each token sampled.
    b_N, t_N = np.nonzero(np.arange(output.tokens_BC.shape[1])[None] < length_B[:, None])
    place_N, token_N = start_B[b_N] + t_N, output.tokens_BC[b_N, t_N]
    off_N, logprob_N = distance(
        logits_BTV[b_N, place_N - 1], token_N, params, uniforms(key, row_ids, b_N, place_N)
    )
    worst = np.argmax(off_N)
    row, place = row_ids[b_N[worst]], t_N[worst]
    assert off_N[worst] < ROUNDING, f"{row}: token {place} is another by {off_N[worst]:.2g}"
    np.testing.assert_allclose(output.logprobs_BC[b_N, t_N], logprob_N, atol=ROUNDING)
    assert_ended(params, output)


def uniforms(key, row_ids, b_N, place_N):
    """The noise of each draw, by the definition."""
    hash_B = np.array([zlib.crc32(row_id.encode()) for row_id in row_ids], np.uint32)

    def of_draw(row_hash, place):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row_hash), place))

    return np.asarray(jax.jit(jax.vmap(of_draw))(hash_B[b_N], place_N), np.float64)


def distance(logits_NV, token_N, params, uniform_N):
    """(How far the uniform is from the token's part of the cumulative distribution, 0 inside of it;
    the token's log-prob). Greedy: how far its logit is from the largest."""
    n_N = np.arange(len(token_N))
    if params.temperature == 0:
        behind_N = np.max(logits_NV, axis=-1) - logits_NV[n_N, token_N]
        return behind_N, np.zeros(len(token_N))
    top_p = params.top_p if params.top_p < 1 else None
    scaled_NV = np.asarray(truncate(logits_NV / params.temperature, params.top_k, top_p))
    probs_NV = np.exp(scaled_NV.astype(np.float64))
    prob_N = probs_NV[n_N, token_N]
    end_N = np.cumsum(probs_NV, axis=-1)[n_N, token_N]
    off_N = np.maximum(end_N - prob_N - uniform_N, uniform_N - end_N)
    with np.errstate(divide="ignore"):
        return np.maximum(off_N, 0), np.log(prob_N)


def assert_ended(params, output):
    """Each row at its first stop id, or at the limit."""
    if params.stop_strings:
        return
    for b, length in enumerate(output.length_B):
        stops = [token in params.stop_ids for token in output.ids(b)]
        assert not any(stops[:-1]), f"row {b} goes on after a stop id"
        reason = StopReason.STOP_ID if stops[-1] else StopReason.LENGTH
        assert output.stop_reason_B[b] == reason
        assert stops[-1] or length == params.max_new_tokens, f"row {b} ends without a reason"

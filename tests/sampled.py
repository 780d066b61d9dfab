"""Checks that rows were sampled as they should be, for all tests that sample the same rows twice.

Noise depends on a row's id, so two samplings of a row can part only by rounding: if the uniform of
a token lies within rounding of a boundary of the cumulative distribution. This is what is checked
here, and not how many rows part: one row that something else has changed is a failure.
"""

import zlib

import jax
import numpy as np

from stepwiser_jax.inference.chunk_sampler import ChunkSampler
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import StopReason
from stepwiser_jax.inference.token_sampler import truncate

ROUNDING = 1e-4
"""Of probabilities, logits and log-probs of tiny models in float32."""


class Reference(ChunkSampler):
    """The chunk sampler, made and called as an `Engine` is. Its batches wait for their last row
    to end."""

    def __init__(self, model, tokenizer=None, **settings):
        super().__init__(Engine(model, tokenizer, **settings))

    def generate(self, prompts_P, params, *, key, row_ids, group_size=1):
        prompts_B = [prompt for prompt in prompts_P for _ in range(group_size)]
        completions = []
        for start in range(0, len(row_ids), self.shapes.max_rows):
            batch = slice(start, start + self.shapes.max_rows)
            distinct = [list(ids) for ids in dict.fromkeys(map(tuple, prompts_B[batch]))]
            state = self.prefill(distinct, max(map(len, distinct)) + params.max_new_tokens)
            state = self.branch(state, [distinct.index(list(ids)) for ids in prompts_B[batch]])
            found, _ = self.decode(state, params, key=key, row_ids=row_ids[batch])
            completions += found
        return completions


def assert_sampled(model, prompts_B, row_ids, params, key, completions):
    """Asserts that every token is the one that its row's noise picks from what `model`, which reads
    the whole row at once, says of it; that its log-prob is the model's, and so are the log-odds of
    compared tokens; and that the row ends where it should (stop strings aside)."""
    assert [completion.row_id for completion in completions] == list(row_ids)
    length_B = np.array([len(completion.tokens) for completion in completions])
    start_B = np.array([len(prompt) for prompt in prompts_B])
    tokens_BT = np.zeros((len(row_ids), np.max(start_B + length_B)), np.int32)
    for b, prompt in enumerate(prompts_B):
        ids = [*prompt, *completions[b].tokens]
        tokens_BT[b, : len(ids)] = ids
    logits_BTV = np.asarray(jax.jit(type(model).__call__)(model, tokens_BT))
    # From here on there is a row n for each sampled token.
    b_N = np.repeat(np.arange(len(row_ids)), length_B)
    t_N = np.concatenate([np.arange(length) for length in length_B])
    token_N = np.concatenate([completion.tokens for completion in completions])
    position_N = start_B[b_N] + t_N
    off_N, logprob_N = distance(
        logits_BTV[b_N, position_N - 1], token_N, params, uniforms(key, row_ids, b_N, position_N)
    )
    worst = np.argmax(off_N)
    row, t = row_ids[b_N[worst]], t_N[worst]
    assert off_N[worst] < ROUNDING, f"{row}: token {t} is another by {off_N[worst]:.2g}"
    found_N = np.concatenate([completion.logprobs for completion in completions])
    np.testing.assert_allclose(found_N, logprob_N, atol=ROUNDING)
    if params.compared is not None:
        a_N, b_of_N = (logits_BTV[b_N, position_N - 1, token] for token in params.compared)
        log_odds_N = np.concatenate([completion.log_odds for completion in completions])
        np.testing.assert_allclose(log_odds_N, a_N - b_of_N, atol=ROUNDING)
    assert_ended(params, completions)


def uniforms(key, row_ids, b_N, position_N):
    """Returns the noise of each token, by its definition."""
    hash_B = np.array([zlib.crc32(row_id.encode()) for row_id in row_ids], np.uint32)

    def of_token(row_hash, position):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row_hash), position))

    return np.asarray(jax.jit(jax.vmap(of_token))(hash_B[b_N], position_N), np.float64)


def distance(logits_NV, token_N, params, uniform_N):
    """Returns how far the uniform is from the token's part of the cumulative distribution (0 inside
    of it), and the token's log-prob. If greedy: how far its logit is from the largest."""
    n_N = np.arange(len(token_N))
    if params.temperature == 0:
        gap_N = np.max(logits_NV, axis=-1) - logits_NV[n_N, token_N]
        return gap_N, np.zeros(len(token_N))
    top_p = params.top_p if params.top_p < 1 else None
    scaled_NV = np.asarray(truncate(logits_NV / params.temperature, params.top_k, top_p))
    probs_NV = np.exp(scaled_NV.astype(np.float64))
    prob_N = probs_NV[n_N, token_N]
    end_N = np.cumsum(probs_NV, axis=-1)[n_N, token_N]
    off_N = np.maximum(end_N - prob_N - uniform_N, uniform_N - end_N)
    with np.errstate(divide="ignore"):
        return np.maximum(off_N, 0), np.log(prob_N)


def assert_ended(params, completions):
    """Asserts that each row ends at its first stop id, or at the limit."""
    if params.stop_strings:
        return
    for completion in completions:
        stops = [token in params.stop_ids for token in completion.tokens]
        assert not any(stops[:-1]), f"{completion.row_id} goes on after a stop id"
        reason = StopReason.STOP_ID if stops[-1] else StopReason.LENGTH
        assert completion.stop_reason is reason
        assert stops[-1] or len(stops) == params.max_new_tokens, f"{completion.row_id} ends early"


def tokens_of(completions):
    """Returns what the rows sampled, as lists."""
    return [completion.tokens.tolist() for completion in completions]


def arrays_of(completions):
    """Returns tokens and log-probs (B, C) of completions of equal length."""
    return tuple(
        np.stack([getattr(completion, name) for completion in completions])
        for name in ("tokens", "logprobs")
    )

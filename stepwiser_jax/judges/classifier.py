"""A classifier as a judge: P(+) of every chunk from one pass over the whole solution.

    (question, chunks) -> conversation in which each chunk is answered by + or -
                       -> several solutions packed into a row
                       -> log-odds of + against - at each answer -> P(+)

Attention is causal, so the score of a chunk does not depend on the chunks after it.

Training minimises the cross-entropy of the softmax over these two tokens, which is also the score.
RLHFlow's models are fine-tuned on the answer among the whole vocabulary. That loss differs by
-log(P(+) + P(-)), which is near 0 after some steps, and has no meaning for a soft label.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepwiser_jax.config import ClassifierJudge
from stepwiser_jax.distributed.loading import Loaded
from stepwiser_jax.distributed.mesh import fetch, shard_batch
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.verdicts import verdict_at
from stepwiser_jax.inference.params import probabilities
from stepwiser_jax.judges.base import ChunkJudgment, Solution, SolutionJudgment, spent_on
from stepwiser_jax.judges.writer import measured
from stepwiser_jax.model.flops import NOTHING, Spent
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.records import Verdict
from stepwiser_jax.rl.logprobs import token_log_odds
from stepwiser_jax.runs import compilation
from stepwiser_jax.runs.progress import rows_done
from stepwiser_jax.text.chunks import strip_tags
from stepwiser_jax.text.dialogues import before_answers
from stepwiser_jax.text.prompts import (
    PromptStyle,
    bare_judge_prompt,
    encode_message,
)
from stepwiser_jax.text.tokenizer import Tokenizer
from stepwiser_jax.training.batches import Document, TokenBatch, first_fit, pack_documents

# --- the prompt ---------------------------------------------------------------------------------


def sign_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Returns the tokens of the answers, + and -. Raises UserError unless each is one token."""
    found = {sign: tokenizer.encode(sign) for sign in ("+", "-")}
    for sign, ids in found.items():
        if len(ids) != 1 or tokenizer.decode(ids).strip() != sign:
            raise UserError(
                f"a classifier answers with one token, + or -: expected a vocabulary that has "
                f"both, found {sign!r} encoded as {ids}, which reads {tokenizer.decode(ids)!r}. "
                "Use another model"
            )
    return found["+"][0], found["-"][0]


def encode_solution(
    tokenizer: Tokenizer,
    question: str,
    chunks: Sequence[str],
    style: PromptStyle,
    is_positive: Sequence[bool] | None = None,
) -> tuple[list[int], list[int]]:
    """Encodes a whole solution in RLHFlow's form.

    Each chunk is a user message, the first one after the problem, and one token answers it. In the
    bare style each chunk keeps its tags, and <judge> and the answer follow it.

    Args:
        tokenizer: The classifier's.
        question: The problem.
        chunks: The solution.
        style: `instruct` or `bare`.
        is_positive: Whether each answer is +, not -; by default all are.

    Returns:
        The ids, which end with the last answer, and the index of each answer in them.

    Raises:
        UserError: The chat template does not keep the beginning of a conversation.
    """
    signs = [True] * len(chunks) if is_positive is None else is_positive
    plus, minus = sign_ids(tokenizer)
    if style == "instruct":
        texts = [strip_tags(chunk).strip() for chunk in chunks]
        first, later = (tokenizer.prompts[x] for x in ("classifier_first_step", "classifier_step"))
        texts[:1] = [first.format(question=question, step=text) for text in texts[:1]]
        texts[1:] = [later.format(step=text) for text in texts[1:]]
        before = before_answers(tokenizer, [[{"role": "user", "content": x}] for x in texts])
    else:
        texts = [bare_judge_prompt("" if j else question, "", x) for j, x in enumerate(chunks)]
        before = [encode_message(tokenizer, text, style) for text in texts[:1]]
        before += [tokenizer.encode(text) for text in texts[1:]]
    ids: list[int] = []
    answers = []
    for prompt, sign in zip(before, signs, strict=True):
        answers.append(len(ids) + len(prompt))
        ids += [*prompt, plus if sign else minus]
    return ids, answers


# --- the loss -----------------------------------------------------------------------------------


def classifier_loss(
    model: Transformer,
    batch: TokenBatch,
    normalizer: jax.Array,
    *,
    signs: tuple[int, int],
    remat: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the cross-entropy of P(+) against the targets, in nats, and `accuracy`: the fraction
    of answers for which P(+) and the target are on the same side of 1/2.

    Args:
        model: The classifier.
        batch: Packed solutions; targets at answers, from 0 to 1.
        normalizer: Divides both sums over answers.
        signs: The ids of + and -.
        remat: Whether the backward pass computes activations again.
    """
    log_odds_BT = token_log_odds(
        model, batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT, signs, remat=remat
    )
    right_BT = (log_odds_BT > 0) == (batch.targets_BT > 0.5)
    loss_BT = -batch.targets_BT * jax.nn.log_sigmoid(log_odds_BT)
    loss_BT -= (1 - batch.targets_BT) * jax.nn.log_sigmoid(-log_odds_BT)

    def mean(values_BT: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(batch.target_mask_BT, values_BT, 0)) / normalizer

    return mean(loss_BT), {"accuracy": mean(right_BT.astype(jnp.float32))}


# --- the judge ----------------------------------------------------------------------------------


class Classifier:
    """A judge of all chunks of a solution in one pass, in batches of `rows` rows of `max_length`
    tokens. The verdict is Negative if P(+) is below the threshold."""

    def __init__(self, loaded: Loaded, mesh: jax.sharding.Mesh, config: ClassifierJudge):
        self.judge_id, self.tokenizer, self.model = loaded.model_id, loaded.tokenizer, loaded.model
        self.mesh, self.rows, self.max_length = mesh, config.rows, config.max_length
        self.prompt_style: PromptStyle = config.prompt_style
        self.threshold = 0.5 if config.threshold is None else config.threshold
        self.signs = sign_ids(loaded.tokenizer)
        self.compiled_shapes: Counter[str] = Counter()
        self.spent = NOTHING

    def measured(self, made: int) -> dict[str, Any]:
        """Returns tokens and FLOPs per judgment."""
        return measured(self.spent, made)

    def check_room(self, problem_id: str, question: str, num_tokens: int) -> None:
        """Raises UserError if a row does not hold a solution of a single chunk.

        What the prompt puts around further chunks is not counted, since their number is unknown. If
        a solution turns out too long, the run can be resumed with a larger `max_length`."""
        ids, _ = self._encode(Solution(problem_id, question, [""]))
        if len(ids) + num_tokens > self.max_length:
            raise UserError(
                f"the classifier of {problem_id}, with a solution of {num_tokens} tokens: "
                f"max_length must be at least {len(ids) + num_tokens}, found {self.max_length}"
            )

    def check_lengths(self, solutions: Sequence[Solution]) -> None:
        """Raises UserError for a solution that is longer than a row."""
        for solution in solutions:
            self._encode(solution)

    def _encode(self, solution: Solution) -> tuple[list[int], list[int]]:
        ids, answers = encode_solution(
            self.tokenizer, solution.question, solution.chunks, self.prompt_style
        )
        if len(ids) > self.max_length:
            raise UserError(
                f"{solution.solution_id} has {len(ids)} tokens: max_length must be at least that, "
                f"found {self.max_length}"
            )
        return ids, answers

    def __call__(self, solutions: Sequence[Solution]) -> list[list[ChunkJudgment]]:
        """Returns P(+) of every chunk, with its verdict; the text is the likelier sign."""
        encoded = [self._encode(solution) for solution in solutions]
        documents = [Document(np.array(ids), np.array(False)) for ids, _ in encoded]
        lengths = [len(ids) for ids, _ in encoded]
        blocks = first_fit(range(len(encoded)), lengths.__getitem__, self.max_length, len(encoded))
        packed = next(blocks, [])
        found: list[list[ChunkJudgment]] = [[] for _ in solutions]
        for start in range(0, len(packed), self.rows):
            rows = packed[start : start + self.rows]
            batch = pack_documents(
                [[documents[i] for i in row] for row in rows], self.rows, self.max_length
            )
            for log_odds_T, row in zip(self._log_odds(batch), rows, strict=False):
                offset = 0
                for i in row:
                    answers = np.array(encoded[i][1][solutions[i].start :], int)
                    p_positive = probabilities(log_odds_T[offset + answers])
                    reads = np.diff(answers, prepend=0)
                    found[i] = list(map(self._judgment, p_positive, answers - reads, reads))
                    self.spent += spent_on(found[i])
                    offset += lengths[i]
            rows_done(min(start + self.rows, len(packed)), len(packed), 0)
        return found

    def sample(
        self, solutions: Sequence[Solution], suffixes: Sequence[str], **sampling: Any
    ) -> list[list[SolutionJudgment]]:
        """Returns the same judgments for each suffix: nothing is drawn."""
        return [[SolutionJudgment(chunks) for _ in suffixes] for chunks in self(solutions)]

    def _judgment(self, p_positive: float, before: int, read: int) -> ChunkJudgment:
        """Returns the judgment of a chunk for which `read` more tokens are read."""
        verdict = verdict_at(self.threshold, p_positive)
        sign = "+" if verdict is Verdict.POSITIVE else "-"
        spent = Spent.on(self.model.config, before=int(before), read=int(read), generated=1)
        return ChunkJudgment(sign, verdict, p_positive, *astuple(spent))

    def _log_odds(self, batch: TokenBatch) -> np.ndarray:
        shape = f"score {self.rows}x{self.max_length}"
        self.compiled_shapes[shape] += 1
        with jax.set_mesh(self.mesh), compilation.compiling(shape):
            batch = shard_batch(batch, self.mesh)
            return fetch(classifier_logits(self.model, batch, signs=self.signs))


@functools.partial(jax.jit, static_argnames="signs")
def classifier_logits(
    model: Transformer, batch: TokenBatch, *, signs: tuple[int, int]
) -> jax.Array:
    """Returns the log-odds (B, T) of + against - in place of each token, see `token_log_odds`."""
    return token_log_odds(model, batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT, signs)

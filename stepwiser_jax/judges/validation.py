"""Measures a judge in training on held-out chunks: see the metrics in docs/stages.md."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.auc import auc
from stepwiser_jax.judges.base import ChunkJudgment
from stepwiser_jax.judges.stepwiser import read_judgment
from stepwiser_jax.records import JudgeExample, Verdict
from stepwiser_jax.rl.rewards import verdict_metrics
from stepwiser_jax.rl.rollouts import RolloutSampler
from stepwiser_jax.text.tokenizer import completion_text
from stepwiser_jax.text.verdict_tokens import VerdictTokens

CRITERION = "auc"
"""The metric that says which judge is the best. It is the usual one for a classifier of two classes
whose threshold is chosen later, and a judge cannot raise it by saying Positive more often."""

LATE = 10
"""From this position on, chunks are counted together: few solutions have so many."""


def measure_judge(
    sampler: RolloutSampler,
    verdict_tokens: VerdictTokens,
    held_out: Sequence[JudgeExample],
    policy: Any,
) -> dict[str, float]:
    """Returns metrics of one greedy judgment of each held-out chunk, sampled like rollouts. Raises
    Interrupted if the run is to stop."""
    with sampler.weights(policy):
        completions = sampler.greedy(held_out, verdict_tokens.pair)
    texts = [completion_text(sampler.tokenizer, done.tokens.tolist()) for done in completions]
    judgments = [
        read_judgment(verdict_tokens, *written)[0]
        for written in zip(texts, completions, strict=True)
    ]
    labels = [example.is_positive for example in held_out]
    positions = [example.position for example in held_out]
    return {
        **judgment_metrics(labels, judgments, positions),
        **verdict_metrics(texts, bare=False),
        "response_tokens": sum(len(done.tokens) for done in completions) / len(completions),
    }


def judgment_metrics(
    labels: Sequence[bool],
    judgments: Sequence[ChunkJudgment],
    positions: Sequence[int | None],
) -> dict[str, float]:
    """Returns how well judgments agree with labels.

    A judgment without a verdict agrees with no label. Metrics of a class, or of a position, that no
    chunk has are left out.

    Args:
        labels: Whether each chunk is right.
        judgments: What the judge says of it.
        positions: The number of chunks before it, None if that is not known.
    """
    label_J = np.array(labels, bool)
    wanted = (Verdict.POSITIVE if label else Verdict.NEGATIVE for label in labels)
    right_J = np.array([x.verdict is w for x, w in zip(judgments, wanted, strict=True)])
    metrics = {"accuracy": float(right_J.mean())}
    for name, of_class_J in (("positive", label_J), ("negative", ~label_J)):
        if of_class_J.any():
            metrics[f"accuracy_{name}"] = float(right_J[of_class_J].mean())
    if label_J.any() and not label_J.all():
        both = metrics["accuracy_positive"], metrics["accuracy_negative"]
        metrics["balanced_accuracy"] = sum(both) / 2
        metrics["auc"] = float(auc([judgment.p_positive for judgment in judgments], label_J))
    of_position: dict[int, list[bool]] = defaultdict(list)
    for position, right in zip(positions, right_J.tolist(), strict=True):
        if position is not None:
            of_position[min(position, LATE)].append(right)
    for position, right in sorted(of_position.items()):
        place = f"from_{LATE}" if position == LATE else f"at_{position}"
        metrics[f"accuracy_{place}"] = sum(right) / len(right)
    return metrics


def log_loss(targets: Sequence[float], p_positive: Sequence[float]) -> float:
    """Returns the mean cross-entropy of P(+) against targets from 0 to 1, in nats. A probability is
    taken to be at least 1e-15 from 0 and 1, as float64 rounds it."""
    p_J, target_J = np.clip(p_positive, 1e-15, 1 - 1e-15), np.array(targets)
    terms_J = target_J * np.log(p_J) + (1 - target_J) * np.log1p(-p_J)
    return -math.fsum(terms_J) / len(terms_J)


def check_classes(labels: Sequence[bool], source: str) -> None:
    """Raises UserError unless there are positive and negative labels, without which no judge is the
    best."""
    if len(set(labels)) < 2:
        raise UserError(
            f"validation.export is best: expected chunks of both classes in {source}, found "
            f"{sum(labels)} Positive and {len(labels) - sum(labels)} Negative: name other examples "
            "or set export to last"
        )

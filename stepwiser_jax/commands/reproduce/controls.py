"""Makes the examples that controls are trained on: data that no setting of the product gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stepwiser_jax.records import ClassifierExample, JudgeExample
from stepwiser_jax.tasks.arithmetic import ArithmeticTask, generate_problems
from stepwiser_jax.tasks.arithmetic_demonstrations import labelled_truth


def with_shuffled_labels(examples: Sequence[JudgeExample], seed: int) -> list[JudgeExample]:
    """Returns the examples with their labels permuted among them: there are as many of each label,
    and none says anything of its chunk."""
    labels = np.random.default_rng(seed).permutation([e.is_positive for e in examples])
    return [replace(e, is_positive=bool(label)) for e, label in zip(examples, labels, strict=True)]


def drawn(examples: Sequence[JudgeExample], count: int, seed: int) -> list[JudgeExample]:
    """Returns `count` of the examples in their order, half of them of each label; all if there are
    not more."""
    rng, kept = np.random.default_rng(seed), []
    for label in (True, False):
        of_label = [i for i, example in enumerate(examples) if example.is_positive == label]
        kept += rng.permutation(of_label)[: count // 2].tolist()
    return [examples[i] for i in sorted(kept)]


def truth_examples(count: int, seed: int, task: ArithmeticTask) -> list[ClassifierExample]:
    """Returns the exact truth of the chunks that the demonstrations of the judge's cold start are
    about."""
    return labelled_truth(generate_problems(count, seed, "train", task), seed)

"""Counts what a model did: tokens that it generated, tokens that it read, and FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

from stepwiser_jax.model.config import ModelConfig


def block_parameters(config: ModelConfig) -> int:
    """Returns the number of parameters in the matrices of all layers."""
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return config.num_layers * config.hidden_size * (heads + 3 * config.intermediate_size)


def forward_flops(config: ModelConfig, *, tokens: float, scored: float, pairs: float) -> float:
    """Returns the FLOPs of a forward pass; a backward pass takes twice as many.

    They are 2 for each matrix parameter and token, those of the output matrix for each scored
    token, and two products for each pair of a query and a key that it sees.
    """
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * pairs
    return weight_flops(config, tokens=tokens, scored=scored) + 2.0 * attention


def weight_flops(config: ModelConfig, *, tokens: float, scored: float) -> float:
    """Returns the part of `forward_flops` that takes weights. Their gradients take as many."""
    head = scored * config.vocab_size * config.hidden_size
    return 2.0 * (tokens * block_parameters(config) + head)


def causal_pairs(before: int, tokens: int) -> float:
    """Returns the pairs of a query and a key it sees: `tokens` in a row after `before` others."""
    return tokens * before + tokens * (tokens + 1) / 2


@dataclass(frozen=True)
class Spent:
    """What a model did: tokens that it generated, tokens that it was fed in prompts, and the FLOPs
    of both. A token that is in its cache already is not read again."""

    generated: int = 0
    read: int = 0
    flops: float = 0.0

    @classmethod
    def on(
        cls, config: ModelConfig, *, before: int = 0, read: int = 0, generated: int = 0
    ) -> Spent:
        """Returns what a model of this shape spends on a row whose cache holds `before` tokens: it
        reads some more, and then generates. Only generated tokens need logits."""
        tokens = read + generated
        pairs = causal_pairs(before, tokens)
        flops = forward_flops(config, tokens=tokens, scored=generated, pairs=pairs)
        return cls(generated, read, flops)

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.generated + other.generated, self.read + other.read, self.flops + other.flops
        )


NOTHING = Spent()
"""What is spent before anything is done."""

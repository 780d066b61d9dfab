"""Finds what a prompt shares with prompts that were read before, so that only the rest is read.

    admitted prefixes -> rounds of `Read`: the source of the shared tokens, and how many they are

The prompts of a judge about one solution begin alike. The longest is read first. The others copy
what they share with it, and read the rest, in the round after that. A prompt of a later call copies
from those of the call before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stepwiser_jax.inference.params import Prefix
from stepwiser_jax.model.kv_cache import KVCache

NO_TOKEN = -1


@dataclass(frozen=True)
class Read:
    """A prefix that goes into a slot. Its first `shared` tokens are copied from slot `source`; the
    others up to the last one, which its rows feed, are read."""

    slot: int
    prefix: Prefix
    source: int
    shared: int

    @property
    def tail(self) -> Sequence[int]:
        return self.prefix.ids[self.shared : self.prefix.num_tokens - 1]


class Residents:
    """The tokens whose keys and values are in each slot."""

    def __init__(self, slots: int, length: int):
        self.tokens_QS = np.full((slots, length), NO_TOKEN, np.int32)

    def shared(self, prefix: Prefix) -> np.ndarray:
        """Returns how many tokens of a prefix each slot holds, (Q,). The last one is not counted:
        its rows feed it."""
        ids = np.array(prefix.ids[: prefix.num_tokens - 1], np.int32)
        differs_QS = np.ones((len(self.tokens_QS), len(ids) + 1), bool)
        differs_QS[:, :-1] = self.tokens_QS[:, : len(ids)] != ids
        return differs_QS.argmax(axis=1)

    def admit(self, admitted: Sequence[tuple[int, Prefix]]) -> list[list[Read]]:
        """Puts prefixes into slots.

        Returns:
            What is read, in rounds: the sources of a round are there after the rounds before it.
            What a slot held before can be copied into the slot itself alone.
        """
        slots = [slot for slot, _ in admitted]
        own_shared = {slot: int(self.shared(prefix)[slot]) for slot, prefix in admitted}
        self.tokens_QS[slots] = NO_TOKEN
        rounds: list[list[Read]] = [[]]
        round_Q = np.full((len(self.tokens_QS),), -1)
        for slot, prefix in sorted(admitted, key=lambda each: -each[1].num_tokens):
            shared_Q = self.shared(prefix)
            shared_Q[slot] = own_shared[slot]
            most = shared_Q.max()
            source = int(np.where(shared_Q == most, -round_Q, -np.inf).argmax())
            shared = int(most) if is_worth_sharing(int(most), prefix) else 0
            turn = int(round_Q[source]) + 1 if shared else 0
            round_Q[slot] = turn
            if turn == len(rounds):
                rounds.append([])
            rounds[turn].append(Read(slot, prefix, source, shared))
            # Not the last token: its rows feed it, so the slot need not hold it.
            read = prefix.num_tokens - 1
            self.tokens_QS[slot, :read] = prefix.ids[:read]
        return rounds


def is_worth_sharing(shared: int, prefix: Prefix) -> bool:
    """Returns whether a prefix shares at least half of its tokens. One that shares less is read
    whole, since a prefill reads each token faster."""
    return 0 < prefix.num_tokens <= 2 * shared


@dataclass
class PrefixCache:
    """What the last call that was given it has read, by the length of stored prefixes: keys and
    values, and whose they are. It belongs to one engine and its weights."""

    by_length: dict[int, tuple[KVCache, Residents]] = field(default_factory=dict)

"""Makes batches of a fixed shape from token ids: one first-fit packer, and loaders that resume.

A loader's position is part of every checkpoint. Masks and packing ids are data here, never derived
from token ids: pad and end may be the same token.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import grain
import jax
import numpy as np

from stepwiser_jax.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Document:
    """One example as arrays over its tokens: ids, which of them are learned, and, for a classifier,
    the target P(+) of each learned one."""

    tokens_T: np.ndarray
    target_mask_T: np.ndarray
    targets_T: np.ndarray | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Rows of one or more documents. `segment_ids_BT` is 0 on padding and 1, 2, ... on the
    documents of a row; the other arrays are those of `Document`."""

    tokens_BT: Any
    segment_ids_BT: Any
    positions_BT: Any
    target_mask_BT: Any
    targets_BT: Any = None


# --- packing ------------------------------------------------------------------------------------


def first_fit(
    items: Iterable[T], length_of: Callable[[T], int], row_length: int, num_rows: int
) -> Iterator[list[list[T]]]:
    """Yields blocks of at most `num_rows` rows, each row a list of items.

    An item goes to the first row of the block that has room. When none has, the block is yielded
    and the item begins a new one.

    Raises:
        ValueError: An item is longer than a row.
    """
    room = np.full(num_rows, row_length)
    rows: list[list[T]] = []
    for item in items:
        length = length_of(item)
        if length > row_length:
            raise ValueError(f"an item of {length} tokens exceeds a row of {row_length}")
        if not np.any(room >= length):
            yield rows
            room[:], rows = row_length, []
        row = int(np.argmax(room >= length))
        if row == len(rows):  # rows are filled in order: an empty one is the next
            rows.append([])
        rows[row].append(item)
        room[row] -= length
    if rows:
        yield rows


def pack_documents(
    rows: Sequence[Sequence[Document]], num_rows: int, row_length: int
) -> TokenBatch:
    """Packs the documents of each row one after the other. Missing rows are padding."""
    shape = (num_rows, row_length)
    has_targets = any(d.targets_T is not None for d in itertools.chain(*rows))
    batch = TokenBatch(
        tokens_BT=np.zeros(shape, np.int32),
        segment_ids_BT=np.zeros(shape, np.int32),
        positions_BT=np.zeros(shape, np.int32),
        target_mask_BT=np.zeros(shape, bool),
        targets_BT=np.zeros(shape, np.float32) if has_targets else None,
    )
    for row, documents in enumerate(rows):
        start = 0
        for number, document in enumerate(documents, 1):
            here = slice(start, start + len(document.tokens_T))
            batch.tokens_BT[row, here] = document.tokens_T
            batch.segment_ids_BT[row, here] = number
            batch.positions_BT[row, here] = np.arange(len(document.tokens_T))
            batch.target_mask_BT[row, here] = document.target_mask_T
            if has_targets:
                batch.targets_BT[row, here] = document.targets_T
            start = here.stop
    return batch


# --- loaders ------------------------------------------------------------------------------------


class Loader(Generic[T]):
    """An iterator over batches. Its position, the number of those it gave, can be saved.

    `plan()` iterates over all batches as lists of indices, the same ones each time, and is cheap:
    a loader that resumes skips the first ones. `make` turns such lists into a batch.
    """

    def __init__(self, plan: Callable[[], Iterator[Any]], make: Callable[[Any], T]):
        self._plan, self._make = plan, make
        self.set_state({"batches": 0})

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        indices = next(self._left)
        self._batches += 1
        return self._make(indices)

    def get_state(self) -> dict[str, int]:
        return {"batches": self._batches}

    def set_state(self, state: dict[str, int]) -> None:
        self._batches = state["batches"]
        self._left = itertools.islice(self._plan(), self._batches, None)


def fitting_documents(documents: Sequence[Document], max_length: int) -> tuple[list[Document], int]:
    """Returns the documents that fit, and the number of those that do not.

    Raises:
        UserError: No document fits.
    """
    fitting = [document for document in documents if len(document.tokens_T) <= max_length]
    if not fitting:
        shortest = min(len(document.tokens_T) for document in documents)
        raise UserError(
            f"no example fits max_length {max_length}: the shortest of {len(documents)} has "
            f"{shortest} tokens"
        )
    return fitting, len(documents) - len(fitting)


def document_loader(
    documents: Sequence[Document],
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    packing: bool = True,
    epochs: int | None = None,
) -> Loader[TokenBatch]:
    """Returns a loader of shuffled batches (batch_size, max_length), in another order every epoch.

    Args:
        documents: What is learned; none is longer than `max_length`.
        batch_size: Rows of a batch.
        max_length: Tokens of a row.
        seed: Decides the order.
        packing: Whether documents share rows.
        epochs: How often every document comes; padding fills up the last batch. With None the
            loader never ends.
    """
    order = _shuffled(len(documents), seed, epochs)
    lengths = [len(document.tokens_T) for document in documents]

    def plan() -> Iterator[list[list[int]]]:
        if packing:
            rows = _packed_rows(order, lengths, batch_size, max_length)
        else:
            rows = ([i] for i in _ordered(order))
        return _lists_of(rows, batch_size)

    def make(rows: list[list[int]]) -> TokenBatch:
        return pack_documents([[documents[i] for i in row] for row in rows], batch_size, max_length)

    return Loader(plan, make)


def num_batches(documents: Sequence[Document], **settings: Any) -> int:
    """Returns how many batches `document_loader` yields with these settings, which have `epochs`.

    No batch is made: which documents share a row depends on their lengths and order alone.
    """
    return sum(1 for _ in document_loader(documents, **settings)._plan())


def example_loader(examples: Sequence[T], *, batch_size: int, seed: int) -> Loader[list[T]]:
    """Returns an endless loader of shuffled lists of `batch_size` examples, in another order every
    epoch."""
    order = _shuffled(len(examples), seed, None)
    return Loader(
        lambda: _lists_of(_ordered(order), batch_size),
        lambda indices: [examples[i] for i in indices],
    )


def _shuffled(count: int, seed: int, epochs: int | None) -> grain.MapDataset[Any]:
    return grain.MapDataset.source(range(count)).seed(seed).shuffle().repeat(epochs)


def _ordered(order: grain.MapDataset[Any]) -> Iterator[Any]:
    # The data set's own iterator prefetches in threads, which is slow here.
    return map(order.__getitem__, range(len(order)))


def _lists_of(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while some := list(itertools.islice(items, size)):
        yield some


def _packed_rows(
    order: grain.MapDataset[Any], lengths: Sequence[int], batch_size: int, row_length: int
) -> Iterator[list[int]]:
    """Yields rows of documents, shuffled within a block, since its first rows hold more tokens."""
    num_rows = 0
    for block in first_fit(_ordered(order), lengths.__getitem__, row_length, 4 * batch_size):
        for row in np.random.default_rng(num_rows).permutation(len(block)):
            yield block[row]
        num_rows += len(block)

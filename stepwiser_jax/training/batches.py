"""Records -> token ids -> batches of a fixed shape, through Grain.

The position of a loader is part of every checkpoint: `get_state` and `set_state` are Grain's. Masks
and segments are data here, never derived from token ids: pad and end may be the same token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grain
import jax
import numpy as np

from stepwiser_jax.errors import UserError
from stepwiser_jax.model.packing import member
from stepwiser_jax.records import ClassifierExample, Dialogue, SftExample

R = TypeVar("R")
E = TypeVar("E", bound=SftExample | Dialogue)
Document = dict[str, np.ndarray]
"""One array of each kind, a number a token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Rows of one or more documents. `segment_ids_BT` is 0 on padding, 1, 2, ... per document;
    `loss_mask_BT` marks the tokens that are learned."""

    tokens_BT: Any
    segment_ids_BT: Any
    positions_BT: Any
    loss_mask_BT: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierBatch:
    """Rows of one or more solutions. `answer_mask_BT` marks the answers that are learned;
    `targets_BT` is the probability of + that each should have."""

    tokens_BT: Any
    segment_ids_BT: Any
    positions_BT: Any
    answer_mask_BT: Any
    targets_BT: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """Rows of one or more groups: each a prompt, then its completions, in the segments of
    `model.packing`. Every array is indexed by the token it describes; `previous_BT` is the index of
    the position that predicts the token: for a completion's first token the prompt's last."""

    tokens_BT: Any
    segment_ids_BT: Any
    positions_BT: Any
    previous_BT: Any
    completion_mask_BT: Any
    sampler_logprobs_BT: Any
    advantages_BT: Any
    old_logprobs_BT: Any = None
    ref_logprobs_BT: Any = None


@dataclasses.dataclass(frozen=True)
class Group:
    """One prompt and its completions, with what the sampler and the rewards say about them."""

    prompt_ids: Sequence[int]
    completions_G: Sequence[Sequence[int]]
    logprobs_G: Sequence[Sequence[float]]
    advantages_G: Sequence[float]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + sum(map(len, self.completions_G))


def sft_documents(
    examples: Sequence[E],
    render: Callable[[E], tuple[list[int], list[bool]]],
    *,
    max_length: int,
) -> tuple[list[Document], int]:
    """Token ids and loss masks of the examples that fit, and the number of those that do not.

    `render` gives (ids, which of them are learned). Raises UserError where no example fits, or one
    has nothing to learn.
    """
    return _fitting([_document(example, render) for example in examples], max_length)


def classifier_documents(
    solutions: Sequence[ClassifierExample],
    render: Callable[[ClassifierExample], tuple[list[int], list[int], list[float]]],
    *,
    max_length: int,
) -> tuple[list[Document], int]:
    """As `sft_documents`. `render` gives (ids, the places of the answers that are learned, the
    target of each)."""
    documents = []
    for solution in solutions:
        ids, places, targets = render(solution)
        tokens = np.array(ids, np.int32)
        answer_mask, target = np.zeros_like(tokens), np.zeros(len(tokens), np.float32)
        answer_mask[places], target[places] = 1, targets
        documents.append({"tokens": tokens, "answer_mask": answer_mask, "targets": target})
    return _fitting(documents, max_length)


def _fitting(documents: list[Document], max_length: int) -> tuple[list[Document], int]:
    fitting = [document for document in documents if len(document["tokens"]) <= max_length]
    if not fitting:
        shortest = min(len(document["tokens"]) for document in documents)
        raise UserError(
            f"no example fits max_length {max_length}: the shortest of {len(documents)} has "
            f"{shortest} tokens"
        )
    return fitting, len(documents) - len(fitting)


def sft_loader(
    documents: Sequence[Document],
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    packing: bool,
    epochs: int | None = None,
) -> grain.DatasetIterator[TokenBatch]:
    """Shuffled batches (batch_size, max_length), another order in every epoch. With `packing`
    several documents share a row. They never end, or with `epochs` when every document has come so
    many times; the rows that the last batch lacks are padding then."""
    source = _shuffled(documents, seed, epochs)
    if packing:
        rows = _packed(source, list(documents[0]), batch_size, max_length).map(_packed_row)
    else:
        rows = source.map(lambda document: _padded_row(document, max_length)).to_iter_dataset()
    return iter(_batched(rows, batch_size, epochs).map(lambda rows: TokenBatch(**rows)))


def classifier_loader(
    documents: Sequence[Document],
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    epochs: int | None = None,
) -> grain.DatasetIterator[ClassifierBatch]:
    """As `sft_loader`, always packed."""
    source = _shuffled(documents, seed, epochs)
    rows = _packed(source, list(documents[0]), batch_size, max_length).map(_packed_solutions)
    return iter(_batched(rows, batch_size, epochs).map(lambda rows: ClassifierBatch(**rows)))


def num_batches(
    documents: Sequence[Document],
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    packing: bool,
    epochs: int,
) -> int:
    """How many batches a loader with these settings yields. Which documents share a row depends on
    their lengths and order alone, so that no row need be made."""
    if not packing:
        return -(-epochs * len(documents) // batch_size)
    lengths = _shuffled([len(document["tokens"]) for document in documents], seed, epochs)
    room = np.full(_bins(batch_size), max_length)
    rows = 0
    for length in map(lengths.__getitem__, range(len(lengths))):  # its iterator prefetches: slow
        if not np.any(room >= length):
            rows += len(room)
            room[:] = max_length
        room[np.argmax(room >= length)] -= length
    rows += int(np.sum(room < max_length))
    return -(-rows // batch_size)


def _shuffled(documents: Sequence[R], seed: int, epochs: int | None) -> grain.MapDataset[R]:
    return grain.MapDataset.source(documents).seed(seed).shuffle().repeat(epochs)


def _bins(batch_size: int) -> int:
    """How many rows are filled at a time: a document goes to the first of them that has room."""
    return 4 * batch_size


def _packed(
    source: grain.MapDataset[Document], features: Sequence[str], batch_size: int, max_length: int
) -> grain.IterDataset[Document]:
    """Rows of several documents, first-fit (`num_batches` counts them)."""
    return grain.experimental.FirstFitPackIterDataset(
        source.to_iter_dataset(),
        length_struct=dict.fromkeys(features, max_length),
        num_packing_bins=_bins(batch_size),
    )


def _batched(
    rows: grain.IterDataset[Document], batch_size: int, epochs: int | None
) -> grain.IterDataset[Document]:
    batches = rows.batch(batch_size, drop_remainder=epochs is None)
    return batches.map(lambda batch: {n: _with_rows(x, batch_size) for n, x in batch.items()})


def _with_rows(rows: np.ndarray, wanted: int) -> np.ndarray:
    return np.pad(rows, [(0, wanted - len(rows)), *[(0, 0)] * (rows.ndim - 1)])


def _document(example: E, render: Callable[[E], tuple[list[int], list[bool]]]) -> Document:
    ids, learned = render(example)
    if not any(learned):
        raise UserError(f"{example.example_id} has an empty completion: nothing to learn")
    return {"tokens": np.array(ids, np.int32), "loss_mask": np.array(learned, np.int32)}


def _packed_row(row: Document) -> Document:
    return {
        "tokens_BT": row["tokens"].astype(np.int32),
        "segment_ids_BT": row["tokens_segment_ids"].astype(np.int32),
        "positions_BT": row["tokens_positions"].astype(np.int32),
        "loss_mask_BT": row["loss_mask"].astype(bool),
    }


def _packed_solutions(row: Document) -> Document:
    return {
        "tokens_BT": row["tokens"].astype(np.int32),
        "segment_ids_BT": row["tokens_segment_ids"].astype(np.int32),
        "positions_BT": row["tokens_positions"].astype(np.int32),
        "answer_mask_BT": row["answer_mask"].astype(bool),
        "targets_BT": row["targets"].astype(np.float32),
    }


def _padded_row(document: Document, max_length: int) -> Document:
    length = len(document["tokens"])
    padding = (0, max_length - length)
    return {
        "tokens_BT": np.pad(document["tokens"], padding),
        "segment_ids_BT": np.pad(np.ones(length, np.int32), padding),
        "positions_BT": np.pad(np.arange(length, dtype=np.int32), padding),
        "loss_mask_BT": np.pad(document["loss_mask"].astype(bool), padding),
    }


def first_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Which documents share a row, by their indices: each goes to the first row that has room.
    Raises ValueError where one is longer than a row."""
    rows: list[list[int]] = []
    used: list[int] = []
    for i, length in enumerate(lengths):
        if length > row_length:
            raise ValueError(f"a document of {length} tokens exceeds a row of {row_length}")
        row = next((r for r, held in enumerate(used) if held + length <= row_length), len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row].append(i)
        used[row] += length
    return rows


def packed_batch(
    rows: Sequence[Sequence[Sequence[int]]], num_rows: int, row_length: int
) -> TokenBatch:
    """The documents of each row, one after the other, nothing of them learned; rows that are not
    given are padding."""
    shape = (num_rows, row_length)
    batch = TokenBatch(
        tokens_BT=np.zeros(shape, np.int32),
        segment_ids_BT=np.zeros(shape, np.int32),
        positions_BT=np.zeros(shape, np.int32),
        loss_mask_BT=np.zeros(shape, bool),
    )
    for row, documents in enumerate(rows):
        start = 0
        for number, ids in enumerate(documents, 1):
            end = start + len(ids)
            batch.tokens_BT[row, start:end] = ids
            batch.segment_ids_BT[row, start:end] = number
            batch.positions_BT[row, start:end] = np.arange(len(ids))
            start = end
    return batch


def example_loader(
    examples: Sequence[R], *, batch_size: int, seed: int
) -> grain.DatasetIterator[list[R]]:
    """Endless shuffled lists of `batch_size` records, another order in every epoch."""
    source = grain.MapDataset.source(examples).seed(seed).shuffle().repeat()
    return iter(source.batch(batch_size, batch_fn=list).to_iter_dataset())


def rollout_batch(
    groups: Sequence[Group], *, num_rows: int, row_length: int, micro_batches: int = 1
) -> RolloutBatch:
    """Groups packed first-fit into rows (num_rows, row_length); rows that are not needed are
    padding, and all of them are in the last of `micro_batches` (see `trainer.split_rows`).

    Raises ValueError where a group is longer than a row or the groups do not fit.
    """
    shape = (num_rows, row_length)
    batch = RolloutBatch(
        tokens_BT=np.zeros(shape, np.int32),
        segment_ids_BT=np.zeros(shape, np.int32),
        positions_BT=np.zeros(shape, np.int32),
        previous_BT=np.zeros(shape, np.int32),
        completion_mask_BT=np.zeros(shape, bool),
        sampler_logprobs_BT=np.zeros(shape, np.float32),
        advantages_BT=np.zeros(shape, np.float32),
    )
    rows = np.arange(num_rows).reshape(-1, micro_batches).T.ravel().tolist()
    used, held = dict.fromkeys(rows, 0), dict.fromkeys(rows, 0)
    for group in groups:
        size = group.num_tokens
        if size > row_length:
            raise ValueError(f"a group of {size} tokens exceeds a row of {row_length}")
        row = next((row for row in rows if used[row] + size <= row_length), None)
        if row is None:
            raise ValueError(f"{len(groups)} groups do not fit {num_rows} rows")
        held[row] += 1
        _fill_row(batch, row, used[row], held[row], group)
        used[row] += size
    return batch


def _fill_row(batch: RolloutBatch, row: int, start: int, number: int, group: Group) -> None:
    """Write a group, the `number`th of its row, from position `start` on."""
    prompt_length = len(group.prompt_ids)
    end = prompt_end = start + prompt_length
    batch.tokens_BT[row, start:end] = group.prompt_ids
    batch.segment_ids_BT[row, start:end] = member(number, 0)
    batch.positions_BT[row, start:end] = np.arange(prompt_length)
    batch.previous_BT[row, start + 1 : end] = np.arange(start, end - 1)
    for g, completion in enumerate(group.completions_G):
        start, end = end, end + len(completion)
        batch.tokens_BT[row, start:end] = completion
        batch.segment_ids_BT[row, start:end] = member(number, g + 1)
        batch.positions_BT[row, start:end] = prompt_length + np.arange(len(completion))
        batch.previous_BT[row, start:end] = [prompt_end - 1, *range(start, end - 1)][: end - start]
        batch.completion_mask_BT[row, start:end] = True
        batch.sampler_logprobs_BT[row, start:end] = group.logprobs_G[g]
        batch.advantages_BT[row, start:end] = group.advantages_G[g]

"""What both kinds of tokenizers share: known ids, end ids, and the bytes of pieces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from stepwiser_jax.errors import UserError


def check_ids(ids: Sequence[int], known: frozenset[int]) -> None:
    """Raises UserError if one of the ids has no token."""
    if not known.issuperset(ids):
        raise UserError(
            f"expected ids of the tokenizer's tokens (the largest is {max(known)}), found "
            f"{max(set(ids) - known)}: name the tokenizer of the model that sampled them"
        )


def end_ids(directory: Path, eos_id: int | None) -> tuple[int, ...]:
    """Returns the tokenizer's end token, and those that generation_config.json adds to it. Raises
    UserError if there is none."""
    ids = [eos_id]
    generation = directory / "generation_config.json"
    if generation.is_file():
        ids += _listed_end_ids(generation)
    unique = tuple(dict.fromkeys(i for i in ids if i is not None))
    if not unique:
        raise UserError(f"the tokenizer of {directory} defines no end token (eos_token)")
    return unique


def _listed_end_ids(file: Path) -> list[int | None]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON in UTF-8: {error}") from None
    listed = fields.get("eos_token_id") if isinstance(fields, dict) else fields
    ids = listed if isinstance(listed, list) else [listed]
    if not isinstance(fields, dict) or any(
        i is not None and (type(i) is not int or i < 0) for i in ids
    ):
        raise UserError(
            f"{file}: expected eos_token_id to be token ids from 0, found {listed!r:.80}"
        )
    return ids


def write_end_ids(directory: Path, eos_ids: Sequence[int], pad_id: int) -> None:
    """Writes generation_config.json, since a tokenizer's own files name one end token only."""
    generation = {"eos_token_id": list(eos_ids), "pad_token_id": pad_id}
    file = directory / "generation_config.json"
    file.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def sentencepiece_bytes(token: str) -> bytes:
    """Returns the bytes that a piece of a SentencePiece vocabulary stands for."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()

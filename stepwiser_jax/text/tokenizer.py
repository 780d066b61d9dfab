"""One tokenizer interface over Hugging Face tokenizers and SentencePiece models."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stepwiser_jax.data.hub import local_directory
from stepwiser_jax.errors import UserError
from stepwiser_jax.text import chat

FILES = ("*.json", "*.jinja", "*.model")
"""The files of a hub id that a tokenizer needs."""


class Tokenizer(Protocol):
    """Text <-> token ids. `encode` adds no special tokens, and control tokens (`text.chat`) that
    are spelled out in the text stay text; only `render_chat` gives some, where the chat template
    has them. `decode` keeps special tokens and cleans nothing up; it raises UserError for an id
    that no token has.

    `known_ids` are the ids of all tokens. There may be gaps between them; `vocab_size` is one more
    than the largest."""

    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def known_ids(self) -> frozenset[int]: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def control(self) -> chat.ControlTokens: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def render_chat(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]: ...
    def token_bytes(self) -> list[bytes]:
        """The bytes each id stands for, none in gaps; joined over ids they are the decoded text, up
        to one leading space in vocabularies whose words carry their own space."""
        ...

    def save(self, path: str) -> None: ...


def load_tokenizer(
    path_or_id: str,
    chat_template_args: Mapping[str, chat.Argument] | None = None,
    *,
    trained: bool = False,
) -> Tokenizer:
    """A Hugging Face tokenizer (directory or hub id), or a SentencePiece `.model` file, also a
    directory or hub id with a tokenizer.model and no tokenizer.json (which need the extra
    `tf-text`).

    Args:
        path_or_id: where it is. Without a network, a hub id has to be in the cache.
        chat_template_args: what `render_chat` hands to the template; `save` writes them into it.
        trained: whether it is of a model that a run of this project trained, whose arguments can
            be repeated and not changed.

    Raises:
        UserError: there is no tokenizer, or its chat template does not take the arguments.
    """
    from stepwiser_jax.text.sentencepiece import SentencePieceTokenizer

    arguments = chat_template_args or {}
    if path_or_id.endswith(".model"):
        return SentencePieceTokenizer(path_or_id, arguments, trained=trained)
    directory = local_directory(path_or_id, FILES)
    model = directory / "tokenizer.model"
    if model.is_file() and not (directory / "tokenizer.json").is_file():
        return SentencePieceTokenizer(str(model), arguments, trained=trained)
    return HuggingFaceTokenizer(directory, arguments, trained=trained)


def unknown_ids(tokenizer: Tokenizer, size: int) -> tuple[range, ...]:
    """Returns the ids below `size`, a model's number of logits, that no token has, as runs in
    ascending order. Raises UserError where a token's id is not below it."""
    known = [-1, *sorted(tokenizer.known_ids), size]
    if known[-2] >= size:
        raise UserError(
            f"expected a tokenizer whose ids are below the model's vocab_size {size}, found "
            f"{known[-2]}: use the model's own tokenizer, or a model whose embeddings were resized "
            "to this one"
        )
    return tuple(range(a + 1, b) for a, b in itertools.pairwise(known) if a + 1 < b)


def check_ids(ids: Sequence[int], known: frozenset[int]) -> None:
    """Raises UserError where one of the ids is of no token."""
    if not known.issuperset(ids):
        raise UserError(
            f"expected ids of the tokenizer's tokens (the largest is {max(known)}), found "
            f"{max(set(ids) - known)}: name the tokenizer of the model that sampled them"
        )


TokenIds = Sequence[int] | np.ndarray


def completion_text(tokenizer: Tokenizer, ids: TokenIds) -> str:
    """Returns the text of a completion without the end token."""
    return tokenizer.decode([i for i in np.asarray(ids).tolist() if i not in tokenizer.eos_ids])


class HuggingFaceTokenizer:
    """Byte-level BPE, SentencePiece-style BPE, or word level, from a tokenizer.json."""

    def __init__(
        self, directory: Path, arguments: Mapping[str, chat.Argument], *, trained: bool = False
    ):
        from transformers import AutoTokenizer

        if not (directory / "tokenizer.json").is_file():
            raise UserError(
                f"expected a tokenizer.json or a tokenizer.model in {directory}, found neither"
            )
        try:
            self._hf: Any = AutoTokenizer.from_pretrained(str(directory), use_fast=True)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load a tokenizer from {directory}: {error}") from None
        self._eos_ids = end_ids(directory, self._hf.eos_token_id)
        self.known_ids = frozenset(self._hf.get_vocab().values())
        if not self.known_ids.issuperset(self._eos_ids):
            raise UserError(
                f"{directory}: expected end tokens among the tokenizer's ids, up to "
                f"{max(self.known_ids, default=-1)}, found eos_token_id {list(self._eos_ids)}: "
                "correct generation_config.json, or fetch the model's own tokenizer"
            )
        template = chat.default_template(self._hf.chat_template)
        template = chat.with_arguments(template, arguments, str(directory), trained=trained)
        if arguments:
            self._hf.chat_template = template  # what is saved
        added = self._hf.added_tokens_decoder
        ends = [token.content for i, token in added.items() if i in self._eos_ids]
        special = [token.content for token in added.values() if token.special]
        other = [token.content for token in added.values()]
        self.control = chat.ControlTokens([*special, *ends], other, template)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self._eos_ids

    @property
    def bos_id(self) -> int | None:
        return self._hf.bos_token_id

    @property
    def pad_id(self) -> int:
        pad = self._hf.pad_token_id
        return self.eos_ids[0] if pad is None else pad

    @property
    def vocab_size(self) -> int:
        return max(self.known_ids) + 1  # where there are gaps, len(self._hf) is less

    def encode(self, text: str) -> list[int]:
        return self._encode(self.control.broken(text))

    def _encode(self, text: str) -> list[int]:
        """Encodes a text with breaks. (A tokenizer that begins every text with a space, as Llama
        2's does, puts one after every break.)"""
        ids: list[int] = []
        for part in text.split(chat.BREAK):
            ids += self._hf.encode(part, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        check_ids(ids, self.known_ids)  # the library leaves such ids out without a word
        return self._hf.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def render_chat(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Raises UserError where the tokenizer has no chat template, or it fails."""
        return self._encode(
            chat.render(
                chat.default_template(self._hf.chat_template),
                messages,
                self.control,
                add_generation_prompt=add_generation_prompt,
                **self._hf.special_tokens_map,
            )
        )

    @functools.cache  # noqa: B019 - tokenizers live as long as the process
    def token_bytes(self) -> list[bytes]:
        backend = json.loads(self._hf.backend_tokenizer.to_str())
        added = {token["id"]: token["content"].encode() for token in backend["added_tokens"]}
        to_bytes = _bytes_of_token(backend)
        others = self._hf.get_vocab().items()
        spelled = {i: to_bytes(token) for token, i in others if i not in added} | added
        return [spelled.get(i, b"") for i in range(self.vocab_size)]

    def save(self, path: str) -> None:
        """With all end tokens, which the tokenizer's own files cannot name."""
        self._hf.save_pretrained(path)
        write_end_ids(Path(path), self.eos_ids, self.pad_id)


def end_ids(directory: Path, eos_id: int | None) -> tuple[int, ...]:
    """The tokenizer's end token, and those that generation_config.json adds to it. Raises UserError
    where there is none."""
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
    generation = {"eos_token_id": list(eos_ids), "pad_token_id": pad_id}
    file = directory / "generation_config.json"
    file.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def _bytes_of_token(backend: dict[str, Any]) -> Any:
    """How this tokenizer.json spells bytes: byte-level, SentencePiece-style, or plain words."""
    parts = json.dumps([backend.get("decoder"), backend.get("pre_tokenizer")])
    if "ByteLevel" in parts:
        alphabet = {char: byte for byte, char in _byte_level_alphabet().items()}
        return lambda token: bytes(alphabet[char] for char in token)
    if "ByteFallback" in parts or "Metaspace" in parts or '"Replace"' in parts:
        return sentencepiece_bytes
    return lambda token: b" " + token.encode()


def sentencepiece_bytes(token: str) -> bytes:
    """What a piece of a SentencePiece vocabulary stands for."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def _byte_level_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }

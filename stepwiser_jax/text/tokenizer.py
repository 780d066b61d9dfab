"""One tokenizer interface over Hugging Face tokenizers and SentencePiece models."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from stepwiser_jax.records import UserError


class Tokenizer(Protocol):
    """Text <-> token ids. `encode` adds no special tokens; special tokens spelled out in the text
    become their ids. `decode` keeps special tokens and cleans nothing up."""

    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def render_chat(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]: ...
    def token_bytes(self) -> list[bytes]:
        """The bytes each id stands for; joined over ids they are the decoded text, up to one
        leading space in vocabularies whose words carry their own space."""
        ...

    def save(self, path: str) -> None: ...


def load_tokenizer(path_or_id: str) -> Tokenizer:
    """A Hugging Face tokenizer (directory or hub id), or a SentencePiece `.model` file, also a
    directory with a tokenizer.model and no tokenizer.json (which need the extra `tf-text`). Raises
    UserError where there is none."""
    from stepwiser_jax.text.sentencepiece import SentencePieceTokenizer

    directory = Path(path_or_id)
    if path_or_id.endswith(".model"):
        return SentencePieceTokenizer(path_or_id)
    if (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").is_file():
        return SentencePieceTokenizer(str(directory / "tokenizer.model"))
    return HuggingFaceTokenizer(path_or_id)


def completion_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """What a completion says: its text without the end token."""
    return tokenizer.decode([i for i in ids if i not in tokenizer.eos_ids])


class HuggingFaceTokenizer:
    """Byte-level BPE, SentencePiece-style BPE, or word level, from a tokenizer.json."""

    def __init__(self, path_or_id: str):
        from transformers import AutoTokenizer

        local = Path(path_or_id)
        if local.is_dir() and not (local / "tokenizer.json").is_file():
            raise UserError(
                f"expected a tokenizer.json or a tokenizer.model in {path_or_id}, found neither"
            )
        try:
            self._hf: Any = AutoTokenizer.from_pretrained(path_or_id, use_fast=True)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load a tokenizer from {path_or_id}: {error}") from None
        self._eos_ids = end_ids(local, self._hf.eos_token_id)

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
        return len(self._hf)

    def encode(self, text: str) -> list[int]:
        return self._hf.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self._hf.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def render_chat(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Raises UserError where the tokenizer has no chat template."""
        if self._hf.chat_template is None:
            raise UserError(
                "the tokenizer has no chat template: set prompt_style to 'bare', or use an "
                "instruction-tuned model's tokenizer"
            )
        text = self._hf.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return self.encode(text)

    @functools.cache  # noqa: B019 - tokenizers live as long as the process
    def token_bytes(self) -> list[bytes]:
        backend = json.loads(self._hf.backend_tokenizer.to_str())
        added = {token["id"]: token["content"].encode() for token in backend["added_tokens"]}
        to_bytes = _bytes_of_token(backend)
        tokens = self._hf.convert_ids_to_tokens(list(range(self.vocab_size)))
        return [added[i] if i in added else to_bytes(token) for i, token in enumerate(tokens)]

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
        listed = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
        ids += listed if isinstance(listed, list) else [listed]
    unique = tuple(dict.fromkeys(i for i in ids if i is not None))
    if not unique:
        raise UserError(f"the tokenizer of {directory} defines no end token (eos_token)")
    return unique


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

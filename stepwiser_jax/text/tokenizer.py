"""One tokenizer interface over Hugging Face tokenizers and SentencePiece models."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stepwiser_jax.data.hub import local_directory
from stepwiser_jax.errors import UserError
from stepwiser_jax.text import chat
from stepwiser_jax.text.sentencepiece import SentencePieceTokenizer
from stepwiser_jax.text.templates import KEPT, Prompts, prompts_of, save_prompts
from stepwiser_jax.text.token_ids import check_ids, end_ids, sentencepiece_bytes, write_end_ids

FILES = ("*.json", "*.jinja", "*.model", KEPT)
"""The files of a hub id that a tokenizer needs."""


class Tokenizer(Protocol):
    """A two-way map between text and token ids.

    `encode` adds no special tokens, and control tokens (`text.chat`) that the text spells stay
    text. Only `render_chat` returns control tokens, those of the chat template. `decode` keeps
    special tokens and cleans nothing up; it raises UserError for an id that no token has.
    `decode_batch` does the same for many texts; meanwhile other threads may run.
    `known_ids` are the ids of all tokens. There may be gaps between them; `vocab_size` is one more
    than the largest. `prompts` are what its model is asked with (`text.templates`)."""

    @property
    def prompts(self) -> Prompts: ...
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
    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]: ...
    def render_chat(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]: ...
    def token_bytes(self) -> list[bytes]:
        """Returns the bytes of each id, none in gaps. Joined, the bytes of several ids are their
        decoded text. If the vocabulary's words begin with a space, they have one more at the
        beginning."""
        ...

    def save(self, path: str) -> None: ...


def load_tokenizer(
    path_or_id: str,
    chat_template_args: Mapping[str, chat.Argument] | None = None,
    prompts: Prompts | None = None,
    *,
    trained: bool = False,
) -> Tokenizer:
    """Returns the tokenizer of a file, directory or hub id.

    A `.model` file, and a directory or hub id with a tokenizer.model and no tokenizer.json, give a
    SentencePiece tokenizer, which needs the extra `sentencepiece` or `tf-text`. All others give a
    Hugging Face tokenizer.

    Args:
        path_or_id: File, directory or hub id. Without a network, a hub id has to be in the cache.
        chat_template_args: What `render_chat` hands to the template; `save` writes them into it.
        prompts: Templates in place of ours; `save` keeps all. Those that are kept may be repeated,
            but not changed.
        trained: Whether a run of this project trained the model. Then the arguments and the
            prompts may be repeated, but not changed.

    Raises:
        UserError: There is no tokenizer, its chat template does not take the arguments, or it
            keeps other prompts.
    """
    arguments = chat_template_args or {}
    is_file = path_or_id.endswith(".model")
    directory = Path(path_or_id).parent if is_file else local_directory(path_or_id, FILES)
    templates = prompts_of(directory, prompts or {}, path_or_id, trained=trained)
    model = Path(path_or_id) if is_file else directory / "tokenizer.model"
    if is_file or (model.is_file() and not (directory / "tokenizer.json").is_file()):
        return SentencePieceTokenizer(str(model), arguments, templates, trained=trained)
    return HuggingFaceTokenizer(directory, arguments, templates, trained=trained)


def unknown_ids(tokenizer: Tokenizer, size: int) -> tuple[range, ...]:
    """Returns the ids below `size` (a model's number of logits) that no token has, as ranges in
    ascending order. Raises UserError if a token's id is not below `size`."""
    known = [-1, *sorted(tokenizer.known_ids), size]
    if known[-2] >= size:
        raise UserError(
            f"expected a tokenizer whose ids are below the model's vocab_size {size}, found "
            f"{known[-2]}: use the model's own tokenizer, or a model whose embeddings were resized "
            "to this one"
        )
    return tuple(range(a + 1, b) for a, b in itertools.pairwise(known) if a + 1 < b)


def unknown_words(tokenizer: Tokenizer, text: str) -> tuple[str, ...]:
    """Returns the words of a text, between white space and each once, that the tokenizer does not
    give back. A model never saw them."""
    words = dict.fromkeys(text.split())
    return tuple(w for w in words if tokenizer.decode(tokenizer.encode(w)).strip() != w)


def known_words(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns the texts of all tokens but control tokens, in the order of their ids."""
    texts = (tokenizer.decode([i]).strip() for i in sorted(tokenizer.known_ids))
    return tuple(text for text in texts if text and text not in tokenizer.control.tokens)


TokenIds = Sequence[int] | np.ndarray


def completion_text(tokenizer: Tokenizer, ids: TokenIds) -> str:
    """Returns the text of a completion without its end token."""
    return tokenizer.decode(_without_ends(ids, frozenset(tokenizer.eos_ids)))


def completion_texts(tokenizer: Tokenizer, batch: Iterable[TokenIds]) -> list[str]:
    """Returns the texts of many completions without their end tokens."""
    ends = frozenset(tokenizer.eos_ids)
    return tokenizer.decode_batch([_without_ends(ids, ends) for ids in batch])


def _without_ends(ids: TokenIds, ends: frozenset[int]) -> list[int]:
    listed = np.asarray(ids).tolist()
    if not ends.isdisjoint(listed):  # it is quicker to ask first
        listed = [i for i in listed if i not in ends]
    return listed


class HuggingFaceTokenizer:
    """A tokenizer.json: byte-level BPE, SentencePiece-style BPE, or word level."""

    def __init__(
        self,
        directory: Path,
        arguments: Mapping[str, chat.Argument],
        prompts: Prompts,
        *,
        trained: bool = False,
    ):
        from transformers import AutoTokenizer

        self.prompts = prompts
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
        return max(self.known_ids) + 1  # len(self._hf) is less if there are gaps

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
        check_ids(ids, self.known_ids)  # the library drops unknown ids silently
        # What `self._hf.decode` calls, after it has looked at every id and before it cleans up.
        return self._hf.backend_tokenizer.decode(list(ids), skip_special_tokens=False)

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        for ids in batch:
            check_ids(ids, self.known_ids)
        # The library uses all cores, and lets other threads run.
        return self._hf.backend_tokenizer.decode_batch(batch, skip_special_tokens=False)

    def render_chat(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Returns the ids of a conversation. Raises UserError if there is no chat template, or it
        fails."""
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
        """Writes the tokenizer's files, and all end tokens, since those files name only one."""
        self._hf.save_pretrained(path)
        save_prompts(Path(path), self.prompts)
        write_end_ids(Path(path), self.eos_ids, self.pad_id)


def _bytes_of_token(backend: dict[str, Any]) -> Any:
    """Returns the function from a token of this tokenizer.json to its bytes: byte-level,
    SentencePiece-style, or plain words."""
    parts = json.dumps([backend.get("decoder"), backend.get("pre_tokenizer")])
    if "ByteLevel" in parts:
        alphabet = {char: byte for byte, char in _byte_level_alphabet().items()}
        return lambda token: bytes(alphabet[char] for char in token)
    if "ByteFallback" in parts or "Metaspace" in parts or '"Replace"' in parts:
        return sentencepiece_bytes
    return lambda token: b" " + token.encode()


def _byte_level_alphabet() -> dict[int, str]:
    """Returns GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }

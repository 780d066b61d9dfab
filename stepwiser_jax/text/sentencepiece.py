"""SentencePiece vocabularies (`tokenizer.model`, as Llama 2 ships it) through tensorflow-text.

Text between special tokens is encoded by tensorflow-text, whose ids are the sentencepiece
library's (between segmentations of a unigram model that are equally likely, the two may choose
differently). Special tokens are the model's control symbols and what the files beside it add;
which of them a text may spell, `text.chat` says:

    tokenizer_config.json    bos_token, eos_token, pad_token, added_tokens_decoder, chat_template,
                             legacy (whether every stretch of text begins with a dummy space, or
                             the first alone, as transformers has it), add_prefix_space
    added_tokens.json        {token: id}
    chat_template.jinja      instead of tokenizer_config.json's
    generation_config.json   further end tokens
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepwiser_jax.errors import UserError
from stepwiser_jax.text import chat
from stepwiser_jax.text.tokenizer import (
    check_ids,
    end_ids,
    sentencepiece_bytes,
    write_end_ids,
)

UNKNOWN, CONTROL = 2, 3  # ModelProto.SentencePiece.Type
FILES = ("tokenizer_config.json", "added_tokens.json", "chat_template.jinja")
NO_DUMMY_PREFIX = bytes([0x1A, 2, 0x18, 0])
"""`normalizer_spec { add_dummy_prefix: false }`: behind a serialised model, it overrides it."""


class SentencePieceTokenizer:
    """A `.model` file and the files beside it, listed above."""

    def __init__(self, path: str, arguments: Mapping[str, chat.Argument], *, trained: bool = False):
        """Raises UserError without the extra `tf-text`, or for a file that is no such model."""
        file = Path(path)
        if not file.is_file():
            raise UserError(f"expected a SentencePiece model at {path}, found nothing")
        self._model = file.read_bytes()
        self._vocabulary = Vocabulary.parse(self._model, path)
        self._files = {
            name: (file.parent / name).read_text(encoding="utf-8")
            for name in FILES
            if (file.parent / name).is_file()
        }
        self._config = json.loads(self._files.get("tokenizer_config.json", "{}"))
        self._special = self._vocabulary.special() | self._added_tokens()
        longest_first = [*sorted(self._special, key=len, reverse=True), chat.BREAK]
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._begins_with_space = (
            self._vocabulary.add_dummy_prefix and self._config.get("add_prefix_space") is not False
        )
        self.bos_id = self._named("bos", self._vocabulary.bos_id)
        self.eos_ids = end_ids(file.parent, self._named("eos", self._vocabulary.eos_id))
        pad_id = self._named("pad", self._vocabulary.pad_id)
        self.pad_id = self.eos_ids[0] if pad_id is None else pad_id
        self.known_ids = frozenset(range(len(self._vocabulary.pieces))) | set(
            self._special.values()
        )
        self.vocab_size = 1 + max(self.known_ids)
        template = self._read_template()
        self._template = chat.with_arguments(template, arguments, path, trained=trained)
        if self._template and arguments:
            self._files["chat_template.jinja"] = self._template  # what is saved
        self.control = self._control_tokens()
        self._first, self._next, self._inside = self._encoders(path)

    def _control_tokens(self) -> chat.ControlTokens:
        listed = self._config.get("added_tokens_decoder", {}).values()
        other = {token["content"] for token in listed if not token.get("special")}
        other -= {token for token, i in self._special.items() if i in self.eos_ids}
        return chat.ControlTokens(self._special.keys() - other, other, self._template)

    def _encoders(self, path: str) -> tuple[Any, Any, Any]:
        """For the text's beginning, for what follows a special token, and what follows a break."""
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        try:
            import tensorflow  # pyright: ignore[reportMissingModuleSource, reportMissingImports]
            import tensorflow_text  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                f"{path} is a SentencePiece model and {error}: install the extra 'tf-text' "
                "(pip install 'stepwiser-jax[tf-text]'), or use a directory with a tokenizer.json"
            ) from None
        # TensorFlow would take the whole memory of every GPU it sees.
        tensorflow.config.set_visible_devices([], "GPU")
        as_trained = tensorflow_text.SentencepieceTokenizer(self._model)
        without_prefix = tensorflow_text.SentencepieceTokenizer(self._model + NO_DUMMY_PREFIX)
        first = as_trained if self._begins_with_space else without_prefix
        return first, first if self._config.get("legacy") else without_prefix, without_prefix

    def _added_tokens(self) -> dict[str, int]:
        """Raises UserError for a token that would change the text beside it."""
        tokens = dict(json.loads(self._files.get("added_tokens.json", "{}")))
        for index, token in self._config.get("added_tokens_decoder", {}).items():
            for flag in ("lstrip", "rstrip", "single_word"):
                if token.get(flag):
                    raise UserError(
                        f"tokenizer_config.json: {flag} of the added token {token['content']!r} is "
                        "not supported beside a SentencePiece model: use a tokenizer.json"
                    )
            tokens[token["content"]] = int(index)
        return tokens

    def _named(self, name: str, default: int | None) -> int | None:
        """The id of tokenizer_config.json's `<name>_token`, else the model's own."""
        token = self._config.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token is None:
            return default
        if token in self._special:
            return self._special[token]
        if token not in self._vocabulary.pieces:
            raise UserError(
                f"tokenizer_config.json: {name}_token {token!r} is neither in the SentencePiece "
                "model nor an added token"
            )
        return self._vocabulary.pieces.index(token)

    def encode(self, text: str) -> list[int]:
        return self._encode(self.control.broken(text))

    def _encode(self, text: str) -> list[int]:
        """Encodes a text with breaks."""
        ids: list[int] = []
        encoder = self._first
        for part in self._split.split(text):
            if part in self._special:
                ids.append(self._special[part])
                encoder = self._next
            elif part == chat.BREAK:
                encoder = self._inside
            elif part:
                ids += encoder.tokenize(part).numpy().tolist()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        check_ids(ids, self.known_ids)
        spelled = self.token_bytes()
        text = b"".join(spelled[i] for i in ids).decode(errors="replace")
        return text.removeprefix(" ") if self._begins_with_space else text

    def render_chat(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Raises UserError where there is no chat template, or it fails."""
        names = {"bos_token": self.bos_id, "eos_token": self.eos_ids[0], "pad_token": self.pad_id}
        spelled = self.token_bytes()
        return self._encode(
            chat.render(
                self._template,
                messages,
                self.control,
                add_generation_prompt=add_generation_prompt,
                **{name: spelled[i].decode() for name, i in names.items() if i is not None},
            )
        )

    def _read_template(self) -> str | None:
        file = self._files.get("chat_template.jinja")
        return file or chat.default_template(self._config.get("chat_template"))

    @functools.cache  # noqa: B019 - tokenizers live as long as the process
    def token_bytes(self) -> list[bytes]:
        spelled = [sentencepiece_bytes(piece) for piece in self._vocabulary.pieces]
        spelled += [b""] * (self.vocab_size - len(spelled))
        for token, i in self._special.items():
            spelled[i] = token.encode()
        return spelled

    def save(self, path: str) -> None:
        """The model and the files beside it, with all end tokens."""
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.model").write_bytes(self._model)
        for name, text in self._files.items():
            (directory / name).write_text(text, encoding="utf-8")
        write_end_ids(directory, self.eos_ids, self.pad_id)


# --- what a .model file says of itself ----------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """The parts of sentencepiece's ModelProto that are needed beside the encoding. A start, end or
    pad id is None where the model has no control symbol there."""

    pieces: list[str]
    types: list[int]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    add_dummy_prefix: bool

    @classmethod
    def parse(cls, model: bytes, path: str) -> Vocabulary:
        """Source: sentencepiece_model.proto. Raises UserError for anything else."""
        pieces, types = [], []
        trainer, normalizer = {41: 1, 42: 2, 43: -1}, {3: 1}  # the defaults
        try:
            for number, value in _fields(model):
                if number == 1:
                    piece = dict(_fields(value))
                    pieces.append(piece[1].decode())
                    types.append(piece.get(3, 1))
                elif number == 2:
                    trainer |= dict(_fields(value))
                elif number == 3:
                    normalizer |= dict(_fields(value))
        except (IndexError, KeyError, TypeError, ValueError):
            pieces = []
        if not pieces:
            raise UserError(f"expected a SentencePiece model, found something else in {path}")
        control = {i for i, kind in enumerate(types) if kind == CONTROL}
        bos_id, eos_id, pad_id = (
            trainer[n] if trainer[n] in control else None for n in (41, 42, 43)
        )
        return cls(pieces, types, bos_id, eos_id, pad_id, bool(normalizer[3]))

    def special(self) -> dict[str, int]:
        """Pieces that no text is encoded to."""
        kinds = (UNKNOWN, CONTROL)
        return {piece: i for i, piece in enumerate(self.pieces) if self.types[i] in kinds}


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a serialised protocol buffer: varints as integers, the rest as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
        else:
            size, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            if at + size > len(message):
                raise ValueError("truncated")
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at

"""SentencePiece vocabularies (`tokenizer.model`, as Llama 2 ships it).

tensorflow-text encodes if it is installed, else the sentencepiece library. Both give the same ids,
except that they may choose differently among equally likely segmentations of a unigram model.

Special tokens are the model's control symbols and those that the files beside it add. `text.chat`
decides which of them a text may spell. The files are:

    tokenizer_config.json    bos_token, eos_token, pad_token, added_tokens_decoder, chat_template,
                             legacy (whether every stretch of text begins with a dummy space, or
                             only the first, as in transformers), add_prefix_space
    added_tokens.json        {token: id}
    chat_template.jinja      instead of tokenizer_config.json's
    generation_config.json   further end tokens
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepwiser_jax.errors import UserError
from stepwiser_jax.text import chat
from stepwiser_jax.text.templates import Prompts, save_prompts
from stepwiser_jax.text.token_ids import check_ids, end_ids, sentencepiece_bytes, write_end_ids

UNKNOWN, CONTROL = 2, 3  # ModelProto.SentencePiece.Type
FILES = ("tokenizer_config.json", "added_tokens.json", "chat_template.jinja")


class SentencePieceTokenizer:
    """The tokenizer of a `.model` file and the files beside it that are listed above."""

    def __init__(
        self,
        path: str,
        arguments: Mapping[str, chat.Argument],
        prompts: Prompts,
        *,
        trained: bool = False,
    ):
        """Raises UserError if neither library is installed, or the file is no such model."""
        file = Path(path)
        if not file.is_file():
            raise UserError(f"expected a SentencePiece model at {path}, found nothing")
        self._model, self.prompts = file.read_bytes(), prompts
        model = read_model(self._model, path)
        self._pieces = [piece.piece for piece in model.pieces]
        self._files = {
            name: (file.parent / name).read_text(encoding="utf-8")
            for name in FILES
            if (file.parent / name).is_file()
        }
        self._config = json.loads(self._files.get("tokenizer_config.json", "{}"))
        kinds = {i: piece.type for i, piece in enumerate(model.pieces)}
        in_no_text = {self._pieces[i]: i for i in kinds if kinds[i] in (UNKNOWN, CONTROL)}
        self._special = in_no_text | self._added_tokens()
        longest_first = [*sorted(self._special, key=len, reverse=True), chat.BREAK]
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

        bos, eos, pad = (
            self._named(name, i if kinds.get(i) == CONTROL else None)
            for name, i in (
                ("bos", model.trainer_spec.bos_id),
                ("eos", model.trainer_spec.eos_id),
                ("pad", model.trainer_spec.pad_id),
            )
        )
        self.bos_id, self.eos_ids = bos, end_ids(file.parent, eos)
        self.pad_id = self.eos_ids[0] if pad is None else pad
        self.known_ids = frozenset(kinds) | set(self._special.values())
        self.vocab_size = 1 + max(self.known_ids)

        template = self._files.get("chat_template.jinja")
        template = template or chat.default_template(self._config.get("chat_template"))
        self._template = chat.with_arguments(template, arguments, path, trained=trained)
        if self._template and arguments:
            self._files["chat_template.jinja"] = self._template  # what is saved
        self.control = self._control_tokens()

        as_trained = make_encoder(self._model, path)
        self._begins_with_space = (
            model.normalizer_spec.add_dummy_prefix
            and self._config.get("add_prefix_space") is not False
        )
        model.normalizer_spec.add_dummy_prefix = False
        self._inside = make_encoder(model.SerializeToString(), path)
        self._first = as_trained if self._begins_with_space else self._inside
        self._next = self._first if self._config.get("legacy") else self._inside

    def _control_tokens(self) -> chat.ControlTokens:
        listed = self._config.get("added_tokens_decoder", {}).values()
        other = {token["content"] for token in listed if not token.get("special")}
        other -= {token for token, i in self._special.items() if i in self.eos_ids}
        return chat.ControlTokens(self._special.keys() - other, other, self._template)

    def _added_tokens(self) -> dict[str, int]:
        """Returns the ids of added tokens. Raises UserError for one that would change the text
        beside it."""
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
        """Returns the id of tokenizer_config.json's `<name>_token`, else the model's own."""
        token = self._config.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token is None:
            return default
        if token in self._special:
            return self._special[token]
        if token not in self._pieces:
            raise UserError(
                f"tokenizer_config.json: {name}_token {token!r} is neither in the SentencePiece "
                "model nor an added token"
            )
        return self._pieces.index(token)

    def encode(self, text: str) -> list[int]:
        return self._encode(self.control.broken(text))

    def _encode(self, text: str) -> list[int]:
        """Encodes a text with breaks."""
        ids: list[int] = []
        encode = self._first
        for part in self._split.split(text):
            if part in self._special:
                ids.append(self._special[part])
                encode = self._next
            elif part == chat.BREAK:
                encode = self._inside
            elif part:
                ids += encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        check_ids(ids, self.known_ids)
        spelled = self.token_bytes()
        text = b"".join(spelled[i] for i in ids).decode(errors="replace")
        return text.removeprefix(" ") if self._begins_with_space else text

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        return [self.decode(ids) for ids in batch]

    def render_chat(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Returns the ids of a conversation. Raises UserError if there is no chat template, or it
        fails."""
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

    @functools.cache  # noqa: B019 - tokenizers live as long as the process
    def token_bytes(self) -> list[bytes]:
        spelled = [sentencepiece_bytes(piece) for piece in self._pieces]
        spelled += [b""] * (self.vocab_size - len(spelled))
        for token, i in self._special.items():
            spelled[i] = token.encode()
        return spelled

    def save(self, path: str) -> None:
        """Writes the model and the files beside it, with all end tokens."""
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.model").write_bytes(self._model)
        for name, text in self._files.items():
            (directory / name).write_text(text, encoding="utf-8")
        save_prompts(directory, self.prompts)
        write_end_ids(directory, self.eos_ids, self.pad_id)


def read_model(model: bytes, path: str) -> Any:
    """Returns the ModelProto (sentencepiece_model.proto) in a `.model` file.

    Raises:
        UserError: The file holds something else.
    """
    from google.protobuf.message import DecodeError

    try:
        from sentencepiece import sentencepiece_model_pb2 as proto
    except ImportError:
        from transformers.utils import sentencepiece_model_pb2_new as proto
    try:
        parsed: Any = proto.ModelProto.FromString(model)  # pyright: ignore
    except DecodeError:
        parsed = None
    if parsed is None or not parsed.pieces:
        raise UserError(f"expected a SentencePiece model, found something else in {path}")
    return parsed


def make_encoder(model: bytes, path: str) -> Callable[[str], list[int]]:
    """Returns tensorflow-text's or the sentencepiece library's function from text to ids.

    Raises:
        UserError: Neither is installed, or the model has no unknown piece.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow  # pyright: ignore[reportMissingModuleSource, reportMissingImports]
        import tensorflow_text  # pyright: ignore[reportMissingImports]
    except ImportError:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise UserError(
                f"{path} is a SentencePiece model: install the extra 'sentencepiece' (pip install "
                "'stepwiser-jax[sentencepiece]') or 'tf-text', or use a directory with a "
                "tokenizer.json"
            ) from None
        try:
            return SentencePieceProcessor(model_proto=model).encode  # pyright: ignore
        except RuntimeError as error:
            raise UserError(
                f"{path} is a SentencePiece model that its library refuses: {error}"
            ) from None
    # TensorFlow would take the whole memory of every GPU it sees.
    tensorflow.config.set_visible_devices([], "GPU")
    tokenizer = tensorflow_text.SentencepieceTokenizer(model)
    return lambda text: tokenizer.tokenize(text).numpy().tolist()

"""Finds the checkpoint that a config names, and its tokenizer, without jax.

A path is a task's own tiny model (`tasks.sources.MODELS`), the run directory of a finished training
stage (the model it exported to `<run>/model`), a Hugging Face directory, or a Hugging Face hub id.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from stepwiser_jax.checksums import check_files, read_checksums
from stepwiser_jax.errors import UserError
from stepwiser_jax.files import nothing_at
from stepwiser_jax.manifest import read_manifest
from stepwiser_jax.tasks.sources import MODELS
from stepwiser_jax.text.chat import Argument
from stepwiser_jax.text.templates import Prompts
from stepwiser_jax.text.tokenizer import Tokenizer, load_tokenizer


def checkpoint_directory(path: str) -> str:
    """Returns the directory of a model's files, or the hub id as it is. Raises UserError if there
    is no model at `path`."""
    local = Path(path)
    if (local / "config.yaml").is_file():
        manifest = read_manifest(local)
        if not (local / "model" / "config.json").is_file():
            raise UserError(
                f"expected a model in {path}, found a run of stage '{manifest['stage']}', which "
                "makes none: name a run of sft, train-judge or train-classifier, or a Hugging Face "
                "directory"
            )
        return str(local / "model")
    if local.is_dir() and not (local / "config.json").is_file():
        raise UserError(
            f"expected a Hugging Face checkpoint or a run directory at {path}, found neither a "
            "config.json nor a config.yaml"
        )
    if not local.is_dir() and not is_hub_id(path):
        raise UserError(
            f"expected a Hugging Face directory, a run directory or a hub id (owner/name), found "
            f"{nothing_at(path)}"
        )
    return path


def is_hub_id(path: str) -> bool:
    """Returns whether a path that is no directory may be the hub id of a model (owner/name)."""
    is_one = path.count("/") == 1 and not path.startswith((".", "/"))
    return is_one and not Path(path).exists()


def check_model_exists(path: str) -> None:
    """Raises UserError if there is no model at `path`. Reads no weights."""
    if path not in MODELS:
        checkpoint_directory(path)


def check_small_files(directory: Path) -> None:
    """Raises UserError if files of an exported model, other than weights, differ from what was
    written."""
    sums = read_checksums(directory)
    check_files(directory, [name for name in sums if not name.endswith(".safetensors")], sums)


def load_tokenizer_of(
    path: str,
    chat_template_args: Mapping[str, Argument] | None = None,
    prompts: Prompts | None = None,
) -> Tokenizer:
    """Returns the tokenizer of the model at `path`. Raises UserError for arguments that the chat
    template does not take, or for arguments or prompts with which a run did not train its model."""
    if path in MODELS:
        with tempfile.TemporaryDirectory() as directory:
            MODELS[path](directory)
            return load_tokenizer(directory, chat_template_args, prompts)
    trained, local = (Path(path) / "config.yaml").is_file(), checkpoint_directory(path)
    if Path(local).is_dir():
        check_small_files(Path(local))
    return load_tokenizer(local, chat_template_args, prompts, trained=trained)

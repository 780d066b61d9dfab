"""Finds a model's files: in a directory, or in the snapshot of a hub id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepwiser_jax.errors import UserError
from stepwiser_jax.files import nothing_at


def local_directory(path_or_id: str, patterns: Sequence[str]) -> Path:
    """Returns the directory itself, or the snapshot of a hub id in the cache of huggingface_hub.

    Args:
        path_or_id: A directory, or a hub id (owner/name). Without a network, its snapshot has to
            be in the cache.
        patterns: The files of a hub id that are fetched, such as `*.json`.

    Raises:
        UserError: It is neither.
    """
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(path_or_id, allow_patterns=list(patterns)))
    except (OSError, HFValidationError) as error:
        raise UserError(
            f"expected a directory or a hub id, found {nothing_at(path_or_id)}, and on the hub: "
            f"{error}"
        ) from None

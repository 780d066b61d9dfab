"""Reads the manifest of a finished run, and checks the run's files against it.

`record_io.write_manifest` writes it last: no manifest means the run is not finished. It holds the
counts and sha256 of every part, the sha256 of the run's other files, and its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepwiser_jax.checksums import seal_fits, sha256_of
from stepwiser_jax.errors import UserError
from stepwiser_jax.files import nothing_at

MANIFEST = "manifest.json"
MANIFEST_FILES = ("config.yaml", "metrics.jsonl", "summary.json")
"""Files of a run, other than records, whose checksums its manifest holds."""


def read_manifest(run_dir: str | Path) -> dict[str, Any]:
    """Returns the manifest of a finished run. Raises UserError if it is missing or damaged."""
    run_dir = Path(run_dir)
    manifest = run_dir / MANIFEST
    if manifest.is_file():
        fields = _read_json(manifest)
        if not _is_manifest(fields):
            raise UserError(
                f"{manifest} is damaged: put it back, or delete it and repeat the command that "
                "made the run: it writes the file again"
            )
        return fields
    if (run_dir / "config.yaml").is_file():
        raise UserError(
            f"{run_dir} is not finished (it has no manifest.json): resume it with the command that "
            "started it, then run this one again"
        )
    raise UserError(f"expected a file or a finished run directory, found {nothing_at(run_dir)}")


def read_run_json(run_dir: Path, name: str) -> dict[str, Any]:
    """Returns the object in a JSON file of a finished run. Raises UserError if it is damaged or
    missing."""
    check_run_file(run_dir, name)
    fields = _read_json(run_dir / name) if (run_dir / name).is_file() else None
    if not isinstance(fields, dict):
        raise UserError(
            f"expected a JSON object in {run_dir / name}, found none: put the file back, or delete "
            f"{MANIFEST} and repeat the command that made the run"
        )
    return fields


def _read_json(file: Path) -> Any:
    """Returns the content of a JSON file, None if it is not JSON."""
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None


def _is_manifest(fields: Any) -> bool:
    known = {"stage", "config_digest", "records", "files", "sha256"}
    if not isinstance(fields, dict) or not {"stage", "records"} <= set(fields) <= known:
        return False
    try:
        promises = _promises(fields)
    except (TypeError, KeyError, AttributeError):
        return False
    are_texts = all(isinstance(text, str) for promise in promises for text in promise)  # pyright: ignore[reportUnnecessaryIsInstance]
    return are_texts and isinstance(fields["stage"], str) and seal_fits(fields)


def check_run_file(run_dir: Path, name: str) -> None:
    """Raises UserError if a file of `MANIFEST_FILES` does not match the run's manifest. A run that
    is not finished has no manifest and is not checked."""
    if not (run_dir / MANIFEST).is_file():
        return
    files = read_manifest(run_dir).get("files", {})
    if name in files:
        check_promised(run_dir, name, files[name])


def check_finished(run_dir: Path) -> None:
    """Raises UserError if any file of a finished run does not match its manifest."""
    for name, digest in _promises(read_manifest(run_dir)):
        check_promised(run_dir, name, digest)


def _promises(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns name and checksum of every file that a manifest names."""
    parts = [part for kind in manifest["records"].values() for part in kind["parts"]]
    tokens = [part["tokens"] for part in parts if "tokens" in part]
    of_parts = [(part["path"], part["sha256"]) for part in (*parts, *tokens)]
    return [*of_parts, *manifest.get("files", {}).items()]


_WITHOUT_A_COPY = {
    "config.yaml": "write it again: with --dry-run and a new --run-dir beside this one, the "
    "command that made the run prints it",
    "metrics.jsonl": f"delete {MANIFEST} and repeat the command that made the run: it names a line "
    "that cannot be read",
}
"""What to do about a file that the run cannot make again."""


def check_promised(run_dir: Path, name: str, digest: str) -> None:
    """Raises UserError if a file of a run is not the one with this checksum of its manifest."""
    file = run_dir / name
    if not file.is_file() or sha256_of(file) != digest:
        make_again = (
            f"delete it and {MANIFEST}, and repeat the command that made the run: it makes again "
            "what is missing"
        )
        raise UserError(
            f"{file} is missing or is not the file that {run_dir / MANIFEST} names: put it back. "
            f"If there is no copy, {_WITHOUT_A_COPY.get(name, make_again)}"
        )

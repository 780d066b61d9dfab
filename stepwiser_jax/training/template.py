"""What `stepwiser convert` needs beside the weights of a checkpoint.

<run_dir>/template/       config.json and tokenizer; with adapters, base.json: the model that they
                          belong to
"""

from __future__ import annotations

import json
from pathlib import Path

from stepwiser_jax.checksums import check_files, read_checksums, write_checksums
from stepwiser_jax.distributed import hosts
from stepwiser_jax.distributed.loading import Loaded
from stepwiser_jax.errors import UserError
from stepwiser_jax.record_io import atomic_write


def write_template(template: Path, loaded: Loaded) -> None:
    """Writes the template of a model to train. Raises UserError as `check_base` does."""
    has_adapters = bool(loaded.model.adapters)
    if has_adapters:
        check_base(template, loaded.model_id)
    if not hosts.is_primary():
        return
    config = loaded.model.config.to_hf()
    atomic_write(template / "config.json", json.dumps(config, indent=2) + "\n")
    loaded.tokenizer.save(str(template))
    if has_adapters:
        atomic_write(template / "base.json", json.dumps({"model_id": loaded.model_id}) + "\n")
    write_checksums(template)


def check_base(template: Path, model_id: str) -> None:
    """Raises UserError if the adapters of a run were trained on another model than this one."""
    file = template / "base.json"
    if not file.is_file():
        return
    sums = read_checksums(template)
    check_files(template, {file.name} & sums.keys(), sums)
    found = json.loads(file.read_text(encoding="utf-8"))["model_id"]
    if found != model_id:
        raise UserError(
            f"the adapters of {template.parent} were trained on {found}, model.path now holds "
            f"{model_id}: put that model back, or name a new run directory"
        )

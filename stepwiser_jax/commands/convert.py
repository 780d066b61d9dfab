"""Exports a checkpoint of a training run as a Hugging Face directory, adapters merged or alone.

Who loads it elsewhere asks it as it was trained, through its chat template. README.md says how.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from stepwiser_jax.checksums import check_files, read_checksums
from stepwiser_jax.commands.model_card import BARE_TEMPLATE, model_card
from stepwiser_jax.config import TrainedModel
from stepwiser_jax.config_files import read_run_settings
from stepwiser_jax.distributed.loading import load_for_training
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.distributed.shapes import abstract_model
from stepwiser_jax.errors import UserError
from stepwiser_jax.judges.settings import KEPT, exported_settings
from stepwiser_jax.model.attention import PLAIN
from stepwiser_jax.model.hf import non_finite, read_config, save_adapters, save_hf
from stepwiser_jax.runs.checkpoint_paths import checkpoint_directory
from stepwiser_jax.tasks.sources import MODELS
from stepwiser_jax.text.tokenizer import Tokenizer, load_tokenizer
from stepwiser_jax.training.checkpoint import Checkpointer
from stepwiser_jax.training.template import check_base


def convert_checkpoint(
    checkpoint: Path,
    output: Path,
    dtype: str | None = None,
    scores: Sequence[Path] = (),
    *,
    adapters: bool = False,
) -> None:
    """Writes the model of a checkpoint to the directory `output`.

    Args:
        checkpoint: `<run_dir>` (then its newest checkpoint) or `<run_dir>/checkpoints/N`.
        output: A new directory.
        dtype: What the weights are stored in, by default what the run has them in.
        scores: Runs of `evaluate` on the model, whose numbers the model card has.
        adapters: Whether to write the adapters alone, as peft does.

    Raises:
        UserError: There is no checkpoint, `output` exists, `model.path` now holds another model
            than the one that the run's adapters were trained on, or a run of `scores` is of another
            model. Or only the adapters are wanted: of a run without any, or with a base that is
            nowhere on disk.
    """
    names_step = checkpoint.parent.name == "checkpoints"
    run_dir = checkpoint.parent.parent if names_step else checkpoint
    if (names_step and not checkpoint.name.isdigit()) or not (
        run_dir / "template" / "config.json"
    ).is_file():
        raise UserError(
            f"expected the run directory of a stage that trains, or one of its checkpoints/N, "
            f"found {checkpoint}"
        )
    if output.exists():
        raise UserError(f"{output} exists: name a new directory")
    step = int(checkpoint.name) if names_step else None
    sums = read_checksums(run_dir / "template")
    check_files(run_dir / "template", sums, sums)
    settings = read_run_settings(run_dir)
    here = make_mesh(devices=jax.devices()[:1])  # whatever mesh it was saved from
    model_settings = TrainedModel.model_validate(settings["model"])
    if adapters:
        check_adapters(model_settings, dtype)
    if model_settings.lora is not None:
        loaded = load_for_training(**model_settings.load_args, mesh=here, seed=settings["seed"])
        check_base(run_dir / "template", loaded.model_id)
        template = loaded.model
    else:
        config = read_config(str(run_dir / "template"))
        template = abstract_model(config, here, PLAIN)
    model = Checkpointer(run_dir / "checkpoints").restore_model(template, step)
    if names := non_finite(model):
        raise UserError(
            f"{checkpoint} holds NaN or infinity in {', '.join(names)}: name another step"
        )
    tokenizer = load_tokenizer(str(run_dir / "template"))
    stored = dtype or str(model.embed[...].dtype)
    card = model_card(run_dir, settings, tokenizer.prompts, scores, dtype=stored, adapters=adapters)
    texts = {"README.md": card} | _asked(settings, tokenizer)
    if adapters:
        base = str(checkpoint_directory(model_settings.path))
        save_adapters(model, tokenizer, str(output), base=base, texts=texts)
    else:
        save_hf(model, tokenizer, str(output), dtype, texts=texts)
    what = "the adapters" if adapters else "the model"
    which = "its newest checkpoint" if step is None else f"the checkpoint of step {step}"
    print(f"{output}: {what} of {run_dir}, {which}")


def check_adapters(model: TrainedModel, dtype: str | None) -> None:
    """Raises UserError if a run has no adapters that others could load."""
    if model.lora is None:
        raise UserError("--adapters: expected a run with model.lora, found one that trained all")
    if model.path in MODELS:
        raise UserError(
            f"--adapters: expected a base that others can load, found {model.path}, whose fresh "
            "weights are nowhere on disk: leave --adapters out, and they are merged"
        )
    if dtype is not None:
        raise UserError("--adapters are written in float32, as they are: leave --dtype out")


def _asked(settings: dict[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the files that say how the model is asked: here, and elsewhere."""
    texts = {}
    if settings["prompt_style"] == "bare":
        texts["chat_template.jinja"] = BARE_TEMPLATE
    judge = exported_settings(settings)
    if judge is not None:
        texts[KEPT] = judge
    if "sampling" in settings:
        generation = {
            "eos_token_id": list(tokenizer.eos_ids),
            "pad_token_id": tokenizer.pad_id,
            "do_sample": False,
            "max_new_tokens": settings["sampling"]["max_new_tokens"],
        }
        texts["generation_config.json"] = json.dumps(generation, indent=2) + "\n"
    return texts

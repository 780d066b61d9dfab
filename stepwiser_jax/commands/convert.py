"""An Orbax checkpoint of a training run -> a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import jax
from flax import nnx

from stepwiser_jax.model.hf import read_config, save_hf
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.records import UserError
from stepwiser_jax.runtime.checkpoint import Checkpointer
from stepwiser_jax.text.tokenizer import load_tokenizer


def convert_checkpoint(checkpoint: Path, output: Path) -> None:
    """Write the model of `<run_dir>` (its newest checkpoint) or `<run_dir>/checkpoints/N`.

    Raises UserError where there is no checkpoint, or `output` exists.
    """
    names_step = checkpoint.parent.name == "checkpoints"
    run_dir = checkpoint.parent.parent if names_step else checkpoint
    if (names_step and not checkpoint.name.isdigit()) or not (
        run_dir / "template" / "config.json"
    ).is_file():
        raise UserError(
            f"expected the run directory of an sft or judge stage, or one of its checkpoints/N, "
            f"found {checkpoint}"
        )
    if output.exists():
        raise UserError(f"{output} exists: name a new directory")
    step = int(checkpoint.name) if names_step else None
    config = read_config(str(run_dir / "template"))
    template = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # whatever mesh it was saved from
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), template
    )
    model = Checkpointer(run_dir / "checkpoints").restore_model(template, step)
    save_hf(model, load_tokenizer(str(run_dir / "template")), str(output))

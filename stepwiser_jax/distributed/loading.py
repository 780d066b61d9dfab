"""Loads a stage's model from one of these places.

1. `arithmetic`: the embedded task's tiny model with fresh weights and its word-level tokenizer.
2. The run directory of a finished stage that trains: the model it exported to `<run>/model`.
3. A Hugging Face directory.
4. A Hugging Face hub id.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from stepwiser_jax.checksums import check_files, read_checksums
from stepwiser_jax.distributed.mesh import ShardingFor, attention_on, parameter_sharding
from stepwiser_jax.errors import UserError
from stepwiser_jax.model.attention import Attention
from stepwiser_jax.model.block import ClassifierHead, replace
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.decoder import Decoder, Weights
from stepwiser_jax.model.hf import load_hf, non_finite, read_config, resolve
from stepwiser_jax.model.lora import Adapter, make_adapters, merge, with_adapters
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.runs.checkpoint_paths import (
    check_small_files,
    checkpoint_directory,
    load_tokenizer_of,
)
from stepwiser_jax.tasks.sources import MODELS
from stepwiser_jax.text.chat import Argument
from stepwiser_jax.text.templates import Prompts
from stepwiser_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Loaded:
    model: Any  # a Transformer, or a Decoder
    tokenizer: Tokenizer
    model_id: str


def load_model(
    path: str,
    *,
    mesh: Mesh,
    param_dtype: str = "float32",
    compute_dtype: str = "float32",
    chat_template_args: Mapping[str, Argument] | None = None,
    prompts: Prompts | None = None,
    seed: int = 0,
    decoding: bool = False,
    classifier: bool = False,
) -> Loaded:
    """Returns a model, its tokenizer and an id of the weights. Raises UserError if there is none.

    With `decoding` the weights lie on the devices as a sampler wants them, still in the layout of
    training. `classifier` allows a model that scores classes in place of a vocabulary.
    """
    tokenizer = load_tokenizer_of(path, chat_template_args, prompts)
    if path in MODELS:
        config = config_of(path)
        dtypes = {"param_dtype": jnp.dtype(param_dtype), "compute_dtype": jnp.dtype(compute_dtype)}
        model = fresh(config, mesh, seed=seed, decoding=decoding, **dtypes)
        return Loaded(model, tokenizer, f"{path}@fresh-{seed}")
    directory = str(resolve(checkpoint_directory(path)))
    check_small_files(Path(directory))
    _check_weights(Path(directory), mesh)
    config = read_config(directory)
    if config.classifier and not classifier:
        raise UserError(
            f"expected a language model in {path}, found one that scores two classes in place of a "
            "vocabulary: train-classifier with head: scalar and judges of kind classifier read it"
        )
    model = load_hf(
        directory,
        tokenizer=tokenizer,
        dtype=param_dtype,
        compute_dtype=compute_dtype,
        attention=attention_of(config, mesh, compute_dtype),
        sharding_for=sharding_of(config, mesh, decoding=decoding),
    )
    if names := non_finite(model):
        raise UserError(
            f"{path} holds NaN or infinity in {', '.join(names)}: fetch or train it again"
        )
    return Loaded(model, tokenizer, f"{Path(path).name}@{_fingerprint(directory)}")


def _check_weights(directory: Path, mesh: Mesh) -> None:
    """Raises UserError if weights of an exported model differ from what was written. If the mesh
    spans several processes, each of them reads some of the files, as each loads a part of the
    model."""
    sums = read_checksums(directory)
    weights = sorted(name for name in sums if name.endswith(".safetensors"))
    share = slice(jax.process_index(), None, jax.process_count())
    check_files(directory, weights[share] if mesh.is_multi_process else weights, sums)


def load_for_training(
    path: str, *, lora: dict[str, Any] | None, mesh: Mesh, seed: int, **settings: Any
) -> Loaded:
    """Returns what `load_model` returns, with new adapters if `lora` has settings."""
    loaded = load_model(path, mesh=mesh, seed=seed, **settings)
    if lora is None:
        return loaded
    adapters = sharded_adapters(loaded.model, mesh, seed=seed, **lora)
    return dataclasses.replace(loaded, model=with_adapters(loaded.model, adapters))


def with_new_score(model: Transformer, mesh: Mesh, seed: int) -> Transformer:
    """Returns a classifier made of a language model, with initial weights for its score."""
    key = jax.random.fold_in(jax.random.key(seed), 2**31)  # other draws than the base's

    def create() -> ClassifierHead:
        return ClassifierHead(model.config, nnx.Rngs(key), model.embed[...].dtype)

    shardings = shardings_of(nnx.eval_shape(create), sharding_of(model.config, mesh))
    return model.as_classifier(jax.jit(create, out_shardings=shardings)())


def sharded_adapters(model: Transformer, mesh: Mesh, **settings: Any) -> nnx.Dict[Adapter]:
    """Returns new adapters (`make_adapters`), made on the devices of their matrices."""
    create = functools.partial(make_adapters, model.blocks, **settings)
    shardings = shardings_of(nnx.eval_shape(create), sharding_of(model.config, mesh))
    return jax.jit(create, out_shardings=shardings)()


def load_for_decoding(path: str, *, weights: Weights, **settings: Any) -> Loaded:
    """Returns what `load_model` returns, in the layout of the sampler only."""
    loaded = load_model(path, decoding=True, **settings)
    return dataclasses.replace(loaded, model=Decoder.from_transformer(loaded.model, weights))


def config_of(path: str) -> ModelConfig:
    """Returns the shape of the model that `load_model(path)` would load. For a hub id, only its
    config.json is fetched. Raises UserError if there is none, or no network to ask."""
    if path in MODELS:
        with tempfile.TemporaryDirectory() as directory:
            MODELS[path](directory)
            return read_config(directory)
    local = checkpoint_directory(path)
    if Path(local).is_dir():
        check_small_files(Path(local))
        return read_config(local)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return read_config(str(Path(hf_hub_download(path, "config.json")).parent))
    except (OSError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot fetch config.json of {path}: {reason} Without a network, name a directory "
            "that holds the model's config.json"
        ) from None


def sharding_of(config: ModelConfig, mesh: Mesh, *, decoding: bool = False) -> ShardingFor:
    return parameter_sharding(
        mesh, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, decoding=decoding
    )


def attention_of(config: ModelConfig, mesh: Mesh, compute_dtype: Any) -> Attention:
    return attention_on(
        mesh,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=jnp.dtype(compute_dtype),
    )


def fresh(
    config: ModelConfig,
    mesh: Mesh,
    *,
    seed: int,
    param_dtype: Any,
    compute_dtype: Any,
    decoding: bool = False,
) -> Transformer:
    """Returns a model with initial weights, made on the devices where they belong."""

    def create() -> Transformer:
        return Transformer(
            config,
            rngs=nnx.Rngs(seed),
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
            attention=attention_of(config, mesh, compute_dtype),
        )

    sharding_for = sharding_of(config, mesh, decoding=decoding)
    shardings = shardings_of(nnx.eval_shape(create), sharding_for)
    return jax.jit(create, out_shardings=shardings)()


def shardings_of(model: Any, sharding_for: ShardingFor) -> Any:
    """Returns the tree of a model, or of a part of it, with a sharding for each parameter."""
    found = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        sharding = sharding_for(variable.get_metadata("axes"), variable.get_value().shape)
        found.append((path, variable.replace(sharding)))
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(found))


def decoding_copy(model: Transformer, mesh: Mesh) -> Transformer:
    """Returns a copy of a model in training to decode with: in its compute type, adapters merged,
    on a mesh of the same devices, gathered over data and fsdp, split over tensor."""
    attention = attention_of(model.config, mesh, model.compute_dtype)
    model = replace(merge(model, model.compute_dtype), attention=attention)
    sharding_for = sharding_of(model.config, mesh, decoding=True)
    return jax.device_put(model, shardings_of(model, sharding_for))


def _fingerprint(directory: str) -> str:
    """Returns 12 hex digits of the ends of all weight files, which tell checkpoints apart."""
    digest = hashlib.sha256()
    for file in sorted(Path(directory).glob("*.safetensors")):
        size = file.stat().st_size
        with open(file, "rb") as stream:
            digest.update(stream.read(1 << 22))
            stream.seek(max(0, size - (1 << 22)))
            digest.update(stream.read())
        digest.update(str(size).encode())
    return digest.hexdigest()[:12]

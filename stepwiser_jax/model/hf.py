"""Hugging Face checkpoints in and out: safetensors, one file or sharded with an index.

The loader is strict: it refuses by name a tensor that is unknown, missing, doubled or of another
shape. A tensor is read slice by slice into arrays that are created sharded, and a model is written
file by file, so that it is never in memory twice. Weights are (out, in) as theirs, with the layers
stacked.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from stepwiser_jax.checksums import write_checksums
from stepwiser_jax.data.hub import local_directory
from stepwiser_jax.errors import UserError
from stepwiser_jax.model.attention import Attention
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.lora import Adapter, base_of
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.text.tokenizer import Tokenizer, unknown_ids

ShardingFor = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding]

READ_DTYPES = ("F32", "BF16", "F16")
_OF_MODEL = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_OF_BLOCK = {
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}


class Saveable(Protocol):
    """A tokenizer that can be saved."""

    def save(self, path: str) -> None: ...


def hf_names(path: tuple[Any, ...], num_layers: int) -> list[str]:
    """Returns the tensors of a checkpoint that make one parameter: one, or one per layer."""
    if path[0] == "blocks":
        return [f"model.layers.{i}.{_OF_BLOCK[path[1]]}" for i in range(num_layers)]
    if path[0] == "score":
        return [f"score.{path[1]}"]
    return [f"{_OF_MODEL[path[0]]}.weight"]


# --- import -------------------------------------------------------------------------------------


def read_config(path_or_id: str) -> ModelConfig:
    """Reads config.json. Raises UserError if it is missing or not supported."""
    file = resolve(path_or_id) / "config.json"
    if not file.is_file():
        raise UserError(f"expected a config.json in {path_or_id}, found none")
    return ModelConfig.from_hf(_read_object(file))


def _read_object(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises UserError if it holds something else."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON in UTF-8: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(fields).__name__}")
    return fields


def resolve(path_or_id: str) -> Path:
    """Returns a local directory, or the snapshot of a hub id."""
    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model"]
    return local_directory(path_or_id, patterns)


def load_hf(
    path_or_id: str,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: str = "float32",
    compute_dtype: str = "float32",
    attention: Attention | None = None,
    sharding_for: ShardingFor | None = None,
) -> Transformer:
    """Loads a checkpoint.

    Args:
        path_or_id: a local directory or a hub id.
        tokenizer: says which ids have a token; others are never sampled, and stand outside of the
            softmax (`ModelConfig.unknown_ids`). None: all have one.
        dtype: the type of the parameters.
        compute_dtype: the type of activations and of the operands of products.
        attention: see `Transformer`.
        sharding_for: (logical axes, shape) -> where a parameter lives; None: the default device.

    Raises:
        UserError: names the file or the tensor that is wrong.
    """
    directory = resolve(path_or_id)
    config = read_config(str(directory))
    if tokenizer is not None:
        unknown = unknown_ids(tokenizer, config.vocab_size)
        config = dataclasses.replace(config, unknown_ids=unknown)
    abstract = nnx.eval_shape(
        lambda: Transformer(
            config,
            rngs=nnx.Rngs(0),
            param_dtype=jnp.dtype(dtype),
            compute_dtype=jnp.dtype(compute_dtype),
            attention=attention,
        )
    )
    tensors = CheckpointTensors(directory)
    state = nnx.state(abstract)
    parameters = nnx.to_flat_state(state)
    names = {path: hf_names(path, config.num_layers) for path, _ in parameters}
    tensors.check_names({name for group in names.values() for name in group}, config)
    loaded = []
    for path, variable in parameters:
        shape, axes = variable.get_value().shape, variable.get_metadata("axes")
        sharding = sharding_for(axes, shape) if sharding_for else None
        loaded.append((path, variable.replace(tensors.read(names[path], shape, dtype, sharding))))
    return nnx.merge(nnx.graphdef(abstract), nnx.from_flat_state(loaded))


class CheckpointTensors:
    """The tensors of all safetensors files of a directory, read slice by slice."""

    def __init__(self, directory: Path):
        files = sorted(directory.glob("*.safetensors"))
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            weight_map = _read_object(index).get("weight_map")
            if not isinstance(weight_map, dict) or not _are_names(weight_map.values()):
                raise UserError(f"{index}: expected a weight_map from tensors to files, found none")
            files = sorted(directory / name for name in set(weight_map.values()))
        if not files:
            raise UserError(f"expected *.safetensors in {directory}, found none")
        self.directory = directory
        self._handles: dict[str, Any] = {}
        for file in files:
            handle = _open(file)
            for name in handle.keys():  # noqa: SIM118 - a handle is no mapping
                if name in self._handles:
                    raise UserError(f"{directory}: tensor {name} is in two files")
                self._handles[name] = handle

    def check_names(self, expected: set[str], config: ModelConfig) -> None:
        """Raises UserError if a tensor is missing or unknown, or a tied head not the embedding."""
        found = set(self._handles)
        if config.tie_embeddings and "lm_head.weight" in found:
            head = self._handles["lm_head.weight"].get_tensor("lm_head.weight")
            name = "model.embed_tokens.weight"
            if name not in found or not np.array_equal(head, self._handles[name].get_tensor(name)):
                raise UserError(
                    f"{self.directory}: tie_word_embeddings is true, but lm_head.weight differs "
                    "from model.embed_tokens.weight"
                )
            found.remove("lm_head.weight")
        # transformers 4 used to store this buffer; it is computed from the config.
        found = {name for name in found if not name.endswith("rotary_emb.inv_freq")}
        for problem, names in (("lacks", expected - found), ("has unknown", found - expected)):
            if names:
                shown = ", ".join(sorted(names)[:5])
                raise UserError(
                    f"{self.directory} {problem} {len(names)} tensors of a {config.model_type} "
                    f"model: {shown}{', ...' if len(names) > 5 else ''}"
                )

    def read(
        self,
        names: list[str],
        shape: tuple[int, ...],
        dtype: str,
        sharding: jax.sharding.Sharding | None,
    ) -> jax.Array:
        """Returns a parameter: one tensor, or a stack of one per layer."""
        stacked = len(names) > 1 or names[0].startswith("model.layers.")
        slices = [self._handles[name].get_slice(name) for name in names]
        for name, view in zip(names, slices, strict=True):
            expected = list(shape[1:] if stacked else shape)
            if view.get_shape() != expected:
                raise UserError(
                    f"{self.directory}: tensor {name} has shape {view.get_shape()}, config.json "
                    f"asks for {expected}"
                )
            if view.get_dtype() not in READ_DTYPES:
                raise UserError(
                    f"{self.directory}: tensor {name} has the type {view.get_dtype()}, expected "
                    f"one of {READ_DTYPES}"
                )

        def read_slice(index: Any) -> np.ndarray:
            if not stacked:
                return np.asarray(slices[0][index]).astype(np.dtype(dtype))
            layers = range(len(slices))[index[0]]
            sizes = [len(range(size)[part]) for size, part in zip(shape, index, strict=True)]
            whole = np.empty(sizes, np.dtype(dtype))  # np.stack would hold all parts twice
            for row, layer in zip(whole, layers, strict=True):
                row[...] = slices[layer][index[1:]]
            return whole

        if sharding is None:
            return jnp.asarray(read_slice((slice(None),) * len(shape)))
        # A host holds what one parameter was read into, never that of two.
        return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, read_slice))


def _are_names(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def non_finite(model: Any) -> list[str]:
    """Returns the names of arrays that hold NaN or infinity. All processes must call this."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(model)]
    return [
        name for name, good in zip(names, np.asarray(_are_finite(model)), strict=True) if not good
    ]


@jax.jit
def _are_finite(model: Any) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(model)])


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is missing, truncated or no safetensors file ({error}): fetch it again"
        ) from None


# --- export -------------------------------------------------------------------------------------


def save_hf(
    model: Transformer,
    tokenizer: Saveable | None,
    path: str,
    dtype: str | None = None,
    *,
    max_shard_bytes: int = 5 * 2**30,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes safetensors (with an index if there are several), config.json, the tokenizer, other
    `texts` by the names of their files, and the checksums of all of them (`checksums`). Weights are
    stored in `dtype`, by default in their own.

    The directory appears whole or not at all; one that exists is replaced. All processes that hold
    a part of the model must call this; the primary one writes. A host holds one shard at a time.
    """
    with _written_whole(Path(path)) as directory:
        tensors = tensors_by_name(model)
        shards = _split_into_shards(tensors, max_shard_bytes)
        for file, names in shards.filename_to_tensors.items():
            arrays = {name: _to_host(_cast(tensors[name](), dtype)) for name in names}
            if directory is not None:
                save_file(arrays, directory / file, metadata={"format": "pt"})
            del arrays  # before those of the next file are gathered
        if directory is None:
            return
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            text = json.dumps(index, indent=2) + "\n"
            (directory / "model.safetensors.index.json").write_text(text)
        dtype = dtype or str(model.embed[...].dtype)
        config = model.config.to_hf() | {"torch_dtype": dtype, "dtype": dtype}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(str(directory))
        for name, text in (texts or {}).items():
            (directory / name).write_text(text, encoding="utf-8")


def save_adapters(
    model: Transformer, tokenizer: Saveable, path: str, *, base: str, texts: Mapping[str, str]
) -> None:
    """Writes the adapters of a model alone, in the names and the form of peft, which peft and vLLM
    load onto the model at `base`. `texts` are as those of `save_hf`. One process may call this."""
    arrays: dict[str, np.ndarray] = {}
    for of_block, adapter in model.adapters.items():
        a_L, b_L = _to_host(adapter.a[...]), _to_host(adapter.b[...])
        names = hf_names(("blocks", of_block), model.config.num_layers)
        for name, a, b in zip(names, a_L, b_L, strict=True):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            arrays[f"{module}.lora_A.weight"] = np.ascontiguousarray(a)
            arrays[f"{module}.lora_B.weight"] = np.ascontiguousarray(b)
    adapter = next(iter(model.adapters.values()))  # all have the same rank and scale
    rank = adapter.a[...].shape[1]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": adapter.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-3] for name in arrays}),
        "inference_mode": True,
    }
    with _written_whole(Path(path)) as directory:
        assert directory is not None
        save_file(arrays, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(config, indent=2) + "\n"
        (directory / "adapter_config.json").write_text(text)
        tokenizer.save(str(directory))
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")


@contextmanager
def _written_whole(target: Path) -> Iterator[Path | None]:
    """Yields a directory that takes the place of `target` at the end, with checksums, if nothing
    was raised; None in all processes but the primary one."""
    if jax.process_index() != 0:
        yield None
        return
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    write_checksums(temporary)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _cast(array: jax.Array, dtype: str | None) -> jax.Array:
    return array if dtype is None else array.astype(dtype)


def tensors_by_name(model: Transformer) -> dict[str, Callable[[], jax.Array]]:
    """Returns, by its Hugging Face name, what makes each tensor: of one layer, adapters merged."""
    tensors: dict[str, Callable[[], jax.Array]] = {}
    for path, variable in nnx.to_flat_state(nnx.state(base_of(model))):
        names = hf_names(path, model.config.num_layers)
        if path[0] == "blocks":
            stacked = variable.get_value(), model.adapters.get(str(path[1]))
            for i, name in enumerate(names):
                tensors[name] = functools.partial(_tensor_of_layer, *stacked, i)
        else:
            tensors[names[0]] = variable.get_value
    return tensors


@jax.jit
def _tensor_of_layer(value: jax.Array, adapter: Adapter | None, layer: int) -> jax.Array:
    value, adapter = jax.tree.map(lambda x_L: x_L[layer], (value, adapter))
    return value if adapter is None else adapter.merge(value).astype(value.dtype)


def _split_into_shards(tensors: dict[str, Callable[[], jax.Array]], max_bytes: int) -> Any:
    """Returns the `StateDictSplit` of huggingface_hub."""
    from huggingface_hub import split_state_dict_into_shards_factory

    return split_state_dict_into_shards_factory(
        {name: jax.eval_shape(make) for name, make in tensors.items()},
        get_storage_size=lambda leaf: math.prod(leaf.shape) * leaf.dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )


def _to_host(array: jax.Array) -> np.ndarray:
    """Returns the whole array, in every process."""
    if not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.ascontiguousarray(array)

"""Hugging Face checkpoints in and out: safetensors, one file or sharded with an index.

Strict both ways: a tensor that is unknown, missing, doubled or of another shape is refused by name.
Streamed both ways: a tensor is read slice by slice into arrays that are created sharded, and
written shard file by shard file; the model is never in memory twice. Our layout is theirs,
(out, in), with the layers stacked.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open

from stepwiser_jax.checksums import write_checksums
from stepwiser_jax.data.hub import local_directory
from stepwiser_jax.errors import UserError
from stepwiser_jax.model.attention import Attention
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.lora import Adapter, base_of
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.text.tokenizer import Tokenizer, unknown_ids

ShardingFor = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding]

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
    """What is asked of a tokenizer here."""

    def save(self, path: str) -> None: ...


def hf_names(path: tuple[Any, ...], num_layers: int) -> list[str]:
    """The tensors of a checkpoint that make one of our parameters: one, or one per layer."""
    if path[0] == "blocks":
        return [f"model.layers.{i}.{_OF_BLOCK[path[1]]}" for i in range(num_layers)]
    if path[0] == "score":
        return [f"score.{path[1]}"]
    return [f"{_OF_MODEL[path[0]]}.weight"]


# --- import -------------------------------------------------------------------------------------


def read_config(path_or_id: str) -> ModelConfig:
    """Raises UserError for a missing or unsupported config.json."""
    file = resolve(path_or_id) / "config.json"
    if not file.is_file():
        raise UserError(f"expected a config.json in {path_or_id}, found none")
    return ModelConfig.from_hf(_read_object(file))


def _read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where it holds something else."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON in UTF-8: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(fields).__name__}")
    return fields


def resolve(path_or_id: str) -> Path:
    """A local directory, or a hub id's snapshot."""
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
    """A checkpoint's model with parameters of `dtype`.

    `tokenizer` says which ids have a token: the others are never sampled, and stand outside of the
    softmax (`ModelConfig.unknown_ids`). None: all count.
    `sharding_for(axes, shape)` says where each parameter lives; None: on the default device.
    Raises UserError naming the file or the tensor that is wrong.
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
    """The safetensors files of a directory as one table of tensors, read slice by slice."""

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
        """Raises UserError for missing or unknown tensors; a tied head must equal the embedding."""
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
        """One parameter: a tensor, or the stack of one per layer."""
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
            whole = np.empty(sizes, np.dtype(dtype))  # no second copy, as a stack of parts would be
            for row, layer in zip(whole, layers, strict=True):
                row[...] = slices[layer][index[1:]]
            return whole

        if sharding is None:
            return jnp.asarray(read_slice((slice(None),) * len(shape)))
        return jax.make_array_from_callback(shape, sharding, read_slice)


def _are_names(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def non_finite(model: Any) -> list[str]:
    """Names of the arrays of a model that hold NaN or infinity. All processes must call this."""
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
    *,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write safetensors (with an index where they are several), config.json, the tokenizer, and the
    checksums of all of them (`checksums`).

    The directory appears whole or not at all; one that is there is replaced. Where the model is on
    the devices of several processes, all must call this, and the first one writes.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    if jax.process_index() > 0:
        for _, value in named_tensors(model):
            _to_host(value)
        return
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weight_map, total = _write_shards(model, temporary, max_shard_bytes)
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (temporary / "model.safetensors.index.json").write_text(text)
    dtype = str(model.embed[...].dtype)
    config = model.config.to_hf() | {"torch_dtype": dtype, "dtype": dtype}
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(str(temporary))
    write_checksums(temporary)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def named_tensors(model: Transformer) -> Iterator[tuple[str, jax.Array]]:
    """(Hugging Face name, array) one layer's tensor at a time, adapters merged."""
    for path, variable in nnx.to_flat_state(nnx.state(base_of(model))):
        names = hf_names(path, model.config.num_layers)
        value = variable.get_value()
        if path[0] != "blocks":
            yield names[0], value
        else:
            adapter = model.adapters.get(str(path[1]))
            yield from ((name, _of_layer(value, adapter, i)) for i, name in enumerate(names))


@jax.jit
def _of_layer(value: jax.Array, adapter: Adapter | None, layer: int) -> jax.Array:
    value, adapter = jax.tree.map(lambda x_L: x_L[layer], (value, adapter))
    return value if adapter is None else adapter.merge(value).astype(value.dtype)


def tensor_shapes(model: Transformer) -> Iterator[tuple[str, jax.ShapeDtypeStruct]]:
    """(Hugging Face name, shape), in the order of `named_tensors`."""
    for path, variable in nnx.to_flat_state(nnx.state(base_of(model))):
        value = variable.get_value()
        shape = value.shape[1:] if path[0] == "blocks" else value.shape
        leaf = jax.ShapeDtypeStruct(shape, value.dtype)
        yield from ((name, leaf) for name in hf_names(path, model.config.num_layers))


def _to_host(array: jax.Array) -> np.ndarray:
    """The whole array, in every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


DTYPES = {"float32": "F32", "bfloat16": "BF16"}
"""What is written, and how safetensors spells it."""
READ_DTYPES = (*DTYPES.values(), "F16")


def _write_shards(
    model: Transformer, directory: Path, max_shard_bytes: int
) -> tuple[dict[str, str], int]:
    """Which file each tensor is in, and the bytes of all.

    One tensor is in memory at a time: safetensors' own writer wants those of a file together, and
    copies them. The format: the length of a header (64 bits), the header in JSON, the bytes.
    """
    shapes = dict(tensor_shapes(model))
    sizes = {name: math.prod(leaf.shape) * leaf.dtype.itemsize for name, leaf in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    tensors, weight_map = named_tensors(model), {}
    for i, names in enumerate(shards):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        with open(directory / file, "wb") as stream:
            stream.write(_header({name: shapes[name] for name in names}))
            for name in names:
                found, value = next(tensors)
                assert found == name
                stream.write(np.ascontiguousarray(_to_host(value)).view(np.uint8).data)
        weight_map |= dict.fromkeys(names, file)
    return weight_map, sum(sizes.values())


def _header(shapes: dict[str, jax.ShapeDtypeStruct]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, leaf in shapes.items():
        begin, end = end, end + math.prod(leaf.shape) * leaf.dtype.itemsize
        dtype = DTYPES[str(leaf.dtype)]
        header[name] = {"dtype": dtype, "shape": list(leaf.shape), "data_offsets": [begin, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content

"""llama.cpp as a side of rollout.py: `--rival llama.cpp=VENV/bin/python`.

It is compiled for this machine, which takes some 10 minutes of one core:

    python3.11 -m venv VENV
    export CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
    VENV/bin/pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36
    VENV/bin/pip install gguf safetensors ml_dtypes

It decodes batches through the low-level interface, with a sampler per sequence. The weights are
written to a temporary GGUF file first. Prefixes that several rows continue are read once, and their
cells are shared (`llama_memory_seq_cp`, a unified cache), as in llama.cpp's example of parallel
decoding.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as llama
import ml_dtypes  # noqa: F401 - teaches numpy bfloat16
import numpy as np
from common import requests, serve
from safetensors.numpy import load_file

TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
AT_ONCE = 2048
"""Tokens of one call of llama_decode."""


def write_gguf(model_dir: str, file: str, kind: str) -> None:
    """Writes the weights of a Hugging Face directory without a vocabulary: it takes token ids."""
    fields = json.loads((Path(model_dir) / "config.json").read_text())
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    tensors = load_file(Path(model_dir) / "model.safetensors")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_freq_base((fields.get("rope_parameters") or fields)["rope_theta"])
    writer.add_rope_dimension_count(fields["hidden_size"] // heads)
    writer.add_vocab_size(fields["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, source: str) -> None:
        weight = tensors[source].astype(np.float32)
        if name.endswith(("attn_q.weight", "attn_k.weight")):  # it rotates neighbours, not halves
            count = heads if "attn_q" in name else kv_heads
            split = weight.reshape(count, 2, -1, weight.shape[-1])
            weight = split.swapaxes(1, 2).reshape(weight.shape)
        if weight.ndim == 1 or kind == "f32":
            writer.add_tensor(name, weight)
        else:
            raw = gguf.GGMLQuantizationType[kind.upper()]
            writer.add_tensor(name, gguf.quants.quantize(weight, raw), raw_dtype=raw)

    add("token_embd.weight", "model.embed_tokens.weight")
    add("output_norm.weight", "model.norm.weight")
    for layer in range(fields["num_hidden_layers"]):
        for source, name in TENSORS.items():
            add(f"blk.{layer}.{name}.weight", f"model.layers.{layer}.{source}.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(model_dir: str, kind: str) -> Any:
    with tempfile.TemporaryDirectory() as scratch:
        file = f"{scratch}/model.gguf"
        write_gguf(model_dir, file, kind)
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_mmap = False
        model = llama.llama_model_load_from_file(file.encode(), params)
    assert model
    return model


class Context:
    """A cache of `cells` tokens for several sequences, with a sampler for each."""

    def __init__(self, model: Any, cells: int, sequences: int, unified: bool):
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = cells, sequences, unified
        params.n_batch = AT_ONCE
        params.n_threads = params.n_threads_batch = 1
        self.context = llama.llama_init_from_model(model, params)
        assert self.context
        self.memory = llama.llama_get_memory(self.context)
        self.batch = llama.llama_batch_init(AT_ONCE, 0, 1)
        self.samplers = []
        for sequence in range(sequences):
            chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
            llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_temp(1.0))
            llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_dist(sequence))
            self.samplers.append(chain)

    def decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Decodes tokens given as (token, position, sequence, are its logits wanted)."""
        for i, (token, position, sequence, wanted) in enumerate(entries):
            self.batch.token[i], self.batch.pos[i] = token, position
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
            self.batch.logits[i] = wanted
        self.batch.n_tokens = len(entries)
        status = llama.llama_decode(self.context, self.batch)
        assert status == 0, status

    def read(self, ids: list[int], start: int, sequence: int) -> None:
        last = len(ids) - 1
        entries = [(token, start + i, sequence, i == last) for i, token in enumerate(ids)]
        for i in range(0, len(ids), AT_ONCE):
            self.decode(entries[i : i + AT_ONCE])

    def share(self, source: int, target: int, length: int) -> None:
        llama.llama_memory_seq_cp(self.memory, source, target, 0, length)

    def sample(self, sequence: int, place: int) -> int:
        return llama.llama_sampler_sample(self.samplers[sequence], self.context, place)

    def free(self) -> None:
        llama.llama_batch_free(self.batch)
        for chain in self.samplers:
            llama.llama_sampler_free(chain)
        llama.llama_free(self.context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--type", choices=("f32", "bf16", "q8_0"), default="bf16")
    args = parser.parse_args()
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model = load(args.model, args.type)

    def run(name: str) -> dict[str, Any]:
        some, new = requests(name)
        rows = sum(len(cuts) * samples for _, cuts, samples in some)
        shared = rows > len(some)
        cells = sum(max(cuts) for _, cuts, _ in some) + rows * new
        context = Context(model, cells, rows + shared, unified=shared)
        token, position = [0] * rows, [0] * rows
        row = 0
        for ids, cuts, samples in some:
            trunk, read = rows if shared else row, 0
            if shared:
                llama.llama_memory_seq_rm(context.memory, trunk, -1, -1)
            for cut in cuts:
                context.read(ids[read:cut], read, trunk)
                read = cut
                for _ in range(samples):
                    if shared:
                        context.share(trunk, row, cut)
                    token[row], position[row] = context.sample(row, -1), cut
                    row += 1
        for i in range(new - 1):
            context.decode([(token[r], position[r] + i, r, True) for r in range(rows)])
            token = [context.sample(r, r) for r in range(rows)]
        context.free()
        return {}

    serve(run, warm_up=False)


if __name__ == "__main__":
    main()

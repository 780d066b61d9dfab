"""Tunix's own sampler as a side of rollout.py: `--rival tunix=VENV/bin/python`.

    python3.11 -m venv VENV
    VENV/bin/pip install jax==0.10.2 google-tunix==0.1.7 safetensors

It is Tunix's Llama3 with the weights of SmolLM2. It rotates with another base (1e6), so the text is
not right, which does not change its speed. It shares no prefixes: a prompt is given once per
sample. A call reads its prompts with logits at every position, so `mc` is a call per cut, with
prompts padded to the longest (one compilation).
"""

from __future__ import annotations

import argparse
import json
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from common import requests, serve
from tunix.generate import sampler
from tunix.models.llama3 import model, params


class Ids:
    """A tokenizer whose texts are token ids with commas between them."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(token) for token in text.split(",")]

    def decode(self, ids: Any, **_: Any) -> str:
        return ""

    def bos_id(self) -> int:
        return 0  # no token is put before the text

    def eos_id(self) -> int:
        return 2

    def pad_id(self) -> int:
        return 49151


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32", help="of weights and caches")
    args = parser.parse_args()
    fields = json.loads((Path(args.model) / "config.json").read_text())
    config = model.ModelConfig(
        num_layers=fields["num_hidden_layers"],
        vocab_size=fields["vocab_size"],
        embed_dim=fields["hidden_size"],
        hidden_dim=fields["intermediate_size"],
        num_heads=fields["num_attention_heads"],
        head_dim=fields["hidden_size"] // fields["num_attention_heads"],
        num_kv_heads=fields["num_key_value_heads"],
        rope_theta=1_000_000,
        norm_eps=fields["rms_norm_eps"],
        weight_tying=True,
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    llama = params.create_model_from_safe_tensors(
        args.model, config, mesh, dtype=jnp.dtype(args.dtype)
    )

    def run(name: str) -> dict[str, Any]:
        some, new = requests(name)
        longest = max(max(cuts) for _, cuts, _ in some)
        calls = [[ids[:cut]] * samples for ids, cuts, samples in some for cut in cuts]
        if name != "mc":
            calls = [list(chain.from_iterable(calls))]
        cache = sampler.CacheConfig(
            cache_size=longest + new,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        sample = samplers.setdefault(longest + new, sampler.Sampler(llama, Ids(), cache))
        for prompts in calls:
            output = sample(
                input_strings=[",".join(map(str, prompt)) for prompt in prompts],
                max_generation_steps=new,
                max_prompt_length=longest,
                temperature=1.0,
                top_p=1.0,
                eos_tokens=[-1],
                seed=0,
            )
            assert [len(tokens) for tokens in output.tokens] == [new] * len(prompts)
        return {}

    samplers: dict[int, Any] = {}
    serve(run)


if __name__ == "__main__":
    main()

"""A checkpoint onto a mesh and back costs a host little more memory than its share."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, sys, threading, time
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax
from flax import nnx
from stepwiser_jax.model.config import ModelConfig
from stepwiser_jax.model.hf import load_hf, save_hf
from stepwiser_jax.distributed.loading import fresh, sharding_of
from stepwiser_jax.distributed.mesh import make_mesh

def anonymous():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def risen(function):
    start, most, over = anonymous(), [0], threading.Event()
    def watch():
        while not over.wait(0.002):
            most[0] = max(most[0], anonymous() - start)
    thread = threading.Thread(target=watch)
    thread.start()
    result = function()
    jax.block_until_ready(jax.tree.leaves(result))
    over.set()
    thread.join()
    return max(most[0], anonymous() - start), result

directory = sys.argv[1]
config = ModelConfig.from_hf({
    "model_type": "qwen2", "vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 4096,
    "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 12,
    "max_position_embeddings": 512, "tie_word_embeddings": True,
})
mesh = make_mesh(2, 2, 2)
if sys.argv[2] == "write":
    model = fresh(config, mesh, seed=0, param_dtype="float32", compute_dtype="float32")
    save_hf(model, None, directory, max_shard_bytes=1 << 28)
    sys.exit()
load = lambda: load_hf(directory, sharding_for=sharding_of(config, mesh))
rose, model = risen(load)
held = sum(s.data.nbytes for x in jax.tree.leaves(model) for s in x.addressable_shards)
whole = sum(x.nbytes for x in jax.tree.leaves(model))
exported, _ = risen(lambda: save_hf(model, None, directory + "-again", max_shard_bytes=1 << 28))
print(json.dumps({"rose": rose, "held": held, "whole": whole, "exported": exported}))
"""


@pytest.mark.slow
def test_loading_and_exporting_a_gibibyte(tmp_path, capsys):
    def run(mode):
        words = [sys.executable, "-c", SCRIPT, str(tmp_path / "model"), mode]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    run("write")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) >= 4
    found = json.loads(run("load").splitlines()[-1])
    with capsys.disabled():
        print({name: f"{size / 2**20:.0f} MiB" for name, size in found.items()})
    # Replicas over `data` are devices of this host too: it holds two of everything.
    assert found["held"] == pytest.approx(2 * found["whole"], rel=0.02)
    assert found["whole"] > 0.8 * 2**30
    assert found["rose"] < 1.3 * found["held"]
    assert found["exported"] < 0.3 * found["whole"] + 2**28

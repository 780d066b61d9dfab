"""8 fake CPU devices, strict shapes, and small things that many tests need."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

# What one test has compiled, none compiles again: neither another worker's nor a process that a
# test starts, nor those of the next command, if the environment names a directory.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from devices import xla_flags

os.environ["XLA_FLAGS"] = xla_flags(devices=8)

import hypothesis
import jax
import pytest
from flax import nnx

jax.config.update("jax_numpy_rank_promotion", "raise")

import shapes

shapes.install()

from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.tasks import arithmetic
from stepwiser_jax.text.tokenizer import load_tokenizer
from tiny import tiny_config

RUNS = ("pipeline", "thinkprm", "unknown_ids", "hosts", "kill")
"""The files of tests/e2e that begin with the runs of the smoke configs."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests that share compiled programs, or the runs of the smoke configs, share a worker. Slow
    tests that start processes do not share it: all together would take longer than the rest.

    (`--dist loadgroup` groups nothing with pytest 9.2 and pytest-xdist 3.8.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            name = file.removeprefix("tests/e2e/test_").removesuffix(".py")
            starts_processes = name in ("hosts", "kill") and config.option.markexpr == "slow"
            return "runs" if name in RUNS and not starts_processes else file

    # In their order, in which those that take longest come first.
    config.option.loadscopereorder = False
    return ByFile(config, log)


# The same examples in every run, and no time limit, since machines may be busy.
hypothesis.settings.register_profile("tests", deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser):
    parser.addoption("--model", help="a pretrained checkpoint, for tests/numerics/test_real_model")
    parser.addoption("--problems", help="a file of real problems, for the same test")


@pytest.fixture
def strict_dtypes():
    """Forbids silent promotion: for tests of our own arithmetic (optax fails under it)."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def tiny_model() -> Transformer:
    return Transformer(tiny_config(), rngs=nnx.Rngs(0))


@pytest.fixture
def quickstart(tmp_path):
    """The configs that the quickstart leaves in its run directories, by the paths of these."""
    from stepwiser_jax.commands.quickstart import recipe
    from stepwiser_jax.config import STAGE_CONFIGS
    from stepwiser_jax.config_files import dump_config, validate

    files = {}
    for name, stage, tree in recipe(Path("quickstart"), 0):
        files[f"quickstart/{name}/config.yaml"] = tmp_path / f"{name}.yaml"
        config = validate(STAGE_CONFIGS[stage], tree, name)
        files[f"quickstart/{name}/config.yaml"].write_text(dump_config(config))
    return files


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory):
    """The embedded task's word-level tokenizer."""
    directory = tmp_path_factory.mktemp("word")
    arithmetic.write_tokenizer(directory)
    return load_tokenizer(str(directory))


@pytest.fixture(scope="session")
def bpe_directory(tmp_path_factory):
    """A byte-level BPE with a chat template, in which the closing tag is several tokens and its
    last token can hold the line break behind it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    lines = ["a step >\n", "of thought >\n", "chunk one", "</", "the answer is 3.\n\n", " >\n"] * 20
    backend.train_from_iterator(lines, trainer)
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
    directory = tmp_path_factory.mktemp("bpe")
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def bpe_tokenizer(bpe_directory):
    return load_tokenizer(bpe_directory)

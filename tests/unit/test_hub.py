"""Tokenizers by hub id, from a cache of huggingface_hub that is written down here, offline."""

import json
import shutil
import sys

import pytest

from stepwiser_jax.config import ChunkSolutions
from stepwiser_jax.errors import UserError
from stepwiser_jax.judges.check import PACKAGED, Checker
from stepwiser_jax.judges.settings import judge_settings
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.stages.chunk_solutions import make_proposer
from stepwiser_jax.text.tokenizer import load_tokenizer

ID = "owner/model"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The directory that holds the files of `owner/model`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    return repository / "snapshots" / "0123abc"


@pytest.fixture
def two_ends(cache, bpe_directory):
    """A tokenizer whose second end token stands in generation_config.json alone, as Qwen2.5's."""
    shutil.copytree(bpe_directory, cache)
    (cache / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))


@pytest.mark.usefixtures("two_ends")
@pytest.mark.parametrize("load", [load_tokenizer, load_tokenizer_of])
def test_a_hub_ids_tokenizer_has_all_end_tokens(load):
    assert load(ID).eos_ids == (1, 7)


@pytest.mark.usefixtures("two_ends")
def test_a_servers_tokenizer_has_all_end_tokens():
    """What a server's answer may end with, and it is told."""
    server = {"url": "http://h/v1", "model": "m", "tokenizer": ID, "context": 512}
    server |= {"kind": "server", "sampling": {"max_new_tokens": 8}}
    config = {"rollouts": "r", "tokenizer": "t", "teacher": server}
    teacher = make_proposer(ChunkSolutions.model_validate(config), session=None)
    assert teacher.params.stop_ids == (1, 7)


def test_a_hub_id_of_a_sentencepiece_model_is_known(cache, monkeypatch):
    cache.mkdir(parents=True)
    piece = bytes([10, 1]) + b"a"  # a model of one piece and no special tokens
    (cache / "tokenizer.model").write_bytes(bytes([10, len(piece)]) + piece)
    with pytest.raises(UserError, match=r"tokenizer of .*0123abc defines no end token"):
        load_tokenizer(ID)
    eos = {"eos_token": "a"}
    (cache / "tokenizer_config.json").write_text(json.dumps(eos))
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match=r"0123abc/tokenizer\.model is a SentencePiece model"):
        load_tokenizer(ID)


def test_a_hub_id_of_an_exported_judge_is_asked_as_it_was_trained(cache):
    shutil.copytree(PACKAGED, cache)
    check = Checker.load(ID)
    assert check("start 2 ; * 6 - 1 ?", ["2 * 6 = 7 ; 7 - 1 = 6"]).first_error == 0
    (cache / "stepwiser_judge.yaml").unlink()
    with pytest.raises(UserError, match=f"^{ID} is a model that does not say how it is asked"):
        judge_settings(ID)
    with pytest.raises(UserError, match=r"found nothing at owner/modle .*, and on the hub"):
        judge_settings("owner/modle")


def test_a_hub_id_that_is_not_there_is_one_error(cache):
    for name in ("owner/other", "no such thing"):
        with pytest.raises(UserError, match=f"found nothing at {name} .*, and on the hub"):
            load_tokenizer(name)
    cache.mkdir(parents=True)
    with pytest.raises(UserError, match=r"expected a tokenizer\.json or a tokenizer\.model in"):
        load_tokenizer(ID)

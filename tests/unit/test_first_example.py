"""What a training shows of its first example."""

import numpy as np
import pytest

from stepwiser_jax.config import Sft
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.training.batches import Document
from stepwiser_jax.training.first_example import FILE, show_first_document, show_first_group
from tiny import rollout_group


class Letters:
    """A tokenizer whose ids are characters."""

    def decode(self, ids):
        return "".join(map(chr, ids))


def document(text, learned, targets=None):
    mask = np.array([x == "^" for x in learned])
    tokens = np.array([ord(x) for x in text], np.int32)
    return Document(tokens, mask, targets)


@pytest.fixture
def directory(tmp_path):
    settings = {"model": {"path": "arithmetic"}, "examples": {"source": "x"}, "steps": 1}
    settings |= {"training": {"optimizer": {"learning_rate": 1e-3}}}
    config = Sft.model_validate(settings | {"batch_size": 1, "max_length": 8})
    return RunDirectory(tmp_path / "run", "sft", config)


def test_what_is_learned_is_marked(directory, capsys):
    show_first_document(directory, document("ask:answer.", "    ^^^^^^^"), Letters())
    found = (directory.path / FILE).read_text()
    assert found == (
        "the first example: 11 tokens, 7 of them learned (between « and »)\n\nask:«answer.»\n"
    )
    assert "sft: the first example: 11 tokens" in capsys.readouterr().err
    show_first_document(directory, document("other", "^^^^^"), Letters())
    assert (directory.path / FILE).read_text() == found, "a run that resumes shows nothing else"
    assert "other" not in capsys.readouterr().err


def test_targets_of_a_classifier_stand_after_their_chunks(directory):
    targets = np.array([0, 0, 0.25, 0, 1], np.float32)
    show_first_document(directory, document("ab+c+", "  ^ ^", targets), Letters())
    assert "ab«+»[0.25]c«+»[1]\n" in (directory.path / FILE).read_text()


def test_a_group_is_shown_with_its_rewards_and_without_control_characters(directory, capsys):
    ids = [[ord(x) for x in text] for text in ("ask", "yes\x1b[2J", "no")]
    group = rollout_group(ids[0], ids[1:], rewards=(1.0, 0.0))
    show_first_group(directory, group, Letters())
    text = (directory.path / FILE).read_text()
    assert text.endswith("ask\n«yes\ufffd[2J» [1]\n«no» [0]\n")
    assert "\x1b[2J" not in capsys.readouterr().err


def test_a_long_example_is_cut_on_the_screen_alone(directory, capsys):
    text = "a" * 2000 + "b" * 2000
    show_first_document(directory, document(text, "^" * 4000), Letters())
    shown = capsys.readouterr().err
    assert "[... 1002 characters, see " in shown and "a" * 1600 not in shown
    assert text in (directory.path / FILE).read_text()

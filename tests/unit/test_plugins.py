"""Functions by name: what is found, and what a user is told if it is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stepwiser_jax.errors import UserError
from stepwiser_jax.plugins import load


def shortness(text: str, *, per_word: float = 1.0) -> float:
    return -per_word * len(text.split())


KNOWN = {"shortness": shortness}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of the user's, which is not on Python's path."""
    (tmp_path / "own_plugin.py").write_text(
        "limit = 3\n\ndef count(text, *, scale=1.0):\n    return scale * len(text)\n"
    )
    (tmp_path / "broken_plugin.py").write_text("import no_such_dependency\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


def test_a_short_name_finds_a_function_of_ours_and_binds_its_arguments():
    assert load("shortness", "a reward", KNOWN) is shortness
    assert load("shortness", "a reward", KNOWN, {"per_word": 2.0})("one two") == -4.0


def test_a_dotted_name_finds_a_function_in_the_working_directory(own: Path):
    assert load("own_plugin:count", "a reward")("four") == 4.0
    assert load("own_plugin:count", "a reward", KNOWN, {"scale": 0.5})("four") == 2.0


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("shortnes", {}, "expected a reward: shortness, or module:function, .*did you mean"),
        ("own_plugin", {}, "or module:function, found 'own_plugin'"),
        ("no_such_plugin:count", {}, "there is no module 'no_such_plugin': install"),
        ("own_plugin.deep:count", {}, "there is no module 'own_plugin.deep'"),
        ("own_plugin:cuont", {}, "own_plugin has no 'cuont'; did you mean 'count'"),
        ("own_plugin:limit", {}, "found 'own_plugin:limit', which cannot be called"),
        ("own_plugin:count", {"scael": 1}, "takes no argument 'scael': expected some of text, sc"),
    ],
)
def test_a_wrong_name_is_an_error_that_says_what_to_change(
    own: Path, name: str, arguments: dict[str, float], message: str
):
    with pytest.raises(UserError, match=message):
        load(name, "a reward", KNOWN, arguments)


def test_an_error_inside_the_module_stays_what_it_is(own: Path):
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load("broken_plugin:count", "a reward")

"""What the pages of docs/ say of the code: messages, functions, commands, examples."""

import ast
import doctest
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer

import stepwiser_jax
from stepwiser_jax.__main__ import app
from stepwiser_jax.config_files import RENAMED_COMMANDS, RENAMED_SETTINGS, load_config

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LIBRARY = ROOT / "stepwiser_jax"


def texts_of_the_code() -> list[str]:
    """Every text in the library, with … in place of what is filled in."""
    texts = []
    for file in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_every_message_of_the_troubleshooting_page_stands_in_the_code():
    texts = texts_of_the_code()
    messages = re.findall(r"^### `(.*)`$", (DOCS / "troubleshooting.md").read_text(), re.M)
    messages.remove("RESOURCE_EXHAUSTED: Out of memory")  # of XLA, as the page says
    assert len(messages) >= 15
    for message in messages:
        pieces = [re.escape(piece) for piece in message.split("…")]
        assert max(map(len, pieces)) > 10, message
        assert any(re.search(".*".join(pieces), text, re.S) for text in texts), message


def test_every_function_of_the_method_page_is_there():
    named = re.findall(r"`([\w/]+)\.py:(\w+)`", (DOCS / "method.md").read_text())
    assert len(named) >= 20
    for file, name in named:
        module = importlib.import_module(f"stepwiser_jax.{file.replace('/', '.')}")
        assert hasattr(module, name), f"{file}.py:{name}"


def test_the_reference_has_every_public_name():
    shown = re.findall(r"^\.\. [\w:]+:: stepwiser_jax\.(\w+)$", (DOCS / "api.md").read_text(), re.M)
    assert sorted(shown) == stepwiser_jax.__all__


@pytest.mark.parametrize("page", ["tutorial.md", "python.md"])
def test_the_examples_of_a_page(page):
    failed, tried = doctest.testfile(str(DOCS / page), module_relative=False)
    assert tried and not failed


def test_the_changelog_has_every_name_that_changed():
    changes = (ROOT / "CHANGELOG.md").read_text()
    for name in [*RENAMED_COMMANDS, *RENAMED_SETTINGS]:
        assert f"`{name}`" in changes or name.endswith("_per_block"), name


# --- commands -----------------------------------------------------------------------------------

HOW_TO = ["laptop", "fork", "cuda", "pod"]
TOOLS = {"python3", ".venv/bin/pip", ".venv/bin/python", ".venv/bin/ruff"}
"""What sets up an environment. .ci/run gives such commands too."""


def commands(page: str) -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.M | re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("page", HOW_TO)
def test_the_commands_of_a_how_to_are_ones_that_the_command_line_takes(page, quickstart):
    found = commands(page)
    assert found
    for program, *words in found:
        if program == ".venv/bin/stepwiser":
            command = typer.main.get_group(app).commands[words[0]]
            options = command.make_context(words[0], words[1:]).params
            if config := options.get("config"):
                stage = options.get("stage", words[0])
                file = quickstart.get(str(config), ROOT / config)
                load_config(stage, file, tuple(options["set_"]), options.get("run_dir"))
            if prefix := options.get("prefix"):
                assert list(ROOT.glob(f"{prefix}_*.yaml")), words
        else:
            assert program in TOOLS or (ROOT / program).parent == ROOT / "launch", program


@pytest.mark.parametrize("page", HOW_TO)
def test_the_launchers_of_a_how_to_send_what_is_asked(page):
    for program, *words in commands(page):
        if program.startswith("launch/"):
            dry = words if "--dry-run" in words else ["--dry-run", *words]
            result = subprocess.run(
                [ROOT / program, *dry], cwd=ROOT, capture_output=True, text=True
            )
            assert result.returncode == 0, result.stderr
            assert words[words.index("--") + 1] in result.stdout

"""The package as users and worker processes see it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from signatures import signatures

import stepwiser_jax

ROOT = Path(stepwiser_jax.__file__).parent


@pytest.mark.parametrize("name", stepwiser_jax.__all__)
def test_every_public_name_resolves_and_is_documented(name):
    value = getattr(stepwiser_jax, name)
    assert name in dir(stepwiser_jax)
    assert value.__doc__


def test_public_signatures_are_those_that_were_written_down():
    """A change is meant, or it is a mistake: tests/signatures.py says how to write it down."""
    written = (Path(__file__).parent / "signatures.txt").read_text().splitlines()
    assert signatures() == written


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'Samplerr'"):
        stepwiser_jax.Samplerr  # noqa: B018


@pytest.mark.parametrize(
    "module",
    ["", ".records", ".tasks.mathematics", ".text.chunks", ".tasks.arithmetic", ".rl.labels"],
)
def test_workers_start_without_jax(module):
    code = (
        f"import sys, stepwiser_jax{module}; "
        "print([m for m in ('jax', 'flax', 'torch', 'tensorflow', 'transformers') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    assert result.stdout.strip() == "[]"


def test_only_the_mesh_file_makes_shardings():
    """So that the table there decides how everything is split."""
    for file in ROOT.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        made = names & {"PartitionSpec", "NamedSharding"}
        assert not made or file.name == "mesh.py", (file, made)

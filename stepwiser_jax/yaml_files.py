"""Reads YAML strictly: a key that stands twice in a mapping is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from stepwiser_jax.errors import UserError


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses a key that stands twice in a mapping: one value would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-3 for a text, because it has no point.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)

NO_YAML = (ValueError, RecursionError, yaml.YAMLError)
"""What is raised for text that is no YAML, or holds more than can be read."""


def load_yaml(text: str) -> Any:
    """Returns what the text holds. Raises one of `NO_YAML`."""
    return yaml.load(text, _Loader)


def read_mapping(path: Path, of: str) -> dict[str, Any]:
    """Returns the mapping of something, such as settings, in a YAML file. Raises UserError if it
    holds something else."""
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except NO_YAML as error:
        raise UserError(f"{path} is not valid YAML in UTF-8: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of {of}, found {type(tree).__name__}")
    return tree

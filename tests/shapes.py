"""Checks at every call that arrays have the shapes that their names say (CONTRIBUTING, "Letters").

`logits_BTV` has three axes, `new_B1KH` has one element on its second, and all that a call names
`_B` has as many rows. The same holds of the fields of a dataclass, after the axes of its own name:
`stacked_U.tokens_BT` has three. The functions themselves check it: a line is put into each when
its module is imported. So nothing is wrapped, and what jit compiles is checked once, while it is
traced.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

import jax
import numpy as np

CHECKED = re.compile(r"stepwiser_jax\.(model|rl|training|inference|distributed|judges)\b")
LETTERS = re.compile(r"_([A-Z0-9]*[A-Z][A-Z0-9]*)$")


def check_shapes(where: str, arguments: dict[str, Any]) -> None:
    """Raises AssertionError if an array has another shape than the name of its argument says."""
    _check(where, "", arguments)
    for name, value in arguments.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            _check(f"{where}, {name}", _letters(name), fields)


def _letters(name: str) -> str:
    found = LETTERS.search(name)
    return "" if found is None else found[1]


def _check(where: str, outer: str, arrays: dict[str, Any]) -> None:
    sizes: dict[str, tuple[int, str]] = {}
    for name, value in arrays.items():
        if not _letters(name) or not isinstance(value, np.ndarray | jax.Array):
            continue
        letters, said = outer + _letters(name), f"{where}: {name} has shape {value.shape}"
        assert value.ndim == len(letters), f"{said}, expected an axis for each of {letters}"
        for letter, size in zip(letters, value.shape, strict=True):
            expected, other = sizes.setdefault(
                letter, (int(letter), "its name") if letter.isdigit() else (size, name)
            )
            assert size == expected, f"{said}, expected {letter} = {expected} as in {other}"


class _Loader(SourceFileLoader):
    def path_stats(self, path: str) -> dict[str, Any]:
        """Refuses: what is compiled here must not be cached for programs without checks."""
        raise OSError

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> Any:
        tree = ast.parse(data, path)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                _add_check(node)
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["check_shapes"] = check_shapes
        super().exec_module(module)


def _add_check(function: ast.FunctionDef) -> None:
    parameters = function.args
    names = [x.arg for x in (*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs)]
    arguments = ", ".join(f"{name!r}: {name}" for name in names)
    call = ast.parse(f"check_shapes({function.name!r}, {{{arguments}}})").body[0]
    place = 1 if ast.get_docstring(function, clean=False) is not None else 0
    for node in ast.walk(call):
        ast.copy_location(node, function.body[0])
    function.body.insert(place, call)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if CHECKED.match(fullname) else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def install() -> None:
    """Makes modules that are imported from now on check their shapes."""
    sys.meta_path.insert(0, _Finder())

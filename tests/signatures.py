"""Prints the signature of every public name, which `tests/unit/signatures.txt` keeps:

python tests/signatures.py > tests/unit/signatures.txt
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import stepwiser_jax


def signatures() -> list[str]:
    """Returns a line for each public function, class and method: its arguments, with `=...` for a
    default. Types are left out, since other versions of Python print them in other words."""
    return [line for name in stepwiser_jax.__all__ for line in of(name)]


def of(name: str) -> Iterator[str]:
    value = getattr(stepwiser_jax, name)
    if not callable(value) or (inspect.isclass(value) and issubclass(value, enum.Enum | Exception)):
        yield name
        return
    yield f"{name}({arguments(value)})"
    if inspect.isclass(value):
        for key, attribute in sorted(vars(value).items()):
            is_public = not key.startswith("_") or key == "__call__"
            if is_public and (inspect.isfunction(attribute) or isinstance(attribute, classmethod)):
                yield f"{name}.{key}({arguments(getattr(value, key))})"


def arguments(function: Callable[..., Any]) -> str:
    parameters = inspect.signature(function).parameters.values()
    empty = inspect.Parameter.empty
    return (
        str(
            inspect.Signature(
                [
                    p.replace(annotation=empty, default=empty if p.default is empty else ...)
                    for p in parameters
                ]
            )
        )
        .strip("()")
        .replace("Ellipsis", "...")
    )


if __name__ == "__main__":
    print("\n".join(signatures()))

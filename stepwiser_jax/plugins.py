"""Loads functions by name: built-in ones by a short name, a user's as `module:function`."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from stepwiser_jax.errors import UserError


def load(
    name: str,
    expected: str,
    known: Mapping[str, Callable[..., Any]] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Returns the function that a config names, with `arguments` bound to it.

    A user's module is found on Python's path, or in the working directory.

    Args:
        name: A key of `known`, or `module:function` with dots in the module's name.
        expected: What the function is, such as "a reward"; errors say it.
        known: Built-in functions, by short name.
        arguments: Keyword arguments that the config gives with the name.

    Raises:
        UserError: There is no such short name, module or function; it cannot be called; or it does
            not take one of the `arguments`.
    """
    known = known or {}
    function = known[name] if name in known else _import(name, expected, known)
    if not arguments:
        return function
    taken = inspect.signature(function).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
    unknown = [key for key in arguments if key not in taken]
    if unknown and not takes_any:
        raise UserError(
            f"{expected} {name!r} takes no argument {unknown[0]!r}: expected some of "
            f"{', '.join(taken)}"
        )
    return functools.partial(function, **arguments)


def _import(name: str, expected: str, known: Mapping[str, Any]) -> Callable[..., Any]:
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        names = "".join(f"{own}, " for own in sorted(known))
        raise UserError(f"expected {expected}: {names}or module:function, found {name!r}{hint}")
    # An installed command has no working directory on its path, `python -m` has one.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module was found, and what it imports was not
        raise UserError(
            f"expected {expected}, found {name!r}, but there is no module {error.name!r}: install "
            "it, or put it into the working directory or a directory of PYTHONPATH"
        ) from None
    function = getattr(module, function_name, None)
    if function is None:
        close = difflib.get_close_matches(function_name, vars(module), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"expected {expected}, found {name!r}, but {module_name} has no {function_name!r}{hint}"
        )
    if not callable(function):
        raise UserError(
            f"expected {expected}, found {name!r}, which cannot be called: name a function"
        )
    return function

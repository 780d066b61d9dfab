"""The templates of all prompts: ours, a user's, and those that a model was trained with.

    text/prompts.yaml                ours, and what each is for
    `prompts` in a config            a user's: a file of the same form, with some of the names
    <model>/stepwiser_prompts.yaml   all that a trained model is asked with, ours of that day too

A tokenizer carries the templates of its model, as it carries the chat template.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from stepwiser_jax.errors import UserError
from stepwiser_jax.files import nothing_at
from stepwiser_jax.yaml_files import read_mapping

Prompts = Mapping[str, str]
"""Templates by name. Their fields are filled in by `str.format`."""

OURS: Prompts = read_mapping(Path(__file__).with_name("prompts.yaml"), "prompts")

KEPT = "stepwiser_prompts.yaml"
"""The file of an exported model with all of its templates."""

OPTIONAL = frozenset({"number"})
"""Fields that a template may leave out."""


def read_prompts(source: Any) -> dict[str, str]:
    """Returns the templates in a user's file, or in the mapping that a file holds.

    Raises UserError with all problems: there is no such file, a name or a field is unknown, or a
    field is missing.
    """
    where = "prompts"
    if isinstance(source, str):
        where, path = source, Path(source)
        try:
            is_there = path.is_file()
        except (OSError, ValueError) as error:  # a name that no file can have
            raise UserError(f"expected a file of prompts: {error}") from None
        if not is_there:
            raise UserError(f"expected a file of prompts, found {nothing_at(path)}")
        source = read_mapping(path, "prompts")
    if not isinstance(source, Mapping):
        raise UserError("expected a file of prompts, or a mapping of their names to texts")
    if problems := [p for name, text in source.items() for p in _problems(name, text)]:
        raise UserError(f"{where}: {'; '.join(problems)}")
    return dict(source)


def _problems(name: Any, text: Any) -> list[str]:
    """Returns what is wrong with a template, and how to mend it."""
    if name not in OURS:
        close = difflib.get_close_matches(str(name), OURS, n=1, cutoff=0.0)
        return [f"unknown prompt {name!r}; did you mean {close[0]!r}? (known: {', '.join(OURS)})"]
    if not isinstance(text, str):
        return [f"{name}: expected a text, found {text!r}: put it in quotes"]
    ours = fields_of(OURS[name])
    double = "a brace that is text stands twice, such as \\boxed{{}}"
    try:
        fields = fields_of(text)
    except ValueError as error:
        return [f"{name}: {error}: {double}"]
    missing = [x for x in ours if x not in fields and x not in OPTIONAL]
    unknown = [x for x in fields if x not in ours]
    if not missing and not unknown:
        return []
    expected = f"{name}: expected the fields {_braced(ours)}" if ours else f"{name} has no fields"
    found = [f"{_braced(missing)} missing"] if missing else []
    found += [f"the unknown {_braced(unknown)}; {double}"] if unknown else []
    return [f"{expected}, found {' and '.join(found)}"]


def _braced(fields: list[str]) -> str:
    return ", ".join(f"{{{field}}}" for field in fields)


def fields_of(template: str) -> list[str]:
    """Returns the fields of a template in their order, each once, with whatever else stands in
    their braces. Raises ValueError for a brace without its other one."""
    found: dict[str, None] = {}
    for _, name, spec, conversion in Formatter().parse(template):
        if name is not None:
            tail = (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            found[name + tail] = None
    return list(found)


def prompts_of(directory: Path, given: Prompts, where: str, *, trained: bool = False) -> Prompts:
    """Returns the templates of a model: those that its directory keeps, else those `given`, else
    ours.

    A trained model keeps all of them, since `sft` does not know which of them its examples hold.
    What an older export does not keep was ours.

    Raises UserError if one that is given is not the one that is kept.
    """
    file = directory / KEPT
    kept: Prompts = read_prompts(str(file)) if file.is_file() else {}
    if trained or kept:
        kept = {**OURS, **kept}
    if changed := [name for name, text in given.items() if kept.get(name, text) != text]:
        raise UserError(
            f"prompts: the model of {where} was trained with another text of {', '.join(changed)}, "
            "and is asked the same way for ever: leave it out, or train again from the model before"
        )
    return {**OURS, **kept, **given}


def save_prompts(directory: Path, prompts: Prompts) -> None:
    """Writes all templates beside an exported model: ours may be worded anew later."""
    # In quotes: in the other styles rare line breaks, such as U+0085, become spaces.
    text = yaml.safe_dump(dict(prompts), sort_keys=False, allow_unicode=True, default_style='"')
    (directory / KEPT).write_text(text, encoding="utf-8")

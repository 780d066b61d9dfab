"""A YAML file <-> a config: read, overridden, checked, written, compared.

What may stand in one, and its defaults, is in `config.py` and `config_parts.py`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from stepwiser_jax.config import STAGE_CONFIGS
from stepwiser_jax.config_parts import Config
from stepwiser_jax.record_files import nothing_at
from stepwiser_jax.records import UserError

C = TypeVar("C", bound=Config)


def load_config(stage: str, path: str | Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read a YAML file as the config of `stage`; `overrides` are `a.b=value`, value in YAML.

    Raises UserError for a missing or broken file, an unknown key (the closest real one is named), a
    wrong type or an inconsistent combination; all problems in one message.
    """
    if stage not in STAGE_CONFIGS:
        raise UserError(f"expected a stage of {sorted(STAGE_CONFIGS)}, found {stage!r}")
    path = Path(path)
    if not path.is_file():
        raise UserError(f"expected a config file, found {nothing_at(path)}")
    tree = read_settings(path)
    for override in overrides:
        _apply_override(tree, override)
    return validate(STAGE_CONFIGS[stage], tree, str(path))


def check_placeholders(config: Config) -> None:
    """Raises UserError for settings that still hold the placeholder of a shipped config."""
    settings = config.model_dump(mode="json")
    found = [place for place in _placeholders(settings) if not Path(place[1]).exists()]
    if found:
        first = found[0][0]
        raise UserError(
            f"{'; '.join(f'{key}: {value} is a placeholder' for key, value in found)}: say which "
            f"run or file is meant, as in --set {first}=DIRECTORY"
        )


def _placeholders(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, str) and tree.startswith("RUNS/"):
        yield key, tree
    for name, value in tree.items() if isinstance(tree, dict) else ():
        yield from _placeholders(value, f"{key}.{name}" if key else name)


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError where it holds something else."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not valid YAML in UTF-8: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(
            f"--set expects key=value such as sampling.temperature=0.7, found {override!r}"
        )
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(f"--set {key}: {parent} is a value, not a group of settings")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {key}: {value!r} is not valid YAML: {error}") from None


def validate(config_type: type[C], tree: dict[str, Any], where: str) -> C:
    """Build a config; raises UserError with every problem, each with its key and the fix."""
    try:
        return config_type.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(config_type, problem) for problem in error.errors()]
        raise UserError(f"{where}: " + "; ".join(lines)) from None


def completed(config_type: type[Config], tree: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the settings of a run as this version would write them: those that have come since
    the run began have their defaults.

    Raises UserError for settings that are none of this stage, or no longer.
    """
    try:
        return config_type.model_validate(tree).model_dump(mode="json")
    except ValidationError as error:
        problems = error.errors()
    unknown = [".".join(map(str, p["loc"])) for p in problems if p["type"] == "extra_forbidden"]
    others = [_explain(config_type, p) for p in problems if p["type"] != "extra_forbidden"]
    named = [f"the unknown settings {', '.join(unknown)}"] if unknown else []
    raise UserError(
        f"{where} was written by another stage or another version of stepwiser; here it has "
        f"{'; '.join([*named, *others])}. Go on with the version that wrote it, or name a new run "
        "directory"
    )


def _explain(config_type: type[Config], problem: Any) -> str:
    location = [part for part in problem["loc"] if isinstance(part, str)]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys_at(config_type, location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)
        return f"unknown key {key!r}; did you mean {close[0]!r}? (known: {', '.join(known)})"
    if problem["type"] == "missing":
        return f"{key!r} is required and not set"
    if problem["type"] == "model_type":
        found = f"{key} is a group of settings, found {problem['input']!r}"
        return f"{found}: set one of the group, such as {key}.path"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key or 'config'}: {message} (found {problem['input']!r})" if key else message


def _keys_at(config_type: type[Config], location: list[str]) -> list[str]:
    for part in location:
        annotation = config_type.model_fields[part].annotation
        (group,) = {*(get_args(annotation) or (annotation,))} - {NoneType}
        assert isinstance(group, type) and issubclass(group, Config)
        config_type = group
    return sorted(config_type.model_fields)


def dump_config(config: Config) -> str:
    """The config as YAML in the same schema, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_digest(config: Config) -> str:
    """First 16 hex digits of the sha256 of the resolved config."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every setting in which two dumped configs differ."""
    differences = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            differences += differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            differences.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return differences

"""A YAML file <-> a config: read, overridden, checked, written, compared.

What may stand in one, and its defaults, is in `config.py` and `config_parts.py`. Beside its
settings a file may name its `stage`; and in a path `RUNS/` is the directory that the run's own lies
in, so that runs that lie side by side find one another by name.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from stepwiser_jax.config import STAGE_CONFIGS
from stepwiser_jax.config_parts import Config
from stepwiser_jax.record_files import check_run_file, nothing_at
from stepwiser_jax.records import UserError

C = TypeVar("C", bound=Config)
RUNS = "RUNS/"


def load_config(
    stage: str,
    path: str | Path,
    overrides: tuple[str, ...] = (),
    run_dir: str | Path | None = None,
) -> Config:
    """Read a YAML file as the config of `stage`; `overrides` are `a.b=value`, value in YAML.
    `RUNS/` in the file's own values becomes the directory that `run_dir` lies in.

    Raises UserError for a missing or broken file, one that names another stage, an unknown key (the
    closest real one is named), a wrong type or an inconsistent combination; all problems in one
    message.
    """
    if stage not in STAGE_CONFIGS:
        raise UserError(f"expected a stage of {sorted(STAGE_CONFIGS)}, found {stage!r}")
    path = Path(path)
    try:
        found = path.is_file()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise UserError(f"expected a config file at {str(path)[:200]}: {error}") from None
    if not found:
        raise UserError(f"expected a config file, found {nothing_at(path)}")
    tree = read_settings(path)
    named = tree.pop("stage", stage)
    if named != stage:
        raise UserError(f"expected a config of {stage}, found one of {named} in {path}")
    if run_dir is not None:
        tree = beside(run_dir, tree)
    for override in overrides:
        _apply_override(tree, override)
    return validate(STAGE_CONFIGS[stage], tree, str(path))


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice in one mapping is a mistake: of two values one would be
    lost."""

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


_NO_YAML = (ValueError, RecursionError, yaml.YAMLError)
"""What is raised for text that is no YAML, or holds more than can be read."""


def _load_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def beside(run_dir: str | Path, value: Any) -> Any:
    """Settings whose paths that begin with `RUNS/` are in the directory that `run_dir` lies in."""
    if isinstance(value, dict):
        return {key: beside(run_dir, part) for key, part in value.items()}
    if isinstance(value, list):
        return [beside(run_dir, part) for part in value]
    if isinstance(value, str) and value.startswith(RUNS):
        return str(Path(run_dir).parent / value.removeprefix(RUNS))
    return value


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError where it holds something else."""
    try:
        tree = _load_yaml(path.read_text(encoding="utf-8"))
    except _NO_YAML as error:
        raise UserError(f"{path} is not valid YAML in UTF-8: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    return tree


def read_run_settings(run_dir: str | Path) -> dict[str, Any]:
    """The settings of a run. Raises UserError if its config.yaml is missing or damaged."""
    file = Path(run_dir) / "config.yaml"
    check_run_file(Path(run_dir), file.name)
    if not file.is_file():
        raise UserError(f"expected a run directory at {run_dir}, found no {file.name} in it")
    return read_settings(file)


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
        node[last] = _load_yaml(value)
    except _NO_YAML as error:
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

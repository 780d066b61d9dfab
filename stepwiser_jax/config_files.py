"""How a YAML file becomes a config and a config a YAML file, and in what two configs differ.

A config is a YAML file in the schema of its stage, plus `--set a.b=c` overrides. An unknown key is
refused, and the error names the closest one. The resolved config is written to the run directory in
the same schema, so that `--config <run_dir>/config.yaml` repeats the run. A file may also name its
`stage`. A path that begins with `RUNS/` lies in the directory that holds the run directory, so that
runs that lie side by side find each other by name.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from stepwiser_jax.config import STAGE_CONFIGS, Config, OnResume, OwnJudge, Stage
from stepwiser_jax.errors import UserError
from stepwiser_jax.files import nothing_at
from stepwiser_jax.manifest import check_run_file
from stepwiser_jax.yaml_files import NO_YAML, load_yaml, read_mapping

C = TypeVar("C", bound=Config)
RUNS = "RUNS/"

RENAMED_COMMANDS = {
    "judge": "train-judge",
    "classifier": "train-classifier",
    "segment": "chunk-solutions",
    "rationalize": "rejection-sample",
    "select": "select-responses",
    "classify": "evaluate, with `judge: {kind: classifier}`",
    "contrast": "compare-judges",
    "compare": "reproduce",
}
"""What commands and stages were called before."""

RENAMED_SETTINGS = {
    "annotations": "values",
    "items": "benchmark.source",
    "split": "benchmark.split",
    "on_malformed": "on_malformed of examples or benchmark",
    "exclude": "examples.exclude",
    "limit": "limit of examples or benchmark",
    "data": "examples",
    "count": "limit",
    "classifier": "judge, with kind: classifier",
    "genprm": "judge, with kind: genprm",
    "thinkprm": "judge, with kind: thinkprm",
    "threshold": "judge.threshold",
    "max_new_tokens": "sampling.max_new_tokens, in judge where there is one",
    "votes": "judge.votes",
    "vote_temperature": "judge.sampling.temperature",
    "vote_top_k": "judge.sampling.top_k",
    "vote_top_p": "judge.sampling.top_p",
    "code": "code_rounds, 0 for no code",
    "max_code_rounds": "code_rounds",
    "server": "teacher, with kind: server",
    "splitter": "teacher, with kind: rule",
    "max_refills": "max_resamples",
    "format_penalty": "reward_args.format_penalty",
    "rollouts_by_pass_rate": "num_rollouts",
    "answer_timeout_seconds": "always 5 seconds",
    "param_dtype": "dtype",
    "compute_dtype": "dtype",
    **dict.fromkeys(("alpha", "gamma", "epsilon"), "in rule_args"),
    "best_of": "rule_args.n",
    **dict.fromkeys(
        (
            "problems_per_block",
            "trajectories_per_block",
            "solutions_per_block",
            "examples_per_block",
            "items_per_block",
        ),
        "block_size",
    ),
}
"""What settings were called before, by the last part of their names."""


def load_config(
    stage: str,
    path: str | Path,
    overrides: tuple[str, ...] = (),
    run_dir: str | Path | None = None,
) -> Stage:
    """Reads a YAML file as the config of `stage`. `overrides` are `a.b=value`, with the value in
    YAML. `RUNS/` in the file's own values becomes the directory that `run_dir` lies in.

    Raises one UserError with all problems: a missing or broken file, one that names another stage,
    an unknown key (the closest real one is named), a wrong type, or settings that do not fit
    together.
    """
    if stage in RENAMED_COMMANDS:
        raise UserError(f"{path}: the stage {stage} is now {RENAMED_COMMANDS[stage]}")
    if stage not in STAGE_CONFIGS:
        raise UserError(f"expected a stage of {sorted(STAGE_CONFIGS)}, found {stage!r}")
    path = Path(path)
    try:
        found = path.is_file()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise UserError(f"expected a config file at {str(path)[:200]}: {error}") from None
    if not found:
        raise UserError(f"expected a config file, found {nothing_at(path)}")
    tree = read_mapping(path, "settings")
    named = tree.pop("stage", stage)
    if named != stage:
        renamed = f", which is now {RENAMED_COMMANDS[named]}" if named in RENAMED_COMMANDS else ""
        raise UserError(f"expected a config of {stage}, found one of {named} in {path}{renamed}")
    if run_dir is not None:
        tree = beside(run_dir, tree)
    for override in overrides:
        apply_override(tree, override)
    return validate(STAGE_CONFIGS[stage], tree, str(path))


def beside(run_dir: str | Path, value: Any) -> Any:
    """Returns settings with `RUNS/` replaced by the directory that holds `run_dir`."""
    if isinstance(value, dict):
        return {key: beside(run_dir, part) for key, part in value.items()}
    if isinstance(value, list):
        return [beside(run_dir, part) for part in value]
    if isinstance(value, str) and value.startswith(RUNS):
        return str(Path(run_dir).parent / value.removeprefix(RUNS))
    return value


def read_run_settings(run_dir: str | Path) -> dict[str, Any]:
    """Returns the settings of a run. Raises UserError if its config.yaml is missing or damaged."""
    file = Path(run_dir) / "config.yaml"
    check_run_file(Path(run_dir), file.name)
    if not file.is_file():
        raise UserError(f"expected a run directory at {run_dir}, found no {file.name} in it")
    return read_mapping(file, "settings")


def read_adaptive(values: str) -> dict[str, Any] | None:
    """Returns the settings by which an `annotate` run stopped early; None if it did not, or if the
    values are in a file."""
    is_run = (Path(values) / "config.yaml").is_file()
    return read_run_settings(values).get("adaptive") if is_run else None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets `a.b` of settings by `a.b=value`, with the value in YAML. Raises UserError if it has
    another form, or if `a` is no group."""
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
        node[last] = load_yaml(value)
    except NO_YAML as error:
        raise UserError(f"--set {key}: {value!r} is not valid YAML: {error}") from None


def validate(config_type: type[C], tree: dict[str, Any], where: str) -> C:
    """Returns a config. Raises UserError with every problem, each with its key and the fix."""
    try:
        return config_type.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(config_type, problem) for problem in error.errors()]
        raise UserError(f"{where}: " + "; ".join(lines)) from None


def completed(config_type: type[Config], tree: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the settings of a run as this version would write them: settings that are newer than
    the run have their defaults.

    Raises UserError for settings that this stage does not have, or no longer has.
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
    key, group = _locate(config_type, problem["loc"])
    kind, found = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        last = str(problem["loc"][-1])
        if last in RENAMED_SETTINGS:
            return f"{key!r} is now {RENAMED_SETTINGS[last]}"
        known = sorted(group.model_fields)
        close = difflib.get_close_matches(last, known, n=1, cutoff=0.0)
        return f"unknown key {key!r}; did you mean {close[0]!r}? (known: {', '.join(known)})"
    if kind == "missing":
        return f"{key!r} is required and not set"
    if kind == "model_type" or (kind.startswith("union_tag") and not isinstance(found, dict)):
        first = next(name for name, field in group.model_fields.items() if field.is_required())
        return (
            f"{key} is a group of settings, found {found!r}: set one of the group, such as "
            f"{key}.{first}"
        )
    if kind == "union_tag_invalid":
        context = problem["ctx"]
        return f"{key}.kind: expected {context['expected_tags']}, found {context['tag']!r}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (found {found!r})" if key else message


def _locate(config_type: type[Config], location: tuple[str | int, ...]) -> tuple[str, type[Config]]:
    """Returns a key as the user writes it, and the group of settings that it names or lies in."""
    group, members, parts = config_type, [config_type], []
    for part in location:
        if len(members) > 1:  # pydantic puts the kind of a member after the name of a union
            (group,) = [m for m in members if m.model_fields["kind"].default == part] or [OwnJudge]
            members = [group]
            continue
        if isinstance(part, int) or members or part not in ("number", "pairs"):
            parts.append(str(part))
        field = members[0].model_fields.get(str(part)) if members else None
        members = groups_in(field.annotation) if field else []
        group = members[0] if members else group
    return ".".join(parts), group


def groups_in(annotation: Any) -> list[type[Config]]:
    """Returns the groups of settings that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [group for part in get_args(annotation) for group in groups_in(part)]


def dump_config(config: Config) -> str:
    """Returns the config as YAML in the same schema, with every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_digest(config: Config) -> str:
    """Returns the first 16 hex digits of the sha256 of the resolved config."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def settings_marked(config: Config, mark: OnResume, prefix: str = "") -> list[str]:
    """Returns the dotted names of a config's settings that carry this mark."""
    names = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if mark in field.metadata:
            names.append(f"{prefix}{name}")
        elif isinstance(value, Config):
            names += settings_marked(value, mark, f"{prefix}{name}.")
    return names


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns `key: old -> new` for every setting in which two dumped configs differ."""
    differences = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            differences += differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            differences.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return differences

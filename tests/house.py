"""Counts how large the library is to read: `python tests/house.py` prints a table."""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
LIBRARY = ROOT / "stepwiser_jax"

GRPO_STEP = (
    "__main__.py",
    "config.py",
    "config_files.py",
    "stages/train_judge.py",
    "text/prompts.py",
    "rl/rollouts.py",
    "inference/engine.py",
    "inference/params.py",
    "inference/engine_state.py",
    "inference/token_sampler.py",
    "model/decoder.py",
    "rl/rewards.py",
    "rl/grpo.py",
    "rl/logprobs.py",
    "model/packing.py",
    "model/transformer.py",
    "model/block.py",
    "model/linear.py",
    "model/attention/__init__.py",
    "training/loop.py",
    "training/step.py",
    "training/optimizer.py",
)
"""Files on the way of one GRPO step, from the command line to the update, in the order of reading:
those that say what becomes of an example, its tokens and the parameters. Where the name of a
function says enough (a mesh, a run directory, a checkpoint, a scheduler), its file is not listed.
"""

LOOP = (
    "stages/train_judge.py",
    "rl/rollouts.py",
    "rl/rewards.py",
    "rl/grpo.py",
    "training/loop.py",
    "training/step.py",
)
"""Files to read for the loop."""

NOT_CORE = (
    "commands/",
    "report/",
    "server/",
    "sandbox/",
    "judges/genprm",
    "judges/thinkprm",
    "stages/refine.py",
)


def modules() -> list[Path]:
    """Returns the library's files."""
    return sorted(LIBRARY.rglob("*.py"))


def count_lines(files: list[Path]) -> int:
    """Returns the lines of files."""
    return sum(len(file.read_text().splitlines()) for file in files)


def existing(names: tuple[str, ...]) -> list[Path]:
    """Returns the files of a list that are there."""
    return [LIBRARY / name for name in names if (LIBRARY / name).is_file()]


def settings_by_group() -> dict[str, list[str]]:
    """Returns the fields that each group of settings defines itself, by the name of its class."""
    from stepwiser_jax import config

    groups = [x for x in vars(config).values() if isinstance(x, type)]
    return {
        group.__name__: [name for name in vars(group)["__annotations__"] if name in fields]
        for group in groups
        if issubclass(group, config.Config) and "__annotations__" in vars(group)
        for fields in [group.model_fields]
    }


def count_settings() -> int:
    """Returns the number of settings. `kind`, which tells the members of a union apart, is one."""
    names = [name for names in settings_by_group().values() for name in names]
    return len(names) - names.count("kind") + 1


def definitions(kind: type[ast.AST]) -> Iterator[tuple[Path, ast.AST]]:
    """Yields the definitions of a kind at the top of modules and in classes."""
    for file in modules():
        for node in ast.walk(ast.parse(file.read_text())):
            bodies = (
                getattr(node, "body", []) if isinstance(node, ast.Module | ast.ClassDef) else []
            )
            yield from ((file, child) for child in bodies if isinstance(child, kind))


def docstrings_without_verb() -> list[str]:
    """Returns public functions whose docstring does not begin with a verb, such as "Returns" or
    "Packs". Properties may begin with a noun, and help of commands with an imperative."""
    found = []
    for file, node in definitions(ast.FunctionDef):
        assert isinstance(node, ast.FunctionDef)
        first = (ast.get_docstring(node) or "").split("\n")[0]
        is_property = any("property" in ast.unparse(d) for d in node.decorator_list)
        is_help = file.name == "__main__.py"
        if first and not node.name.startswith("_") and not is_property and not is_help:
            word = re.match(r"[A-Z][a-z-]+s\b", first)
            if word is None:
                found.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}: {first}")
    return found


def duplicate_classes() -> dict[str, list[str]]:
    """Returns the names of several classes, each with the files that define one."""
    files = defaultdict(list)
    for file, node in definitions(ast.ClassDef):
        assert isinstance(node, ast.ClassDef)
        if not node.name.startswith("_"):
            files[node.name].append(str(file.relative_to(LIBRARY)))
    return {name: where for name, where in files.items() if len(where) > 1}


def table() -> list[tuple[str, str, str]]:
    """Returns the rows of the table: what is counted, how many, and the most that is wanted."""
    step, loop = existing(GRPO_STEP), existing(LOOP)
    core = [f for f in modules() if not str(f.relative_to(LIBRARY)).startswith(NOT_CORE)]
    behind = sum(len(re.findall(r"\bbehind\b", file.read_text())) for file in modules())
    settings = count_settings()
    return [
        ("files / lines of one GRPO step", f"{len(step)} / {count_lines(step)}", "20 / 4200"),
        ("files / lines of the loop", f"{len(loop)} / {count_lines(loop)}", "6 / 1400"),
        ("lines of the library's core", str(count_lines(core)), "11000"),
        ("settings", str(settings), "140"),
        ('uses of "behind"', str(behind), "0"),
        ("public docstrings that begin without a verb", str(len(docstrings_without_verb())), "0"),
        ("names of several classes", str(len(duplicate_classes())), "0"),
    ]


if __name__ == "__main__":
    for what, count, most in table():
        print(f"{what:46} {count:>12}   at most {most}")
    for name, files in duplicate_classes().items():
        print(f"  {name}: {', '.join(files)}")
    print("\nfiles of one GRPO step, from the command line to the update:")
    for file in existing(GRPO_STEP):
        print(f"{count_lines([file]):6}  {file.relative_to(LIBRARY)}")

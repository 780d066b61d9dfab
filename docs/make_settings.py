"""Prints docs/settings.md, made from stepwiser_jax/config.py.

python docs/make_settings.py > docs/settings.md
"""

from __future__ import annotations

import re

from pydantic.fields import FieldInfo

from stepwiser_jax.config import STAGE_CONFIGS, Config
from stepwiser_jax.config_files import groups_in

HEAD = """# Settings

Every setting of every stage, made by `python docs/make_settings.py` from
`stepwiser_jax/config.py`. A config file is YAML; `--set a.b=value` overrides a setting. A setting
without a default is required. A group of settings has its own section.
"""


def default_of(field: FieldInfo) -> str:
    """Returns how a default is written in YAML."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Config):
        return "its defaults"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def with_links(documentation: str | None) -> str:
    """Returns a documentation on one line, in which names of pages are links to them."""
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", " ".join((documentation or "").split()))


def section(title: str, group: type[Config]) -> list[str]:
    """Returns the lines of a group's section."""
    lines = [f"## {title}", "", with_links(group.__doc__), ""]
    lines += ["| setting | default | |", "|---|---|---|"]
    for name, field in group.model_fields.items():
        text = with_links(field.description)
        if groups := groups_in(field.annotation):
            text += f" ({', '.join(f'[{g.__name__}](#{anchor(g.__name__)})' for g in groups)})"
        cells = (f"`{name}`", f"`{default_of(field)}`", text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def anchor(title: str) -> str:
    """Returns what a link to a section is called."""
    return re.sub(r"[^a-z0-9-]", "", title.lower())


def page() -> str:
    """Returns the whole page: the stages, then the groups that they hold."""
    lines, left, seen = [HEAD], list(STAGE_CONFIGS.values()), set()
    for name, stage in STAGE_CONFIGS.items():
        lines += section(name, stage)
    while left:
        for field in left.pop(0).model_fields.values():
            new = [group for group in groups_in(field.annotation) if group not in seen]
            seen |= set(new)
            left += new
            for group in new:
                lines += section(group.__name__, group)
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")

"""Makes the page on which a solution is pasted and judged. It looks like a report, and is as
careful with what models write: text nodes, and a policy that allows its own scripts alone. The only
place that it may connect to is its own server."""

from __future__ import annotations

import html
import json
import re
from importlib import resources
from typing import Any

from stepwiser_jax.report.page import policy_of, read_part


def _read(name: str) -> str:
    return (resources.files("stepwiser_jax.server") / name).read_text(encoding="utf-8")


STYLE = read_part("page.css") + _read("page.css")
TEMML = read_part("vendor/temml.min.js")
SCRIPT = read_part("texts.js") + _read("page.js")

POLICY = "; ".join(
    [
        policy_of([TEMML, SCRIPT], [STYLE]),
        "connect-src 'self'",
        "img-src data:",  # the icon, which is empty
        "frame-ancestors 'none'",
    ]
)
"""The content security policy, a header of the answer."""


def page_of(judge_id: str, *, needs_key: bool, example: dict[str, Any] | None) -> str:
    """Returns the page's HTML. The `example`, a `question` and a `solution`, can be filled in."""
    facts = json.dumps({"needs_key": needs_key, "example": example}).replace("<", "\\u003c")
    parts = {
        "judge": html.escape(judge_id),
        "style": STYLE,
        "facts": facts,
        "temml": TEMML,
        "script": SCRIPT,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("page.html"))

"""Writes a report as one HTML file, which needs no network and no server.

A browser that opens a file may read no other file, so all data is in the page: JSON, gzipped, in
base64. None of its characters can end an element. The overview and the index are unpacked at once,
a block of solutions when it is looked at.

What models wrote is hostile. The page makes text nodes of it and nothing else, and a content
security policy allows no script but the two whose hashes it names, and no connection at all.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from stepwiser_jax.files import replacing
from stepwiser_jax.report.collect import Contents
from stepwiser_jax.report.solutions import as_fields, index_of

BLOCK = 200
"""The most solutions of one block."""

BLOCK_CHARACTERS = 1_000_000
"""A block is full when its JSON has so many."""


def write_page(report: Contents, output: Path) -> None:
    """Writes the page, whole or not at all."""
    with replacing(output) as file:
        file.write(page_of(report).encode(errors="replace"))  # the title is a path's


def page_of(report: Contents) -> str:
    """Returns the HTML of a report."""
    style, temml = read_part("page.css"), read_part("vendor/temml.min.js")
    script = read_part("texts.js") + read_part("page.js")
    overview = {
        "title": report.title,
        "runs": report.runs,
        "tables": report.tables,
        "judges": report.judges,
        "comparisons": report.comparisons,
        "notices": report.notices,
    }
    solutions, solution_starts = blocks_of([as_fields(s) for s in report.solutions])
    sessions, session_starts = blocks_of(report.sessions)
    index = {
        "solutions": index_of(report.solutions, len(report.judges)) | {"starts": solution_starts},
        "sessions": session_index(report.sessions) | {"starts": session_starts},
    }
    packed = {"overview": pack(overview), "index": pack(index)}
    packed |= {f"solutions-{number}": block for number, block in enumerate(solutions)}
    packed |= {f"sessions-{number}": block for number, block in enumerate(sessions)}
    parts = {
        "policy": policy_of([temml, script], [style]),
        "title": html.escape(report.title),
        "style": style,
        "temml": temml,
        "script": script,
        "data": "\n".join(
            f'<script type="application/gzip" id="{name}">{block}</script>'
            for name, block in packed.items()
        ),
    }
    # One pass, so that what is put in is not searched.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], read_part("page.html"))


def read_part(name: str) -> str:
    """Returns the text of a file beside this one."""
    return (resources.files("stepwiser_jax.report") / name).read_text(encoding="utf-8")


def policy_of(scripts: Sequence[str], styles: Sequence[str]) -> str:
    """Returns the content security policy. Temml sets a few style attributes, which can load
    nothing either."""

    def hashes(texts: Sequence[str]) -> str:
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in texts]
        return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes(scripts)}; style-src {hashes(styles)}; "
        "style-src-attr 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def pack(value: Any) -> str:
    """Returns a value as base64 of gzipped JSON. The same value gives the same text. Half of a
    surrogate pair stays one."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def unpack(packed: str) -> Any:
    """Returns the value that `pack` was given."""
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def blocks_of(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[int]]:
    """Returns rows in packed blocks, and the number of the first row of each."""
    starts = list(_starts(rows))
    ends = [*starts[1:], len(rows)]
    return [pack(rows[s:e]) for s, e in zip(starts, ends, strict=False)], starts


def _starts(rows: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    in_block, characters = BLOCK, 0
    for number, row in enumerate(rows):
        if in_block == BLOCK or characters > BLOCK_CHARACTERS:
            yield number
            in_block = characters = 0
        in_block += 1
        characters += len(json.dumps(row))


def session_index(sessions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns columns with an entry for each problem of a search: which methods solve it (1), which
    do not (0), and which did not try (-1)."""
    results = [{r["method"]: r for r in session["results"]} for session in sessions]
    methods = list(dict.fromkeys(method for found in results for method in found))
    runs = list(dict.fromkeys(session["run"] for session in sessions))
    return {
        "id": [session["id"] for session in sessions],
        "snippet": [" ".join(s["question"][:320].split())[:160] for s in sessions],
        "runs": runs,
        "run": [runs.index(session["run"]) for session in sessions],
        "methods": methods,
        "right": [
            [int(found[m]["is_correct"]) if m in found else -1 for found in results]
            for m in methods
        ],
        "rejected": [max(r["rejected_tokens"] for r in found.values()) for found in results],
        "forced": [max(r["forced_chunks"] for r in found.values()) for found in results],
    }

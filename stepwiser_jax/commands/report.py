"""Writes the report of runs: `stepwiser report RUN_DIR ...`, and what other commands end with."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from stepwiser_jax.errors import UserError
from stepwiser_jax.files import nothing_at
from stepwiser_jax.manifest import MANIFEST
from stepwiser_jax.report.collect import collect
from stepwiser_jax.report.page import write_page

REPORT = "report.html"
LIMIT = 5000
"""Solutions of one run that a report shows unless it is told otherwise."""


def write_report(run_dirs: Sequence[Path], output: Path | None = None, limit: int = LIMIT) -> Path:
    """Writes the report of these runs and returns where. Says on stderr what it does not show.

    Raises UserError if there is no run, or if `output` is a directory.
    """
    missing = next((path for path in run_dirs if not path.exists()), None)
    if missing is not None:
        raise UserError(f"expected a run directory, found {nothing_at(missing)}")
    output = output or default_output(run_dirs)
    if output.is_dir():
        raise UserError(
            f"expected a file to write, found the directory {output}: --output {output / REPORT}"
        )
    report = collect(run_dirs, limit)
    write_page(report, output)
    for notice in report.notices:
        print(f"report: {notice}", file=sys.stderr)
    return output


def default_output(run_dirs: Sequence[Path]) -> Path:
    """Returns `report.html` in the run directory. That of several is beside them, and named after
    them, so that it replaces no other report."""
    if len(run_dirs) == 1:
        return run_dirs[0] / REPORT
    resolved = [path.resolve() for path in run_dirs]
    names = "-".join(dict.fromkeys(path.name for path in resolved))
    return (
        Path(os.path.commonpath([path.parent for path in resolved])) / f"report-{names[:100]}.html"
    )


def end_stage_with_report(run_dir: Path) -> None:
    """Writes the report of a run that has finished, unless it has one of what its manifest names:
    a finished run is not touched again."""
    manifest, report = run_dir / MANIFEST, run_dir / REPORT
    if not manifest.is_file():  # a shard; the last command writes it
        return
    if not report.is_file() or report.stat().st_mtime_ns < manifest.stat().st_mtime_ns:
        end_with_report([run_dir])


def end_with_report(run_dirs: Sequence[Path]) -> None:
    """Writes the report at the end of another command and prints its path. That command has done
    its work, so a report that cannot be written only says why."""
    try:
        print(f"report: {write_report(run_dirs)}")
        return
    except (UserError, OSError) as error:
        reason = str(error)
    except Exception as error:
        traceback.print_exc()
        reason = repr(error)
    paths = " ".join(map(str, run_dirs))
    print(
        f"no report was written: {reason}. All else is finished and whole; `stepwiser report "
        f"{paths}` tries again, and --no-report leaves it out",
        file=sys.stderr,
    )

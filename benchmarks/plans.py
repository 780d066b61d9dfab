"""Runs `stepwiser plan` on the shipped configs, for the slices that their heads name: the table of
docs/plan.md. It needs no TPU, and only the config.json of the models.

    pip install '.[tpu]' && python benchmarks/plans.py --models DIR [NAME ...]

DIR holds one directory a model, called as on the hub, such as DIR/Qwen2.5-7B-Instruct; without
--models they come from the hub. A head has one line for each topology, `#   v6e:8x8 --set ...`;
--write puts what was found below it.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
GIB = 2**30


def planned(head: str) -> list[tuple[str, list[str]]]:
    """Returns (topology, overrides) for every line of a config's head that names a TPU topology."""
    lines = re.findall(r"^#   (\w+:[\dx]+)((?: --set \S+)*)", head, re.MULTILINE)
    return [(topology, re.findall(r"--set (\S+)", settings)) for topology, settings in lines]


def model_of(file: Path) -> tuple[str, str]:
    """Returns (setting, hub id) of a config's model; for a run of its recipe, of the base."""
    tree = yaml.safe_load(file.read_text())
    key = "policy" if "policy" in tree else "model"
    path = tree[key]["path"]
    if path.startswith("RUNS/"):
        recipe = file.stem.split("_")[0]
        _, path = model_of(file.with_name(f"{recipe}_{path.removeprefix('RUNS/')}.yaml"))
    return f"{key}.path", path


def plan(stage: str, file: Path, topology: str, settings: list[str]) -> dict[str, Any]:
    """Returns what `plan --json` says, with its seconds: on the clock, and of all cores."""
    command = [sys.executable, "-m", "stepwiser_jax", "plan", stage, "--config", str(file)]
    command += ["--topology", topology, "--json", *(f"--set={item}" for item in settings)]
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout:
        raise SystemExit(f"{file.name} on {topology}: {done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    taken = {"wall_s": time.perf_counter() - begin, "core_s": used, "status": done.returncode}
    return json.loads(done.stdout) | taken


def largest(found: dict[str, Any]) -> tuple[str, str]:
    """Returns (GiB of a device's, the program that needs them)."""
    programs = found["programs"]
    refused = [name for name, entry in programs.items() if "refused" in entry]
    if refused:
        return "too many", refused[0]
    sizes = {name: entry["memory"]["total"] / GIB for name, entry in programs.items()}
    name = max(sizes, key=lambda each: sizes[each])
    hbm = found["topology"]["hbm_bytes_per_device"] / GIB
    return f"{sizes[name]:.1f} of {hbm:.0f}", name


def shares(found: dict[str, Any]) -> tuple[str, list[str]]:
    """Returns (a program, its share of peak without and with the interconnect)."""
    name = "train step" if "train step" in found["programs"] else "decode burst"
    entry = found["programs"][name]
    keys = (f"share_of_peak_{how}_interconnect" for how in ("without", "with"))
    return name, [f"{entry.get(key, 0.0):.0%}" for key in keys]


def row(name: str, topology: str, found: dict[str, Any]) -> str:
    """Returns a line of the table."""
    gib, program = largest(found)
    seconds = [
        sum(
            e["calls"] * e.get(f"seconds_{how}_interconnect", 0) for e in found["programs"].values()
        )
        for how in ("without", "with")
    ]
    cells = (
        name,
        topology,
        " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1),
        f"{gib}, {program}",
        ", ".join(shares(found)[1]),
        f"{seconds[0]:.0f}, {seconds[1]:.0f}",
        str(found["waves"] or ""),
        f"{found['core_s']:.0f}, {found['wall_s']:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def with_need(text: str, topology: str, found: dict[str, Any]) -> str:
    """Returns a config with what was found below the topology's line of its head."""
    (gib, program), (shared, (without, with_)) = largest(found), shares(found)
    waves = f"; {found['waves']} wave(s)" if found["waves"] else ""
    need = f"{gib} GiB a chip, {program}; {shared} {without} of peak, {with_} with links{waves}"
    return re.sub(
        rf"^(#   {topology}(?: .*)?\n)(?:#     .*\n)?", rf"\g<1>#     {need}\n", text, flags=re.M
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of configs, such as qwen2.5-7b_judge")
    parser.add_argument("--models", type=Path)
    parser.add_argument("--topology", help="only this one")
    parser.add_argument("--write", action="store_true", help="what was found into the heads")
    parser.add_argument("--json", type=Path, help="append everything that plan says to this file")
    args = parser.parse_args()
    print(
        "| config | topology | mesh | GiB of a device's, in | share of peak | seconds | waves "
        "| plan's core s, wall s |\n|---|---|---|---|---|---|---|---|"
    )
    for file in sorted(CONFIGS.glob("*.yaml")):
        if args.names and file.stem not in args.names:
            continue
        text = file.read_text()
        stage = yaml.safe_load(text)["stage"]
        for topology, settings in planned(text):
            if args.topology not in (None, topology):
                continue
            key, model = model_of(file)
            if args.models:
                model = str(args.models / model.split("/")[-1])
            found = plan(stage, file, topology, [*settings, f"{key}={model}"])
            print(row(file.stem, topology, found), flush=True)
            if args.write:
                file.write_text(with_need(file.read_text(), topology, found))
            if args.json:
                with args.json.open("a") as out:
                    print(json.dumps({"config": file.stem, "of": topology} | found), file=out)


if __name__ == "__main__":
    main()

"""`stepwiser plan`: does a run fit a TPU slice, and how fast can it be?

Nothing is run and no TPU is needed: the TPU's own compiler compiles every program of the run.

    memory      inputs, outputs, temporaries and code of a program, and what else the run holds
    seconds     a lower bound: the largest of the times for products, for HBM, and for links
    share       useful FLOPs (no padding, no recomputation) over the peak of all chips in that time
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from stepwiser_jax.commands.plan.programs import Programs, programs_of
from stepwiser_jax.commands.plan.tpu import (
    GIB,
    Need,
    Topology,
    compile_program,
    host_devices,
    roofline,
    tpu_topology,
)
from stepwiser_jax.config import (
    STAGE_CONFIGS,
    Config,
    Evaluate,
    Sampled,
    Sft,
    TrainClassifier,
    TrainJudge,
)
from stepwiser_jax.config_files import load_config, validate
from stepwiser_jax.distributed.mesh import make_mesh, processes_of
from stepwiser_jax.errors import UserError
from stepwiser_jax.runs.progress import progress


@dataclass(frozen=True)
class Plan:
    """The programs of a run, and what each needs of a device."""

    stage: str
    topology: Topology
    mesh: jax.sharding.Mesh
    programs: Programs
    needs: list[Need]

    @property
    def bytes_per_device(self) -> float:
        return self.topology.chip.hbm_gib * GIB / self.topology.chip.devices

    def fits(self, need: Need) -> bool:
        return not need.refused and need.total_bytes <= self.bytes_per_device

    @property
    def too_large(self) -> list[Need]:
        return [need for need in self.needs if not self.fits(need)]

    @property
    def notes(self) -> list[str]:
        """Returns what the numbers do not show."""
        of_host = self.mesh.devices.size < len(self.topology.devices)
        if not (of_host and self.topology.chip.whole_slices):
            return []
        return [
            f"the compiler refuses programs on a part of a {self.topology.kind} slice, so this is "
            "a plan for a slice of one host; use any number of them, with --shard"
        ]


def make_plan(
    stage: str, config: Config, topology: str, slices: int = 1, only: str | None = None
) -> Plan:
    """Returns the plan of a run.

    Args:
        stage: the name of the stage.
        config: its config.
        topology: chips of a slice, such as v5p:4x4x4.
        slices: the number of slices.
        only: the name of the one program to compile; by default all of them.

    Raises:
        UserError: for an unknown topology, a stage without a plan, or a mesh that does not use all
            devices.
    """
    jax.config.update("jax_platforms", "cpu")
    described = tpu_topology(topology, slices)
    mesh_config = getattr(config, "mesh", None)
    if mesh_config is None:
        raise UserError(f"stage {stage} runs no model: there is nothing to plan")
    devices, owner = described.devices, f"{topology} x {slices}"
    trains = isinstance(config, TrainJudge | Sft | TrainClassifier)
    if not trains and len(processes_of(devices)) > 1:
        # Each process samples its share with a copy of the model on its own devices.
        devices, owner = host_devices(described), f"each process of {owner}"
    sizes = mesh_config.model_dump()
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"{owner} has {len(devices)} devices, the mesh {math.prod(sizes.values())}: make "
            "mesh.data x mesh.fsdp x mesh.tensor the number of devices"
        )
    mesh = make_mesh(**sizes, devices=devices)
    programs = programs_of(config, mesh)
    chosen = [program for program in programs.programs if only in (None, program.name)]
    needs = []
    with progress(f"plan {stage}", "program", len(chosen)) as report:
        for program in chosen:
            needs.append(compile_program(program))
            report.advance()
    return Plan(stage, described, mesh, programs, needs)


# --- the largest batch that fits ----------------------------------------------------------------


def largest(candidates: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Returns the last of ascending candidates that fits; None if the first does not."""
    low, high = -1, len(candidates)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(candidates[middle]) else (low, middle)
    return None if low < 0 else candidates[low]


def search(stage: str, config: Any, topology: str, slices: int) -> dict[str, int | None]:
    """Returns the settings of the largest batches that fit, None for one that never fits.

    For sampling that is the number of rows in flight, for training the rows of a micro-batch.
    """
    shards = config.mesh.data * config.mesh.fsdp

    def fits(program: str, group: str, **settings: Any) -> bool:
        tree = config.model_dump(mode="json")
        tree[group] |= settings
        other = validate(STAGE_CONFIGS[stage], tree, "--search")
        return not make_plan(stage, other, topology, slices, only=program).too_large

    found: dict[str, int | None] = {}
    rows = [shards * 2**n for n in range(13)]
    if isinstance(config, Sampled):
        found["engine.rows"] = largest(rows, lambda n: fits("decode burst", "engine", rows=[n]))
    if isinstance(config, Evaluate):
        engine = config.judge.model_dump(mode="json")["engine"]
        found["judge.engine.rows"] = largest(
            rows, lambda n: fits("decode burst", "judge", engine=engine | {"rows": [n]})
        )
    if isinstance(config, TrainJudge | Sft | TrainClassifier):
        total = (
            config.prompts_per_iteration // config.updates_per_iteration
            if isinstance(config, TrainJudge)
            else config.batch_size
        )
        sizes = [shards * n for n in range(1, total // shards + 1) if total % (shards * n) == 0]
        size = largest(sizes, lambda n: fits("train step", "training", micro_batches=total // n))
        found["rows of a micro-batch"] = size
        found["training.micro_batches"] = None if size is None else total // size
    return found


# --- what is printed ----------------------------------------------------------------------------


def as_dict(plan: Plan) -> dict[str, Any]:
    """Returns everything for --json: bytes of a device, seconds of a call, shares from 0 to 1."""
    return {
        "stage": plan.stage,
        "topology": {
            "chip": plan.topology.kind,
            "chips": plan.topology.chips,
            "slices": plan.topology.slices,
            "devices": len(plan.topology.devices),
            "hbm_bytes_per_device": plan.bytes_per_device,
        },
        "mesh": dict(plan.mesh.shape),
        "work": plan.programs.work,
        "waves": plan.programs.waves,
        "programs": {need.program.name: _program(plan, need) for need in plan.needs},
        "fits": not plan.too_large,
        "notes": plan.notes,
    }


def _program(plan: Plan, need: Need) -> dict[str, Any]:
    program, chip = need.program, plan.topology.chip
    entry: dict[str, Any] = {
        "calls": program.calls,
        "fits": plan.fits(need),
        "compile_seconds": need.compile_seconds,
    }
    if not plan.fits(need):
        entry["change"] = program.change
    if need.cost is None or need.memory is None:
        return entry | {"refused": need.refused}
    seconds = roofline(need.cost, plan.topology, program.mesh)
    without = max(seconds["compute"], seconds["hbm"])
    with_links = max(without, seconds["interconnect"])
    peak = chip.flops / chip.devices * program.mesh.devices.size
    collectives: Counter[str] = Counter()
    for collective, received in need.cost.collectives.items():
        collectives[f"{collective.kind} of {len(collective.group)}"] += int(received)
    return entry | {
        "memory": need.memory | {"held_beside": program.resident, "total": need.total_bytes},
        "flops": need.cost.flops,
        "hbm_bytes": need.cost.hbm_bytes,
        "collectives": dict(collectives),
        "seconds": seconds,
        "seconds_without_interconnect": without,
        "seconds_with_interconnect": with_links,
        "useful_flops": program.useful_flops,
        "share_of_peak_without_interconnect": _share(program.useful_flops, peak * without),
        "share_of_peak_with_interconnect": _share(program.useful_flops, peak * with_links),
    }


def _share(useful: float, possible: float) -> float:
    return useful / possible if possible else 0.0


def as_text(plan: Plan) -> str:
    """Returns the tables for a person; the first line says whether the run fits."""
    whole, chip = as_dict(plan), plan.topology.chip
    compiled = {name: p for name, p in whole["programs"].items() if "refused" not in p}
    sizes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items())
    each = f", {chip.devices} devices each" if chip.devices > 1 else ""
    lines = [
        _verdict(plan, compiled),
        "",
        f"{plan.stage} on {plan.topology.chips} {plan.topology.kind} chips, mesh {sizes}; "
        f"{chip.hbm_gib} GiB a chip{each}",
        f"{plan.programs.work}; the longest case: every prompt and completion at its limit",
        "",
        f"{'':19}{'':>6}  GiB a device; donated: inputs that outputs replace; held: by the run",
        f"{'':19}{'calls':>6}{'in':>8}{'out':>8}{'donated':>8}{'temp':>8}{'code':>8}{'held':>8}"
        f"{'all':>8}{'a chip':>8}",
    ]
    for name, entry in whole["programs"].items():
        if "refused" in entry:
            lines.append(f"{name:19}{entry['calls']:>6}  does not fit: {entry['refused']}")
            continue
        parts = ("arguments", "outputs", "donated", "temporaries", "code", "held_beside", "total")
        gib = [entry["memory"][part] / GIB for part in parts]
        cells = "".join(f"{size:8.2f}" for size in (*gib, gib[-1] * chip.devices))
        lines.append(f"{name:19}{entry['calls']:>6}{cells}{'' if entry['fits'] else '  too large'}")
    lines += [
        "",
        f"{'':19}{'TFLOP':>9}{'HBM GiB':>9} |{'compute':>9}{'HBM':>9}{'links':>9} |"
        f"{'share of peak':>14}{'with links':>11}{'compiled':>10}",
    ]
    for name, entry in compiled.items():
        seconds = entry["seconds"]
        lines.append(
            f"{name:19}{entry['flops'] / 1e12:9.2f}{entry['hbm_bytes'] / GIB:9.1f} |"
            f"{seconds['compute']:8.3f}s{seconds['hbm']:8.3f}s{seconds['interconnect']:8.3f}s |"
            f"{entry['share_of_peak_without_interconnect']:14.1%}"
            f"{entry['share_of_peak_with_interconnect']:11.1%}{entry['compile_seconds']:9.0f}s"
        )
        received = sorted(entry["collectives"].items(), key=lambda item: -item[1])
        if received:
            listed = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in received)
            lines.append(f"{'':19}received, GiB: {listed}")
    lines += [f"{need.program.name} does not fit: {need.program.change}" for need in plan.too_large]
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _verdict(plan: Plan, compiled: dict[str, Any]) -> str:
    """Returns one sentence: whether the run fits, and the least time of its calls."""
    hbm = plan.topology.chip.hbm_gib
    if plan.too_large:
        names = ", ".join(need.program.name for need in plan.too_large)
        return f"does not fit: {names} needs more than the {hbm} GiB of a chip"
    largest_need = max(plan.needs, key=lambda need: need.total_bytes)
    gib = largest_need.total_bytes * plan.topology.chip.devices / GIB
    without, with_links = (
        sum(entry["calls"] * entry[f"seconds_{how}_interconnect"] for entry in compiled.values())
        for how in ("without", "with")
    )
    return (
        f"fits: {gib:.1f} of {hbm} GiB a chip ({largest_need.program.name}); all calls take at "
        f"least {without:.1f} s, with the interconnect {with_links:.1f} s"
    )


def print_plan(
    stage: str,
    config_file: Path,
    overrides: tuple[str, ...],
    topology: str,
    slices: int,
    *,
    as_json: bool,
    searched: bool,
) -> bool:
    """Prints the plan of a run; returns whether everything fits."""
    config = load_config(stage, config_file, overrides)
    plan = make_plan(stage, config, topology, slices)
    largest_batches = search(stage, config, topology, slices) if searched else {}
    if as_json:
        print(json.dumps(as_dict(plan) | {"largest": largest_batches}, indent=2))
    else:
        print(as_text(plan))
        for name, value in largest_batches.items():
            print(f"largest {name}: {'none fits' if value is None else value}")
    return not plan.too_large

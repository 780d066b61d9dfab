"""`stepwiser plan`: does a run fit a TPU slice, and how fast can it be? Nothing is run, and no TPU
is needed: every program of the run is compiled by the TPU's own compiler.

    memory      what a program takes and gives, temporaries, code, and what else the run holds
    time        the larger of products and HBM, and of the interconnect too: a bound from below
    share       useful FLOPs (no padding, nothing twice) over the peak of all chips times that time
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
    Sampler,
    Sft,
    TrainClassifier,
    TrainJudge,
    load_config,
    validate,
)
from stepwiser_jax.distributed.mesh import make_mesh, processes_of
from stepwiser_jax.errors import UserError


@dataclass(frozen=True)
class Plan:
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
    def notes(self) -> list[str]:
        """What the numbers do not show."""
        of_host = self.mesh.devices.size < len(self.topology.devices)
        if not (of_host and self.topology.chip.whole_slices):
            return []
        return [
            f"the compiler refuses programs of part of a {self.topology.kind} slice: planned for a "
            "slice of one host; use as many of them as you like, with --shard"
        ]

    @property
    def too_large(self) -> list[Need]:
        return [need for need in self.needs if not self.fits(need)]


def make_plan(
    stage: str, config: Config, topology: str, slices: int = 1, only: str | None = None
) -> Plan:
    """Compiles every program, or the one called `only`. Raises UserError for a topology or a stage
    that has none, and a mesh that is not of all its devices."""
    jax.config.update("jax_platforms", "cpu")
    described = tpu_topology(topology, slices)
    mesh_config = getattr(config, "mesh", None)
    if mesh_config is None:
        raise UserError(f"stage {stage} runs no model: there is nothing to plan")
    devices, owner = described.devices, f"{topology} x {slices}"
    if (
        not isinstance(config, TrainJudge | Sft | TrainClassifier)
        and len(processes_of(devices)) > 1
    ):
        # Every process samples its share with a copy of the model on its own devices.
        devices = host_devices(described)
        owner = f"each process of {owner}"
    if math.prod(mesh_config.model_dump().values()) != len(devices):
        raise UserError(
            f"{owner} has {len(devices)} devices, the mesh "
            f"{math.prod(mesh_config.model_dump().values())}: make mesh.data x mesh.fsdp x "
            "mesh.tensor the number of devices"
        )
    mesh = make_mesh(**mesh_config.model_dump(), devices=devices)
    programs = programs_of(config, mesh)
    chosen = [p for p in programs.programs if only in (None, p.name)]
    needs = [compile_program(program) for program in chosen]
    return Plan(stage, described, mesh, programs, needs)


# --- the largest batch that fits ----------------------------------------------------------------


def largest(candidates: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The last candidate that fits, of ascending ones; None where the first does not."""
    low, high = -1, len(candidates)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(candidates[middle]) else (low, middle)
    return None if low < 0 else candidates[low]


def search(stage: str, config: Any, topology: str, slices: int) -> dict[str, int | None]:
    """Setting -> its value for the largest batch that fits: rows in flight for sampling, rows of a
    micro-batch for training."""
    shards = config.mesh.data * config.mesh.fsdp
    found: dict[str, int | None] = {}

    def changed(**settings: Any) -> Any:
        tree = config.model_dump(mode="json")
        for key, value in settings.items():
            tree[key] = tree[key] | value
        return validate(STAGE_CONFIGS[stage], tree, "--search")

    def fits(name: str, other: Any) -> bool:
        return not make_plan(stage, other, topology, slices, only=name).too_large

    if isinstance(config, Sampler | Evaluate):
        rows = [shards * 2**n for n in range(13)]

        def sampling_fits(count: int) -> bool:
            if isinstance(config, Sampler):
                return fits("decode segment", changed(engine={"rows": [count]}))
            judge = config.judge.model_dump(mode="json")
            return fits(
                "decode segment", changed(judge={"engine": judge["engine"] | {"rows": [count]}})
            )

        found["engine.rows"] = largest(rows, sampling_fits)
    if isinstance(config, TrainJudge | Sft | TrainClassifier):
        total = (
            config.prompts_per_iteration // config.updates_per_iteration
            if isinstance(config, TrainJudge)
            else config.batch_size
        )
        sizes = [shards * n for n in range(1, total // shards + 1) if total % (shards * n) == 0]

        def training_fits(rows: int) -> bool:
            return fits("train step", changed(training={"micro_batches": total // rows}))

        size = largest(sizes, training_fits)
        found["rows of a micro-batch"] = size
        found["training.micro_batches"] = None if size is None else total // size
    return found


# --- what is printed ----------------------------------------------------------------------------


def as_dict(plan: Plan) -> dict[str, Any]:
    """Everything, for --json: bytes of a device, seconds of a call, shares between 0 and 1."""
    chip = plan.topology.chip
    programs = {}
    for need in plan.needs:
        entry: dict[str, Any] = {
            "calls": need.program.calls,
            "fits": plan.fits(need),
            "compile_seconds": need.compile_seconds,
        }
        if not plan.fits(need):
            entry["change"] = need.program.change
        if need.cost is None:
            programs[need.program.name] = entry | {"refused": need.refused}
            continue
        seconds = roofline(need.cost, plan.topology, need.program.mesh)
        alone = max(seconds["compute"], seconds["hbm"])
        peak = chip.flops / chip.devices * need.program.mesh.devices.size
        collectives: Counter[str] = Counter()
        for collective, received in need.cost.collectives.items():
            collectives[f"{collective.kind} of {len(collective.group)}"] += int(received)
        programs[need.program.name] = entry | {
            "memory": need.memory
            | {"held_beside": need.program.resident, "total": need.total_bytes}
            if need.memory
            else None,
            "flops": need.cost.flops,
            "hbm_bytes": need.cost.hbm_bytes,
            "collectives": dict(collectives),
            "seconds": seconds,
            "seconds_without_interconnect": alone,
            "seconds_with_interconnect": max(alone, seconds["interconnect"]),
            "useful_flops": need.program.useful_flops,
            "share_of_peak_without_interconnect": _share(need, peak, alone),
            "share_of_peak_with_interconnect": _share(
                need, peak, max(alone, seconds["interconnect"])
            ),
        }
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
        "programs": programs,
        "fits": not plan.too_large,
        "notes": plan.notes,
    }


def _share(need: Need, peak: float, seconds: float) -> float:
    return need.program.useful_flops / (peak * seconds) if seconds else 0.0


def as_text(plan: Plan) -> str:
    whole, chip = as_dict(plan), plan.topology.chip
    sizes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items())
    lines = [
        f"{plan.stage} on {plan.topology.chips} {plan.topology.kind} chips, mesh {sizes}; "
        f"{chip.hbm_gib} GiB a chip"
        + (f", {chip.devices} devices each" if chip.devices > 1 else ""),
        f"{plan.programs.work}; the longest case: every prompt and completion at its limit",
        "",
        f"{'':19}{'':>6}  GiB a device (in, out, donated, temporaries, code, held beside: all)",
        f"{'':19}{'calls':>6}{'in':>8}{'out':>8}{'donated':>8}{'temp':>8}{'code':>8}{'beside':>8}"
        f"{'all':>8}{'a chip':>8}",
    ]
    for name, entry in whole["programs"].items():
        if "refused" in entry:
            lines.append(f"{name:19}{entry['calls']:>6}  does not fit: {entry['refused']}")
            continue
        parts = ("arguments", "outputs", "donated", "temporaries", "code", "held_beside", "total")
        gib = [entry["memory"][part] / GIB for part in parts]
        gib.append(gib[-1] * chip.devices)
        cells = "".join(f"{size:8.2f}" for size in gib)
        lines.append(f"{name:19}{entry['calls']:>6}{cells}{'' if entry['fits'] else '  too large'}")
    lines += [
        "",
        f"{'':19}{'TFLOP':>9}{'HBM GiB':>9} |{'compute':>9}{'HBM':>9}{'links':>9} |"
        f"{'share of peak':>14}{'with links':>11}{'compiled':>10}",
    ]
    total = {"seconds_without_interconnect": 0.0, "seconds_with_interconnect": 0.0}
    for name, entry in whole["programs"].items():
        if "refused" in entry:
            continue
        seconds = entry["seconds"]
        for key in total:
            total[key] += entry["calls"] * entry[key]
        lines.append(
            f"{name:19}{entry['flops'] / 1e12:9.2f}{entry['hbm_bytes'] / GIB:9.1f} |"
            f"{seconds['compute']:8.3f}s{seconds['hbm']:8.3f}s{seconds['interconnect']:8.3f}s |"
            f"{entry['share_of_peak_without_interconnect']:14.1%}"
            f"{entry['share_of_peak_with_interconnect']:11.1%}{entry['compile_seconds']:9.0f}s"
        )
        moved = sorted(entry["collectives"].items(), key=lambda item: -item[1])
        if moved:
            listed = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in moved)
            lines.append(f"{'':19}received, GiB: {listed}")
    lines.append(
        f"all calls: at least {total['seconds_without_interconnect']:.1f} s, with the interconnect "
        f"{total['seconds_with_interconnect']:.1f} s"
    )
    lines += [f"{need.program.name} does not fit: {need.program.change}" for need in plan.too_large]
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


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
    """The command itself; returns whether everything fits."""
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

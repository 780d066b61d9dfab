"""Compiles programs for TPUs that need not exist, and computes the memory and time they need.

libtpu holds the TPU's compiler, and a CPU is enough to run it. Nothing here allocates or computes:
the inputs of a program are only shapes (`distributed.shapes`).
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from stepwiser_jax.commands.plan.hlo_cost import Collective, Cost, KernelCost, program_cost
from stepwiser_jax.distributed.mesh import devices_of_process, processes_of, slice_of
from stepwiser_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """The hardware of one chip.

    Bandwidths are bytes/s: of HBM, of one interconnect link in one direction, and of the network
    between slices. An axis of the torus whose size is a multiple of `ring` closes to a ring, which
    has two ways round. With `whole_slices` the compiler refuses programs that use only some devices
    of a slice.
    """

    hbm_gib: int
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    ring: int
    devices: int = 1
    whole_slices: bool = False


# From Google Cloud's documentation of each TPU version, bfloat16. Links, network and rings follow
# "How to Scale Your Model" (jax-ml.github.io/scaling-book, chapter 2) and were checked against no
# second source, so times on the interconnect are only as good as these.
CHIPS = {
    "v4": Chip(32, 275e12, 1.23e12, 4.5e10, 6.25e9, ring=4),
    "v5e": Chip(16, 197e12, 8.2e11, 4.5e10, 3.125e9, ring=16, whole_slices=True),
    "v5p": Chip(95, 459e12, 2.77e12, 9e10, 6.25e9, ring=4),
    "v6e": Chip(32, 918e12, 1.64e12, 9e10, 1.25e10, ring=16, whole_slices=True),
    "tpu7x": Chip(192, 2307e12, 7.37e12, 9e10, 1.25e10, ring=4, devices=2),
}


@dataclass(frozen=True)
class Topology:
    """`slices` slices of chips in a grid of `shape`."""

    kind: str
    shape: tuple[int, ...]
    slices: int
    devices: list[Any]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices


def tpu_topology(name: str, slices: int = 1) -> Topology:
    """Returns a topology by name, such as v5e:2x2 or v5p:4x4x4. Needs libtpu, and no TPU.

    Raises UserError for an unknown chip, for a shape that the compiler refuses, and without libtpu.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
    if match is None or match[1] not in CHIPS:
        raise UserError(
            f"expected a topology such as v5p:4x4x4, of {', '.join(CHIPS)}, found {name!r}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for a TPU needs its compiler: pip install 'stepwiser-jax[tpu]' "
            "(a machine without a TPU is enough)"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # This machine does not matter, but without these libtpu prints errors about it.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
    from jax.experimental import topologies

    kind, shape = match[1], tuple(map(int, match[2].split("x")))
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # the two cores of a chip are one device
    if math.prod(shape) < 4:  # less than a host of four chips
        options["chips_per_host_bounds"] = (*shape, 1, 1)[:3]
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (RuntimeError, ValueError) as error:  # jax raises several of their kinds
        reason = str(error).splitlines()[0]
        raise UserError(f"the compiler refuses the topology {name}: {reason}") from None
    return Topology(kind, shape, slices, list(described.devices))


def host_devices(topology: Topology) -> list[Any]:
    """Returns the devices of one process.

    If the compiler refuses programs on a part of a slice, they are those of a slice of that shape.
    """
    processes = processes_of(topology.devices)
    own = devices_of_process(topology.devices, processes[0])
    if len(processes) == 1 or not topology.chip.whole_slices:
        return own
    sizes = [1 + max(device.coords[axis] for device in own) for axis in range(2)]
    return tpu_topology(f"{topology.kind}:{sizes[0]}x{sizes[1]}").devices


# --- programs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """One program of a run. `lower` traces it.

    `mesh`: the devices that run it together: all, or in a sampling stage those of one process.
    `calls`: how often it runs, in the longest case, in what the plan is for (an iteration, a wave).
    `resident`: bytes of a device that the run holds beside what the program takes and gives.
    `loops`: how often loops run if data decide it, by a part of their op_name.
    `kernel`: the cost of its custom calls, which the compiler does not know.
    `useful_flops`: those of one call on all devices of `mesh`, without padding and recomputation.
    `change`: the settings that make it smaller.
    """

    name: str
    lower: Callable[[], Any]
    mesh: jax.sharding.Mesh
    calls: int
    useful_flops: float
    change: str
    resident: int = 0
    loops: dict[str, float] = field(default_factory=dict)
    kernel: KernelCost = lambda *_: None


@dataclass(frozen=True)
class Need:
    """What a program needs of one device, or why the compiler refused it."""

    program: Program
    compile_seconds: float
    memory: dict[str, int] | None
    cost: Cost | None
    refused: str = ""

    @property
    def total_bytes(self) -> int:
        """Bytes held at once: inputs, outputs, temporaries, code, and what else the run holds."""
        if self.memory is None:
            return 0
        own = sum(self.memory[part] for part in ("arguments", "outputs", "temporaries", "code"))
        return own - self.memory["donated"] + self.program.resident


def compile_program(program: Program) -> Need:
    """Compiles a program and reads its costs. One that is too large is no error: see `refused`."""
    begin = time.perf_counter()
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())
        used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", reason)
        refused = f"needs {used[1]} of {used[2]}" if used else reason[:300]
        return Need(program, time.perf_counter() - begin, None, None, refused)
    seconds = time.perf_counter() - begin
    sizes = compiled.memory_analysis()
    memory = {
        "arguments": sizes.argument_size_in_bytes,
        "outputs": sizes.output_size_in_bytes,
        "donated": sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "code": sizes.generated_code_size_in_bytes,
        "peak": sizes.peak_memory_in_bytes,
    }

    def trips(op_name: str) -> float | None:
        return next((count for part, count in program.loops.items() if part in op_name), None)

    cost = program_cost(compiled.as_text(), trips=trips, kernel=program.kernel)
    return Need(program, seconds, memory, cost)


def roofline(cost: Cost, topology: Topology, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Returns the least seconds of a call for products, for HBM and for the interconnect.

    At best the three overlap, so a call takes at least the largest of them.
    """
    chip = topology.chip
    seconds = [
        received / bandwidth(collective, topology, mesh)
        for collective, received in cost.collectives.items()
    ]
    return {
        "compute": cost.flops / (chip.flops / chip.devices),
        "hbm": cost.hbm_bytes / (chip.hbm_bandwidth / chip.devices),
        "interconnect": sum(seconds),
    }


def bandwidth(collective: Collective, topology: Topology, mesh: jax.sharding.Mesh) -> float:
    """Returns the bytes/s that a device of the group can receive.

    Each axis of the torus that the group spreads over has a link, or two if the axis is a ring that
    the group fills. Between slices the devices of a slice share its network.
    """
    chip = topology.chip
    devices = [mesh.devices.flat[i] for i in collective.group]
    slices = {slice_of(device) for device in devices}
    if len(slices) > 1:
        return chip.network_bandwidth / chip.devices * (len(devices) / len(slices))
    links = 0
    for axis, size in enumerate(topology.shape):
        spread = len({device.coords[axis] for device in devices})
        if spread > 1:
            links += 2 if spread == size and size % chip.ring == 0 else 1
    on_one_chip = not links  # no slower than two links
    return (2 if on_one_chip else links) * chip.link_bandwidth / chip.devices

"""Computes what a compiled program costs one device, from its HLO text.

    flops         of matrix products (the rest is bound by memory), and of kernels that state them
    hbm_bytes     read and written; memory on the chip (memory spaces S(1), ...) does not count
    collectives   bytes that a device receives, by kind and by the group that exchanges them

XLA's own `cost_analysis` counts the body of a loop once, and has no collectives. Bytes of HBM
follow its rules: a fusion reads each operand once, a slice reads only the slice, and an update in
place writes only the update. Sizes include the padding of tiles.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from stepwiser_jax.commands.plan.hlo_text import Computation, Instruction, Shape, parse

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "optimization-barrier", "add-dependency", "copy-done",
    "slice-done", "async-done", "async-update", "call-done", "call-update", "domain",
}  # fmt: skip
"""Instructions that move nothing, or whose cost was counted at their start."""

BOOKKEEPING = {
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "PrepareAsyncCallStart",
    "PrepareAsyncCallDone",
    "Sharding",
}
"""Custom calls of the TPU compiler that move nothing."""


@dataclass(frozen=True)
class Collective:
    """A kind of exchange, and the devices of one of its groups as the program numbers them."""

    kind: str
    group: tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """The cost of one device; `collectives` are bytes received."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: Counter[Collective] = field(default_factory=Counter)

    def __add__(self, other: Cost) -> Cost:
        total = Counter(self.collectives)
        total.update(other.collectives)
        return Cost(self.flops + other.flops, self.hbm_bytes + other.hbm_bytes, total)

    def __mul__(self, times: float) -> Cost:
        scaled = Counter({group: times * size for group, size in self.collectives.items()})  # pyright: ignore
        return Cost(times * self.flops, times * self.hbm_bytes, scaled)


Trips = Callable[[str], float | None]
"""Returns how often a loop runs if data decide it, from its op_name; None if unknown."""

KernelCost = Callable[[Instruction, list[Instruction]], Cost | None]
"""Returns the cost of a kernel that states none, from its call and operands; None if unknown."""


def program_cost(
    text: str, *, trips: Trips = lambda _: None, kernel: KernelCost = lambda *_: None
) -> Cost:
    """Returns the cost of an optimized HLO module (`compiled.as_text()`).

    Args:
        text: the module.
        trips: says how often loops run if data decide it.
        kernel: says what kernels cost that do not state it.

    Raises:
        ValueError: for a loop of unknown length or a kernel of unknown cost.
    """
    reader = _Reader(parse(text), trips, kernel)
    return reader.of(next(name for name in reader.computations if name.startswith("ENTRY ")))


# --- instructions -> costs ----------------------------------------------------------------------


@dataclass
class _Reader:
    computations: dict[str, Computation]
    trips: Trips
    kernel: KernelCost
    known: dict[str, Cost] = field(default_factory=dict)

    def of(self, name: str) -> Cost:
        if name not in self.known:
            computation = self.computations[name]
            parts = (self._of(i, computation) for i in computation.instructions.values())
            self.known[name] = sum(parts, Cost())
        return self.known[name]

    def _of(self, i: Instruction, computation: Computation) -> Cost:
        kind = i.opcode.removesuffix("-start")
        if i.opcode in FREE or (
            i.opcode.removesuffix("-done") in COLLECTIVES and "-done" in i.opcode
        ):
            return Cost()
        if kind == "while":
            body, condition = (
                i.attribute(rf"{part}=%?([\w.\-]+)") for part in ("body", "condition")
            )
            assert body and condition
            once = self.of(body) + self.of(condition)
            return once * self._trip_count(i, computation)
        if kind == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", i.text)
            names = re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
            names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", i.text)
            return max((self.of(name) for name in names), key=lambda cost: cost.flops)
        if kind in ("call", "async"):
            return self.of(i.called("to_apply|calls"))
        if kind == "custom-call":
            return self._custom_call(i, computation)
        cost = Cost(hbm_bytes=self._hbm_bytes(i, computation))
        if kind in COLLECTIVES:
            return cost + _collective(kind, i, computation)
        if kind == "fusion":
            return cost + self._inside(i)
        return cost + Cost(flops=_product_flops(i, computation))

    def _inside(self, fusion: Instruction) -> Cost:
        """Returns the products and collectives inside a fusion; its bytes are counted outside."""
        called = self.computations[fusion.called("calls")]
        total = Cost()
        for i in called.instructions.values():
            if i.opcode == "fusion":
                total += self._inside(i)
            elif i.opcode.removesuffix("-start") in COLLECTIVES:
                total += _collective(i.opcode.removesuffix("-start"), i, called)
            elif i.opcode in ("dot", "convolution"):
                total += Cost(flops=_product_flops(i, called))
        return total

    def _custom_call(self, i: Instruction, computation: Computation) -> Cost:
        if (target := i.attribute(r'custom_call_target="([^"]*)"')) in BOOKKEEPING:
            return Cost()
        operands = computation.operands(i)
        if target != "tpu_custom_call":
            return Cost(hbm_bytes=self._hbm_bytes(i, computation))
        stated = re.search(r'"cost_estimate":(\{[^{}]*\})', i.text)
        if stated:
            fields = json.loads(stated[1])
            return Cost(float(fields.get("flops", 0)), float(fields.get("bytes_accessed", 0)))
        cost = self.kernel(i, operands)
        if cost is None:
            raise ValueError(f"the kernel {i.name} ({i.op_name}) states no cost")
        return cost

    # --- loops ----------------------------------------------------------------------------------

    def _trip_count(self, loop: Instruction, computation: Computation) -> float:
        stated = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        if stated is not None:
            return int(stated)
        counted = self._counted(loop, computation)
        if counted is None:
            counted = self.trips(loop.op_name)
        if counted is None:
            raise ValueError(f"how often does the loop {loop.name} ({loop.op_name}) run?")
        return counted

    def _counted(self, loop: Instruction, computation: Computation) -> int | None:
        """Returns the length of a loop `for (i = constant; i < constant; i += constant)`."""
        condition = self.computations[loop.called("condition")]
        body = self.computations[loop.called("body")]
        test = condition.instructions[condition.root]
        if test.opcode != "compare" or "direction=LT" not in test.text:
            return None
        counter, limit = (condition.source(name) for name in test.operands)
        index = counter.attribute(r"index=(\d+)")
        if counter.opcode != "get-tuple-element" or index is None:
            return None
        step = self._step(body, int(index))
        start = self._entry_of(loop, computation, int(index))
        end = limit.constant
        place = limit.attribute(r"index=(\d+)")
        if end is None and place is not None and self._step(body, int(place)) == 0:
            end = self._entry_of(loop, computation, int(place))
        if start is None or end is None or not step:
            return None
        return max(0, math.ceil((end - start) / step))

    def _step(self, body: Computation, index: int) -> int | None:
        """Returns what the body adds to an entry of its state; 0 if it hands it on unchanged."""
        new = body.source(body.instructions[body.root].operands[index])
        if new.opcode == "get-tuple-element" and f"index={index}" in re.split(r"[, ]", new.text):
            return 0
        if new.opcode != "add":
            return None
        steps = [body.source(name).constant for name in new.operands]
        return next((step for step in steps if step is not None), None)

    def _entry_of(self, loop: Instruction, computation: Computation, index: int) -> int | None:
        state = computation.source(loop.operands[0])
        if state.opcode != "tuple":
            return None
        return computation.source(state.operands[index]).constant

    # --- bytes ----------------------------------------------------------------------------------

    def _hbm_bytes(self, i: Instruction, computation: Computation) -> float:
        operands = computation.operands(i)
        kind = i.opcode.removesuffix("-start")
        if i.opcode in ("copy-start", "slice-start"):
            target, source = i.shapes[0], i.shapes[1]
            if i.opcode == "slice-start":  # ((operands), result, ...)
                target, source = i.shapes[1], i.shapes[0]
            return target.bytes * (target.in_hbm + source.in_hbm)
        if kind == "fusion":
            called = self.computations[i.called("calls")]
            read = sum(
                self._read(called, n)
                for n, operand in enumerate(operands)
                if any(shape.in_hbm for shape in operand.shapes)
            )
            return read + self._written(called, called.root, i.shapes)
        if kind in ("dynamic-slice", "gather", "slice"):
            return 2 * i.hbm_bytes
        if kind == "dynamic-update-slice":
            return 2 * operands[1].hbm_bytes
        if kind == "scatter":
            return 3 * operands[2].hbm_bytes + operands[1].hbm_bytes
        if kind in COLLECTIVES and i.opcode.endswith("-start"):
            return 2 * sum(operand.hbm_bytes for operand in operands)
        return sum(operand.hbm_bytes for operand in operands) + i.hbm_bytes

    def _read(self, computation: Computation, number: int) -> float:
        """Returns how many bytes of a parameter a fused computation reads."""
        parameter = computation.parameters[number]
        whole = sum(shape.bytes for shape in parameter.shapes)
        return min(whole, self._read_by_users(computation, parameter, whole))

    def _read_by_users(self, computation: Computation, value: Instruction, whole: float) -> float:
        if value.name == computation.root:  # handed on as it is
            return whole
        read = 0.0
        for user in computation.users[value.name]:
            if user.opcode == "bitcast":
                read += self._read_by_users(computation, user, whole)
            elif user.opcode in ("dynamic-slice", "gather", "slice"):
                is_source = user.operands[0] == value.name
                read += sum(shape.bytes for shape in user.shapes) if is_source else whole
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
                continue  # in place
            elif user.opcode == "fusion":
                called = self.computations[user.called("calls")]
                read += self._read(called, user.operands.index(value.name))
            else:
                return whole
        return read

    def _written(self, computation: Computation, name: str, shapes: tuple[Shape, ...]) -> float:
        """Returns the bytes that a fused computation writes; its leaves lie as in `shapes`."""
        value = computation.instructions[name]
        while value.opcode == "bitcast":
            value = computation.instructions[value.operands[0]]
        if value.opcode == "tuple":
            leaves = (
                self._written(computation, operand, (shape,))
                for operand, shape in zip(value.operands, shapes, strict=True)
            )
            return sum(leaves)
        if not any(shape.in_hbm for shape in shapes):
            return 0.0
        if value.opcode == "dynamic-update-slice":
            return sum(s.bytes for s in computation.instructions[value.operands[1]].shapes)
        if value.opcode == "fusion":
            called = self.computations[value.called("calls")]
            return self._written(called, called.root, shapes)
        return sum(shape.bytes for shape in shapes if shape.in_hbm)


# --- products -----------------------------------------------------------------------------------


def _product_flops(i: Instruction, computation: Computation) -> float:
    if i.opcode == "dot":
        left = computation.operands(i)[0].shapes[0]
        axes = i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        contracted = math.prod(left.dims[int(axis)] for axis in axes.split(",") if axis)
        return 2 * i.shapes[0].elements * contracted
    if i.opcode == "convolution":
        left, right = (operand.shapes[0] for operand in computation.operands(i))
        return _convolution_flops(i, left.dims, right.dims)
    return 0.0


def _convolution_flops(i: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """Returns the FLOPs of a convolution; on TPU every product is one.

    Batch axes are windows with gaps, so only pairs of positions that meet in the input count.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.text)
    assert labels is not None, i.text[:200]
    size_of_left = dict(zip(labels[1], left, strict=True))
    size_of_right = dict(zip(labels[2], right, strict=True))
    size_of_out = dict(zip(labels[3], i.shapes[0].dims, strict=True))
    groups = int(i.attribute(r"batch_group_count=(\d+)") or 1)
    window = i.attribute(r"window=\{([^}]*)\}") or ""
    settings = dict(item.split("=") for item in window.split())

    def of_axis(name: str, axis: int, default: str) -> str:
        return settings[name].split("x")[axis] if name in settings else default

    meeting = 1
    for axis in itertools.count():
        if (label := str(axis)) not in size_of_out:
            break
        low = int(of_axis("pad", axis, "0_0").split("_")[0])
        stride, dilate = (int(of_axis(n, axis, "1")) for n in ("stride", "lhs_dilate"))
        spread = int(of_axis("rhs_dilate", axis, "1"))
        out = np.arange(size_of_out[label])[:, None] * stride
        place = out - low + np.arange(size_of_right[label])[None] * spread
        inside = (place >= 0) & (place <= (size_of_left[label] - 1) * dilate)
        meeting *= int(np.sum(inside & (place % dilate == 0)))
    return 2.0 * size_of_left["b"] // groups * size_of_out["f"] * size_of_right["i"] * meeting


# --- collectives --------------------------------------------------------------------------------


def _collective(kind: str, i: Instruction, computation: Computation) -> Cost:
    """Returns the bytes that one device receives by the best algorithm on a ring."""
    group = _first_group(i)
    size = len(group)
    sent = sum(sum(s.bytes for s in operand.shapes) for operand in computation.operands(i))
    others = (size - 1) / size
    received = {
        "all-gather": (size - 1) * sent,
        "all-reduce": 2 * others * sent,
        "reduce-scatter": others * sent,
        "all-to-all": others * sent,
        "collective-permute": sent,
    }[kind]
    if size < 2:
        return Cost()
    return Cost(collectives=Counter({Collective(kind, group): received}))  # pyright: ignore


def _first_group(i: Instruction) -> tuple[int, ...]:
    """Returns one group of devices; HLO writes groups in three ways."""
    if (pairs := i.attribute(r"source_target_pairs=\{(.*?\})\}")) is not None:
        ends = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", pairs)]
        return next((pair for pair in ends if pair[0] != pair[1]), (0,))
    if (listed := i.attribute(r"replica_groups=\{\{([\d,]+)\}")) is not None:
        return tuple(map(int, listed.split(",")))
    iota = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", i.text)
    if iota is not None:
        return tuple(_iota(iota[1])[0].tolist())
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", i.text
    )
    if mesh is None or ":" in mesh[3]:  # a part of a mesh axis
        raise ValueError(f"which devices take part in {i.name}? {i.text[:300]}")
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    devices = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(sizes.values()))
    names = re.findall(r"'(\w+)'", mesh[3])
    index = tuple(slice(None) if name in names else 0 for name in sizes)
    return tuple(devices.reshape(tuple(sizes.values()))[index].ravel().tolist())


def _iota(text: str) -> np.ndarray:
    """Returns the ids that `[4,2]<=[2,4]T(1,0)` means: 0..7 as (2, 4), transposed, as (4, 2).

    The first and the last part are optional.
    """
    match = re.match(r"(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert match is not None, text
    target, source, order = (
        [int(n) for n in part.split(",")] if part else [] for part in match.groups()
    )
    ids = np.arange(math.prod(source)).reshape(source)
    if order:
        ids = ids.transpose(order)
    return ids.reshape(target) if target else ids

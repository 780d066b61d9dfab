"""Parses the text of an optimized HLO module (`compiled.as_text()`) into instructions."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BYTES_OF = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "token": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The type and layout of one array."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def in_hbm(self) -> bool:
        return re.search(r"S\([1-9]\d*\)", self.layout) is None

    @functools.cached_property
    def bytes(self) -> float:
        """Its size in memory, with the padding of the first tile, T(8,128), over the minor axes."""
        dims = list(self.dims)
        tile = re.search(r"T\(([\d,]+)\)", self.layout)
        order = re.match(r"\{([\d,]+)", self.layout)
        if tile and order:
            minor_first = [int(axis) for axis in order[1].split(",")]
            sizes = [int(size) for size in tile[1].split(",")][::-1]
            if len(sizes) <= len(dims):  # a larger one stands for a single tile
                for axis, size in zip(minor_first, sizes, strict=False):
                    dims[axis] = math.ceil(dims[axis] / size) * size
        return math.prod(dims) * BYTES_OF.get(self.dtype, 1)


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    `shapes` are the leaves of its result. `operands` are names in the same computation. `text` is
    what follows the opcode: literal operands and attributes.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str

    def attribute(self, pattern: str) -> str | None:
        """Returns the first group of the pattern in the text."""
        match = re.search(pattern, self.text)
        return match[1] if match else None

    def called(self, role: str) -> str:
        """Returns the name of the computation that it calls as its `body`, `condition`, ..."""
        name = self.attribute(rf"(?:{role})=%?([\w.\-]+)")
        assert name is not None, (self.name, role)
        return name

    @property
    def op_name(self) -> str:
        """The path of the jax operation that it comes from."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def constant(self) -> int | None:
        """The value of an integer constant, None for any other instruction."""
        literal = self.attribute(r"^\((-?\d+)\)")
        return int(literal) if self.opcode == "constant" and literal is not None else None

    @property
    def hbm_bytes(self) -> float:
        return sum(shape.bytes for shape in self.shapes if shape.in_hbm)


@dataclass
class Computation:
    """A named list of instructions; the entry's name begins with `ENTRY `."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands):
                found[operand].append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {
            int(i.text[1 : i.text.index(")")]): i
            for i in self.instructions.values()
            if i.opcode == "parameter"
        }

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands]

    def source(self, name: str) -> Instruction:
        """Returns the instruction that a value comes from, through copies and conversions."""
        instruction = self.instructions[name]
        while instruction.opcode in ("copy", "bitcast", "convert"):
            instruction = self.instructions[instruction.operands[0]]
        return instruction


def parse(text: str) -> dict[str, Computation]:
    """Returns the computations of a module by name."""
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    for line in _statements(text):
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header and not line.startswith(" "):
            current = Computation((header[1] or "") + header[2])
            computations[current.name] = current
        elif current is not None and (
            match := re.match(r" +(ROOT )?%?([\w.\-]+) = (.*)", line, re.S)
        ):
            instruction = _instruction(match[2], match[3])
            current.instructions[instruction.name] = instruction
            if match[1]:
                current.root = instruction.name
    return computations


def _statements(text: str) -> Iterator[str]:
    """Yields lines, joined if an attribute holds line breaks."""
    held: list[str] = []
    for line in text.splitlines():
        is_new = re.match(r" +(ROOT )?%?[\w.\-]+ = |(ENTRY )?%?[\w.\-]+ \(.*\{$|\}$|$", line)
        if is_new and held:
            yield "\n".join(held)
            held = []
        held.append(line)
    yield "\n".join(held)


def _instruction(name: str, rest: str) -> Instruction:
    rest = re.sub(r"/\*.*?\*/", "", rest)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else _end_of_shape(rest)
    match = re.match(r"\s*([\w\-]+)\(", rest[end:])
    assert match is not None, rest[:200]
    start = end + match.end() - 1
    close = _closing(rest, start)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[start:close]))
    return Instruction(name, match[1], _shapes(rest[:end]), operands, rest[start:])


def _end_of_shape(rest: str) -> int:
    match = re.match(r"\w+\[[^\]]*\](\{[^}]*\})?|token\[\]", rest)
    assert match is not None, rest[:200]
    return match.end()


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return start + match.start()
    raise ValueError(f"unbalanced parentheses in {text[start : start + 200]!r}")


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(d.strip("<=")) for d in dims.split(",") if d), layout or "")
        for dtype, dims, layout in re.findall(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?", text)
    )

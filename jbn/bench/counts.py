"""Count memory passes, kernels and temporary bytes of a compiled program from its HLO text."""

import math
import re
from typing import Any, NamedTuple

FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "copy-start", "copy-done", "after-all"}
"""Operations that neither read nor write memory."""
ROWS = {"slice", "dynamic-slice", "gather"}
"""Operations that read a part of their first argument, no larger than their result."""
DTYPES = {"pred": 1, "s32": 4, "u32": 4, "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
"""Bytes per value. 8-bit types are excluded: such arrays are workspaces of convolutions, sized by the free memory."""
COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) .*?\{$(.*?)^\}", re.MULTILINE | re.DOTALL)
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)(?= [\w\-]+\()|\S+) ([\w\-]+)\((.*)")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


class Counts(NamedTuple):
    """Counts of a compiled program."""

    passes: float
    """reads and writes of large arrays at kernel boundaries, in units of one array"""
    kernels: int
    temporary_bytes: int
    moved_bytes: int
    """reads and writes of all arrays"""


class Instruction(NamedTuple):
    """One instruction of an HLO computation."""

    name: str
    shape: str
    operation: str
    arguments: list[str]
    """Names of instructions; for a parameter, its number."""
    called: str | None


def count(compiled: Any, bytes_of_one: int) -> Counts:
    """Count a compiled program. Arrays of at least `bytes_of_one / 2` are large. Bodies of loops are not counted."""
    computations = _computations(compiled.as_text())
    kernels, moved = 0, []
    shapes: dict[str, str] = {}
    for instruction in computations[""]:
        shapes[instruction.name] = instruction.shape
        if instruction.operation in FREE:
            continue
        kernels += 1
        inner = computations.get(instruction.called or "-", [])
        read = [
            shapes.get(name, "")
            for place, name in enumerate(instruction.arguments)
            if instruction.operation not in ROWS and not _reads_rows_only(inner, place)
        ]
        moved += [size for shape in (instruction.shape, *read) for size in _sizes(shape)]
    passes = sum(size for size in moved if size >= bytes_of_one / 2) / bytes_of_one
    return Counts(passes, kernels, compiled.memory_analysis().temp_size_in_bytes, sum(moved))


def _computations(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each computation by name; the entry computation has the name ""."""
    return {
        "" if entry else name: [_instruction(line) for line in filter(None, map(INSTRUCTION.match, body.split("\n")))]
        for entry, name, body in COMPUTATION.findall(text)
    }


def _instruction(line: re.Match[str]) -> Instruction:
    name, shape, operation, rest = line.groups()
    given, _, attributes = rest.partition(")")
    called = re.search(r"calls=%([\w.\-]+)", attributes)
    arguments = [given] if operation == "parameter" else re.findall(r"%([\w.\-]+)", given)
    return Instruction(name, shape, operation, arguments, called and called[1])


def _reads_rows_only(computation: list[Instruction], place: int) -> bool:
    """Whether a fused computation reads only slices or gathered rows of its argument at this position."""
    names = {line.name for line in computation if line.operation == "parameter" and line.arguments == [str(place)]}
    for line in computation:
        if names.intersection(line.arguments):
            if line.operation == "bitcast":
                names.add(line.name)
            elif line.operation not in ROWS or line.arguments[0] not in names:
                return False
    return bool(names)


def _sizes(shape: str) -> list[int]:
    """Bytes of each array in a shape, except arrays in the fast memory S(1) of a TPU."""
    return [
        DTYPES[dtype] * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes, layout in ARRAY.findall(shape)
        if dtype in DTYPES and "S(1)" not in layout
    ]

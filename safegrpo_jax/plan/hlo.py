"""Reads a compiled program's HLO text: how often each instruction runs, what is communicated, moved and copied.

The compiler's own totals count the body of a loop once; here it counts as often as the loop turns. A loop whose number
of turns depends on data, such as the decode loop, counts as many as the caller says. Bytes are those of one device.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_MOVES = {
    "parameter", "constant", "copy", "dynamic-slice", "slice", "transpose", "reshape", "bitcast", "pad", "concatenate",
    "tuple", "get-tuple-element", "broadcast", "iota",
}  # fmt: skip
_COPIES = {"copy", "dynamic-slice", "slice", "transpose", "reshape", "concatenate", "pad"}
# Instructions that name values or structure, and access no memory of their own.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "copy-done", "async-done", "all-gather-done", "all-reduce-done",
    "collective-permute-done",
}  # fmt: skip
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_SHAPE = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`shape` and `attributes` as text; `operands` are names of the same computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, and the name of the one that runs."""

    computations: dict[str, list[Instruction]]
    entry: str


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one run of a program on one device. `collectives`: bytes by kind; `calls`: of custom calls by target;
    `cycles` and `copy_cycles`: the compiler's estimates of all instructions that have one, and of those that only move
    data; `memory_bytes`: read from and written to HBM; `largest_elements`: of any one array."""

    collectives: dict[str, int]
    calls: dict[str, int]
    cycles: int
    copy_cycles: int
    memory_bytes: int
    largest_elements: int


def parse(text: str) -> Program:
    """Parses the HLO text of one module.

    Raises:
      ValueError: it holds no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if line.endswith("{") and " -> " in line and not line.startswith(" "):
            name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line).group(1)
            current = computations.setdefault(name, [])
            entry = name if line.startswith("ENTRY") else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_parse_instruction(match.group(2), match.group(3), bool(match.group(1))))
    if entry is None:
        raise ValueError("HLO text without an ENTRY computation")
    return Program(computations, entry)


def _parse_instruction(name: str, rest: str, is_root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[opening : closing + 1]))
    return Instruction(name, shape, rest[:opening], operands, rest[opening:], is_root)


def _closing(text: str, opening: int) -> int:
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"unbalanced HLO text: {text[opening : opening + 80]}")


def counted(program: Program, turns: int = 1) -> Iterator[tuple[int, Instruction, dict[str, Instruction]]]:
    """Every instruction outside fusions with the number of its runs and its computation's instructions by name. A loop
    whose turns data decides makes `turns`."""
    pending = [(program.entry, 1)]
    while pending:
        name, times = pending.pop()
        instructions = {instruction.name: instruction for instruction in program.computations[name]}
        for instruction in instructions.values():
            yield times, instruction, instructions
            if instruction.opcode == "while":
                own_turns = trip_count(program, instruction, instructions) or turns
                pending.append((_attribute(instruction, "body"), times * own_turns))
            elif instruction.opcode == "conditional":
                branches = re.findall(r"(?:true_computation|false_computation)=%?([\w.\-]+)", instruction.attributes)
                listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                branches += re.findall(r"%?([\w.\-]+)", listed.group(1)) if listed else []
                pending += [(branch, times) for branch in branches]
            elif instruction.opcode in ("call", "async-start"):
                target = _attribute(instruction, "to_apply") or _attribute(instruction, "calls")
                pending.append((target, times))


def trip_count(program: Program, loop: Instruction, around: dict[str, Instruction]) -> int | None:
    """Turns of a `while`: what the compiler noted, or the constant that its condition compares a counter from 0 with.
    None where data decides."""
    noted = re.search(r'known_trip_count"?[:=]\s*\{"?n"?:\s*"?(\d+)', loop.attributes)
    if noted:
        return int(noted.group(1))
    condition = {item.name: item for item in program.computations[_attribute(loop, "condition")]}
    root = next(item for item in condition.values() if item.is_root)
    if root.opcode == "fusion":  # the comparison was wrapped; its constant may come from outside of it
        inner = program.computations[_attribute(root, "calls")]
        comparison = next((item for item in inner if item.is_root), root)
        places = {item.name: int(item.attributes[1:].split(")")[0]) for item in inner if item.opcode == "parameter"}
        inside = {item.name: item for item in inner}
        operands = [
            condition[root.operands[places[name]]] if name in places else inside[name] for name in comparison.operands
        ]
    else:
        comparison, operands = root, [condition[name] for name in root.operands if name in condition]
    if comparison.opcode != "compare" or "direction=LT" not in comparison.attributes:
        return None
    limits = [item.attributes[1:].split(")")[0] for item in operands if item.opcode == "constant"]
    limits = [int(limit) for limit in limits if limit.isdigit()]
    return limits[0] if len(limits) == 1 else None


def measure(program: Program, turns: int = 1) -> Traffic:
    """Sums over all that runs; `turns` as in `counted`."""
    collectives: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    cycles = copy_cycles = memory_bytes = largest = 0
    for times, item, around in counted(program, turns):
        kind = item.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            operands = sum(shape_bytes(around[name].shape) for name in item.operands if name in around)
            # An asynchronous start returns its operands beside its results.
            result = shape_bytes(item.shape) - (operands if item.opcode.endswith("-start") else 0)
            collectives[kind] += times * max(operands, result)
        if item.opcode == "custom-call":
            calls[re.search(r'custom_call_target="([^"]*)"', item.attributes).group(1)] += times
        estimate = re.search(r'"estimated_cycles":"(\d+)"', item.attributes)
        if estimate:
            cycles += times * int(estimate.group(1))
            copy_cycles += times * int(estimate.group(1)) * is_copy(program, item)
        memory_bytes += times * _accessed(program, item, around)
        largest = max(largest, _largest_array(item.shape))
    collected = {kind: int(size) for kind, size in collectives.items()}
    return Traffic(collected, dict(calls), cycles, copy_cycles, int(memory_bytes), largest)


def is_copy(program: Program, item: Instruction) -> bool:
    """True for a copy, slice or transposition, and for a fusion of nothing else."""
    if item.opcode != "fusion":
        return item.opcode in _COPIES
    opcodes = {inner.opcode for inner in program.computations[_attribute(item, "calls")]}
    return opcodes <= _MOVES and bool(opcodes & _COPIES)


def shape_bytes(shape: str, in_hbm: bool = False) -> int:
    """Bytes of an array or of all arrays of a tuple; `in_hbm` leaves out those that the compiler keeps on the chip."""
    total = 0.0
    for kind, sizes, layout in _SHAPE.findall(shape):
        if in_hbm and re.search(r"S\([1-9]", layout):
            continue
        total += math.prod(int(size) for size in sizes.split(",") if size) * _item_bytes(kind)
    return int(total)


def _item_bytes(kind: str) -> float:
    bits = re.search(r"\d+", kind)
    return int(bits.group()) / 8 if bits else 1.0  # pred


def _largest_array(shape: str) -> int:
    arrays = (sizes.split(",") for _, sizes, _ in _SHAPE.findall(shape))
    return max((math.prod(int(size) for size in sizes if size) for sizes in arrays), default=0)


def _accessed(program: Program, item: Instruction, around: dict[str, Instruction]) -> int:
    """Bytes of HBM that an instruction reads and writes. Of what it only slices, or writes a slice of, the slice."""
    if item.opcode in _FREE:
        return 0
    operands = [around[name] for name in item.operands if name in around]
    if item.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * shape_bytes(item.shape, in_hbm=True)
    if item.opcode == "dynamic-update-slice":
        return 2 * shape_bytes(operands[1].shape, in_hbm=True)
    if item.opcode != "fusion":
        own = 0 if item.opcode.endswith("-start") else shape_bytes(item.shape, in_hbm=True)
        return own + sum(shape_bytes(operand.shape, in_hbm=True) for operand in operands)
    inner = {part.name: part for part in program.computations[_attribute(item, "calls")]}
    users = collections.defaultdict(list)
    for part in inner.values():
        for name in part.operands:
            users[name].append(part)
    updated: set[str] = set()  # parameters of which a slice is overwritten in place
    written = shape_bytes(item.shape, in_hbm=True)
    for part in inner.values():
        if part.opcode == "dynamic-update-slice":
            source = _source(inner, part.operands[0])
            if inner[source].opcode == "parameter":
                updated.add(source)
                written += shape_bytes(inner[part.operands[1]].shape) - min(shape_bytes(part.shape), written)
    read = 0
    for part in inner.values():
        if part.opcode != "parameter" or part.name in updated:
            continue
        place = int(part.attributes[1:].split(")")[0])
        if place >= len(operands) or not shape_bytes(operands[place].shape, in_hbm=True):
            continue
        slices = [user for user in users[part.name] if user.opcode in ("dynamic-slice", "slice", "gather")]
        whole = shape_bytes(part.shape)
        sliced = sum(shape_bytes(user.shape) for user in slices)
        read += min(whole, sliced) if slices and len(slices) == len(users[part.name]) else whole
    return int(max(written, 0) + read)


def _source(inner: dict[str, Instruction], name: str) -> str:
    while inner[name].opcode in ("bitcast", "reshape", "convert", "copy") and inner[name].operands:
        name = inner[name].operands[0]
    return name


def _attribute(item: Instruction, key: str) -> str | None:
    found = re.search(rf"\b{key}=%?([\w.\-]+)", item.attributes)
    return found.group(1) if found else None

"""The collectives of a compiled program, read from its text.

A collective inside a loop is counted once per turn of the loop, as far as the loop says how many
turns it has (`known_trip_count`, or `compare(counter, constant), direction=LT` as its condition).
A loop without a fixed number of turns (sampling until every row has ended) counts as one turn, and
the result says so. Bytes are what one device receives when n devices pass the data round a ring:

    all-gather          (n - 1) / n of the result      reduce-scatter    n - 1 times the result
    all-reduce      2 * (n - 1) / n of the result      all-to-all        (n - 1) / n of the result
    collective-permute  the result
"""

import dataclasses
import math
import re
from collections.abc import Mapping

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {
    **{"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16},
    **{"s32": 32, "u32": 32, "s64": 64, "u64": 64},
    **{"f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64},
}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(" + "|".join(BITS) + r")\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Collectives:
    """The collectives of one call of a program, on one device.

    Attributes:
      bytes: received, by kind; only kinds that are run.
      dynamic: a loop of unknown length was counted as one turn.
    """

    bytes: Mapping[str, int]
    dynamic: bool


@dataclasses.dataclass(frozen=True)
class _Operation:
    """A line `%name = type kind(rest` of a computation.

    Attributes:
      rest: operands and attributes.
    """

    name: str
    type: str
    kind: str
    rest: str


_Computations = Mapping[str, Mapping[str, _Operation]]  # name -> its operations by name


def collectives(text: str) -> Collectives:
    """Adds up the collectives of `compiled.as_text()` from the entry computation on.

    body:  all-gather of 4 devices, bf16[16,8]        256 bytes, of which 3/4 are received
    main:  while(condition: counter < 5)              5 * 192 = 960 bytes
    """
    computations, entry = _computations(text)
    devices = int(match[1]) if (match := re.search(r"num_partitions=(\d+)", text)) else 1
    totals: dict[str, float] = {}
    dynamic = False

    def visit(name: str, times: int) -> None:
        nonlocal dynamic
        for operation in computations.get(name, {}).values():
            kind = operation.kind.removesuffix("-start")
            if kind in KINDS:
                received = _received(kind, operation, _group_size(operation.rest, devices))
                totals[kind] = totals.get(kind, 0) + times * received
            turns = _turns(computations, operation) if operation.kind == "while" else 1
            dynamic |= turns is None
            for called in _called(operation.rest):
                visit(called, times * (1 if turns is None else turns))

    visit(entry, 1)
    return Collectives({kind: round(totals[kind]) for kind in KINDS if kind in totals}, dynamic)


def _computations(text: str) -> tuple[dict[str, dict[str, _Operation]], str]:
    computations: dict[str, dict[str, _Operation]] = {}
    current: dict[str, _Operation] = {}
    entry = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations[match[1]] = {}
            if line.startswith("ENTRY"):
                entry = match[1]
        elif match := _OPERATION.match(line):
            current[match[1]] = _Operation(*match.groups())
    return computations, entry


def _called(rest: str) -> list[str]:
    names = []
    for one, several in _CALLED.findall(rest):
        names += [one] if one else [name.strip().lstrip("%") for name in several.split(",")]
    return names


def _turns(computations: _Computations, loop: _Operation) -> int | None:
    """How many turns a loop has; None where neither it nor its condition says so.

    A counter starts at zero and goes up by one: XLA's own loops over layers and micro-batches do.
    """
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(match[1])
    match = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    condition = computations.get(match[1], {}) if match else {}
    if not condition:
        return None
    root = list(condition.values())[-1]
    if root.kind != "compare" or "direction=LT" not in root.rest:
        return None
    for operand in re.findall(r"%([\w.\-]+)", root.rest.split(")")[0]):
        operation = condition.get(operand)
        if operation is not None and operation.kind == "constant":
            return int(operation.rest.split(")")[0])
    return None


def _array_bytes(type_text: str) -> list[int]:
    return [
        math.prod(int(n) for n in dimensions.split(",") if n) * BITS[element] // 8
        for element, dimensions in _ARRAY.findall(type_text)
    ]


def _received(kind: str, operation: _Operation, n: int) -> float:
    """Bytes that one of `n` devices receives; the formulas at the top of this module."""
    sizes = _array_bytes(operation.type)
    if operation.kind == "collective-permute-start":
        sizes = sizes[1:2]  # (operand, result, two counters)
    elif operation.kind == "all-gather-start":
        sizes = sizes[len(sizes) // 2 :]  # (operands, results)
    size = sum(sizes)
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":
        return size * (n - 1)
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _group_size(rest: str, devices: int) -> int:
    """Devices in one group; all devices where no groups are named.

    replica_groups={{0,1},{2,3}}              2       lists of devices
    replica_groups=[2,8]<=[16]                8       groups x devices
    replica_groups=mesh['a'=2,'b'=8] {'b'}    8       sizes of the axes that are named
    """
    match = re.search(r"replica_groups=(\{\{[\d,]*\}|\[\d+,\d+\]|mesh\[[^\]]*\] ?\{[^}]*\})", rest)
    if match is None:
        return devices
    groups = match[1]
    if groups.startswith("{{"):
        return groups.count(",") + 1
    if groups.startswith("["):
        return int(groups[1:-1].split(",")[1])
    sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", groups)}
    return math.prod(sizes[axis] for axis in re.findall(r"'([^']+)'", groups.partition("]")[2]))

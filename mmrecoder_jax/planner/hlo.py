"""The collectives of a compiled program, read from its text.

A collective inside a loop counts as often as the loop turns, as far as the loop's condition says
how often that is (`compare(counter, constant), direction=LT`). A loop without a fixed number of
turns (sampling until every row has ended) counts as one turn, and the result says so. Bytes are
what one device receives when n devices pass the data round a ring:

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
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "bf16": 16,
    "f16": 16,
    "s16": 16,
    "u16": 16,
    "f32": 32,
    "s32": 32,
    "u32": 32,
}
BITS |= {"f64": 64, "s64": 64, "u64": 64, "f8e4m3fn": 8, "f8e5m2": 8}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(" + "|".join(BITS) + r")\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Collectives:
    """{kind: bytes received by a device} and {kind: how many are run}; `dynamic`: a loop of unknown
    length counts as one turn.
    """

    bytes: Mapping[str, int]
    counts: Mapping[str, int]
    dynamic: bool

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclasses.dataclass(frozen=True)
class _Operation:
    name: str
    type: str
    kind: str
    rest: str  # operands and attributes


def collectives(text: str) -> Collectives:
    """Adds up the collectives of `compiled.as_text()` from the entry computation on."""
    computations, entry = _computations(text)
    devices = int(match[1]) if (match := re.search(r"num_partitions=(\d+)", text)) else 1
    totals = {kind: 0.0 for kind in KINDS}
    counts = {kind: 0 for kind in KINDS}
    dynamic = False

    def visit(name: str, times: int) -> None:
        nonlocal dynamic
        for operation in computations.get(name, {}).values():
            kind = operation.kind.removesuffix("-start")
            if kind in KINDS:
                totals[kind] += times * _received(
                    kind, operation, _group_size(operation.rest, devices)
                )
                counts[kind] += times
            turns = 1
            if operation.kind == "while":
                turns = _turns(computations, operation)
                dynamic |= turns is None
            for called in _called(operation.rest):
                visit(called, times * (turns or 1))

    visit(entry, 1)
    used = [kind for kind in KINDS if counts[kind]]
    return Collectives(
        {kind: round(totals[kind]) for kind in used}, {kind: counts[kind] for kind in used}, dynamic
    )


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


def _turns(computations, loop: _Operation) -> int | None:
    """How often a loop turns, from `compare(counter, constant), direction=LT` in its condition;
    None where that is not what it is.
    """
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(match[1])
    condition = computations.get(re.search(r"condition=%?([\w.\-]+)", loop.rest)[1], {})
    root = list(condition.values())[-1] if condition else None
    if root is None or root.kind != "compare" or "direction=LT" not in root.rest:
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
    """Devices of one group: from `{{0,1},{2,3}}`, `[2,8]<=[16]` or `mesh['a'=2,'b'=8] {'b'}`; all
    devices where none are named.
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

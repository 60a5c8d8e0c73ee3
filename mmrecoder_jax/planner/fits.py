"""Does a stage fit a TPU slice? What each of its programs needs on a chip, and smaller choices.

Programs (`planner.programs`) are compiled ahead of time for the slice, and the compiler says what
memory they take. When one does not fit, `variants` are compiled until one does.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
from ml_collections import ConfigDict

from mmrecoder_jax.config import model_config, set_fields
from mmrecoder_jax.models.trees import split
from mmrecoder_jax.planner import hlo, topology
from mmrecoder_jax.planner.programs import Program, Programs, model_flops
from mmrecoder_jax.reporting.tables import Row, format_table
from mmrecoder_jax.rl.trajectory import MODES

GIB = 2**30
# XLA's exec_time_optimization_effort. At -1 it compiles about seven times faster.
EFFORT = {"low": -1.0, "default": 0.0}

Fields = dict[str, Any]  # {"model.remat": "full"}: what differs from a configuration


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One compiled program on one slice. Sizes are bytes on one device.

    Arguments and live temporaries are in `peak`; `resident` is in memory beside the program:

        used = peak + resident
        peak = params, optimizer, cache, batch, gradients (as far as it reads them) + temporaries

    Attributes:
      lora: the rank of the adapters that alone are trained, or 0.
      mesh: devices as data x fsdp x tensor.
      rows, length: of one call, over all devices.
      params, optimizer: all of them, whether the program reads them or not.
      gradients: the sums over micro-batches.
      calls: how often an update runs the program.
      resident: the optimizer (except for the update), and parameters that the program does not
        read.
      hbm: what the compiler lets a program use.
      flops: of one call.
      collectives: {kind: bytes received} in one call.
      dynamic: a loop without a fixed number of turns was counted as one turn.
      seconds: that the compilation took.
      weights: the copy of the policy that decoding reads; held while a rollout runs.
      ahead: with `rl.ahead`, the older policy that a rollout reads beside updates, and beside these
        the caches and weights of the rollout.
      fingerprint: equal where the program and the slice are the same (both RL stages have the same
        gradients).
    """

    slice: str
    chips: int
    preset: str
    lora: int
    stage: str
    program: Program
    mesh: str
    rows: int
    length: int
    remat: str
    effort: str
    params: int
    optimizer: int
    cache: int
    batch: int
    gradients: int
    calls: int
    peak: int
    resident: int
    hbm: int
    flops: float
    collectives: Mapping[str, int]
    dynamic: bool
    seconds: float
    fingerprint: str
    weights: int = 0
    ahead: int = 0

    @property
    def temporaries(self) -> int:
        return self.peak - self.arguments

    @property
    def arguments(self) -> int:
        """What the program reads."""
        held = self.params + self.optimizer + self.weights + self.ahead - self.resident
        return held + self.cache + self.batch + self.gradients

    @property
    def used(self) -> int:
        return self.peak + self.resident

    @property
    def fits(self) -> bool:
        return self.used <= self.hbm

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Of a line that `to_json` wrote."""
        fields = json.loads(line)
        return cls(**fields | {"program": Program(fields["program"])})


def measure(
    programs: Programs,
    program: Program,
    wanted: topology.Slice,
    effort: str,
    known: Iterable[ProgramReport] = (),
) -> ProgramReport:
    """Compiles one program and reads its needs.

    A program that does not fit is a report too: the compiler says what it would take.

    Args:
      effort: of the compiler, one of `EFFORT`.
      known: what is in a report of the very same program is not compiled again.

    Raises:
      jax.errors.JaxRuntimeError: the compiler failed for another reason than memory.
    """
    started = time.monotonic()
    # The lowered text is the program; slice and effort decide what the compiler makes of it.
    lowered = programs.lower(program)
    identity = f"{wanted.name} {effort} {lowered.as_text()}"
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
    before = next((report for report in known if report.fingerprint == fingerprint), None)
    if before is None:
        peak, collectives = _compile(lowered, effort)
        seconds = round(time.monotonic() - started, 1)
    else:
        peak, seconds = before.peak, before.seconds
        collectives = hlo.Collectives(before.collectives, before.dynamic)
    config = programs.config
    return ProgramReport(
        slice=wanted.name,
        chips=wanted.chips,
        preset=config.model.preset,
        lora=config.lora.rank,
        stage=config.stage,
        program=program,
        mesh="x".join(str(programs.mesh.shape[axis]) for axis in programs.mesh.axis_names),
        rows=programs.rows(program),
        length=programs.length(program),
        remat=config.model.remat,
        effort=effort,
        **held(programs, program),
        calls=programs.micro_batches if program == Program.GRADIENTS else 1,
        peak=peak,
        hbm=wanted.generation.hbm,
        flops=model_flops(programs, program) / wanted.chips,
        collectives=dict(collectives.bytes),
        dynamic=collectives.dynamic,
        seconds=seconds,
        fingerprint=fingerprint,
    )


def held(programs: Programs, program: Program) -> dict[str, int]:
    """Bytes on one device of what exists while a program runs, by field of its report."""

    def parameters(chosen: Callable[[str], bool]) -> int:
        return _local_bytes(split(programs.params, chosen)[0])

    params, optimizer = _local_bytes(programs.params), _local_bytes(programs.state.opt_state)
    cache = weights = batch = gradients = ahead = 0
    if programs.mode is not None:
        state = programs.sampler_state()
        cache, weights = _local_bytes((state.prefix, state.own)), _local_bytes(programs.weights)
        if programs.config.rl.ahead:
            ahead = parameters(programs.trained)
            ahead += 0 if program.samples else cache + weights
    if program.samples:
        batch = 0 if program == Program.DECODE else _local_bytes(programs.prompts(program))
    else:
        cache = weights = 0
        gradients = parameters(programs.trained) if programs.micro_batches > 1 else 0
        # The step of several micro-batches reads the sums alone.
        alone = program == Program.UPDATE and gradients
        batch = 0 if alone else _local_bytes(programs.micro_batch())
    unread = params - parameters(lambda name: programs.reads(program, name))
    return {
        "params": params,
        "optimizer": optimizer,
        "cache": cache,
        "batch": batch,
        "gradients": gradients,
        "weights": weights,
        "ahead": ahead,
        "resident": unread
        + ahead
        + (0 if program == Program.UPDATE else optimizer)
        + (0 if program == Program.DECODE else weights),
    }


def _local_bytes(tree: Any) -> int:
    """Bytes of a tree on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _compile(lowered: jax.stages.Lowered, effort: str) -> tuple[int, hlo.Collectives]:
    """(peak bytes, collectives); no collectives of a program that does not fit."""
    options = {"exec_time_optimization_effort": EFFORT[effort]}
    try:
        compiled = lowered.compile(options)  # type: ignore[arg-type]  # XLA wants a float here
    except jax.errors.JaxRuntimeError as error:
        needed = refused_bytes(str(error))
        if needed is None:
            raise
        return needed, hlo.Collectives({}, dynamic=False)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None, "the TPU compiler has both"
    return memory.peak_memory_in_bytes, hlo.collectives(text)


def refused_bytes(message: str) -> int | None:
    """Bytes that a program would have taken, from the compiler's refusal; None for another error.

    >>> refused_bytes("Ran out of memory on HBM, ... temporaries (2.00K) exceeds available HBM.")
    2048
    """
    match = re.search(r"Ran out of memory on HBM, .*?\((\d+(?:\.\d+)?)([KMG]?)\) exceeds", message)
    if match is None:
        return None
    return int(float(match[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[match[2]])


def variants(
    config: ConfigDict, program: Program, ways: int, hosts: int
) -> Iterator[tuple[Fields, ConfigDict]]:
    """Smaller choices to try in turn when a program does not fit.

    Gradients: layers recomputed; then micro-batches halved down to one row per device; then the
    model cut over twice as many devices (as far as its key heads go), with micro-batches of one
    row for each part that is left. A rollout: prompts at once halved, down to one per device.

    Args:
      ways: devices that rows are cut over.
      hosts: processes that share the batch.

    Yields:
      The fields that change, and the configuration with them.
    """
    choices = _smaller_rollouts if program.samples else _smaller_updates
    for fields in choices(config, ways, hosts):
        other = ConfigDict(config.to_dict())
        set_fields(other, fields)
        yield fields, other


def _smaller_rollouts(config: ConfigDict, ways: int, hosts: int) -> Iterator[Fields]:
    prompts = config.rl.rollout_prompts or config.train.batch_size
    while prompts % 2 == 0 and (prompts // 2) % ways == 0:
        prompts //= 2
        yield {"rl.rollout_prompts": prompts}


def _smaller_updates(config: ConfigDict, ways: int, hosts: int) -> Iterator[Fields]:
    # The cheapest first: recomputing costs time, smaller micro-batches more gathers of the weights,
    # a cut model an exchange in every layer.
    fields: Fields = {}
    if config.model.remat != "full":
        fields |= {"model.remat": "full"}
        yield dict(fields)
    group = config.rl.group if config.stage in MODES else 1
    rows, tensor = config.train.micro_batch_size, config.mesh.tensor

    def splits(rows: int) -> bool:
        """Whether devices and hosts can share the rows: whole groups, or equal parts of one."""
        own = rows // hosts
        return rows % ways == 0 and rows % hosts == 0 and (own % group == 0 or group % own == 0)

    while True:
        while rows % 2 == 0 and splits(rows // 2):
            rows //= 2
            fields |= {"train.micro_batch_size": rows}
            # Cut further, only the smallest micro-batch is tried: a larger one has failed before.
            if tensor == config.mesh.tensor:
                yield dict(fields)
        if tensor != config.mesh.tensor:
            yield dict(fields)
        if ways % 2 or model_config(config).num_kv_heads % (2 * tensor):
            return
        tensor, ways = 2 * tensor, ways // 2
        fields |= {"mesh.tensor": tensor}


def advise(
    config: ConfigDict,
    program: Program,
    ways: int,
    hosts: int,
    attempt: Callable[[ConfigDict], ProgramReport],
) -> Fields | None:
    """Compiles `variants` until one fits, and returns what it changes; None where none fits.

    Args:
      attempt: compiles the program of a configuration.
    """
    for fields, other in variants(config, program, ways, hosts):
        if attempt(other).fits:
            return fields
    return None


def plan(
    config: ConfigDict,
    chosen: Sequence[Program],
    wanted: topology.Slice,
    devices: Sequence[jax.Device],
    effort: str,
    try_smaller: bool,
    keep: Callable[[ProgramReport], None],
) -> str:
    """Compiles programs for one slice.

    Args:
      devices: of the slice.
      try_smaller: compiles `variants` where a program does not fit.
      keep: sees every report.

    Returns:
      What there is to say: a table, the collectives, and what fits.
    """
    programs = Programs(config, devices)
    reports: list[ProgramReport] = []
    notes: list[str] = []

    def attempt(program: Program, other: ConfigDict) -> ProgramReport:
        report = measure(Programs(other, devices), program, wanted, effort)
        keep(report)
        reports.append(report)
        return report

    for program in chosen:
        if program == Program.GRADIENTS and programs.micro_batches == 1:
            continue  # the update is one program
        if attempt(program, config).fits or not try_smaller:
            continue
        once = functools.partial(attempt, program)
        fields = advise(config, program, programs.ways, programs.hosts, once)
        notes.append(_advice(config, program, fields))
    if not notes:
        notes.append(
            "fits"
            if effort == "default"
            else "fits, as far as low effort tells: --effort=default may take a GiB or two more"
        )
    head = (
        f"{config.model.preset} {config.stage} on {wanted.name}: {wanted.chips} chips, GiB on one "
        f"chip, effort {effort}"
    )
    table = format_table(table_rows(reports))
    lines = ["", head, table, "received by a chip:", *map(collective_lines, reports), *notes]
    return "\n".join(lines)


def _advice(config: ConfigDict, program: Program, fields: Fields | None) -> str:
    if fields is not None:
        flags = " ".join(f"--config.{name}={value}" for name, value in fields.items())
        return f"{program} does not fit as configured; it fits with {flags}"
    return (
        f"{program} does not fit, and no smaller choice that was tried does: take a larger slice "
        f"or another mesh (--config.mesh.tensor={2 * config.mesh.tensor})"
    )


def table_rows(reports: Iterable[ProgramReport]) -> list[Row]:
    """One line of the printed table per program; sizes in GiB on one device."""

    def gib(n: float) -> str:
        return f"{n / GIB:.3g}"

    rows: list[Row] = []
    for r in reports:
        received = gib(sum(r.collectives.values())) + ("/token" if r.dynamic else "")
        rows.append(
            {
                "slice": r.slice,
                "program": r.program,
                "mesh": r.mesh,
                "rows": r.rows,
                "length": r.length,
                "params": gib(r.params),
                "optimizer": gib(r.optimizer),
                "cache": gib(r.cache),
                "batch": gib(r.batch),
                "gradients": gib(r.gradients),
                "temporaries": gib(r.temporaries),
                "used": gib(r.used),
                "of": gib(r.hbm),
                "fits": "fits" if r.fits else "NO",
                "TFLOP": f"{r.flops / 1e12:.3g}",
                "received": received if r.collectives else "-",
                "calls": r.calls,
                "compiled in": f"{r.seconds:.0f} s",
            }
        )
    return rows


def collective_lines(report: ProgramReport) -> str:
    """The collectives of a program by kind, in GiB received by a device."""
    kinds = ", ".join(f"{kind} {size / GIB:.3g}" for kind, size in report.collectives.items())
    unit = " GiB per token (the loop counts as one turn)" if report.dynamic else " GiB"
    return f"{report.program}: {kinds or 'none'}{unit}"

"""Does a program fit? What each needs on a device of a TPU slice, or of a node of GPUs.

Programs (`planner.programs`) are compiled ahead of time for the slice, and the compiler says what
memory they take. For GPUs they are counted (`planner.counted`).
"""

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import jax

from mmrecoder_jax.planner import counted, hlo, topology
from mmrecoder_jax.planner.programs import Program, Programs, model_flops
from mmrecoder_jax.reporting.tables import Row

GIB = 2**30
# XLA's exec_time_optimization_effort. At -1 it compiles about seven times faster.
EFFORT = {"low": -1.0, "default": 0.0}
COUNTED = "counted"  # in place of an effort: nothing was compiled


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One compiled program on one slice. Sizes are bytes on one device.

    Arguments and live temporaries are in `peak`; `resident` is in memory beside the program:

        used = peak + resident
        peak = params, optimizer, cache, batch, gradients (as far as it reads them) + temporaries

    Attributes:
      chips: devices of the slice, as JAX counts them.
      lora: the rank of the adapters that alone are trained, or 0.
      effort: of the compiler, or `COUNTED`.
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
      reference: with `rl.kl_coef`, the copy of what is trained that divergences are measured from.
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
    reference: int = 0

    @property
    def temporaries(self) -> int:
        return self.peak - self.arguments

    @property
    def arguments(self) -> int:
        """What the program reads."""
        return arguments_of(dataclasses.asdict(self))

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
    """Compiles one program and reads its needs; counts them where nothing can compile it.

    A program that does not fit is a report too: the compiler says what it would take. Where already
    what it reads does not fit, it is not compiled.

    Args:
      effort: of the compiler, one of `EFFORT`.
      known: what is in a report of the very same program is not compiled again.

    Raises:
      jax.errors.JaxRuntimeError: the compiler failed for another reason than memory.
    """
    started = time.monotonic()
    sizes = held(programs, program)
    arguments = arguments_of(sizes)
    fingerprint, seconds = "", 0.0
    if not wanted.generation.compiled:
        effort, peak = COUNTED, arguments + counted.temporaries(programs, program)
        collectives = hlo.Collectives(counted.received(programs, program), dynamic=False)
    elif arguments + sizes["resident"] > wanted.generation.hbm:
        # What it reads alone is too much: no compiler is needed to say so.
        effort, peak, collectives = COUNTED, arguments, hlo.Collectives({}, dynamic=False)
    else:
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
    return _report(
        programs,
        program,
        wanted.name,
        wanted.devices,
        sizes,
        effort=effort,
        peak=peak,
        hbm=wanted.generation.hbm,
        collectives=collectives,
        seconds=seconds,
        fingerprint=fingerprint,
    )


def measure_here(programs: Programs, program: Program, hbm: int) -> ProgramReport:
    """Compiles one program for the devices that are here, as a run does.

    Args:
      hbm: bytes of a device that programs may use; 0 where it is not known.

    Raises:
      jax.errors.JaxRuntimeError: the compiler failed; of no memory too.
    """
    started = time.monotonic()
    compiled = programs.lower(program).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    peak = 0
    if memory is not None:
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    device = programs.mesh.devices.flat[0]
    return _report(
        programs,
        program,
        device.device_kind,
        programs.mesh.size,
        held(programs, program),
        effort="default",
        peak=peak,
        hbm=hbm,
        collectives=hlo.collectives(text or ""),
        seconds=round(time.monotonic() - started, 1),
        fingerprint="",
    )


def _report(
    programs: Programs,
    program: Program,
    name: str,
    devices: int,
    sizes: Mapping[str, Any],
    *,
    collectives: hlo.Collectives,
    **found: Any,
) -> ProgramReport:
    config = programs.config
    return ProgramReport(
        slice=name,
        chips=devices,
        preset=config.model.preset,
        lora=config.lora.rank,
        stage=config.stage,
        program=program,
        mesh="x".join(str(programs.mesh.shape[axis]) for axis in programs.mesh.axis_names),
        rows=programs.rows(program),
        length=programs.length(program),
        remat=config.model.remat,
        calls=programs.micro_batches if program == Program.GRADIENTS else 1,
        flops=model_flops(programs, program) / devices,
        collectives=dict(collectives.bytes),
        dynamic=collectives.dynamic,
        **sizes,
        **found,
    )


def held(programs: Programs, program: Program) -> dict[str, int]:
    """Bytes on one device of what exists while a program runs, by field of its report."""

    def parameters(chosen: Callable[[str], bool]) -> int:
        return counted.chosen_bytes(programs, chosen)

    local = counted.local_bytes
    params, optimizer = local(programs.params), local(programs.state.opt_state)
    cache = weights = batch = gradients = ahead = reference = 0
    if programs.mode is not None:
        state = programs.sampler_state()
        cache, weights = local((state.prefix, state.own)), local(programs.weights)
        if programs.config.rl.kl_coef:
            reference = parameters(programs.trained)
        if programs.config.rl.ahead:
            ahead = parameters(programs.trained)
            ahead += 0 if program.samples else cache + weights
    if program.samples:
        batch = 0 if program == Program.DECODE else local(programs.prompts(program))
    else:
        cache = weights = 0
        gradients = counted.sum_bytes(programs) if programs.micro_batches > 1 else 0
        # The step of several micro-batches reads the sums alone.
        alone = program == Program.UPDATE and gradients
        batch = 0 if alone else local(programs.micro_batch())
    unread = params - parameters(lambda name: programs.reads(program, name))
    return {
        "params": params,
        "optimizer": optimizer,
        "cache": cache,
        "batch": batch,
        "gradients": gradients,
        "weights": weights,
        "ahead": ahead,
        "reference": reference,
        "resident": unread
        + ahead
        + reference
        + (0 if program == Program.UPDATE else optimizer)
        + (0 if program == Program.DECODE else weights),
    }


def arguments_of(sizes: Mapping[str, Any]) -> int:
    """Bytes that a program reads on one device, of what `held` counts."""
    kept = ("params", "optimizer", "weights", "ahead", "reference", "cache", "batch", "gradients")
    return sum(sizes[name] for name in kept) - sizes["resident"]


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
                "by": "counting" if r.effort == COUNTED else f"{r.effort}, {r.seconds:.0f} s",
            }
        )
    return rows


def collective_lines(report: ProgramReport) -> str:
    """The collectives of a program by kind, in GiB received by a device."""
    if not report.collectives and not report.fits:
        return f"{report.program}: unknown, as it does not fit"
    kinds = ", ".join(f"{kind} {size / GIB:.3g} GiB" for kind, size in report.collectives.items())
    unit = " per token (the loop counts as one turn)" if report.dynamic else ""
    return f"{report.program}: {kinds or 'nothing'}{unit}"

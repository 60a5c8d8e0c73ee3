"""`python -m mmrecoder_jax.memory --config=configs/stage2.py --topology=v5e-16
[--config.model.preset=3b ...]`

Does it fit? Compiles the programs a stage runs (rollout prefill, extension with the feedback,
decoding; gradients of a micro-batch, the update; see `programs`) ahead of time for a TPU slice that
this machine does not have, and prints what each needs on a device beside what the chip has, its
flops and its collectives. When one does not fit, smaller choices are compiled until one does.

Needs the TPU compiler (`pip install 'mmrecoder_jax[tpu]'`), no TPU. What it cannot say: how fast a
program runs.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from mmrecoder_jax import cli
from mmrecoder_jax.config import ConfigError, model_config
from mmrecoder_jax.models.trees import split
from mmrecoder_jax.planner import hlo, topology
from mmrecoder_jax.planner.programs import Programs, model_flops
from mmrecoder_jax.reporting.html import format_table
from mmrecoder_jax.rl.trajectory import MODES

PROGRAMS = ("prefill", "extend", "decode", "gradients", "update")
GIB = 2**30
EFFORT = {"low": -1.0, "default": 0.0}  # jax_exec_time_optimization_effort


@dataclasses.dataclass(frozen=True)
class Report:
    """One compiled program on one slice. Bytes are those of one device; `peak` holds arguments and
    live temporaries.

    `resident` lies beside the program while it runs: the optimizer (but of the update), and
    parameters that the program does not read. `gradients` are the sums over micro-batches, `calls`
    says how often an update runs the program. `collectives` is {kind: bytes received by a device}
    of one call, `dynamic` says that a loop without a fixed number of turns was counted as one turn.
    `lora` is the rank of the adapters that alone are trained, or 0. Two reports of equal
    `fingerprint` are of one program, compiled alike for the same slice (both RL stages have the
    same gradients).
    """

    slice: str
    chips: int
    preset: str
    lora: int
    stage: str
    program: str
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
    collectives: dict[str, int]
    dynamic: bool
    seconds: float
    fingerprint: str

    @property
    def temporaries(self) -> int:
        return self.peak - self.arguments

    @property
    def arguments(self) -> int:
        return (
            self.params + self.optimizer - self.resident + self.cache + self.batch + self.gradients
        )

    @property
    def used(self) -> int:
        return self.peak + self.resident

    @property
    def fits(self) -> bool:
        return self.used <= self.hbm


def measure(
    programs: Programs,
    program: str,
    wanted: topology.Slice,
    effort: str,
    known: Iterable[Report] = (),
) -> Report:
    """Compiles one program and reads its needs. A program that does not fit is a report too: the
    compiler says what it would take.

    What is in a `known` report of the very same program is not compiled again.

    Raises:
      jax.errors.JaxRuntimeError: the compiler failed for another reason than memory.
    """
    config = programs.config
    started = time.monotonic()
    with _effort(effort):
        lowered = getattr(programs, program)()
        fingerprint = hashlib.sha256(
            f"{wanted.name} {effort} {lowered.as_text()}".encode()
        ).hexdigest()[:16]
        before = next((report for report in known if report.fingerprint == fingerprint), None)
        peak, collectives, dynamic = (
            _compile(lowered)
            if before is None
            else (before.peak, before.collectives, before.dynamic)
        )
    params, optimizer = _local_bytes(programs.params), _local_bytes(programs.state.opt_state)
    trained = _local_bytes(split(programs.params, programs.stage.trained)[0])
    cache = batch = gradients = 0
    read = _local_bytes(split(programs.params, functools.partial(programs.reads, program))[0])
    resident = params - read + (0 if program == "update" else optimizer)
    if program in ("gradients", "update"):
        rows, length = programs.shape.rows, max(programs.shape.lengths)
        gradients = trained if programs.micro_batches > 1 else 0
        batch = 0 if program == "update" and gradients else _local_bytes(programs.micro_batch())
    else:
        rows = programs.sampler_rows[program]
        length = {
            "prefill": config.rl.prompt_length,
            "extend": config.rl.feedback_length,
            "decode": 1,
        }[program]
        cache = _local_bytes(programs.sampler_state(rows).cache)
        batch = _local_bytes(programs.prompts(rows, length)) if program != "decode" else 0
    return Report(
        slice=wanted.name,
        chips=wanted.chips,
        preset=config.model.preset,
        lora=config.lora.rank,
        stage=config.stage,
        program=program,
        mesh="x".join(str(programs.mesh.shape[axis]) for axis in programs.mesh.axis_names),
        rows=rows,
        length=length,
        remat=config.model.remat,
        effort=effort,
        params=params,
        optimizer=optimizer,
        cache=cache,
        batch=batch,
        gradients=gradients,
        calls=programs.micro_batches if program == "gradients" else 1,
        peak=peak,
        resident=resident,
        hbm=wanted.generation.hbm,
        flops=model_flops(programs, program) / wanted.chips,
        collectives=dict(collectives),
        dynamic=dynamic,
        seconds=round(time.monotonic() - started, 1) if before is None else before.seconds,
        fingerprint=fingerprint,
    )


def _compile(lowered: jax.stages.Lowered) -> tuple[int, Mapping[str, int], bool]:
    """(peak bytes, {collective: bytes received}, whether a loop's turns are unknown)."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return _exhausted(str(error)), {}, False
    found = hlo.collectives(compiled.as_text())
    return compiled.memory_analysis().peak_memory_in_bytes, found.bytes, found.dynamic


def variants(
    config: ConfigDict, program: str, ways: int, hosts: int
) -> Iterator[tuple[dict[str, Any], ConfigDict]]:
    """Smaller choices to try in turn when a program does not fit: ({field: value} that changed, the
    configuration with it).

    Gradients: layers recomputed, then micro-batches halved down to a row a device, then the model
    cut over twice as many devices (as far as its key heads go), with micro-batches of a row for
    each part that is left. A rollout: prompts at once halved, down to one a device.
    """

    def changed(fields: dict[str, Any]) -> tuple[dict[str, Any], ConfigDict]:
        other = ConfigDict(config.to_dict())
        with other.unlocked():
            for name, value in fields.items():
                section, field = name.split(".")
                other[section][field] = value
        return fields, other

    fields: dict[str, Any] = {}
    if program not in ("gradients", "update"):
        prompts = config.rl.rollout_prompts or config.train.batch_size
        while prompts % 2 == 0 and (prompts // 2) % ways == 0:
            prompts //= 2
            yield changed({"rl.rollout_prompts": prompts})
        return
    if config.model.remat != "full":
        fields |= {"model.remat": "full"}
        yield changed(dict(fields))
    group = config.rl.group if config.stage in MODES else 1
    rows, tensor = config.train.micro_batch_size, config.mesh.tensor

    def splits(rows: int) -> bool:
        return (
            rows % ways == 0
            and rows % hosts == 0
            and (rows // hosts % group == 0 or group % (rows // hosts) == 0)
        )

    while True:
        while rows % 2 == 0 and splits(rows // 2):
            rows //= 2
            fields |= {"train.micro_batch_size": rows}
            if tensor == config.mesh.tensor:
                yield changed(dict(fields))
        if tensor != config.mesh.tensor:
            yield changed(dict(fields))
        if ways % 2 or model_config(config).num_kv_heads % (2 * tensor):
            return
        tensor, ways = 2 * tensor, ways // 2
        fields |= {"mesh.tensor": tensor}


def advise(
    config: ConfigDict, program: str, ways: int, hosts: int, attempt: Callable[[ConfigDict], Report]
) -> tuple[dict[str, Any], list[Report]]:
    """Compiles `variants` until one fits: (the fields that it changes, or {} where none does; the
    reports of all that were tried).
    """
    tried = []
    for fields, other in variants(config, program, ways, hosts):
        tried.append(attempt(other))
        if tried[-1].fits:
            return fields, tried
    return {}, tried


def table_rows(reports: list[Report]) -> list[dict[str, Any]]:
    """One line of the printed table for each program; sizes in GiB of one device."""

    def gib(n: float) -> str:
        return f"{n / GIB:.3g}"

    rows = []
    for r in reports:
        received = sum(r.collectives.values())
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
                "received": "-"
                if not r.collectives
                else gib(received) + ("/token" if r.dynamic else ""),
                "calls": r.calls,
                "compiled in": f"{r.seconds:.0f} s",
            }
        )
    return rows


def collective_lines(report: Report) -> str:
    """The collectives of a program by kind, in GiB received by a device."""
    kinds = ", ".join(f"{kind} {size / GIB:.3g}" for kind, size in report.collectives.items())
    return f"{report.program}: {kinds or 'none'}" + (
        " GiB a token (the loop counts as one turn)" if report.dynamic else " GiB"
    )


def _local_bytes(tree: Any) -> int:
    """Bytes of a tree on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _exhausted(message: str) -> int:
    """Bytes that a program would have taken, from the compiler's refusal; raises what it was given
    when it is another error.
    """
    match = re.search(r"Ran out of memory on HBM, .*?\((\d+(?:\.\d+)?)([KMG]?)\) exceeds", message)
    if match is None:
        raise jax.errors.JaxRuntimeError(message)
    return int(float(match[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[match[2]])


@contextlib.contextmanager
def _effort(name: str):
    before = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", EFFORT[name])
    try:
        yield
    finally:
        jax.config.update("jax_exec_time_optimization_effort", before)


_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, with the size after a colon: configs/stage2.py."
)
_TOPOLOGY = flags.DEFINE_list(
    "topology", None, "TPU slices: cloud names (v5e-16, v5p-64, v6e-8) or shapes (v5e:4x4)."
)
_PROGRAMS = flags.DEFINE_list(
    "programs", None, f"Of {', '.join(PROGRAMS)}; all that the stage has when left out."
)
_EFFORT = flags.DEFINE_enum(
    "effort",
    "low",
    list(EFFORT),
    "Of the compiler. Low is several times faster, and a program may take a GiB or two less.",
)
_JSONL = flags.DEFINE_string("jsonl", None, "File that every report is appended to.")
_TRY = flags.DEFINE_bool("try", True, "Compile smaller choices where a program does not fit.")
flags.mark_flags_as_required(["config", "topology"])


def main(argv: list[str]) -> None:
    """Compiles the programs on every slice and prints the table."""
    if len(argv) > 1:
        raise app.UsageError(
            f"unexpected argument {argv[1]!r}: every setting is a flag, e.g. --config.model.preset=3b"
        )
    config = _CONFIG.value
    known = PROGRAMS if config.stage in MODES else ("gradients", "update")
    chosen = _PROGRAMS.value or known
    if wrong := [name for name in chosen if name not in known]:
        sys.exit(f"error: --programs={','.join(wrong)}: {config.stage} has {', '.join(known)}")
    try:
        slices = [topology.parse(name) for name in _TOPOLOGY.value]
        devices = [topology.devices(wanted) for wanted in slices]
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    for wanted, found in zip(slices, devices, strict=True):
        try:
            print(run(config, chosen, wanted, found, _EFFORT.value, _TRY.value, _keep), flush=True)
        except ConfigError as error:
            sys.exit(f"error: {wanted.name}: {error}")


def run(
    config: ConfigDict,
    chosen: list[str],
    wanted: topology.Slice,
    devices: list[Any],
    effort: str,
    try_smaller: bool,
    keep: Callable[[Report], None],
) -> str:
    """Compiles programs for one slice; `keep` sees every report. Returns what there is to say."""
    programs = Programs(config, devices)
    reports, notes = [], []
    for program in chosen:
        if program == "gradients" and programs.micro_batches == 1:
            continue  # the update is one program

        def attempt(other: ConfigDict, program: str = program) -> Report:
            report = measure(Programs(other, devices), program, wanted, effort)
            keep(report)
            return report

        report = attempt(config)
        reports.append(report)
        if report.fits or not try_smaller:
            continue
        fields, tried = advise(config, program, programs.ways, programs.hosts, attempt)
        reports += tried
        if fields:
            flags_text = " ".join(f"--config.{name}={value}" for name, value in fields.items())
            notes.append(f"{program} does not fit as configured; it fits with {flags_text}")
        else:
            notes.append(
                f"{program} does not fit, and no smaller choice that was tried does: take a larger slice or another mesh "
                f"(--config.mesh.tensor={2 * config.mesh.tensor})"
            )
    if not notes:
        notes.append(
            "fits"
            if effort == "default"
            else "fits, as far as low effort tells: --effort=default may take a GiB or two more"
        )
    rows = table_rows(reports)
    head = f"{config.model.preset} {config.stage} on {wanted.name}: {wanted.chips} chips, GiB of one chip, effort {effort}"
    return "\n".join(
        [
            "",
            head,
            format_table(rows, list(rows[0])),
            "received by a chip:",
            *map(collective_lines, reports),
            *notes,
        ]
    )


def _keep(report: Report) -> None:
    if _JSONL.value:
        os.makedirs(os.path.dirname(os.path.abspath(_JSONL.value)), exist_ok=True)
        with open(_JSONL.value, "a", encoding="utf-8") as f:
            f.write(json.dumps(dataclasses.asdict(report)) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # the compiler is all that is wanted of a TPU
    app.run(main, flags_parser=cli.parse_flags)

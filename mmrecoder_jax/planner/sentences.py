"""What a plan says: sentences first, then the tables that they come from."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from mmrecoder_jax.planner import topology
from mmrecoder_jax.planner.advice import PARTS, Fields, Settled
from mmrecoder_jax.planner.estimate import ASSUMPTIONS, Seconds, Step, dollars, rounded, step
from mmrecoder_jax.planner.fits import COUNTED, GIB, ProgramReport, collective_lines, table_rows
from mmrecoder_jax.reporting.tables import format_table
from mmrecoder_jax.rl.trajectory import MODES

STEPS = 100  # of a run whose length the configuration leaves to the data


def told(found: Sequence[Settled], wanted: topology.Slice, price: float | None) -> str:
    """All there is to say about one slice.

    Args:
      found: choices that were settled, the last of which may fit.
      price: USD of an hour of one device; None: the list's.
    """
    reports = _tried(found)
    lines = ["", *sentences(found, wanted, price), "", f"GiB on one device of {wanted.name}:"]
    lines += [format_table(table_rows(reports)), "A device receives in one call:"]
    return "\n".join([*lines, *(f"  {collective_lines(report)}" for report in reports)])


def sentences(found: Sequence[Settled], wanted: topology.Slice, price: float | None) -> list[str]:
    """What fits and with which flags, what is uncertain about it, how long it takes, the price."""
    lines = [_fit(each, wanted, first=each is found[0]) for each in found]
    last = found[-1]
    lines += _caveats(last.reports, wanted)
    if not last.fits:
        lines.append(_larger(last))
        return lines
    took = step(last.config, last.reports, wanted)
    if took is not None:
        lines += [time_sentence(last.config, took), cost_sentence(last.config, took, wanted, price)]
        lines.append(f"Assumed: {'; '.join(ASSUMPTIONS)}.")
    return lines


def _tried(found: Sequence[Settled]) -> list[ProgramReport]:
    reports: list[ProgramReport] = []
    for each in found:
        reports += [report for report in each.tried if report not in reports]
    return reports


def _fit(settled: Settled, wanted: topology.Slice, first: bool) -> str:
    config, worst = settled.config, settled.worst
    what = f"{config.stage} of the {config.model.preset}"
    what += f" with adapters of rank {config.lora.rank}" if config.lora.rank else ""
    flags = _flags(settled.fields, wanted.slices)
    sizes = f"{worst.used / GIB:.1f} of {worst.hbm / GIB:.1f} GiB"
    where = f"{wanted.name} ({_count(wanted)})"
    if settled.fits:
        how = f"with {flags}" if flags else "as configured"
        return f"{what} fits {where} {how}: {worst.program}, the fullest, takes {sizes}."
    alone = " to begin with" if worst.effort == COUNTED and wanted.generation.compiled else ""
    how = "however it is cut" if first else f"with {flags}"
    return f"{what} does not fit {where}, {how}: {worst.program} needs at least {sizes}{alone}."


def _count(wanted: topology.Slice) -> str:
    generation = wanted.generation
    count = f"{wanted.chips} {_unit(wanted)}{'s' * (wanted.chips > 1)}"
    devices = f", {wanted.devices} devices" if generation.per_chip > 1 else ""
    return f"{wanted.slices} slices of {count}{devices}" if wanted.slices > 1 else count + devices


def _unit(wanted: topology.Slice) -> str:
    return "chip" if wanted.generation.compiled else "GPU"


def _flags(fields: Fields, slices: int) -> str:
    """As the command line has them: of all slices together."""
    return " ".join(
        f"--config.{name}={value * slices if name in PARTS else value}"
        for name, value in fields.items()
    )


def _caveats(reports: Sequence[ProgramReport], wanted: topology.Slice) -> list[str]:
    lines = []
    if not wanted.generation.compiled:
        lines.append(
            "Nothing was compiled: no compiler for GPUs runs here, so memory is counted from the "
            "shapes. JAX must be given the memory that is counted on: "
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={topology.GPU_FRACTION}."
        )
    elif low := [report for report in reports if report.effort == "low" and report.fits]:
        closest = min(report.hbm - report.used for report in low) / GIB
        lines.append(
            f"Compiled at low effort, which leaves {closest:.1f} GiB or more: at the default "
            "effort a program takes up to two GiB more (--effort=default)."
        )
    if wanted.slices > 1:
        lines.append(
            "One slice was compiled; the others and the network between them are on paper."
        )
    return lines


def _larger(settled: Settled) -> str:
    worst = settled.worst
    times = worst.used / worst.hbm
    return f"Nothing that was tried fits: take a slice with {times:.1f} times the memory, or more."


def time_sentence(config: ConfigDict, took: Step) -> str:
    """How long a step takes, and its parts."""
    if config.stage not in MODES:
        return f"A step takes {took.total}."
    return (
        f"A step takes {took.total}: prompts and feedback {took.reading}, decoding "
        f"{took.decoding}, scripts {took.scripts}, the update {took.update}."
    )


def cost_sentence(
    config: ConfigDict, took: Step, wanted: topology.Slice, price: float | None = None
) -> str:
    """How long a run of `train.steps` (or of 100 steps) takes, and what it costs."""
    steps = config.train.steps or STEPS
    run: Seconds = took.total * steps
    chip = wanted.generation.chip
    each = chip.price if price is None else price
    unit = _unit(wanted) if wanted.generation.per_chip == 1 else "device"
    text = f"{steps:,} steps take {run}"
    if each is None:
        return f"{text}; no list price is known here: give --price=USD, of an hour and {unit}."
    low, high = (rounded(dollars(value, wanted, each)) for value in (run.low, run.high))
    source = "the list's price" if price is None else "your price"
    return f"{text} and cost {low} to {high} USD at {each:.2f} an hour and {unit} ({source})."

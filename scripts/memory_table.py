"""Compiles the stages for many slices and writes docs/memory.md.

    python scripts/memory_table.py --jsonl=docs/memory.jsonl --page=docs/memory.md [--minutes=60]
        [--effort=default --only=7b/stage2/v5e-16]

Programs are compiled one after the other, the most wanted first. What is in the JSON lines already,
or is the very same program, is not compiled again. No program is begun after `--minutes`; the same
command resumes. `--minutes=0` writes the page from what is there.

The paper's batch (128 prompts, G = 8, 4,096-token responses) is the configuration's. A micro-batch
has one row per chip and at least one group. On slices beyond 128 chips the model is cut in two
(`mesh.tensor=2`), so that 128 prompts divide. As many prompts are sampled at once as their cache
leaves room.
"""

import argparse
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from mmrecoder_jax.config import load, model_config
from mmrecoder_jax.planner import topology
from mmrecoder_jax.planner.advice import advise
from mmrecoder_jax.planner.fits import EFFORT, GIB, ProgramReport, measure, table_rows
from mmrecoder_jax.planner.programs import Program, Programs
from mmrecoder_jax.rl.schedule import conversation_slots
from mmrecoder_jax.rl.trajectory import MODES, Mode

# The slices, the most wanted first.
SLICES = (
    *("v5e-16", "v6e-8", "v5p-8", "v5e-64", "v5e-256", "v6e-64", "v6e-256"),
    *("v5p-64", "v5p-512", "v5e-32", "v6e-16", "v5e-128", "v5p-16"),
)
SLICES_3B = ("v5e-8", "v6e-4", *SLICES)
SLICES_LORA = {"7b-lora": ("v5e-8", "v6e-4"), "3b-lora": ("v5e-4", "v6e-1")}  # one host
RANK = 16
LARGEST_DATA = 128  # chips that the paper's 128 prompts divide over
PARAMETERS = {"3b": 3.75e9, "7b": 8.29e9}
BYTES_TRAINED, BYTES_FROZEN = 12, 2  # per parameter: float32 with two moments; bfloat16
CACHE_SHARE = 0.55  # of the memory beside the weights; the rest is for temporaries

Key = tuple[str, str, str, str, str]  # preset, stage, slice, program, effort


def wanted() -> list[tuple[str, str, str, Program]]:
    """(preset, stage, slice, program), the most telling first."""
    first = (Program.GRADIENTS, Program.DECODE)
    order = [("7b", "stage2", name, program) for name in SLICES[:9] for program in first]
    order += [("3b", "stage2", name, program) for name in SLICES_3B[:11] for program in first]
    order += [("7b", "stage1", name, Program.GRADIENTS) for name in SLICES[:9]]
    order += [("3b", "stage1", name, Program.GRADIENTS) for name in SLICES_3B[:11]]
    order += [
        (preset, "stage2", name, program)
        for preset, names in SLICES_LORA.items()
        for name in names
        for program in Program
    ]
    order += [
        (preset, stage, name, Program.UPDATE)
        for preset in ("7b", "3b")
        for stage in ("stage2", "stage1")
        for name in SLICES[:3]
    ]
    order += [
        (preset, stage, name, program)
        for preset, names in (("7b", SLICES), ("3b", SLICES_3B))
        for stage in ("stage2", "stage1")
        for name in names
        for program in Program
    ]
    return list(dict.fromkeys(order))


def configuration(preset: str, stage: str, wanted_slice: topology.Slice) -> ConfigDict:
    """The paper's configuration with the sizes that a slice asks for."""
    config = load(stage, "paper")
    config.model.preset = preset.removesuffix("-lora")
    if preset in SLICES_LORA:
        config.lora.rank, config.model.param_dtype = RANK, "bfloat16"
    config.mesh.tensor = 2 if wanted_slice.chips > LARGEST_DATA else 1
    ways = wanted_slice.chips // config.mesh.tensor
    config.train.micro_batch_size = math.lcm(ways, config.rl.group)
    prompts, room = config.train.batch_size, _cache_room(config, wanted_slice)
    while prompts > ways and prompts * config.rl.group / ways * _row_bytes(config) > room:
        prompts //= 2
    config.rl.rollout_prompts = 0 if prompts == config.train.batch_size else prompts
    return config


def _row_bytes(config: ConfigDict) -> float:
    """Cache of one row on a chip, with its part of its group's: keys and values, in bfloat16."""
    sizes, rl = model_config(config), config.rl
    parts_at = rl.turns if MODES[config.stage] == Mode.SHARED_FIRST_TURN else 1
    shared, alone = conversation_slots(
        rl.prompt_length, rl.feedback_length, rl.response_length, rl.turns, parts_at
    )
    slots = shared / rl.group + alone
    per_slot = sizes.num_layers * 2 * sizes.num_kv_heads * sizes.head_dim * 2
    return per_slot * slots / config.mesh.tensor


def _cache_room(config: ConfigDict, wanted_slice: topology.Slice) -> float:
    """Bytes on a chip that the cache may take."""
    per_parameter = BYTES_FROZEN if config.lora.rank else BYTES_TRAINED
    weights = per_parameter * PARAMETERS[config.model.preset] / wanted_slice.chips
    return CACHE_SHARE * (wanted_slice.generation.hbm - weights)


def compile_all(path: Path, minutes: float, effort: str, only: str) -> None:
    """Appends a line for each program that has none yet."""
    until = time.monotonic() + 60 * minutes
    done = {report_key(report) for report in read(path)}
    for preset, stage, name, program in wanted():
        if time.monotonic() > until:
            return
        if (preset, stage, name, program, effort) in done:
            continue
        if not f"{preset}/{stage}/{name}/{program}".startswith(only):
            continue
        parsed = topology.parse(name)
        config, devices = configuration(preset, stage, parsed), topology.devices(parsed)
        hosts = len({device.process_index for device in devices})

        attempt = functools.partial(compile_one, path, program, parsed, devices, effort)
        if not attempt(config).fits:
            advise(config, program, parsed.chips // config.mesh.tensor, hosts, attempt)


def compile_one(
    path: Path,
    program: Program,
    wanted_slice: topology.Slice,
    devices: Sequence[jax.Device],
    effort: str,
    config: ConfigDict,
) -> ProgramReport:
    """Compiles one program and appends its report."""
    report = measure(Programs(config, devices), program, wanted_slice, effort, read(path))
    with path.open("a", encoding="utf-8") as f:
        f.write(report.to_json() + "\n")
    print(
        *report_key(report),
        "fits" if report.fits else "does not fit",
        f"{report.used / GIB:.2f} GiB, mesh {report.mesh}, {report.rows} rows, "
        f"{report.seconds:.0f} s",
        flush=True,
    )
    return report


def report_key(report: ProgramReport) -> Key:
    """What a line of the order is known by."""
    preset = report.preset + "-lora" * bool(report.lora)
    return preset, report.stage, report.slice, report.program, report.effort


def read(path: Path) -> list[ProgramReport]:
    """The reports of the JSON lines."""
    if not path.exists():
        return []
    return [ProgramReport.from_json(line) for line in path.read_text("utf-8").splitlines()]


COLUMNS = (
    *("slice", "program", "mesh", "rows", "length", "params", "optimizer", "cache", "batch"),
    *("gradients", "temporaries", "used", "of", "fits", "TFLOP"),
)
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def page(reports: list[ProgramReport]) -> str:
    """The page, from reports alone."""
    text = [(Path(__file__).parent / "memory_head.md").read_text("utf-8").rstrip()]
    for preset in ("7b", "3b", *SLICES_LORA):
        for stage in ("stage2", "stage1"):
            chosen = [r for r in reports if report_key(r)[:2] == (preset, stage)]
            chosen.sort(key=_place)
            if chosen:
                adapters = ""
                if preset in SLICES_LORA:
                    adapters = f" with adapters of rank {RANK} on bfloat16 weights"
                head = f"## {preset.removesuffix('-lora').upper()}{adapters}, {stage}"
                text += ["", head, "", table(chosen)]
    text += ["", growth(reports)]
    return "\n".join(text) + "\n"


def _place(report: ProgramReport) -> tuple[str, int, int, str]:
    """By kind of chip, size, program and effort."""
    kind = report.slice.split("-")[0]
    return kind, report.chips, list(Program).index(report.program), report.effort


def markdown(lines: Sequence[Sequence[object]]) -> str:
    """A table; the first line is its head."""
    head, *body = ["| " + " | ".join(map(str, cells)) + " |" for cells in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def table(reports: list[ProgramReport]) -> str:
    """One line per program; what a chip receives by kind of collective, in GiB."""
    short = [kind.removeprefix("collective-") for kind in KINDS]
    lines: list[Sequence[object]] = [[*COLUMNS, *short, "effort"]]
    for report, row in zip(reports, table_rows(reports), strict=True):
        received = [
            f"{report.collectives[kind] / GIB:.3g}" if kind in report.collectives else ""
            for kind in KINDS
        ]
        lines.append([*(row[name] for name in COLUMNS), *received, report.effort])
    return markdown(lines)


def growth(reports: list[ProgramReport]) -> str:
    """How the update and decoding of one preset change from slice to slice of a kind."""
    heads = (
        *("preset", "program", "slice", "chips", "mesh", "state per chip", "temporaries", "calls"),
        *("received per call", "in all calls", "by all chips"),
    )
    lines: list[Sequence[object]] = [heads]
    for preset in ("7b", "3b"):
        for program in (Program.GRADIENTS, Program.DECODE):
            chosen = [
                r
                for r in reports
                if report_key(r) == (preset, "stage2", r.slice, program, "low") and r.collectives
            ]
            for r in sorted(chosen, key=_place):
                received = sum(r.collectives.values())
                held = (f"{n / GIB:.3g}" for n in (r.params + r.optimizer, r.temporaries))
                sums = (received, received * r.calls, received * r.calls * r.chips)
                sizes = (f"{n / GIB:.4g}" for n in sums)
                lines.append((preset, program, r.slice, r.chips, r.mesh, *held, r.calls, *sizes))
    return f"## How it grows with the slice\n\n{markdown(lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jsonl", type=Path, required=True)
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--effort", choices=list(EFFORT), default="low")
    parser.add_argument("--only", default="", help="preset/stage/slice/program, or its beginning")
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    compile_all(flags.jsonl, flags.minutes, flags.effort, flags.only)
    flags.page.write_text(page(read(flags.jsonl)), encoding="utf-8")


if __name__ == "__main__":
    main()

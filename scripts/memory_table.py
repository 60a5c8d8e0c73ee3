"""Compiles the stages for many slices and writes docs/memory.md; what is in the JSON lines already,
or is the very same program, is not compiled again.

python scripts/memory_table.py --jsonl=docs/memory.jsonl --page=docs/memory.md [--minutes=60]
[--effort=default --only=7b/stage2/v5e-16]

One program after the other, the most wanted first; none is begun when `--minutes` have passed, and
the same command goes on. `--minutes=0` writes the page from what there is. The paper's batch (128
prompts, G = 8, 4,096-token responses) is the configuration's; a micro-batch has one row a chip and
at least one group, slices beyond 128 chips cut the model in two (`mesh.tensor=2`) so that 128
prompts divide, and as many prompts are sampled at once as their cache leaves room.
"""

import argparse
import json
import math
import time
from pathlib import Path

import jax

from mmrecoder_jax import memory
from mmrecoder_jax.config import load
from mmrecoder_jax.planner import topology
from mmrecoder_jax.planner.programs import Programs
from mmrecoder_jax.runtime import model_config

SLICES = (
    "v5e-16",
    "v6e-8",
    "v5p-8",
    "v5e-64",
    "v5e-256",
    "v6e-64",
    "v6e-256",
    "v5p-64",
    "v5p-512",
    "v5e-32",
    "v6e-16",
    "v5e-128",
    "v5p-16",
)
SLICES_3B = ("v5e-8", "v6e-4", *SLICES)
SLICES_LORA = {"7b-lora": ("v5e-8", "v6e-4"), "3b-lora": ("v5e-4", "v6e-1")}  # one host
RANK = 16
GIB = 2**30


def wanted() -> list[tuple[str, str, str, str]]:
    """(preset, stage, slice, program), the most telling first."""
    first = ("gradients", "decode")
    order = [("7b", "stage2", name, program) for name in SLICES[:9] for program in first]
    order += [("3b", "stage2", name, program) for name in SLICES_3B[:11] for program in first]
    order += [("7b", "stage1", name, "gradients") for name in SLICES[:9]]
    order += [("3b", "stage1", name, "gradients") for name in SLICES_3B[:11]]
    order += [
        (preset, "stage2", name, program)
        for preset, names in SLICES_LORA.items()
        for name in names
        for program in memory.PROGRAMS
    ]
    order += [
        (preset, stage, name, "update")
        for preset in ("7b", "3b")
        for stage in ("stage2", "stage1")
        for name in SLICES[:3]
    ]
    for preset, names in (("7b", SLICES), ("3b", SLICES_3B)):
        order += [
            (preset, stage, name, program)
            for stage in ("stage2", "stage1")
            for name in names
            for program in memory.PROGRAMS
        ]
    return list(dict.fromkeys(order))


def configuration(preset: str, stage: str, wanted_slice: topology.Slice):
    """The paper's configuration with the sizes that a slice asks for."""
    config = load(stage, "paper")
    config.model.preset = preset.removesuffix("-lora")
    if preset in SLICES_LORA:
        config.lora.rank, config.model.param_dtype = RANK, "bfloat16"
    config.mesh.tensor = 2 if wanted_slice.chips > 128 else 1
    ways = wanted_slice.chips // config.mesh.tensor
    config.train.micro_batch_size = math.lcm(ways, config.rl.group)
    sizes, rl = model_config(config), config.rl
    slots = (
        rl.prompt_length
        + rl.response_length
        + (rl.turns - 1) * (rl.feedback_length + rl.response_length)
    )
    row = (
        sizes.num_layers * 2 * sizes.num_kv_heads * sizes.head_dim * 2 * slots / config.mesh.tensor
    )
    weights = (
        (2 if config.lora.rank else 12)
        * {"3b": 3.75e9, "7b": 8.29e9}[config.model.preset]
        / wanted_slice.chips
    )
    room = 0.55 * (wanted_slice.generation.hbm - weights)
    prompts = config.train.batch_size
    while prompts > ways and prompts * rl.group / ways * row > room:
        prompts //= 2
    config.rl.rollout_prompts = 0 if prompts == config.train.batch_size else prompts
    return config


def compile_all(path: Path, minutes: float, effort: str, only: str) -> None:
    """Appends a line for each program that is not there yet."""
    until = time.monotonic() + 60 * minutes
    done = {report_key(r) for r in read(path)}
    for preset, stage, name, program in wanted():
        key = (preset, stage, name, program, effort)
        if time.monotonic() > until:
            return
        if key in done or (only and not f"{preset}/{stage}/{name}/{program}".startswith(only)):
            continue
        parsed = topology.parse(name)
        config, devices = configuration(preset, stage, parsed), topology.devices(parsed)
        hosts = len({device.process_index for device in devices})

        def attempt(config, program=program, parsed=parsed, devices=devices):
            report = memory.measure(Programs(config, devices), program, parsed, effort, read(path))
            with path.open("a", encoding="utf-8") as f:
                f.write(json.dumps(memory.dataclasses.asdict(report)) + "\n")
            shown = f"{report.used / GIB:.2f} GiB, mesh {report.mesh}, {report.rows} rows, {report.seconds:.0f} s"
            print(*report_key(report), "fits" if report.fits else "does not fit", shown, flush=True)
            return report

        if not attempt(config).fits:
            memory.advise(config, program, parsed.chips // config.mesh.tensor, hosts, attempt)


def report_key(report: memory.Report) -> tuple[str, ...]:
    """What a line of the order is known by."""
    return (
        report.preset + "-lora" * bool(report.lora),
        report.stage,
        report.slice,
        report.program,
        report.effort,
    )


def read(path: Path) -> list[memory.Report]:
    """The reports of the JSON lines."""
    return (
        [
            memory.Report(**json.loads(line))
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        if path.exists()
        else []
    )


COLUMNS = (
    *(
        "slice",
        "program",
        "mesh",
        "rows",
        "length",
        "params",
        "optimizer",
        "cache",
        "batch",
        "gradients",
        "temporaries",
    ),
    *("used", "of", "fits"),
)


def page(reports: list[memory.Report]) -> str:
    """The page, from reports alone."""
    text = [(Path(__file__).parent / "memory_head.md").read_text(encoding="utf-8").rstrip()]
    for preset in ("7b", "3b", *SLICES_LORA):
        for stage in ("stage2", "stage1"):
            chosen = [r for r in reports if report_key(r)[:2] == (preset, stage)]
            chosen.sort(
                key=lambda r: (
                    r.slice.split("-")[0],
                    r.chips,
                    memory.PROGRAMS.index(r.program),
                    r.effort,
                )
            )
            if chosen:
                adapters = (
                    f" with adapters of rank {RANK} on bfloat16 weights"
                    if preset in SLICES_LORA
                    else ""
                )
                text += [
                    "",
                    f"## {preset.removesuffix('-lora').upper()}{adapters}, {stage}",
                    "",
                    table(chosen),
                ]
    text += ["", growth(reports)]
    return "\n".join(text) + "\n"


def table(reports: list[memory.Report]) -> str:
    """Markdown, one line a program; what a chip receives by kind of collective, in GiB."""
    columns = [
        *COLUMNS,
        "TFLOP",
        "all-gather",
        "all-reduce",
        "reduce-scatter",
        "all-to-all",
        "permute",
        "effort",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for report, row in zip(reports, memory.table_rows(reports), strict=True):
        kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
        received = [
            f"{report.collectives[kind] / GIB:.3g}" if kind in report.collectives else ""
            for kind in kinds
        ]
        lines.append(
            "| "
            + " | ".join(
                [*(str(row[name]) for name in COLUMNS), row["TFLOP"], *received, report.effort]
            )
            + " |"
        )
    return "\n".join(lines)


def growth(reports: list[memory.Report]) -> str:
    """How the update and decoding of one preset change from slice to slice of a kind."""
    lines = [
        "## How it grows with the slice",
        "",
        "| preset | program | slice | chips | mesh | state a chip | temporaries | calls | received "
        "a call | in all calls | by all chips |",
    ]
    lines.append("|" + "---|" * 11)
    for preset in ("7b", "3b"):
        for program in ("gradients", "decode"):
            chosen = [
                r
                for r in reports
                if report_key(r) == (preset, "stage2", r.slice, program, "low") and r.collectives
            ]
            for r in sorted(chosen, key=lambda r: (r.slice.split("-")[0], r.chips)):
                received = sum(r.collectives.values())
                held = (f"{n / GIB:.3g}" for n in (r.params + r.optimizer, r.temporaries))
                sizes = (
                    f"{n / GIB:.4g}"
                    for n in (received, received * r.calls, received * r.calls * r.chips)
                )
                cells = (preset, program, r.slice, r.chips, r.mesh, *held, r.calls, *sizes)
                lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jsonl", type=Path, required=True)
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--effort", choices=list(memory.EFFORT), default="low")
    parser.add_argument("--only", default="", help="preset/stage/slice/program, or its beginning")
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    compile_all(flags.jsonl, flags.minutes, flags.effort, flags.only)
    flags.page.write_text(page(read(flags.jsonl)), encoding="utf-8")

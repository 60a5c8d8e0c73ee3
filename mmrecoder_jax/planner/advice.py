"""Which mesh, micro-batch, rollout rows, adapters or model fit a slice, tried in turn.

A configuration is settled when all its programs fit together:

    programs of the configuration -> the first that does not fit -> `variants` until it does
                                  -> all programs again, with what was changed, until none is left

The same program is compiled once, however often it is asked for. Where no variant helps, `choices`
are settled in their place: adapters alone, a smaller model, its adapters.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from mmrecoder_jax.config import ConfigError, model_config, set_fields
from mmrecoder_jax.planner import topology
from mmrecoder_jax.planner.fits import EFFORT, GIB, ProgramReport, measure
from mmrecoder_jax.planner.programs import Program, Programs
from mmrecoder_jax.rl.trajectory import MODES

Fields = dict[str, Any]  # {"model.remat": "full"}: what differs from a configuration

AUTO = "auto"  # low effort, and the default where that leaves too little room to be trusted
EFFORTS = (AUTO, *EFFORT)
# What a program may take more at the default effort than at low effort (docs/memory.md).
LOW_EFFORT_MARGIN = 2 * GIB
ADAPTERS: Fields = {"lora.rank": 16, "model.param_dtype": "bfloat16"}
SMALLER = {"72b": "32b", "32b": "7b", "7b": "3b"}
MOST_ROUNDS = 6  # of changes that one program asks for and another answers


@dataclasses.dataclass(frozen=True)
class Settled:
    """What fits, or what does not, of one choice.

    Attributes:
      fields: what differs from the configuration that was asked about.
      config: with these fields.
      reports: of its programs, with these fields; the last round that was tried.
      tried: every report on the way there, these among them.
    """

    fields: Fields
    config: ConfigDict
    reports: tuple[ProgramReport, ...]
    tried: tuple[ProgramReport, ...]

    @property
    def fits(self) -> bool:
        return all(report.fits for report in self.reports)

    @property
    def worst(self) -> ProgramReport:
        """The program that leaves the least room; where something does not fit, the smallest try of
        the first program that no try made fit.
        """
        for report in self.reports:
            smallest = max((x for x in self.tried if x.program == report.program), key=_room)
            if not smallest.fits:
                return smallest
        return min(self.reports, key=_room)


def _room(report: ProgramReport) -> int:
    return report.hbm - report.used


class Measurements:
    """Programs of configurations on one slice, each compiled once.

    Args:
      devices: of one slice.
      effort: one of `EFFORTS`.
      keep: sees every report.
    """

    def __init__(
        self,
        wanted: topology.Slice,
        devices: Sequence[jax.Device],
        effort: str,
        keep: Callable[[ProgramReport], None] = lambda report: None,
    ):
        self.devices = devices
        self._wanted, self._effort, self._keep = wanted, effort, keep
        self._known: list[ProgramReport] = []

    def __call__(self, config: ConfigDict, program: Program) -> ProgramReport:
        """The report of one program; see `fits.measure`."""
        programs = Programs(config, self.devices)
        report = self._measure(programs, program, "low" if self._effort == AUTO else self._effort)
        near = report.effort == "low" and 0 <= report.hbm - report.used < LOW_EFFORT_MARGIN
        if self._effort == AUTO and near:
            report = self._measure(programs, program, "default")
        return report

    def _measure(self, programs: Programs, program: Program, effort: str) -> ProgramReport:
        report = measure(programs, program, self._wanted, effort, self._known)
        if report not in self._known:
            self._known.append(report)
            self._keep(report)
        return report


def settle(
    config: ConfigDict,
    fields: Fields,
    chosen: Sequence[Program],
    measured: Measurements,
    try_smaller: bool,
) -> Settled:
    """Changes a configuration until its programs fit, or until nothing is left to try.

    Args:
      fields: what is changed at the start.
      chosen: programs; those that the configuration does not run are left out.
      try_smaller: whether to change anything.
    """
    fields, tried = dict(fields), []

    def report(program: Program, config: ConfigDict) -> ProgramReport:
        found = measured(config, program)
        if found not in tried:
            tried.append(found)
        return found

    reports: list[ProgramReport] = []
    for _ in range(MOST_ROUNDS):
        current = _changed(config, fields)
        programs = Programs(current, measured.devices)
        reports = [
            report(program, current)
            for program in chosen
            # with one micro-batch, the update is one program
            if program != Program.GRADIENTS or programs.micro_batches > 1
        ]
        failing = next((each for each in reports if not each.fits), None)
        if failing is None or not try_smaller:
            break
        program = failing.program
        attempt = functools.partial(report, program)
        found = advise(current, program, programs.ways, programs.hosts, attempt)
        if found is None:
            break
        fields |= found
    return Settled(fields, _changed(config, fields), tuple(reports), tuple(tried))


PARTS = ("train.batch_size", "train.micro_batch_size", "rl.rollout_prompts", "rl.rows")


def part_of(config: ConfigDict, slices: int) -> ConfigDict:
    """What one of several slices runs: its part of the prompts and of each micro-batch.

    Raises:
      ConfigError: a field of `PARTS` that the slices do not divide.
    """
    fields: Fields = {}
    for name in PARTS:
        section, field = name.split(".")
        value = config[section][field] if section in config else 0
        if value % slices:
            raise ConfigError(f"{name}={value} cannot be shared by {slices} slices: use a multiple")
        if value:
            fields[name] = value // slices
    return _changed(config, fields)


def divided(config: ConfigDict, devices: int) -> Fields:
    """What must change before rows can be cut over this many devices: the model cut further until
    they divide the prompts, and a micro-batch that they divide.
    """
    fields: Fields = {}
    tensor, group, prompts = config.mesh.tensor, 1, 0
    if config.stage in MODES:
        group = config.rl.group
        prompts = config.rl.rollout_prompts or config.train.batch_size
    ways, heads = devices // tensor, model_config(config).num_kv_heads
    while prompts % ways and ways % 2 == 0 and heads % (2 * tensor) == 0:
        tensor, ways = 2 * tensor, ways // 2
        fields["mesh.tensor"] = tensor
    if config.train.micro_batch_size % ways:
        fields["train.micro_batch_size"] = math.lcm(ways, group)
    return fields


def choices(config: ConfigDict) -> Iterator[Fields]:
    """What to ask about in turn where a configuration does not fit, however it is cut: itself,
    adapters alone, a smaller model, its adapters.
    """
    adapted = bool(config.lora.rank)
    yield {}
    if not adapted:
        yield dict(ADAPTERS)
    if smaller := SMALLER.get(config.model.preset):
        yield {"model.preset": smaller}
        if not adapted:
            yield {"model.preset": smaller, **ADAPTERS}


def plan(
    config: ConfigDict,
    chosen: Sequence[Program],
    measured: Measurements,
    try_smaller: bool,
) -> list[Settled]:
    """The configuration and, where it does not fit, its `choices`, up to the first that does."""
    found: list[Settled] = []
    for fields in choices(config):
        if try_smaller:
            fields |= divided(_changed(config, fields), len(measured.devices))
        try:
            found.append(settle(config, fields, chosen, measured, try_smaller))
        except ConfigError:
            if not found:  # the user's own; a choice of ours is left out
                raise
            continue
        if found[-1].fits or not try_smaller:
            break
    return found


def _changed(config: ConfigDict, fields: Fields) -> ConfigDict:
    other = ConfigDict(config.to_dict())
    set_fields(other, fields)
    return other


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

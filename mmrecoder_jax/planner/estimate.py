"""How long a step takes on a machine that nobody has yet, and what a run costs there.

One call of a program takes three times:

    computing    flops / (MATMUL_SHARE * flops of the chip)
    reading      bytes / (READING_SHARE * bandwidth)     what decoding and the update read and write
    receiving    bytes of its collectives / (LINK_SHARE * link)

Between `low`, where the longest hides the others, and `high`, where nothing hides anything. A step
of an RL stage, with P prompts, G rows a group and n turns:

    rollout      prefill of P prompts, extend for every feedback, decoding of all responses at
                 RESPONSE_SHARE of `rl.response_length` each, with ROW_SHARE of the rows at work;
                 no shorter than n responses one after the other, in `high` of the whole length
    scripts      SCRIPT_SECONDS of one core for each response: beside the rollout in `low`, after it
                 in `high`
    update       every micro-batch, `rl.updates_per_batch` times, and the optimizer's steps
    passes       forward alone, of every micro-batch: of the reference (`rl.kl_coef`), and of the
                 policy before several updates of a batch, or for a divergence in the reward
    slices       gradients over the network, twice what a device holds of them

A judge, saving, evaluation and compiling are left out. The shares are those of one H100
(`docs/memory.md` compares); other chips may differ.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Self

from ml_collections import ConfigDict

from mmrecoder_jax.planner import topology
from mmrecoder_jax.planner.fits import ProgramReport
from mmrecoder_jax.planner.machines import Chip
from mmrecoder_jax.planner.programs import Program
from mmrecoder_jax.rl.learner_batch import updates_per_step
from mmrecoder_jax.rl.losses import PenaltyIn
from mmrecoder_jax.rl.trajectory import MODES, Mode

MATMUL_SHARE = 0.5
READING_SHARE = 0.35
LINK_SHARE = 0.7
RESPONSE_SHARE = 0.4
ROW_SHARE = 0.8
CACHE_SHARE = 0.5  # of the slots of a cache that hold a token, while a rollout goes on
SCRIPT_SECONDS = 0.1
FORWARD_SHARE = 1 / 3  # of a gradient's time: the backward pass computes twice as much
RECOMPUTED_SHARE = 1 / 4  # the same with `model.remat=full`, which goes forward twice

ASSUMPTIONS = (
    f"{MATMUL_SHARE:.0%} of the chip's matmul rate, {READING_SHARE:.0%} of its bandwidth, "
    f"{LINK_SHARE:.0%} of its links (shares of one H100)",
    f"responses of {RESPONSE_SHARE:.0%} of rl.response_length, {ROW_SHARE:.0%} of the rows at work",
    f"{SCRIPT_SECONDS} s of a core for a script",
    "no judge, no evaluation, nothing compiled, nothing pre-empted",
)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """A time between what it takes if all that can overlap does, and if nothing does."""

    low: float
    high: float

    def __add__(self, other: Self) -> "Seconds":
        return Seconds(self.low + other.low, self.high + other.high)

    def __mul__(self, times: float) -> "Seconds":
        return Seconds(self.low * times, self.high * times)

    def __str__(self) -> str:
        return between(self.low, self.high)


NONE = Seconds(0, 0)


@dataclasses.dataclass(frozen=True)
class Step:
    """The parts of one step, and the chips it runs on.

    Attributes:
      decoding: of the rollout, tokens one after the other; reading: prompts and feedback.
      scripts: on all cores of the hosts.
      update: all micro-batches and the optimizer; with several slices also their exchange.
    """

    reading: Seconds
    decoding: Seconds
    scripts: Seconds
    update: Seconds

    @property
    def total(self) -> Seconds:
        rollout = self.reading + self.decoding
        low = max(rollout.low, self.scripts.low)
        return Seconds(low, rollout.high + self.scripts.high) + self.update


def of_call(report: ProgramReport, chip: Chip) -> Seconds:
    """One call of a program on one device."""
    computing = report.flops / (MATMUL_SHARE * chip.flops)
    reading = touched(report) / (READING_SHARE * chip.bandwidth)
    receiving = sum(report.collectives.values()) / (LINK_SHARE * chip.link)
    parts = computing, reading, receiving
    return Seconds(max(parts), sum(parts))


def touched(report: ProgramReport) -> float:
    """Bytes of a device's memory that a call must read or write, whatever it computes."""
    if report.program == Program.DECODE:
        return report.weights + CACHE_SHARE * report.cache
    if report.program == Program.UPDATE:
        return 2 * (report.params + report.optimizer) + report.gradients
    return report.params + 2 * report.gradients


def step(
    config: ConfigDict, reports: Sequence[ProgramReport], wanted: topology.Slice
) -> Step | None:
    """One step of a stage; None where a program that it needs has no report.

    Args:
      config: of one slice's part of the prompts (`advice.part_of`).
      reports: of the stage's programs on one slice, each of which fits.
    """
    chip, slices = wanted.generation.chip, wanted.slices
    by_program = {report.program: report for report in reports}
    update = by_program.get(Program.UPDATE)
    if update is None:
        return None
    gradients = by_program.get(Program.GRADIENTS)
    learning = of_call(update, chip)
    if gradients is not None:
        learning += of_call(gradients, chip) * gradients.calls
    if slices > 1:
        held = (gradients or update).gradients or update.params
        exchanged = 2 * held * (slices - 1) / slices / (LINK_SHARE * chip.network)
        learning += Seconds(exchanged, exchanged)
    if config.stage not in MODES:
        return Step(NONE, NONE, NONE, learning)
    if not {Program.PREFILL, Program.EXTEND, Program.DECODE} <= by_program.keys():
        return None
    passes = of_call(gradients, chip) * gradients.calls if gradients else of_call(update, chip)
    return Step(
        *_rollout(config, by_program, wanted),
        learning * updates_per_step(config.rl) + passes * _forward(config),
    )


def _forward(config: ConfigDict) -> float:
    """What passes without gradients cost, in gradients of one mini-batch: `policy.FixedLogps`."""
    rl = config.rl
    in_reward = rl.kl_coef > 0 and PenaltyIn(rl.kl_in) is PenaltyIn.REWARD
    passes = (rl.kl_coef > 0) + (in_reward or updates_per_step(rl) > 1)
    share = RECOMPUTED_SHARE if config.model.remat == "full" else FORWARD_SHARE
    return passes * rl.mini_batches * share


def _rollout(
    config: ConfigDict, reports: Mapping[Program, ProgramReport], wanted: topology.Slice
) -> tuple[Seconds, Seconds, Seconds]:
    """(reading, decoding, scripts) of one step."""
    rl, chip = config.rl, wanted.generation.chip
    prompts = config.train.batch_size
    whole = MODES[config.stage] == Mode.FULL_TRAJECTORY
    fed_back = prompts * (rl.group if whole else 1) * (rl.turns - 1)
    responses = fed_back + prompts * rl.group

    def calls(program: Program, rows: float) -> Seconds:
        return of_call(reports[program], chip) * math.ceil(rows / reports[program].rows)

    reading = calls(Program.PREFILL, prompts) + calls(Program.EXTEND, fed_back)
    mean = RESPONSE_SHARE * rl.response_length
    decode = reports[Program.DECODE]
    token, tokens = of_call(decode, chip), responses * mean / (ROW_SHARE * decode.rows)
    # A conversation's turns come one after the other, however many rows there are.
    low, high = (max(tokens, rl.turns * length) for length in (mean, rl.response_length))
    decoding = Seconds(token.low * low, token.high * high)
    cores = chip.cores * wanted.devices
    scripts = responses * SCRIPT_SECONDS / cores
    return reading, decoding, Seconds(scripts, scripts)


def dollars(seconds: float, wanted: topology.Slice, price: float) -> float:
    """What this time costs on all devices.

    Args:
      price: USD of an hour of one device.
    """
    return seconds / 3600 * wanted.devices * wanted.slices * price


def between(low: float, high: float) -> str:
    """Two times in one unit: "31 to 55 minutes"."""
    units = {"s": (1, 120), "minutes": (60, 7200), "hours": (3600, 72 * 3600)}
    unit, size = next(
        ((unit, size) for unit, (size, limit) in units.items() if high < limit), ("days", 86400)
    )
    first, last = rounded(low / size), rounded(high / size)
    return f"{first} {unit}" if first == last else f"{first} to {last} {unit}"


def rounded(value: float) -> str:
    """Two digits where there are no more: 0.31, 3.1, 31, 310."""
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"

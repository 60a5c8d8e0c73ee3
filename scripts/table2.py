"""The paper's Table 2 in miniature: what shared-first-turn RL does that full trajectories do not.

    python scripts/table2.py --workdir=runs/table2 --seeds=0,1,2 --steps=200 --minutes=110

From one cold start, over seeds, with equal steps and nearly equal executions (`ARMS`): full
trajectories, the same with a bonus for correcting (eta 0.1), shared first turns, and shared first
turns followed by full trajectories. `--arms=full,full_turn,full_ahead,full_three` runs what the
paper left open: advantages by turn, rollouts a step ahead of the policy, three turns. Every policy
is evaluated on the same test charts, greedily and sampled. Written below the work directory:

    cold/           both cold starts and the charts (with --cold=DIR they are elsewhere)
    <arm>/          a sweep over seeds (`scripts/sweep.py`), and evaluation-<seed>/ of its policies
    table2.jsonl    scores of every chart of every policy: what the tables are made from
    table2.md       the tables; turns.png: turn 1 and turn 2 of every policy and seed
    curves.png      reward over executions

Flags `--config.FIELD=VALUE` go to every command whose configuration has that field.

Everything resumes: kill it, or give --minutes, and the same command goes on. A seed is finished in
all arms before the next begins. --table writes the tables of what is there, from table2.jsonl alone
where nothing else is (`--workdir=docs/table2/lr-2e-5`).
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from experiment import (
    ROOT,
    Flags,
    Piece,
    carry_out,
    check_fields_known,
    draw_turns,
    evaluated,
    flags_of,
    is_evaluated,
    numbers,
    write_rows,
    write_tables,
)
from matplotlib.figure import Figure

from mmrecoder_jax.command import ending_in_one_line
from mmrecoder_jax.config import STAGES, ConfigError
from mmrecoder_jax.pipeline import has_finished

GROUP = 8  # trajectories per prompt, of the configurations
MICRO_BATCH = 64  # rows, at most
COLD_STAGES = STAGES[:2]
CONFIGS = (*STAGES, "evaluate")
COLD = "cold start 2"
RESULTS, TABLES, PICTURE, CURVES = "table2.jsonl", "table2.md", "turns.png", "curves.png"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to spend the steps.

    Attributes:
      stage: of its last part.
      prompts: per step. A full step executes T G scripts per prompt, a shared one 1 + G.
      fields: `--config` flags of its own.
      after: the arm whose policy at half of the steps it goes on from; "": the cold start.
      turns: of a trajectory, in training and in the evaluation; the policy sees all of them.
    """

    title: str
    stage: str
    prompts: int
    fields: tuple[str, ...] = ()
    after: str = ""
    turns: int = 2

    @property
    def micro_batch(self) -> int:
        """Rows of a micro-batch: whole groups that divide a step's, at most `MICRO_BATCH`."""
        groups = range(MICRO_BATCH // GROUP, 0, -1)
        return GROUP * next(count for count in groups if self.prompts % count == 0)

    @property
    def executions(self) -> int:
        """Scripts per step."""
        return self.prompts * (self.turns * GROUP if self.stage == "stage2" else 1 + GROUP)


FULL, SHARED = 16, 28  # prompts: 256 and 252 executions a step
ARMS = {
    "shared": Arm("shared first turn only", "stage1", SHARED),
    "shared_full": Arm("shared first turn, then full", "stage2", FULL, after="shared"),
    "full": Arm("full trajectory only, eta = 0", "stage2", FULL),
    "full_eta": Arm(
        "full trajectory only, eta = 0.1", "stage2", FULL, ("--config.reward.eta=0.1",)
    ),
    # What the paper left open. `full` is what they are to be compared with.
    "full_turn": Arm(
        "full trajectory, an advantage per turn", "stage2", FULL, ("--config.rl.credit=turn",)
    ),
    "full_ahead": Arm(
        "full trajectory, rollouts one step ahead", "stage2", FULL, ("--config.rl.ahead=1",)
    ),
    "full_three": Arm(
        "full trajectory of three turns",
        "stage2",
        FULL,
        ("--config.rl.turns=3", "--config.data.lengths=(112,208,264,320,400,488)"),
        turns=3,
    ),
}
PAPERS = ("shared", "shared_full", "full", "full_eta")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the flags ask for.

    Attributes:
      arms: by name.
      cold: a directory with the cold starts below it, and their charts.
      flags: `--config` flags of every run.
    """

    workdir: Path
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    charts: int
    cold: Path
    flags: Flags

    def start(self, name: str, seed: int) -> str:
        """What an arm starts from, as `init_from`."""
        before = ARMS[name].after
        if not before:
            return str(self.cold / COLD_STAGES[-1])
        return f"{self.sweep(before, seed) / f'seed-{seed}'}@{self.steps // 2}"

    def sweep(self, name: str, seed: int) -> Path:
        """The work directory of an arm's sweep: one for all seeds where they start alike."""
        directory = self.workdir / name
        return directory / f"from-{seed}" if ARMS[name].after else directory

    def policy(self, name: str, seed: int) -> Path:
        """The work directory of a trained policy."""
        return self.sweep(name, seed) / f"seed-{seed}"

    def evaluation(self, name: str, seed: int) -> Path:
        """Where a policy's evaluation is."""
        return self.workdir / name / f"evaluation-{seed}"

    def cold_evaluation(self, turns: int, seed: int) -> Path:
        """Where that of the cold start is, in so many turns."""
        return self.workdir / f"cold{'' if turns == 2 else f'-{turns}-turns'}-{seed}"

    @property
    def turns(self) -> list[int]:
        """Turns that the cold start is to be evaluated in: those of the arms."""
        return sorted({ARMS[name].turns for name in self.arms})


def cold_title(turns: int) -> str:
    """What the cold start is called in the tables."""
    return COLD if turns == 2 else f"{COLD}, {turns} turns"


def pieces(plan: Plan) -> Iterator[Piece]:
    """All that is to run, in order: each knows by what is on disk whether it is done."""
    before = ""
    for stage in COLD_STAGES:
        directory = plan.cold / stage
        source = (f"--config.init_from={plan.cold / before}",) if before else ()
        command = plan.flags.module("train", stage, directory, *source)
        yield Piece(stage, command, has_finished(stage, str(directory)))
        before = stage
    cold = plan.cold / before
    for seed in plan.seeds:
        for turns in plan.turns:
            directory = plan.cold_evaluation(turns, seed)
            yield _evaluation(plan, cold_title(turns), cold, directory, seed, turns)
        for name in plan.arms:
            arm = ARMS[name]
            steps = plan.steps // 2 if arm.after else plan.steps
            flags = (
                f"--config={arm.stage}:{plan.flags.size}",
                f"--workdir={plan.sweep(name, seed)}",
                f"--sweep=config.seed={seed}",
                f"--config.init_from={plan.start(name, seed)}",
                f"--config.train.steps={steps}",
                f"--config.train.batch_size={arm.prompts}",
                f"--config.train.micro_batch_size={arm.micro_batch}",
                f"--config.checkpoint.keep_every={max(1, plan.steps // 2)}",
                *plan.flags.of(arm.stage),
                *arm.fields,
            )
            command = (sys.executable, str(ROOT / "scripts" / "sweep.py"), *flags)
            policy = plan.policy(name, seed)
            title = f"{arm.title}, seed {seed}"
            yield Piece(title, command, has_finished(arm.stage, str(policy)))
            directory = plan.evaluation(name, seed)
            yield _evaluation(plan, title, policy, directory, seed, arm.turns)


def _evaluation(
    plan: Plan, title: str, policy: Path, directory: Path, seed: int, turns: int
) -> Piece:
    all_seen = f"--config.eval.remembered={turns - 1}"
    command = plan.flags.evaluation(policy, directory, seed, plan.charts, turns, all_seen)
    return Piece(f"{title}: evaluation", command, is_evaluated(directory))


# ---------------------------------------------------------------- results


def collect(plan: Plan) -> None:
    """Writes `table2.jsonl` from the evaluations that are there, of all arms."""
    rows = []
    for seed in plan.seeds:
        places = {cold_title(turns): plan.cold_evaluation(turns, seed) for turns in (2, 3)} | {
            arm.title: plan.evaluation(name, seed) for name, arm in ARMS.items()
        }
        for title, directory in places.items():
            rows += evaluated(title, seed, directory)
    write_rows(plan.workdir / RESULTS, rows)


def tables(workdir: Path) -> str:
    """Writes `table2.md` and the picture from `table2.jsonl`; returns the tables.

    Raises:
      ConfigError: there are no results.
    """
    text = write_tables(workdir / RESULTS, workdir / TABLES, COLD, ARMS["full"].title)
    draw_turns(workdir / RESULTS, workdir / PICTURE)
    return text


def draw_curves(plan: Plan) -> None:
    """Draws the reward of both turns over executions, a line per arm: the mean over seeds."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for number, (name, arm) in enumerate(ARMS.items()):
        runs = [_rewards(plan, name, seed) for seed in plan.seeds]
        runs = [run for run in runs if len(run)]
        if not runs:
            continue
        steps = min(map(len, runs))
        smooth = max(1, steps // 8)
        mean = np.nanmean([run[:steps] for run in runs], axis=0)
        kernel = np.ones(smooth) / smooth
        before = plan.steps // 2 * ARMS[arm.after].executions if arm.after else 0
        executions = before + arm.executions * np.arange(1, steps + 1)
        for turn, ax in enumerate(axes):
            line = np.convolve(mean[:, turn], kernel, mode="valid")
            ax.plot(executions[smooth - 1 :] / 1000, line, color=f"C{number}", label=arm.title)
    for turn, ax in enumerate(axes, start=1):
        ax.set(xlabel="executions / 1000", title=f"turn {turn}")
    axes[0].set_ylabel("reward of the training batches")
    axes[1].legend(fontsize=8)
    figure.savefig(plan.workdir / CURVES, dpi=100)


def _rewards(plan: Plan, name: str, seed: int) -> np.ndarray:
    """Mean rewards `[steps, 2]` of a run, in the order of its steps."""
    path = plan.policy(name, seed) / "metrics.jsonl"
    if not path.is_file():
        return np.zeros((0, 2))
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    found = {r["step"]: (r["turn1/reward"], r["turn2/reward"]) for r in rows if "turn2/reward" in r}
    return np.array([found[step] for step in sorted(found)]).reshape(-1, 2)


def main() -> None:
    parser = flags_of(__doc__)
    parser.add_argument("--arms", default=",".join(PAPERS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--seeds", default="0,1,2", help="of RL, its data and its evaluation")
    parser.add_argument("--steps", type=int, default=200, help="updates of an arm")
    parser.add_argument("--charts", type=int, default=256, help="test charts of an evaluation")
    parser.add_argument("--cold", type=Path, help="finished pipeline with cold starts and charts")
    args, flags = parser.parse_known_args()
    with ending_in_one_line(args.traceback):
        plan = read_plan(args, flags)
        ran = carry_out(
            args,
            pieces(plan),
            lambda: collect(plan),
            lambda: tables(plan.workdir),
            plan.workdir / RESULTS,
        )
        if ran:
            draw_curves(plan)


def read_plan(args: argparse.Namespace, flags: Sequence[str]) -> Plan:
    """The plan that the flags ask for.

    Raises:
      ConfigError: names the flag that cannot be.
    """
    check_fields_known(flags, CONFIGS, args.size)
    arms = tuple(args.arms.split(","))
    for name in arms:
        if name not in ARMS:
            raise ConfigError(f"--arms={args.arms}: {name!r} is none of {', '.join(ARMS)}")
        if ARMS[name].after not in ("", *arms):
            raise ConfigError(f"--arms={args.arms}: {name} goes on from {ARMS[name].after}: add it")
    for name in ("steps", "charts"):
        if getattr(args, name) < 2:
            raise ConfigError(f"--{name}={getattr(args, name)}: use 2 or more")
    cold = args.cold or args.workdir / "cold"
    return Plan(
        workdir=args.workdir,
        arms=tuple(name for name in ARMS if name in arms),
        seeds=numbers("seeds", args.seeds),
        steps=args.steps,
        charts=args.charts,
        cold=cold,
        flags=Flags(args.size, cold / "data", tuple(flags)),
    )


if __name__ == "__main__":
    main()

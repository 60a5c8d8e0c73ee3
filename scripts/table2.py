"""The paper's Table 2 in miniature: what shared-first-turn RL does that full trajectories do not.

    python scripts/table2.py --workdir=runs/table2 --seeds=0,1,2 --steps=200 --minutes=110

From one cold start, over seeds, with equal steps and nearly equal executions (`ARMS`): full
trajectories, the same with a bonus for correcting (eta 0.1), shared first turns, and shared first
turns followed by full trajectories. Every policy is evaluated on the same test charts, greedily and
sampled, in two turns. Written below the work directory:

    cold/           both cold starts and the charts (with --cold=DIR they are elsewhere)
    <arm>/          a sweep over seeds (`scripts/sweep.py`), and evaluation-<seed>/ of its policies
    table2.jsonl    scores of every chart of every policy: what the tables are made from
    table2.md       the tables; curves.png: reward over executions

Flags `--config.FIELD=VALUE` go to every command whose configuration has that field.

Everything resumes: kill it, or give --minutes, and the same command goes on. A seed is finished in
all arms before the next begins. --table writes the tables of what is there, from table2.jsonl alone
where nothing else is (`--workdir=docs/table2/lr-2e-5`).
"""

import argparse
import contextlib
import dataclasses
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mmrecoder_jax.command import Parser, ending_in_one_line
from mmrecoder_jax.config import KILLED, STAGES, ConfigError, Preempted, field_names, load
from mmrecoder_jax.evaluation import bootstrap
from mmrecoder_jax.exam.intervals import over_seeds
from mmrecoder_jax.pipeline import has_finished
from mmrecoder_jax.reporting.tables import table_markdown
from mmrecoder_jax.rl.correction import improved, regressed, same_code

ROOT = Path(__file__).parents[1]
GROUP = 8  # trajectories per prompt, of the configurations
MICRO_BATCH = 64  # rows, at most
DECODINGS = ("greedy", "sampled")
COLD_STAGES = STAGES[:2]
CONFIGS = (*STAGES, "evaluate")
COLD = "cold start 2"
RESULTS, TABLES, CURVES = "table2.jsonl", "table2.md", "curves.png"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to spend the steps.

    Attributes:
      stage: of its last part.
      prompts: per step. A full step executes 2 G scripts per prompt, a shared one 1 + G.
      after: the arm whose policy at half of the steps it goes on from; "": the cold start.
    """

    title: str
    stage: str
    prompts: int
    fields: tuple[str, ...] = ()
    after: str = ""

    @property
    def micro_batch(self) -> int:
        """Rows of a micro-batch: whole groups that divide a step's, at most `MICRO_BATCH`."""
        groups = range(MICRO_BATCH // GROUP, 0, -1)
        return GROUP * next(count for count in groups if self.prompts % count == 0)

    @property
    def executions(self) -> int:
        """Scripts per step."""
        return self.prompts * (2 * GROUP if self.stage == "stage2" else 1 + GROUP)


FULL, SHARED = 16, 28  # prompts: 256 and 252 executions a step
ARMS = {
    "shared": Arm("shared first turn only", "stage1", SHARED),
    "shared_full": Arm("shared first turn, then full", "stage2", FULL, after="shared"),
    "full": Arm("full trajectory only, eta = 0", "stage2", FULL),
    "full_eta": Arm(
        "full trajectory only, eta = 0.1", "stage2", FULL, ("--config.reward.eta=0.1",)
    ),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the flags ask for.

    Attributes:
      cold: a directory with the cold starts below it, and their charts.
      flags: `--config` flags of every run.
    """

    workdir: Path
    seeds: tuple[int, ...]
    steps: int
    charts: int
    size: str
    cold: Path
    flags: tuple[str, ...]

    def flags_of(self, config: str) -> list[str]:
        """The flags that a configuration has the fields for, and where the charts are."""
        known = set(field_names(load(config, self.size)))
        return [
            f"--config.data.dir={self.cold / 'data'}",
            *(flag for flag in self.flags if field_of(flag) in known),
        ]

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


def field_of(flag: str) -> str:
    """The field that a flag `--config.FIELD=VALUE` sets."""
    return flag.removeprefix("--config.").partition("=")[0]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A command that resumes, and whether it has come to its end."""

    title: str
    command: tuple[str, ...]
    is_done: bool


def pieces(plan: Plan) -> Iterator[Piece]:
    """All that is to run, in order: each knows by what is on disk whether it is done."""
    before = ""
    for stage in COLD_STAGES:
        directory = plan.cold / stage
        source = (f"--config.init_from={plan.cold / before}",) if before else ()
        command = module("train", stage, plan, directory, *source)
        yield Piece(stage, command, has_finished(stage, str(directory)))
        before = stage
    for seed in plan.seeds:
        yield _evaluation(plan, COLD, plan.cold / before, plan.workdir / f"cold-{seed}", seed)
        for name, arm in ARMS.items():
            steps = plan.steps // 2 if arm.after else plan.steps
            flags = (
                f"--config={arm.stage}:{plan.size}",
                f"--workdir={plan.sweep(name, seed)}",
                f"--sweep=config.seed={seed}",
                f"--config.init_from={plan.start(name, seed)}",
                f"--config.train.steps={steps}",
                f"--config.train.batch_size={arm.prompts}",
                f"--config.train.micro_batch_size={arm.micro_batch}",
                f"--config.checkpoint.keep_every={max(1, plan.steps // 2)}",
                *arm.fields,
                *plan.flags_of(arm.stage),
            )
            command = (sys.executable, str(ROOT / "scripts" / "sweep.py"), *flags)
            policy = plan.policy(name, seed)
            title = f"{arm.title}, seed {seed}"
            yield Piece(title, command, has_finished(arm.stage, str(policy)))
            yield _evaluation(plan, title, policy, plan.evaluation(name, seed), seed)


def module(name: str, config: str, plan: Plan, workdir: Path, *flags: str) -> tuple[str, ...]:
    """A command of the package."""
    head = (sys.executable, "-m", f"mmrecoder_jax.{name}", f"--config={config}:{plan.size}")
    return (*head, f"--workdir={workdir}", *flags, *plan.flags_of(config))


def _evaluation(plan: Plan, title: str, policy: Path, directory: Path, seed: int) -> Piece:
    flags = (
        f"--config.init_from={policy}",
        f"--config.seed={seed}",
        f"--config.eval.count={plan.charts}",
        "--config.eval.turns=2",
        "--config.eval.sampled=True",
        "--config.reward.judge=visual",
        "--config.data.gallery=",
    )
    command = module("evaluate", "evaluate", plan, directory, *flags)
    return Piece(f"{title}: evaluation", command, (directory / "evaluation.json").is_file())


def run(plan: Plan, minutes: float) -> bool:
    """Runs what is left, for so many minutes (0: to the end); whether all is done.

    A piece that is under way when the time is over is told to save and end (SIGTERM). Results are
    collected after every piece, so that a kill loses none.

    Raises:
      ConfigError: a piece failed.
      Preempted: SIGTERM or SIGHUP came; the piece under way has been told, and has ended.
    """
    end = time.monotonic() + 60 * minutes if minutes else None
    collect(plan)
    left = [piece for piece in pieces(plan) if not piece.is_done]
    for number, piece in enumerate(left, start=1):
        print(f"== {number} of {len(left)} left: {piece.title}", flush=True)
        with _started(piece.command) as (process, heard):
            try:
                status = process.wait(None if end is None else max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
                status = process.wait()
            except KeyboardInterrupt:
                process.wait()  # it has heard the same signal
                raise
        collect(plan)
        if heard:
            raise Preempted("the same command goes on with what is left")
        if end is not None and time.monotonic() >= end and status in (0, Preempted.status, KILLED):
            print(f"the time is over; {len(left) - number + (status != 0)} pieces are left")
            return False
        if status:
            raise ConfigError(
                f"{piece.title} ended with status {status}: {shlex.join(piece.command)}"
            )
    return True


@contextlib.contextmanager
def _started(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A piece, and the SIGTERM and SIGHUP that come, while it starts too: it is told, and ends."""
    heard: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def hear(number: int, _: Any) -> None:
        heard.append(number)
        if process is not None:
            process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        process = subprocess.Popen(command)
        if heard:
            process.send_signal(signal.SIGTERM)
        yield process, heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- results


def collect(plan: Plan) -> None:
    """Writes `table2.jsonl` from the evaluations that are there."""
    rows = []
    for seed in plan.seeds:
        places = {COLD: plan.workdir / f"cold-{seed}"} | {
            arm.title: plan.evaluation(name, seed) for name, arm in ARMS.items()
        }
        for title, directory in places.items():
            if (directory / "evaluation.json").is_file():
                rows += [chart_rows(title, seed, directory, decoding) for decoding in DECODINGS]
    if not rows:
        return
    path = plan.workdir / RESULTS
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)


def chart_rows(title: str, seed: int, directory: Path, decoding: str) -> dict[str, Any]:
    """The scores of every chart in one evaluation: lists over charts, one per turn."""
    (path,) = sorted((directory / "evaluation").glob(f"*-{decoding}/000000.jsonl"))
    lines = path.read_text(encoding="utf-8").splitlines()
    found = sorted(map(json.loads, lines), key=lambda row: row["chart"])
    turns = [row["turns"] for row in found]
    return {
        "policy": title,
        "seed": seed,
        "decoding": decoding,
        "low": [[round(t["scores"]["overall"], 5) for t in pair] for pair in turns],
        "ok": [[t["status"] == "ok" for t in pair] for pair in turns],
        "judge": [[None if t["judge"] is None else t["judge"]["score"] for t in p] for p in turns],
        "repeat": [same_code(a["response"], b["response"]) for a, b in turns],
    }


SIGNED = ("turn 2 - turn 1", "improvement", "likeness gained")


def summary(row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Per chart, in percent: what the columns are means of; NaN where a chart does not count."""
    low = np.array(row["low"])
    counted = np.array(row["ok"])[:, 0]

    def of_pairs(what: Callable[[float, float], Any]) -> np.ndarray:
        pairs = zip(low, counted, strict=True)
        return np.array([what(*pair) if counts else np.nan for pair, counts in pairs], float)

    likeness = np.array([[score or 0.0 for score in pair] for pair in row["judge"]])
    return {
        "turn 1": 100 * low[:, 0],
        "turn 2": 100 * low[:, 1],
        "turn 2 - turn 1": 100 * (low[:, 1] - low[:, 0]),
        "improvement": 100 * of_pairs(lambda before, after: after - before),
        "improved": 100 * of_pairs(improved),
        "regressed": 100 * of_pairs(regressed),
        "repeat": 100 * np.where(counted, np.array(row["repeat"], float), np.nan),
        "likeness 1": 100 * likeness[:, 0],
        "likeness 2": 100 * likeness[:, 1],
        "likeness gained": 100 * np.where(counted, likeness[:, 1] - likeness[:, 0], np.nan),
    }


def table(rows: Sequence[Mapping[str, Any]], decoding: str) -> list[dict[str, str]]:
    """A row per policy: the mean over seeds, and two intervals of it.

    In brackets the 95 % interval over seeds (Student's), in braces that over charts, of the mean
    of the seeds (bootstrap).
    """
    found = []
    for policy in (COLD, *(arm.title for arm in ARMS.values())):
        runs = [r for r in rows if r["policy"] == policy and r["decoding"] == decoding]
        if not runs:
            continue
        columns = [summary(run) for run in runs]
        row = {"policy": policy, "seeds": str(len(runs))}
        for name in columns[0]:
            means = np.array([np.nanmean(column[name]) for column in columns])
            signed = "+" if name in SIGNED else ""
            text = f"{means.mean():{signed}.2f}"
            seeds = over_seeds(means)
            if seeds.count > 1:
                text += f" [{seeds.low:{signed}.2f}, {seeds.high:{signed}.2f}]"
            values = np.array([column[name] for column in columns])
            known = values[:, ~np.isnan(values).all(axis=0)]
            low, high = bootstrap(np.nanmean(known, axis=0))
            text += f" {{{low:{signed}.2f}, {high:{signed}.2f}}}"
            row[name] = text
        found.append(row)
    return found


def write_tables(workdir: Path) -> str:
    """Writes `table2.md` from `table2.jsonl`; returns its text.

    Raises:
      ConfigError: there are no results.
    """
    path = workdir / RESULTS
    if not path.is_file():
        raise ConfigError(
            f"--workdir={workdir}: no {RESULTS} in it; let a policy be evaluated first"
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    parts = []
    for decoding in DECODINGS:
        parts.append(f"{decoding}:\n\n{table_markdown(table(rows, decoding))}")
    text = "\n\n".join(parts) + "\n"
    (workdir / TABLES).write_text(text, encoding="utf-8")
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
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--seeds", default="0,1,2", help="of RL, its data and its evaluation")
    parser.add_argument("--steps", type=int, default=200, help="updates of an arm")
    parser.add_argument("--charts", type=int, default=256, help="test charts of an evaluation")
    parser.add_argument("--size", default="tiny", help="of the configurations: tiny, smoke")
    parser.add_argument("--cold", type=Path, help="finished pipeline with cold starts and charts")
    parser.add_argument("--minutes", type=float, default=0, help="then save and end; 0: no limit")
    parser.add_argument("--table", action="store_true", help="run nothing: write the tables")
    parser.add_argument("--dry_run", action="store_true", help="print the commands that are left")
    args, flags = parser.parse_known_args()
    with ending_in_one_line(args.traceback):
        plan = read_plan(args, flags)
        if args.dry_run:
            for piece in pieces(plan):
                print(
                    f"# {piece.title} has finished" if piece.is_done else shlex.join(piece.command)
                )
            return
        if args.table:
            print(write_tables(plan.workdir))
            return
        done = run(plan, args.minutes)
        if not (plan.workdir / RESULTS).is_file():
            print("no policy has been evaluated yet: the same command goes on")
            return
        print(write_tables(plan.workdir))
        draw_curves(plan)
        print(f"{'all done' if done else 'not all done'}: {plan.workdir / TABLES}")


def read_plan(args: argparse.Namespace, flags: Sequence[str]) -> Plan:
    """The plan that the flags ask for.

    Raises:
      ConfigError: names the flag that cannot be.
    """
    for flag in flags:
        if not flag.startswith("--config.") or "=" not in flag:
            raise ConfigError(f"{flag}: no flag of this script; fields are --config.FIELD=VALUE")
        if not any(field_of(flag) in field_names(load(name, args.size)) for name in CONFIGS):
            raise ConfigError(f"{flag}: no stage has this field")
    try:
        seeds = tuple(int(word) for word in args.seeds.split(","))
    except ValueError:
        raise ConfigError(f"--seeds={args.seeds}: give numbers, such as 0,1,2") from None
    for name in ("steps", "charts"):
        if getattr(args, name) < 2:
            raise ConfigError(f"--{name}={getattr(args, name)}: use 2 or more")
    cold = args.cold or args.workdir / "cold"
    return Plan(
        workdir=args.workdir,
        seeds=seeds,
        steps=args.steps,
        charts=args.charts,
        size=args.size,
        cold=cold,
        flags=tuple(flags),
    )


if __name__ == "__main__":
    main()

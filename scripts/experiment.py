"""What the experiments share (scripts/table2.py, scripts/cold_starts.py): commands that resume,
scores of every chart, tables and a picture of them.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from mmrecoder_jax.command import Parser
from mmrecoder_jax.config import KILLED, ConfigError, Preempted, field_names, load
from mmrecoder_jax.exam.intervals import RESAMPLES, over_seeds
from mmrecoder_jax.reporting.tables import table_markdown
from mmrecoder_jax.rl.correction import improved, regressed, same_code

ROOT = Path(__file__).parents[1]
DECODINGS = ("greedy", "sampled")
# Of a piece that was told to end: some save first, others know no SIGTERM and begin again.
ENDED = (0, Preempted.status, KILLED, -signal.SIGTERM)
FULL_SCORE = 1 - 1e-6  # a mean of F1 scores in floats
# Columns that are differences, or are read as such.
SIGNED = ("turn 2 - turn 1", "turn 3 - turn 2", "improvement", "likeness gained")


# ---------------------------------------------------------------- commands


@dataclasses.dataclass(frozen=True)
class Piece:
    """A command that resumes, and whether it has come to its end.

    Attributes:
      variables: of its environment, beside those of this process.
    """

    title: str
    command: tuple[str, ...]
    is_done: bool
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """The command as it is typed; as a comment where it is done."""
        if self.is_done:
            return f"# {self.title} has finished"
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*settings, shlex.join(self.command)])


@dataclasses.dataclass(frozen=True)
class Flags:
    """Where a run's charts are, and the `--config` flags that go to every command which has their
    fields.
    """

    size: str
    data: Path
    fields: tuple[str, ...] = ()

    def of(self, config: str) -> list[str]:
        """Those that a configuration has the fields for, and where the charts are."""
        known = set(field_names(load(config, self.size)))
        kept = [flag for flag in self.fields if field_of(flag) in known]
        return [f"--config.data.dir={self.data}", *kept]

    def module(self, name: str, config: str, workdir: Path, *flags: str) -> tuple[str, ...]:
        """A command of the package."""
        head = (sys.executable, "-m", f"mmrecoder_jax.{name}", f"--config={config}:{self.size}")
        return (*head, f"--workdir={workdir}", *flags, *self.of(config))

    def evaluation(
        self, policy: Path, directory: Path, seed: int, charts: int, turns: int, *more: str
    ) -> tuple[str, ...]:
        """The command that evaluates a policy on test charts, greedily and sampled."""
        flags = (
            f"--config.init_from={policy}",
            f"--config.seed={seed}",
            f"--config.eval.count={charts}",
            f"--config.eval.turns={turns}",
            "--config.eval.sampled=True",
            "--config.reward.judge=visual",
            "--config.data.gallery=",
            *more,
        )
        return self.module("evaluate", "evaluate", directory, *flags)


def field_of(flag: str) -> str:
    """The field that a flag `--config.FIELD=VALUE` sets."""
    return flag.removeprefix("--config.").partition("=")[0]


def check_fields_known(flags: Sequence[str], configs: Iterable[str], size: str) -> None:
    """Raises ConfigError for a flag that is no `--config.FIELD=VALUE` of any configuration."""
    known = {name for config in configs for name in field_names(load(config, size))}
    for flag in flags:
        if not flag.startswith("--config.") or "=" not in flag:
            raise ConfigError(f"{flag}: no flag of this script; fields are --config.FIELD=VALUE")
        if field_of(flag) not in known:
            raise ConfigError(f"{flag}: no stage has this field")


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """Of `0,1,2`; raises ConfigError that names the flag."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(f"--{flag}={text}: give numbers, such as 0,1,2") from None


def flags_of(doc: str | None) -> Parser:
    """A parser with the flags that every experiment has.

    Args:
      doc: what the experiment says of itself.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--size", default="tiny", help="of the configurations: tiny, smoke")
    parser.add_argument("--minutes", type=float, default=0, help="then save and end; 0: no limit")
    parser.add_argument("--table", action="store_true", help="run nothing: write the tables")
    parser.add_argument("--dry_run", action="store_true", help="print the commands that are left")
    return parser


def carry_out(
    args: argparse.Namespace,
    pieces: Iterable[Piece],
    collect: Callable[[], None],
    tables: Callable[[], str],
    results: Path,
) -> bool:
    """Does what --dry_run, --table and --minutes ask for.

    Args:
      collect: writes `results` from the evaluations that are there.
      tables: writes the tables of `results`, and returns their text.

    Returns:
      Whether pieces were run and policies are evaluated.
    """
    if args.dry_run:
        print(*pieces, sep="\n")
        return False
    if args.table:
        print(tables())
        return False
    done = run(pieces, args.minutes, collect)
    if not results.is_file():
        print("there are no results yet: the same command goes on")
        return False
    print(tables())
    print(f"{'all done' if done else 'not all done'}: {results.parent}")
    return True


def run(pieces: Iterable[Piece], minutes: float, collect: Callable[[], None]) -> bool:
    """Runs what is left, for so many minutes (0: to the end); whether all is done.

    A piece that is under way when the time is over is told to save and end (SIGTERM). Results are
    collected after every piece, so that a kill loses none.

    Raises:
      ConfigError: a piece failed.
      Preempted: SIGTERM or SIGHUP came; the piece under way has been told, and has ended.
    """
    end = time.monotonic() + 60 * minutes if minutes else None
    collect()
    left = [piece for piece in pieces if not piece.is_done]
    for number, piece in enumerate(left, start=1):
        print(f"== {number} of {len(left)} left: {piece.title}", flush=True)
        with _started(piece) as (process, heard):
            try:
                status = process.wait(None if end is None else max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
                status = process.wait()
            except KeyboardInterrupt:
                process.wait()  # it has heard the same signal
                raise
        collect()
        if heard:
            raise Preempted("the same command goes on with what is left")
        if end is not None and time.monotonic() >= end and status in ENDED:
            print(f"the time is over; {len(left) - number + (status != 0)} pieces are left")
            return False
        if status:
            raise ConfigError(f"{piece.title} ended with status {status}: {piece}")
    return True


@contextlib.contextmanager
def _started(piece: Piece) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A piece, and the SIGTERM and SIGHUP that come, while it starts too: it is told, and ends."""
    heard: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def hear(number: int, _: Any) -> None:
        heard.append(number)
        if process is not None:
            process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        process = subprocess.Popen(piece.command, env=os.environ | dict(piece.variables))
        if heard:
            process.send_signal(signal.SIGTERM)
        yield process, heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- results


def is_evaluated(directory: Path) -> bool:
    """Whether an evaluation has come to its end."""
    return (directory / "evaluation.json").is_file()


def evaluated(title: str, seed: int, directory: Path) -> list[dict[str, Any]]:
    """The rows of one policy's evaluation; none where it has not come to its end."""
    if not is_evaluated(directory):
        return []
    return [chart_rows(title, seed, directory, decoding) for decoding in DECODINGS]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes JSON lines, all or none; where there are no rows, nothing."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)


def read_rows(path: Path, remedy: str) -> list[dict[str, Any]]:
    """The rows of JSON lines.

    Raises:
      ConfigError: there is no such file; it says the remedy.
    """
    if not path.is_file():
        raise ConfigError(f"--workdir={path.parent}: no {path.name} in it; {remedy}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def chart_rows(title: str, seed: int, directory: Path, decoding: str) -> dict[str, Any]:
    """The scores of every chart in one evaluation: lists over charts, one per turn."""
    (path,) = sorted((directory / "evaluation").glob(f"test-{decoding}/000000.jsonl"))
    lines = path.read_text(encoding="utf-8").splitlines()
    found = sorted(map(json.loads, lines), key=lambda row: row["chart"])
    turns = [row["turns"] for row in found]
    return {
        "policy": title,
        "seed": seed,
        "decoding": decoding,
        "low": [[round(t["scores"]["overall"], 5) for t in row] for row in turns],
        "ok": [[t["status"] == "ok" for t in row] for row in turns],
        "judge": [[None if t["judge"] is None else t["judge"]["score"] for t in r] for r in turns],
        "repeat": [same_code(r[0]["response"], r[1]["response"]) for r in turns if len(r) > 1],
    }


Columns = dict[str, Float[np.ndarray, " charts"]]


def summary(row: Mapping[str, Any]) -> Columns:
    """Per chart, in percent: what the columns are means of; NaN where a chart does not count.

    Of one turn there is nothing to compare; a third is compared with the second. "mended" counts
    over first turns that run and have less than a full score: how many second turns have it.
    "right repeats" counts over second turns that repeat the first: how many have a full score.
    """
    low, counted = np.array(row["low"]), np.array(row["ok"], bool)[:, 0]
    turns = low.shape[1]
    likeness = np.array([[score or 0.0 for score in scores] for scores in row["judge"]])
    columns = {f"turn {turn + 1}": low[:, turn] for turn in range(turns)}
    columns |= {
        f"turn {turn + 1} - turn {turn}": low[:, turn] - low[:, turn - 1]
        for turn in range(1, turns)
    }
    if turns > 1:

        def of_pairs(what: Callable[[float, float], Any]) -> np.ndarray:
            pairs = zip(low[:, 0], low[:, 1], counted, strict=True)
            return np.array([what(a, b) if counts else np.nan for a, b, counts in pairs], float)

        is_full, repeats = low >= FULL_SCORE, np.array(row["repeat"], bool)
        columns |= {
            "improvement": of_pairs(lambda before, after: after - before),
            "improved": of_pairs(improved),
            "regressed": of_pairs(regressed),
            "mended": np.where(counted & ~is_full[:, 0], is_full[:, 1], np.nan),
            "repeat": np.where(counted, repeats, np.nan),
            "right repeats": np.where(counted & repeats, is_full[:, 1], np.nan),
        }
    columns |= {f"likeness {turn + 1}": likeness[:, turn] for turn in range(turns)}
    if turns > 1:
        columns["likeness gained"] = np.where(counted, likeness[:, 1] - likeness[:, 0], np.nan)
    return {name: 100 * values for name, values in columns.items()}


def table(rows: Sequence[Mapping[str, Any]], decoding: str) -> list[dict[str, str]]:
    """A row per policy: the mean over seeds, and two intervals of it.

    In brackets the 95 % interval over seeds (Student's), in braces that over charts, of the mean
    of the seeds (bootstrap).
    """
    found = []
    for policy, runs in _by_policy(rows, decoding).items():
        columns = [summary(run) for run in runs.values()]
        row = {"policy": policy, "seeds": str(len(runs))}
        found.append(row | {name: _cell(name, columns) for name in columns[0]})
    return _in_order(found)


def differences(
    rows: Sequence[Mapping[str, Any]], decoding: str, base: str
) -> list[dict[str, str]]:
    """A row per policy: how much higher its means are than those of `base` with the same seeds.

    The intervals are those of `table`; both policies are resampled by the same charts. A policy
    without a seed in common is left out.
    """
    runs = _by_policy(rows, decoding)
    found = []
    for policy, own in runs.items():
        seeds = sorted(own.keys() & runs.get(base, {}).keys())
        if policy == base or not seeds:
            continue
        ours, theirs = ([summary(one[seed]) for seed in seeds] for one in (own, runs[base]))
        common = [name for name in ours[0] if name in theirs[0]]
        row = {f"against {base}": policy, "seeds": str(len(seeds))}
        found.append(row | {name: _cell(name, ours, theirs) for name in common})
    return _in_order(found)


def mean_turns(
    rows: Sequence[Mapping[str, Any]], decoding: str
) -> dict[tuple[str, int], list[float]]:
    """Mean low-level scores of the turns in percent, by policy and seed."""
    return {
        (policy, seed): [100 * float(mean) for mean in np.mean(run["low"], axis=0)]
        for policy, runs in _by_policy(rows, decoding).items()
        for seed, run in runs.items()
    }


def _in_order(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The rows, all with the same columns: those of the longest row first, in its order."""
    names = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    return [{name: row.get(name, "") for name in names} for row in rows]


def _by_policy(
    rows: Sequence[Mapping[str, Any]], decoding: str
) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Runs by policy and seed, in the order of their first rows."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        if row["decoding"] == decoding:
            found.setdefault(row["policy"], {})[row["seed"]] = row
    return found


def _cell(name: str, ours: Sequence[Columns], theirs: Sequence[Columns] = ()) -> str:
    """A mean and its intervals, or by how much it is above another; the columns are of seeds."""
    sign = "+" if theirs or name in SIGNED else ""
    values = [np.array([column[name] for column in one]) for one in (ours, theirs) if one]
    if any(np.isnan(of_one).all(axis=1).any() for of_one in values):
        return "-"  # with one of the seeds no first turn runs
    means = _less([np.nanmean(of_one, axis=1) for of_one in values])
    text = f"{means.mean():{sign}.2f}"
    seeds = over_seeds(means)
    if seeds.count > 1:
        text += f" [{seeds.low:{sign}.2f}, {seeds.high:{sign}.2f}]"
    with warnings.catch_warnings():  # charts that do not count, or a draw of none that does
        warnings.simplefilter("ignore", RuntimeWarning)
        charts = [np.nanmean(of_one, axis=0) for of_one in values]
        draws = np.random.default_rng(0).integers(0, len(charts[0]), (RESAMPLES, len(charts[0])))
        resampled = _less([np.nanmean(of_one[draws], axis=1) for of_one in charts])
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return f"{text} {{{low:{sign}.2f}, {high:{sign}.2f}}}"


def _less(values: Sequence[np.ndarray]) -> np.ndarray:
    """The first, less the second where there is one."""
    first, *second = values
    return first - second[0] if second else first


def write_tables(source: Path, target: Path, *bases: str) -> str:
    """Writes the tables of the rows in `source`, and what each policy has more than those called
    `bases`; returns their text.

    Raises:
      ConfigError: there are no results.
    """
    rows = read_rows(source, "let a policy be evaluated first")
    parts = []
    for decoding in DECODINGS:
        tables = [table(rows, decoding), *(differences(rows, decoding, base) for base in bases)]
        parts += [f"{decoding}:", *(table_markdown(one) for one in tables if one)]
    text = "\n\n".join(parts) + "\n"
    target.write_text(text, encoding="utf-8")
    return text


def draw_turns(source: Path, target: Path) -> None:
    """Draws a row per policy of the rows in `source`, as a PNG file: an arrow per seed from each
    turn to the next, a dot where there is one turn.

    Raises:
      ConfigError: there are no results.
    """
    rows = read_rows(source, "let a policy be evaluated first")
    names = list(dict.fromkeys(row["policy"] for row in rows))
    seeds = sorted({row["seed"] for row in rows})
    figure = Figure(figsize=(9.5, 1.3 + 0.42 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(DECODINGS), sharey=True)
    for ax, decoding in zip(panels, DECODINGS, strict=True):
        for (policy, seed), turns in mean_turns(rows, decoding).items():
            place = names.index(policy) + 0.16 * (seeds.index(seed) - (len(seeds) - 1) / 2)
            color = f"C{seeds.index(seed)}"
            ax.plot(turns, [place] * len(turns), "-o", color=color, markersize=4, markevery=[0])
            for before, after in itertools.pairwise(turns):
                marker = ">" if after > before else "<" if after < before else "o"
                ax.plot(after, place, marker, color=color)
        ax.set(title=decoding, xlabel="low-level, percent: turn 1 (dot) to the last (arrow)")
        ax.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), [textwrap.fill(name, 44) for name in names], fontsize=8)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    for number, seed in enumerate(seeds):
        panels[0].plot([], [], "o", color=f"C{number}", markersize=4, label=f"seed {seed}")
    figure.legend(loc="outside upper right", ncols=len(seeds), fontsize=8)
    figure.savefig(target, dpi=100)

"""A run as a page: what a person wants to know first, results, curves, trajectories.

    report.html     the page
    report/         its data: report/<file of trajectories>/list.js, 0.js, 1.js, ...

Pictures are those of the run, below the work directory, and are not copied. A report of one file
brings everything along (`write_one_file`). The same parts and the same data serve a run that still
goes (`server`).
"""

import datetime
import functools
import os
import shutil
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrecoder_jax import places
from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.evaluation import table_rows
from mmrecoder_jax.models.files import CheckpointError
from mmrecoder_jax.models.tokenizer import load_tokenizer
from mmrecoder_jax.monitoring.alarms import MONITORS
from mmrecoder_jax.monitoring.progress import format_number
from mmrecoder_jax.reporting.curves import curves_html
from mmrecoder_jax.reporting.escape import data_uri, escape
from mmrecoder_jax.reporting.page import DATA, data_script, page_html, start_data
from mmrecoder_jax.reporting.tables import table_html
from mmrecoder_jax.reporting.trajectories import TrajectoryView, detail, entry, read_views
from mmrecoder_jax.reporting.verdict import verdict
from mmrecoder_jax.reporting.workdir import (
    StageFiles,
    Written,
    newest_first,
    stages_of,
    target_finder,
)

PAGE = "report.html"
MOST = 10_000  # trajectories of a page, the newest
MOST_OF_ONE_FILE = 48  # each brings about three pictures, and the file is mailed
GROUPS_OF_ONE_FILE = 3  # an evaluation's: charts greedy, charts sampled, real charts
CHUNK = 32  # trajectories of a file of details
TINY_BANNER = (
    "This is the embedded default: a model of about one million parameters, trained from scratch "
    "on toy charts in minutes on a CPU. It shows that every step of the pipeline runs. Its numbers "
    "are not the paper's and say nothing about the 7B model."
)
LEGEND = (
    '<p class="soft">Scores are percent, ChartMimic low-level (training mode), code_pass: a script '
    "that does not execute scores 0. Brackets are 95 % bootstrap intervals over charts. "
    "Improvement, improved, regressed and repeat compare a turn with the first one, only over "
    "samples whose first turn executes (repeat: with the turn before).</p>"
)


class Report:
    """What is written of a work directory, now.

    Args:
      workdir: of a pipeline, or of a stage.
      most: trajectories at most, the newest.
      most_of_file: trajectories of one file at most.
    """

    def __init__(self, workdir: str | os.PathLike[str], most: int = MOST, most_of_file: int = MOST):
        self.workdir, self.shown_as = Path(workdir), places.shown(str(workdir))
        self.stages = stages_of(self.workdir)
        self._most, self._most_of_file = most, most_of_file

    def parts(self) -> dict[str, str]:
        """Trusted HTML by the id of its place in the page."""
        if not self.stages:
            return {"about": '<p class="banner">No step has ended yet.</p>'}
        ringing = {stage.name: _ringing(stage) for stage in self.stages}
        rows = [row for stage in self.stages for row in stage.evaluation()]
        table = table_html(table_rows(rows)) + LEGEND if rows else ""
        return {
            "about": self._about(),
            "short": _short(self.stages),
            "alarms": _alarms(self.stages),
            "results": (
                f'<details data-key="table"><summary>the table of all {len(rows)} rows</summary>'
                f"{table}</details>"
                if rows
                else ""
            ),
            "curves": _curves(self.stages, ringing),
        }

    def _about(self) -> str:
        config = self.stages[-1].config()
        facts = {"work directory": self.shown_as} | {
            name: value
            for name, value in (
                ("size", config.get("size")),
                ("seed", config.get("seed")),
                ("model", config.get("model", {}).get("preset")),
                ("stages", ", ".join(stage.name for stage in self.stages)),
                ("written", datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")),
            )
            if value is not None
        }
        listed = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
            for name, value in facts.items()
        )
        tiny = config.get("size") in ("tiny", "smoke")
        banner = f'<p class="banner">{TINY_BANNER}</p>' if tiny else ""
        return f"{banner}<dl>{listed}</dl>"

    @property
    def title(self) -> str:
        return f"MM-ReCoder in JAX: {self.workdir.resolve().name}"

    def files(self) -> list[tuple[Written, int]]:
        """(file of trajectories, how many of them are shown), newest first."""
        found, left = [], self._most
        for written in newest_first(self.stages):
            count = min(_count(written), left, self._most_of_file)
            if count:
                found.append((written, count))
                left -= count
        return found

    def views(self, written: Written, count: int) -> list[TrajectoryView]:
        """The first trajectories of a file."""
        return read_views(written.path, written.name, self._target, count)

    def _target(self, chart: str) -> Path | None:
        return self._targets.get(chart)

    @functools.cached_property
    def _targets(self) -> Mapping[str, Path]:
        return target_finder(self.workdir, self.stages[-1].config())

    def _text_of(self, written: Written) -> Callable[[int], str]:
        """Texts of the tokens of the stage that a file belongs to; ids where it has none."""
        for stage in self.stages:
            if written.path.is_relative_to(stage.path):
                return _texts(stage.path / "tokenizer")
        raise AssertionError("a file belongs to a stage")

    def address(self, picture: Path) -> str:
        """Of a picture, as the page beside the work directory's files loads it."""
        below = os.path.relpath(picture, self.workdir)
        return urllib.parse.quote(Path(below).as_posix())

    def entries(
        self, views: Sequence[TrajectoryView], where: Callable[[Path], str] | None = None
    ) -> list[Any]:
        """The data "list" of a file: what its trajectories are found by."""
        return [entry(view, where or self.address) for view in views]

    def details(
        self,
        written: Written,
        views: Sequence[TrajectoryView],
        number: int,
        where: Callable[[Path], str] | None = None,
    ) -> list[Any]:
        """The data "0", "1", ... of a file: all of `CHUNK` of its trajectories."""
        text_of = self._text_of(written)
        part = views[number * CHUNK : (number + 1) * CHUNK]
        return [detail(view, where or self.address, text_of) for view in part]

    def sources(self) -> list[dict[str, Any]]:
        """What the page's script must know of each file of trajectories."""
        return [
            {
                "key": written.key,
                "name": written.name,
                "group": written.group,
                "step": written.step,
                "chunk": CHUNK,
                "again": written.is_training,
            }
            for written, _ in self.files()
        ]


def write_report(workdir: str | os.PathLike[str], most: int = MOST) -> str:
    """Writes `report.html` and `report/`, whole or not at all, and returns the page's path.

    Raises:
      ConfigError: no run has written there, or `report` is somebody else's.
    """
    report = _finished(Report(workdir, most))
    root = report.workdir
    folder, fresh, gone = root / DATA, root / f"{DATA}.new", root / f"{DATA}.old"
    _check_ours(folder)
    for left_over in (fresh, gone):
        shutil.rmtree(left_over, ignore_errors=True)
    fresh.mkdir()
    for name, value in _data(report):
        path = fresh / f"{name}.js"
        path.parent.mkdir(exist_ok=True)
        path.write_text(data_script(name, value), encoding="ascii")
    start = start_data(report.sources(), report.shown_as)
    page = page_html(report.title, report.parts(), start)
    if folder.exists():
        folder.rename(gone)
    fresh.rename(folder)
    shutil.rmtree(gone, ignore_errors=True)
    written = _replace(root / PAGE, page)
    places.put(folder)
    places.put(written)
    return written


def write_one_file(workdir: str | os.PathLike[str], path: str, most: int = MOST_OF_ONE_FILE) -> str:
    """Writes a report of one file, which brings its data and pictures along.

    Raises:
      ConfigError: no run has written there.
    """
    report = _finished(Report(workdir, most, max(1, most // GROUPS_OF_ONE_FILE)))
    pictures: dict[str, str] = {}

    @functools.cache
    def where(picture: Path) -> str:
        name = str(len(pictures))
        if not Path(places.bring(picture)).is_file():  # moved, or removed since (`rl.kept`)
            return ""
        pictures[name] = data_uri(picture.read_bytes())
        return name

    embedded: dict[str, Any] = dict(_data(report, where))
    embedded["images"] = pictures
    start = start_data(report.sources(), report.shown_as)
    return _replace(Path(path), page_html(report.title, report.parts(), start, embedded))


def _data(
    report: Report, where: Callable[[Path], str] | None = None
) -> Iterator[tuple[str, list[Any]]]:
    """(name, value) of all data that the page loads."""
    for written, count in report.files():
        views = report.views(written, count)
        yield f"{written.key}/list", report.entries(views, where)
        for number in range(-(-len(views) // CHUNK)):
            yield f"{written.key}/{number}", report.details(written, views, number, where)


def _finished(report: Report) -> Report:
    if not report.stages:
        raise ConfigError(
            f"--workdir={report.shown_as!r}: no run has written there: neither it nor a directory "
            "in it has metrics.jsonl or evaluation.json (runs/tiny has, after the README's command)"
        )
    return report


def _check_ours(folder: Path) -> None:
    """Raises ConfigError for a folder that holds something else than a report's data."""
    if folder.exists() and any(path.suffix != ".js" for path in folder.rglob("*.*")):
        raise ConfigError(
            f"{folder} holds something else than a report: move it away, a report's data go there"
        )


def _replace(path: Path, page: str) -> str:
    # Renamed over the old page, so that a browser never reads half of one.
    beside = path.with_name(path.name + ".new")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, path)
    return str(path)


@functools.lru_cache(maxsize=512)
def _count_of(path: Path, changed: float) -> int:
    with open(path, "rb") as f:
        return sum(line.endswith(b"\n") for line in f)


def _count(written: Written) -> int:
    """Whole lines of a file."""
    try:
        return _count_of(written.path, written.changed)
    except FileNotFoundError:  # it has just been removed (`rl.kept`)
        return 0


@functools.lru_cache(maxsize=8)
def _texts(directory: Path) -> Callable[[int], str]:
    try:
        tokenizer = load_tokenizer(directory)
    except (OSError, ValueError, CheckpointError):  # an earlier version's, or half written
        return lambda token: f"[{token}]"
    return functools.cache(lambda token: tokenizer.decode([token], skip_special=False))


# ---------------------------------------------------------------- the parts


def _short(stages: Sequence[StageFiles]) -> str:
    found = verdict(stages)
    sentences = "".join(f"<li>{sentence}</li>" for sentence in found.sentences)
    pictures = "".join(
        f"<figure><figcaption>{caption}</figcaption>{picture}</figure>"
        for caption, picture in found.pictures
    )
    return f'<div class="short"><ul>{sentences}</ul>{pictures}</div>'


def _ringing(stage: StageFiles) -> dict[str, float]:
    """Thresholds of the alarms that have begun and not ended, by name."""
    found: dict[str, float] = {}
    for row in stage.alarms():
        if row["state"] == "begins" and row["alarm"] in MONITORS:
            found[row["alarm"]] = row["threshold"]
        else:
            found.pop(row["alarm"], None)
    return found


def _alarms(stages: Sequence[StageFiles]) -> str:
    """What rings, in red, and below a fold what has rung."""
    shown, past = [], []
    for stage in stages:
        ringing = _ringing(stage)
        for row in reversed(stage.alarms()):
            name, value = str(row["alarm"]), format_number(float(row["value"]))
            text = (
                f"{escape(stage.name)} step {int(row['step'])}: "
                f"<b>{escape(name)}</b> {'rings' if row['state'] == 'begins' else 'ends'} at "
                f"{value} (threshold {format_number(float(row['threshold']))})"
            )
            past.append(f"<li>{text}</li>")
            if row["state"] == "begins" and name in ringing:
                del ringing[name]
                means = MONITORS[name].means if name in MONITORS else ""
                shown.append(f'<p class="alarm" role="alert">{text}: {escape(means)}</p>')
    if not past:
        return ""
    fold = (
        f'<details data-key="alarms"><summary>all {len(past)} beginnings and ends</summary>'
        f"<ul>{''.join(past)}</ul></details>"
    )
    quiet = "" if shown else '<p class="soft">None rings now.</p>'
    return "".join(shown) + quiet + fold


def _curves(stages: Sequence[StageFiles], ringing: Mapping[str, Mapping[str, float]]) -> str:
    parts = []
    drawn = [(stage, rows) for stage in stages if (rows := stage.metrics())]
    for stage, rows in reversed(drawn):
        state = " open" if stage is drawn[-1][0] else ""
        name = escape(stage.name)
        parts.append(
            f'<details data-key="curves {name}"{state}><summary>{name}, '
            f"{len(rows)} steps</summary>{curves_html(rows, ringing[stage.name], stage.name)}"
            "</details>"
        )
    return "".join(parts)

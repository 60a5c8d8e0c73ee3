"""What each benchmark asks: its files as published become charts with questions and records.

    chartmimic   direct       a folder of scripts with .png (direct_600), or its rows
                 customized   its rows (test.jsonl, *.tsv): the folders have no instructions
    plot2code    direct, conditional      the folder with metadata.jsonl
    chartx                    the JSON list
    chart2code   direct, customize, figure, edit, table      JSON lists or parquet
    gallery                   a chart directory of ours (`mmrecoder_jax.build_gallery`)
    tiny                      the test split of a tiny run, or toy charts made on the spot

Every reference is run once, for its record, into `<out>/charts`; what does not run is left out and
named.
"""

import contextlib
import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmrecoder_jax.benchmarks.chartmimic_official import customized_prefix
from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.data import synthetic
from mmrecoder_jax.data.benchmarks import (
    Skipped,
    import_charts,
    import_meta,
    read_chartmimic,
    read_chartx,
    read_plot2code,
)
from mmrecoder_jax.data.build import build_synthetic
from mmrecoder_jax.data.chart2code_tasks import Level, read_chart2code_level
from mmrecoder_jax.data.chartmimic_rows import COLUMNS, CUSTOMIZED, read_chartmimic_rows
from mmrecoder_jax.data.grammars import GRAMMARS
from mmrecoder_jax.data.published import RawChart
from mmrecoder_jax.data.rows import JsonLines
from mmrecoder_jax.data.sources import Chart, ChartDirectory, RandomAccess
from mmrecoder_jax.data.survey import Part
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.pool import ExecutorPool
from mmrecoder_jax.monitoring.progress import Bar

TINY_COUNT = 64  # toy charts that are made on the spot where no --count says otherwise


class Benchmark(enum.StrEnum):
    """The values of --benchmark."""

    CHARTMIMIC = "chartmimic"
    PLOT2CODE = "plot2code"
    CHARTX = "chartx"
    CHART2CODE = "chart2code"
    GALLERY = "gallery"
    TINY = "tiny"


TASKS: Mapping[Benchmark, tuple[str, ...]] = {
    Benchmark.CHARTMIMIC: ("direct", CUSTOMIZED),
    Benchmark.PLOT2CODE: ("direct", "conditional"),
    Benchmark.CHARTX: ("direct",),
    Benchmark.CHART2CODE: tuple(map(str, Level)),
    Benchmark.GALLERY: ("direct",),
    Benchmark.TINY: ("direct",),
}
_FIELDS = {  # that --columns may name
    Benchmark.CHARTMIMIC: tuple(COLUMNS),
    Benchmark.CHART2CODE: ("id", "image", "image_2", "data", "excel", "instruction", "code"),
}


@dataclasses.dataclass(frozen=True)
class Question:
    """What the command line says of the benchmark.

    Attributes:
      data: a file or a folder; "" for toy charts that are made on the spot.
      task: one of `TASKS`.
      columns: names of columns by field, where the files have others.
      count: of charts, evenly spread; 0: all.
      instruction: asked in place of ours where the files bring none; "": ours.
      grammar: of the toy charts that are made on the spot, one of `GRAMMARS`.
    """

    benchmark: Benchmark
    data: str
    task: str
    columns: Mapping[str, str]
    count: int = 0
    instruction: str = ""
    grammar: str = "words"


@dataclasses.dataclass(frozen=True)
class Exam:
    """Charts with questions and records, and what else scoring needs.

    Attributes:
      facts: by the id of a chart (`RawChart.facts`).
      left_out: what cannot be asked, and why.
      digest: another text where the charts are others.
      style: dpi and rc settings that the charts were drawn with.
      matplotlib: the release that they were drawn with; "" where nobody knows.
    """

    question: Question
    charts: RandomAccess[Chart]
    facts: Mapping[str, Mapping[str, str]]
    left_out: tuple[Skipped, ...]
    digest: str
    style: Mapping[str, Any]
    matplotlib: str = ""

    @property
    def shows_target(self) -> bool:
        """Whether the chart that is shown is the one to draw: not where a style or a change of it
        is asked for.
        """
        return self.question.task in ("direct", "conditional")


def check_question(question: Question) -> None:
    """Raises ConfigError where the words of a question do not fit together."""
    benchmark, tasks = question.benchmark, TASKS[question.benchmark]
    if question.task not in tasks:
        raise ConfigError(
            f"--task={question.task}: {benchmark} has {', '.join(tasks)}; leave it out for "
            f"{tasks[0]}"
        )
    fields = _FIELDS.get(benchmark, ())
    for field in question.columns:
        if field not in fields:
            known = f"use {', '.join(fields)}" if fields else "its files have fixed names"
            raise ConfigError(f"--columns: {benchmark} has no field {field!r}; {known}")
    if benchmark != Benchmark.TINY and not question.data:
        raise ConfigError(f"--benchmark={benchmark} needs --data: {_WANTED[benchmark]}")
    if question.data and not Path(question.data).exists():
        raise ConfigError(f"--data={question.data}: no such file or folder; {_WANTED[benchmark]}")


_WANTED = {
    Benchmark.CHARTMIMIC: "the folder direct_600 of ChartMimic, or its rows (test.jsonl, *.tsv)",
    Benchmark.PLOT2CODE: "the folder with metadata.jsonl (data/python_matplotlib/test)",
    Benchmark.CHARTX: "the JSON list of ChartX, beside its folders of charts",
    Benchmark.CHART2CODE: "the folder data/ with level1_direct.json ..., or one list of it",
    Benchmark.GALLERY: "a chart directory (`python -m mmrecoder_jax.build_gallery` makes one)",
    Benchmark.TINY: "a work directory of a tiny run, its data/, or nothing",
}


def prepare(question: Question, out: Path, env: EnvConfig) -> Exam:
    """Reads the question's files, and runs the references that `<out>/charts` does not have.

    Args:
      env: how scripts are executed; charts that are drawn already bring their own style.

    Raises:
      ConfigError: there is no chart, or `<out>/charts` holds others.
    """
    check_question(question)
    if question.benchmark == Benchmark.GALLERY:
        return _directory(question, Path(question.data))
    if question.benchmark == Benchmark.TINY:
        found = _tiny_split(question.data)
        return _directory(question, found) if found else _toys(question, out, env)
    bad: list[str] = []
    raws = _evenly(_read(question, out, bad), question.count)
    skipped = [Skipped(question.data, message) for message in bad]
    raws, failed = _with_data_part(raws)
    if not raws:
        first = f", the first: {bad[0]}" if bad else ""
        raise ConfigError(
            f"--data={question.data}: no {question.task} task of {question.benchmark} in it "
            f"({len(bad)} bad rows{first}); {_WANTED[question.benchmark]}"
        )
    meta = {"name": f"{question.benchmark}-{question.task}", "licence": "as published"}
    charts = _drawn(raws, out / "charts", env, meta, skipped + failed)
    report = JsonLines(charts.directory / "skipped.jsonl", ("source", "reason"))
    return Exam(
        question,
        charts,
        {raw.id: raw.facts for raw in raws},
        tuple(Skipped(**report[number]) for number in range(len(report))),
        charts.digest(),
        _style(charts),
        _drawn_with(charts),
    )


def _read(question: Question, out: Path, bad: list[str]) -> list[RawChart]:
    data = Path(question.data)
    match question.benchmark:
        case Benchmark.CHARTMIMIC:
            raws = _read_chartmimic(question, data, bad)
        case Benchmark.PLOT2CODE:
            folder = data / "data/python_matplotlib/test"
            folder = folder if folder.is_dir() else data
            _needs(folder / "metadata.jsonl", question)
            raws = list(read_plot2code(folder, bad, question.task == "conditional"))
        case Benchmark.CHARTX:
            raws = list(read_chartx(_one_file(question, data, "*.json"), bad=bad))
        case _:
            level = Level(question.task)
            path = data
            if data.is_dir():
                lists = [data / f"{level.published}{end}" for end in (".json", ".parquet")]
                path = next((path for path in lists if path.is_file()), lists[0])
            _needs(path, question)
            unpacked = out / "unpacked"
            raws = list(read_chart2code_level(path, level, question.columns, unpacked, bad=bad))
    if question.instruction:
        raws = [
            dataclasses.replace(raw, instruction=question.instruction)
            if raw.instruction == synthetic.INSTRUCTION
            else raw
            for raw in raws
        ]
    return raws


def _read_chartmimic(question: Question, data: Path, bad: list[str]) -> list[RawChart]:
    customized = question.task == CUSTOMIZED
    if data.is_dir() and not customized:
        inside = data / "direct_600"
        folder = inside if inside.is_dir() else data
        if any(folder.glob("*.py")):
            return list(read_chartmimic(folder, bad))
    if data.is_dir():
        rows = data / "test.jsonl"
        if not rows.is_file():
            why = "its instructions are in rows" if customized else "there are no scripts in it"
            raise ConfigError(
                f"--data={data}: {why}, and there is no test.jsonl; name the file of rows "
                "(*.jsonl or *.tsv), or a folder such as direct_600"
            )
        data = rows
    return list(read_chartmimic_rows(data, customized, question.columns, bad=bad))


def _needs(path: Path, question: Question) -> None:
    if not path.is_file():
        raise ConfigError(f"--data={question.data}: there is no {path}; {_wanted(question)}")


def _wanted(question: Question) -> str:
    return f"give {_WANTED[question.benchmark]}"


def _one_file(question: Question, path: Path, pattern: str) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob(pattern))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ConfigError(f"--data={path} holds {pattern}: {names}; name one file")
    return found[0]


def _evenly(raws: list[RawChart], count: int) -> list[RawChart]:
    return [raws[i] for i in evenly(len(raws), count)]


def evenly(total: int, count: int) -> Sequence[int]:
    """`count` of so many numbers, evenly spread, as neighbours are alike; 0: all."""
    if not count or count >= total:
        return range(total)
    return [int(i) for i in np.unique(np.linspace(0, total - 1, count).astype(int))]


def _with_data_part(raws: list[RawChart]) -> tuple[list[RawChart], list[Skipped]]:
    """Without customized tasks whose reference has no data part to be put before an answer."""
    good, failed = [], []
    for raw in raws:
        try:
            if raw.facts.get("task") == CUSTOMIZED:
                customized_prefix(raw.codes[0])
            good.append(raw)
        except ValueError as error:
            failed.append(Skipped(raw.source, str(error)))
    return good, failed


def _drawn(
    raws: Sequence[RawChart],
    directory: Path,
    env: EnvConfig,
    meta: Mapping[str, str],
    skipped: Sequence[Skipped],
) -> ChartDirectory:
    """The charts of raw ones, each run for its record; those of an earlier start are taken over."""
    with contextlib.ExitStack() as exits:
        pool = exits.enter_context(ExecutorPool(env))
        if directory.is_dir():
            charts = ChartDirectory(directory)
            wanted = import_meta(raws, pool, meta)
            wrong = [name for name, value in wanted.items() if charts.meta.get(name) != value]
            if wrong:
                raise ConfigError(
                    f"{directory} holds other charts ({', '.join(wrong)} differ): name another "
                    "--out"
                )
            return charts
        bar = exits.enter_context(Bar("references", len(raws), unit="script"))
        charts = import_charts(directory, raws, pool, meta, skipped, progress=_advancing(bar))
    if not len(charts):
        raise ConfigError(f"no reference runs; {directory}/skipped.jsonl says why")
    return charts


def _advancing(bar: Bar) -> Callable[[int, int], None]:
    def advance(done: int, _: int) -> None:
        if done > 1 and not bar.done:
            bar.resume(done - 1)
        bar.advance(done - bar.done)

    return advance


def _directory(question: Question, path: Path) -> Exam:
    """A chart directory as it is."""
    if not (path / "meta.json").is_file():
        raise ConfigError(f"--data={path} is no chart directory; {_wanted(question)}")
    directory = ChartDirectory(path, question.instruction or None)
    chosen = evenly(len(directory), question.count)
    if not len(chosen):
        raise ConfigError(f"--data={path} holds no chart")
    part = Part(directory, np.asarray(chosen))
    facts = {part[i].id: {"kind": part[i].source.split("/")[0]} for i in range(len(part))}
    style, matplotlib = _style(directory), _drawn_with(directory)
    return Exam(question, part, facts, (), directory.digest(), style, matplotlib)


def _tiny_split(data: str) -> Path | None:
    """The test split of a tiny run; None where toy charts are made on the spot."""
    if not data:
        return None
    places = [Path(data), Path(data) / "test", Path(data) / "data" / "test"]
    return next((path for path in places if (path / "meta.json").is_file()), places[-1])


def _toys(question: Question, out: Path, env: EnvConfig) -> Exam:
    """Toy charts in their house style, made into `<out>/charts`."""
    count = question.count or TINY_COUNT
    rc_params = GRAMMARS[question.grammar].RC_PARAMS
    style = dataclasses.replace(env, dpi=synthetic.DPI, rc_params=rc_params)
    with ExecutorPool(style) as pool, Bar("toy charts", count, unit="chart") as bar:
        try:
            charts = build_synthetic(
                out / "charts", "test", count, 0, pool, _advancing(bar), question.grammar
            )
        except ValueError as error:
            raise ConfigError(f"{error}: name another --out") from error
    exam = _directory(dataclasses.replace(question, count=0), charts.directory)
    return dataclasses.replace(exam, question=question)


def _drawn_with(charts: ChartDirectory) -> str:
    return str(charts.meta.get("matplotlib", ""))


def _style(charts: ChartDirectory) -> dict[str, Any]:
    """How a directory's charts were drawn; what its meta does not say is as by default."""
    default = EnvConfig()
    return {
        "dpi": charts.meta.get("dpi", default.dpi),
        "rc_params": charts.meta.get("rc_params", default.rc_params),
    }

"""Redraws charts as Matplotlib code.

    python -m mmrecoder_jax.generate chart.png > chart.py
    python -m mmrecoder_jax.generate folder/ more.jpg --turns=2 --samples=4 --out=drawings
    python -m mmrecoder_jax.generate chart.png --checkpoint=runs/tiny/stage2
    python -m mmrecoder_jax.generate chart.png --server=http://localhost:8000/v1 --model=NAME

The script that is handed over goes to the standard output, and nothing else does; of several charts
each script follows a line `# name`. Every turn's code, render and error, and a page to look at, go
to `--out`. The status is 1 where a chart could not be read or no turn about it runs.
"""

import argparse
import contextlib
import sys
from collections.abc import Generator, Sequence
from typing import Any

from ml_collections import ConfigDict

from mmrecoder_jax.command import Parser, ending_in_one_line, quiet
from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.data.sources import Chart
from mmrecoder_jax.drawing.choosing import Select, check_select
from mmrecoder_jax.drawing.drawing import Drawing, draw
from mmrecoder_jax.drawing.flags import add_author, author_of, temperature_of
from mmrecoder_jax.drawing.folder import Folder
from mmrecoder_jax.drawing.open import (
    Who,
    author_config,
    keep_programs,
    open_author,
    open_judge,
    settings_of,
)
from mmrecoder_jax.drawing.pictures import find, read
from mmrecoder_jax.images import BadImage
from mmrecoder_jax.monitoring.progress import Bar


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = _parser().parse_args(arguments)
    quiet()
    with ending_in_one_line(args.traceback):
        return _generate(args)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m mmrecoder_jax.generate",
        description="Redraws charts as Matplotlib code, looks at what it drew, and tries again.",
    )
    add = parser.add_argument
    what = "pictures, folders of pictures, or - for the standard input"
    add("charts", nargs="+", help=what)
    add_author(parser)
    add("--turns", type=int, default=4, metavar="N", help="turns of a conversation (4)")
    add("--samples", type=int, default=1, metavar="N", help="conversations about each chart (1)")
    what = "0 is greedy; by default 0 for one sample and 1 for several"
    add("--temperature", type=float, default=None, metavar="T", help=what)
    add("--seed", type=int, default=0, metavar="N", help="of sampling (0)")
    what = "the turn that is handed over: visual (most alike; the default), last (that runs), judge"
    add("--select", default=str(Select.VISUAL), metavar="HOW", help=what)
    what = "of --select=judge: an OpenAI-compatible server"
    add("--judge", default="", metavar="URL", help=what)
    add("--judge-model", default="", metavar="NAME", help="the name that it knows the judge by")
    what = "folder of all turns and pages (drawings)"
    add("--out", default="drawings", metavar="DIR", help=what)
    what = "replace drawings that were made with other settings"
    add("--overwrite", action="store_true", help=what)
    return parser


def _generate(args: argparse.Namespace) -> int:
    settings = _settings(args)
    who = author_of(args)
    config = author_config(who)
    config.env.sandbox = args.sandbox
    folder = Folder(args.out, settings_of(who, config) | settings, args.overwrite)
    charts, names, failed = _read(args.charts, folder, config.data.instruction)
    if not charts:
        return 1
    codes = _Codes(len(charts))
    left = []
    for number, name in enumerate(names):
        kept = folder.kept(name)
        if kept is None:
            left.append(number)
            continue
        _say(f"{name}: drawn before: {kept.summary}")
        codes.put(number, name, kept.code)
    try:
        if left:
            with contextlib.closing(_draw(args, who, config, settings, charts, left)) as drawn:
                for number, drawing in drawn:
                    folder.write(names[number], drawing)
                    _say(f"{names[number]}: {drawing.summary}")
                    codes.put(number, names[number], drawing.code)
    finally:
        if folder.directory.is_dir():
            folder.write_index()
    _say(f"all turns: {folder.directory / (names[0] if len(names) == 1 else '') / 'index.html'}")
    return 1 if failed or codes.missing else 0


def _draw(
    args: argparse.Namespace,
    who: Who,
    config: ConfigDict,
    settings: dict[str, Any],
    charts: Sequence[Chart],
    left: Sequence[int],
) -> Generator[tuple[int, Drawing], None, None]:
    """(number, drawing) of the charts that are left, as they come."""
    config.env.workers = min(config.env.workers, len(left) * args.samples)
    keep_programs()
    with contextlib.ExitStack() as exits:
        judge = None
        if args.judge:
            judge = exits.enter_context(open_judge(args.judge, args.judge_model))
        author = exits.enter_context(open_author(who, config=config, judge=judge))
        _say(f"{author.name} draws {len(left)} chart{'s' * (len(left) > 1)}")
        progress = exits.enter_context(Bar("drawings", len(left), "chart", out=sys.stderr))
        for pair in draw(
            author,
            charts,
            turns=args.turns,
            samples=args.samples,
            temperature=settings["temperature"],
            seed=args.seed,
            select=settings["select"],
            numbers=left,
        ):
            yield pair
            progress.advance()


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides a drawing besides author and chart, checked."""
    if args.turns < 1:
        raise ConfigError(f"--turns={args.turns}: use 1 or more")
    if args.samples < 1:
        raise ConfigError(f"--samples={args.samples}: use 1 or more")
    temperature = temperature_of(args.samples, args.temperature)
    check_select(args.select, args.samples, bool(args.judge))
    if args.judge and not args.judge_model:
        raise ConfigError(f"--judge={args.judge!r} needs --judge-model=NAME")
    return {
        "turns": args.turns,
        "samples": args.samples,
        "temperature": temperature,
        "seed": args.seed,
        "select": args.select,
        "judge": args.judge_model,
    }


def _read(
    paths: Sequence[str], folder: Folder, instruction: str
) -> tuple[list[Chart], list[str], int]:
    """(charts, the names of their folders, how many pictures could not be read)."""
    charts: list[Chart] = []
    names: list[str] = []
    failed = 0
    for found in find(paths):
        try:
            chart = read(found, instruction)
        except BadImage as problem:
            _say(f"error: {problem}")
            failed += 1
            continue
        name = folder.place(chart)
        if name in names:
            _say(f"{found.path}: the same picture as {charts[names.index(name)].source}")
            continue
        charts.append(chart)
        names.append(name)
    return charts, names, failed


class _Codes:
    """Writes scripts to the standard output, in the order of their charts."""

    def __init__(self, count: int):
        self._count, self._next = count, 0
        self._waiting: dict[int, tuple[str, str | None]] = {}
        self.missing = 0

    def put(self, number: int, name: str, code: str | None) -> None:
        """Takes the script of a chart; None where no turn runs."""
        self._waiting[number] = name, code
        while self._next in self._waiting:
            name, code = self._waiting.pop(self._next)
            self._next += 1
            if code is None:
                self.missing += 1
                continue
            text = f"# {name}\n{code}" if self._count > 1 else code
            sys.stdout.buffer.write(text.rstrip("\n").encode("utf-8", "replace") + b"\n")
            sys.stdout.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

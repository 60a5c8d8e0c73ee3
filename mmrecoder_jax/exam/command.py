"""The benchmark side of `python -m mmrecoder_jax.evaluate`.

    python -m mmrecoder_jax.evaluate --benchmark=tiny
    python -m mmrecoder_jax.evaluate --benchmark=chartmimic --data=direct_600 --checkpoint=DIR
    python -m mmrecoder_jax.evaluate --benchmark=gallery --data=DIR --server=URL --model=NAME
    python -m mmrecoder_jax.evaluate --benchmark=chartx --data=FILE --predictions=answers.jsonl
    python -m mmrecoder_jax.evaluate --compare runs/a runs/b

docs/evaluation.md says what each benchmark wants and what the numbers mean. Kill it at any point:
the same command goes on after the answers that are scored.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from ml_collections import ConfigDict

from mmrecoder_jax.command import Parser, ending_in_one_line, quiet
from mmrecoder_jax.config import ConfigError, check_local_path, check_output
from mmrecoder_jax.data.grammars import drawn_as
from mmrecoder_jax.drawing.flags import add_author, author_of, temperature_of
from mmrecoder_jax.drawing.open import (
    Who,
    author_config,
    keep_programs,
    open_author,
    open_judge,
    settings_of,
)
from mmrecoder_jax.env import interpreter
from mmrecoder_jax.env.chart_env import FeedbackImage
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.exam import compare
from mmrecoder_jax.exam.others import read_others
from mmrecoder_jax.exam.run import (
    MARKDOWN,
    RESULTS,
    Answered,
    Run,
    answers_of_author,
    answers_of_others,
    go,
)
from mmrecoder_jax.exam.scoring import OFFICIAL, RULES, Rule
from mmrecoder_jax.exam.tasks import TASKS, Benchmark, Exam, Question, check_question, prepare
from mmrecoder_jax.rl.judge.base import Judge, VerdictCache
from mmrecoder_jax.rl.judge.visual import VisualJudge

VISUAL = "visual"


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    args = _parser().parse_args(arguments)
    quiet()
    with ending_in_one_line(args.traceback):
        if args.compare:
            return _compare(args)
        if not args.benchmark:
            raise ConfigError(
                "give --benchmark=NAME (with --data=DIR), --compare A B, or --config=FILE for the "
                "evaluation of a configuration; --help lists the flags"
            )
        return _evaluate(args)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m mmrecoder_jax.evaluate",
        description="Lets an author redraw the charts of a benchmark and scores what it wrote. "
        "With --config=configs/evaluate.py:tiny it evaluates the configured charts instead "
        "(docs/training.md).",
    )
    add = parser.add_argument
    # Plain strings: argparse shows the choices by repr.
    add("--benchmark", choices=[*map(str, Benchmark)], help="which benchmark")
    add("--data", default="", metavar="PATH", help="its files as published")
    add("--task", default="", metavar="NAME", help="a task of it; by default the direct one")
    add(
        "--columns",
        default="",
        metavar="FIELD=COLUMN,...",
        help="names of columns that the files have instead of the usual ones",
    )
    add("--count", type=int, default=0, metavar="N", help="charts, evenly spread; 0: all")
    add("--instruction", default="", metavar="TEXT", help="in place of our direct instruction")
    add_author(parser)
    add("--predictions", default="", metavar="FILE", help="score these answers; nobody is asked")
    add("--turns", type=int, default=None, metavar="N", help="of a conversation (4)")
    add("--samples", type=int, default=None, metavar="N", help="conversations about a chart (1)")
    add(
        "--temperature",
        type=float,
        default=None,
        metavar="T",
        help="0 is greedy; by default 0 for one sample and 1 for several",
    )
    add("--seed", type=int, default=0, metavar="N", help="of sampling and of intervals (0)")
    add("--batch-size", type=int, default=16, metavar="N", help="answers at one time (16)")
    add(
        "--official",
        action="store_true",
        help="also ChartMimic's official scores, where they are not the benchmark's own",
    )
    add(
        "--judge",
        default="",
        metavar="URL",
        help="of the column high: an OpenAI-compatible server, or 'visual' for a similarity of "
        "pixels",
    )
    add("--judge-model", default="", metavar="NAME", help="the name it knows the judge by")
    add("--out", default="", metavar="DIR", help="by default evaluations/<benchmark>-<task>")
    add(
        "--compare",
        nargs="+",
        default=[],
        metavar="RUN",
        help="compare finished runs; commas join the seeds of one recipe",
    )
    add("--python", default="", metavar="PATH", help="of the executors; by default this one")
    add(
        "--workers",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 1),
        metavar="N",
        help="executors of answers, and as many of references",
    )
    return parser


def _compare(args: argparse.Namespace) -> int:
    if args.benchmark or args.predictions:
        raise ConfigError("--compare reads finished runs: give no --benchmark and no --predictions")
    found = compare.compare(compare.read_recipes(args.compare), args.seed)
    print(compare.table(found).markdown())
    print(f"\n{compare.about_intervals(found)}")
    if args.out:
        check_output("--out", args.out)
        compare.write(found, Path(args.out))
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    _check(args)
    who = author_of(args)
    benchmark = Benchmark(args.benchmark)
    task = args.task or TASKS[benchmark][0]
    asked = None if args.predictions else _Asked.of(who, args)
    question = Question(
        *(benchmark, args.data, task, _columns(args.columns), args.count, args.instruction),
        # toy charts are those that a policy of ours was trained on
        grammar=asked.config.data.grammar if asked else Question.grammar,
    )
    check_question(question)
    out = Path(args.out or f"evaluations/{benchmark}-{task}")
    python = interpreter.find(args.python, "--python")
    rules = RULES[benchmark] + (OFFICIAL if args.official else ())
    rules = tuple(dict.fromkeys(rules))
    if not set(rules).isdisjoint((*OFFICIAL, Rule.PLOT2CODE)) and (others := python.unpublished()):
        print(
            f"note: published numbers were made under other releases than {', '.join(others)}; "
            f"`{interpreter.SETUP}` makes an environment for --python=DIR/bin/python",
            file=sys.stderr,
        )
    env = EnvConfig(workers=args.workers, python=args.python, sandbox=args.sandbox)
    exam = prepare(question, out, env)
    drawn = drawn_as(exam.style["rc_params"]) if benchmark == Benchmark.TINY else ""
    if asked and not args.server and drawn not in ("", question.grammar):
        raise ConfigError(
            f"--data={args.data}: these are charts of the grammar {drawn!r}, and the policy was "
            f"trained on {question.grammar!r}: leave --data out for charts of its own, or ask it "
            "about these with --benchmark=gallery"
        )
    if exam.left_out:
        first = exam.left_out[0]
        print(
            f"{len(exam.left_out)} tasks are left out, the first: {first.source}: {first.reason}",
            file=sys.stderr,
        )
    if exam.matplotlib not in ("", python.releases["matplotlib"]):
        print(
            f"note: the charts' records were made with matplotlib {exam.matplotlib}, and answers "
            f"are drawn with {python.releases['matplotlib']}: equal code may score below 1",
            file=sys.stderr,
        )
    with contextlib.ExitStack() as exits:
        judge = _judge(args, exits)
        if asked is None:
            results = _score_others(args, exam, out, rules, env, judge)
        else:
            results = _ask_author(args, asked, exam, out, rules, env, judge)
    print((out / MARKDOWN).read_text(encoding="utf-8"))
    print(
        f"{out / RESULTS} has all numbers; {results['charts']} charts, "
        f"{results['refused']} answers refused, {len(exam.left_out)} tasks left out"
    )
    if results["refused_because"]:
        print(f"the first refused answer: {results['refused_because']}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises ConfigError for flags that cannot be, or that do not go together."""
    for name in ("data", "predictions"):
        check_local_path(f"--{name}", getattr(args, name))
    if args.out:
        check_output("--out", args.out)
    for name, least in (
        ("count", 0),
        ("turns", 1),
        ("samples", 1),
        ("batch_size", 1),
        ("workers", 1),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')}={value}: use {least} or more")
    temperature_of(args.samples or 1, args.temperature)
    if args.judge and args.judge != VISUAL and not args.judge_model:
        raise ConfigError(f"--judge={args.judge} needs --judge-model=NAME")
    if args.predictions:
        if not Path(args.predictions).is_file():
            raise ConfigError(
                f"--predictions={args.predictions}: no such file; give a file of JSON lines"
            )
        given = ("checkpoint", "server", "model", "turns", "samples", "temperature")
        extra = [name for name in given if getattr(args, name) not in ("", None)]
        if extra:
            raise ConfigError(
                f"--predictions is scored as it is: give no {', '.join('--' + n for n in extra)}"
            )


def _columns(text: str) -> dict[str, str]:
    columns = {}
    for part in filter(None, text.split(",")):
        field, given, column = part.partition("=")
        if not given or not column:
            raise ConfigError(f"--columns={text}: {part!r} is not FIELD=COLUMN")
        columns[field.strip()] = column.strip()
    return columns


def _judge(args: argparse.Namespace, exits: contextlib.ExitStack) -> Judge | None:
    if not args.judge:
        return None
    if args.judge == VISUAL:
        return exits.enter_context(VisualJudge(VerdictCache()))
    return exits.enter_context(open_judge(args.judge, args.judge_model))


def _score_others(
    args: argparse.Namespace,
    exam: Exam,
    out: Path,
    rules: tuple[Rule, ...],
    env: EnvConfig,
    judge: Judge | None,
) -> Mapping[str, object]:
    path = Path(args.predictions)
    ids = [exam.charts[number].id for number in range(len(exam.charts))]
    others = read_others(path, ids)
    if not others.texts:
        raise ConfigError(
            f"--predictions={path}: none of its {len(others.unknown)} ids is one of the "
            f"{len(ids)} charts (such as {ids[0]!r})"
        )
    wanted = {(name, sample) for name in ids for sample in range(others.samples)}
    missing = frozenset(wanted - others.texts.keys())
    for count, what in (
        (len(others.unknown), "rows are of no chart that is asked about, and are left out"),
        (len(missing), "answers are missing, and count as failures"),
        (others.carried, "rows have fewer turns than others: their last one stands for the rest"),
    ):
        if count:
            print(f"{path}: {count} {what}", file=sys.stderr)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    run = Run(
        exam,
        out,
        path.stem,
        {"predictions": digest},
        others.turns,
        others.samples,
        rules,
        strict=False,
        env=env,
        judge=judge,
        seed=args.seed,
        missing=missing,
    )
    return go(run, answers_of_others(others, run))


@dataclasses.dataclass(frozen=True)
class _Asked:
    """Who is asked, and how."""

    who: Who
    config: ConfigDict
    samples: int
    temperature: float

    @classmethod
    def of(cls, who: Who, args: argparse.Namespace) -> Self:
        """Raises ConfigError where there is no such author, or it cannot be asked so."""
        samples = args.samples or 1
        temperature = temperature_of(samples, args.temperature)
        return cls(who, author_config(who), samples, temperature)


def _ask_author(
    args: argparse.Namespace,
    asked: _Asked,
    exam: Exam,
    out: Path,
    rules: tuple[Rule, ...],
    env: EnvConfig,
    judge: Judge | None,
) -> Mapping[str, object]:
    who, config = asked.who, asked.config
    config.env.update({"workers": env.workers, "python": env.python, "sandbox": env.sandbox})
    if args.server:  # nothing says which style it knows: renders have that of the charts
        grammar = drawn_as(exam.style["rc_params"])
        config.env.dpi = exam.style["dpi"]
        config.data.kind = "synthetic" if grammar else "directory"
        config.data.grammar = grammar or config.data.grammar
    if not exam.shows_target:
        # a difference to the chart that is shown would lead away from the one that is asked for
        config.feedback.image = str(FeedbackImage.RENDER)
    author = settings_of(who, config) | {
        "feedback": config.feedback.to_dict(),
        "temperature": asked.temperature,
        "seed": args.seed,
    }
    run = Run(
        exam,
        out,
        who.name,
        author,
        args.turns or 4,
        asked.samples,
        rules,
        strict=True,
        env=env,
        judge=judge,
        seed=args.seed,
    )

    def answer(numbers: Sequence[int]) -> Iterator[Answered]:
        keep_programs()
        with open_author(who, config=config, batch_size=args.batch_size) as opened:
            yield from answers_of_author(opened, run, asked.temperature, args.seed)(numbers)

    return go(run, answer)

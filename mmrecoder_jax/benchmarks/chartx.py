r"""ChartX's GPT-score: a text model rates redrawn code from 0 to 5 (Xia et al. 2024).

    python -m mmrecoder_jax.benchmarks.chartx --rows rows.jsonl --out ratings.jsonl \
        --url http://localhost:8000/v1 --model NAME

The judge reads the table that the chart was drawn from, and the script that redraws it.

A row of the input is {"id", "chart_type", "title", "csv", "gen_code"}, one of the output {"id",
"chart_type", "rating"}; the rating is null where the judge gave none. Nothing is executed and no
image is shown. The mean is over what was rated; a response without code is rated 0 without asking.
The rubric is worded by us, and published scores come from gpt-4-1106-preview: name the judge with
every number.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmrecoder_jax.benchmarks.results import Results, input_file, output_file, row_key
from mmrecoder_jax.command import Parser, ending_in_one_line
from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.data.rows import Fields, JsonLines
from mmrecoder_jax.monitoring.progress import bar
from mmrecoder_jax.rl.judge.http import ChatClient, Server
from mmrecoder_jax.rl.web import NoAnswer, check_address, check_variable

FIELDS = ("id", "chart_type", "title", "csv", "gen_code")
RUBRIC = """\
You rate a Python script that was written to redraw a chart. You get the chart's type, its title, \
the table behind it, and the script. Judge by reading whether the script draws that chart: right \
type, title, labels and values, and whether it would run.
0: unrelated to the chart, or it cannot run.
1: of another type, or most of the data is wrong or missing.
2: of the right type, with many wrong or missing values or texts.
3: mostly right, with several mistakes in data or texts.
4: right but for one or two small mistakes.
5: flawless.
Answer with the number alone."""


def question(row: Mapping[str, Any]) -> str:
    r"""What the judge reads of a row; ChartX writes tabs and line ends of a table as \t and \n."""
    table = row["csv"].replace("\\n", "\n").replace("\\t", "\t")
    chart = f"Type: {row['chart_type']}\nTitle: {row['title']}\nTable:\n{table}"
    return f"{RUBRIC}\n\n{chart}\n\nScript:\n{row['gen_code']}"


def read_rating(answer: str) -> int | None:
    """The first digit from 0 to 5 of an answer, as the official evaluator takes it, or None."""
    match = re.search("[0-5]", answer)
    return None if match is None else int(match.group())


def rate(
    ask: Callable[[list[dict[str, str]]], str], rows: Iterable[Mapping[str, Any]], in_flight: int
) -> Iterator[dict[str, Any]]:
    """Output rows in order.

    Args:
      ask: answers messages, or raises NoAnswer; one that is fatal ends the run.
      in_flight: questions at one time.
    """

    def one(row: Mapping[str, Any]) -> dict[str, Any]:
        rating = 0 if not row["gen_code"] else None
        if rating is None:
            try:
                rating = read_rating(ask([{"role": "user", "content": question(row)}]))
            except NoAnswer as problem:
                if problem.fatal:
                    raise
        return {"id": row["id"], "chart_type": row["chart_type"], "rating": rating}

    with ThreadPoolExecutor(in_flight) as threads:
        yield from threads.map(one, rows)


def summary(rows: Iterable[Mapping[str, Any]], judge: str) -> str:
    """The means of the ratings, per chart type and over all, and how many rows have none."""
    rows = list(rows)
    rated = [row for row in rows if row["rating"] is not None]
    lines = []
    for kind in [*sorted({row["chart_type"] for row in rated}), None]:
        ratings = [row["rating"] for row in rated if kind in (None, row["chart_type"])]
        if ratings:
            mean = sum(ratings) / len(ratings)
            lines.append(f"{kind or 'all':<24}{mean:6.2f}  of 5, {len(ratings)} charts")
    return "\n".join(
        [f"ChartX GPT-score by {judge}, {len(rows) - len(rated)} of {len(rows)} not rated", *lines]
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an input file.

    Raises:
      RowError: names the line of one that is none, lacks a field, or has a field of another type.
    """
    lines = JsonLines(path, FIELDS)
    rows = []
    for index in range(len(lines)):
        row = lines[index]
        fields = Fields(row, lines.where(index))
        for name in ("chart_type", "title", "csv"):
            fields.text(name, empty=True)
        if row["gen_code"] is not None:
            fields.text("gen_code", empty=True)
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(
        prog="python -m mmrecoder_jax.benchmarks.chartx", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--rows", required=True, help="input, one JSON object per line: " + ", ".join(FIELDS)
    )
    parser.add_argument("--out", required=True, help="output, one JSON object per line")
    parser.add_argument(
        "--url", required=True, help="an OpenAI-compatible server, up to and with /v1"
    )
    parser.add_argument("--model", required=True, help="what the server calls the judge")
    parser.add_argument(
        "--key-variable",
        default="MMRECODER_JUDGE_KEY",
        help="environment variable that holds the server's key",
    )
    parser.add_argument("--in-flight", type=int, default=16, help="questions at one time")
    args = parser.parse_args(argv)
    with ending_in_one_line(args.traceback):
        _rate_file(args)
    return 0


def _rate_file(args: argparse.Namespace) -> None:
    if args.in_flight < 1:
        raise ConfigError(f"--in-flight={args.in_flight}: use 1 or more")
    source, out = input_file("--rows", args.rows), output_file("--out", args.out)
    rows = read_rows(source)
    if not rows:
        raise ConfigError(f"--rows={source}: there is no row in it")
    check_address("--url", args.url, variable="--key-variable")
    check_variable("--key-variable", args.key_variable)
    server = Server(
        args.url,
        args.model,
        args.key_variable,
        args.in_flight,
        timeout_seconds=120.0,
        retries=6,
        max_tokens=16,
    )
    client = ChatClient(server)
    with Results(out, source, {"judge": args.model, "rubric": RUBRIC}) as results:
        left = [row for row in rows if row_key(row) not in results.done]
        try:
            for row in bar("rate", rate(client.ask, left, args.in_flight), len(left), unit="chart"):
                results.add(row)
        except NoAnswer as error:
            raise ConfigError(str(error)) from error
    print(summary(results.rows, args.model))


if __name__ == "__main__":
    sys.exit(main())

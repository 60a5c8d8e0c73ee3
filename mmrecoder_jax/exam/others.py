"""Predictions of others, read from a file of JSON lines to be scored.

    {"id": "bar_1", "turns": ["first answer", "second answer"]}
    {"id": "bar_2", "text": "one answer"}            the same as "turns" of one
    {"id": "bar_3", "code": "import ..."}            the same; no fence is needed
    {"id": "bar_4", "sample": 1, "turns": [{"text": "..."}]}      as in our own predictions.jsonl

An id is that of a chart (docs/evaluation.md says what ids a benchmark has). "sample" is 0 where it
is absent, and every chart is expected to have all samples that any has. An answer that is null has
no code. Where turns are fewer than those of the longest row, the last one stands for the others:
who stops has decided. A chart without a row is a failure on every turn.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrecoder_jax.data.rows import JsonLines, RowError, is_unicode


@dataclasses.dataclass(frozen=True)
class Others:
    """What was read.

    Attributes:
      texts: T answers by (id, sample).
      turns: T.
      samples: of each chart.
      unknown: ids that no chart has, in order.
      carried: rows whose last turn stands for missing ones.
    """

    texts: dict[tuple[str, int], tuple[str, ...]]
    turns: int
    samples: int
    unknown: tuple[str, ...]
    carried: int


def read_others(path: Path, ids: Sequence[str]) -> Others:
    """The predictions in a file.

    Args:
      ids: of the charts.

    Raises:
      RowError: a row that is none, or the second of an id and sample; names file and line.
    """
    lines = JsonLines(path, ("id",), unique=False)
    known = set(ids)
    found: dict[tuple[str, int], tuple[str, ...]] = {}
    unknown: list[str] = []
    for number in range(len(lines)):
        row, where = lines[number], lines.where(number)
        name, sample = row["id"], row.get("sample", 0)
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise RowError(
                f"{where}: its id is {str(name)[:40]!r}, neither text nor a whole number"
            )
        if isinstance(sample, bool) or not isinstance(sample, int) or sample < 0:
            raise RowError(f"{where}: its sample is {str(sample)[:40]!r}, not a number from 0")
        key = str(name), sample
        if key in found:
            raise RowError(f"{where}: id {name} (sample {sample}) was there before")
        if str(name) not in known:
            unknown.append(str(name))
            continue
        found[key] = tuple(_text(turn, where) for turn in _turns(row, where))
    turns = max((len(texts) for texts in found.values()), default=1)
    return Others(
        {key: (*texts, *(texts[-1],) * (turns - len(texts))) for key, texts in found.items()},
        turns,
        1 + max((sample for _, sample in found), default=0),
        tuple(unknown),
        sum(len(texts) < turns for texts in found.values()),
    )


def _turns(row: dict[str, Any], where: str) -> list[Any]:
    given = [name for name in ("turns", "text", "code") if name in row]
    if len(given) != 1:
        raise RowError(
            f"{where}: one of turns, text and code is wanted; it has {', '.join(given) or 'none'}"
        )
    turns = row["turns"] if given == ["turns"] else [row[given[0]]]
    if not isinstance(turns, list) or not turns:
        raise RowError(f"{where}: its turns are no list with an answer in it")
    return turns


def _text(turn: Any, where: str) -> str:
    text = turn.get("text") if isinstance(turn, dict) else turn
    if text is None:
        return ""
    if not isinstance(text, str):
        raise RowError(f"{where}: an answer is {type(text).__name__}, not text")
    if not is_unicode(text):
        raise RowError(f"{where}: an answer holds half of a surrogate pair")
    return text

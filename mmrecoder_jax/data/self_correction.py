"""Two-turn correction dialogues without a teacher.

Cold start 2 of MM-ReCoder (arXiv 2604.01600) learns from dialogues (wrong response, feedback,
better response), kept where low-level(turn 2) - low-level(turn 1) >= 0.02. The paper's second turns
come from a 235B teacher. Here they are the ground truth, and the first turns come from

  * corrupted ground truth (`corrupt`, `break_code`): synthetic, any number of them;
  * the policy's own answers to training charts, executed by the caller: what it really gets wrong.

What the second turn thinks is filled in from the execution and the score of the first one: "Fix
error: SyntaxError.", "Fix text, color." or "Looks right.".
"""

import dataclasses
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrecoder_jax.data.sources import (
    Chart,
    Dialogue,
    DialogueDirectory,
    DialogueWriter,
    png_bytes,
    stream_in_chunks,
)
from mmrecoder_jax.env import Execution, ExecutorPool
from mmrecoder_jax.env.chart_env import feedback_image, feedback_text
from mmrecoder_jax.env.chartmimic import Scores, score
from mmrecoder_jax.env.response import extract_code, response_text, think_text

_STRING = r"(?P<quote>['\"])(?P<text>[^'\"\n]*)(?P=quote)"
# Where a string literal means something, and what of the low-level score it moves.
_TEXT_CALLS = {
    name: re.compile(rf"\.{name}\({_STRING}") for name in ("set_title", "set_xlabel", "set_ylabel")
}
_LEGEND = re.compile(rf"\blabel={_STRING}")
_COLOR_ARGUMENT = re.compile(r"\bcolors?=(?:\[[^\]\n]*\]|['\"][^'\"\n]*['\"])")
_LITERAL = re.compile(_STRING)
_CATEGORIES = re.compile(r"^x = \[[^\]\n]*\]$", re.MULTILINE)
_NUMBERS = re.compile(r"\[(\d+(?:, ?\d+)*)\]")
_KIND = re.compile(r"\.(bar|barh|plot|scatter|fill_between|step)\(")
_OPTIONAL_LINE = re.compile(r"^.*\.(set_xlabel|set_ylabel|legend)\(.*\)\n", re.MULTILINE)

_KINDS = ("bar", "barh", "plot", "scatter", "fill_between", "step")


# Edits: code, a donor's code, rng -> wrong code, or None where the edit does not apply. Words come
# from the donor, another chart.


def _change_text(code: str, donor: str, rng: random.Random) -> str | None:
    """Another chart's word in a title, an axis label or a legend entry."""
    patterns = [
        pattern
        for pattern in (*_TEXT_CALLS.values(), _LEGEND)
        if pattern.search(code) and pattern.search(donor)
    ]
    if not patterns:
        return None
    pattern = rng.choice(patterns)
    return _replace(
        code, rng.choice(list(pattern.finditer(code))), rng.choice(pattern.findall(donor))[1]
    )


def _change_color(code: str, donor: str, rng: random.Random) -> str | None:
    ours, theirs = _color_literals(code), [match["text"] for match in _color_literals(donor)]
    return _replace(code, rng.choice(ours), rng.choice(theirs)) if ours and theirs else None


def _color_literals(code: str) -> list[re.Match[str]]:
    return [
        literal
        for argument in _COLOR_ARGUMENT.finditer(code)
        for literal in _LITERAL.finditer(code, *argument.span())
    ]


def _replace(code: str, match: re.Match[str], text: str) -> str:
    return code[: match.start("text")] + text + code[match.end("text") :]


def _change_kind(code: str, donor: str, rng: random.Random) -> str | None:
    """Every series drawn by another call that takes the same arguments."""
    return _KIND.sub(f".{rng.choice(_KINDS)}(", code)


def _drop_line(code: str, donor: str, rng: random.Random) -> str | None:
    """An axis label or the legend forgotten."""
    matches = list(_OPTIONAL_LINE.finditer(code))
    if not matches:
        return None
    match = rng.choice(matches)
    return code[: match.start()] + code[match.end() :]


def _add_line(code: str, donor: str, rng: random.Random) -> str | None:
    """An axis label that another chart has and this one has not, after the title."""
    names = [name for name in ("set_xlabel", "set_ylabel") if f".{name}(" not in code]
    lines = [
        line
        for line in donor.splitlines(keepends=True)
        if any(f".{name}(" in line for name in names)
    ]
    title = re.search(r"^.*\.set_title\(.*\)\n", code, re.MULTILINE)
    if not lines or not title:
        return None
    return code[: title.end()] + rng.choice(lines) + code[title.end() :]


def _change_categories(code: str, donor: str, rng: random.Random) -> str | None:
    """Another chart's names on the x axis, or on the wedges of a pie; only where their number is
    the same.
    """
    ours, theirs = _CATEGORIES.search(code), _CATEGORIES.search(donor)
    if not ours or not theirs or ours[0].count(",") != theirs[0].count(","):
        return None
    return code[: ours.start()] + theirs[0] + code[ours.end() :]


def _change_values(code: str, donor: str, rng: random.Random) -> str | None:
    """One digit misread. The low-level score does not see it: it only ever comes with another
    edit.
    """
    matches = list(_NUMBERS.finditer(code))
    if not matches:
        return None
    match = rng.choice(matches)
    numbers = re.split(r"(, ?)", match[1])
    numbers[2 * rng.randrange((len(numbers) + 1) // 2)] = str(rng.randint(1, 9))
    return code[: match.start(1)] + "".join(numbers) + code[match.end(1) :]


_SCORED_EDITS = (
    _change_text,
    _change_text,
    _change_color,
    _change_color,
    _change_kind,
    _drop_line,
    _add_line,
)
_EDITS = (*_SCORED_EDITS, _change_categories, _change_values)


def corrupt(code: str, donors: Sequence[str], rng: random.Random, most_edits: int = 3) -> str:
    """`code` with one to `most_edits` mistakes that a policy could make, the first one such that
    the low-level score may see it.

    Args:
      donors: codes of other charts, whose words are borrowed.
    Raises:
      ValueError: no edit applies to `code`.
    """
    wrong, wanted = code, rng.randint(1, most_edits)
    for _ in range(20 * wanted):
        edited = rng.choice(_SCORED_EDITS if wrong == code else _EDITS)(
            wrong, rng.choice(donors), rng
        )
        if edited not in (None, wrong, code):
            wrong, wanted = edited, wanted - 1
        if not wanted:
            break
    if wrong == code:
        raise ValueError(f"no edit applies to this code:\n{code}")
    return wrong


# Breaks: code, rng -> code that does not run (or, seldom, does), or None. Each leaves an error text
# that says what to mend.


def _drop_character(code: str, rng: random.Random) -> str | None:
    """A parenthesis, a bracket, a quote or a comma lost."""
    places = [match.start() for match in re.finditer(r"[()\[\]',]", code)]
    place = rng.choice(places)
    return code[:place] + code[place + 1 :]


def _misspell(code: str, rng: random.Random) -> str | None:
    """Two letters of a method's name swapped, or one lost: `ax.bra(`, `ax.set_tile(`."""
    match = rng.choice(list(re.finditer(r"\bax\.(\w+)\(", code)) or [None])
    if match is None or len(match[1]) < 3:
        return None
    name, place = match[1], rng.randrange(1, len(match[1]) - 1)
    swapped = name[:place] + name[place + 1] + name[place] + name[place + 2 :]
    wrong = swapped if rng.random() < 0.5 and swapped != name else name[:place] + name[place + 1 :]
    return code[: match.start(1)] + wrong + code[match.end(1) :]


def _wrong_keyword(code: str, rng: random.Random) -> str | None:
    right, wrong = rng.choice(
        (
            ("color=", "colour="),
            ("label=", "lable="),
            ("colors=", "colours="),
            ("labels=", "names="),
        )
    )
    return re.sub(rf"\b{right}", wrong, code, count=1)


def _wrong_name(code: str, rng: random.Random) -> str | None:
    """`ax` written `ay`, `x` written `y`, on one line."""
    match = rng.choice(
        list(re.finditer(r"^ax(?=\.)|(?<=[(=])x(?=,)", code, re.MULTILINE)) or [None]
    )
    return match and code[: match.start()] + {"ax": "ay", "x": "y"}[match[0]] + code[match.end() :]


def _wrong_length(code: str, rng: random.Random) -> str | None:
    """A value or a category more or less: x and y no longer fit."""
    match = rng.choice([*_NUMBERS.finditer(code), *_CATEGORIES.finditer(code)] or [None])
    if match is None:
        return None
    start, end = code.index("[", match.start()), match.end()
    items = code[start + 1 : end - 1].split(",")
    place = rng.randrange(len(items))
    items[place : place + 1] = (
        [items[place], items[place]] if rng.random() < 0.5 or len(items) < 2 else []
    )
    return code[: start + 1] + ",".join(items).strip() + code[end - 1 :]


_BREAKS = (_drop_character, _misspell, _wrong_keyword, _wrong_name, _wrong_length)


def break_code(code: str, rng: random.Random) -> str:
    """`code` with one slip that most often keeps it from running. Raises ValueError where none
    applies.
    """
    for _ in range(50):
        broken = rng.choice(_BREAKS)(code, rng)
        if broken is not None and broken != code:
            return broken
    raise ValueError(f"no break applies to this code:\n{code}")


@dataclasses.dataclass(frozen=True)
class Draft:
    """A first turn that has not been executed yet. `id` is unique in its dialogue directory."""

    id: str
    chart: Chart
    response: str
    origin: str


def synthetic_drafts(
    charts: Sequence[Chart], count: int, seed: int, broken: float = 0.25, unchanged: float = 0.0
) -> Iterator[Draft]:
    """Drafts 0 .. count-1 about the charts in turn: a share `broken`, a share `unchanged` (already
    right), the others wrong.

    Each depends on (seed, its number, its chart and the donors beside it) alone.
    """
    for number in range(count):
        rng = random.Random(f"{seed}/draft/{number}")
        chart = charts[number % len(charts)]
        donors = [charts[rng.randrange(len(charts))].code for _ in range(4)]
        draw = rng.random()
        if draw < broken:
            code, origin = break_code(chart.code, rng), "broken"
        elif draw < broken + unchanged:
            code, origin = chart.code, "unchanged"
        else:
            code, origin = corrupt(chart.code, donors, rng), "edited"
        yield Draft(f"synthetic-{number:06d}", chart, response_text(think_text(code), code), origin)


def correction_think(execution: Execution, scores: Scores) -> str:
    """What a second turn thinks about the first one."""
    if not execution.ok:
        last_line = execution.error.strip().rpartition("\n")[2]
        name = re.match(r"\w*(?:Error|Exception|Interrupt|Exit)\b", last_line)
        return f"Fix error: {name[0] if name else execution.status}."
    parts = [part for part in ("text", "layout", "type", "color") if getattr(scores, part) < 1]
    return f"Fix {', '.join(parts)}." if parts else "Looks right."


def make_dialogue(
    draft: Draft,
    execution: Execution,
    feedback: Mapping[str, str],
    min_gain: float = 0.02,
    keep_perfect: float = 0.0,
) -> Dialogue | None:
    """The dialogue in which the truth follows a draft, or None where the second turn gains less
    than `min_gain`.

    Args:
      execution: of the draft's code.
      feedback: "render", "error" and "image" of the configuration: what the second turn reads and
        sees.
      keep_perfect: the share of already perfect drafts that are kept nevertheless; their second
        turn repeats the first one's code.
    """
    chart = draft.chart
    scores = score(execution.record if execution.ok else None, chart.record)
    gain = score(chart.record, chart.record).overall - scores.overall
    code = chart.code
    if gain < min_gain:
        if gain > 0 or random.Random(f"keep/{draft.id}").random() >= keep_perfect:
            return None
        code = extract_code(draft.response).removesuffix("\n")
    seen = feedback_image(execution, chart.image, feedback["image"])
    return Dialogue(
        id=draft.id,
        chart=chart,
        responses=(draft.response, response_text(correction_think(execution, scores), code)),
        feedback_text=(feedback_text(execution, feedback),),
        feedback_image=(None if seen is None else png_bytes(seen),),
        gain=gain,
        origin=draft.origin,
    )


def build_dialogues(
    directory: str | Path,
    drafts: Sequence[Draft],
    pool: ExecutorPool,
    meta: dict[str, Any],
    feedback: Mapping[str, str],
    min_gain: float = 0.02,
    keep_perfect: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> DialogueDirectory:
    """Executes the drafts and writes the dialogues that gain enough. Resumable, atomic, and the
    same whatever order executions end in.

    Args:
      meta: what the directory is built from; a killed build is taken over where it is the same.
      progress: called with (drafts executed, drafts in all) after each.
    Raises:
      ValueError: not one draft gains enough.
    """
    writer = DialogueWriter(directory, meta | {"min_gain": min_gain, "keep_perfect": keep_perfect})
    todo = [draft for draft in drafts if draft.id not in writer.done]
    done = len(drafts) - len(todo)
    for index, execution in stream_in_chunks(
        pool, [extract_code(draft.response) for draft in todo]
    ):
        dialogue = make_dialogue(todo[index], execution, feedback, min_gain, keep_perfect)
        if dialogue:
            writer.add(dialogue)
        done += 1
        if progress:
            progress(done, len(drafts))
    if not writer.done:
        raise ValueError(
            f"none of {len(drafts)} drafts gains {min_gain} by its correction: there is nothing to learn from"
        )
    return writer.finish()

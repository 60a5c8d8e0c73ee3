"""Mistakes that a policy could make, put into code that is right.

Edits leave a script that runs and draws something else; breaks leave one that does not run:

    ax.bar(x, [4,6,5], color='pink')      edits    ax.bar(x, [4,6,5], color='red')
    ax.set_title('Budget')                         ax.set_title('Rain')
                                          breaks   ax.bra(x, [4,6,5], color='pink')
                                                   ax.bar(x, [4,6,5], colour='pink')

Both read the code as text, by the forms that the synthetic grammar and most Matplotlib code share;
an edit that finds nothing of its kind does not apply.
"""

import random
import re
from collections.abc import Callable, Iterable, Sequence

MOST_EDITS = 3
TRIES_PER_EDIT = 20  # most edits do not apply to most codes
TRIES_PER_BREAK = 50

Edit = Callable[[str, random.Random], str | None]  # None where it does not apply

_STRING = r"(?P<quote>['\"])(?P<text>[^'\"\n]*)(?P=quote)"
# Where a string literal means something that the low-level score sees.
_TEXT_CALLS = {
    name: re.compile(rf"\.{name}\({_STRING}") for name in ("set_title", "set_xlabel", "set_ylabel")
}
_LEGEND = re.compile(rf"\blabel={_STRING}")
_COLOR_ARGUMENT = re.compile(r"\bcolors?=(?:\[[^\]\n]*\]|['\"][^'\"\n]*['\"])")
_LITERAL = re.compile(_STRING)
_CATEGORIES = re.compile(r"^x = \[[^\]\n]*\]$", re.MULTILINE)
_NUMBERS = re.compile(r"\[(\d+(?:, ?\d+)*)\]")
_MISSPELT_KEYWORDS = (
    *(("color=", "colour="), ("label=", "lable=")),
    *(("colors=", "colours="), ("labels=", "names=")),
)
_OPTIONAL_LINE = re.compile(r"^.*\.(set_xlabel|set_ylabel|legend)\(.*\)\n", re.MULTILINE)

_KINDS = ("bar", "barh", "plot", "scatter", "fill_between", "step")  # they take the same arguments
_KIND = re.compile(rf"\.({'|'.join(_KINDS)})\(")


# ---------------------------------------------------------------- edits
# (code, a donor's code, rng) -> wrong code, or None where the edit does not apply. Words come from
# the donor, another chart, so that a wrong word is one that a policy could have written.


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
    place = rng.choice(list(pattern.finditer(code)))
    return _replace(code, place, rng.choice(pattern.findall(donor))[1])


def _change_color(code: str, donor: str, rng: random.Random) -> str | None:
    """Another chart's colour for one series or wedge."""
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
    """All series drawn by another kind of call."""
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
    calls = [f".{name}(" for name in ("set_xlabel", "set_ylabel") if f".{name}(" not in code]
    lines = [
        line for line in donor.splitlines(keepends=True) if any(call in line for call in calls)
    ]
    title = re.search(r"^.*\.set_title\(.*\)\n", code, re.MULTILINE)
    if not lines or not title:
        return None
    return code[: title.end()] + rng.choice(lines) + code[title.end() :]


def _change_categories(code: str, donor: str, rng: random.Random) -> str | None:
    """Another chart's names on the x axis, or on the wedges of a pie, where it has as many."""
    ours, theirs = _CATEGORIES.search(code), _CATEGORIES.search(donor)
    if not ours or not theirs or ours[0].count(",") != theirs[0].count(","):
        return None
    return code[: ours.start()] + theirs[0] + code[ours.end() :]


def _change_values(code: str, donor: str, rng: random.Random) -> str | None:
    """One digit misread.

    The low-level score does not see it, so it only ever comes with another edit.
    """
    matches = list(_NUMBERS.finditer(code))
    if not matches:
        return None
    match = rng.choice(matches)
    numbers = re.split(r"(, ?)", match[1])
    numbers[2 * rng.randrange((len(numbers) + 1) // 2)] = str(rng.randint(1, 9))
    return code[: match.start(1)] + "".join(numbers) + code[match.end(1) :]


_SCORED_EDITS: tuple[Callable[[str, str, random.Random], str | None], ...] = (
    *(_change_text, _change_text),  # twice as likely: words and colours are most of the score
    *(_change_color, _change_color),
    *(_change_kind, _drop_line, _add_line),
)
_EDITS = (*_SCORED_EDITS, _change_categories, _change_values)


def corrupt(code: str, donors: Sequence[str], rng: random.Random) -> str:
    """`code` with one to `MOST_EDITS` mistakes that a policy could make.

    The first mistake is one that the low-level score may see.

    Args:
      donors: codes of other charts, whose words are borrowed.

    Raises:
      ValueError: no edit applies to `code`.
    """

    def borrowing(edit: Callable[[str, str, random.Random], str | None]) -> Edit:
        return lambda wrong, rng: edit(wrong, rng.choice(donors), rng)

    scored, edits = ([borrowing(edit) for edit in group] for group in (_SCORED_EDITS, _EDITS))
    return with_mistakes(code, rng, scored, edits, MOST_EDITS)


def with_mistakes(
    code: str, rng: random.Random, scored: Sequence[Edit], edits: Sequence[Edit], most: int
) -> str:
    """`code` with one to `most` edits, the first of which is one of `scored`.

    Raises:
      ValueError: no edit applies to `code`.
    """
    wrong, wanted = code, rng.randint(1, most)
    for _ in range(TRIES_PER_EDIT * wanted):
        edited = rng.choice(scored if wrong == code else edits)(wrong, rng)
        if edited is not None and edited not in (wrong, code):
            wrong, wanted = edited, wanted - 1
        if not wanted:
            break
    if wrong == code:
        raise ValueError(f"no edit applies to this code:\n{code}")
    return wrong


# ---------------------------------------------------------------- breaks
# (code, rng) -> code that does not run (or, seldom, does), or None where the break does not apply.
# Each leaves an error text that says what to mend.


def _drop_character(code: str, rng: random.Random) -> str | None:
    """A parenthesis, a bracket, a quote or a comma lost."""
    places = [match.start() for match in re.finditer(r"[()\[\]',]", code)]
    if not places:
        return None
    place = rng.choice(places)
    return code[:place] + code[place + 1 :]


def _misspell(code: str, rng: random.Random) -> str | None:
    """Two letters of a method's name swapped, or one lost: `ax.bra(`, `ax.set_tile(`."""
    match = _chosen(re.finditer(r"\b(?:ax|plt)\.(\w+)\(", code), rng)
    if match is None or len(match[1]) < 3:
        return None
    name, place = match[1], rng.randrange(1, len(match[1]) - 1)
    swapped = name[:place] + name[place + 1] + name[place] + name[place + 2 :]
    wrong = swapped if rng.random() < 0.5 and swapped != name else name[:place] + name[place + 1 :]
    return code[: match.start(1)] + wrong + code[match.end(1) :]


def _wrong_keyword(code: str, rng: random.Random) -> str | None:
    """An argument under a name that the call does not have."""
    right, wrong = rng.choice(_MISSPELT_KEYWORDS)
    return re.sub(rf"\b{right}", wrong, code, count=1)


def _wrong_name(code: str, rng: random.Random) -> str | None:
    """`ax` written `ay`, `x` written `y`, on one line."""
    match = _chosen(re.finditer(r"^(?:ax|plt)(?=\.)|(?<=[(=])x(?=,)", code, re.MULTILINE), rng)
    if match is None:
        return None
    return (
        code[: match.start()] + {"ax": "ay", "plt": "pl", "x": "y"}[match[0]] + code[match.end() :]
    )


def _wrong_length(code: str, rng: random.Random) -> str | None:
    """A value or a category more or less: x and y no longer fit."""
    match = _chosen([*_NUMBERS.finditer(code), *_CATEGORIES.finditer(code)], rng)
    if match is None:
        return None
    start, end = code.index("[", match.start()), match.end()
    items = code[start + 1 : end - 1].split(",")
    place = rng.randrange(len(items))
    twice = rng.random() < 0.5 or len(items) < 2
    items[place : place + 1] = [items[place], items[place]] if twice else []
    return code[: start + 1] + ",".join(items).strip() + code[end - 1 :]


def _chosen(matches: Iterable[re.Match[str]], rng: random.Random) -> re.Match[str] | None:
    """One of the matches; None where there is none."""
    places: list[re.Match[str] | None] = list(matches)
    return rng.choice(places or [None])


_BREAKS: tuple[Callable[[str, random.Random], str | None], ...] = (
    *(_drop_character, _misspell, _wrong_keyword, _wrong_name, _wrong_length),
)


def break_code(code: str, rng: random.Random) -> str:
    """`code` with one slip that most often keeps it from running.

    Raises:
      ValueError: no break applies to `code`.
    """
    for _ in range(TRIES_PER_BREAK):
        broken = rng.choice(_BREAKS)(code, rng)
        if broken is not None and broken != code:
            return broken
    raise ValueError(f"no break applies to this code:\n{code}")

"""A grammar in which a second look pays: where a panel ends is a fraction of a width that varies.

In the grammar of `data.synthetic` a policy soon reads all but the words, and a second look at the
same pixels adds nothing. Here two panels lie on a grid of 40 columns, whose edges only the two of
them together show. So the column at which one of them ends is a ratio of what is seen, which first
turns miss by one or two. A difference shows it plainly: a stripe in the panel's row, as wide as the
mistake, whose sign is the direction (`feedback.image=signed`).

    >>> print(chart_spec(seed=0, index=1).code())
    import matplotlib.pyplot as plt
    gs = plt.GridSpec(2, 40, left=0.06, right=0.86)
    plt.subplot(gs[0, :39])
    plt.barh(range(3), [6,9,3], color='#535')
    plt.subplot(gs[1, 18:])
    plt.bar(range(3), [9,3,6], color='#595')
    plt.suptitle('SI KI')
    plt.show()

Nothing else is in the code: size, type and black panels are the house style `RC_PARAMS`, which
hides the ticks. So texts are the title, and the layout part of the low-level score counts a panel
where its column is right. Charts depend on (seed, index, split) alone.
"""

import dataclasses
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence

from mmrecoder_jax.data.corruptions import Edit, with_mistakes
from mmrecoder_jax.data.splits import first_of_split
from mmrecoder_jax.data.synthetic import DPI, INSTRUCTION
from mmrecoder_jax.env.response import response_text, think_text

# 168 x 112 pixels, as in `data.synthetic`.
RC_PARAMS = {
    "figure.figsize": (2.4, 1.6),
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "figure.subplot.bottom": 4 / 112,
    "figure.subplot.top": 84 / 112,
    "figure.subplot.hspace": 8 / 36,
    "figure.subplot.wspace": 0.0,
    "figure.titlesize": 18,
    "font.family": "monospace",
    "axes.facecolor": "black",
    "xtick.bottom": False,
    "xtick.labelbottom": False,
    "ytick.left": False,
    "ytick.labelleft": False,
}

KINDS = ("bar", "barh")
COLUMNS = 40  # of the grid
NARROWEST = 8  # columns of a panel
LEFT, RIGHT = (2, 20), (80, 98)  # margins, in hundredths of the figure's width
DIGITS = "3579"  # of a colour's channels: 0.2, 0.33, 0.47 and 0.6 of the range
CONSONANTS, VOWELS = "KMRS", "AEIO"
SYLLABLES = tuple(map("".join, itertools.product(CONSONANTS, VOWELS)))
TITLE_SYLLABLES = 2
POINTS = 3
VALUES = (3, 6, 9)

# What Python and Matplotlib say about the slips that a policy makes in this grammar; the tiny
# tokenizer learns these texts, because it reads them as feedback.
ERROR_TEXTS = (
    "line 3, in <module>: plt.",
    "AttributeError: module 'matplotlib.pyplot' has no attribute '",
    "AttributeError: Rectangle.set() got an unexpected keyword argument 'colour'",
    "NameError: name 'pl' is not defined. Did you mean: 'plt'?",
    "SyntaxError: '(' was never closed",
    "SyntaxError: closing parenthesis ']' does not match opening parenthesis '('",
    "SyntaxError: invalid syntax. Perhaps you forgot a comma?",
    "SyntaxError: unmatched ')'",
    "SyntaxError: unterminated string literal (detected at line 4)",
    "TypeError: pie() got an unexpected keyword argument '",
    "ValueError: shape mismatch: objects cannot be broadcast to a single shape.  Mismatch is "
    "between arg 0 with shape (4,) and arg 1",
    "ValueError: Invalid RGBA argument: '#",
    "ValueError: Number of columns must be a positive integer, not 0",
    "IndexError: GridSpec slice would result in no space allocated for subplot",
    "IndexError: index 2 is out of bounds for axis 0 with size 2",
)


DESCRIPTION = (
    f"two panels, one above the other, on a grid of {COLUMNS} columns; {POINTS} bars in each, "
    f"standing or lying (bar, barh), of lengths {', '.join(map(str, VALUES))} of which the largest "
    f"is always there; a colour per panel, each of whose channels is one of the digits {DIGITS}; "
    f"above them a title of {TITLE_SYLLABLES} syllables in capitals, of the letters {CONSONANTS} "
    f"and {VOWELS}; no ticks, labels or legends"
)
BEYOND = "one panel or three, other kinds, more bars, other lengths and colours, and other words"


@dataclasses.dataclass(frozen=True)
class Panel:
    """One subplot.

    Attributes:
      values: lengths of its bars, of `VALUES`, of which one is the largest.
      color: three of `DIGITS`.
    """

    kind: str
    values: tuple[int, ...]
    color: str

    def code(self) -> str:
        """The call that draws it."""
        values = f"[{','.join(map(str, self.values))}]"
        return f"plt.{self.kind}(range({len(self.values)}), {values}, color='#{self.color}')"


@dataclasses.dataclass(frozen=True)
class ChartSpec:
    """What one chart shows: two panels, one above the other, below a title.

    Attributes:
      edges: of the grid, left and right, in hundredths.
      columns: where the upper panel, which starts with the grid, stops, and where the lower one,
        which stops with it, starts.
    """

    edges: tuple[int, int]
    columns: tuple[int, int]
    panels: tuple[Panel, Panel]
    title: str

    def code(self) -> str:
        """The script, without a newline at its end."""
        (left, right), (stop, start) = self.edges, self.columns
        return "\n".join(
            (
                "import matplotlib.pyplot as plt",
                f"gs = plt.GridSpec(2, {COLUMNS}, left=0.{left:02d}, right=0.{right})",
                f"plt.subplot(gs[0, :{stop}])",
                self.panels[0].code(),
                f"plt.subplot(gs[1, {start}:])",
                self.panels[1].code(),
                f"plt.suptitle('{self.title}')",
                "plt.show()",
            )
        )

    def response(self) -> str:
        """The first-turn answer that is right for this chart."""
        code = self.code()
        return response_text(think_text(code), code)


def chart_spec(seed: int, index: int, split: str = "train") -> ChartSpec:
    """Chart number `index` of a split (see `splits.first_of_split`)."""
    return first_of_split(random_spec, seed, index, split)


def random_spec(rng: random.Random) -> ChartSpec:
    """A chart drawn from the grammar."""
    return ChartSpec(
        edges=(rng.randint(*LEFT), rng.randint(*RIGHT)),
        columns=(rng.randint(NARROWEST, COLUMNS), rng.randint(0, COLUMNS - NARROWEST)),
        panels=(_random_panel(rng), _random_panel(rng)),
        title=" ".join(rng.sample(SYLLABLES, TITLE_SYLLABLES)),
    )


def _random_panel(rng: random.Random) -> Panel:
    values = rng.choices(VALUES, k=POINTS)
    values[rng.randrange(POINTS)] = max(VALUES)  # axes end at the largest: it gives the scale
    return Panel(
        kind=rng.choice(KINDS), values=tuple(values), color="".join(rng.choices(DIGITS, k=3))
    )


# ---------------------------------------------------------------- mistakes
# (code, rng) -> wrong code, or None where the edit does not apply. They are those of a reader who
# is nearly right: a column or two, the next shade, one letter.

_EDGES = re.compile(r"left=0\.(\d\d), right=0\.(\d\d)\)\n.*\[0, :(\d+)\](?s:.*)\[1, (\d+):\]")
_COLOR = re.compile(rf"'#([{DIGITS}]{{3}})'")
_TITLE = re.compile(r"(?<=suptitle\(')[A-Z ]+")
_KIND = re.compile(r"plt\.(bar|barh)\(")
_VALUES = re.compile(r"\[(\d(?:,\d)*)\]")


def _change_shade(code: str, rng: random.Random) -> str | None:
    """One channel of one colour a step lighter or darker."""
    places = list(_COLOR.finditer(code))
    if not places:
        return None
    place = rng.choice(places).start(1) + rng.randrange(3)
    step = DIGITS.find(code[place]) + rng.choice((-1, 1))
    return _put(code, place, DIGITS[step]) if 0 <= step < len(DIGITS) else None


def _change_syllable(code: str, rng: random.Random) -> str | None:
    """One letter of the title misread."""
    title = _TITLE.search(code)
    letters = [place for place in range(*title.span()) if code[place] != " "] if title else []
    if not letters:
        return None
    place = rng.choice(letters)
    return _put(code, place, rng.choice(_alike(code[place])))


def _alike(letter: str) -> str:
    """The other letters that a syllable may have in the place of this one."""
    return (VOWELS if letter in VOWELS else CONSONANTS).replace(letter, "")


def _change_value(code: str, rng: random.Random) -> str | None:
    """One bar longer or shorter."""
    lists = list(_VALUES.finditer(code))
    if not lists:
        return None
    values = rng.choice(lists)
    place = values.start(1) + 2 * rng.randrange(len(values[1].split(",")))
    return _put(code, place, str(rng.choice([v for v in VALUES if str(v) != code[place]])))


def _change_kind(code: str, rng: random.Random) -> str | None:
    """Bars that lie instead of standing, or the other way round."""
    places = list(_KIND.finditer(code))
    if not places:
        return None
    place = rng.choice(places)
    other = {"bar": "barh", "barh": "bar"}[place[1]]
    return code[: place.start(1)] + other + code[place.end(1) :]


def _change_edge(code: str, rng: random.Random) -> str | None:
    """One end of a panel one to three columns off."""
    return _move(code, rng.choice((3, 4)), rng.choice((-3, -2, -1, -1, 1, 1, 2, 3)))


def _change_margin(code: str, rng: random.Random) -> str | None:
    """One margin a hundredth or two off."""
    return _move(code, rng.choice((1, 2)), rng.choice((-2, -1, 1, 2)))


def _move(code: str, number: int, by: int) -> str | None:
    """`code` with a number of `_EDGES` changed."""
    found = _EDGES.search(code)
    if not found:
        return None
    value = int(found[number]) + by
    least, most = ((0, 99), (0, 99), (1, COLUMNS), (0, COLUMNS - 1))[number - 1]
    if not least <= value <= most:
        return None
    text = str(value) if number > 2 else f"{value:02d}"
    return code[: found.start(number)] + text + code[found.end(number) :]


def _put(code: str, place: int, text: str) -> str:
    return code[:place] + text + code[place + 1 :]


_SCORED_EDITS: tuple[Edit, ...] = (
    *[_change_edge] * 6,  # what a policy that reads well still gets wrong
    *(_change_syllable, _change_shade, _change_kind),
)
_EDITS = (*_SCORED_EDITS, _change_value, _change_margin)
MOST_EDITS = 4


def corrupt(code: str, donors: Sequence[str], rng: random.Random) -> str:
    """`code` with one to `MOST_EDITS` mistakes, the first of which the low-level score may see.

    Args:
      donors: codes of other charts; what is wrong here does not come from them.

    Raises:
      ValueError: no edit applies to `code`.
    """
    return with_mistakes(code, rng, _SCORED_EDITS, _EDITS, MOST_EDITS)


# ---------------------------------------------------------------- diagnosis

_CALL = re.compile(r"plt\.(barh?)\(.*?\[([\d,]+)\], color='#(\w+)'\)")
_CHANNELS = ("red", "green", "blue")
_FIRST = ("stop", "start")  # the numbers that come first
MOST_NAMED = 5  # differences that a thought names
UNMOVED = "columns 0 0"


def diagnosis(draft: str, truth: str) -> str | None:
    """What a second turn thinks of a draft that runs: "Fix columns 36+1=37 14, title, 2 blue -1."

    The columns where the upper panel is to end and the lower one to begin always come first, worked
    out, so that the code has only to copy them: a thought that says "+1" is carried out in half of
    the cases (docs/results.md). The grid's edges move by hundredths, a channel by steps of
    `DIGITS`, and the length of a bar by units ("1 bar 3 -3": the third of the upper panel). More
    than `MOST_NAMED` differences are "Redraw."; None where the kinds or the counts differ, or
    nothing does.
    """
    found = differences(draft, truth)
    if not found or found == [UNMOVED]:
        return None
    if len(found) > MOST_NAMED:
        return "Redraw."
    ours, right = _numbers(draft), _numbers(truth)
    assert ours is not None and right is not None  # they have been compared
    columns = [_sum(ours[name], right[name]) for name in _FIRST]
    return f"Fix {', '.join(['columns ' + ' '.join(columns), *found[1:]])}."


def _sum(ours: int, right: int) -> str:
    """What a number is to become, worked out: "36+1=37", or "36" where it stays."""
    return str(ours) if ours == right else f"{ours}{right - ours:+}={right}"


def differences(draft: str, truth: str) -> list[str] | None:
    """What leads from one code to the other: by how much the columns move ("columns +1 0"), then as
    a diagnosis names it; None where the kinds or the counts differ, or a code is not of this
    grammar.
    """
    ours, right = _numbers(draft), _numbers(truth)
    if ours is None or right is None or ours.keys() != right.keys():
        return None
    found = ["title"] if _TITLE.findall(draft) != _TITLE.findall(truth) else []
    moves = {name: right[name] - ours[name] for name in ours}
    columns = [moves.pop(name) for name in _FIRST]
    found += [f"{name} {move:+}" for name, move in moves.items() if move]
    moved = "columns " + " ".join(f"{move:+}" if move else "0" for move in columns)
    return [moved, *found]


def _numbers(code: str) -> dict[str, int] | None:
    """What a diagnosis compares, by name; None for code that is not of this grammar."""
    edges = _EDGES.search(code)
    if not edges:
        return None
    left, right, stop, start = map(int, edges.groups())
    numbers = {"stop": stop, "start": start, "left": left, "right": right}
    for panel, (kind, values, color) in enumerate(_CALL.findall(code), start=1):
        lengths = values.split(",")
        if not set(color) <= set(DIGITS) or len(color) != 3 or not all(lengths):
            return None
        numbers[f"{panel} {kind}"] = 0
        for name, digit in zip(_CHANNELS, color, strict=True):
            numbers[f"{panel} {name}"] = DIGITS.index(digit)
        for number, length in enumerate(lengths, start=1):
            numbers[f"{panel} bar {number}"] = int(length)
    return numbers


# ---------------------------------------------------------------- tokenizer


def words() -> list[str]:
    """Every free word of the grammar: what a tokenizer keeps apart from the code around it."""
    return sorted({*KINDS, *SYLLABLES})


def responses(count: int, seed: int) -> Iterator[str]:
    """Right first-turn answers of the train split."""
    return (chart_spec(seed, index).response() for index in range(count))


def tokenizer_texts(count: int, seed: int, extra: Iterable[str] = ()) -> list[str]:
    """What the tiny tokenizer is trained on; see `synthetic.tokenizer_texts`."""
    fixed = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", INSTRUCTION, *extra]
    head = "</think>\n```python\nimport matplotlib.pyplot as plt\ngs = plt.GridSpec("
    rng = random.Random(seed)
    codes = [chart_spec(seed, index).code() for index in range(count // 2)]
    thoughts = ["Looks right.", "Redraw.", "Fix layout.", "Fix type, color."] * (count // 40)
    thoughts += filter(None, (diagnosis(corrupt(code, [], rng), code) for code in codes))
    return [
        *responses(count, seed),
        *fixed * (count // 10),
        *(f"<think>{thought}{head}" for thought in thoughts),
        *ERROR_TEXTS * (count // 200),
    ]

"""A grammar in which a second look could pay: shades, made-up words, panels, heights.

In the grammar of `data.synthetic` a policy soon reads all but the words, and a second look at the
same pixels adds nothing. Here a first turn errs often and by little, and its render beside the
target says where and in which direction: a colour is one of 64 shades, heights are 1 to 9, and
there may be two panels. A title is two syllables.

    >>> print(chart_spec(seed=0, index=1).code())
    import matplotlib.pyplot as plt
    plt.subplot(1, 1, 1)
    plt.bar(range(3), [9,8,4], color=['#363','#030','#039'])
    plt.suptitle('MA MO')
    plt.show()

Nothing else is in the code: size, type and margins are the house style `RC_PARAMS`, which hides
the ticks. So texts are the title, and what the low-level score counts is what varies; heights are
for a judge of pixels (`rl.judge.visual`). Charts depend on (seed, index, split) alone.
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
    "figure.subplot.left": 0.04,
    "figure.subplot.right": 0.96,
    "figure.subplot.bottom": 0.06,
    "figure.subplot.top": 0.76,
    "figure.subplot.wspace": 0.1,
    "figure.subplot.hspace": 0.15,
    "figure.titlesize": 18,
    "font.family": "monospace",
    "xtick.bottom": False,
    "xtick.labelbottom": False,
    "ytick.left": False,
    "ytick.labelleft": False,
}

KINDS = ("bar", "barh", "pie")
GRIDS = ((1, 1), (1, 2), (2, 1))  # rows, columns of panels
DIGITS = "0369"  # of a colour's channels: steps of a fifth of the range, from 0 to 0.6
CONSONANTS, VOWELS = "KMRS", "AEIO"
SYLLABLES = tuple(map("".join, itertools.product(CONSONANTS, VOWELS)))
TITLE_SYLLABLES = 2
MIN_POINTS, MAX_POINTS = 2, 3
LARGEST = 9
ONE_PANEL_SHARE = 0.3

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
    "ValueError: num must be an integer with 1 <= num <= 1, not 2",
)


@dataclasses.dataclass(frozen=True)
class Panel:
    """One subplot.

    Attributes:
      values: from 1 to `LARGEST`, which one of them is, of bars or wedges.
      colors: one per value, three of `DIGITS` each.
    """

    kind: str
    values: tuple[int, ...]
    colors: tuple[str, ...]

    def code(self) -> str:
        """The call that draws it."""
        values = f"[{','.join(map(str, self.values))}]"
        colors = "[" + ",".join(f"'#{color}'" for color in self.colors) + "]"
        if self.kind == "pie":
            return f"plt.pie({values}, colors={colors})"
        return f"plt.{self.kind}(range({len(self.values)}), {values}, color={colors})"


@dataclasses.dataclass(frozen=True)
class ChartSpec:
    """What one chart shows: `grid` (rows, columns) of panels below a title."""

    grid: tuple[int, int]
    panels: tuple[Panel, ...]
    title: str

    def code(self) -> str:
        """The script, without a newline at its end."""
        rows, columns = self.grid
        lines = ["import matplotlib.pyplot as plt"]
        for number, panel in enumerate(self.panels, start=1):
            lines += [f"plt.subplot({rows}, {columns}, {number})", panel.code()]
        return "\n".join([*lines, f"plt.suptitle('{self.title}')", "plt.show()"])

    def response(self) -> str:
        """The first-turn answer that is right for this chart."""
        code = self.code()
        return response_text(think_text(code), code)


def chart_spec(seed: int, index: int, split: str = "train") -> ChartSpec:
    """Chart number `index` of a split (see `splits.first_of_split`)."""
    return first_of_split(random_spec, seed, index, split)


def random_spec(rng: random.Random) -> ChartSpec:
    """A chart drawn from the grammar."""
    grid = GRIDS[0] if rng.random() < ONE_PANEL_SHARE else rng.choice(GRIDS[1:])
    panels = tuple(_random_panel(rng) for _ in range(grid[0] * grid[1]))
    return ChartSpec(grid, panels, " ".join(rng.sample(SYLLABLES, TITLE_SYLLABLES)))


def _random_panel(rng: random.Random) -> Panel:
    count = rng.randint(MIN_POINTS, MAX_POINTS)
    values = [rng.randint(1, LARGEST) for _ in range(count)]
    values[rng.randrange(count)] = LARGEST  # axes end at the largest: it gives the scale
    return Panel(
        kind=rng.choice(KINDS),
        values=tuple(values),
        colors=tuple("".join(rng.choices(DIGITS, k=3)) for _ in range(count)),
    )


# ---------------------------------------------------------------- mistakes
# (code, rng) -> wrong code, or None where the edit does not apply. They are those of a reader who
# is nearly right: the next shade, one syllable, one unit of height.

_COLOR = re.compile(r"'#(\d{3})'")
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
    """One height a unit or two off."""
    lists = list(_VALUES.finditer(code))
    if not lists:
        return None
    values = rng.choice(lists)
    place = values.start(1) + 2 * rng.randrange(len(values[1].split(",")))
    value = int(code[place]) + rng.choice((-2, -1, 1, 2))
    return _put(code, place, str(value)) if 1 <= value <= LARGEST else None


def _change_kind(code: str, rng: random.Random) -> str | None:
    """Bars that lie instead of standing, or the other way round."""
    places = list(_KIND.finditer(code))
    if not places:
        return None
    place = rng.choice(places)
    other = {"bar": "barh", "barh": "bar"}[place[1]]
    return code[: place.start(1)] + other + code[place.end(1) :]


def _change_grid(code: str, rng: random.Random) -> str | None:
    """Two panels side by side instead of one above the other, or the other way round."""
    turned = re.sub(r"subplot\((\d), (\d),", r"subplot(\2, \1,", code)
    return turned if turned != code else None


def _put(code: str, place: int, text: str) -> str:
    return code[:place] + text + code[place + 1 :]


_SCORED_EDITS: tuple[Edit, ...] = (
    *[_change_shade] * 5,  # what a policy that reads well still gets wrong
    *(_change_syllable, _change_kind, _change_grid),
)
_EDITS = (*_SCORED_EDITS, _change_value, _change_value)
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

_CALL = re.compile(r"plt\.(bar|barh|pie)\(.*?\[([\d,]+)\], colors?=\[([^\]]*)\]\)")
_CHANNELS = ("red", "green", "blue")
MOST_NAMED = 4  # differences that a thought names


def diagnosis(draft: str, truth: str) -> str | None:
    """What a second turn thinks of a draft that runs: "Fix title, 2 red +1, 3 value -2."

    Bars and wedges are numbered through all panels; a channel moves by steps of `DIGITS`, a value
    by units. More than `MOST_NAMED` differences are "Redraw."; None where the panels, the kinds or
    the counts differ, or nothing does.
    """
    ours, right = _marks(draft), _marks(truth)
    if ours is None or right is None or [m[0] for m in ours] != [m[0] for m in right]:
        return None
    if _grids(draft) != _grids(truth):
        return None
    found = ["title"] if _TITLE.findall(draft) != _TITLE.findall(truth) else []
    for number, (mark, wanted) in enumerate(zip(ours, right, strict=True), start=1):
        steps = [
            DIGITS.index(to) - DIGITS.index(here)
            for here, to in zip(mark[2], wanted[2], strict=True)
        ]
        found += [
            f"{number} {name} {step:+}" for name, step in zip(_CHANNELS, steps, strict=True) if step
        ]
        if mark[1] != wanted[1]:
            found.append(f"{number} value {wanted[1] - mark[1]:+}")
    if not found:
        return None
    return f"Fix {', '.join(found)}." if len(found) <= MOST_NAMED else "Redraw."


def _marks(code: str) -> list[tuple[str, int, str]] | None:
    """(kind, value, color) of every bar and wedge; None for code that is not of this grammar."""
    marks = []
    for kind, values, colors in _CALL.findall(code):
        heights, shades = values.split(","), _COLOR.findall(colors)
        if len(heights) != len(shades) or not all(heights):
            return None
        if not set("".join(shades)) <= set(DIGITS):
            return None
        marks += [(kind, int(h), shade) for h, shade in zip(heights, shades, strict=True)]
    return marks


def _grids(code: str) -> list[str]:
    return re.findall(r"subplot\(([^)]*)\)", code)


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
    head = "</think>\n```python\nimport matplotlib.pyplot as plt\nplt.subplot("
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

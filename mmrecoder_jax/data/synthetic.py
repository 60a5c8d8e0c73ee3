"""A procedural chart grammar, small enough to learn on two cores.

It is real enough to score with ChartMimic's rules. A `ChartSpec` is what one chart shows;
`ChartSpec.code()` writes it as Matplotlib code in ONE fixed line order, so that two specs that look
alike have the same code. What the low-level score counts (texts, chart type, colours) is what
varies: a title always, colours always explicit, axis labels, legends and pie labels often. How
charts look otherwise (size, fonts, margins) is not in the code: it is the house style `RC_PARAMS`,
which the executor applies before every script.

    >>> print(chart_spec(seed=0, index=2).code())
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    x = ['ant','bee','cat']
    ax.fill_between(x, [7,3,3], color='purple', label='new')
    ax.fill_between(x, [2,1,2], color='black', label='old')
    ax.set_title('Bytes')
    ax.legend()
    plt.show()

Charts depend on (seed, index, split) alone. A chart belongs to the split that the hash of its code
names, so that train, val and test never share a chart, whatever the seeds and the counts.
"""

import dataclasses
import random
from collections.abc import Iterable, Iterator

from mmrecoder_jax.data.corruptions import corrupt as corrupt
from mmrecoder_jax.data.splits import first_of_split
from mmrecoder_jax.env.response import response_text, think_text

INSTRUCTION = "Redraw this chart as Matplotlib code."

# What Python and Matplotlib say about the slips that a policy makes in this grammar; the tiny
# tokenizer learns these texts, because it reads them as feedback.
ERROR_TEXTS = (
    "line 4, in <module>: ax.",
    "AttributeError: 'Axes' object has no attribute 'set_",
    "AttributeError: PathCollection.set() got an unexpected keyword argument 'colour'",
    "NameError: name 'ay' is not defined",
    "SyntaxError: '(' was never closed",
    "SyntaxError: closing parenthesis ']' does not match opening parenthesis '('",
    "SyntaxError: invalid syntax. Perhaps you forgot a comma?",
    "SyntaxError: unmatched ')'",
    "SyntaxError: unterminated string literal (detected at line 4)",
    "TypeError: Axes.pie() got an unexpected keyword argument '",
    "ValueError: 'label' must be of length 'x'",
    "ValueError: operands could not be broadcast together with shapes (4,) (3,)",
    "ValueError: shape mismatch: objects cannot be broadcast to a single shape.  Mismatch is "
    "between arg 0 with shape (4,) and arg 1",
    "ValueError: x and y must be the same size",
    "ValueError: x and y must have same first dimension, but have shapes (4,) and (3,)",
)

# The pixels: 168 x 112, which is 12 x 8 patches of 14 pixels and 24 visual tokens.
DPI = 70
RC_PARAMS = {
    "figure.figsize": (2.4, 1.6),
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "figure.subplot.left": 0.21,
    "figure.subplot.right": 0.97,
    "figure.subplot.bottom": 0.24,
    "figure.subplot.top": 0.85,
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlepad": 3,
    "axes.labelsize": 8,
    "axes.labelpad": 1,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "xtick.major.pad": 2,
    "ytick.major.pad": 2,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "legend.loc": "upper right",  # "best" searches for a free corner: half of the cost of a draw
    "legend.fontsize": 7,
    "legend.borderpad": 0.2,
    "legend.labelspacing": 0.1,
    "legend.handlelength": 1.0,
    "legend.handletextpad": 0.3,
    "legend.borderaxespad": 0.2,
    "axes.ymargin": 0.1,
}

KINDS = ("bar", "barh", "plot", "scatter", "pie", "fill_between", "step")
PAIRED_KINDS = ("plot", "scatter", "fill_between", "step")  # kinds that may show a second series
COLORS = ("red", "blue", "green", "orange", "purple", "cyan", "black", "pink")
TITLES = (
    "Rain",
    "Sales",
    "Votes",
    "Budget",
    "Games",
    "Traffic",
    "Wind",
    "Exports",
    "Health",
    "Milk",
    "Queue",
    "Bytes",
)
X_LABELS = ("day", "group", "kind", "month", "team", "zone")
Y_LABELS = ("count", "euro", "hours", "level", "mass", "rate")
SERIES_LABELS = ("cost", "plan", "new", "old")
CATEGORIES = (
    ("A", "B", "C", "D", "E"),
    ("Mon", "Tue", "Wed", "Thu", "Fri"),
    ("Jan", "Feb", "Mar", "Apr", "May"),
    ("ant", "bee", "cat", "dog", "elk"),
    ("Rome", "Oslo", "Bern", "Kyiv", "Lima"),
)
MIN_POINTS, MAX_POINTS = 3, 5
PAIRED_SHARE = 0.4
LABEL_SHARE = 0.5
GRID_SHARE = 0.3


@dataclasses.dataclass(frozen=True)
class ChartSpec:
    """What one chart shows.

    Attributes:
      values: one tuple per series, one number per category.
      colors: one per series; of a pie one per wedge.
      labels: the legend entries; empty where there is one series.
      xlabel, ylabel, grid: empty or False for a pie.
    """

    kind: str
    categories: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    colors: tuple[str, ...]
    labels: tuple[str, ...]
    title: str
    xlabel: str
    ylabel: str
    grid: bool

    def code(self) -> str:
        """The script, without a newline at its end."""
        lines = [
            "import matplotlib.pyplot as plt",
            "fig, ax = plt.subplots()",
            f"x = {_listing(self.categories)}",
        ]
        if self.kind == "pie":
            lines.append(
                f"ax.pie({_listing(self.values[0])}, labels=x, colors={_listing(self.colors)})"
            )
        else:
            for i, values in enumerate(self.values):
                label = f", label='{self.labels[i]}'" if self.labels else ""
                lines.append(
                    f"ax.{self.kind}(x, {_listing(values)}, color='{self.colors[i]}'{label})"
                )
        lines.append(f"ax.set_title('{self.title}')")
        if self.xlabel:
            lines.append(f"ax.set_xlabel('{self.xlabel}')")
        if self.ylabel:
            lines.append(f"ax.set_ylabel('{self.ylabel}')")
        if self.grid:
            lines.append("ax.grid()")
        if self.labels:
            lines.append("ax.legend()")
        lines.append("plt.show()")
        return "\n".join(lines)

    def response(self) -> str:
        """The first-turn answer that is right for this chart."""
        code = self.code()
        return response_text(think_text(code), code)


def _listing(items: tuple[str, ...] | tuple[int, ...]) -> str:
    """A list literal without spaces: `['ant','bee']`, `[3,5]`."""
    return f"[{','.join(map(repr, items))}]"


def chart_spec(seed: int, index: int, split: str = "train") -> ChartSpec:
    """Chart number `index` of a split (see `splits.first_of_split`)."""
    return first_of_split(random_spec, seed, index, split)


def random_spec(rng: random.Random) -> ChartSpec:
    """A chart drawn from the grammar."""
    kind = rng.choice(KINDS)
    points = rng.randint(MIN_POINTS, MAX_POINTS)
    categories = rng.choice(CATEGORIES)[:points]
    paired = kind in PAIRED_KINDS and rng.random() < PAIRED_SHARE
    first = tuple(rng.randint(1, 9) for _ in range(points))
    values: tuple[tuple[int, ...], ...]
    if not paired:
        values = (first,)
    elif kind == "fill_between":
        # The second area is drawn over the first one: keep it lower, so that both can be seen.
        first = tuple(max(value, 3) for value in first)
        values = (first, tuple(rng.randint(1, value - 1) for value in first))
    else:
        values = (first, tuple(rng.randint(1, 9) for _ in range(points)))
    axes = kind != "pie"
    return ChartSpec(
        kind=kind,
        categories=categories,
        values=values,
        colors=tuple(rng.sample(COLORS, points if kind == "pie" else len(values))),
        labels=tuple(rng.sample(SERIES_LABELS, 2)) if paired else (),
        title=rng.choice(TITLES),
        xlabel=rng.choice(X_LABELS) if axes and rng.random() < LABEL_SHARE else "",
        ylabel=rng.choice(Y_LABELS) if axes and rng.random() < LABEL_SHARE else "",
        grid=axes and rng.random() < GRID_SHARE,
    )


def diagnosis(draft: str, truth: str) -> str | None:
    """None: a second turn thinks what the score of the draft says."""
    return None


def words() -> list[str]:
    """Every free word of the grammar: what a tokenizer keeps apart from the code around it."""
    pools = (KINDS, COLORS, TITLES, X_LABELS, Y_LABELS, SERIES_LABELS, *CATEGORIES)
    return sorted({word for pool in pools for word in pool})


DESCRIPTION = (
    f"one panel with a title, of kind {', '.join(KINDS)}; {MIN_POINTS} to {MAX_POINTS} points with "
    f"whole numbers below ten; one or two series; colours {', '.join(COLORS)}; "
    f"{len(words())} words in all, in small letters"
)
BEYOND = "other words, larger numbers, more points and several panels"


def responses(count: int, seed: int) -> Iterator[str]:
    """Right first-turn answers of the train split."""
    return (chart_spec(seed, index).response() for index in range(count))


def tokenizer_texts(count: int, seed: int, extra: Iterable[str] = ()) -> list[str]:
    """What the tiny tokenizer is trained on.

    Answers, the fixed texts around them often enough to become single tokens, and error texts.

    Args:
      count: of answers.
      extra: further fixed texts, such as the feedback templates of a run.
    """
    fixed = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", INSTRUCTION, *extra]
    head = "</think>\n```python\nimport matplotlib.pyplot as plt\nfig, ax = plt.subplots()\nx = ['"
    thoughts = [
        f"<think>{thought}{head}"
        for thought in ("Fix text.", "Fix color.", "Fix text, color.", "Looks right.")
    ]
    return [
        *responses(count, seed),
        *fixed * (count // 10),
        *thoughts * (count // 20),
        *ERROR_TEXTS * (count // 200),
    ]

"""What known changes to a few charts score: the table a person reads before trusting the reward."""

import dataclasses
from collections.abc import Iterator

from mmrecoder_jax.env.chartmimic import Scores, score
from mmrecoder_jax.env.pool import ExecutorPool

_BARS = """
import matplotlib.pyplot as plt
import numpy as np

x = np.arange(3)
fig, ax = plt.subplots(figsize=(5, 3))
ax.bar(x - 0.2, [3, 5, 2], 0.4, color="tab:blue", label="north")
ax.bar(x + 0.2, [4, 1, 6], 0.4, color="tab:orange", label="south")
ax.set_title("Harvest")
ax.set_ylabel("tons")
ax.legend(loc="upper left")
plt.show()
"""
_PANELS = """
import matplotlib.pyplot as plt

fig, (left, right) = plt.subplots(1, 2, figsize=(6, 3))
left.plot([1, 2, 3], [2, 4, 3], color="crimson", label="2023")
left.plot([1, 2, 3], [1, 3, 5], color="navy", label="2024")
left.set_title("Visitors")
left.legend()
right.scatter([1, 2, 3], [3, 1, 2], color="green")
right.set_title("Weights")
right.set_xlabel("age")
fig.tight_layout()
plt.show()
"""
_PIE = """
import matplotlib.pyplot as plt

fig, ax = plt.subplots()
ax.pie([50, 30, 20], labels=["rent", "food", "rest"], colors=["gold", "teal", "plum"], autopct="%d%%")
ax.set_title("Budget")
plt.show()
"""


@dataclasses.dataclass(frozen=True)
class Change:
    """A chart's script changed in a known way: `part` must lose, every other part must not; None
    when no part can see it.
    """

    name: str
    replacements: tuple[tuple[str, str], ...]
    parts: tuple[str, ...] = ()


_CHARTS = {
    "bars": (
        _BARS,
        (
            Change("recolour", (("tab:orange", "tab:green"),), ("color",)),
            Change(
                "retype",
                (("ax.bar(x + 0.2, [4, 1, 6], 0.4,", "ax.plot(x + 0.2, [4, 1, 6],"),),
                ("type", "color"),
            ),
            Change("relabel", (('"tons"', '"tonnes"'),), ("text",)),
            Change(
                "dropped series",
                (("ax.bar(x + 0.2", "len or ax.bar(x + 0.2"),),
                ("text", "type", "color"),
            ),
            Change("overlap", (("x + 0.2", "x - 0.2"),)),
        ),
    ),
    "panels": (
        _PANELS,
        (
            Change("recolour", (("crimson", "black"),), ("color",)),
            Change("retype", (("right.scatter", "right.plot"),), ("type", "color")),
            Change("relabel", (('"Visitors"', '"visitors"'),), ("text",)),
            Change(
                "dropped series",
                (("left.plot([1, 2, 3], [1", "len or left.plot([1, 2, 3], [1"),),
                ("text", "type", "color"),
            ),
            Change("other grid", (("plt.subplots(1, 2", "plt.subplots(2, 1"),), ("layout",)),
        ),
    ),
    "pie": (
        _PIE,
        (
            Change("recolour", (("gold", "gray"),), ("color",)),
            Change(
                "retype",
                (
                    ("ax.pie([50, 30, 20], labels=", "ax.bar([0, 1, 2], [50, 30, 20], tick_label="),
                    (', autopct="%d%%"', ""),
                    ("colors=", "color="),
                ),
                ("text", "type", "color"),
            ),
            Change("relabel", (('"food"', '"foods"'),), ("text",)),
            Change("overlap", (("colors=", "labeldistance=0.6, colors="),)),
        ),
    ),
}


def charts() -> dict[str, str]:
    """The unchanged scripts by name."""
    return {name: code for name, (code, _) in _CHARTS.items()}


def selftest(pool: ExecutorPool) -> bool:
    """Prints the table; whether every number is where it belongs."""
    print(
        f"{'chart':<8}{'change':<16}{'text':>8}{'layout':>8}{'type':>8}{'color':>8}{'overall':>9}"
    )
    good = True
    for chart, change, scores, right in table(pool):
        numbers = (
            "".join(f"{value:>8.3f}" for value in dataclasses.astuple(scores))
            + f"{scores.overall:>9.3f}"
        )
        print(f"{chart:<8}{change:<16}{numbers}{'' if right else '   WRONG'}")
        good &= right
    print("An overlap is seen by no part: only a judge of the picture punishes it.")
    return good


def table(pool: ExecutorPool) -> Iterator[tuple[str, str, Scores, bool]]:
    """(chart, change, scores, whether exactly the expected parts lose) of every chart, itself and
    crashed included.
    """
    for chart, (code, changes) in _CHARTS.items():
        changes = (
            Change("itself", ()),
            *changes,
            Change(
                "crash",
                (("plt.show()", "plt.no_such_function()"),),
                ("text", "layout", "type", "color"),
            ),
        )
        codes = [_changed(code, change) for change in changes]
        target = pool.submit(code).result().record
        for change, execution in zip(changes, pool.run(codes), strict=True):
            scores = score(execution.record if execution.ok else None, target)
            lost = tuple(name for name, value in dataclasses.asdict(scores).items() if value < 1)
            yield chart, change.name, scores, lost == change.parts


def _changed(code: str, change: Change) -> str:
    for old, new in change.replacements:
        if old not in code:
            raise ValueError(f"the self-test's change {change.name!r} does not fit its chart")
        code = code.replace(old, new)
    return code

"""What known changes to a few charts score: the table a person reads before trusting the reward."""

import dataclasses
from collections.abc import Iterator

from mmrecoder_jax.env.chartmimic import Scores, score
from mmrecoder_jax.env.pool import ExecutorPool
from mmrecoder_jax.env.wire import Part

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
labels = ["rent", "food", "rest"]
ax.pie([50, 30, 20], labels=labels, colors=["gold", "teal", "plum"], autopct="%d%%")
ax.set_title("Budget")
plt.show()
"""


@dataclasses.dataclass(frozen=True)
class Change:
    """A chart's script changed in a known way.

    Attributes:
      replacements: (old, new) texts of the script.
      parts: those that must lose; every other one must not.
    """

    name: str
    replacements: tuple[tuple[str, str], ...]
    parts: tuple[Part, ...] = ()


_CHARTS = {
    "bars": (
        _BARS,
        (
            Change("recolour", (("tab:orange", "tab:green"),), (Part.COLOR,)),
            Change(
                "retype",
                (("ax.bar(x + 0.2, [4, 1, 6], 0.4,", "ax.plot(x + 0.2, [4, 1, 6],"),),
                (Part.TYPE, Part.COLOR),
            ),
            Change("relabel", (('"tons"', '"tonnes"'),), (Part.TEXT,)),
            Change(
                "dropped series",
                (("ax.bar(x + 0.2", "len or ax.bar(x + 0.2"),),
                (Part.TEXT, Part.TYPE, Part.COLOR),
            ),
            Change("overlap", (("x + 0.2", "x - 0.2"),)),
        ),
    ),
    "panels": (
        _PANELS,
        (
            Change("recolour", (("crimson", "black"),), (Part.COLOR,)),
            Change("retype", (("right.scatter", "right.plot"),), (Part.TYPE, Part.COLOR)),
            Change("relabel", (('"Visitors"', '"visitors"'),), (Part.TEXT,)),
            Change(
                "dropped series",
                (("left.plot([1, 2, 3], [1", "len or left.plot([1, 2, 3], [1"),),
                (Part.TEXT, Part.TYPE, Part.COLOR),
            ),
            Change("other grid", (("plt.subplots(1, 2", "plt.subplots(2, 1"),), (Part.LAYOUT,)),
        ),
    ),
    "pie": (
        _PIE,
        (
            Change("recolour", (("gold", "gray"),), (Part.COLOR,)),
            Change(
                "retype",
                (
                    ("ax.pie([50, 30, 20], labels=", "ax.bar([0, 1, 2], [50, 30, 20], tick_label="),
                    (', autopct="%d%%"', ""),
                    ("colors=", "color="),
                ),
                (Part.TEXT, Part.TYPE, Part.COLOR),
            ),
            Change("relabel", (('"food"', '"foods"'),), (Part.TEXT,)),
            Change("overlap", (("colors=", "labeldistance=0.8, colors="),)),
        ),
    ),
}


def charts() -> dict[str, str]:
    """The unchanged scripts by name."""
    return {name: code for name, (code, _) in _CHARTS.items()}


def selftest(pool: ExecutorPool) -> bool:
    """Prints the table; whether every number is where it belongs."""
    parts = "".join(f"{part:>8}" for part in Part)
    print(f"{'chart':<8}{'change':<16}{parts}{'overall':>9}")
    good = True
    for chart, change, scores, right in _table(pool):
        numbers = "".join(f"{getattr(scores, part):>8.3f}" for part in Part)
        verdict = "" if right else "   WRONG"
        print(f"{chart:<8}{change:<16}{numbers}{scores.overall:>9.3f}{verdict}")
        good &= right
    print("An overlap is seen by no part: only a judge of the picture punishes it.")
    return good


def _table(pool: ExecutorPool) -> Iterator[tuple[str, str, Scores, bool]]:
    """(chart, change, scores, whether exactly the expected parts lose) of every changed chart.

    Each chart also comes as it is, and crashed.
    """
    for chart, (code, changes) in _CHARTS.items():
        changes = (
            Change("itself", ()),
            *changes,
            Change(
                "crash",
                (("plt.show()", "plt.no_such_function()"),),
                tuple(Part),
            ),
        )
        codes = [_changed(code, change) for change in changes]
        target = pool.submit(code).result().record
        if target is None:
            raise RuntimeError(f"the self-test's chart {chart!r} does not run here")
        for change, execution in zip(changes, pool.run(codes), strict=True):
            scores = score(execution.record if execution.ok else None, target)
            lost = tuple(part for part in Part if getattr(scores, part) < 1)
            yield chart, change.name, scores, lost == change.parts


def _changed(code: str, change: Change) -> str:
    for old, new in change.replacements:
        if old not in code:
            raise ValueError(f"the self-test's change {change.name!r} does not fit its chart")
        code = code.replace(old, new)
    return code

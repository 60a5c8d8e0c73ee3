"""Records what Plot2Code's evaluator sees of a script. Runs in the process of the untrusted script.

The generated script runs as the official evaluator runs it, by `exec` inside a function that has
NumPy, pyplot and all of pyplot's names: what the script defines at its top is not seen by its own
functions, nor (up to Python 3.11) by its comprehensions. The reference runs as a module. Texts are
those of the artists of `plt.gcf()` once it was saved and the evaluator has closed and cleared what
was open, tick labels and legends included, with the positions the artists hold (each in a system of
its own).

The evaluator keeps the reference's figure as `fig1`, and runs the generated script among its own
names: a script that has a `fig1` is compared with that.
"""

import io
import json
import math
import os
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib import text
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from PIL import Image

from mmrecoder_jax.env.child.capture import restore_saving
from mmrecoder_jax.env.child.long_texts import shortened
from mmrecoder_jax.env.child.main_module import become_main
from mmrecoder_jax.env.wire import RecordKind


def run(code: str, kind: RecordKind) -> tuple[str, dict[str, Any] | None]:
    """Runs a script; returns (error, `records.Plot2CodeRecord` as JSON).

    A script that raises has no record.
    """
    restore_saving()
    given = {name: value for name, value in vars(plt).items() if not name.startswith("_")}
    given |= {"plt": plt, "np": np, "matplotlib": matplotlib, "os": os, "json": json}
    given |= {"Image": Image}
    try:
        compiled, names = become_main(code)
        names.update(given)
        # With locals of its own, the script's top is no module: its functions do not see one
        # another.
        own = names if kind == RecordKind.PLOT2CODE_TARGET else {}
        exec(compiled, names, own)
        figure = plt.gcf()
        pixels = io.BytesIO()
        figure.savefig(pixels, format="rgba")
        _tidy()
    except BaseException as problem:
        return f"{type(problem).__name__}: {problem}", None
    fig1 = own.get("fig1") if kind == RecordKind.PLOT2CODE else None
    white = bool(np.frombuffer(pixels.getvalue(), np.uint8).min() == 255)
    return "", _described(figure) | {
        "white": white,
        "fig1": _described(fig1) | {"white": False, "fig1": None}
        if isinstance(fig1, Figure)
        else None,
    }


def _tidy() -> None:
    """What the evaluator does before it looks for texts.

    `cla` and `clf` meet the figure before the last one: of a script with two, the first is empty.
    """
    plt.close()
    matplotlib.rcdefaults()
    plt.cla()
    plt.clf()
    plt.close("all")


def _described(figure: Figure) -> dict[str, Any]:
    texts: list[list[Any]] = []
    _collect(figure, texts)
    return {"texts": texts, "size": [float(side) for side in figure.get_size_inches()]}


def _collect(artist: Artist, texts: list[list[Any]]) -> None:
    """The visible texts of an artist and of all below it, parents first."""
    if isinstance(artist, text.Text) and artist.get_visible():
        shown = artist.get_text().strip().lower()
        if shown:
            place = [_number(value) for value in artist.get_position()]
            texts.append([shortened(shown), *place])
    for child in artist.get_children():
        _collect(child, texts)


def _number(value: Any) -> float | None:
    """A coordinate, or None for dates, categories and infinities.

    The official evaluator matches those with nothing.
    """
    number = float(value) if isinstance(value, int | float | np.number) else math.nan
    return number if math.isfinite(number) else None

"""Records what Plot2Code's evaluator sees of a script. Runs inside the process of the untrusted
script.

The generated script runs as the official evaluator runs it, by `exec` inside a function that has
NumPy, pyplot and all of pyplot's names: what the script defines at its top is not seen by its own
functions. The reference runs as a module. Texts are those of the artists of `plt.gcf()` once it was
saved, tick labels and legends included, with the positions the artists hold (each in a system of
its own).
"""

import io
import json
import math
import os
from typing import Any

import matplotlib
import numpy as np
from matplotlib import text
from matplotlib.artist import Artist
from matplotlib.backend_bases import FigureCanvasBase

PARTS = ("plot2code", "plot2code_target")


def run(code: str, part: str) -> tuple[str, dict[str, Any] | None]:
    """Runs a script; returns (error, record); a script that raises has no record.

    The record is read by `plot2code.Drawn`: `texts` holds JSON rows [text, x, y] (null where a
    position is no number), `colors` the size as "<width>x<height>" in inches, `types` {"white": 1}
    where nothing but white was drawn.
    """
    from matplotlib import pyplot as plt

    FigureCanvasBase.print_figure = getattr(
        FigureCanvasBase.print_figure, "__wrapped__", FigureCanvasBase.print_figure
    )
    names = {name: value for name, value in vars(plt).items() if not name.startswith("_")}
    names |= {
        "__name__": "__main__",
        "__builtins__": __builtins__,
        "plt": plt,
        "np": np,
        "matplotlib": matplotlib,
        "os": os,
        "json": json,
    }
    try:
        exec(
            compile(code, "script.py", "exec", dont_inherit=True),
            names,
            names if part == "plot2code_target" else {},
        )
        figure = plt.gcf()
        pixels = io.BytesIO()
        figure.savefig(pixels, format="rgba")
    except BaseException as problem:
        return f"{type(problem).__name__}: {problem}", None
    texts: list[str] = []
    _collect(figure, texts)
    white = not np.frombuffer(pixels.getvalue(), np.uint8).min() < 255
    width, height = (float(side) for side in figure.get_size_inches())
    return "", {
        "texts": texts,
        "layout": [],
        "types": {"white": int(white)},
        "colors": [f"{width!r}x{height!r}"],
    }


def _collect(artist: Artist, texts: list[str]) -> None:
    """The visible texts of an artist and of all below it, parents first."""
    if isinstance(artist, text.Text) and artist.get_visible():
        shown = artist.get_text().strip().lower()
        if shown:
            texts.append(
                json.dumps(
                    [shown[:1000], *(_number(value) for value in artist.get_position())],
                    ensure_ascii=False,
                )
            )
    for child in artist.get_children():
        _collect(child, texts)


def _number(value: Any) -> float | None:
    """A coordinate; None for dates, categories and infinities, which the official evaluator matches
    with nothing.
    """
    number = float(value) if isinstance(value, int | float | np.number) else math.nan
    return number if math.isfinite(number) else None

"""What a zygote does once, so that no script has to: imports, settings, hooks, seeds, first draws.

Everything here happens before the first fork, and no model code has run yet. What every script
finds: Agg, the library's own defaults plus the house style, the fonts that come with matplotlib and
no others, generators that start from fixed seeds.

Fonts: matplotlib reads glyphs through a Python file object, and opens every font anew after a fork
because forks would share the file's offset. Fonts for Agg are read from memory instead: three times
as fast, and they can stay open across the fork.
"""

import dataclasses
import functools
import gc
import importlib
import importlib.util
import inspect
import io
import os
import types
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager, ft2font, mathtext
from matplotlib import pyplot as plt
from matplotlib.backends import backend_agg

from mmrecoder_jax.env.child import capture, display_list, integrity, recorder
from mmrecoder_jax.env.executor.reserve import Reserve
from mmrecoder_jax.env.wire import Settings


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """What a child inherits of the zygote's work."""

    capture: capture.Capture
    reserve: Reserve
    untouched: integrity.Snapshot


def warm_start(settings: Settings) -> WarmStart:
    """Makes this process one that scripts can be forked from."""
    captured = _prepare_matplotlib(settings)
    for name in settings.preload:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    recorder.install()
    display_list.install()
    _read_fonts_from_memory()
    _seed()
    _draw_once()
    recorder.start()  # forgets that figure
    reserve = Reserve()
    reserve.install()
    untouched = integrity.snapshot()
    # A child that collected the zygote's objects would copy the pages they are on.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    return WarmStart(captured, reserve, untouched)


def _prepare_matplotlib(settings: Settings) -> capture.Capture:
    """The same backend, settings and fonts on every host."""
    plt.switch_backend("agg")
    matplotlib.rcdefaults()
    parameters: Any = matplotlib.rcParams  # the stubs of later releases list each name
    parameters.update(settings.rc_params)
    own = os.path.join(matplotlib.get_data_path(), "fonts", "")
    manager = font_manager.fontManager
    manager.ttflist = [font for font in manager.ttflist if own in os.path.join(own, font.fname)]
    manager.afmlist = [font for font in manager.afmlist if own in os.path.join(own, font.fname)]
    captured = capture.Capture(
        settings.dpi,
        settings.max_pixels,
        describe=recorder.finish,
        display=display_list.taken,
    )
    captured.install()
    return captured


def _seed() -> None:
    """Every child starts from the same random state.

    That includes generators that would ask the system for entropy. Python's own generator is seeded
    in the child: a fork seeds it anew.
    """
    np.random.seed(0)
    entropy: Any = np.random.bit_generator
    entropy.randbits = lambda k: 12345


def _draw_once() -> None:
    """Draws a figure: what matplotlib loads and caches at first use is there before the fork."""
    figure, axes = plt.subplots()
    axes.bar(["a", "b"], [1.5, 20])
    axes.plot([0, 1], [1, 2], label="l")
    axes.scatter([0, 1], [0, 1])
    axes.set(title="T", xlabel="x", ylabel="$y$")
    axes.grid(True)
    axes.legend()
    figure.tight_layout()
    figure.canvas.draw()
    plt.close("all")
    # An open font file would be shared, with its offset, by all children.
    fonts: Any = font_manager
    fonts._get_font.cache_clear()
    parser: Any = mathtext.MathTextParser
    parser._parse_cached.cache_clear()
    gc.collect()


def _read_fonts_from_memory() -> None:
    """Gives Agg a `get_font` of its own. The other backends need the path of an open font."""

    def open_font(path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> ft2font.FT2Font:
        with open(path, "rb") as file:
            return ft2font.FT2Font(io.BytesIO(file.read()), *args, **kwargs)

    fonts: Any = font_manager
    load = _with_names(
        fonts._get_font.__wrapped__, ft2font=types.SimpleNamespace(FT2Font=open_font)
    )
    agg: Any = backend_agg
    agg.get_font = _with_names(
        inspect.unwrap(fonts.get_font), _get_font=functools.lru_cache(64)(load)
    )


def _with_names(function: types.FunctionType, **names: Any) -> types.FunctionType:
    """`function` of font_manager, with some of the names that it uses meaning something else."""
    copy = types.FunctionType(
        function.__code__, vars(font_manager) | names, function.__name__, function.__defaults__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy

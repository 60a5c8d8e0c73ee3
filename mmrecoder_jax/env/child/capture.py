"""Finds the figure of a script and renders it as raw pixels.

Its hooks are installed in the zygote; everything else happens in the process of the script.

The figure that counts is the last one saved, else the last one shown, else the current one. Every
way of saving ends here: `plt.savefig`, a `Figure` without pyplot, `canvas.print_png`, a BytesIO,
another backend, an animation. The render goes through matplotlib's own `print_figure` with the
script's arguments (tight box, face colour, transparency) at one fixed dpi, into its "rgba" format,
so it is the image that matplotlib would have written as PNG, without encoding it.

A file is written for a script only where the script could look at it: into a file-like target, or
where its code names something that reads files.
"""

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import matplotlib
import matplotlib.animation
import matplotlib.backend_bases
import matplotlib.figure
from matplotlib import pyplot as plt
from matplotlib.backends import backend_agg

# A name in the script's code that may read what it has saved.
_READS_FILES = frozenset(
    [
        *("open", "imread", "exists", "isfile", "stat", "getsize", "listdir", "glob", "rglob"),
        *("iglob", "walk", "scandir", "Path", "read_bytes", "remove", "unlink", "rename"),
        *("replace", "copy", "move", "system", "fromfile", "load"),
    ]
)
_PRINTERS = (
    *("print_png", "print_jpg", "print_jpeg", "print_tif", "print_tiff", "print_webp"),
    *("print_raw", "print_rgba"),
)


class NoFigure(Exception):
    """The script ended without making a figure."""


class _Sink(io.RawIOBase):
    """Takes the one write of matplotlib's "rgba" format: a [H, W, 4] buffer."""

    pixels: bytes = b""
    size: tuple[int, int] = (0, 0)

    def writable(self) -> bool:
        return True

    def write(self, buffer: Any) -> int:
        view = memoryview(buffer)
        height, width, _ = view.shape or (0, 0, 0)
        self.size = (width, height)
        self.pixels = view.tobytes()
        return view.nbytes


class Capture:
    """The state of one execution: what was saved or shown so far, and its pixels.

    Args:
      dpi: of every render.
      max_pixels: width times height above which ValueError is raised, before the memory is taken.
      describe: called after each render that is kept; its result is the record.
      display: likewise; its result makes the display list when it is called.
    """

    def __init__(
        self,
        dpi: int,
        max_pixels: int,
        describe: Callable[[], dict[str, Any] | None],
        display: Callable[[], Callable[[], bytes]],
    ):
        self._dpi = dpi
        self._max_pixels = max_pixels
        self._describe = describe
        self._display = display
        self._write_files = False
        self._active = False
        self._saved: matplotlib.figure.Figure | None = None
        self._shown: matplotlib.figure.Figure | None = None
        self._print_figure: Any = matplotlib.backend_bases.FigureCanvasBase.print_figure
        self.pixels: bytes = b""
        self.size: tuple[int, int] | None = None
        self.record: dict[str, Any] | None = None
        self.display: Callable[[], bytes] = bytes

    def install(self) -> None:
        """Replaces matplotlib's ways out by ones that end in this capture.

        Called once, in the zygote.
        """
        # Any: the stubs do not allow for functions and methods that are replaced.
        base: Any = matplotlib.backend_bases.FigureCanvasBase
        agg: Any = backend_agg.FigureCanvasAgg
        base.print_figure = self._saving(base.print_figure)
        for name in _PRINTERS:
            setattr(agg, name, self._direct(getattr(agg, name)))
        renderer: Any = backend_agg.RendererAgg
        renderer.__init__ = self._bounded(renderer.__init__)
        figures: Any = matplotlib.figure.Figure
        figures.show = lambda figure, warn=True: self._note_shown(figure)
        pyplot: Any = plt
        # pyplot's own savefig draws the figure once more, for a window.
        pyplot.savefig = functools.wraps(plt.savefig)(
            lambda *args, **kwargs: plt.gcf().savefig(*args, **kwargs)
        )
        pyplot.show = self._show
        pyplot.pause = lambda interval: self._show()
        pyplot.switch_backend = lambda newbackend: None
        library: Any = matplotlib
        library.use = lambda backend, *, force=True: None
        animations: Any = matplotlib.animation.Animation
        animations.save = lambda animation, *args, **kwargs: self._save_animation(animation)

    def _saving(self, print_figure: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(print_figure)
        def save(
            canvas: Any,
            filename: Any,
            dpi: Any = None,
            facecolor: Any = None,
            edgecolor: Any = None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if self._active:
                return print_figure(canvas, filename, dpi, facecolor, edgecolor, *args, **kwargs)
            result = None
            if self._write_files or not _is_plain_path(canvas, filename, kwargs.get("format")):
                with self._drawing():
                    result = print_figure(
                        canvas, filename, dpi, facecolor, edgecolor, *args, **kwargs
                    )
            style = {
                name: kwargs[name]
                for name in ("bbox_inches", "pad_inches", "bbox_extra_artists")
                if name in kwargs
            }
            self._take(canvas.figure, facecolor=facecolor, edgecolor=edgecolor, **style)
            return result

        return save

    def _bounded(self, renderer_init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(renderer_init)
        def init(renderer: Any, width: float, height: float, dpi: float) -> None:
            if self._active and not width * height <= self._max_pixels:
                raise ValueError(
                    f"figure too large: {width:.0f} x {height:.0f} pixels; "
                    f"at most {self._max_pixels} in all are allowed"
                )
            renderer_init(renderer, width, height, dpi)

        return init

    def start(self, code: CodeType) -> None:
        """Called in the child before the script, whose `code` tells whether files are looked at."""
        self._write_files = not _READS_FILES.isdisjoint(_names(code))

    def finish(self) -> None:
        """Renders the figure that counts, unless it was rendered when it was saved.

        Raises:
          NoFigure: there is none.
        """
        if self._saved is not None:
            return
        figure = self._shown
        if figure is None and plt.get_fignums():
            figure = plt.gcf()
        if figure is None:
            raise NoFigure
        self._take(figure)

    def _take(self, figure: Any, **style: Any) -> None:
        figure = figure.figure  # a SubFigure's own figure
        self._saved = figure
        with self._drawing():
            sink = _Sink()
            self._print_figure(figure.canvas, sink, self._dpi, format="rgba", **style)
        self.record = self._describe()
        self.display = self._display()
        self.pixels, self.size = sink.pixels, sink.size

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def _direct(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def save(canvas: Any, *args: Any, **kwargs: Any) -> Any:
            if self._active:
                return method(canvas, *args, **kwargs)
            with self._drawing():
                result = method(canvas, *args, **kwargs)
            self._take(canvas.figure)
            return result

        return save

    def _show(self, *args: Any, **kwargs: Any) -> None:
        if plt.get_fignums():
            self._note_shown(plt.gcf())

    def _note_shown(self, figure: Any) -> None:
        self._shown = figure

    def _save_animation(self, animation: Any) -> None:
        animation._draw_was_started = True
        animation._init_draw()
        self._take(animation._fig)


def restore_saving() -> None:
    """Takes the capture's hook off `print_figure`, for scripts whose files a benchmark asks for."""
    base: Any = matplotlib.backend_bases.FigureCanvasBase
    base.print_figure = getattr(base.print_figure, "__wrapped__", base.print_figure)


def _is_plain_path(canvas: Any, filename: Any, file_format: str | None) -> bool:
    """Whether saving there has no effect on the script: a path, in a format matplotlib knows."""
    if not isinstance(filename, str | os.PathLike):
        return False
    file_format = file_format or os.path.splitext(filename)[1][1:]
    return not file_format or file_format.lower() in canvas.get_supported_filetypes()


def _names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names

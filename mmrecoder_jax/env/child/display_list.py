"""Records what a script draws as a display list, and replays it where no model code runs.

A record and its picture are claims of the script's process. So the calls that reach the Agg
renderer are written down as plain data, each with the marks that it belongs to (`scene`). For a
share of the executions (`EnvConfig.replay_share`), of which the script's process does not know, a
fresh, confined fork of the zygote draws them again:

    forged         the replay gives other pixels than the claimed ones, or another layout, other
                   types or colours; the record claims a text that is not in the list or cannot be
                   read (`lettering`); or a mark was not drawn by what its type is drawn with
                   (`_MADE_OF`)
    hidden_text    such a text is in the list: covered by what was drawn later, of the colour of
                   what is behind it, too faint, or crossed by others

Not replayed ("undecided" in the statistics): filters of artists, regions copied on the canvas,
fonts from a file, lists over `MAX_BYTES`.

    recording, in the script's process    start() ... draw ... taken() -> bytes
    replay, in a process of its own       check(bytes, claimed pixels, claimed texts) -> Finding
"""

import functools
import json
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backend_bases import GraphicsContextBase
from matplotlib.backends import backend_agg
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.patheffects import PathEffectRenderer
from matplotlib.transforms import Affine2D, Bbox, Transform, TransformedPath

from mmrecoder_jax.env.child import ink, lettering, recorder, scene
from mmrecoder_jax.env.wire import Finding

MAX_BYTES = 16 << 20
MAX_OPERATIONS = 20_000

_HEADER = struct.Struct("<I")  # length of the JSON part; arrays follow it
_DRAWS = tuple(name for name in ink.DRAWS if name != "draw_text_image")
_RC = [
    name
    for name in matplotlib.rcParams
    if name in ("text.antialiased", "text.hinting", "text.hinting_factor", "text.kerning_factor")
    or (name.startswith(("mathtext.", "font.")) and name != "font.size")
]
# the fields of a graphics context that are plain data; clipping comes on its own
_GC = (
    *("_alpha", "_forced_alpha", "_antialiased", "_capstyle", "_dashes", "_joinstyle"),
    *("_linewidth", "_rgb", "_hatch", "_hatch_color", "_hatch_linewidth", "_snap", "_sketch"),
)
_FONT = "family style variant stretch weight size math_fontfamily"
_DTYPES = ("float64", "int64", "uint8", "bool")


class Undecided(Exception):
    """This list cannot be replayed."""


# ---------------------------------------------------------------------------------------- recording


class _Canvas(ink.Canvas):
    """Agg's canvas, which writes down what is drawn on it."""

    def __init__(self, width: int, height: int, dpi: float):
        super().__init__(width, height, dpi)
        self.size = [width, height, dpi]
        self.quiet = False  # within a text that is written down as such
        self.panels: list[scene.Panel] = []
        self.clear()

    def clear(self) -> None:
        super().clear()
        self.operations: list[Any] = []
        self.bytes = 0
        self.marks: dict[scene.Marks | None, int] = {None: 0}  # their numbers
        self.complete = True
        _state.last = self

    def note(self, *operation: Any) -> None:
        if self.quiet or not self.complete:
            return
        mark = None if self.ink is None else self.ink.mark
        number = self.marks.setdefault(mark, len(self.marks))
        try:
            self.operations.append([number, *map(self._kept, operation)])
        except (TypeError, ValueError):
            self.complete = False
        if self.bytes > MAX_BYTES or len(self.operations) > MAX_OPERATIONS:
            self.give_up()

    def _kept(self, value: Any) -> Any:
        """A value as it is now, whatever becomes of it: quick, as every draw pays for it."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, tuple | list):
            return [self._kept(each) for each in value]
        if isinstance(value, dict):
            return {name: self._kept(each) for name, each in value.items()}
        if isinstance(value, Path):
            return _KeptPath(
                self._kept(value.vertices),
                None if value.codes is None else self._kept(value.codes),
                bool(value.should_simplify),
                float(value.simplify_threshold),
            )
        if isinstance(value, Transform):
            return self._kept(value.get_matrix())
        if isinstance(value, GraphicsContextBase):
            rect, (path, transform) = value.get_clip_rectangle(), value.get_clip_path()
            return _KeptContext(
                [vars(value)[name] for name in _GC],
                None if rect is None else [float(x) for x in rect.extents],
                self._kept(path),
                self._kept(transform),
            )
        array = np.array(value)
        self.bytes += array.nbytes
        return array

    def give_up(self) -> None:
        self.complete = False
        self.operations = []

    def draw_text_image(self, *args):
        if not self.quiet:
            self.give_up()
        return super().draw_text_image(*args)

    def copy_from_bbox(self, *args):
        self.give_up()
        return super().copy_from_bbox(*args)

    def restore_region(self, *args):
        self.give_up()
        return super().restore_region(*args)


def _noting(name: str) -> Any:
    original = getattr(ink.Canvas, name)

    def draw(self, *args, **kwargs):
        self.note(name, args, kwargs)
        return original(self, *args, **kwargs)

    return draw


for _name in _DRAWS:
    setattr(_Canvas, _name, _noting(_name))


class _State:
    last: _Canvas | None = None  # the canvas that was last begun anew


_state = _State()


def install() -> None:
    """Puts the hooks into matplotlib. Once, in the zygote, after the recorder's own."""
    agg: Any = RendererAgg  # the stubs do not allow for methods that are replaced
    effects: Any = PathEffectRenderer
    start_filter = agg.start_filter

    @functools.wraps(start_filter)
    def new_start_filter(self):
        if isinstance(self._renderer, _Canvas):
            self._renderer.give_up()
        last = _state.last
        start_filter(self)  # makes a canvas of its own
        _state.last = last

    module: Any = backend_agg
    module._RendererAgg = _Canvas
    agg.start_filter = new_start_filter
    agg.draw_text = _noting_text(agg.draw_text, "text", lambda renderer: renderer)
    effects.draw_text = _noting_text(
        effects.draw_text, "outlined", lambda renderer: renderer._renderer
    )


def _noting_text(original: Any, kind: str, agg: Any) -> Any:
    """Notes a text, and for an outlined one how many of the operations after it draw it."""

    @functools.wraps(original)
    def draw_text(self, gc, x, y, s, prop, angle, ismath=False, mtext=None):
        canvas = getattr(agg(self), "_renderer", None)
        if not isinstance(canvas, _Canvas) or canvas.quiet:
            return original(self, gc, x, y, s, prop, angle, ismath, mtext)
        if prop.get_file() is not None:
            canvas.give_up()
        before = len(canvas.operations)
        font = [_plain(getattr(prop, f"get_{name}")()) for name in _FONT.split()]
        canvas.note(kind, gc, x, y, s, font, angle, ismath, recorder.in_tick(), 0)
        canvas.quiet = kind == "text"
        try:
            return original(self, gc, x, y, s, prop, angle, ismath, mtext)
        finally:
            canvas.quiet = False
            if canvas.complete and kind == "outlined":
                canvas.operations[before][-1] = len(canvas.operations) - before - 1

    return draw_text


def taken() -> Callable[[], bytes]:
    """Makes the display list of the last draw when it is called; empty where none can be replayed.

    What it is made of is kept as it is now.
    """
    canvas = _state.last
    if canvas is None or not canvas.complete:
        return bytes
    parameters: Any = matplotlib.rcParams  # the stubs of later releases list each name
    settings: dict[str, Any] = {name: dict.__getitem__(parameters, name) for name in _RC}
    marks = [list(map(list, marks)) if marks else [] for marks in canvas.marks]
    return functools.partial(
        _packed, canvas.size, settings, list(canvas.operations), marks, list(canvas.panels)
    )


def _packed(
    size: list[Any], settings: dict[str, Any], operations: list[Any], marks: Any, panels: Any
) -> bytes:
    arrays = bytearray()
    try:
        document = {
            "size": size,
            "rc": {name: _plain(value) for name, value in settings.items()},
            "operations": [_pack(operation, arrays) for operation in operations],
            "marks": marks,
            "panels": panels,
        }
        text = json.dumps(document).encode()
    except (TypeError, ValueError):
        return b""
    data = _HEADER.pack(len(text)) + text + arrays
    return data if len(data) <= MAX_BYTES else b""


class _KeptPath(NamedTuple):
    vertices: np.ndarray
    codes: np.ndarray | None
    should_simplify: bool
    simplify_threshold: float


class _KeptContext(NamedTuple):
    fields: list[Any]  # of `_GC`
    clip_extents: list[float] | None
    clip_path: _KeptPath | None
    clip_transform: np.ndarray | None


def _pack(value: Any, arrays: bytearray) -> Any:
    """`value`, an argument of a drawing function, as JSON; its arrays are appended to `arrays`."""
    if value is None or isinstance(value, bool | int | float | str):
        return _plain(value)
    if isinstance(value, _KeptPath):
        return {"path": [_pack(each, arrays) for each in value]}
    if isinstance(value, _KeptContext):
        fields, extents, path, transform = value
        return {"gc": [_pack(fields, arrays), extents, _pack([path, transform], arrays)]}
    if isinstance(value, tuple | list):
        return [_pack(each, arrays) for each in value]
    if isinstance(value, dict):
        return {"dict": {name: _pack(each, arrays) for name, each in value.items()}}
    array = np.asarray(value)
    if array.dtype.kind in "iu" and array.dtype != np.uint8:
        array = array.astype(np.int64)
    elif array.dtype.kind == "f":
        array = array.astype(np.float64)
    if array.dtype.name not in _DTYPES:
        raise TypeError(f"an argument of type {type(value).__name__} is not plain data")
    start = len(arrays)
    arrays += np.ascontiguousarray(array).tobytes()
    return {"array": [array.dtype.name, list(array.shape), start]}


def _plain(value: Any) -> Any:
    """Scalars and lists as Python's own: JSON may write enums and NumPy scalars otherwise."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return str.__str__(getattr(value, "value", value)) if kind is str else kind(value)
    return None if value is None else float(value)


# ------------------------------------------------------------------------------------------- replay


def check(data: bytes, pixels: bytes, record: dict[str, Any]) -> Finding:
    """Draws a display list again and compares.

    Anything may be raised on hostile data: the process ends then, and the replay is undecided.

    Args:
      data: from `taken`, untrusted.
      pixels: the claimed picture, RGBA.
      record: the claimed record.
    """
    length = _HEADER.unpack_from(data)[0]
    document = json.loads(data[_HEADER.size : _HEADER.size + length])
    arrays = data[_HEADER.size + length :]
    width, height, dpi = document["size"]
    if 4 * width * height != len(pixels):
        return Finding.FORGED
    for name in _RC:
        matplotlib.rcParams[name] = document["rc"][name]
    operations = [_unpack(operation, arrays) for operation in document["operations"]]
    replay = _Replay(_marks(document["marks"]), width, height, dpi)
    replay.draw(operations)
    final = replay.picture()
    panels = [
        scene.Panel(
            (float(left), float(top), float(right), float(bottom)),
            None if cell is None else tuple(map(int, cell)),
        )
        for (left, top, right, bottom), cell in document["panels"]
    ]
    shown = scene.describe(panels, replay.ink)
    missing = Counter(record["texts"]) - Counter(lettering.readable(replay.lines, final))
    result = Finding(0)
    if (
        final.tobytes() != pixels
        or missing
        or any(record[part] != shown[part] for part in ("layout", "types", "colors"))
        or replay.strange
    ):
        result |= Finding.FORGED
    if not missing.keys().isdisjoint({line.s for line in replay.lines} | replay.labels):
        result |= Finding.HIDDEN_TEXT
    return result


def _marks(packed: list[list[Any]]) -> list[scene.Marks]:
    return [
        tuple(scene.Mark(call, kind, tuple(names), panel) for call, kind, names, panel in marks)
        for marks in packed
    ]


# What types are drawn with, where that is one of few operations. Types that are not here are drawn
# in more than one way. A line has no area, a patch is a closed outline.
_LINE, _PATCH, _IMAGE = "line", "patch", "image"
_MADE_OF = {
    **dict.fromkeys(("plot", "axhline", "axvline", "line2d"), _LINE),
    **dict.fromkeys(("bar", "barh", "pie", "fill", "axvspan", "axhspan", "squarify"), _PATCH),
    **dict.fromkeys(("ellipse", "circle", "rectangle", "wedge", "polygon"), _PATCH),
    "imshow": _IMAGE,
}


def _is_made_of(kind: str, name: str, args: tuple[Any, ...]) -> bool:
    """Whether an operation can be part of a mark of this kind."""
    made_of = _MADE_OF.get(kind)
    if made_of is None:
        return True
    if made_of == _IMAGE:
        return name in ("draw_image", "draw_path_collection", "draw_quad_mesh")
    if made_of == _LINE:
        return (
            name == "draw_markers"
            or (name == "draw_path" and len(args) < 4)
            or (name == "draw_path" and args[3] is None)
        )
    if name != "draw_path":
        return False
    path = args[1]
    return path.codes is not None and bool((path.codes == Path.CLOSEPOLY).any())


class _Replay:
    """A canvas on which operations are drawn again.

    Args:
      marks: by number, those that operations belong to.

    Attributes:
      lines: the texts that can be seen where they were drawn, without labels of ticks.
      labels: the labels of ticks.
      strange: an operation that its mark's type is not drawn with was seen.
    """

    def __init__(self, marks: list[scene.Marks], width: int, height: int, dpi: float):
        self.marks = marks
        self._renderer: Any = RendererAgg(width, height, dpi)
        self._renderer._renderer = ink.Canvas(width, height, dpi)
        self._renderer._update_methods()
        self.ink = ink.Ink(np.asarray(self._renderer.buffer_rgba()))
        self._renderer._renderer.ink = self.ink
        self.lines: list[lettering.Lettering] = []
        self.labels: set[str] = set()
        self.strange = False

    def picture(self) -> np.ndarray:
        """The picture [H, W, 4]."""
        return np.asarray(self._renderer.buffer_rgba()).copy()

    def draw(self, operations: list[Any]) -> None:
        """Draws the operations."""
        queue = iter(operations)
        for number, kind, *args in queue:
            marks = self.marks[number] or None
            with self.ink.drawing(marks):
                if kind in _DRAWS:
                    self._operation(marks, kind, *args)
                elif kind in ("text", "outlined"):
                    self._text(queue, kind, *args)
                else:
                    raise Undecided(kind)

    def _operation(self, marks: scene.Marks | None, name: str, args: Any, kwargs: Any) -> None:
        if any(not _is_made_of(mark.kind, name, args) for mark in marks or ()):
            self.strange = True
        getattr(self._renderer._renderer, name)(*args, **kwargs)

    def _text(
        self,
        queue: Iterator[Any],
        kind: str,
        gc: Any,
        x: float,
        y: float,
        s: str,
        font: Any,
        angle: float,
        ismath: Any,
        in_tick: bool,
        inner: int,
    ) -> None:
        prop = FontProperties(**dict(zip(_FONT.split(), font, strict=True)))
        area = lettering.text_area(self._renderer, x, y, s, prop, angle)
        window = np.asarray(self._renderer.buffer_rgba())[area]
        before = window.copy()
        if kind == "text":
            self._renderer.draw_text(gc, x, y, s, prop, angle, ismath)
        else:
            for _ in range(inner):
                _, name, *parts = next(queue)
                if name not in _DRAWS:
                    raise Undecided(name)
                getattr(self._renderer._renderer, name)(*parts[0], **parts[1])
        size = lettering.text_size(self._renderer, prop)
        needed = lettering.pixels_needed(s, ismath, size)
        s = s[: recorder.MAX_CHARS]
        line = lettering.Lettering(s, size, needed, area, before, window)
        if in_tick:
            self.labels.add(line.s)
        elif line.has_ink():
            self.lines.append(line)


def _unpack(value: Any, arrays: bytes) -> Any:
    """The argument that `_pack` has written; lists come back as tuples."""
    if isinstance(value, list):
        return tuple(_unpack(each, arrays) for each in value)
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {name: _unpack(each, arrays) for name, each in content.items()}
    if kind == "path":
        vertices, codes, simplify, threshold = _unpack(content, arrays)
        path = Path(vertices, codes)
        path.should_simplify, path.simplify_threshold = simplify, threshold
        return path
    if kind == "gc":
        gc: Any = GraphicsContextBase()
        fields, rect, (path, transform) = _unpack(content, arrays)
        vars(gc).update(zip(_GC, fields, strict=True))
        gc._cliprect = None if rect is None else Bbox.from_extents(*rect)
        gc._clippath = None if path is None else TransformedPath(path, Affine2D(transform))
        return gc
    name, shape, start = content
    if name not in _DTYPES:
        raise Undecided(name)
    return (
        np.frombuffer(arrays, name, count=int(np.prod(shape)), offset=start).reshape(shape).copy()
    )

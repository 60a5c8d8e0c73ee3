"""Records what a script draws as a display list, and replays it where no model code runs.

A record and its picture are claims of the script's process. For a share of the executions
(`EnvConfig.replay_share`) the calls that reach the Agg renderer are written down as plain data, and
a fresh, confined fork of the zygote draws them again:

    forged         the replay gives other pixels than the claimed ones, or the record claims a text
                   that is not in the list
    hidden_text    the record claims a text of which fewer pixels are left in the finished picture
                   than it has characters: it is covered by what was drawn later, of the colour of
                   what is behind it, or too faint

Which pixels are a text's own: those it changed when it was drawn, that no later text changed, and
that look different in a picture drawn without any text. Not replayed ("undecided" in the
statistics): filters of artists, regions copied on the canvas, fonts from a file, lists over
`MAX_BYTES`.

    recording, in the script's process    start() ... draw ... taken() -> bytes
    replay, in a process of its own       check(bytes, claimed pixels, claimed texts) -> Finding
"""

import dataclasses
import functools
import json
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backend_bases import GraphicsContextBase
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.patheffects import PathEffectRenderer
from matplotlib.transforms import Affine2D, Bbox, Transform, TransformedPath

from mmrecoder_jax.env.child import ink, recorder
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
    "_alpha _forced_alpha _antialiased _capstyle _dashes _joinstyle _linewidth _rgb _hatch "
    "_hatch_color _hatch_linewidth _snap _sketch"
)
_FONT = "family style variant stretch weight size math_fontfamily"
_DTYPES = ("float64", "int64", "uint8", "bool")


class Undecided(Exception):
    """This list cannot be replayed."""


@dataclasses.dataclass
class _Owners:
    """A canvas [H, W, 1] that holds which text changed a pixel last, instead of colours."""

    text: np.ndarray
    dpi: float

    def buffer_rgba(self) -> np.ndarray:
        return self.text


# ---------------------------------------------------------------------------------------- recording


class _Canvas(ink.Canvas):
    """Agg's canvas, which writes down what is drawn on it."""

    def __init__(self, width: int, height: int, dpi: float):
        super().__init__(width, height, dpi)
        self.size = [width, height, dpi]
        self.quiet = False  # within a text that is written down as such
        self.clear()

    def clear(self) -> None:
        super().clear()
        self.operations: list[Any] = []
        self.arrays = bytearray()
        self.complete = True
        _state.last = self

    def note(self, *operation: Any) -> None:
        if self.quiet or not self.complete:
            return
        try:
            self.operations.append(_pack(operation, self.arrays))
        except (TypeError, ValueError):
            self.complete = False
        if len(self.arrays) > MAX_BYTES or len(self.operations) > MAX_OPERATIONS:
            self.give_up()

    def give_up(self) -> None:
        self.complete = False
        self.operations, self.arrays = [], bytearray()

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
    recording = False
    last: _Canvas | None = None  # the canvas that was last begun anew


_state = _State()


def install() -> None:
    """Puts the hooks, which do nothing before `start`, into matplotlib.

    Once, in the zygote, after the recorder's own.
    """
    agg: Any = RendererAgg  # the stubs do not allow for methods that are replaced
    effects: Any = PathEffectRenderer
    init, start_filter = agg.__init__, agg.start_filter

    @functools.wraps(init)
    def new_init(self, width, height, dpi):
        init(self, width, height, dpi)
        if _state.recording:
            self._renderer = _Canvas(int(width), int(height), dpi)
            self._update_methods()

    @functools.wraps(start_filter)
    def new_start_filter(self):
        if isinstance(self._renderer, _Canvas):
            self._renderer.give_up()
        start_filter(self)

    agg.__init__, agg.start_filter = new_init, new_start_filter
    agg.draw_text = _noting_text(agg.draw_text, "text", lambda renderer: renderer)
    effects.draw_text = _noting_text(
        effects.draw_text, "outlined", lambda renderer: renderer._renderer
    )


def _noting_text(original: Any, kind: str, agg: Any) -> Any:
    """Notes a text, and for an outlined one how many of the operations after it draw it."""

    @functools.wraps(original)
    def draw_text(self, gc, x, y, s, prop, angle, ismath=False, mtext=None):
        canvas = getattr(agg(self), "_renderer", None) if _state.recording else None
        if not isinstance(canvas, _Canvas) or canvas.quiet:
            return original(self, gc, x, y, s, prop, angle, ismath, mtext)
        if prop.get_file() is not None:
            canvas.give_up()
        before = len(canvas.operations)
        font = [_plain(getattr(prop, f"get_{name}")()) for name in _FONT.split()]
        canvas.note(kind, gc, x, y, s, font, angle, ismath, 0)
        canvas.quiet = kind == "text"
        try:
            return original(self, gc, x, y, s, prop, angle, ismath, mtext)
        finally:
            canvas.quiet = False
            if canvas.complete and kind == "outlined":
                canvas.operations[before][-1] = len(canvas.operations) - before - 1

    return draw_text


def start() -> None:
    """From now on new canvases write down what is drawn on them. Called before the script."""
    _state.recording = True


def taken() -> bytes:
    """The display list of the last draw, empty when there is none that can be replayed."""
    canvas = _state.last
    if canvas is None or not canvas.complete:
        return b""
    settings = {name: _plain(matplotlib.rcParams[name]) for name in _RC}
    document = {"size": canvas.size, "rc": settings, "operations": canvas.operations}
    text = json.dumps(document).encode()
    data = _HEADER.pack(len(text)) + text + canvas.arrays
    return data if len(data) <= MAX_BYTES else b""


def _pack(value: Any, arrays: bytearray) -> Any:
    """`value`, an argument of a drawing function, as JSON; its arrays are appended to `arrays`."""
    if value is None or isinstance(value, bool | int | float | str):
        return _plain(value)
    if isinstance(value, tuple | list):
        return [_pack(each, arrays) for each in value]
    if isinstance(value, dict):
        return {"dict": {name: _pack(each, arrays) for name, each in value.items()}}
    if isinstance(value, Path):
        simplify = bool(value.should_simplify), float(value.simplify_threshold)
        return {"path": _pack((value.vertices, value.codes, *simplify), arrays)}
    if isinstance(value, Transform):
        return _pack(value.get_matrix(), arrays)
    if isinstance(value, GraphicsContextBase):
        rect, (path, transform) = value.get_clip_rectangle(), value.get_clip_path()
        fields = [_pack(getattr(value, name), arrays) for name in _GC.split()]
        extents = None if rect is None else [float(x) for x in rect.extents]
        return {"gc": [fields, extents, _pack((path, transform), arrays)]}
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


def check(data: bytes, pixels: bytes, texts: list[str]) -> Finding:
    """Draws a display list again and compares.

    Anything may be raised on hostile data: the process ends then, and the replay is undecided.

    Args:
      data: from `taken`, untrusted.
      pixels: the claimed picture, RGBA.
      texts: those that the record claims.
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
    final, drawn, owner = _draw(operations, width, height, dpi)
    without, _, _ = _draw(list(_without_texts(operations)), width, height, dpi)
    seen = ink.changed(final, without, recorder.TEXT_CONTRAST)
    counts = np.bincount(owner[seen & (owner >= 0)], minlength=len(drawn))
    visible = Counter(
        s[: recorder.MAX_CHARS]
        for (s, needed), count in zip(drawn, counts, strict=True)
        if count >= needed
    )
    known = {s[: recorder.MAX_CHARS] for s, _ in drawn}
    missing = Counter(texts) - visible
    result = Finding(0)
    if final.tobytes() != pixels or any(text not in known for text in missing):
        result |= Finding.FORGED
    if any(text in known for text in missing):
        result |= Finding.HIDDEN_TEXT
    return result


def _draw(
    operations: list[Any], width: int, height: int, dpi: float
) -> tuple[np.ndarray, list[tuple[str, int]], np.ndarray]:
    """Draws the operations.

    Returns:
      The picture [H, W, 4]; the texts with the number of pixels each needs to be seen; the index of
      the text that last changed each pixel [H, W], -1 where none did.
    """
    renderer = RendererAgg(width, height, dpi)
    owners = _Owners(np.full((height, width, 1), -1, np.int32), dpi)
    drawn: list[tuple[str, int]] = []
    queue = iter(operations)
    for kind, *args in queue:
        if kind in _DRAWS:
            getattr(renderer._renderer, kind)(*args[0], **args[1])
            continue
        if kind not in ("text", "outlined"):
            raise Undecided(kind)
        gc, x, y, s, font, angle, ismath, inner = args
        prop = FontProperties(**dict(zip(_FONT.split(), font, strict=True)))
        place = (x, y, s, prop, angle)
        window = recorder.text_window(renderer, *place)
        before = window.copy()
        if kind == "text":
            renderer.draw_text(gc, x, y, s, prop, angle, ismath)
        else:
            for _ in range(inner):
                name, *parts = next(queue)
                if name not in _DRAWS:
                    raise Undecided(name)
                getattr(renderer._renderer, name)(*parts[0], **parts[1])
        recorder.text_window(owners, *place)[ink.changed(before, window)] = len(drawn)
        drawn.append((s, recorder.pixels_needed(s, ismath, recorder.text_size(renderer, prop))))
    return np.asarray(renderer.buffer_rgba()).copy(), drawn, owners.text[..., 0]


def _without_texts(operations: list[Any]) -> Iterator[Any]:
    """The operations that draw no text, outlines of texts left out too."""
    queue = iter(operations)
    for operation in queue:
        if operation[0] in _DRAWS:
            yield operation
        else:
            for _ in range(operation[-1]):
                next(queue)


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
        vars(gc).update(zip(_GC.split(), fields, strict=True))
        gc._cliprect = None if rect is None else Bbox.from_extents(*rect)
        gc._clippath = None if path is None else TransformedPath(path, Affine2D(transform))
        return gc
    name, shape, start = content
    if name not in _DTYPES:
        raise Undecided(name)
    return (
        np.frombuffer(arrays, name, count=int(np.prod(shape)), offset=start).reshape(shape).copy()
    )

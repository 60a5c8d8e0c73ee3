"""How much of what each mark painted is left in the finished picture.

Runs in the process of the untrusted script (`recorder`) and, for a replay, where no model code runs
(`display_list`). A mark is the artists of one call that have the same colours. Whatever a script
does to hide one, by sizes, dashes, gaps, views, clips, effects, sheets or a `draw` of its own, ends
here: pixels change when it is drawn, and stay, or not.

    canvas     .  .  .        before the mark
               .  r  r        after it: two pixels have changed visibly
               .  b  r        at the end: one of them is under an opaque bar

A pixel is compared as it looks on white paper. What is drawn later takes away from it as much as it
is opaque; a band of 20 % above a line leaves the line 80 %.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends import backend_agg

CONTRAST = 16  # levels of 255 by which a pixel must change to count as ink
LEAST_PIXELS = 12  # that a mark must leave
LEAST_SHARE = 0.1  # of the pixels that a mark painted, which must be left
MAX_SEGMENTS = 600  # changes of hand in a draw; marks that begin later are not seen
_MAX_PAINTS = 4096  # colours that are remembered of a mark

Mark = Any  # whatever can be a key
_LARGE, _LARGE_PAGE = 4 << 20, 2 << 20  # bytes
_OPAQUE = -20.0  # logarithm of what an opaque paint lets through


class Canvas(backend_agg._RendererAgg):
    """Agg's canvas, which tells an `Ink` what is about to be drawn on it."""

    ink: "Ink | None" = None
    panels: Any = ()  # of the figure, where a display list is written

    def tell(self, name: str, args: tuple[Any, ...]) -> None:
        if self.ink is not None:
            self.ink.painting(name, args)


def _telling(name: str) -> Any:
    original = getattr(backend_agg._RendererAgg, name)

    def draw(self, *args, **kwargs):
        self.tell(name, args)
        return original(self, *args, **kwargs)

    return draw


DRAWS = tuple(
    name
    for name in (
        *("draw_path", "draw_markers", "draw_path_collection", "draw_quad_mesh"),
        *("draw_gouraud_triangle", "draw_gouraud_triangles", "draw_image", "draw_text_image"),
    )
    if hasattr(backend_agg._RendererAgg, name)
)
for _name in DRAWS:
    setattr(Canvas, _name, _telling(_name))


class _Part(NamedTuple):
    """Pixels that a mark changed visibly.

    Attributes:
      where: their indices.
      contrast: by how many levels they changed.
      through: `Ink._through` then.
      ground: the number of the mark without which they would not differ from the paper, or -1.
    """

    where: np.ndarray
    contrast: np.ndarray
    through: np.ndarray
    ground: np.ndarray


class Ink:
    """Watches the canvas of one draw.

    Args:
      buffer: the canvas, uint8 [H, W, 4], which changes while this looks at it.
    """

    def __init__(self, buffer: np.ndarray):
        self._canvas = buffer
        self._now32 = buffer.reshape(-1, 4).view(np.uint32)[:, 0]
        size = len(self._now32)
        maps = _maps(size, np.uint32, np.float32, np.uint32, np.int16, np.bool_)
        self._before32, self._through, self._paper32, self._top, self._flags = maps
        self._before32[:] = self._paper32[:] = self._now32  # the latter: the picture without marks
        # logarithm of the share that everything since the beginning has let through
        self._through[:] = 0
        self._top[:] = -1  # the mark that was painted last
        self._stack: list[Mark | None] = [None]
        self._owner: Mark | None = None
        self._opacity = 0.0
        self._segments = 0
        self._numbers: dict[Mark, int] = {}
        self._parts: dict[int, list[_Part]] = {}
        self._paints: dict[Mark, set[int]] = {}

    def canvas(self) -> np.ndarray:
        """The picture as it is now, uint8 [H, W, 4]."""
        return self._canvas

    @property
    def mark(self) -> Mark | None:
        """Whose turn it is."""
        return self._stack[-1]

    @contextmanager
    def drawing(self, mark: Mark | None) -> Iterator[None]:
        """Around the draw of an artist of this mark."""
        self._stack.append(mark)
        try:
            yield
        finally:
            self._stack.pop()

    def painting(self, name: str, args: tuple[Any, ...]) -> None:
        """Before each operation on the canvas."""
        mark = self._stack[-1]
        if mark != self._owner:
            self.look()
            self._owner = mark
        rgba = _rgba(name, args)
        self._opacity = max(self._opacity, float(rgba[:, 3].max(initial=0.0)))
        if mark is not None:
            known = self._paints.setdefault(mark, set())
            if len(known) < _MAX_PAINTS:
                packed = np.round(255 * rgba[:_MAX_PAINTS, :3]).astype(np.int64) @ (65536, 256, 1)
                known.update(packed.tolist() if len(packed) < 9 else np.unique(packed).tolist())

    def look(self) -> None:
        """Gives what has changed since the last look to whom it belongs."""
        self._segments += 1
        opacity, self._opacity = self._opacity, 0.0
        if self._segments > MAX_SEGMENTS:
            return
        if self._owner is None and not self._parts:
            self._before32[:] = self._now32  # nothing is there that it could hide
            self._paper32[:] = self._now32
            return
        where = np.flatnonzero(np.not_equal(self._now32, self._before32, out=self._flags))
        now = self._now32[where]
        if len(where) and self._parts:
            self._through[where] += math.log1p(-opacity) if opacity < 1.0 else _OPAQUE
        if self._owner is None:
            self._paper32[where], self._top[where] = now, -1
        else:
            contrast = difference(_bytes(self._before32[where]), _bytes(now))
            seen = contrast > CONTRAST
            where_seen = where[seen]
            paper = self._paper32[where_seen]
            plain = paper == self._before32[where_seen]
            other = np.flatnonzero(~plain)
            plain[other] = difference(_bytes(paper[other]), _bytes(now[seen][other])) > CONTRAST
            number = self._numbers.setdefault(self._owner, len(self._numbers))
            self._parts.setdefault(number, []).append(
                _Part(
                    where_seen,
                    contrast[seen],
                    self._through[where_seen],
                    np.where(plain, -1, self._top[where_seen]),
                )
            )
            self._top[where] = number
        self._before32[where] = now

    def shown(self) -> set[Mark]:
        """The marks of which enough is left in the picture as it is now."""
        self.look()
        self._owner = None
        self._flags[:] = False
        shown = {number: number in self._parts for number in self._numbers.values()}
        while True:  # a mark may be seen on another only, which may turn out to be hidden
            visible = np.array([*shown.values(), True])  # the last is the paper, number -1
            hidden = [
                number
                for number, is_shown in shown.items()
                if is_shown and not self._is_left(self._parts[number], visible)
            ]
            if not hidden:
                return {mark for mark, number in self._numbers.items() if shown[number]}
            shown |= dict.fromkeys(hidden, False)

    def _is_left(self, parts: list["_Part"], visible: np.ndarray) -> bool:
        """Whether enough is left of a mark, in total and of what it painted."""
        painted = left = 0
        for part in reversed(parts):
            new = ~self._flags[part.where]  # a mark may paint a pixel more than once
            self._flags[part.where] = True
            stays = part.contrast * np.exp(self._through[part.where] - part.through) > CONTRAST
            painted += int(np.count_nonzero(new))
            if not visible.all():
                stays &= visible[part.ground]
            left += int(np.count_nonzero(new & stays))
        for part in parts:
            self._flags[part.where] = False
        return left >= LEAST_PIXELS and left >= LEAST_SHARE * painted

    def is_flat(self) -> bool:
        """Whether the picture is of one colour."""
        return is_flat(self._canvas)

    def has_paint(self, mark: Mark, color: str) -> bool:
        """Whether something in this colour ("#RRGGBB") was painted for a mark."""
        wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        return any(
            max(abs(wanted - ((paint >> 16) & 255, (paint >> 8) & 255, paint & 255))) <= 1
            for paint in self._paints.get(mark, ())
        )


def _maps(size: int, *types: type[np.generic]) -> list[np.ndarray]:
    """Arrays [size] of these types, with any content, in one block.

    NumPy asks for large pages for a block of 4 MB. A child of the zygote has no memory yet, and to
    touch small pages for the first time would cost more than all that is done with them.
    """
    widths = [np.dtype(each).itemsize for each in types]
    block = np.empty(max(size * sum(widths), _LARGE) + _LARGE_PAGE, np.uint8)
    first = -block.ctypes.data % _LARGE_PAGE
    arrays = []
    for each, width in zip(types, widths, strict=True):
        arrays.append(block[first : first + size * width].view(each))
        first += size * width
    return arrays


def on_white(rgba: np.ndarray) -> np.ndarray:
    """What colours look like on white paper: uint8 [..., 4] -> int16 [..., 3]."""
    color = rgba[..., :3].astype(np.int16)
    alpha = rgba[..., 3:]
    if (alpha == 255).all():
        return color
    shade = (255 - color).astype(np.uint16) * alpha  # at most 65,025
    return (255 - shade // 255).astype(np.int16)


def _bytes(pixels: np.ndarray) -> np.ndarray:
    """uint32 [n] -> uint8 [n, 4]."""
    return pixels.view(np.uint8).reshape(-1, 4)


def difference(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """By how many levels pixels differ on white paper, in the channel that differs most.

    uint8 [..., 4] twice -> uint8 or int16 [...].
    """
    if (before[..., 3] == 255).all() and (after[..., 3] == 255).all():
        levels = np.maximum(before, after)
        levels -= np.minimum(before, after)
    else:
        levels = np.abs(on_white(before) - on_white(after))
    # several times faster than `max(-1)`
    return np.maximum(np.maximum(levels[..., 0], levels[..., 1]), levels[..., 2])


def changed(before: np.ndarray, after: np.ndarray, least: int = CONTRAST) -> np.ndarray:
    """Which pixels differ visibly, bool [h, w]; uint8 [h, w, 4] each."""
    seen = (before.view(np.uint32) != after.view(np.uint32))[..., 0]
    seen[seen] = difference(before[seen], after[seen]) > least
    return seen


def is_flat(part: np.ndarray) -> bool:
    """Whether a part of a picture, uint8 [h, w, 4], is of one colour as far as one can see."""
    if not part.size:
        return True
    # most end at the first look
    return not (
        (difference(part[::7, ::7], part[0, 0]) > CONTRAST).any()
        or (difference(part, part[0, 0]) > CONTRAST).any()
    )


# ---------------------------------------------------------------- the paints of a drawing operation

_NONE = np.empty((0, 4))
_BLACK = np.array([[0.0, 0.0, 0.0, 1.0]])


def _rgba(name: str, args: tuple[Any, ...]) -> np.ndarray:
    """The colours that an operation paints with, [n, 4]; opaque black where they cannot be told."""
    try:
        return _READERS[name](*args)
    except Exception:  # arguments of a script's own making
        return _BLACK


def _stroke(gc: Any) -> np.ndarray:
    return np.array([gc._rgb], float).reshape(1, 4) if gc._linewidth > 0 else _NONE


def _face(gc: Any, color: Any) -> np.ndarray:
    if color is None:
        return _NONE
    alpha = gc._alpha if gc._forced_alpha or len(color) == 3 else color[3]
    return np.array([[*color[:3], alpha]], float)


def _hatch(gc: Any) -> np.ndarray:
    # Since matplotlib 3.11 a collection's hatches have colours of their own, and this is None.
    has_one = gc._hatch and gc._hatch_color is not None
    return np.array([gc._hatch_color], float) if has_one else _NONE


def _path(gc: Any, path: Any, transform: Any, face: Any = None) -> np.ndarray:
    return np.concatenate([_stroke(gc), _face(gc, face), _hatch(gc)])


def _markers(
    gc: Any, marker: Any, marker_transform: Any, path: Any, transform: Any, face: Any = None
) -> np.ndarray:
    return np.concatenate([_stroke(gc), _face(gc, face)])


def _collection(
    gc: Any,
    master: Any,
    paths: Any,
    transforms: Any,
    offsets: Any,
    offset_transform: Any,
    faces: Any,
    edges: Any,
    widths: Any,
    *rest: Any,
) -> np.ndarray:
    stroke = np.max(widths, initial=0.0) > 0
    return np.concatenate([_many(faces), _many(edges) if stroke else _NONE, _hatch(gc)])


def _mesh(
    gc: Any,
    master: Any,
    width: Any,
    height: Any,
    coordinates: Any,
    offsets: Any,
    offset_transform: Any,
    faces: Any,
    antialiased: Any,
    edges: Any,
) -> np.ndarray:
    return np.concatenate([_many(faces), _many(edges)])


def _triangles(gc: Any, points: Any, colors: Any, transform: Any) -> np.ndarray:
    return _many(colors)


def _image(gc: Any, x: Any, y: Any, image: Any, *rest: Any) -> np.ndarray:
    """An image's own colours are those of its map: only how opaque it is counts here."""
    alpha = np.asarray(image)[..., 3].max(initial=0) / 255
    return np.array([[0.0, 0.0, 0.0, alpha * gc._alpha]])


def _text_image(image: Any, x: Any, y: Any, angle: Any, gc: Any) -> np.ndarray:
    return np.array([gc._rgb], float).reshape(1, 4)


def _many(colors: Any) -> np.ndarray:
    return np.asarray(colors, float).reshape(-1, 4)


_READERS: dict[str, Any] = {
    "draw_path": _path,
    "draw_markers": _markers,
    "draw_path_collection": _collection,
    "draw_quad_mesh": _mesh,
    "draw_gouraud_triangle": _triangles,
    "draw_gouraud_triangles": _triangles,
    "draw_image": _image,
    "draw_text_image": _text_image,
}

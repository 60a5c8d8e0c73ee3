"""What of an artist can be seen: its colours, and whether it is in the view and has contrast.

Runs in the process of the untrusted script, for `recorder`. A series that nobody can see is no
chart type and no colour:

    invisible, alpha 0, no colour, no width, no data    no colours (`color_names`)
    outside the view, or smaller than three pixels      not in view (`in_view`)
    too faint to tell from the background,              doubtful (`_is_doubtful`): `Watch` looks
    clipped by the script, filtered                     whether its draw changes pixels, as it may
                                                        be drawn on something dark
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from matplotlib import cm, collections, colors, contour, figure, image, lines, patches, text
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.transforms import Bbox

CONTRAST = 16  # levels of 255 a pixel must change by to count as ink
_COLORS_PER_ARTIST = 32
_SMALLEST = 3.0  # pixels of width or height, and square pixels, that a mark must have
_EVERYWHERE = 1e9
_INK_PIXELS = 9  # that a doubtful artist must change
_MAX_WATCHED = 200  # doubtful artists of a draw that are looked at; those beyond show nothing


def color_names(artist: Artist) -> list[str]:
    """The distinct colours (or the colormap's name) an artist shows; empty when it is invisible."""
    alpha = artist.get_alpha()
    if not artist.get_visible() or (alpha is not None and np.max(alpha, initial=0) <= 0):
        return []
    if isinstance(artist, lines.Line2D):
        return _line_colors(artist)
    if isinstance(artist, patches.Patch):
        return _hex(artist.get_facecolor()) or (
            _hex(artist.get_edgecolor()) if artist.get_linewidth() > 0 else []
        )
    if isinstance(artist, collections.Collection):
        return _collection_colors(artist)
    if isinstance(artist, image.AxesImage):
        array = artist.get_array()
        if array is None or array.size == 0:
            return []
        return [_cmap_name(artist) if array.ndim == 2 else "rgb"]
    if isinstance(artist, text.Text):
        return _hex(artist.get_color()) if artist.get_text() else []
    return []


def _collection_colors(artist: collections.Collection) -> list[str]:
    array = artist.get_array()
    if array is not None and not (
        isinstance(artist, contour.ContourSet) and artist.colors is not None
    ):
        return [_cmap_name(artist)] if np.size(array) else []
    rgba = np.asarray(artist.get_facecolor())
    if rgba.size == 0 or not (rgba[:, 3] > 0).any():
        rgba = np.asarray(artist.get_edgecolor())
        if rgba.size == 0 or np.max(artist.get_linewidth(), initial=0) <= 0:
            return []
    if (
        hasattr(artist, "do_3d_projection")
        and not hasattr(artist, "get_offsets3d")
        and len(rgba) > _COLORS_PER_ARTIST
    ):
        rgba = rgba[:1]  # a shaded surface: one colour for all its faces
    rgba = np.unique(np.round(rgba[rgba[:, 3] > 0], 4), axis=0)[:_COLORS_PER_ARTIST]
    return sorted({name for row in rgba for name in _hex(row)})


def _cmap_name(artist: cm.ScalarMappable) -> str:
    """The name of its colormap, as 3.8.4 calls it."""
    name = artist.get_cmap().name
    # one that was given no name; "unnamed" in later releases
    return "from_list" if name == "unnamed" else name


def _line_colors(line: lines.Line2D) -> list[str]:
    """The colour of a line, or of its markers where these alone are drawn in other colours."""
    if not np.size(line.get_xdata(orig=False)):
        return []
    own = _hex(line.get_color())
    if _has_stroke(line):
        return own
    if not _has_markers(line):
        return []
    face, edge = _hex(line.get_markerfacecolor()), _hex(line.get_markeredgecolor())
    return own if own in (face, edge) else face or edge


def _has_stroke(line: lines.Line2D) -> bool:
    return line.get_linestyle() not in ("None", "", " ") and line.get_linewidth() > 0


def _has_markers(line: lines.Line2D) -> bool:
    return line.get_marker() not in ("None", "", " ", None) and line.get_markersize() > 0


def _hex(color: Any) -> list[str]:
    rgba = colors.to_rgba(color)
    return [colors.to_hex(rgba).upper()] if rgba[3] > 0 else []


def in_view(artist: Artist, ax: Any) -> bool:
    """Whether the artist is in the view of its axes and is not too small to see.

    Arrows, and everything in 3-D, are taken to be: their extents cannot be told from here. So is
    an artist without axes (`ax` is None).
    """
    if ax is None or ax.name == "3d" or isinstance(artist, patches.FancyArrowPatch | text.Text):
        return True
    low, high = _extents(artist)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        return False
    canvas = ax.figure.bbox
    box = Bbox.intersection(ax.bbox, canvas) if artist.get_clip_on() else canvas
    if box is None:
        return False
    size = np.minimum(high, np.add(box.max, 1)) - np.maximum(low, np.subtract(box.min, 1))
    if (size < 0).any():
        return False
    size = size + _reach(artist)
    return bool(size.max() >= _SMALLEST and size[0] * size[1] >= _SMALLEST)


def _extents(artist: Any) -> tuple[np.ndarray, np.ndarray]:
    """The corners (x, y) in pixels of the box around an artist's geometry.

    NaN where it has none, everything where it cannot be told.
    """
    if isinstance(artist, lines.Line2D):
        points: Any = artist.get_transform().transform(artist.get_xydata())
        return _bounds(points)
    if isinstance(artist, patches.Patch):
        outline: Any = artist.get_transform().transform_path(artist.get_path())
        return _bounds(outline.vertices)
    if isinstance(artist, collections.QuadMesh):
        corners: Any = artist.get_coordinates()
        return _bounds(artist.get_transform().transform(corners.reshape(-1, 2)))
    if isinstance(artist, image.AxesImage):
        box = artist.get_window_extent()
        return np.asarray(box.min), np.asarray(box.max)
    offsets = _bounds(
        artist.get_offset_transform().transform(np.ma.filled(artist.get_offsets(), np.nan))
    )
    if isinstance(artist, collections.PathCollection):
        return offsets
    if isinstance(artist, collections.TriMesh) or len(artist.get_transforms()):
        return np.full(2, -_EVERYWHERE), np.full(2, _EVERYWHERE)
    paths = [path.vertices for path in artist.get_paths()]
    low, high = _bounds(
        artist.get_transform().transform(np.concatenate(paths)) if paths else np.empty((0, 2))
    )
    return low + offsets[0], high + offsets[1]


def _bounds(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest coordinates of the finite points among [n, 2].

    NaN where there is none.
    """
    points = points[np.isfinite(points).all(-1)]
    if not len(points):
        return np.full(2, np.nan), np.full(2, np.nan)
    return points.min(0), points.max(0)


def _reach(artist: Artist) -> float:
    """How much wider than its geometry an artist is drawn, in pixels: its line, or its markers."""
    assert artist.figure is not None, "it was drawn"
    pixels = artist.figure.dpi / 72
    if isinstance(artist, lines.Line2D):
        marker = artist.get_markersize() if _has_markers(artist) else 0.0
        return pixels * max(marker, artist.get_linewidth() if _has_stroke(artist) else 0.0)
    if isinstance(artist, collections.PathCollection):
        marker = np.sqrt(np.max(artist.get_sizes(), initial=0.0))
        return pixels * marker + pixels * np.max(artist.get_linewidth(), initial=0.0)
    if isinstance(artist, collections.Collection):
        return pixels * np.max(artist.get_linewidth(), initial=0.0)
    if isinstance(artist, patches.Patch):
        return pixels * artist.get_linewidth() if _hex(artist.get_edgecolor()) else 0.0
    return 0.0


# ------------------------------------------------------------------------------------ faint artists


class Watch:
    """Looks at the draws of doubtful artists.

    Attributes:
      blank: ids of those that changed too few pixels.
    """

    def __init__(self, fig: figure.Figure, artists: Iterable[Artist]):
        self.blank: set[int] = set()
        self._watched: list[Any] = []
        for artist in artists:
            with contextlib.suppress(Exception):  # an artist of the script's own making
                if artist.figure is not None and _is_doubtful(artist, fig):
                    self.blank.add(id(artist))
                    if len(self._watched) < _MAX_WATCHED and "draw" not in vars(artist):
                        self._watched.append(artist)

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Around the draw of the figure."""
        for artist in self._watched:
            artist.draw = functools.partial(self._draw, artist, artist.draw)
        try:
            yield
        finally:
            for artist in self._watched:
                del artist.draw

    def _draw(self, artist: Artist, draw: Any, renderer: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(renderer, RendererAgg):
            return draw(renderer, *args, **kwargs)
        canvas = np.asarray(renderer.buffer_rgba())
        before = canvas.copy()
        result = draw(renderer, *args, **kwargs)
        if np.count_nonzero(changed(before, canvas)) >= _INK_PIXELS:
            self.blank.discard(id(artist))
        return result


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Which pixels differ visibly, bool [h, w]; uint8 [h, w, 4] each."""
    return ((np.maximum(before, after) - np.minimum(before, after)) > CONTRAST).any(-1)


def _is_doubtful(artist: Artist, fig: figure.Figure) -> bool:
    """Whether all of an artist's paint may be too faint, or be cut or filtered away.

    Faint is what hardly differs from the background of its axes.
    """
    if artist.get_agg_filter() is not None or _own_clip(artist):
        return True
    if artist.get_path_effects():
        return False
    alpha = artist.get_alpha()
    if (
        isinstance(artist, collections.Collection | image.AxesImage)
        and artist.get_array() is not None
    ):
        return alpha is not None and 255 * np.max(alpha, initial=0) <= CONTRAST
    ax = artist.axes
    behind: Any = fig
    if ax is not None and ax.axison and ax.get_frame_on() and ax.patch.get_visible():
        behind = ax
    ground = colors.to_rgba(behind.get_facecolor())
    paints = _paints(artist, fig.dpi / 72)
    return not any(_contrast(color, weight, ground) > CONTRAST for color, weight in paints)


def _own_clip(artist: Artist) -> bool:
    """Whether an artist is clipped to something else than its axes."""
    ax, box, path = artist.axes, artist.get_clip_box(), artist.get_clip_path()
    if ax is None or not artist.get_clip_on():
        return False
    if path is not None and vars(path).get("_patch") is not ax.patch:
        return True
    return box is not None and not np.allclose(box.bounds, ax.bbox.bounds, atol=1)


def _paints(artist: Artist, pixels: float) -> Iterator[tuple[Any, float]]:
    """(colour, how much of a pixel it covers where it is thinnest) of everything an artist draws.

    `pixels` is how many make one point, the unit of line widths.
    """
    own_alpha = artist.get_alpha()
    if isinstance(artist, lines.Line2D):
        alpha = 1.0 if own_alpha is None else own_alpha
        if _has_stroke(artist):
            yield artist.get_color(), alpha * artist.get_linewidth() * pixels
        if _has_markers(artist):
            yield artist.get_markerfacecolor(), alpha * artist.get_markersize() * pixels
            edge = min(artist.get_markersize(), artist.get_markeredgewidth())
            yield artist.get_markeredgecolor(), alpha * edge * pixels
    elif isinstance(artist, patches.Patch):
        yield artist.get_facecolor(), 1.0
        yield artist.get_edgecolor(), 1.0 if artist.get_hatch() else artist.get_linewidth() * pixels
    elif isinstance(artist, collections.Collection):
        width = 1.0 if artist.get_hatch() else np.max(artist.get_linewidth(), initial=0) * pixels
        for rgba in artist.get_facecolor()[:_COLORS_PER_ARTIST]:
            yield rgba, 1.0
        for rgba in artist.get_edgecolor()[:_COLORS_PER_ARTIST]:
            yield rgba, width
    elif isinstance(artist, text.Text):
        yield artist.get_color(), 1.0 if own_alpha is None else own_alpha
    else:
        yield "black", 1.0


def _contrast(color: Any, weight: float, ground: tuple[float, ...]) -> float:
    """By how many levels of 255 a colour changes a channel of the ground at most.

    The ground is on white; `weight` comes on top of the colour's own alpha.
    """
    *rgb, alpha = colors.to_rgba(color)
    *under, cover = ground
    shift = max(abs(x - (y * cover + 1 - cover)) for x, y in zip(rgb, under, strict=True))
    return 255 * min(1.0, weight) * alpha * shift

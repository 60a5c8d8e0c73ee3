"""The colours of an artist, by what it says of itself: a claim, which `ink` holds against paints.

Runs in the process of the untrusted script, for `recorder`.
"""

from typing import Any

import matplotlib
import numpy as np
from matplotlib import cm, collections, colors, contour, image, lines, patches, table, text
from matplotlib.artist import Artist

_COLORS_PER_ARTIST = 32


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
    if isinstance(artist, table.Table):
        faces = {
            name for cell in artist.get_celld().values() for name in _hex(cell.get_facecolor())
        }
        return sorted(faces)[:_COLORS_PER_ARTIST]
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
    """The name of its colormap, as 3.8.4 calls it.

    "from_list" for one without a name, and for one that has the name of another map.
    """
    cmap = artist.get_cmap()
    # "unnamed" in later releases
    return "from_list" if cmap.name == "unnamed" or not _is_genuine(cmap) else cmap.name


def _is_genuine(cmap: Any) -> bool:
    """Whether a colormap with the name of one of matplotlib's has that one's colours."""
    if cmap.name not in matplotlib.colormaps:
        return True
    own = cmap(np.linspace(0, 1, 16))[:, :3]
    # with fewer steps, its colours are some of the original's
    original = matplotlib.colormaps[cmap.name](np.linspace(0, 1, 256))[:, :3]
    distance = np.abs(own[:, None] - original[None]).max(-1).min(-1)
    return bool(distance.max() < 0.05)


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

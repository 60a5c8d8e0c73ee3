"""Which texts of a picture can be read.

A text counts where it changed enough pixels visibly when it was drawn, where these are still there
when the figure is finished and differ from what is around them, and where no other text runs
through it:

    size      5 pixels of font size at least
    ink       3 % of the square of the font size for each character that is not thin, in pixels
              that differ by more than 32 levels from what was there; an ordinary character covers
              a tenth
    crossing  pixels of other texts among its letters, less than half as many as its own; texts of
              half its contrast (a watermark) and the same words (a shadow) do not count

Used by the recorder in the process of the script, and by a replay.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmrecoder_jax.env.child.ink import changed, difference

MIN_PIXELS = 5.0  # font size below which nobody reads a text
_CONTRAST = 32  # levels of 255 by which a text must differ from what is behind it
_INK = 0.03  # share of a square of its font size that a character must cover
_THIN = frozenset(".,:;'`\"|!il1()[]-_~^/\\ \t")  # characters that cover less
_OUTLINE = 0.5  # share of the pixels around it that must differ from it
_AMONG = 0.25  # of the font size: so near to a letter, ink of another text confuses it
_CROSSED = 0.5  # ink of other texts among the letters, as a share of their own
_FAINT = 0.5  # share of a text's contrast below which another text does not disturb it

Area = tuple[slice, slice]  # rows, columns


class Lettering:
    """A line of text that was just drawn.

    Args:
      s: the line.
      size: of its font, in pixels.
      needed: how many of its pixels must show.
      area: the part of the canvas that it can touch.
      before, after: that part of the canvas, uint8 [h, w, 4].
    """

    def __init__(
        self, s: str, size: float, needed: int, area: Area, before: np.ndarray, after: np.ndarray
    ):
        self.s, self.size, self.needed, self.area = s, size, needed, area
        self.ink = changed(before, after, _CONTRAST)
        self.pixels = int(np.count_nonzero(self.ink))
        self.then = after.copy()
        inked = difference(before[self.ink], after[self.ink])
        self.contrast = float(inked.mean()) if self.pixels else 0.0

    def has_ink(self) -> bool:
        """Whether it can be seen where it was just drawn."""
        return self.pixels >= self.needed

    def is_left(self, canvas: np.ndarray) -> bool:
        """Whether enough of its ink is there in the finished picture, uint8 [H, W, 4]."""
        window = canvas[self.area]
        if np.array_equal(self.then, window):
            return True
        left = self.ink & ~changed(self.then, window)
        if int(np.count_nonzero(left)) < self.needed:
            return False
        # what is around it may have been painted in its colour
        around = _grown(self.ink, 2) & ~self.ink
        color = np.median(window[left], axis=0).astype(np.uint8)
        differs = difference(window[around], np.broadcast_to(color, (int(around.sum()), 4)))
        outline = int(np.count_nonzero(differs > _CONTRAST))
        return outline >= _OUTLINE * int(np.count_nonzero(around))

    def is_crossed(self, others: Sequence["Lettering"]) -> bool:
        """Whether these texts run through it."""
        foreign = np.zeros_like(self.ink)
        rows, columns = self.area
        for other in others:
            theirs = other.area
            top, bottom = max(rows.start, theirs[0].start), min(rows.stop, theirs[0].stop)
            left, right = max(columns.start, theirs[1].start), min(columns.stop, theirs[1].stop)
            foreign[
                top - rows.start : bottom - rows.start, left - columns.start : right - columns.start
            ] |= other.ink[
                top - theirs[0].start : bottom - theirs[0].start,
                left - theirs[1].start : right - theirs[1].start,
            ]
        if not foreign.any():
            return False
        among = foreign & _grown(self.ink, max(1, round(_AMONG * self.size)))
        return int(np.count_nonzero(among)) >= _CROSSED * self.pixels


def readable(texts: Sequence[Lettering], canvas: np.ndarray) -> list[str]:
    """The lines that can be read in the finished picture, uint8 [H, W, 4], in their order."""
    left = [text for text in texts if text.is_left(canvas)]
    areas = np.array(
        [(r.start, r.stop, c.start, c.stop) for r, c in (text.area for text in left)], np.int64
    ).reshape(-1, 4)
    lines = []
    for text, (top, bottom, start, stop) in zip(left, areas, strict=True):
        meets = (areas[:, 0] < bottom) & (top < areas[:, 1])
        meets &= (areas[:, 2] < stop) & (start < areas[:, 3])
        others = [
            left[number]
            for number in np.flatnonzero(meets)
            if left[number].s != text.s and left[number].contrast > _FAINT * text.contrast
        ]
        if not (others and text.is_crossed(others)):
            lines.append(text.s)
    return lines


def _grown(mask: np.ndarray, by: int) -> np.ndarray:
    """bool [h, w]: where the mask is within `by` pixels, across and down."""
    sums = np.pad(mask, ((by + 1, by), (by + 1, by))).astype(np.int32).cumsum(0).cumsum(1)
    side = 2 * by + 1
    below, right = sums[side:, side:] - sums[:-side, side:], sums[side:, :-side]
    return below - right + sums[:-side, :-side] > 0


def text_size(renderer: Any, prop: Any) -> float:
    """The font size of a text in pixels."""
    return float(renderer.points_to_pixels(prop.get_size_in_points()))


def pixels_needed(s: str, ismath: bool, size: float) -> int:
    """How many pixels of a text must show for it to count.

    A part of what its characters cover, so that a sliver of them is not enough.

    Args:
      size: of the font, in pixels.
    """
    if ismath:  # about one in six characters of its source is drawn
        return max(4, int(_INK * size**2 * len(s) / 6))
    return max(sum(_needed(c, size) for c in s), 1)


def _needed(character: str, size: float) -> int:
    if character in _THIN:
        return int(not character.isspace())
    return max(1, int(_INK * size**2))


def text_area(renderer: Any, x: float, y: float, s: str, prop: Any, angle: float) -> Area:
    """The part of a renderer's canvas that the text `s` can touch at most.

    Args:
      x, y: where its baseline starts, in pixels from the left and from the top.
      angle: in degrees, counter-clockwise around that point.
    """
    size = prop.get_size_in_points() * renderer.dpi / 72
    right, up, down = size * (len(s) + 1), 2.5 * size, 1.5 * size
    if angle:
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        corners = [
            (u * cos + v * sin, -u * sin + v * cos) for u in (-size, right) for v in (-up, down)
        ]
        left, right = min(c[0] for c in corners), max(c[0] for c in corners)
        up, down = -min(c[1] for c in corners), max(c[1] for c in corners)
    else:
        left = -size
    height, width = int(renderer.height), int(renderer.width)
    return (
        _within(y - up, y + down + 1, height),
        _within(x + left, x + right + 1, width),
    )


def _within(start: float, stop: float, size: int) -> slice:
    first = min(max(int(start), 0), size)
    return slice(first, min(max(int(stop), first), size))

"""ChartMimic's low-level metrics from two records (Shi et al. 2024, section 4).

They are the F1 of text, layout, chart type and colour. This compares plain data and runs no model
code. The two modes differ in what the records hold (`child.recorder`, `child.chartmimic_recorder`)
and here in two rules:

                            official                        training
    both sides empty        0                               says nothing: the mean of the others,
                                                            1 where all are empty
    more than 10 colours    thinned out until all differ,   all of them count
                            in sorted order

Each part is the F1 of a matching: P = n / |generated|, R = n / |target|, F1 = 2PR / (P + R), where
n is the size of the multiset intersection (text, layout, type), or the largest total similarity of
a one-to-one assignment inside each group of colours. Two hex colours are max(0, 1 - dE00 / 100)
alike, two colormaps 1 or 0, a colour and a colormap 0. The official evaluator tries every
permutation; `linear_sum_assignment` finds the same maximum in microseconds.
"""

import dataclasses
import enum
import functools
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmrecoder_jax.env.records import Record
from mmrecoder_jax.env.wire import Part

_HEX = re.compile(r"#[0-9A-Fa-f]{6}([0-9A-Fa-f]{2})?\Z")
_FILTER_ABOVE, _FILTER_SIMILARITY = 10, 0.7
_EXACT_PAIRS = 1 << 20  # colours of one side times colours of the other
_BLOCK = 512  # most colours of a side in a block of what is larger
_ROWS_TIMES_COLUMNS = 1 << 16  # similarities computed at one time


class ScoreMode(enum.StrEnum):
    """Whose rules count."""

    TRAINING = "training"  # a reward: without what is noisy, wrong or cheap to get
    OFFICIAL = "official"  # the benchmark's numbers, defects included


@dataclasses.dataclass(frozen=True)
class Scores:
    """The four F1 scores, each in [0, 1]; the fields are those of `wire.Part`. All are NaN where
    there is nothing to compare with.
    """

    text: float = 0.0
    layout: float = 0.0
    type: float = 0.0
    color: float = 0.0

    @property
    def known(self) -> bool:
        """Whether there was a target's record to compare with."""
        return not math.isnan(self.overall)

    @property
    def overall(self) -> float:
        """The mean of the four (ChartMimic's low-level average, divided by 100)."""
        return (self.text + self.layout + self.type + self.color) / 4


def score(record: Record | None, target: Record | None, mode: str = ScoreMode.TRAINING) -> Scores:
    """Scores what a script drew against its target.

    Args:
      record: of the generated script; None (it made no picture) scores zero on every part.
      target: of the reference script, recorded in the same mode; None (a picture alone) makes every
        part NaN.
      mode: one of `ScoreMode`.

    Raises:
      ValueError: `mode` is unknown.
    """
    if mode not in tuple(ScoreMode):
        raise ValueError(f"mode is {mode!r}; choose one of {', '.join(ScoreMode)}")
    if target is None:
        return Scores(**dict.fromkeys(Part, math.nan))
    if record is None:
        return Scores()
    generated_colors: Sequence[str] = record.colors
    target_colors: Sequence[str] = target.colors
    if mode == ScoreMode.OFFICIAL:
        generated_colors = distinct_colors(generated_colors)
        target_colors = distinct_colors(target_colors)
    parts = {
        Part.TEXT: _count_f1(Counter(record.texts), Counter(target.texts)),
        Part.LAYOUT: _count_f1(Counter(record.layout), Counter(target.layout)),
        Part.TYPE: _count_f1(Counter(record.types), Counter(target.types)),
        Part.COLOR: _f1(
            matched_similarity(generated_colors, target_colors),
            len(generated_colors),
            len(target_colors),
        ),
    }
    known = [value for value in parts.values() if value is not None]
    others = sum(known) / len(known) if known else 1.0
    both_empty = others if mode == ScoreMode.TRAINING else 0.0
    return Scores(**{part: both_empty if x is None else x for part, x in parts.items()})


def _count_f1(generated: Counter, target: Counter) -> float | None:
    return _f1((generated & target).total(), generated.total(), target.total())


def _f1(matched: float, generated: int, target: int) -> float | None:
    """None where both sides are empty."""
    if not generated and not target:
        return None
    if matched <= 0:
        return 0.0
    precision, recall = matched / generated, matched / target
    return 2 * precision * recall / (precision + recall)


# ------------------------------------------------------------------------------------------- colour


def matched_similarity(generated: Sequence[str], target: Sequence[str]) -> float:
    """The largest total similarity of a one-to-one assignment of colours "<group>--<color>".

    Colours are only ever matched within their group, so 1.47 here (red is 0.47 similar to blue):

        generated    bar--#FF0000  bar--#0000FF  plot--#FF0000
        target       bar--#FF0000                plot--#0000FF

    Time and memory are bounded for what a script can claim: see `_best_total`.
    """
    if sorted(generated) == sorted(target):
        return float(len(target))
    ours, theirs = _groups(generated), _groups(target)
    total = 0.0
    for group in sorted(ours.keys() & theirs.keys()):
        # A colormap is like itself alone, so the best assignment has two independent parts.
        (our_names, our_labs), (their_names, their_labs) = ours[group], theirs[group]
        total += (our_names & their_names).total() + _best_total(our_labs, their_labs)
    return total


def distinct_colors(entries: Sequence[str]) -> list[str]:
    """The official thinning of more than 10 entries.

    Each is kept if it is at most 0.7 similar to all kept before it, in any group. The official
    order is that of a Python set of strings, which changes with the hash seed; ours is
    the sorted one. Each kept colour is compared with those after it; there can be some dozens of
    colours so different from each other, so time and memory grow with the number of entries alone.
    """
    entries = sorted(entries)
    if len(entries) <= _FILTER_ABOVE:
        return entries
    names = [_split(entry)[1] for entry in entries]
    labs = np.array([_lab(name) for name in names], np.float64)
    is_hex = ~np.isnan(labs[:, 0])
    first_of_name = {name: i for i, name in reversed(list(enumerate(names)))}
    kept = [i for i, name in enumerate(names) if not is_hex[i] and first_of_name[name] == i]
    left = np.flatnonzero(is_hex)
    while len(left):
        kept.append(int(left[0]))
        similar = _similarity(labs[left[1:]], labs[left[:1]])[:, 0]
        left = left[1:][similar <= _FILTER_SIMILARITY]
    return [entries[i] for i in sorted(kept)]


def _groups(entries: Sequence[str]) -> dict[str, tuple[Counter[str], np.ndarray]]:
    """Of each group the names of its colormaps, and the L*a*b* of its colours `[n, 3]`."""
    by_group: dict[str, list[str]] = {}
    for entry in entries:
        group, color = _split(entry)
        by_group.setdefault(group, []).append(color)
    return {
        group: (
            Counter(color for color in colors if not _HEX.match(color)),
            np.array([_lab(color) for color in colors if _HEX.match(color)]).reshape(-1, 3),
        )
        for group, colors in by_group.items()
    }


def _best_total(a: np.ndarray, b: np.ndarray) -> float:
    """The largest total similarity of an assignment of L*a*b* colours `[n, 3]` to `[m, 3]`.

    It is exact up to 2**20 pairs, which is four times what our recorder lists on both sides, and
    what takes seconds at worst. Only a forged record has more. Then colours are assigned inside
    blocks of alike lightness: a total that the best one exceeds by some per cent, in a time and a
    memory that grow with the number of colours alone.
    """
    if len(a) * len(b) <= _EXACT_PAIRS:
        return _best_total_of_block(a, b)
    blocks = math.ceil(max(len(a), len(b)) / _BLOCK)
    ours, theirs = (np.array_split(side[np.lexsort(side.T[::-1])], blocks) for side in (a, b))
    return sum(map(_best_total_of_block, ours, theirs))


def _best_total_of_block(a: np.ndarray, b: np.ndarray) -> float:
    similarity = _similarity(a, b)
    return float(similarity[linear_sum_assignment(similarity, maximize=True)].sum())


def similarities(a: Sequence[str], b: Sequence[str]) -> np.ndarray:
    """Similarity in [0, 1] of every colour in `a` with every one in `b`, float64 [len(a), len(b)].

    A colour is "#RRGGBB" (or "#RRGGBBAA", alpha ignored) or a colormap's name.
    """
    lab_a, lab_b = (
        np.array([_lab(color) for color in side], np.float64).reshape(-1, 3) for side in (a, b)
    )
    similarity = _similarity(lab_a, lab_b)
    names_a, names_b = np.isnan(lab_a[:, 0]), np.isnan(lab_b[:, 0])
    if names_a.any() or names_b.any():
        equal = np.array([[x == y for y in b] for x in a], np.float64).reshape(similarity.shape)
        similarity = np.where(names_a[:, None] | names_b[None], equal, similarity)
    return similarity


def _similarity(lab_a: np.ndarray, lab_b: np.ndarray) -> np.ndarray:
    """Similarity of L*a*b* colours `[n, 3]` and `[m, 3]`, float64 `[n, m]`; NaN where an input is.

    Some rows at a time: CIEDE2000 needs thirty arrays of the size of its result.
    """
    similarity = np.empty((len(lab_a), len(lab_b)))
    rows = max(1, _ROWS_TIMES_COLUMNS // max(1, len(lab_b)))
    for i in range(0, len(lab_a), rows):
        delta = _delta_e(lab_a[i : i + rows, None], lab_b[None])
        similarity[i : i + rows] = np.maximum(0.0, 1.0 - delta / 100.0)
    return similarity


def _split(entry: str) -> tuple[str, str]:
    parts = entry.split("--")
    return parts[0], parts[1] if len(parts) > 1 else ""


@functools.lru_cache(65536)
def _lab(color: str) -> tuple[float, float, float]:
    """CIE L*a*b* (D65, 2 degrees) of a hex colour; NaNs for a colormap's name.

    The constants are those of colormath 3.0.0, which the official evaluator uses.
    """
    if not _HEX.match(color):
        return (np.nan, np.nan, np.nan)
    channels = (int(color[i : i + 2], 16) / 255.0 for i in (1, 3, 5))
    r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in channels)
    x = (0.412424 * r + 0.357579 * g + 0.180464 * b) / 0.95047
    y = 0.212656 * r + 0.715158 * g + 0.0721856 * b
    z = (0.0193324 * r + 0.119193 * g + 0.950444 * b) / 1.08883
    fx, fy, fz = (
        v ** (1.0 / 3.0) if v > 216.0 / 24389.0 else 7.787 * v + 16.0 / 116.0 for v in (x, y, z)
    )
    return (116.0 * fy - 16.0, 500.0 * (fx - fy), 200.0 * (fy - fz))


def _delta_e(lab_a: np.ndarray, lab_b: np.ndarray) -> np.ndarray:
    """CIEDE2000 difference (kL = kC = kH = 1) of L*a*b* colours [..., 3], broadcast.

    NaN where an input is.

    Sharma, Wu and Dalal (2005) with colormath's mean hue: 360 is added when the hues are over 180
    degrees apart, never subtracted.
    """
    l1, a1, b1 = np.moveaxis(lab_a, -1, 0)
    l2, a2, b2 = np.moveaxis(lab_b, -1, 0)
    mean_c7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2.0) ** 7
    stretch = 1.0 + 0.5 * (1.0 - np.sqrt(mean_c7 / (mean_c7 + 25.0**7)))
    a1, a2 = stretch * a1, stretch * a2
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = np.degrees(np.arctan2(b1, a1)) % 360.0, np.degrees(np.arctan2(b2, a2)) % 360.0
    mean_l, mean_c = (l1 + l2) / 2.0, (c1 + c2) / 2.0
    turn = h2 - h1
    far = np.abs(turn) > 180.0
    mean_h = (h1 + h2 + 360.0 * far) / 2.0
    turn = np.where(far, turn - 360.0 * np.sign(turn), turn)
    dl, dc = l2 - l1, c2 - c1
    dh = 2.0 * np.sqrt(c1 * c2) * np.sin(np.radians(turn) / 2.0)
    t = (
        1.0
        - 0.17 * np.cos(np.radians(mean_h - 30.0))
        + 0.24 * np.cos(np.radians(2.0 * mean_h))
        + 0.32 * np.cos(np.radians(3.0 * mean_h + 6.0))
        - 0.20 * np.cos(np.radians(4.0 * mean_h - 63.0))
    )
    offset = (mean_l - 50.0) ** 2
    s_l = 1.0 + 0.015 * offset / np.sqrt(20.0 + offset)
    s_c, s_h = 1.0 + 0.045 * mean_c, 1.0 + 0.015 * mean_c * t
    mean_c7 = mean_c**7
    r_t = (
        -2.0
        * np.sqrt(mean_c7 / (mean_c7 + 25.0**7))
        * np.sin(np.radians(60.0 * np.exp(-(((mean_h - 275.0) / 25.0) ** 2))))
    )
    dl, dc, dh = dl / s_l, dc / s_c, dh / s_h
    return np.sqrt(np.maximum(dl * dl + dc * dc + dh * dh + r_t * dc * dh, 0.0))

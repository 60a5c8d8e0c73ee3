"""Chart2Code's code-level F1 (arXiv 2510.17932): eight numbers from two records.

No model code runs in this process. The scores are those of the official evaluators, defects
included (docs/evaluation.md lists them), but for what depends on Python's hash seed: palettes are
numbered in sorted order here, in the order of a set there.

    color     weight * (1 - RGB distance / the largest) summed where class and key agree
    layout    multiset of grid cells        grid   multiset of (x, y) visible
    legend    equal texts whose legends' boxes overlap
    data      parameters of lines, rectangles, polygons and collections: coordinates and sizes
    visual    their other parameters (styles, markers, widths, alpha)
    text      per class, each generated text takes the nearest left of the reference
    type      set of names

Each is 2PR / (P + R) with P over the generated side and R over the reference's; 1 where both are
empty. A mean is over pairs that both run: a crash scores nothing, and is in the pass rate alone.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping

from mmrecoder_jax.benchmarks.chartmimic_official import TargetFailed
from mmrecoder_jax.env.pools import Pools
from mmrecoder_jax.env.records import Chart2CodeRecord, Value
from mmrecoder_jax.env.wire import RecordKind

NAMES = ("color", "grid", "layout", "legend", "data", "visual", "text", "type")
SECONDS = 60.0  # the official limit of a script
_WEIGHTS = {
    **dict.fromkeys(("patch_face", "line_color", "scatter_color", "text_color"), 1.0),
    **{"scatter_palette": 0.7, "title": 0.05, "axis_label": 0.05},
    **dict.fromkeys(("patch_edge", "axes_bg", "figure_bg"), 0.01),
}
_DATA = ("xdata", "ydata", "offsets", "xy", "verts", "width", "height", "sizes")
_FARTHEST = math.sqrt(3 * 255**2)  # of two colours
_NEVER_ALIKE = "axes_bg"  # its keys are addresses: those of two figures differ


def f1_scores(generated: Chart2CodeRecord, target: Chart2CodeRecord) -> dict[str, float]:
    """The scores by `NAMES`, in [0, 1]."""
    data, visual = _parameters(generated, target)
    return {
        "color": _color(generated.colors, target.colors),
        "grid": _multiset(generated.grids, target.grids),
        "layout": _multiset(generated.layout, target.layout),
        "legend": _legend(generated, target),
        "data": data,
        "visual": visual,
        "text": _text(generated.texts, target.texts),
        "type": _multiset(generated.types, target.types),
    }


def chart2code_pair(
    pools: Pools, gt_code: str, gen_code: str | None
) -> tuple[bool, dict[str, float] | None]:
    """Whether the generated script leaves a figure, and its scores; None where it leaves none.

    Raises:
      TargetFailed: the reference script leaves none.
    """
    target_run = pools.references.submit(gt_code, RecordKind.CHART2CODE)
    run = pools.answers.submit(gen_code, RecordKind.CHART2CODE)
    target = target_run.result().record
    if target is None:
        raise TargetFailed(f"the reference script failed: {target_run.result().error}")
    record = run.result().record
    return record is not None, None if record is None else f1_scores(record, target)


def _f1(matched: float, generated: float, target: float) -> float:
    """1 where both sides are empty."""
    if not generated and not target:
        return 1.0
    if not generated or not target or matched <= 0:
        return 0.0
    precision, recall = min(1.0, matched / generated), min(1.0, matched / target)
    return 2 * precision * recall / (precision + recall)


def _multiset(generated: Iterable[Hashable], target: Iterable[Hashable]) -> float:
    ours, theirs = Counter(generated), Counter(target)
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


Colors = Mapping[str, Mapping[str, str]]


def _color(generated: Colors, target: Colors) -> float:
    def weight(colors: Colors) -> float:
        return sum(_WEIGHTS.get(kind, 0.1) * len(own) for kind, own in colors.items())

    matched = 0.0
    for kind in generated.keys() & target.keys() - {_NEVER_ALIKE}:
        ours, theirs = generated[kind], target[kind]
        alike = sum(_alike(ours[key], theirs[key]) for key in ours.keys() & theirs.keys())
        matched += _WEIGHTS.get(kind, 0.1) * alike
    return _f1(matched, weight(generated), weight(target))


def _alike(one: str, other: str) -> float:
    if one == other:
        return 1.0
    try:
        a, b = (
            [int(color.lstrip("#")[i : i + 2], 16) for i in (0, 2, 4)] for color in (one, other)
        )
    except ValueError:  # a transparent entry of a palette
        return 0.0
    return 1 - math.dist(a, b) / _FARTHEST


def _legend(generated: Chart2CodeRecord, target: Chart2CodeRecord) -> float:
    left = list(target.legends)
    matched = 0
    for text, *box in generated.legends:
        for index, (other, *other_box) in enumerate(left):
            if other == text and _overlap(box, other_box):
                del left[index]
                matched += 1
                break
    return _f1(matched, len(generated.legends), len(target.legends))


def _overlap(a: list[float], b: list[float]) -> bool:
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


# --------------------------------------------------------------------------------------------- text


def _text(generated: Mapping[str, tuple[str, ...]], target: Mapping[str, tuple[str, ...]]) -> float:
    matched = 0.0
    for kind in generated.keys() & target.keys():
        left = list(target[kind])
        for text in generated[kind]:
            if not left:
                break
            scores = [ratio(text, other) for other in left]
            best = max(range(len(left)), key=scores.__getitem__)  # the first of several
            matched += scores[best]
            del left[best]
    counts = (sum(map(len, texts.values())) for texts in (generated, target))
    return _f1(matched, *counts)


def ratio(one: str, other: str) -> float:
    """`Levenshtein.ratio`: twice the longest common subsequence over the sum of the lengths.

    >>> ratio("rain", "train"), ratio("abc", "xyz")
    (0.8888888888888888, 0.0)
    """
    if one == other:
        return 1.0
    places: dict[str, int] = {}
    for place, character in enumerate(one):
        places[character] = places.get(character, 0) | 1 << place
    # A row of the table as bits (Hyyrö 2004): a zero is a step of the subsequence's length.
    row = full = (1 << len(one)) - 1
    for character in other:
        hit = row & places.get(character, 0)
        row = ((row + hit) | (row - hit)) & full
    common = len(one) - row.bit_count()
    return 2 * common / (len(one) + len(other))


# --------------------------------------------------------------------------------------- parameters


def _parameters(generated: Chart2CodeRecord, target: Chart2CodeRecord) -> tuple[float, float]:
    """(data F1, visual F1): elements of the reference in order take the most alike that is left."""
    left = list(generated.elements)
    matched = {True: 0.0, False: 0.0}  # by whether a parameter is data
    for kind, wanted in target.elements:
        best, best_score = None, -1.0
        for index, (other, values) in enumerate(left):
            if other != kind:
                continue
            score = sum(_same(value, values.get(name)) for name, value in wanted.items())
            if score > best_score:
                best, best_score = index, score
        if best is None:
            continue
        _, values = left.pop(best)
        for name in wanted.keys() | values.keys():
            matched[name in _DATA] += _same(wanted.get(name), values.get(name))

    def count(record: Chart2CodeRecord, is_data: bool) -> int:
        return sum((name in _DATA) == is_data for _, values in record.elements for name in values)

    data, visual = (
        _f1(matched[is_data], count(generated, is_data), count(target, is_data))
        for is_data in (True, False)
    )
    return data, visual


def _same(one: Value, other: Value) -> float:
    """How alike two parameters are: of lists, the Jaccard index of their distinct numbers."""
    if one is None or other is None:
        return float(one is None and other is None)
    if len(one) != len(other) or not one:
        return 0.0
    if len(one) == 1:
        return _same_scalar(one[0], other[0])
    (ours, our_texts, filled), (theirs, their_texts, other_filled) = one, other
    if not filled or not other_filled:
        return float(filled == other_filled)
    if ours is None or theirs is None:
        return _jaccard(our_texts, their_texts)
    # NaN is one value of the union and in no intersection.
    return _jaccard(
        frozenset(x for x in ours if not math.isnan(x)),
        frozenset(x for x in theirs if not math.isnan(x)),
        any(map(math.isnan, ours | theirs)),
    )


def _same_scalar(one: float | str, other: float | str) -> float:
    if isinstance(one, float) and isinstance(other, float):
        # as numpy.isclose: relative to the second
        if not (math.isfinite(one) and math.isfinite(other)):
            return float(one == other)
        return float(abs(one - other) <= 1e-8 + 1e-5 * abs(other))
    return float(isinstance(one, str) and one == other)


def _jaccard(one: frozenset, other: frozenset, more: bool = False) -> float:
    union = len(one | other) + more
    return len(one & other) / union if union else 1.0

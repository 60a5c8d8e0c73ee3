"""Chart2Code's F1: numbers worked out by hand, and its evaluators' known defects in executors."""

import dataclasses
import json
import math

import pytest

from mmrecoder_jax.benchmarks.chart2code import NAMES, chart2code_pair, f1_scores, ratio
from mmrecoder_jax.benchmarks.chartmimic_official import TargetFailed
from mmrecoder_jax.env.records import Chart2CodeRecord
from mmrecoder_jax.env.wire import RecordKind

EMPTY = {
    "colors": [],
    "layout": [],
    "grids": [],
    "legends": [],
    "elements": [],
    "texts": {},
    "types": [],
}


def record(**parts) -> Chart2CodeRecord:
    return Chart2CodeRecord.from_json(json.loads(json.dumps(EMPTY | parts)))


def scores(name, ours, theirs):
    part = {"data": "elements", "visual": "elements"}.get(name)
    part = part or {"color": "colors", "layout": "layout"}.get(name) or f"{name}s"
    return f1_scores(record(**{part: ours}), record(**{part: theirs}))[name]


def test_nothing_against_nothing_is_1():
    assert f1_scores(record(), record()) == dict.fromkeys(NAMES, 1.0)


def test_colours_are_compared_where_class_and_key_agree():
    ours = [["line_color", "a", "#FF0000"], ["line_color", "b", "#00FF00"]]
    theirs = [["line_color", "a", "#FE0000"], ["patch_face", "b", "#00FF00"]]
    alike = 1 - 1 / math.sqrt(3 * 255**2)
    assert scores("color", ours, theirs) == pytest.approx(alike / 2)
    weights = 1 + 0.05 + 0.01
    rest = [["title", "title", "#000000"], ["axes_bg", "ax_0", "#FFFFFF"]]
    # The background of an axes weighs and is never the same.
    assert scores("color", [ours[0], *rest], [ours[0], *rest]) == pytest.approx(1.05 / weights)


@pytest.mark.parametrize(
    "name, ours, theirs, expected",
    [
        ("type", ["bar", "line"], ["line"], 2 / 3),
        ("type", ["bar"], [], 0.0),
        ("grid", [[True, False], [True, False]], [[True, False], [True, True]], 1 / 2),
        ("layout", [[1, 2, 0, 0, 0, 0]], [[1, 2, 0, 0, 0, 0], [1, 2, 0, 0, 1, 1]], 2 / 3),
        # Equal texts whose legends' boxes overlap at all.
        ("legend", [["a", 0, 0, 2, 2]], [["a", 1, 1, 3, 3]], 1.0),
        ("legend", [["a", 0, 0, 1, 1]], [["a", 1, 1, 3, 3]], 0.0),
        ("legend", [["a", 0, 0, 2, 2]], [["b", 0, 0, 2, 2]], 0.0),
        # Per class; each generated text takes the nearest that is left.
        ("text", {"title": ["rain"]}, {"title": ["train"]}, 8 / 9),
        ("text", {"title": ["Rain"]}, {"xlabel": ["Rain"]}, 0.0),
        ("text", {"title": ["ab", "b"]}, {"title": ["b", "c"]}, (2 / 3) / 2),
    ],
)
def test_parts_by_hand(name, ours, theirs, expected):
    assert scores(name, ours, theirs) == pytest.approx(expected)


def line(x, style="-", width=1.5):
    numbers = ["list", x, [str(v) for v in x], bool(x)]
    return [
        "line",
        {"xdata": numbers, "linestyle": ["text", style], "linewidth": ["number", width]},
    ]


def test_parameters_by_hand():
    ours, theirs = [line([1, 2, 3])], [line([1, 2, 4], "--")]
    assert scores("data", ours, theirs) == pytest.approx(2 / 4)
    assert scores("visual", ours, theirs) == pytest.approx(1 / 2)
    # The first reference takes the most alike; a kind of its own matches nothing.
    two = [line([4, 5]), line([1, 2])]
    assert scores("data", two, [line([1, 2]), line([4, 5])]) == 1.0
    other = ["collection", {"alpha": None, "offsets": ["list", [1], ["1"], True]}]
    assert scores("data", [line([1])], [other]) == 0.0
    assert scores("visual", [other], [other]) == 1.0


def test_numbers_are_equal_as_numpy_says():
    def width(value):
        return [["rectangle", {"width": ["number", value]}]]

    assert scores("data", width(1.0), width(1.000009)) == 1.0
    assert scores("data", width(1.0), width(1.1)) == 0.0
    assert scores("data", width("nan"), width("nan")) == 0.0
    assert scores("data", width("inf"), width("inf")) == 1.0
    nan = [["line", {"xdata": ["list", [1, "nan"], ["1", "nan"], True]}]]
    assert scores("data", nan, nan) == 1 / 2  # one value of the union, in no intersection
    mixed = [["line", {"xdata": ["list", None, ["1", "Jan"], True]}]]
    assert scores("data", mixed, [["line", {"xdata": ["list", [1], ["1"], True]}]]) == 1 / 2


def test_the_ratio_is_that_of_the_longest_common_subsequence():
    def slow(a, b):
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = (
                    table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
                )
        return 2 * table[-1][-1] / (len(a) + len(b))

    words = ["a", "ab", "ba", "abcabba", "cbabac", "Rain in mm", "rain", "mm in Rain", "xyz" * 30]
    for one in words:
        for other in words:
            assert ratio(one, other) == pytest.approx(slow(one, other)), (one, other)


def draw(pool, code):
    execution = pool.submit(code, RecordKind.CHART2CODE).result()
    assert execution.record is not None, execution.error
    return execution.record


HEAD = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\n"
CHART = HEAD + (
    'ax.bar(["Jan", "Feb"], [3, 5], color="red", label="Rain")\n'
    'ax.plot([0, 1], [2, 4], "b--", label="Snow")\n'
    'ax.set_title("Rain")\nax.legend()\nax.grid(axis="y")\nax.text(0, 1, "here", color="green")\n'
)


def test_what_is_recorded_of_a_chart(pool):
    found = draw(pool, CHART + 'plt.savefig("x.png")\nplt.show()')
    assert found.types == {"bar", "line"}
    assert found.colors["patch_face"] == {
        "Rain": "#FF0000",
        "Jan": "#FF0000",
        "Feb": "#FF0000",
    }
    assert found.colors["line_color"] == {"Snow": "#0000FF"}
    assert found.colors["text_color"] == {"here": "#008000"}
    assert found.layout == ((1, 1, 0, 0, 0, 0),) and found.grids == ((False, True),)
    assert sorted(entry[0] for entry in found.legends) == ["Rain", "Snow"]
    assert found.texts["title"] == ("Rain",) and found.texts["annotation"] == ("here",)
    assert {"Jan", "Feb"} <= set(found.texts["tick_label"])
    kinds = [kind for kind, _ in found.elements]
    assert kinds == ["line", "rectangle", "rectangle"]
    assert found.elements[0][1]["linestyle"] == ("--",)
    assert found.elements[1][1]["height"] == (3.0,)


def test_a_pair_that_is_the_same_and_one_that_is_not(pools):
    ran, same = chart2code_pair(pools, CHART, CHART)
    assert ran and same is not None
    assert 0.98 < same.pop("color") < 1  # a defect of theirs
    assert set(same.values()) == {1.0}
    ran, other = chart2code_pair(pools, CHART, CHART.replace("[3, 5]", "[3, 6]"))
    assert other is not None and 0.5 < other["data"] < 1 == other["visual"]


@pytest.mark.parametrize(
    "code, types",
    [
        ("ax.bar([1, 2], [3, 4])", {"histogram"}),
        ("ax.hist([1, 2, 2])", {"histogram"}),
        ("ax.boxplot([1, 2, 3])", {"line"}),
        ("ax.pie([1, 2])", {"pie"}),
        ("ax.scatter([1], [2])", {"scatter"}),
        ("ax.imshow([[1, 2]])", {"image"}),
        ("ax.pcolormesh([[1, 2]])", {"heatmap"}),
    ],
)
def test_types_as_they_see_them(pool, code, types):
    assert draw(pool, HEAD + code).types == types


@pytest.mark.parametrize(
    "end", ["1 / 0", "plt.close()", "import sys; sys.exit()", "plt.close('all')"]
)
def test_what_leaves_no_figure_has_no_scores(pools, end):
    assert chart2code_pair(pools, CHART, CHART + end) == (False, None)
    with pytest.raises(TargetFailed):
        chart2code_pair(pools, CHART + end, CHART)


def test_the_figure_with_the_highest_number_counts(pool):
    code = CHART + "plt.figure(7)\nplt.title('seven')\nplt.figure(3)\nplt.title('three')"
    assert draw(pool, code).texts["title"] == ("seven",)


def test_a_figure_of_very_many_numbers_has_a_record(pool):
    code = HEAD + "import random\nfor i in range(400):\n"
    code += "    ax.plot(*[[random.random() for _ in range(300)] for _ in 'xy'])"
    assert 20 < len(draw(pool, code).elements) < 300


def test_lists_of_others_are_compared_as_texts(pool):
    code = HEAD + "import datetime\nax.plot([datetime.date(2020, 1, 1)], [float('nan')])"
    ((_, values),) = draw(pool, code).elements
    assert values["xdata"] == (None, frozenset({"2020-01-01"}), True)
    numbers = values["ydata"][0]
    assert len(numbers) == 1 and math.isnan(next(iter(numbers)))


def test_no_code_and_the_shape_of_a_record(pools):
    assert chart2code_pair(pools, CHART, None) == (False, None)
    assert {field.name for field in dataclasses.fields(Chart2CodeRecord)} == set(EMPTY)


@pytest.mark.parametrize(
    "change",
    [
        {"colors": [["a", "b"]]},
        {"colors": [["a", "b", 3]]},
        {"layout": [[1, 1, 0, 0, 0]]},
        {"grids": [[1, True]]},
        {"legends": [["a", 0, 0, 1]]},
        {"legends": [["a", 0, 0, 1, "one"]]},
        {"elements": [["line", []]]},
        {"elements": [["line", {"xdata": ["list", [1], ["1"], 1]}]]},
        {"elements": [["line", {"xdata": ["number", True]}]]},
        {"elements": [["line", {"xdata": ["text", "x" * 3000]}]]},
        {"elements": [["line", {"xdata": []}]]},
        {"elements": [["line", dict.fromkeys(map(str, range(30)))]]},
        {"texts": [["title"]]},
        {"texts": {"title": [3]}},
        {"types": "bar"},
        {"more": 1},
    ],
)
def test_claims_that_are_none(change):
    with pytest.raises(ValueError):
        record(**change)

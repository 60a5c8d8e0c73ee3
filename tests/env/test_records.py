"""Records survive JSON; what a hostile process may send instead is refused."""

import dataclasses
import json

import pytest

from mmrecoder_jax.env.records import OfficialRecord, Plot2CodeRecord, Record

RECORD = {
    "texts": ["a", "a"],
    "layout": [[1, 2, 0, 0, 1, 1]],
    "types": {"bar": 2},
    "colors": ["bar--#FF0000"],
}
PLOTTED = {
    "texts": [["a", 1.5, None], ["b", 2, -3]],
    "size": [6.4, 4.8],
    "white": False,
    "fig1": None,
}


def test_a_training_record_survives_json():
    record = Record.from_json(RECORD)
    assert record.texts == ("a", "a") and record.layout == ((1, 2, 0, 0, 1, 1),)
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_an_official_record_keeps_axes_without_a_grid():
    record = OfficialRecord.from_json({**RECORD, "layout": [None, [1, 2, 0, 0, 1, 1]]})
    assert record.layout == (None, (1, 2, 0, 0, 1, 1))
    assert OfficialRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    with pytest.raises(ValueError, match="layout"):
        Record.from_json(record.to_json())


def test_a_plot2code_record_survives_json():
    record = Plot2CodeRecord.from_json(PLOTTED)
    assert record == Plot2CodeRecord((("a", 1.5, None), ("b", 2, -3)), (6.4, 4.8), False)
    assert Plot2CodeRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    two = dataclasses.replace(record, fig1=record)
    assert Plot2CodeRecord.from_json(json.loads(json.dumps(two.to_json()))) == two


def test_colors_are_sorted_and_distinct():
    record = Record.from_json({**RECORD, "colors": ["b--#1", "a--#1", "b--#1"]})
    assert record.colors == ("a--#1", "b--#1")


@pytest.mark.parametrize("cls", [Record, OfficialRecord])
@pytest.mark.parametrize(
    "change",
    [
        {"texts": "abc"},
        {"texts": [1]},
        {"texts": ["x"] * 5001},
        {"texts": ["x" * 2001]},
        {"layout": [[1, 2, 3]]},
        {"layout": [[1, 2, 0, 0, 1, -1]]},
        {"layout": [[True, 2, 0, 0, 1, 1]]},
        {"layout": [[1, 2, 0, 0, 1, 1]] * 5001},
        {"types": {"bar": 1.5}},
        {"types": {"bar": 1 << 40}},
        {"types": {"x" * 2001: 1}},
        {"types": []},
        {"colors": [None]},
        {"extra": 1},
    ],
)
def test_a_bad_record_is_refused(cls, change):
    with pytest.raises(ValueError, match=r"record|layout"):
        cls.from_json({**RECORD, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"texts": ["a"]},
        {"texts": [["a"]]},
        {"texts": [["a", 1, "x"]]},
        {"texts": [["a", float("nan"), 1]]},
        {"texts": [["a", float("inf"), 1]]},
        {"texts": [["a", 10**400, 1]]},
        {"texts": [["a", True, 1]]},
        {"texts": [[1, 1, 1]]},
        {"texts": [["x" * 2001, 1, 1]]},
        {"texts": [["a", 1, 1]] * 5001},
        {"texts": {}},
        {"size": [4]},
        {"size": [4, "3"]},
        {"size": [0, 3]},
        {"size": [float("inf"), 3]},
        {"size": "4x3"},
        {"white": 1},
        {"fig1": 1},
        {"fig1": {**PLOTTED, "texts": {}}},
        {"fig1": {**PLOTTED, "fig1": PLOTTED}},
        {"extra": 1},
    ],
)
def test_a_bad_plot2code_record_is_refused(change):
    with pytest.raises(ValueError, match="record"):
        Plot2CodeRecord.from_json({**PLOTTED, **change})


@pytest.mark.parametrize("data", [None, [], "x", 3, {}])
@pytest.mark.parametrize("cls", [Record, OfficialRecord, Plot2CodeRecord])
def test_what_is_no_record_at_all_is_refused(cls, data):
    with pytest.raises(ValueError, match="exactly the fields"):
        cls.from_json(data)

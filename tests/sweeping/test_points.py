"""Names of points: safe, stable, and never one for two."""

import re

import pytest

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.sweeping.points import Point, check_fixed, shard, short_names, text_of


def test_a_name_says_the_values():
    point = Point.of({"reward.eta": 0.1, "seed": 2, "optim.lr": 1e-5})
    assert point.name == "eta-0.1_seed-2_lr-1e-05"
    assert point.flags() == [
        *("--config.reward.eta=0.1", "--config.seed=2", "--config.optim.lr=1e-05")
    ]


@pytest.mark.parametrize(
    "value",
    ["a/b", "../up", "", "a b", "Ä", "x" * 300, (112, 264), "CON:", "-rf", "a\nb", "it's", "*"],
)
def test_a_name_is_safe_whatever_the_value(value):
    name = Point.of({"feedback.render": value, "seed": 0}).name
    assert re.fullmatch(r"[A-Za-z0-9_.+-]+", name) and name[0].isalpha() and len(name) <= 120


@pytest.mark.parametrize(
    ("one", "two"), [("a/b", "a-b"), ("A", "a"), ("x" * 300, "x" * 301), ("a b", "a/b"), ("", "-")]
)
def test_two_values_have_two_names_also_where_case_does_not_count(one, two):
    names = {Point.of({"feedback.render": value}).name.casefold() for value in (one, two)}
    assert len(names) == 2


def test_many_fields_have_a_short_name():
    fields = {f"section.some_long_name_{i}": i for i in range(20)}
    assert len(Point.of(fields).name) <= 120
    assert Point.of(fields).name != Point.of(fields | {"section.some_long_name_19": 0}).name


def test_short_names_tell_fields_apart():
    assert short_names(["seed", "data.seed"]) == {"seed": "seed", "data.seed": "data.seed"}
    fields = ["stages.stage1.rl.group", "stages.stage2.rl.group"]
    assert list(short_names(fields).values()) == ["stage1.rl.group", "stage2.rl.group"]


def test_numbers_are_written_in_their_shortest_form():
    assert [text_of(x) for x in (1.0, 1e20, -0.5, 3, False)] == ["1", "1e+20", "-0.5", "3", "False"]


def test_machines_share_the_points():
    points = [Point.of({"seed": i}) for i in range(5)]
    parts = [shard(points, f"{i}/3") for i in range(3)]
    assert [len(part) for part in parts] == [2, 2, 1]
    assert sorted(p.name for part in parts for p in part) == [p.name for p in points]
    assert shard(points, "") == points


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "1/0", "-1/3", "1/3/5"])
def test_a_shard_that_does_not_exist(text):
    with pytest.raises(ConfigError, match=f"--shard={text}: use"):
        shard([], text)


def test_a_field_is_swept_or_fixed():
    with pytest.raises(ConfigError, match=r"config.seed is swept and given as --config.seed=3"):
        check_fixed(["seed"], {"seed": 3})
    check_fixed(["seed"], {"reward.eta": 0})

"""What `--sweep` may be, the points of a grid and of a draw, and what is refused in one line."""

import pytest

from mmrecoder_jax.config import ConfigError, load
from mmrecoder_jax.sweeping.axes import draw, grid, read_axes, split_values


@pytest.fixture(scope="module")
def config():
    return load("stage2", "smoke")


def names(config, *words, **drawn):
    axes = read_axes(words, config)
    points = draw(axes, **drawn) if drawn else grid(axes)
    return [point.name for point in points]


def test_a_grid_has_every_setting_once_before_it_has_one_twice(config):
    found = names(config, "config.seed=0,1", "config.reward.eta=0,0.1")
    assert found == ["seed-0_eta-0", "seed-0_eta-0.1", "seed-1_eta-0", "seed-1_eta-0.1"]
    assert names(config, "config.reward.eta=0,0.1", "config.seed=0,1") == [
        *("eta-0_seed-0", "eta-0.1_seed-0", "eta-0_seed-1", "eta-0.1_seed-1")
    ]
    assert names(config, "config.reward.eta=0,0.1", "config.rl.group=4,8") == [
        *("eta-0_group-4", "eta-0_group-8"),
        *("eta-0.1_group-4", "eta-0.1_group-8"),
    ]


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("config.reward.eta=0:0.5:3", (0.0, 0.25, 0.5)),
        ("config.optim.lr=log:1e-5:1e-3:3", (1e-5, 1e-4, 1e-3)),
        ("config.rl.group=2:8:4", (2, 4, 6, 8)),
        ("config.rl.group=log:2:8:3", (2, 4, 8)),
        ("config.reward.eta= 0 , 1", (0.0, 1.0)),
        ("config.data.lengths=(112,264),(112,208,264)", ((112, 264), (112, 208, 264))),
        ("config.checkpoint.accept_changes=true,false", (True, False)),
        ("config.feedback.render='Look, again.',Improve it.", ("Look, again.", "Improve it.")),
        ("config.judge.url=http://a:1/v1,http://b:2/v1", ("http://a:1/v1", "http://b:2/v1")),
        ("config.init_from='',runs/a", ("", "runs/a")),
    ],
)
def test_values_are_what_the_field_is(config, word, values):
    (axis,) = read_axes([word], config)
    assert axis.values == values
    assert [type(value) for value in axis.values] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--sweep is missing: give one"),
        (["config.rl.etta=0"], r"--sweep=config.rl.etta=0: no such field: .*did you mean"),
        (["config.reward.eta=0,x"], r"--sweep=config.reward.eta=0,x: reward.eta=x: use a number"),
        (["config.rl.group=4,2.5"], "rl.group=2.5: use a whole number, 2 or more"),
        (["reward.eta=0"], "a field begins with config.: write config.reward.eta=0"),
        (["config.reward.eta"], "write a field and its values"),
        (["config.reward.eta="], "an empty value"),
        (["config.reward.eta=0,,1"], "an empty value"),
        (["config.reward.eta=0,0.0"], "0 is there twice"),
        (["config.reward=1"], "config.reward is a section: name one of its fields, alpha"),
        (["config.stage=stage1,stage2"], "stage belongs to the configuration"),
        (["config.data.lengths=(112,264"], "has no other end"),
        (["config.seed=0", "config.seed=1"], "config.seed is given twice"),
        (["config.reward.eta=1:0:3"], "from the lower number to the higher one"),
        (["config.reward.eta=log:0:1:3"], "needs ends above 0"),
        (["config.reward.eta=0:1:1"], "two values or more, not '1'"),
        (["config.reward.eta=0:1:x"], "two values or more, not 'x'"),
        (["config.rl.group=2:4:9"], "fewer than 9 values"),
        (["config.train.single_turn_share=0,1"], "stage2 does not use"),
    ],
)
def test_what_cannot_be_swept_is_said_in_one_line(config, words, message):
    with pytest.raises(ConfigError, match=message) as raised:
        grid(read_axes(words, config))
    assert "\n" not in str(raised.value)


def test_a_range_without_a_count_is_for_a_draw(config):
    with pytest.raises(
        ConfigError, match=r"a grid needs a number of values, such as 1e-05:0.001:5"
    ):
        names(config, "config.optim.lr=log:1e-5:1e-3")


def test_a_draw_is_the_same_for_the_same_seed_and_goes_on(config):
    words = ["config.optim.lr=log:1e-5:1e-3", "config.rl.group=2:8", "config.seed=0,1"]
    found = names(config, *words, count=5, seed=3)
    assert found == names(config, *words, count=5, seed=3) != names(config, *words, count=5, seed=4)
    assert len(set(found)) == 10  # five settings, each with both seeds
    assert set(found) <= set(names(config, *words, count=9, seed=3))
    axes = read_axes(words, config)
    for point in draw(axes, count=50, seed=0):
        assert 1e-5 <= point.values["optim.lr"] <= 1e-3
        assert point.values["rl.group"] in range(2, 9)


@pytest.mark.parametrize(
    ("words", "count", "message"),
    [
        (["config.seed=0,1"], 2, "draws other fields than seeds"),
        (["config.reward.eta=0,1", "config.rl.group=2,4"], 5, "there are 4 settings"),
        (["config.rl.group=2:4"], 9, "hardly more than 3 settings"),
        (["config.reward.eta=0,1"], -1, "use 1 or more"),
    ],
)
def test_a_draw_that_cannot_be(config, words, count, message):
    with pytest.raises(ConfigError, match=message):
        draw(read_axes(words, config), count, 0)


def test_every_setting_of_lists_can_be_drawn(config):
    words = ["config.reward.eta=0,1", "config.rl.group=2,4"]
    assert sorted(names(config, *words, count=4, seed=0)) == sorted(names(config, *words))


def test_a_grid_that_nobody_can_mean(config):
    with pytest.raises(ConfigError, match="this sweep has 250000 points"):
        names(config, "config.optim.lr=0:1:500", "config.reward.eta=0:1:500")


def test_commas_inside_brackets_and_quotes_separate_nothing():
    assert split_values("('a,b', 1),[2,3]") == ["('a,b', 1)", "[2,3]"]

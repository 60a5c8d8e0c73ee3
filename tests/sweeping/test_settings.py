"""What points share: flags, checks before anything runs, and other sweeps in one work directory."""

import pytest

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.sweeping.settings import check_points, check_workdir, write_note
from tests.sweeping.sweeps import sweep_in


def test_flags_of_a_point(tmp_path):
    sweep, points = sweep_in(tmp_path, **{"train.steps": 2})
    assert sweep.flags(points[0]) == [
        "--config=stage2:smoke",
        f"--workdir={tmp_path}/eta-0_seed-0",
        "--config.train.steps=2",
        f"--config.data.dir={tmp_path}/data",
        "--config.reward.eta=0",
        "--config.seed=0",
    ]
    assert f"--config.data.dir={tmp_path}/data" not in sweep.flags(points[0], shared_data=False)


@pytest.mark.parametrize(
    ("words", "fixed"),
    [
        (["config.data.seed=0,1"], {}),
        (["config.env.dpi=70,100"], {}),
        (["config.seed=0"], {"data.dir": "charts"}),
        (["config.seed=0"], {"data.kind": "directory"}),
    ],
)
def test_points_of_other_charts_share_none(tmp_path, words, fixed):
    sweep, _ = sweep_in(tmp_path, words, **fixed)
    assert not sweep.shares_data()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["config.reward.eta=0,-1"], "--sweep=config.reward.eta=-1: reward.eta=-1.0: use a number"),
        (["config.reward.eta=0,nan"], "--sweep=config.reward.eta=nan: reward.eta=nan"),
        (
            ["config.reward.judge=visual,none", "config.reward.beta=0,0.2"],
            "reward.beta=0.2 needs a judge",
        ),
        (["config.rl.turns=2,9"], r"--sweep=config.rl.turns=9: data.lengths=.* cannot hold"),
        (["config.model.preset=tiny,huge"], "model.preset='huge'"),
        (["config.data.dir=s3://a/b"], "gs://BUCKET/PATH, or a local path"),
    ],
)
def test_a_point_that_cannot_run_is_refused_before_anything_runs(tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        check_points(*sweep_in(tmp_path, words))


def test_a_pipeline_is_checked_stage_by_stage(tmp_path):
    sweep, points = sweep_in(tmp_path, ["config.stages.stage2.rl.turns=2,9"], "pipeline")
    with pytest.raises(ConfigError, match=r"config.stages.stage2.rl.turns=9: data.lengths"):
        check_points(sweep, points)
    check_points(sweep, points[:1])


def test_more_values_are_the_same_sweep(tmp_path):
    write_note(sweep_in(tmp_path)[0])
    check_workdir(sweep_in(tmp_path, ["config.seed=0,1,2", "config.reward.eta=0.3"])[0])
    check_workdir(sweep_in(tmp_path, **{"env.workers": 7, "train.log_every": 3})[0])


@pytest.mark.parametrize(
    ("words", "fixed", "message"),
    [
        (None, {"train.steps": 9}, r"other settings: train.steps=9 \(was 3\); set them back, or"),
        (["config.seed=0,1"], {}, r"it sweeps config.seed \(was config.reward.eta and config.seed"),
        (["config.optim.lr=1,2", "config.seed=0"], {}, "it sweeps config.optim.lr and config.seed"),
    ],
)
def test_other_settings_are_refused(tmp_path, words, fixed, message):
    write_note(sweep_in(tmp_path)[0])
    other, _ = sweep_in(tmp_path, words or ("config.reward.eta=0,0.1", "config.seed=0"), **fixed)
    with pytest.raises(ConfigError, match=message):
        check_workdir(other)


def test_a_directory_of_something_else_is_refused(tmp_path):
    sweep, _ = sweep_in(tmp_path / "run")
    check_workdir(sweep)  # it need not exist
    (tmp_path / "run").mkdir()
    check_workdir(sweep)
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"holds metrics.jsonl and no sweep.json"):
        check_workdir(sweep)
    (tmp_path / "run" / "sweep.json").write_text("[]")
    with pytest.raises(ConfigError, match="is no note of a sweep"):
        check_workdir(sweep)
    with pytest.raises(ConfigError, match="a local path is needed"):
        check_workdir(sweep_in("gs://bucket/run")[0])

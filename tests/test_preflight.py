"""`train --preflight`: what is tried, what is said of it, and that the run is left as it was."""

import os
import subprocess
from types import SimpleNamespace as Made

import jax
import pytest

from mmrecoder_jax import preflight
from mmrecoder_jax.config import ConfigError, load
from mmrecoder_jax.env.chart_env import ChartEnv
from mmrecoder_jax.preflight import _Preflight
from mmrecoder_jax.rl.learner_batch import check_rl
from tests.conftest import train_command


def ready(workdir, stage="stage1", **fields):
    config = load(stage, "smoke")
    config.init_from = str(workdir)
    for name, value in fields.items():
        config[name] = value
    return _Preflight(config, str(workdir))


def test_the_trial_is_as_small_as_rows_can_be_divided(tmp_path):
    tried = ready(tmp_path)
    small, config = tried._small(), tried._config
    assert (small.train.steps, small.train.batch_size) == (2, 2)
    rows = small.train.batch_size * small.rl.group
    assert rows % small.train.micro_batch_size == 0
    assert config.train.steps != 2  # the run's own configuration is left alone
    assert small.log.wandb == "" and not small.log.tensorboard
    # an evaluation at the last step would be most of the trial
    assert small.rl.eval_every == 0 and small.checkpoint.best == ""
    parted = ready(tmp_path)
    parted._config.rl.mini_batches = 3
    parts = parted._small()
    assert check_rl(parts, hosts=1, ways=1) == parts.train.batch_size == 6
    odd = ready(tmp_path)
    odd._config.train.micro_batch_size = 12
    small = odd._small()
    assert small.train.batch_size * small.rl.group % small.train.micro_batch_size == 0


def test_settings_are_told_beside_those_of_the_file():
    assert preflight._changed({}) == "those of the file"
    told = preflight._changed({"seed": (0, 1), "optim.lr": (1e-5, 2e-5)})
    assert told == "2 unlike the file's: optim.lr 1e-05 -> 2e-05, seed 0 -> 1"


def test_without_weights_nothing_heavy_is_tried(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "ChartEnv", lambda config: pytest.fail("started"))
    config = load("stage1", "smoke")
    config.init_from = str(tmp_path / "none")
    assert not preflight.preflight(config, str(tmp_path), {})
    out = capsys.readouterr().out
    assert "sources: FAILED: no weights at config.init_from=" in out
    assert "work directory:" in out and out.endswith("preflight: failed in sources\n")
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_to_is_told(tmp_path, capsys, monkeypatch):
    config = load("sft_chart2code", "smoke")
    (tmp_path / "file").write_text("")
    assert not preflight.preflight(config, str(tmp_path / "file" / "run"), {})
    assert "work directory: FAILED" in capsys.readouterr().out


def test_one_failure_leaves_the_other_checks_to_be_made(tmp_path, capsys):
    tried = ready(tmp_path)

    def fails():
        raise ConfigError("env.preload='x': remove it")

    tried._try("scripts", fails)
    tried._try("judge", lambda: "none")
    assert tried._failed == ["scripts"]
    assert capsys.readouterr().out == "scripts: FAILED: env.preload='x': remove it\njudge: none\n"


def test_a_bug_keeps_its_traceback(tmp_path):
    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ready(tmp_path)._try("scripts", fails)


def test_of_several_hosts_none_goes_on_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def fails():
        raise ConfigError("no judge")

    with pytest.raises(ConfigError, match="judge: no judge"):
        ready(tmp_path)._try("judge", fails)


def test_targets_that_do_not_run_are_a_failure(tmp_path, monkeypatch):
    tried = ready(tmp_path)
    charts = [Made(code="import nowhere")] * 30
    monkeypatch.setattr(tried, "_built", lambda: Made(charts=lambda split: charts))
    wrong = Made(ok=False, status="error", error="No module named nowhere")
    asked = []

    env = ChartEnv.__new__(ChartEnv)  # none is started

    def run(codes):
        asked.extend(codes)
        return [wrong] * len(codes)

    env.run = run

    with pytest.raises(
        ConfigError, match=r"20 of 20 targets do not run .* No module named nowhere"
    ):
        tried._scripts(env)
    assert len(asked) == preflight.TARGETS


def command(workdir, *flags, stage="stage1"):
    done = subprocess.run(
        train_command(stage, str(workdir), "--preflight", *flags),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow  # compiles a stage
def test_a_stage_is_tried_whole_and_left_alone(smoke_run, tmp_path):
    source = f"{smoke_run.workdir}/sft_self_correction"
    data = f"{smoke_run.workdir}/data"
    flags = f"--config.init_from={source}", f"--config.data.dir={data}"
    judged = ("--config.reward.beta=0.1",)
    code, out, err = command(tmp_path / "run", *flags, *judged)
    assert code == 0, out + err
    names = ("settings", "sources", "work directory", "charts", "scripts", "programs", "trial")
    for name in (*names, "judge", "time", "preflight"):
        assert f"\n{name}: " in f"\n{out}", name
    assert "reward.beta 0.3 -> 0.1" in out and "20 of 20 targets run" in out
    assert "a target beside itself 1.00" in out and "5 compiled" in out
    assert os.listdir(tmp_path / "run") in ([], [".jax_cache"])


def test_a_pipeline_is_tried_stage_by_stage(tmp_path):
    code, _, err = command(tmp_path, stage="pipeline")
    assert code == 1 and err.strip() == (
        "error: --preflight tries one stage: name it, e.g. --config=stage2"
    )

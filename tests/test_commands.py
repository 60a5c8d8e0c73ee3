"""The command line: mistyped fields, missing weights, wrong sizes; every configuration loads in
every size.
"""

import subprocess
import sys

import pytest

from mmrecoder_jax.config import STAGES, base, field_names, load, suggest


def train(*arguments, timeout=120):
    return subprocess.run(
        [sys.executable, "-m", "mmrecoder_jax.train", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.parametrize("name", [*STAGES, "pipeline", "evaluate"])
@pytest.mark.parametrize("size", ["paper", "tiny", "smoke"])
def test_every_configuration_loads(name, size):
    config = load(name, size)
    assert config.stage == name and config.size == size


def test_paper_values():
    for name in ("stage1", "stage2"):
        config = load(name, None)
        assert (config.rl.group, config.train.batch_size, config.optim.lr) == (8, 128, 1e-6)
        assert (config.rl.response_length, config.train.epochs) == (4096, 1.0)
        assert (config.reward.gamma, config.reward.eta) == (0.0, 0.0)
    first, second = load("sft_chart2code", None), load("sft_self_correction", None)
    assert (first.train.batch_size, first.optim.lr, first.train.epochs) == (128, 1e-5, 1.0)
    assert (second.train.epochs, second.dialogues.min_gain) == (2.0, 0.02)


def test_unknown_size_names_the_sizes():
    with pytest.raises(ValueError, match=r"no size 'huge'.*paper, tiny, smoke"):
        base("stage1", "huge")


def test_nearest_names():
    config = base("stage2", "tiny")
    assert "optim.lr" in suggest("optim.lrr", config)
    assert "rl.temperature" in suggest("temprature", config)
    assert "train.batch_size" in set(field_names(config))


def test_mistyped_field_answers_with_the_nearest(tmp_path):
    done = train(
        "--config=configs/stage2.py:tiny", f"--workdir={tmp_path}", "--config.optim.lrr=1e-5"
    )
    assert done.returncode == 1
    assert "no such field: config.optim.lrr" in done.stderr and "optim.lr" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_weights_say_what_was_looked_for_and_what_runs_without(tmp_path):
    done = train("--config=configs/sft_chart2code.py", f"--workdir={tmp_path}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "Qwen/Qwen2.5-VL-7B-Instruct" in done.stderr
        and "configs/sft_chart2code.py:tiny" in done.stderr
    )


def test_a_later_stage_needs_an_earlier_one(tmp_path):
    done = train("--config=configs/stage2.py:tiny", f"--workdir={tmp_path}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "init_from" in done.stderr and "runs/tiny/stage1" in done.stderr


def test_sizes_that_do_not_fit_together(tmp_path):
    done = train(
        "--config=configs/stage1.py", f"--workdir={tmp_path}", "--config.init_from=nowhere"
    )
    assert done.returncode == 1 and "nowhere" in done.stderr and "Traceback" not in done.stderr

"""The command line: mistyped fields, fields and configurations of other stages, missing weights,
sizes that do not fit.
"""

import subprocess
import sys

import pytest


def run(command, *arguments, timeout=120):
    done = subprocess.run(
        [sys.executable, "-m", f"mmrecoder_jax.{command}", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done


def refused(*arguments):
    """What a command that must not start says."""
    done = run(*arguments)
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    return done.stderr


def test_mistyped_field_answers_with_the_nearest(tmp_path):
    said = refused(
        "train",
        "--config=configs/stage2.py:tiny",
        f"--workdir={tmp_path}",
        "--config.optim.lrr=1e-5",
    )
    assert "no such field: config.optim.lrr" in said and "optim.lr" in said


def test_flags_that_must_be_given_are_asked_for_with_what_they_are():
    config, workdir = "give --config: One of ours by name", "give --workdir: Directory for"
    both = refused("train")
    assert config in both and workdir in both and "None" not in both
    assert refused("train", "--config=stage2:tiny").startswith(f"error: {workdir}")
    said = refused("memory", "--config=stage2")
    assert said.startswith("error: give --topology: TPU slices") and "None" not in said


@pytest.mark.parametrize(
    "command, config, field",
    [
        ("train", "sft_chart2code", "rl.group"),
        ("evaluate", "evaluate", "train.steps"),
        ("memory", "sft_chart2code", "rl.turns"),
    ],
)
def test_a_field_that_the_stage_does_not_use_is_refused(tmp_path, command, config, field):
    where = "--topology=v5e-4" if command == "memory" else f"--workdir={tmp_path}"
    said = refused(command, f"--config=configs/{config}.py:tiny", where, f"--config.{field}=4")
    assert f"{config} does not use config.{field}; used by: " in said and "stage2" in said


@pytest.mark.parametrize(
    "command, config, other",
    [("evaluate", "stage2", "train"), ("train", "evaluate", "evaluate")],
)
def test_a_configuration_of_another_command_is_refused(tmp_path, command, config, other):
    said = refused(command, f"--config=configs/{config}.py:tiny", f"--workdir={tmp_path}")
    assert f"--config is of {config}" in said and f"python -m mmrecoder_jax.{other}" in said


def test_missing_weights_say_what_was_looked_for_and_what_runs_without(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = refused("train", "--config=configs/sft_chart2code.py", f"--workdir={tmp_path}")
    assert "Qwen/Qwen2.5-VL-7B-Instruct" in said and "--config=sft_chart2code:tiny" in said


@pytest.mark.parametrize(
    "command, config, earlier", [("train", "stage2", "stage1"), ("evaluate", "evaluate", "stage2")]
)
def test_a_later_stage_needs_an_earlier_one(tmp_path, command, config, earlier):
    said = refused(command, f"--config=configs/{config}.py:tiny", f"--workdir={tmp_path}")
    assert "init_from" in said and f"runs/tiny/{earlier}" in said


def test_a_source_that_is_not_there(tmp_path):
    said = refused(
        "train",
        "--config=configs/stage1.py",
        f"--workdir={tmp_path}",
        "--config.init_from=nowhere",
    )
    assert "init_from='nowhere'" in said


def test_words_that_are_no_flags_are_refused(tmp_path):
    done = run("train", "--config=configs/stage2.py:tiny", f"--workdir={tmp_path}", "lr=1e-5")
    assert done.returncode != 0 and "'lr=1e-5'" in done.stdout + done.stderr

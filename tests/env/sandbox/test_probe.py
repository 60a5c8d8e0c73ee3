"""The command that says what a host offers."""

import subprocess
import sys

import pytest

from mmrecoder_jax.env.sandbox import confinement, probe


def test_the_command_tries_every_layer():
    command = [sys.executable, "-m", "mmrecoder_jax.env.sandbox", "--probe"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = [line.split(": ")[1] for line in done.stdout.splitlines() if line[:5] == "trial"]
    assert len(trials) == 6 and trials.count("possible") == 1
    assert done.stdout.splitlines()[-1] == "verdict    scripts are contained here"


def test_a_host_without_a_layer_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(confinement, "has_seccomp", lambda: False)
    assert probe.main(["--probe"]) == 1
    assert "this host lacks seccomp" in capsys.readouterr().out.splitlines()[-1]


def test_it_does_nothing_unasked():
    with pytest.raises(SystemExit):
        probe.main([])

"""Trajectories on disk: whole files or none, and nothing beside them."""

import errno
import os

import numpy as np
import pytest

from mmrecoder_jax.env.chartmimic import Scores
from mmrecoder_jax.env.execution import Execution
from mmrecoder_jax.env.wire import Status
from mmrecoder_jax.rl.trajectory import Trajectory, Turn, write_trajectories
from tests.rl.charts import CHART

IMAGE = np.zeros((4, 6, 3), np.uint8)
NOTHING = np.zeros(0, np.int32), np.zeros(0, np.float32)
TURN = Turn(*NOTHING, True, "code", Execution(Status.OK, IMAGE), Scores(), 1.0)
ROWS = [(Trajectory(CHART, 0, (), (TURN,)), [0.5], 0.0)]


def files(directory) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(os, "replace", full)
        write_trajectories(str(tmp_path), 3, ROWS)
    assert files(tmp_path) == []


def test_what_a_kill_left_is_written_over(tmp_path):
    write_trajectories(str(tmp_path), 3, ROWS)
    (render, _) = sorted(files(tmp_path), key=lambda name: name.endswith(".jsonl"))
    os.rename(tmp_path / "renders" / render, tmp_path / "renders" / f"{render}.0.tmp")
    write_trajectories(str(tmp_path), 3, ROWS)
    assert files(tmp_path) == sorted(["000003.jsonl", render])

"""Trajectories on disk: whole files or none, and nothing beside them."""

import dataclasses
import errno
import json
import os

import numpy as np
import pytest
from PIL import Image

from mmrecoder_jax.env.chartmimic import Scores, score
from mmrecoder_jax.env.execution import Execution, Replay
from mmrecoder_jax.env.wire import Flag, Status
from mmrecoder_jax.rl.trajectory import Origin, Trajectory, Turn, write_trajectories
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
    whole = files(tmp_path)
    render = next(name for name in whole if name.endswith(".png"))
    pictures = tmp_path / "renders" / "000003"
    os.rename(pictures / render, pictures / f"{render}.0.tmp")
    write_trajectories(str(tmp_path), 3, ROWS)
    assert files(tmp_path) == whole and len(whole) == 3  # rows, target, render


def test_a_row_says_all_that_was_known_of_its_turns(tmp_path):
    execution = Execution(Status.OK, IMAGE, flags=(Flag.TAMPER,), replay=Replay.UNDECIDED)
    turn = dataclasses.replace(
        TURN,
        ids=np.array([5, 6]),
        logps=np.array([-0.123456, -2.0], np.float32),
        execution=execution,
    )
    rows = [(Trajectory(CHART, 9, (), (turn,)), [0.5], 0.25)]
    origin = Origin(4, (2, 3), (0, 7), (1, 2, 1))
    path = write_trajectories(str(tmp_path), 3, rows, origins=[(origin, 1)])
    with open(path, encoding="utf-8") as f:
        (row,) = map(json.loads, f)
    assert row["origin"] == {
        "uid": 4,
        "policies": [2, 3],
        "key": [0, 7],
        "mesh": [1, 2, 1],
        "member": 1,
    }
    (found,) = row["turns"]
    assert found["logps"] == [-0.1235, -2.0]
    assert (found["flags"], found["replay"]) == (["tamper"], "undecided")
    pictures = [tmp_path / "renders" / name for name in (row["target"], found["render"])]
    assert pictures[0].read_bytes() == CHART.image
    with Image.open(pictures[1]) as image:
        assert image.size == (6, 4)


def test_scores_that_nobody_knows_are_null(tmp_path):
    unknown = dataclasses.replace(TURN, scores=score(None, None))
    rows = [(Trajectory(CHART, 0, (), (TURN, unknown)), [0.5, float("nan")], 0.0)]
    with open(write_trajectories(str(tmp_path), 3, rows), encoding="utf-8") as file:
        first, second = json.loads(file.read())["turns"]
    assert first["scores"]["overall"] == 0.0
    assert second["scores"] is None and second["reward"] is None

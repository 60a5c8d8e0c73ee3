"""A written trajectory sampled again: the same where nothing has changed, and what is said where it
cannot be.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmrecoder_jax import places, replay
from mmrecoder_jax.config import ConfigError, load, set_fields
from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.env import Execution, Status
from mmrecoder_jax.env.chartmimic import Scores
from mmrecoder_jax.fields import check_fields
from mmrecoder_jax.rl.trajectory import Trajectory, Turn
from tests.rl.charts import CHART


def run(workdir, name):
    done = subprocess.run(
        [sys.executable, "-m", "mmrecoder_jax.replay", f"--workdir={workdir}", f"--id={name}"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_trajectory_after_a_kept_checkpoint_comes_out_the_same(smoke_run, stage):
    done = run(smoke_run.workdir, f"{stage}/trajectories/3/5")
    assert done.returncode == 0, done.stdout + done.stderr
    head, first, second, last = done.stdout.splitlines()[-4:]
    assert head.split() == ["turn", "tokens", "status", "pixels", "reward", "log-probabilities"]
    assert all("alike" in line for line in (first, second))
    assert last == "the same came out"


def test_the_first_rollouts_are_those_of_the_policy_that_the_stage_began_with(smoke_run):
    done = run(os.path.join(smoke_run.workdir, "stage2"), "trajectories/1/0")
    assert done.returncode == 0, done.stdout + done.stderr


def test_another_outcome_is_told_by_the_status(smoke_run, tmp_path):
    copy = tmp_path / "stage2"
    shutil.copytree(os.path.join(smoke_run.workdir, "stage2"), copy)
    path = copy / "trajectories" / "000003.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["pieces"][1]["ids"][0] += 1
    rows[0]["turns"][1]["reward"] += 0.01
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(copy, "trajectories/3/0")
    assert done.returncode == 1 and done.stderr == ""
    assert "differ from number 0 on" in done.stdout
    assert done.stdout.splitlines()[-1] == "something else came out"


def test_a_policy_that_is_not_kept_is_named_with_those_that_are(smoke_run):
    done = run(smoke_run.workdir, "stage2/trajectories/2/0")
    assert done.returncode == 1 and done.stderr.startswith("error: the policy of step 2 is that ")
    assert "checkpoints of step 2, 3 (checkpoint.keep=2)" in done.stderr
    assert "trajectories of step 1, 3 can be sampled again" in done.stderr


@pytest.mark.parametrize(
    "name, said",
    [
        ("3", "an id is <directory>/<step>/<number>"),
        ("stage2/evaluation/test-greedy/0/3", "only rollouts of training"),
        ("stage2/trajectories/9/0", "there are steps 3, 4"),
        ("stage2/trajectories/3/7", "has the numbers 0 to 0"),
        ("stage3/trajectories/3/0", "there are no steps"),
    ],
)
def test_an_id_that_is_none(tmp_path, name, said):
    (tmp_path / "stage2" / "trajectories").mkdir(parents=True)
    for step in (3, 4):
        (tmp_path / "stage2" / "trajectories" / f"{step:06d}.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=said):
        replay.find(str(tmp_path), name)


ORIGIN = {"uid": 1, "policies": [2, 2], "key": [0, 3], "member": 4}


@pytest.mark.parametrize(
    "row, fields, said",
    [
        ({}, {}, "a version that did not keep what decides tokens"),
        ({"origin": ORIGIN | {"policies": [1, 2]}}, {}, "rl.partial"),
        ({"origin": ORIGIN}, {"engine.kind": "vllm"}, "a server sampled this"),
    ],
)
def test_what_cannot_be_sampled_again(row, fields, said):

    config = load("stage2", "smoke")
    set_fields(config, fields)
    with pytest.raises(ConfigError, match=said):
        replay.origin_of(replay.Found(row, Path("stage2"), 3), config)


def test_a_saved_configuration_comes_back_as_it_was(tmp_path):

    config = load("stage1", "smoke")
    set_fields(config, {"rl.group": 6, "data.lengths": (50, 99), "rl.stop": ("a",)})
    saved = json.loads(config.to_json_best_effort())
    saved["gone"] = {"field": 1}  # of an earlier version
    del saved["alarms"]  # which came later
    (tmp_path / "config.json").write_text(json.dumps(saved))
    found = replay.saved_config(tmp_path)
    check_fields(found)
    found.env.workers = config.env.workers
    assert found.to_dict() == config.to_dict()


def test_what_a_run_in_a_bucket_names_is_found_beside_it(cloud):
    config = load("stage1", "smoke")
    config.data.dir, config.init_from = "/gone/p/data", "gs://bucket/other@best"
    saved = config.to_json_best_effort().encode()
    cloud.store("bucket", "runs/p/stage1/config.json", saved)
    cloud.store("bucket", "runs/p/data/train/charts.jsonl", b"{}")
    workdir = Path(places.view("gs://bucket/runs/p", "replay"))
    found = replay.saved_config(workdir / "stage1")
    assert (Path(found.data.dir) / "train" / "charts.jsonl").read_text() == "{}"
    assert not Path(found.data.dir).is_relative_to(workdir)
    assert found.init_from == "gs://bucket/other@best"


@pytest.mark.slow  # runs the command twice
def test_a_run_in_a_bucket_is_sampled_again(smoke_run, cloud):
    local = Path(smoke_run.workdir)
    for path in local.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "config.json":
                data = data.replace(str(local).encode(), b"gs://bucket/runs/p")
            cloud.store("bucket", f"runs/p/{path.relative_to(local).as_posix()}", data)
    # On a disk the name of a checkpoint says that it is complete, and in a bucket these files.
    for step in local.glob("*/checkpoints/*"):
        for part in (step, *(path for path in step.iterdir() if path.is_dir())):
            name = f"runs/p/{part.relative_to(local).as_posix()}/{places.COMMIT}"
            cloud.store("bucket", name, b"")
    before = cloud.below("")
    for workdir, name in (
        ("gs://bucket/runs/p", "stage2/trajectories/3/5"),
        ("gs://bucket/runs/p/stage1", "trajectories/1/0"),
    ):
        done = run(workdir, name)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == "the same came out"
    assert cloud.below("") == before


def test_pixels_are_compared_one_by_one(tmp_path):

    image = np.zeros((4, 6, 3), np.uint8)
    changed = image.copy()
    changed[1, 2, 0] = changed[3, 3, 1] = 9
    renders = tmp_path / "trajectories" / "renders"
    renders.mkdir(parents=True)
    (renders / "a.png").write_bytes(png_bytes(image))
    before = {"render": "a.png", "status": "ok", "reward": 0.5, "logps": [-0.5]}
    found = replay.Found({"pieces": [{"turn": 1, "ids": [5]}], "turns": [before]}, tmp_path, 3)
    for now, said, same in ((image, "all alike", True), (changed, "2 differ", False)):
        turn = Turn(
            *(np.array([5]), np.array([-0.5], np.float32), True, ""),
            *(Execution(Status.OK, now), Scores(), 1.0),
        )
        ((row,), alike) = replay.compare(found, Trajectory(CHART, 0, (), (turn,)), np.array([0.5]))
        assert (row["pixels"], alike) == (said, same)

"""A written trajectory sampled again: the same where nothing has changed, and what is said where it
cannot be.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mmrecoder_jax import places, replay
from mmrecoder_jax.config import ConfigError, load, set_fields
from mmrecoder_jax.data.batching import Piece
from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.env import Execution, Status
from mmrecoder_jax.env.chartmimic import Scores
from mmrecoder_jax.fields import check_fields
from mmrecoder_jax.rl.sampler import noise
from mmrecoder_jax.rl.trajectory import Origin, Trajectory, Turn
from tests.conftest import train_command
from tests.rl.charts import CHART


def simulated(devices):
    """The variables of a process that sees so many devices."""
    return os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


def run(workdir, name, devices=1):
    done = subprocess.run(
        [sys.executable, "-m", "mmrecoder_jax.replay", f"--workdir={workdir}", f"--id={name}"],
        env=simulated(devices),
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, mesh",
    [
        ("stage1", {"data": 2, "fsdp": -1}),
        ("stage2", {"fsdp": 2, "tensor": 2}),
    ],
)
def test_adapters_with_an_average_on_four_devices(smoke_run, tmp_path, stage, mesh):
    """What was sampled with is below the average and beside the weights of `init_from`."""
    fields = {"lora.rank": 4, "optim.ema": 0.9, "train.steps": 2}
    fields |= {f"mesh.{axis}": size for axis, size in mesh.items()}
    fields |= {"init_from": f"{smoke_run.workdir}/sft_self_correction"}
    fields |= {"data.dir": f"{smoke_run.workdir}/data"}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    subprocess.run(train_command(stage, str(tmp_path), *flags), env=simulated(4), check=True)
    for name in ("trajectories/1/3", "trajectories/2/5"):
        done = run(tmp_path, name, devices=4)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == "the same came out"
    done = run(tmp_path, "trajectories/2/5")
    assert "than there are here (1), where sums are rounded otherwise" in done.stdout
    same = done.stdout.splitlines()[-1] == "the same came out"
    assert same == (done.returncode == 0)
    assert same or "a tie, which rounding decides" in done.stdout


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
    assert "turn 1, token 0 is the first that differs: " in done.stdout
    assert "more than rounding explains" in done.stdout
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


ORIGIN = {"uid": 1, "policies": [2, 2], "key": [0, 3], "mesh": [1, 2, 1], "member": 4}


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


def test_a_run_from_before_there_were_grammars_is_of_words(tmp_path, monkeypatch):
    config = load("stage1", "smoke")
    saved = json.loads(config.to_json_best_effort())
    del saved["data"]["grammar"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config.data.grammar = "panels"  # the default of a later version
    monkeypatch.setattr(replay, "load", lambda *_: config)
    assert replay.saved_config(tmp_path).data.grammar == "words"


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


@pytest.mark.parametrize(
    "source, found",
    [
        ("/gone/run/stage1", "{here}/stage1"),
        ("/gone/run/stage1@120", "{here}/stage1@120"),
        ("/gone/run/other", "/gone/run/other"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("{here}/stage1@120", "{here}/stage1@120"),
        ("", ""),
    ],
)
def test_weights_of_a_run_that_was_moved_are_found_beside_it(tmp_path, source, found):
    (tmp_path / "stage1" / "checkpoints" / "120").mkdir(parents=True)
    (tmp_path / "stage2").mkdir()
    config = load("stage2", "smoke")
    config.init_from = source.format(here=tmp_path)
    (tmp_path / "stage2" / "config.json").write_text(config.to_json_best_effort())
    assert replay.saved_config(tmp_path / "stage2").init_from == found.format(here=tmp_path)


@pytest.mark.parametrize(
    "written, devices, used, said",
    [
        ((2, 2, 1), 4, (2, 2, 1), ""),
        ((1, 1, 1), 1, (1, 1, 1), ""),
        ((2, 2, 1), 1, (1, -1, 1), r"mesh data=2, fsdp=2, tensor=1\) than there are here \(1\)"),
        ((1, 1, 1), 8, (1, -1, 1), "rounded otherwise"),
        ((), 8, (2, -1, 1), "not in its row; here it is 8"),  # of an earlier version
        ((), 3, (1, -1, 1), "data=2, fsdp=-1, tensor=1"),
    ],
)
def test_the_mesh_is_that_of_the_run_where_there_are_as_many_devices(written, devices, used, said):
    config = load("stage2", "smoke")
    set_fields(config, {"mesh.data": 2, "mesh.slices": 2})
    found = replay.use_mesh(config, Origin(1, (2, 2), (0, 3), written), devices)
    assert re.search(said, found) and bool(said) == bool(found)
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) == used
    assert config.mesh.slices == (2 if used != (1, -1, 1) else 1)


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


VOCAB = 6


def numbers(turn, token):
    return np.asarray(noise(jax.random.key(3), turn, 9, token, VOCAB))


def sampled_by(logits):
    """Ids and log-probabilities of four tokens, a row of logits each, with the same numbers."""
    logps = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.array([(row + numbers(1, at)).argmax() for at, row in enumerate(logps)])
    return ids, logps[np.arange(len(ids)), ids].astype(np.float32)


def again_of(ids, logps, image=None, feedback=(8,), cut=False):
    turn = Turn(ids, logps, True, "", Execution(Status.OK, image), Scores(), 1.0)
    shown = Piece(np.array(feedback), 0)
    trajectory = Trajectory(CHART, 9, (Piece(ids, 1), shown, Piece(ids, 2)), (turn, turn))
    return replay.Again(trajectory, np.zeros(2), (), "abcdef".__getitem__, numbers, cut)


def found_of(tmp_path, ids, logps, render=None):
    turns = [{"render": render, "logps": logps.tolist()}] * 2
    pieces = [{"turn": 1, "ids": ids.tolist()}, {"turn": 0, "ids": [8]}]
    return replay.Found(
        {"pieces": [*pieces, {"turn": 2, "ids": ids.tolist()}], "turns": turns}, tmp_path, 3
    )


def tied(at):
    """Logits of four tokens, of which one is a tie between two ids."""
    logits = np.zeros((4, VOCAB))
    best, second = np.argsort(numbers(1, at))[::-1][:2]
    logits[at, second] = numbers(1, at)[best] - numbers(1, at)[second]
    return logits, second


def test_a_tie_is_told_from_another_policy(tmp_path):
    logits, second = tied(at=2)
    rounded = logits.copy()
    logits[2, second] -= 1e-5
    rounded[2, second] += 1e-5
    before = sampled_by(logits)
    found = found_of(tmp_path, *before)
    assert replay.why_different(found, again_of(*before)) == ""
    said = replay.why_different(found, again_of(*sampled_by(rounded)))
    assert said.startswith("turn 1, token 2 is the first that differs: ")
    old, new = before[0][2], sampled_by(rounded)[0][2]
    assert old != new == second
    assert f"{'abcdef'[old]!r} (log-probability {before[1][2]:.4f}) before" in said
    assert "they are 0.0000 apart" in said and said.endswith("a tie, which rounding decides")
    other = logits.copy()
    other[2, second] += 1.0  # another policy
    said = replay.why_different(found, again_of(*sampled_by(other)))
    assert said.endswith("more than rounding explains")
    said = replay.why_different(found, again_of(*sampled_by(other), cut=True))
    assert said.endswith("explains, unless rl.top_k, rl.top_p or rl.min_p cut one of them")


def test_a_tie_is_as_wide_as_rounding_moved_the_tokens_before(tmp_path):
    logits, second = tied(at=3)
    logits[3, second] -= 0.01
    ids, logps = sampled_by(logits)
    logits[3, second] += 0.04  # as of 16 bits
    now, now_logps = sampled_by(logits)
    found = found_of(tmp_path, ids, logps)
    assert "more than rounding" in replay.why_different(found, again_of(now, now_logps))
    now_logps[1] += 0.03
    said = replay.why_different(found, again_of(now, now_logps))
    assert "before them, 0.0300 at most: a tie" in said


def test_tokens_after_another_picture_or_feedback_or_an_end_are_told_no_tie(tmp_path):
    ids, logps = sampled_by(np.zeros((4, VOCAB)))
    found = found_of(tmp_path, ids, logps)
    assert "one of the two responses ends" in replay.why_different(
        found, again_of(ids[:3], logps[:3])
    )
    found.row["pieces"][2]["ids"] = [5 - token for token in ids.tolist()]
    for changes in ({"image": np.zeros((4, 6, 3), np.uint8)}, {"feedback": (7,)}):
        said = replay.why_different(found, again_of(ids, logps, **changes))
        assert said.startswith("turn 2, token 0 is") and "was shown before it differs too" in said

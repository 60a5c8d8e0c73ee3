"""What a checkpoint notices of its files, and what it says where it cannot be written."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from mmrecoder_jax.learner.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    best_step,
    kept_steps,
    load_params,
    split_source,
    steps_done,
)
from mmrecoder_jax.learner.init import source_digest
from mmrecoder_jax.learner.update import from_params
from mmrecoder_jax.models.files import CheckpointError
from mmrecoder_jax.models.sharding import make_mesh
from mmrecoder_jax.monitoring.measured import Goal


def iterator(place: int = 0):
    found = iter(grain.MapDataset.range(1000).to_iter_dataset())
    for _ in range(place):
        next(found)
    return found


@pytest.fixture(scope="module")
def state():
    draw = np.random.default_rng(0)
    params = {
        name: {"q_proj": {"kernel": jnp.asarray(draw.normal(size=(90, 100)), jnp.float32)}}
        for name in ("a", "b")
    }
    return from_params(params, optax.adam(0.1), make_mesh(1, 1, 1, jax.devices()[:1]), 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    """A work directory with one checkpoint, after seven rows of the data."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(str(workdir), 2) as checkpoints:
        checkpoints.save(state, iterator(7), {"steps": 3})
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def restored(workdir, state):
    """(state, the next row of the data)."""
    data = iterator()
    with Checkpoints(str(workdir), 2) as checkpoints:
        found, _ = checkpoints.restore(state, data)
    return found, next(data)


def same(one, two) -> bool:
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in leaves)


def flip(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def text_of(path: Path) -> str:
    """What a file says; "" for numbers."""
    try:
        return path.read_text() if path.is_file() else ""
    except UnicodeDecodeError:
        return ""


def test_what_was_saved_comes_back(workdir, state):
    found, row = restored(workdir, state)
    assert same(found, state) and row == 7


def test_a_checkpoint_says_nothing_of_a_kind_of_device(workdir, state):
    """What it says of shards are numbers of devices; those of other machines are not looked for."""
    step = workdir / "checkpoints" / "0"
    texts = {path: text for path in step.rglob("*") if (text := text_of(path))}
    assert {path.name for path in texts} >= {"metadata", "_METADATA", "_sharding"}
    device = jax.devices()[0]
    for kind in (device.platform, device.device_kind):
        assert not [path for path, text in texts.items() if kind.lower() in text.lower()]
    shards = list(step.rglob("_sharding"))
    assert len(shards) == 2
    for path in shards:
        text = path.read_text()
        other = text.replace(r"\"id\": 0", r"\"id\": 4711").replace("[1, 1, 1]", "[2, 64, 1]")
        assert other != text
        path.write_text(other)
    found, row = restored(workdir, state)
    assert same(found, state) and row == 7
    for path in shards:
        path.unlink()
    found, row = restored(workdir, state)
    assert same(found, state) and row == 7


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_is_never_taken_for_the_state(workdir, state, seed):
    """Of the arrays' own files for even seeds, of any file for odd ones."""
    draw = random.Random(seed)
    files = sorted(p for p in (workdir / "checkpoints" / "0").rglob("*") if p.is_file())
    arrays = [path for path in files if path.stat().st_size > 20_000]
    flip(draw.choice(files if seed % 2 else arrays), draw)
    try:
        found, row = restored(workdir, state)
    except DamagedCheckpoint:
        return
    assert same(found, state) and row == 7 and seed % 2, "damage in an array was not noticed"


def test_the_array_that_is_another_is_named(workdir, state):
    """As a file is that another program wrote, whole by itself."""
    step = workdir / "checkpoints" / "0"
    other = jax.tree.map(lambda x: x, state.params)
    other["b"] = {"q_proj": {"kernel": other["b"]["q_proj"]["kernel"] + 1}}
    shutil.rmtree(step / "params")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(step / "params", other)
    with pytest.raises(DamagedCheckpoint, match=r"params \['b'\].* is not what was saved"):
        restored(workdir, state)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params
    )
    with pytest.raises(DamagedCheckpoint, match=r"\['b'\].* remove .*checkpoints/0 to take"):
        load_params(str(workdir), abstract)


def test_another_place_in_the_data_is_noticed(workdir, state):
    file = next((workdir / "checkpoints" / "0" / "data").glob("process_*"))
    place = json.loads(file.read_text())
    assert "7" in file.read_text()
    file.write_text(json.dumps(place).replace("7", "8"))
    with pytest.raises(DamagedCheckpoint, match="the position in the data"):
        restored(workdir, state)


def test_the_note_says_how_far_a_stage_is(tmp_path, workdir, state):
    assert steps_done(str(tmp_path / "nothing")) is None
    with Checkpoints(str(tmp_path / "run"), 2) as checkpoints:
        checkpoints.save(state, iterator(), {"step": 2, "steps": 3})
    assert steps_done(str(tmp_path / "run")) == (2, 3)
    (tmp_path / "run" / "checkpoints" / "9").mkdir()  # half of a copy
    assert steps_done(str(tmp_path / "run")) == (2, 3)
    assert steps_done(str(workdir)) is None  # of a version whose note was shorter


def test_a_checkpoint_without_checksums_is_read_as_before(workdir, state):
    note = workdir / "checkpoints" / "0" / "meta" / "metadata"
    note.write_text('{"steps": 3}')
    found, row = restored(workdir, state)
    assert same(found, state) and row == 7


def test_parameters_can_be_read_in_another_type(workdir, state):
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), state.params
    )
    found = load_params(str(workdir), abstract)
    assert found["a"]["q_proj"]["kernel"].dtype == jnp.bfloat16


def test_a_save_that_fails_names_the_directory(tmp_path, state, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Checkpoints(str(tmp_path), 2) as checkpoints:
        monkeypatch.setattr(ocp.CheckpointManager, "save", full)
        said = rf"below {tmp_path}/checkpoints .*No space left on device.*free space"
        with pytest.raises(CheckpointError, match=said) as failure:
            checkpoints.save(state, iterator(), {})
    assert "\n" not in str(failure.value)


# ------------------------------------------------------------ what stays on disk, and its names

GOAL = Goal.of("eval/x")


def run_of(workdir, state, values, goal=GOAL, keep=1, first=1, **how):
    """Saves at each step, with what was measured there; ends with the steps on disk."""
    with Checkpoints(str(workdir), keep, goal=goal, **how) as checkpoints:
        for step, value in enumerate(values, first):
            measured = value if isinstance(value, dict) else {"eval/x": value}
            measured = {} if value is None else measured
            checkpoints.save(state.replace(step=jnp.int32(step)), iterator(), {}, measured)
    return kept_steps(str(workdir))


@pytest.mark.parametrize(
    "values, goal, left, best",
    [
        ([1, 3, 2, 2], "eval/x", [2, 4], 2),
        ([1, 3, 2, 2], "-eval/x", [1, 4], 1),
        ([1, 3, 3, 2], "eval/x", [2, 4], 2),  # the first of equals
        ([1, None, None], "eval/x", [1, 3], 1),
        ([None, float("nan"), 1, None], "eval/x", [3, 4], 3),
        ([1, 2, 3], "eval/x", [3], 3),
        ([3, 2, 1], "", [3], None),
    ],
)
def test_the_best_stays_beside_the_newest(tmp_path, state, values, goal, left, best):
    assert run_of(tmp_path, state, values, Goal.of(goal)) == left
    assert best_step(str(tmp_path), Goal.of(goal)) == best


def test_each_of_so_many_updates_stays_for_good(tmp_path, state):
    assert run_of(tmp_path, state, [9, *[None] * 7], every=3, keep=2) == [1, 3, 6, 7, 8]


def test_a_resumed_run_remembers_its_best(tmp_path, state):
    assert run_of(tmp_path, state, [1, 5, 2]) == [2, 3]
    with Checkpoints(str(tmp_path), 1, goal=GOAL) as checkpoints:
        assert checkpoints.best == 2
        assert not checkpoints.is_better({"eval/x": 5}) and checkpoints.is_better({"eval/x": 6})
        assert not checkpoints.is_better({}) and not checkpoints.is_better({"eval/x": float("nan")})
    assert run_of(tmp_path, state, [4, 3], first=4) == [2, 5]
    assert run_of(tmp_path, state, [6, 3], first=6) == [6, 7]


def test_a_resumed_run_with_another_goal_finds_the_best_of_what_is_there(tmp_path, state):
    both = [{"eval/x": 5, "loss": 2.0}, {"eval/x": 1, "loss": 1.0}, {"eval/x": 2, "loss": 3.0}]
    assert run_of(tmp_path, state, both, keep=2) == [1, 2, 3]
    assert run_of(tmp_path, state, [None], Goal.of("-loss"), first=4) == [2, 4]


def test_a_best_checkpoint_that_is_damaged(tmp_path, state):
    """Newest of all it is set aside, and the step that is taken again may be the best again;
    without a note it is the best no longer; read by its name, the others are named.
    """
    run_of(tmp_path, state, [3, 1, 5], keep=3)
    steps = tmp_path / "checkpoints"
    shutil.rmtree(steps / "3" / "learner")
    with Checkpoints(str(tmp_path), 2, goal=GOAL) as checkpoints:
        found, _ = checkpoints.restore(state, iterator())
        assert int(found.step) == 2 and checkpoints.best == 1
        assert checkpoints.is_better({"eval/x": 5})
    (steps / "1" / "meta" / "metadata").write_text("[3")
    assert best_step(str(tmp_path), GOAL) == 2
    named(tmp_path, "eval/x")
    for file in (steps / "2" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params
    )
    with pytest.raises(DamagedCheckpoint, match=r"name another step of .*: 1$"):
        load_params(f"{tmp_path}@best", abstract)


def named(workdir, best) -> None:
    (workdir / "config.json").write_text(json.dumps({"checkpoint": {"best": best}}))


def test_a_checkpoint_is_named_behind_the_directory(tmp_path, state):
    run = tmp_path / "run"
    assert run_of(run, state, [5, 1], keep=2) == [1, 2]
    named(run, "eval/x")
    assert split_source(f"{run}@best") == (str(run), 1)
    assert split_source(f"{run}@2") == (str(run), 2)
    assert split_source(str(run)) == (str(run), None)
    assert split_source("Qwen/some@model") == ("Qwen/some@model", None)
    for wrong in ("3", "newest", "-1", "", "²"):
        with pytest.raises(CheckpointError, match=r"no such checkpoint; .* steps 1, 2, or @best"):
            split_source(f"{run}@{wrong}")
    named(run, "-held_out_loss")
    with pytest.raises(CheckpointError, match=r"no metric was measured .* steps 1, 2: name one"):
        split_source(f"{run}@best")
    (run / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no metric is named by checkpoint\.best"):
        split_source(f"{run}@best")
    shutil.copytree(run, tmp_path / "run@2")  # a directory of this name is meant as it is
    assert split_source(f"{run}@2") == (f"{run}@2", None)


def test_parameters_of_a_named_checkpoint_are_read(tmp_path, state):
    with Checkpoints(str(tmp_path), 2) as checkpoints:
        for step in (1, 2):
            params = jax.tree.map(lambda x, step=step: x * step, state.params)
            checkpoints.save(state.replace(step=jnp.int32(step), params=params), iterator(), {})
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params
    )
    assert same(load_params(f"{tmp_path}@1", abstract), state.params)
    assert not same(load_params(str(tmp_path), abstract), state.params)
    assert source_digest(f"{tmp_path}@1") != source_digest(f"{tmp_path}@2")
    assert source_digest(f"{tmp_path}@2") == source_digest(str(tmp_path))

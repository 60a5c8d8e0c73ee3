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

from mmrecoder_jax.learner.checkpoint import Checkpoints, DamagedCheckpoint, load_params, steps_done
from mmrecoder_jax.learner.update import from_params
from mmrecoder_jax.models.files import CheckpointError
from mmrecoder_jax.models.sharding import make_mesh


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


def test_what_was_saved_comes_back(workdir, state):
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

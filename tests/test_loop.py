"""The loop with updates that are not finite: skipped, counted, never saved, at last refused; and
what a resumed run may change, and does about checkpoints that cannot be read.
"""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import grain
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from ml_collections import ConfigDict

from mmrecoder_jax.config import ConfigError, load, set_fields
from mmrecoder_jax.learner.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    latest_step,
    load_params,
    load_trained,
)
from mmrecoder_jax.loop import Loop
from mmrecoder_jax.models.sharding import make_mesh
from mmrecoder_jax.models.trees import everything
from mmrecoder_jax.monitoring.metrics import read_metrics


@pytest.fixture(scope="module", autouse=True)
def unchecked():
    """A stage is stood in for by what the loop reads of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


def stage_in(workdir, steps: int, **fields) -> SimpleNamespace:
    config = load("sft_chart2code", "smoke")
    set_fields(config, {"train.log_every": 2, "checkpoint.every": 2, "optim.lr": 0.1, **fields})
    config.train.steps = steps
    return SimpleNamespace(
        config=ConfigDict(config),
        workdir=str(workdir),
        mesh=make_mesh(1, 1, 1, jax.devices()[:1]),
        trained=everything,
        saved=everything,
        write_config=lambda: os.makedirs(workdir, exist_ok=True),
        initial_params=lambda: {"q_proj": {"kernel": jnp.ones((3, 2))}},
    )


def loss_fn(params, batch):
    return ((batch["x"] @ params["q_proj"]["kernel"] - 1.0) ** 2).sum(), {}


def run(
    stage, bad: range, until: int | None = None, updates_per_step: int = 1, data=None, **reference
) -> Loop:
    """Trains; the batches of the steps in `bad` hold a NaN, `until` ends as if killed."""
    iterator = iter(grain.MapDataset.range(1000).to_iter_dataset())
    steps = stage.config.train.steps
    with Loop(stage, loss_fn, iterator, steps, updates_per_step, data=data, **reference) as loop:
        for step in loop.steps():
            x = np.random.default_rng(next(iterator)).normal(size=(1, 4, 3)).astype(np.float32)
            if step in bad:
                x[0, 0, 0] = np.nan
            loop.finish(step, loop.update({"x": x}), ("loss", "lr"))
            if step == until:
                break
    return loop


def kernel(loop: Loop) -> np.ndarray:
    return np.asarray(loop.state.params["q_proj"]["kernel"])


def test_a_loss_that_is_nan_for_two_steps_is_skipped_counted_and_shown(tmp_path, capsys):
    loop = run(stage_in(tmp_path, 8), range(3, 5))
    assert np.isfinite(kernel(loop)).all() and int(loop.state.step) == 8
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 0, 0, 0, 0]
    assert rows[4]["lr"] == rows[2]["lr"]  # steps that were not taken do not move the schedule
    shown = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert len(shown) == 1 and "step 4/8" in shown[0] and "skipped 2" in shown[0]
    assert "nan" not in shown[0]


def alarmed(workdir, steps: int) -> SimpleNamespace:
    """A stage that watches the updates it skips, and the mean of its losses."""
    stage = stage_in(workdir, steps)
    with stage.config.unlocked():
        stage.config.alarms = ConfigDict({"skipped": 0.0})
    return stage


def alarm_rows(workdir) -> list[tuple]:
    lines = (workdir / "alarms.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["stage"], row["step"], row["alarm"], row["state"]) for row in rows]


def test_an_alarm_is_said_shown_counted_and_written(tmp_path, capsys):
    run(alarmed(tmp_path, 8), range(3, 5))
    stage = "sft_chart2code"
    assert alarm_rows(tmp_path) == [
        (stage, 3, "skipped", "begins"),
        (stage, 5, "skipped", "ends"),
    ]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["alarms"] for row in rows] == [0, 0, 1, 1, 0, 0, 0, 0]
    lines = capsys.readouterr().out.splitlines()
    assert "alarm: skipped 1 > 0: updates are not taken (docs/monitors.md)" in lines
    assert "alarm ends: skipped, after 2 steps" in lines
    shown = [line for line in lines if "ALARM" in line]
    assert len(shown) == 1 and "step 4/8" in shown[0] and shown[0].endswith("ALARM skipped 1 > 0")


@pytest.mark.parametrize("until", [4, 5, 6, 7])
def test_alarms_of_a_run_that_was_killed_are_those_of_one_that_was_not(tmp_path, until, capsys):
    run(alarmed(tmp_path / "whole", 10), range(4, 8))
    run(alarmed(tmp_path / "killed", 10), range(4, 8), until)
    capsys.readouterr()
    run(alarmed(tmp_path / "killed", 10), range(4, 8))
    assert alarm_rows(tmp_path / "killed") == alarm_rows(tmp_path / "whole")


@pytest.mark.parametrize("until", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("updates_per_step", [1, 2])
def test_a_run_that_is_killed_among_skipped_steps_resumes_to_the_same(
    tmp_path, until, updates_per_step
):
    bad, stage = range(3, 5), stage_in(tmp_path / "killed", 8)
    whole = run(stage_in(tmp_path / "whole", 8), bad, updates_per_step=updates_per_step)
    run(stage, bad, until, updates_per_step)
    # nothing is saved while updates are skipped; what fell due at step 4 is saved at step 5
    saved = {2: 2, 3: 2, 4: 2, 5: 5, 6: 6}[until]
    assert latest_step(stage.workdir) == saved * updates_per_step
    loop = run(stage, bad, updates_per_step=updates_per_step)
    np.testing.assert_array_equal(kernel(loop), kernel(whole))
    rows = read_metrics(tmp_path / "killed" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))


def test_a_loss_that_stays_nan_ends_the_run_with_the_last_good_checkpoint(tmp_path):
    stage = stage_in(tmp_path, 40, **{"optim.max_skipped": 5})
    good = run(stage_in(tmp_path / "good", 40), range(0), until=6)
    with pytest.raises(ConfigError, match=r"5 updates in a row.*optim\.max_skipped=5") as refusal:
        run(stage, range(7, 100))
    assert "\n" not in str(refusal.value)
    assert latest_step(stage.workdir) == 6
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["skipped"] for row in rows[6:]] == [1] * 4  # the fifth ended it
    # the same command ends the same way, and the checkpoint is that of the good run
    with pytest.raises(ConfigError, match="5 updates in a row"):
        run(stage, range(7, 100))
    assert latest_step(stage.workdir) == 6
    resumed = run(stage, range(0), until=7)
    following = run(stage_in(tmp_path / "good", 40), range(0), until=7)
    assert int(good.state.step) == 6
    np.testing.assert_array_equal(kernel(resumed), kernel(following))


def test_a_short_stage_that_never_takes_a_step_does_not_end_well(tmp_path):
    with pytest.raises(ConfigError, match="3 updates in a row"):
        run(stage_in(tmp_path, 3), range(100))
    assert latest_step(str(tmp_path)) is None


def test_a_row_is_written_before_its_checkpoint(tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", killed)
        run(stage_in(tmp_path, 6), range(0))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    run(stage_in(tmp_path, 6), range(0))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [*range(1, 7)]


CHANGES = {
    "seed": 3,
    "train.batch_size": 4,
    "optim.lr": 0.2,
    "optim.warmup_steps": 1,
    "model.freeze_vision": True,
    "lora.rank": 2,
    "data.lengths": (112, 300),
    "processor.max_pixels": 100 * 100,
    "feedback.render": "Again.",
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_resumed_run_with_another_setting_is_refused_or_accepted(tmp_path, capsys, field):
    run(stage_in(tmp_path, 6), range(0), until=2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    changed = {field: CHANGES[field]}
    with pytest.raises(ConfigError, match=f"{field}=.* \\(was .*accept_changes=True") as refusal:
        run(stage_in(tmp_path, 6, **changed), range(0))
    assert "\n" not in str(refusal.value) and "checkpoints/2" in str(refusal.value)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    accepted = {**changed, "checkpoint.accept_changes": True}
    run(stage_in(tmp_path, 6, **accepted), range(0), until=4)
    assert f"resumed with other settings than {tmp_path}/checkpoints/2 has: {field}=" in (
        capsys.readouterr().out
    )
    # what was accepted is what the next checkpoint notes
    run(stage_in(tmp_path, 6, **changed), range(0))
    assert "resumed with other" not in capsys.readouterr().out


def test_how_the_work_is_done_may_change_and_more_steps_are_said(tmp_path, capsys):
    run(stage_in(tmp_path, 4), range(0))
    free = {"model.remat": "full", "env.workers": 7, "train.log_every": 1, "checkpoint.every": 3}
    loop = run(stage_in(tmp_path, 6, **free), range(0))
    assert int(loop.state.step) == 6
    said = capsys.readouterr().out
    assert "checkpoints/4 is of a run of 4 steps, now there are 6: so the cosine" in said
    assert "resumed with other settings" not in said


def test_other_data_and_other_first_weights_are_refused(tmp_path):
    source = tmp_path / "source"
    run(stage_in(source, 2), range(0))
    fields = {"init_from": str(source)}
    run(stage_in(tmp_path / "w", 6, **fields), range(0), until=2, data={"data.dir": "charts"})
    moved = source.rename(tmp_path / "moved")
    fields = {"init_from": str(moved)}
    run(stage_in(tmp_path / "w", 6, **fields), range(0), until=4, data={"data.dir": "charts"})
    with pytest.raises(ConfigError, match=r"data\.dir holds something else"):
        run(stage_in(tmp_path / "w", 6, **fields), range(0), data={"data.dir": "others"})
    run(stage_in(moved, 4), range(0))
    with pytest.raises(ConfigError, match="init_from holds something else"):
        run(stage_in(tmp_path / "w", 6, **fields), range(0), data={"data.dir": "charts"})


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def biggest(directory: Path) -> Path:
    return max(
        (p for p in directory.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size
    )


DAMAGES = {
    "parameters are cut": lambda step: halve(biggest(step / "params")),
    "the optimizer is cut": lambda step: halve(biggest(step / "learner")),
    "the optimizer is missing": lambda step: shutil.rmtree(step / "learner"),
    "parameters are missing": lambda step: shutil.rmtree(step / "params"),
    "the iterator is missing": lambda step: shutil.rmtree(step / "data"),
    "the iterator is cut": lambda step: halve(next((step / "data").glob("process_*"))),
    "the note is cut": lambda step: halve(biggest(step / "meta")),
    "a byte of the parameters is another": lambda step: flip(biggest(step / "params")),
    "it is empty": lambda step: [shutil.rmtree(p) for p in step.iterdir() if p.is_dir()],
}


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_set_aside(tmp_path, capsys, damage):
    whole = run(stage_in(tmp_path / "whole", 8), range(0))
    stage = stage_in(tmp_path / "damaged", 8)
    run(stage, range(0), until=4)
    checkpoints = tmp_path / "damaged" / "checkpoints"
    DAMAGES[damage](checkpoints / "4")
    loop = run(stage, range(0))
    np.testing.assert_array_equal(kernel(loop), kernel(whole))
    rows = read_metrics(tmp_path / "damaged" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert latest_step(stage.workdir) == 8
    assert f"{checkpoints}/4 cannot be read" in (said := capsys.readouterr().out)
    assert "going on from step 2; it is now damaged-4" in said
    assert (checkpoints / "damaged-4").is_dir()


def test_where_every_checkpoint_is_damaged_nothing_is_touched(tmp_path):
    stage = stage_in(tmp_path, 8)
    run(stage, range(0), until=4)
    for step in (2, 4):
        halve(biggest(tmp_path / "checkpoints" / str(step) / "params"))
    with pytest.raises(DamagedCheckpoint, match=r"no checkpoint of .* can be read; the newest, 4"):
        run(stage, range(0))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "4"}


def test_the_last_step_is_saved_even_where_it_was_skipped(tmp_path):
    loop = run(stage_in(tmp_path, 5), range(5, 6))
    assert latest_step(str(tmp_path)) == 5 and np.isfinite(kernel(loop)).all()


def test_mini_batches_are_taken_in_turn(tmp_path):
    """Two passes over two mini-batches are four updates, in this order."""
    stage = stage_in(tmp_path, 1)
    iterator = iter(grain.MapDataset.range(10).to_iter_dataset())
    parts = [np.full((1, 4, 3), x, np.float32) for x in (1.0, 2.0)]
    with Loop(stage, loss_fn, iterator, 1, updates_per_step=4) as loop:
        taken, one = [], loop._update

        def update(state, batch):
            taken.append(float(batch["x"][0, 0, 0]))
            return one(state, batch)

        loop._update = update
        for step in loop.steps():
            loop.finish(step, loop.update(*({"x": x} for x in parts)), ())
    assert taken == [1.0, 2.0, 1.0, 2.0] and int(loop.state.step) == 4


def test_a_checkpoint_holds_the_average_and_a_resumed_run_goes_on_from_what_is_trained(tmp_path):
    whole = run(stage_in(tmp_path / "whole", 6, **{"optim.ema": 0.5}), range(0))
    plain = run(stage_in(tmp_path / "plain", 6), range(0))
    np.testing.assert_array_equal(kernel(whole), kernel(plain))  # what is trained is as without
    stage = stage_in(tmp_path / "parts", 6, **{"optim.ema": 0.5})
    run(stage, range(0), until=4)
    resumed = run(stage, range(0))
    np.testing.assert_array_equal(kernel(resumed), kernel(whole))
    np.testing.assert_array_equal(
        resumed.usable["q_proj"]["kernel"], whole.usable["q_proj"]["kernel"]
    )
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {"q_proj": {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32, sharding=here)}}
    saved = load_params(str(tmp_path / "whole"), abstract)["q_proj"]["kernel"]
    np.testing.assert_array_equal(saved, whole.usable["q_proj"]["kernel"])
    assert np.abs(np.asarray(saved) - kernel(whole)).max() > 1e-3
    trained = load_trained(str(tmp_path / "whole"), abstract, 6)["q_proj"]["kernel"]
    np.testing.assert_array_equal(trained, kernel(whole))


def follow(workdir, every=3, until=None, steps=8, bad=range(0), **fields) -> list[np.ndarray]:
    """Trains with a reference: the distance from it before each step that is taken."""
    apart = []

    class Watched(Loop):
        def update(self, *batches):
            apart.append(kernel(self) - np.asarray(self.reference["q_proj"]["kernel"]))
            return super().update(*batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "Loop", Watched)
        stage = stage_in(workdir, steps, **fields)
        loop = run(stage, bad, until, keep_reference=True, reference_every=every)
    follow.loop = loop
    return apart


def is_zero(apart) -> list[bool]:
    return [not np.any(x) for x in apart]


def test_a_reference_follows_the_policy_every_so_many_steps(tmp_path):
    apart = follow(tmp_path / "three", 3)
    assert is_zero(apart) == [True, False, False, True, False, False, True, False]
    stays = follow(tmp_path / "stays", 0)
    assert is_zero(stays) == [True] + 7 * [False]
    np.testing.assert_array_equal(apart[2], stays[2])  # training itself is the same
    assert not (tmp_path / "stays" / "checkpoints" / "8" / "reference").exists()


@pytest.mark.parametrize("until", [1, 2, 4, 5, 6, 7])
def test_a_resumed_run_has_the_reference_of_one_that_was_not_interrupted(tmp_path, until):
    whole = follow(tmp_path / "whole", 3)
    last = np.asarray(follow.loop.reference["q_proj"]["kernel"])
    follow(tmp_path / "parts", 3, until)
    saved = until // 2 * 2  # checkpoint.every
    apart = follow(tmp_path / "parts", 3)
    assert len(apart) == 8 - saved
    for found, expected in zip(apart, whole[saved:], strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(follow.loop.reference["q_proj"]["kernel"], last)


def test_a_reference_that_falls_due_at_a_skipped_step_is_the_last_good_policy(tmp_path):
    apart = follow(tmp_path, 3, bad=range(3, 5))
    assert is_zero(apart) == [True, False, False, True, True, False, True, False]


def test_a_run_whose_reference_stayed_goes_on_with_one_that_follows(tmp_path):
    """And back: the checkpoints of both can be read."""
    follow(tmp_path, 0, until=4)
    apart = follow(tmp_path, 5, until=6)
    assert is_zero(apart) == [False, True]
    assert (tmp_path / "checkpoints" / "6" / "reference").exists()
    assert is_zero(follow(tmp_path, 0)) == [False, False]


@pytest.mark.parametrize("what", ["cut", "missing", "another byte"])
def test_a_damaged_reference_sets_its_checkpoint_aside(tmp_path, capsys, what):
    follow(tmp_path, 3, until=4)
    item = tmp_path / "checkpoints" / "4" / "reference"
    do = {
        "cut": lambda: halve(biggest(item)),
        "missing": lambda: shutil.rmtree(item),
        "another byte": lambda: flip(biggest(item)),
    }
    do[what]()
    apart = follow(tmp_path, 3)
    assert "going on from step 2; it is now damaged-4" in capsys.readouterr().out
    assert is_zero(apart) == [False, True, False, False, True, False]

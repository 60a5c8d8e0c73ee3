"""Sweeps in a bucket: the points write there themselves, the sweep reads them and writes beside
them.
"""

import json
import shutil

import pytest

from mmrecoder_jax import places
from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.sweeping import command, locks, runner
from mmrecoder_jax.sweeping.jobs import write_jobs
from mmrecoder_jax.sweeping.results import Metric, State, read_result
from mmrecoder_jax.sweeping.runner import Runner
from mmrecoder_jax.sweeping.settings import check_workdir, write_note
from tests.sweeping.sweeps import STUB, sweep_in

ADDRESS = "gs://bucket/runs/eta"
METRIC = Metric("turn2/low_level", "max", 1)


@pytest.fixture
def opened(cloud, tmp_path, monkeypatch):
    """`opened()`: the sweep and its points, on a machine that has nothing of it."""
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    monkeypatch.setenv("STUB", "{}")
    numbers = iter(range(9))

    def machine():
        monkeypatch.setattr(places, "_copies", [])
        monkeypatch.setenv(places.HOME, str(tmp_path / f"machine{next(numbers)}"))
        return sweep_in(places.view(ADDRESS, "sweep", new=True), ["config.seed=0,1"])

    return machine


def test_points_run_in_the_bucket_and_finished_ones_are_skipped(opened, cloud, capsys, monkeypatch):
    sweep, points = opened()
    write_note(sweep)
    monkeypatch.setenv("STUB", json.dumps({"fail": {"seed-1": 2}}))
    first = Runner(sweep, points, STUB, 1, 0, METRIC)
    first.run()
    assert list(first.failures) == ["seed-1"]
    there = cloud.below("runs/eta/")
    assert there["seed-1/failure.txt"].startswith(b"status 1: error: the stub broke")
    assert b"warming up" in there["seed-1/output.txt"]
    assert not [name for name in there if name.startswith((".", "seed-0/."))]

    sweep, points = opened()
    check_workdir(sweep)
    assert read_result(sweep, points[1], METRIC).state == State.FAILED
    monkeypatch.setenv("STUB", "{}")
    capsys.readouterr()
    Runner(sweep, points, STUB, 1, 0, METRIC).run()
    said = capsys.readouterr().out
    assert "1 of 2 points have finished before" in said and "seed-1 goes on" in said
    assert "seed-1 finished" in said and "seed-0" not in said
    command._write(sweep, points, METRIC)
    said = capsys.readouterr().out
    assert f"written: {ADDRESS}/table.txt, " in said and f"{ADDRESS}/sweep.png" in said
    there = cloud.below("runs/eta/")
    assert b"0.31" in there["points.csv"] and there["curves.png"].startswith(b"\x89PNG")
    assert "seed-1/failure.txt" not in there
    assert there["seed-1/output.txt"].count(b"$ ") == 1  # of this machine
    starts = [json.loads(line) for line in there["seed-1/starts.jsonl"].splitlines()]
    assert [start["workdir"] for start in starts] == [f"{ADDRESS}/seed-1"] * 2
    assert "config.data.dir" not in starts[0]  # each point draws its own charts
    shutil.rmtree(sweep.workdir)


def test_a_place_that_holds_something_else_is_refused(opened, cloud):
    cloud.store("bucket", "runs/eta/data/train/charts.jsonl", b"{}")
    cloud.store("bucket", "runs/eta/checkpoints/3/commit_success.txt", b"")
    cloud.store("bucket", "runs/eta/seed-0/config.json", b"{}")
    sweep, _ = opened()
    with pytest.raises(ConfigError, match=r"holds checkpoints, data, seed-0 and no sweep\.json"):
        check_workdir(sweep)
    cloud.objects["bucket"].clear()
    places.refill(sweep.workdir)
    check_workdir(sweep)


def test_a_point_that_runs_here_is_known(opened):
    sweep, points = opened()
    lock = locks.take(sweep.of_machine(points[0]))
    assert lock is not None
    places.refill(sweep.workdir)
    assert read_result(sweep, points[0], METRIC).state == State.RUNNING
    assert locks.take(sweep.of_machine(points[0])) is None


def test_jobs_name_the_address(opened, cloud):
    sweep, points = opened()
    path, _ = write_jobs(sweep, points, "slurm", [], ["python", "-m", "mmrecoder_jax.train"])
    text = path.read_text()
    assert f"--workdir={ADDRESS}/seed-0 " in text
    assert cloud.below("runs/eta/") == {"jobs/slurm/sweep.sh": text.encode()}
    again, _ = opened()
    path, _ = write_jobs(again, points, "slurm", [], ["python", "-m", "mmrecoder_jax.train"])
    assert path.read_text().splitlines()[1] == text.splitlines()[1]  # the name of the job
    with pytest.raises(ConfigError, match="--jobs=kueue: these jobs write to a volume"):
        write_jobs(again, points, "kueue", [], ["python"])

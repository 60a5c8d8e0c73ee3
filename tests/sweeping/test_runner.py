"""Runs of a stub side by side: finished, failed, killed and interrupted ones, and who waits."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from mmrecoder_jax.config import ConfigError, Preempted
from mmrecoder_jax.pipeline import has_finished
from mmrecoder_jax.sweeping import locks, runner
from mmrecoder_jax.sweeping.results import Metric
from mmrecoder_jax.sweeping.runner import Runner, environment, last_line
from tests.sweeping.sweeps import STUB, sweep_in

METRIC = Metric("turn2/low_level", "max", 2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(runner, "ENDING_SECONDS", 3600)  # who waits for it waits too long
    monkeypatch.setenv("STUB", "{}")


def stub(monkeypatch, **plan):
    monkeypatch.setenv("STUB", json.dumps(plan))


def run(sweep, points, workers=2, retries=1):
    found = Runner(sweep, points, STUB, workers, retries, METRIC)
    found.run()
    return found


def starts(sweep, point):
    lines = (sweep.directory(point) / "starts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_point_runs_once(tmp_path, capsys):
    sweep, points = sweep_in(tmp_path)
    assert run(sweep, points).failures == {}
    for point in points:
        assert has_finished("stage2", str(sweep.directory(point)))
        (start,) = starts(sweep, point)
        assert start["config.reward.eta"] == point.texts()["reward.eta"]
        assert start["config.data.dir"] == f"{tmp_path}/data"
    out = capsys.readouterr().out
    assert "sweep: 0 of 4 points have finished before" in out
    assert "eta-0.1_seed-1 finished in 0:0" in out and "4/4 100% ETA 0:00" in out
    run(sweep, points)  # nothing is left to do
    assert all(len(starts(sweep, point)) == 1 for point in points)
    assert "sweep: 4 of 4 points have finished before" in capsys.readouterr().out


def test_a_directory_is_no_finished_point(tmp_path):
    sweep, points = sweep_in(tmp_path, ["config.seed=0"])
    (sweep.directory(points[0]) / "checkpoints").mkdir(parents=True)
    run(sweep, points)
    assert len(starts(sweep, points[0])) == 1


def test_a_failed_point_is_tried_again_after_the_others(tmp_path, monkeypatch, capsys):
    sweep, points = sweep_in(tmp_path)
    stub(monkeypatch, fail={"eta-0_seed-0": 2})
    assert run(sweep, points, workers=1).failures == {}
    assert len(starts(sweep, points[0])) == 2
    out = capsys.readouterr().out
    assert "eta-0_seed-0 FAILED, status 1: error: the stub broke: mend it |" in out
    assert out.index("eta-0.1_seed-1 finished") < out.index("eta-0_seed-0 goes on")
    assert not (sweep.directory(points[0]) / "failure.txt").exists()


def test_a_point_that_fails_for_good_ends_no_other(tmp_path, monkeypatch):
    sweep, points = sweep_in(tmp_path)
    stub(monkeypatch, fail={"eta-0_seed-0": 2})
    found = run(sweep, points, retries=0)
    assert found.failures == {"eta-0_seed-0": "status 1: error: the stub broke: mend it"}
    assert (sweep.directory(points[0]) / "failure.txt").read_text().startswith("status 1: error:")
    assert all(has_finished("stage2", str(sweep.directory(point))) for point in points[1:])
    assert run(sweep, points).failures == {}  # the same command tries it again


def test_a_run_that_ends_well_without_an_end_has_failed(tmp_path):
    sweep, points = sweep_in(tmp_path, ["config.seed=0"])
    quiet = Runner(sweep, points, ["true"], 1, 0, METRIC)
    quiet.run()
    assert quiet.failures == {"seed-0": "status 0: it said nothing"}


def test_runs_go_side_by_side_but_for_the_one_that_builds_the_charts(tmp_path, monkeypatch):
    stub(monkeypatch, pause=0.5)
    sweep, points = sweep_in(tmp_path)
    began = time.monotonic()
    run(sweep, points, workers=4)
    waits = {point.name: starts(sweep, point)[0]["began"] - began for point in points}
    assert (tmp_path / "data" / "test").is_dir()
    first = min(waits, key=waits.get)
    assert first == "eta-0_seed-0"  # the others wait until the charts are there, not for its end
    assert all(
        starts(sweep, point)[0]["began"]
        < (sweep.directory(points[0]) / "ended").stat().st_mtime - time.time() + time.monotonic()
        for point in points
    )


def test_whoever_waits_for_the_charts_of_another_process_goes_on_when_they_are_there(tmp_path):
    sweep, points = sweep_in(tmp_path, ["config.seed=0"])
    lock = locks.take(tmp_path, ".data.lock")

    def build():
        time.sleep(0.3)
        for split in ("train", "val", "test"):
            (tmp_path / "data" / split).mkdir(parents=True)

    other = threading.Thread(target=build)
    other.start()
    run(sweep, points)
    other.join()
    os.close(lock)
    assert has_finished("stage2", str(sweep.directory(points[0])))


def test_a_point_of_another_process_is_waited_for_and_never_run_twice(
    tmp_path, monkeypatch, capsys
):
    """As after a killed sweep, whose run goes on: the lock is the run's."""
    sweep, points = sweep_in(tmp_path, ["config.seed=0"])
    stub(monkeypatch, pause=0.5)
    lock = locks.take(sweep.directory(points[0]))
    orphan = subprocess.Popen([*STUB, *sweep.flags(points[0])], pass_fds=[lock])
    os.close(lock)
    assert run(sweep, points).failures == {}
    assert orphan.wait() == 0
    assert len(starts(sweep, points[0])) == 1
    assert "seed-0 is being run by process" in capsys.readouterr().out


def test_a_point_that_was_preempted_is_no_failure(tmp_path, monkeypatch, capsys):
    sweep, points = sweep_in(tmp_path, ["config.seed=0"])
    stub(monkeypatch, fail={"seed-0": 3}, status=75)
    assert run(sweep, points, retries=0).failures == {}
    assert len(starts(sweep, points[0])) == 2
    out = capsys.readouterr().out
    assert "seed-0 was pre-empted and starts again" in out and "FAILED" not in out
    assert not (sweep.directory(points[0]) / "failure.txt").exists()


def test_sigterm_is_passed_on_and_runs_end_behind_their_step(tmp_path, monkeypatch, capsys):
    stub(monkeypatch, steps=50, pause=0.2, listens=True)
    sweep, points = sweep_in(tmp_path)

    def tell():
        until(lambda: len(list(tmp_path.glob("*/checkpoints/2"))) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    other = threading.Thread(target=tell)
    other.start()
    with pytest.raises(Preempted, match="the same command goes on with the points that are left"):
        run(sweep, points)
    other.join()
    assert not still_there(tmp_path) and "FAILED" not in capsys.readouterr().out
    for name in (points[0].name, points[1].name):  # a step was not cut off: its row and its note
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert len(rows) == len(list((tmp_path / name / "checkpoints").iterdir())) < 50
        assert "KeyboardInterrupt" not in (tmp_path / name / "output.txt").read_text()


@pytest.mark.parametrize("child", [False, True])
def test_an_interrupt_ends_the_runs_and_leaves_nothing(tmp_path, monkeypatch, child):
    stub(monkeypatch, steps=20, pause=0.1, child=child)
    sweep, points = sweep_in(tmp_path)

    def interrupt():
        while len(list(tmp_path.glob("*/checkpoints/2"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM if child else signal.SIGINT)

    other = threading.Thread(target=interrupt)
    other.start()
    with pytest.raises(Preempted if child else KeyboardInterrupt):
        run(sweep, points)
    other.join()
    assert not still_there(tmp_path)
    assert not any(locks.holder(sweep.directory(point)) for point in points)
    stub(monkeypatch, steps=20)
    assert run(sweep, points).failures == {}  # and goes on
    assert [len(starts(sweep, point)) for point in points] == [2, 2, 1, 1]


def still_there(path):
    """Processes whose command line names a directory, but for this one."""
    found = subprocess.run(
        ["ps", "-eww", "-o", "pid,args"], capture_output=True, text=True, check=True
    )
    return [line for line in found.stdout.splitlines() if str(path) in line]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(ConfigError, match=r"gives no locks \(Function not implemented\)"):
        run(*sweep_in(tmp_path, ["config.seed=0"]))


def test_runs_of_a_job_in_the_background_can_be_interrupted(tmp_path, monkeypatch):
    """A shell has such a job ignore SIGINT, and what it starts would inherit that."""
    stub(monkeypatch, steps=1000, pause=0.1)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:

        def end():
            until(lambda: list(tmp_path.glob("*/checkpoints/1")))
            os.kill(os.getpid(), signal.SIGINT)  # not heard
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGTERM)

        other = threading.Thread(target=end)
        other.start()
        with pytest.raises(Preempted):
            run(*sweep_in(tmp_path, ["config.seed=0"]))
        other.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not still_there(tmp_path)


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_nohup_is_respected(tmp_path, monkeypatch):
    stub(monkeypatch, pause=0.1)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        other = threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGHUP])
        other.start()
        assert run(*sweep_in(tmp_path, ["config.seed=0"])).failures == {}
        other.join()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_ends_leaves_nothing(tmp_path, monkeypatch):
    stub(monkeypatch, child=True)
    sweep, points = sweep_in(tmp_path, ["config.seed=0"])
    run(sweep, points)
    assert not still_there(tmp_path)


def test_a_second_interrupt_does_not_wait(tmp_path):
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    sweep, points = sweep_in(tmp_path, ["config.seed=0"])
    found = Runner(sweep, points, [sys.executable, "-c", stubborn], 1, 0, METRIC)

    def interrupt():
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    other = threading.Thread(target=interrupt)
    other.start()
    with pytest.raises(KeyboardInterrupt):
        found.run()
    other.join()
    assert not still_there(tmp_path)


def test_a_metric_that_does_not_exist_ends_no_run(tmp_path, capsys):
    sweep, points = sweep_in(tmp_path, ["config.seed=0,1"])
    found = Runner(sweep, points, STUB, 1, 0, Metric("rewad", "max", 1))
    found.run()
    assert found.failures == {}
    assert capsys.readouterr().out.count("no such metric") == 2


def test_progress_says_how_long_it_still_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "EVERY_SECONDS", 0.1)
    stub(monkeypatch, steps=6, pause=0.1)
    sweep, points = sweep_in(tmp_path, ["config.seed=0,1"])
    run(sweep, points, workers=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "sweep: 0/2" in line]
    assert any(re.search(r"ETA 0:\d\d \| seed-0 [1-5]/6$", line) for line in lines)


def test_cards_are_divided_and_compiled_programs_shared(tmp_path):
    given = {"CUDA_VISIBLE_DEVICES": "4,5,6,7", "HOME": "/h"}
    assert environment(given, "w", 1, 2)["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert environment(given, "w", 0, 8)["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"  # too few to divide
    assert "CUDA_VISIBLE_DEVICES" not in environment({}, "w", 0, 2)
    found = environment(given, str(tmp_path), 0, 1)
    assert found["JAX_COMPILATION_CACHE_DIR"] == f"{tmp_path}/.jax_cache" and found["HOME"] == "/h"
    own = {"JAX_COMPILATION_CACHE_DIR": "/mine"}
    assert environment(own, "w", 0, 1)["JAX_COMPILATION_CACHE_DIR"] == "/mine"


def test_the_last_line_is_our_own_error_where_there_is_one(tmp_path):
    log = tmp_path / "output.txt"
    log.write_text("error: of an earlier try\n")
    start = log.stat().st_size
    log.write_text("error: of an earlier try\n$ command\nstep 1\nerror: now\nnoise\n")
    assert last_line(log, start) == "error: now"
    log.write_text("error: of an earlier try\n$ command\nTraceback\nKeyError: 3\n\n")
    assert last_line(log, start) == "KeyError: 3"

import io
import math
import re
import threading
import time

import numpy as np
import pytest

from mmrecoder_jax.monitoring import progress as progress_module
from mmrecoder_jax.monitoring.progress import (
    STALL_FACTOR,
    Bar,
    Progress,
    bar,
    format_duration,
    format_number,
    format_rate,
)


class Clock:
    """Stands in for the `time` module: tests decide how long things take."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def lines(out):
    return out.getvalue().splitlines()


def run_steps(progress, clock, first, last, seconds):
    for step in range(first, last + 1):
        clock.sleep(seconds)
        progress.step(step, {})


def test_line_has_step_rate_eta_phases_and_means_over_the_interval(clock):
    out = io.StringIO()
    with Progress("stage1", total_steps=60, interval_steps=2, out=out) as progress:
        clock.sleep(40)
        progress.step(1, {"reward": 0.1})
        for step, reward in ((2, 0.5), (3, 0.6), (4, 0.8)):
            with progress.phase("update"):
                clock.sleep(0.5)
            with progress.phase("decode"):
                clock.sleep(1.25)
            clock.sleep(0.25)
            timing = progress.step(step, {"reward": np.float32(reward)})
    assert lines(out)[0] == "stage1 step 1/60 2% 40.0 s/step ETA ? | reward 0.1"
    assert lines(out)[1].startswith("stage1 step 2/60 3% 2.0 s/step ETA 1:56 |")
    assert (
        lines(out)[2]
        == "stage1 step 4/60 7% 2.0 s/step ETA 1:52 | decode 62% update 25% other 12% | reward 0.7"
    )
    assert timing == pytest.approx(
        {"seconds/step": 2.0, "seconds/update": 0.5, "seconds/decode": 1.25}
    )


def test_nested_phases_do_not_count_twice(clock):
    with Progress("stage1", 2, out=io.StringIO()) as progress:
        with progress.phase("decode"):
            clock.sleep(1)
            with progress.phase("execute"):
                clock.sleep(3)
            clock.sleep(2)
        timing = progress.step(1, {})
    assert timing == pytest.approx({"seconds/step": 6, "seconds/decode": 3, "seconds/execute": 3})


def test_a_phase_closes_when_the_work_raises(clock):
    with Progress("stage1", 2, out=io.StringIO()) as progress:
        with pytest.raises(RuntimeError), progress.phase("update"):
            clock.sleep(1)
            raise RuntimeError
        clock.sleep(1)
        assert progress.step(1, {})["seconds/update"] == pytest.approx(1)


def test_eta_follows_a_change_of_pace_and_shrugs_off_one_slow_step(clock):
    out = io.StringIO()
    with Progress("sft", 1000, out=out) as progress:
        run_steps(progress, clock, 1, 1, 300)
        run_steps(progress, clock, 2, 30, 1)
        assert "1.0 s/step ETA 16:10" in lines(out)[-1]  # the compiling step left no trace
        run_steps(progress, clock, 31, 31, 100)
        assert "1.1 s/step" in lines(out)[-1]  # (19 * 1 + 4) / 20
        run_steps(progress, clock, 32, 60, 3)
        assert "3.0 s/step ETA 47:00" in lines(out)[-1]


def test_a_resumed_run_prints_its_first_step_and_excludes_it_from_the_eta(clock):
    out = io.StringIO()
    with Progress("sft", 50, interval_steps=10, start_step=23, out=out) as progress:
        run_steps(progress, clock, 24, 24, 60)
        run_steps(progress, clock, 25, 50, 1)
    assert [re.search(r"step (\d+)/50", line).group(1) for line in lines(out)] == [
        "24",
        "30",
        "40",
        "50",
    ]
    assert "ETA 0:20" in lines(out)[1] and "100%" in lines(out)[-1] and "ETA 0:00" in lines(out)[-1]


def test_a_zero_interval_is_refused():
    with pytest.raises(ValueError, match="interval_steps is 0"):
        Progress("sft", 10, interval_steps=0)


def test_values_are_read_only_when_a_line_is_printed(clock):
    class Late:
        reads = 0

        def __float__(self):
            Late.reads += 1
            return 1.0

    with Progress("sft", 9, interval_steps=4, out=io.StringIO()) as progress:
        reads = []
        for step in range(1, 5):
            clock.sleep(1)
            progress.step(step, {"loss": Late()})
            reads.append(Late.reads)
    assert reads == [1, 1, 1, 4]


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_watchdog_names_the_phase_that_hangs(monkeypatch):
    monkeypatch.setattr(progress_module, "STALL_FACTOR", 0.0)
    out = io.StringIO()
    with Progress("stage1", 9, out=out, stall_seconds=0.1) as progress:
        progress.step(1, {})
        progress.step(2, {})
        with progress.phase("decode"), progress.phase("execute"):
            assert wait_for(lambda: "now in phase execute" in out.getvalue())
    assert re.search(
        r"stage1: no step ended for 0:00 \(usual: .*\), now in phase execute", out.getvalue()
    )


def silence(clock, out, seconds):
    """What the watchdog has said after so much more silence."""
    clock.sleep(seconds)
    time.sleep(0.2)  # it looks every 0.025 seconds
    return [line for line in lines(out) if "no step ended" in line]


def test_watchdog_keeps_quiet_for_ten_times_the_usual(clock):
    out = io.StringIO()
    with Progress("stage1", 9, out=out, stall_seconds=0.1) as progress:
        assert not silence(clock, out, 0.2)  # nothing is usual yet: three times stall_seconds
        assert wait_for(lambda: silence(clock, out, 0.2))
        run_steps(progress, clock, 1, 3, 4.0)
        told = len(silence(clock, out, 4.0 * STALL_FACTOR - 1))
        assert told == len(silence(clock, out, 0.5))
        assert wait_for(lambda: len(silence(clock, out, 1.0)) == told + 1)
    assert "(usual: 4.0 s/step), now between phases" in lines(out)[-1]


def test_no_thread_is_left_after_the_last_step():
    before = threading.active_count()
    progress = Progress("sft", 1, out=io.StringIO())
    assert threading.active_count() == before + 1
    progress.step(1, {})
    assert threading.active_count() == before


def test_bar_prints_at_most_once_per_interval_and_sums_up(clock):
    out = io.StringIO()
    seen = []
    for item in bar("build charts", range(100), unit="chart", every_seconds=10, out=out):
        clock.sleep(0.25)
        seen.append(item)
    assert seen == list(range(100))
    assert lines(out) == [
        "build charts 40/100 40% 4.0 charts/s ETA 0:15",
        "build charts 80/100 80% 4.0 charts/s ETA 0:05",
        "build charts 100/100 in 0:25, 4.0 charts/s",
    ]


def test_bar_of_unknown_length_and_bar_without_items(clock):
    out = io.StringIO()
    for _ in bar("read", iter("abc"), every_seconds=1, out=out):
        clock.sleep(1)
    list(bar("nothing", [], out=out))
    assert lines(out) == [
        "read 1 1.0 s/item",
        "read 2 1.0 s/item",
        "read 3 1.0 s/item",
        "read 3 in 0:03, 1.0 s/item",
        "nothing 0/0 in 0:00, 0 items",
    ]


def test_what_an_earlier_process_did_does_not_enter_the_rate(clock):
    out = io.StringIO()
    with Bar("build charts", 100, unit="chart", every_seconds=1, out=out) as counter:
        counter.resume(80)
        clock.sleep(20)
        counter.advance(10)
    assert lines(out) == [
        "build charts 90/100 90% 2.0 s/chart ETA 0:20",
        "build charts 90/100 in 0:20, 2.0 s/chart",
    ]


def test_bar_that_advances_by_batches(clock):
    out = io.StringIO()
    with Bar("evaluate", 64, unit="chart", every_seconds=1, out=out) as counter:
        clock.sleep(32)
        counter.advance(16)
    assert lines(out)[0] == "evaluate 16/64 25% 2.0 s/chart ETA 1:36"


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0:00"),
        (9.4, "0:09"),
        (59.6, "1:00"),
        (101, "1:41"),
        (7384, "2:03:04"),
        (86400 * 3 + 4 * 3600 + 300, "3d 04:05"),
        (math.nan, "?"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    "seconds, text",
    [(2.14, "2.1 s/step"), (0.04, "25.0 steps/s"), (0, "0.0 s/step"), (math.nan, "? s/step")],
)
def test_format_rate(seconds, text):
    assert format_rate(seconds, "step") == text


@pytest.mark.parametrize(
    "value, text",
    [
        (0.714, "0.714"),
        (12.34, "12.3"),
        (1536, "1536"),
        (1e-5, "1e-05"),
        (0, "0"),
        (-0.5, "-0.5"),
        (math.nan, "nan"),
    ],
)
def test_format_number(value, text):
    assert format_number(value) == text


def test_skipped_updates_are_summed_on_the_line_that_has_some(clock):
    out = io.StringIO()
    with Progress("stage1", total_steps=6, interval_steps=2, out=out) as progress:
        for step, skipped in enumerate((0, 0, 1, 2, 0, 0), 1):
            clock.sleep(1)
            progress.step(step, {"loss": 1.0}, skipped=skipped)
    shown = [line for line in lines(out) if "skipped" in line]
    assert len(shown) == 1 and "step 4/6" in shown[0] and shown[0].endswith("loss 1 skipped 3")


def test_alarms_of_an_interval_stand_at_the_end_of_its_line_in_their_last_words(clock):
    out = io.StringIO()
    with Progress("stage1", 6, interval_steps=3, out=out) as progress:
        rang = [{}, {"forged": "forged 0.1 > 0"}, {"blank": "blank 0.2 > 0.1"}, {}, {}, {}]
        rang[2]["forged"] = "forged 0.3 > 0"
        for step, alarms in enumerate(rang, 1):
            clock.sleep(1)
            progress.step(step, {"loss": 1.0}, alarms=alarms)
    shown = [line for line in lines(out) if "ALARM" in line]
    assert len(shown) == 1 and "step 3/6" in shown[0]
    assert shown[0].endswith("loss 1 | ALARM forged 0.3 > 0, blank 0.2 > 0.1")

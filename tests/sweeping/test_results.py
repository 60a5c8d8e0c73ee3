"""Who has finished and what each run is worth, from files that runs left; tables and pictures."""

import csv
import io
import json
import math

import pytest
from PIL import Image

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.sweeping import locks
from mmrecoder_jax.sweeping.plots import write_plots
from mmrecoder_jax.sweeping.results import (
    FAILURE_FILE,
    Metric,
    State,
    choose_metric,
    ranked,
    read_result,
    settings_of,
)
from mmrecoder_jax.sweeping.tables import best_in_words, points_csv, settings_csv, text_table
from tests.sweeping.sweeps import sweep_in

LOW = "turn2/low_level"
METRIC = Metric(LOW, "max", 2)


def write_run(sweep, point, values, steps=None, name=LOW, stage="stage2"):
    """What a run leaves: a row for each value, and a checkpoint after the last of them."""
    directory = sweep.directory(point)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    rows = [
        {"stage": stage, "step": i, "time": 0.0, name: None if math.isnan(v) else v}
        for i, v in enumerate(values, 1)
    ]
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    note = directory / "checkpoints" / str(len(values)) / "meta" / "metadata"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps({"step": len(values), "steps": steps or len(values)}))


def read(sweep, points, metric=METRIC):
    return [read_result(sweep, point, metric) for point in points]


def test_a_point_has_finished_where_its_run_says_so(tmp_path):
    sweep, points = sweep_in(tmp_path)
    assert {result.state for result in read(sweep, points)} == {State.WAITING}
    write_run(sweep, points[0], [0.1, 0.2, 0.4])
    write_run(sweep, points[1], [0.1, 0.2], steps=3)
    write_run(sweep, points[2], [0.1, 0.2], steps=3)
    (sweep.directory(points[2]) / FAILURE_FILE).write_text("status 1: error: no\n")
    results = read(sweep, points)
    assert [result.state for result in results] == [
        *(State.FINISHED, State.UNFINISHED, State.FAILED, State.WAITING)
    ]
    assert results[0].value == pytest.approx(0.3)  # the last two rows
    assert math.isnan(results[1].value) and results[1].step == 2 and results[1].steps == 3
    assert results[2].failure == "status 1: error: no"
    lock = locks.take(sweep.directory(points[1]))
    locks.note_process(lock, 4711)
    assert read(sweep, points)[1].state == State.RUNNING
    assert locks.holder(sweep.directory(points[1])) == "process 4711"
    assert locks.take(sweep.directory(points[1])) is None


def test_a_pipeline_has_finished_with_its_report(tmp_path):
    sweep, (point,) = sweep_in(tmp_path, ["config.seed=0"], "pipeline")
    directory = sweep.directory(point)
    for stage in ("sft_chart2code", "sft_self_correction", "stage1", "stage2"):
        (directory / stage).mkdir(parents=True)
        (directory / stage / "evaluation.json").write_text("[]")
    row = {"stage": "stage2", "step": 1, "time": 0.0, LOW: 0.5}
    (directory / "stage2" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert read_result(sweep, point, METRIC).state != State.FINISHED
    (directory / "report.html").touch()
    result = read_result(sweep, point, choose_metric(sweep))
    assert (result.state, result.value) == (State.FINISHED, 0.5)


@pytest.mark.parametrize(
    ("stage", "fixed", "metric"),
    [
        ("stage2", {}, Metric(LOW, "max", 10)),
        ("stage1", {"rl.turns": 3}, Metric("turn3/low_level", "max", 10)),
        ("sft_chart2code", {}, Metric("held_out_loss", "min", 1)),
        ("sft_chart2code", {"train.eval_every": 0}, Metric("loss", "min", 10)),
        ("sft_self_correction", {}, Metric("loss", "min", 10)),
        ("pipeline", {}, Metric(LOW, "max", 10)),
    ],
)
def test_the_metric_goes_by_the_kind_of_stage(tmp_path, stage, fixed, metric):
    sweep, _ = sweep_in(tmp_path, ["config.seed=0"], stage, **fixed)
    assert choose_metric(sweep) == metric


def test_a_chosen_metric(tmp_path):
    sweep, _ = sweep_in(tmp_path)
    assert choose_metric(sweep, "reward") == Metric("reward", "max", 10)
    assert choose_metric(sweep, "seconds/step") == Metric("seconds/step", "min", 10)
    assert choose_metric(sweep, "entropy", "min", 3) == Metric("entropy", "min", 3)
    with pytest.raises(ConfigError, match="--best=most: use max or min"):
        choose_metric(sweep, best="most")
    with pytest.raises(ConfigError, match="--last=-1: use 1 or more"):
        choose_metric(sweep, last=-1)
    turns, _ = sweep_in(tmp_path, ["config.rl.turns=2,3"])
    with pytest.raises(ConfigError, match=r"rl.turns is swept.*give --metric"):
        choose_metric(turns)


def test_a_metric_that_does_not_exist_is_answered_with_those_that_do(tmp_path):
    sweep, points = sweep_in(tmp_path)
    write_run(sweep, points[0], [0.1])
    with pytest.raises(ConfigError, match=r"--metric=turn2/low: eta-0_seed-0 .* turn2/low_level"):
        read(sweep, points, Metric("turn2/low", "max", 1))
    (sweep.directory(points[0]) / "metrics.jsonl").write_text("}\n{}\n")
    with pytest.raises(ConfigError, match="line 1 is broken"):
        read(sweep, points)


@pytest.fixture
def swept(tmp_path):
    """(work directory, results): two settings with three seeds; one run of the second failed."""
    sweep, points = sweep_in(tmp_path, ["config.reward.eta=0,0.1", "config.seed=0,1,2"])
    for point in points:
        score = 0.2 + point.values["reward.eta"] + point.values["seed"] / 100
        if point.name == "eta-0.1_seed-2":
            write_run(sweep, point, [score], steps=3)
            (sweep.directory(point) / FAILURE_FILE).write_text("status 1: error: a, b\n")
        else:
            write_run(sweep, point, [0.0, score, score])
    return tmp_path, read(sweep, points)


def test_mean_and_interval_are_over_seeds(swept):
    _, results = swept
    first, second = settings_of(results)
    found = first.over_seeds
    assert found.mean == pytest.approx(0.21)
    # Student's t with 2 degrees of freedom: 4.3027 * 0.01 / sqrt(3)
    assert found.high - found.mean == pytest.approx(0.024841, abs=1e-6)
    assert (second.over_seeds.count, len(second.results)) == (2, 3)
    assert ranked([first, second], "max") == [second, first]
    assert ranked([first, second], "min") == [first, second]


def test_tables(swept):
    _, results = swept
    settings = settings_of(results)
    lines = text_table(settings, METRIC).splitlines()
    assert lines[0].split()[:3] == ["reward.eta", "finished", LOW]
    assert "3 of 3" in lines[1] and "[0.185, 0.235]" in lines[1] and "best" not in lines[1]
    assert lines[2].endswith("best, 1 failed")
    rows = list(csv.DictReader(io.StringIO(settings_csv(settings, METRIC))))
    assert [row["reward.eta"] for row in rows] == ["0", "0.1"]
    assert float(rows[0]["mean"]) == pytest.approx(0.21) and rows[1]["finished"] == "2"
    points = list(csv.DictReader(io.StringIO(points_csv(results, METRIC))))
    assert [row["state"] for row in points] == ["finished"] * 5 + ["failed"]
    assert points[5]["failure"] == "status 1: error: a, b" and points[5]["value"] == ""


def test_the_best_is_named_with_what_can_be_said_against_it(swept):
    _, results = swept
    said = best_in_words(settings_of(results), METRIC)
    assert said.startswith("best (max): reward.eta=0.1, turn2/low_level 0.305 [")
    assert "2 of its 3 runs have finished" in said and "best run is eta-0.1_seed-1" in said
    low = best_in_words(settings_of(results), Metric(LOW, "min", 2))
    assert low.startswith("best (min): reward.eta=0,") and "best run is eta-0_seed-0" in low
    single = best_in_words(settings_of([results[0], results[3]]), METRIC)
    assert "one run of a setting says little" in single
    alike = best_in_words(settings_of([results[0], results[2]]), METRIC)
    assert alike.endswith("its best run is eta-0_seed-1")
    assert best_in_words(settings_of(results[5:]), METRIC) == "best: no point has finished"


def test_intervals_that_overlap_are_said(tmp_path):
    sweep, points = sweep_in(tmp_path)
    for point, value in zip(points, (0.1, 0.2, 0.12, 0.3), strict=True):
        write_run(sweep, point, [value])
    said = best_in_words(settings_of(read(sweep, points)), METRIC)
    assert "its interval overlaps that of reward.eta=0:" in said


def test_settings_that_are_equally_good_are_said(tmp_path):
    sweep, points = sweep_in(tmp_path)
    for point in points:
        write_run(sweep, point, [0.0])
    said = best_in_words(settings_of(read(sweep, points)), METRIC)
    assert "reward.eta=0, turn2/low_level 0 [0, 0] over 2 seeds; reward.eta=0.1 is as good;" in said


@pytest.mark.parametrize(
    "words",
    [
        ["config.reward.eta=0,0.1", "config.seed=0,1"],
        ["config.optim.lr=log:1e-6:1e-3:4"],
        ["config.rl.aggregation=token_mean,constant", "config.rl.group=2,4"],
        ["config.reward.eta=0,1", "config.rl.group=2,4", "config.rl.std_ddof=0,1"],
        ["config.seed=0,1,2"],
        ["config.data.lengths=(112,264),(264,)"],
    ],
)
def test_pictures(tmp_path, words):
    sweep, points = sweep_in(tmp_path, words)
    assert write_plots(settings_of(read(sweep, points)), METRIC, tmp_path) == []
    for i, point in enumerate(points):
        write_run(sweep, point, [0.1, 0.2 + i / 50, math.nan if i == 1 else 0.3])
    paths = write_plots(settings_of(read(sweep, points)), METRIC, tmp_path)
    assert [path.name for path in paths] == ["sweep.png", "curves.png"]
    for path in paths:
        picture = Image.open(path).convert("L")
        assert picture.width > 400 and len(picture.getcolors()) > 20
    assert not list(tmp_path.glob(".*.png"))

import json
import math
import os
import signal
import subprocess
import sys
import types

import numpy as np
import pytest

from mmrecoder_jax.monitoring.metrics import MetricsWriter, Sample, read_metrics


def steps(path, stage):
    return [row["step"] for row in read_metrics(path) if row["stage"] == stage]


def test_rows_come_back_with_zero_dimensional_arrays_as_numbers(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(
            3, "stage1", {"loss": np.float32(0.5), "reward/turn1": np.array(0.25), "count": 7}
        )
        # readable while the writer is open: every row is flushed
        (row,) = read_metrics(writer.path)
    assert row.pop("time") > 1.7e9
    assert row == {"stage": "stage1", "step": 3, "loss": 0.5, "reward/turn1": 0.25, "count": 7.0}


def test_values_that_are_not_finite_stay_strict_json(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, "stage1", {"loss": math.nan, "ratio": math.inf})

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(writer.path.read_text(), parse_constant=refuse)["loss"] is None
    row = read_metrics(writer.path)[0]
    assert math.isnan(row["loss"]) and math.isnan(row["ratio"])


@pytest.mark.parametrize("name", ["stage", "step", "time"])
def test_reserved_names_are_refused(tmp_path, name):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match=name):
        writer.write(1, "stage1", {name: 1.0})


def test_rewind_drops_only_later_rows_of_that_stage(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for stage in ("stage1", "stage2"):
            for step in range(1, 6):
                writer.write(step, stage, {"loss": step})
    with MetricsWriter(tmp_path) as writer:
        writer.rewind("stage2", 3)
        assert steps(writer.path, "stage2") == [1, 2, 3]
        for step in (4, 5, 6):
            writer.write(step, "stage2", {"loss": -step})
    assert steps(writer.path, "stage1") == [1, 2, 3, 4, 5]
    assert steps(writer.path, "stage2") == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in read_metrics(writer.path)][-3:] == [-4.0, -5.0, -6.0]


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_cut_off_by_a_kill_is_removed_and_writing_continues(tmp_path, cut):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, "stage1", {"loss": 1.0})
        whole = writer.path.read_bytes()
        writer.write(2, "stage1", {"loss": 2.0})
    writer.path.write_bytes(writer.path.read_bytes()[: len(whole) + cut])
    assert steps(writer.path, "stage1") == [1]
    with MetricsWriter(tmp_path) as writer:
        writer.write(2, "stage1", {"loss": 3.0})
    assert [json.loads(line).get("loss") for line in writer.path.read_text().splitlines()] == [
        1.0,
        3.0,
    ]


def test_a_last_row_that_lost_only_its_newline_is_kept(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, "stage1", {"loss": 1.0})
    writer.path.write_bytes(writer.path.read_bytes().rstrip(b"\n"))
    with MetricsWriter(tmp_path) as writer:
        writer.write(2, "stage1", {"loss": 2.0})
    assert steps(writer.path, "stage1") == [1, 2]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "stage1", "step": 1}\n{"stage": \n{"stage": "stage1", "step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_metrics(tmp_path / "nowhere" / "metrics.jsonl")


ENDLESS = """
import itertools, sys
from mmrecoder_jax.monitoring.metrics import MetricsWriter
writer = MetricsWriter(sys.argv[1])
for step in itertools.count(1):
    writer.write(step, "stage1", {"loss": step / 7})
    print(step, flush=True)
"""


def test_rows_survive_sigkill(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    for _ in range(50):
        printed = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    MetricsWriter(tmp_path).close()
    found = steps(tmp_path / "metrics.jsonl", "stage1")
    assert len(found) >= printed and found == list(range(1, len(found) + 1))


@pytest.mark.parametrize(
    "package, options", [("tensorboardX", {"tensorboard": True}), ("wandb", {"wandb": "charts"})]
)
def test_a_missing_tracker_is_reported_and_rows_are_still_written(
    tmp_path, monkeypatch, capsys, package, options
):
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError
    with MetricsWriter(tmp_path, **options) as writer:
        writer.write(1, "stage1", {"loss": 1.0})
    assert f"{package} is not installed" in capsys.readouterr().err
    assert steps(writer.path, "stage1") == [1]


def replace_module(monkeypatch, name, **contents):
    """Stands in for a package that need not be installed."""
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def test_event_files_are_one_directory_per_stage_and_purged_by_rewind(tmp_path, monkeypatch):
    made = []

    class SummaryWriter:
        def __init__(self, directory, purge_step):
            self.scalars, self.closed = [], False
            made.append((os.path.basename(directory), purge_step, self))

        def add_scalar(self, *point):
            self.scalars.append(point)

        def close(self):
            self.closed = True

    replace_module(monkeypatch, "tensorboardX", SummaryWriter=SummaryWriter)
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write(1, "stage1", {"loss": 1.0})
        writer.rewind("stage1", 0)
        writer.write(1, "stage1", {"loss": 2.0})
    assert [(name, purge, made_writer.scalars) for name, purge, made_writer in made] == [
        ("stage1", None, [("loss", 1.0, 1)]),
        ("stage1", 1, [("loss", 2.0, 1)]),
    ]
    assert all(made_writer.closed for _, _, made_writer in made)


def test_wandb_continues_in_the_same_run(tmp_path, monkeypatch):
    started, logged = [], []

    class Run:
        define_metric = staticmethod(lambda name, step_metric: logged.append((name, step_metric)))
        log = staticmethod(logged.append)
        finish = staticmethod(lambda: logged.append("finished"))

    def init(**options):
        started.append(options)
        return Run()

    replace_module(monkeypatch, "wandb", init=init)
    for _ in range(2):
        with MetricsWriter(tmp_path, wandb="charts", config={"lr": 0.1}) as writer:
            writer.write(1, "stage1", {"loss": 1.0})
    assert started[0] == started[1]  # the id too
    assert started[0]["project"] == "charts" and started[0]["config"] == {"lr": 0.1}
    assert logged[:3] == [
        ("stage1/*", "stage1/step"),
        {"stage1/step": 1, "stage1/loss": 1.0},
        "finished",
    ]


HOSTILE = "<script>alert(1)</script>\n# heading"
RENDER = np.full((8, 3, 3), 7, np.uint8)
SAMPLE = Sample(
    {"chart": "a", "advantage": 0.5, "turn 1 response": HOSTILE},
    np.zeros((4, 6, 3), np.uint8),
    [RENDER, None],
)


def test_a_strip_has_the_target_and_every_turn_at_its_height():
    strip = SAMPLE.strip()
    assert strip.shape == (4, 6 + 2 * (2 + 6), 3)
    first, second = strip[:, 8:14], strip[:, 16:]
    assert (first[0, 0] == 7).all() and (first[:, 3:] == 128).all()  # fitted, its shape kept
    assert (second == 128).all()


def test_tensorboard_is_shown_pictures_and_a_text_without_markdown_of_a_model(
    tmp_path, monkeypatch
):
    images, texts = [], []

    class SummaryWriter:
        def __init__(self, directory, purge_step):
            pass

        def add_image(self, tag, image, step, dataformats):
            images.append((tag, image.shape, step, dataformats))

        def add_text(self, tag, text, step):
            texts.append((tag, text, step))

        def close(self):
            pass

    replace_module(monkeypatch, "tensorboardX", SummaryWriter=SummaryWriter)
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        assert writer.shows_pictures
        writer.show(3, "stage1", [SAMPLE, SAMPLE])
    assert images == [(f"trajectories/{i}", SAMPLE.strip().shape, 3, "HWC") for i in (0, 1)]
    ((tag, text, step),) = texts
    assert (tag, step) == ("trajectories", 3)
    lines = [line for line in text.splitlines() if line and not line.startswith("trajectory ")]
    assert len(lines) == 8 and all(line.startswith("    ") for line in lines)
    assert "    turn 1 response: <script>alert(1)</script>" in lines


def test_wandb_is_given_a_table_of_trajectories(tmp_path, monkeypatch):
    logged = []

    class Table:
        def __init__(self, columns):
            self.columns, self.data = columns, []

        def add_data(self, *cells):
            self.data.append(cells)

    run = types.SimpleNamespace(log=logged.append, finish=lambda: None)
    replace_module(monkeypatch, "wandb", init=lambda **_: run, Table=Table, Image=np.shape)
    with MetricsWriter(tmp_path, wandb="charts") as writer:
        writer.show(3, "stage1", [SAMPLE])
    (point,) = logged
    table = point["stage1/trajectories"]
    assert point["stage1/step"] == 3
    assert table.columns == ["target and turns", "chart", "advantage", "turn 1 response"]
    assert table.data == [(SAMPLE.strip().shape, "a", 0.5, HOSTILE)]


def test_without_them_no_picture_is_made(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        assert not writer.shows_pictures

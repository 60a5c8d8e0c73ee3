"""Rows of questions that show several pictures, as the supervised stages and RL learn them."""

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mmrecoder_jax.config import load
from mmrecoder_jax.data.batching import Collate
from mmrecoder_jax.data.pipeline import single_turn_row
from mmrecoder_jax.data.sources import ChartDirectory, Questions
from mmrecoder_jax.sft import sft_shape
from tests.commands import ENVIRONMENT
from tests.conftest import train_command


def with_two_pictures(policy, numbers):
    """Charts of the policy; those of these numbers show a second one."""
    return [
        dataclasses.replace(chart, more_images=(policy.charts[number - 1].image,))
        if number in numbers
        else chart
        for number, chart in enumerate(policy.charts[:6])
    ]


@pytest.mark.parametrize("size, count", [(1, 6), (2, 3), (6, 1)])
def test_rows_of_one_and_of_two_pictures_share_micro_batches(policy, size, count):
    """Also where a device has one row at a time."""
    stage, charts = policy.stage, with_two_pictures(policy, (1, 3, 4))
    config = load("sft_chart2code", "smoke")
    config.train.micro_batch_size = size
    shape = sft_shape(config, stage.layout, 0, 1, Questions(2, 1.5))
    assert shape.images == {1: 2, 2: 3, 6: 9}[size]
    rows = [single_turn_row(chart, stage.processor) for chart in charts]
    batch = Collate(shape, stage.layout)(rows)
    assert len(batch["tokens"]) == count
    merged = stage.layout.merged(batch["patches"].shape[2])
    shown = (batch["vision_index"] >= 0).sum()
    assert shown == sum((piece == stage.layout.image_id).sum() for piece in map(ids, rows))
    places = batch["vision_index"][batch["vision_index"] >= 0] // merged
    assert places.max() < shape.images


def ids(row):
    return row.pieces[0].ids


def test_a_question_is_learnt_as_it_is_evaluated(policy, pool):
    """What the model reads of a training row is what it reads in an evaluation."""
    stage, (_, chart) = policy.stage, with_two_pictures(policy, (1,))[:2]
    row = single_turn_row(chart, stage.processor)
    asked = stage.engine(pool, 0.0).prompt(chart)
    np.testing.assert_array_equal(row.pieces[0].ids, asked.ids)
    assert len(asked.images) == 2 and row.images == asked.images


def more_pictures(directory: Path) -> None:
    """Every second chart shows the one before it too."""
    path = directory / "charts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (directory / "more_images").mkdir()
    for before, row in zip(rows[::2], rows[1::2], strict=False):
        name = f"more_images/{row['id']}-2.png"
        shutil.copyfile(directory / before["image"], directory / name)
        row["more_images"] = [name]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ChartDirectory(directory).questions() == Questions(2, 1.5)


@pytest.mark.slow
def test_both_loops_learn_from_questions_of_two_pictures(smoke_run, tmp_path):
    shutil.copytree(os.path.join(smoke_run.workdir, "data"), tmp_path / "data")
    for split in ("train", "val"):
        more_pictures(tmp_path / "data" / split)
    common = [f"--config.data.dir={tmp_path / 'data'}", "--config.train.steps=2"]
    common += [f"--config.init_from={smoke_run.workdir}/sft_self_correction"]
    for stage, *flags in (
        ("sft_chart2code", "--config.data.lengths=(184,)"),
        ("stage2", "--config.rl.prompt_length=72", "--config.data.lengths=(344,)"),
    ):
        done = subprocess.run(
            train_command(stage, str(tmp_path / stage), *common, *flags),
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert "left out" not in done.stdout
        rows = (tmp_path / stage / "metrics.jsonl").read_text().splitlines()
        metrics = json.loads(rows[-1])
        assert metrics["step"] == 2 and not metrics["skipped"]
    assert metrics["logp_gap"] < 1e-4  # sampler and learner saw the same pictures

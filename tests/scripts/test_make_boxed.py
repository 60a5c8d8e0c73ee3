"""The box is made of a stage that was trained and evaluated, and opened like any other."""

import json

import jax
import numpy as np
import optax
import pytest

from mmrecoder_jax.data.pipeline import prompts
from mmrecoder_jax.data.survey import BadRows
from mmrecoder_jax.drawing.open import Who, author_config, open_author
from mmrecoder_jax.learner.checkpoint import Checkpoints
from mmrecoder_jax.learner.update import from_params
from tests.scripts.run import run_script

ROW = {
    "policy": "stage2",
    "set": "test",
    "decoding": "greedy",
    "charts": 4,
    "exec_rate": 0.75,
    **dict.fromkeys(("low_level", "text", "layout", "type", "color"), 0.625),
    "low_level_ci": [0.5, 0.75],
}
GAIN = {
    "counted": 3,
    "improvement": -0.031,
    "improvement_ci": [-0.066, -0.003],
    "improved": 0.1,
    "regressed": 0.2,
    "code_repeat": 0.3,
}


@pytest.fixture(scope="module")
def runs(policy, tmp_path_factory):
    """A work directory with one stage, that of the untrained policy."""
    workdir = tmp_path_factory.mktemp("runs")
    (workdir / "stage2").symlink_to(policy.stage.workdir)
    with Checkpoints(policy.stage.workdir, 1, policy.stage.saved) as checkpoints:
        state = from_params(policy.params, optax.sgd(0.1), policy.stage.mesh, 0)
        stream = prompts(policy.charts, 2, policy.stage.processor, BadRows(0), seed=0)
        checkpoints.save(state, iter(stream), {})
    rows = [ROW | {"turn": 1}, ROW | GAIN | {"turn": 2}]
    (workdir / "stage2" / "evaluation.json").write_text(json.dumps(rows))
    return workdir


@pytest.fixture(scope="module")
def box(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("package") / "boxed"
    done = run_script("make_boxed", f"--workdir={runs}", f"--out={out}")
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_the_box_holds_the_policy_and_how_it_is_asked(box, policy, pool):
    names = {path.name for path in box.iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.model", "mmrecoder.json"}
    assert sum(path.stat().st_size for path in box.iterdir()) < 8 << 20
    config, trained = author_config(Who(str(box))), policy.stage.config
    assert config.feedback.to_dict() == trained.feedback.to_dict()
    assert tuple(config.data.windows) == tuple(trained.data.windows)
    assert config.rl.response_length == trained.rl.response_length
    with open_author(Who(str(box)), env=pool) as author:
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), author.params, policy.params)


def test_the_card_says_what_was_measured(box):
    text = (box / "README.md").read_text()
    assert "stage: stage2, step 0" in text and "trained by: a commit that was not noted" in text
    assert "| test | greedy | 1 | 75.0 | 62.5 [50.0, 75.0] |" in text
    words = " ".join(text.split())
    assert (
        "It does not correct itself. What turn 2 does to turn 1: test charts, greedy, -3.1 "
        in words
    )
    assert "-3.1 [-6.6, -0.3]" in words and "test charts: 62.5, 62.5. It was trained on 2" in words


def test_what_is_no_finished_pipeline_is_refused(tmp_path, runs):
    for flags, said in (
        ((f"--workdir={tmp_path}",), "no stage in it has an evaluation.json"),
        ((f"--workdir={runs}", "--stage=stage1"), "evaluate the stage first"),
        ((f"--workdir={runs}", "--commit=none-such"), "no commit of the checkout"),
    ):
        done = run_script("make_boxed", *flags, f"--out={tmp_path / 'out'}")
        assert done.returncode == 1 and done.stderr.startswith("error: ") and said in done.stderr
    assert not (tmp_path / "out").exists()

"""The box is made of a stage that was trained and evaluated, and opened like any other."""

import json
import runpy

import jax
import numpy as np
import optax
import pytest

from mmrecoder_jax.config import STAGES, ConfigError, load, set_fields
from mmrecoder_jax.data import panels, synthetic
from mmrecoder_jax.data.pipeline import prompts
from mmrecoder_jax.data.survey import BadRows
from mmrecoder_jax.drawing.open import Who, author_config, open_author
from mmrecoder_jax.learner.checkpoint import Checkpoints
from mmrecoder_jax.learner.update import from_params
from tests.scripts.run import ROOT, run_script

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
    assert "A second turn harms: test charts, greedy, -3.1 [-6.6, -0.3]." in words
    assert "test charts: 62.5, 62.5. It was trained on 2" in words
    assert (
        "pipeline.py:smoke --workdir=runs/tiny" in text and "--config.data.train_count=12" in text
    )


def test_what_is_no_finished_pipeline_is_refused(tmp_path, runs):
    for flags, said in (
        ((f"--workdir={tmp_path}",), "no stage in it has an evaluation.json"),
        ((f"--workdir={runs}", "--stage=stage1"), "evaluate the stage first"),
        ((f"--workdir={runs}", "--commit=none-such"), "no commit of the checkout"),
    ):
        done = run_script("make_boxed", *flags, f"--out={tmp_path / 'out'}")
        assert done.returncode == 1 and done.stderr.startswith("error: ") and said in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "scripts" / "make_boxed.py"))


def saved_run(workdir, *stages, **fields):
    """Work directories of stages of `:tiny` with these fields, as far as a card reads them."""
    for stage in stages:
        config = load(stage, "tiny")
        set_fields(config, {name.replace("__", "."): value for name, value in fields.items()})
        (workdir / stage).mkdir(parents=True)
        (workdir / stage / "config.json").write_text(config.to_json_best_effort())
    return str(workdir)


def card_of(script, workdir, stage="stage2"):
    text = script["card"](workdir, [ROW | {"turn": 1}], stage, "", 3, 4 << 20)
    return " ".join(text.split())


@pytest.mark.parametrize(
    "name, grammar, other", [("words", synthetic, panels), ("panels", panels, synthetic)]
)
def test_the_card_describes_the_grammar_of_the_policy(script, tmp_path, name, grammar, other):
    words = card_of(script, saved_run(tmp_path, *STAGES, data__grammar=name))
    assert f"`data.grammar={name}`" in words and "168 x 112 pixels" in words
    assert grammar.DESCRIPTION in words and f"Beyond it are {grammar.BEYOND}" in words
    assert other.DESCRIPTION not in words and other.BEYOND not in words


def test_a_policy_from_before_there_were_grammars_is_of_words(script, tmp_path):
    workdir = saved_run(tmp_path, "stage2")
    path = tmp_path / "stage2" / "config.json"
    saved = json.loads(path.read_text())
    del saved["data"]["grammar"]
    path.write_text(json.dumps(saved))
    assert synthetic.DESCRIPTION in card_of(script, workdir)


def test_the_card_says_how_far_the_recipe_went(script, tmp_path):
    workdir = saved_run(tmp_path, *STAGES)
    assert "by the whole recipe of MM-ReCoder" in card_of(script, workdir)
    assert "up to the stage stage1." in card_of(script, workdir, "stage1")


def test_the_command_has_what_the_run_has_otherwise_than_its_size(script, tmp_path):
    plain = saved_run(tmp_path / "plain", *STAGES, env__workers=77)
    first, second = script["commands"](plain, "tiny")
    assert first == (
        "python -m mmrecoder_jax.train --config=configs/pipeline.py:tiny --workdir=runs/tiny"
    )
    other = tmp_path / "other"
    fields = {"data__windows": (6, 18), "processor__system": "You draw.", "seed": 3}
    saved_run(other, "sft_chart2code", data__test_count=7, **fields)
    saved_run(other, "stage2", data__test_count=9, rl__group=5, **fields)
    *lines, last = script["commands"](str(other), "tiny")
    assert last == second and lines[0].startswith(first)
    words = " ".join(lines)
    for flag in (
        *("--config.seed=3", "--config.stages.stage2.rl.group=5"),
        *("'--config.data.windows=(6, 18)'", "'--config.processor.system=You draw.'"),
    ):
        assert words.count(f" {flag}") == 1, flag
    assert "_count" not in words and all(line.endswith(" \\") for line in lines[:-1])
    assert max(map(len, lines)) < 100


def test_stages_that_one_pipeline_cannot_train_have_commands_of_their_own(script, tmp_path):
    first, second, third = STAGES[0], STAGES[1], STAGES[3]
    saved_run(tmp_path, first, second, seed=1)
    saved_run(tmp_path, third, rl__group=5)
    text = "\n".join(script["commands"](str(tmp_path), "tiny")).replace(" \\\n   ", "")
    *stages, evaluation, last = text.splitlines()
    assert last == "python scripts/make_boxed.py --workdir=runs/tiny --commit=COMMIT"
    before, own = "", ((first, "seed=1"), (second, "seed=1"), (third, "rl.group=5"))
    for (name, flag), line in zip(own, stages, strict=True):
        program = f"train --config=configs/{name}.py:tiny --workdir=runs/tiny/{name}"
        source = f" --config.init_from={before}" if before else ""
        before = f"runs/tiny/{name}"
        charts = "--config.data.dir=runs/tiny/data"
        assert line == f"python -m mmrecoder_jax.{program}{source} {charts} --config.{flag}"
    program = "evaluate --config=configs/evaluate.py:tiny"
    asked = f"--workdir={before} --config.init_from={before} {charts}"
    assert evaluation == f"python -m mmrecoder_jax.{program} {asked}"


@pytest.mark.parametrize(
    "bounds, said",
    [
        ((0.01, 0.05), "A second turn helps"),
        ((-0.02, 0.01), "There is no sign that a second turn helps or harms"),
        ((0.0, 0.0), "There is no sign that a second turn helps or harms"),
        ((-0.05, -0.01), "A second turn harms"),
    ],
)
def test_the_limits_follow_the_interval(script, bounds, said):
    rows = [ROW | {"turn": 1}, ROW | GAIN | {"turn": 2, "improvement_ci": bounds}]
    (found,) = [line for line in script["limits"]({}, rows) if "second turn" in line]
    assert found.startswith(f"{said}: test charts, greedy, -3.1 [")


def test_each_verdict_lists_its_own_charts(script):
    rows = [
        ROW | GAIN | {"turn": turn, "set": name, "improvement": 0.02, "improvement_ci": bounds}
        for name, turn, bounds in (
            *(("test", 2, (0.01, 0.05)), ("gallery", 2, (-0.1, 0.1)), ("val", 2, (0.01, 0.03))),
            ("test", 3, (-0.9, -0.8)),  # of a third turn nothing is said
        )
    ]
    helps, none = script["limits"]({}, rows)[-2:]
    assert helps.startswith("A second turn helps: test charts") and "; val charts" in helps
    assert none.startswith("There is no sign") and "gallery charts" in none
    assert "harms:" not in helps


def test_a_policy_of_real_charts_is_refused(script, tmp_path):
    saved_run(tmp_path, "stage2", data__kind="directory")
    (tmp_path / "stage2" / "evaluation.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"trained on charts of no grammar .* words, panels"):
        script["make"](str(tmp_path), "stage2", "", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()

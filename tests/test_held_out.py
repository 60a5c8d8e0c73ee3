"""Evaluation during RL: it runs the programs of the rollouts, and changes nothing of the run."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest

from mmrecoder_jax import grpo
from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.evaluation import Evaluation
from mmrecoder_jax.held_out import HeldOutCharts, metrics_of
from mmrecoder_jax.learner.checkpoint import kept_steps
from mmrecoder_jax.monitoring.measured import names_of
from mmrecoder_jax.monitoring.metrics import read_metrics
from mmrecoder_jax.rl.schedule import Size
from mmrecoder_jax.rl.trajectory import MODES

FIELDS = {
    "rl.response_length": 12,
    "rl.decode_chunk": 6,
    "rl.group": 2,
    "rl.eval_every": 2,
    "rl.eval_count": 3,
    "rl.entropy_coef": 0.1,  # an untrained policy earns nothing
    "rl.trajectories_every": 0,
    "train.batch_size": 2,
    "train.micro_batch_size": 4,
    "train.steps": 4,
    "checkpoint.every": 3,
}


def stage_of(policy, workdir, name="stage2", **fields):
    """A stage in a work directory of its own, with the charts and the policy of the session."""
    os.makedirs(workdir, exist_ok=True)
    data = os.path.join(policy.stage.workdir, "data")
    changed = FIELDS | {"data.dir": data, "stage": name} | fields
    stage = policy.stage_with(changed, workdir=str(workdir))

    class Begun(type(stage)):
        def initial_params(self):
            return jax.tree.map(jax.numpy.copy, policy.params)

    return Begun(**{f.name: getattr(stage, f.name) for f in dataclasses.fields(stage)})


@pytest.mark.parametrize("name", [pytest.param("stage1", marks=pytest.mark.slow), "stage2"])
def test_an_evaluation_compiles_nothing_new(policy, pool, tmp_path, name):
    """Rollouts of a step, then both decodings of more charts than a step has prompts."""
    chunk = {"stage1": 4, "stage2": 3}[name]  # samplers that are alike share programs
    stage = stage_of(policy, tmp_path, name, **{"rl.decode_chunk": chunk})
    engine = stage.engine(pool, 1.0)
    key = jax.random.key(0)
    how = {"mode": MODES[name], "group": 2, "turns": 2, "size": Size(prompts=2)}
    engine.rollout(policy.params, policy.charts[:2], [0, 1], key, **how)
    before = engine.sampler.compilations()
    charts = HeldOutCharts(stage, engine, MODES[name])
    found = charts.metrics(policy.params)
    assert engine.sampler.compilations() == before
    assert found == charts.metrics(policy.params)  # no number is drawn from what the run draws from
    names = names_of(stage.config)
    assert set(found) <= set(names)
    assert set(names) - set(found) <= {n for n in names if n.count("/") == 2}


def test_greedy_answers_are_alike_and_sampled_ones_are_those_of_rollouts(policy, pool, tmp_path):
    stage = stage_of(policy, tmp_path)
    engine = stage.engine(pool, 1.0)
    ask = {"group": 2, "turns": 1}
    first = engine.at(0.0).rollout(policy.params, policy.charts[:1], [0], jax.random.key(0), **ask)
    again = engine.at(0.0).rollout(policy.params, policy.charts[:1], [0], jax.random.key(1), **ask)
    ids = [t.turns[0].ids for t in (*first[0], *again[0])]
    assert all(np.array_equal(ids[0], other) for other in ids)
    one = engine.rollout(policy.params, policy.charts[:1], [0], jax.random.key(0), **ask)
    other = engine.at(1.0).rollout(policy.params, policy.charts[:1], [0], jax.random.key(0), **ask)
    np.testing.assert_array_equal(one[0][0].turns[0].ids, other[0][0].turns[0].ids)


def test_what_is_measured():
    """Three turns; of four charts three execute at once, and the last turn is compared."""
    low = np.array([[0.5, 0.1, 0.7], [0.4, 0.4, 0.4], [0.6, 0.6, 0.3], [0.0, 0.9, 0.9]])
    scores = np.repeat(low[..., None], 5, axis=2)
    repeats = np.array([[False, False, False], [False, True, True], *[[False] * 3] * 2])
    executed = np.array([[True] * 3] * 3 + [[False, True, True]])
    found = metrics_of(Evaluation("held out", executed, scores, repeats, ()))
    assert found["turn1/exec_rate"] == 0.75 and found["turn3/exec_rate"] == 1
    assert found["turn3/low_level"] == pytest.approx(low[:, 2].mean())
    assert found["improvement"] == pytest.approx((0.2 + 0 - 0.3) / 3)
    thirds = {name: found[name] for name in ("improved", "regressed", "code_repeat")}
    assert thirds == pytest.approx(dict.fromkeys(thirds, 1 / 3))
    nothing = np.zeros_like(executed)
    none = metrics_of(Evaluation("held out", nothing, 0 * scores, repeats, ()))
    assert "improvement" not in none and none["turn2/low_level"] == 0


def test_a_run_without_held_out_charts_says_so_or_is_refused(policy, pool, tmp_path, capsys):
    shutil.copytree(os.path.join(policy.stage.workdir, "data", "train"), tmp_path / "d" / "train")
    data = {"data.dir": str(tmp_path / "d")}
    stage = stage_of(policy, tmp_path / "a", **data)
    engine = stage.engine(pool, 1.0)
    charts = HeldOutCharts(stage, engine, MODES["stage2"])
    assert not charts.is_due(2, 4) and "no val/ in data.dir" in capsys.readouterr().out
    best = {"checkpoint.best": "eval/greedy/turn2/low_level"}
    with pytest.raises(ConfigError, match=r"no charts at .*val"):
        HeldOutCharts(stage_of(policy, tmp_path / "b", **data, **best), engine, MODES["stage2"])


def rows_of(workdir) -> list[dict]:
    """The rows of a run without what depends on time, or counts executions."""
    timed = ("time", "seconds/", "env", "compiles", "rollout/")
    return [
        {name: value for name, value in row.items() if not name.startswith(timed)}
        for row in read_metrics(os.path.join(workdir, "metrics.jsonl"))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_run_that_is_evaluated_is_one_that_is_not(policy, pool, tmp_path, ahead):
    fields = {"rl.ahead": ahead}
    plain = grpo.train(stage_of(policy, tmp_path / "a", **fields, **{"rl.eval_every": 0}), pool)
    params = grpo.train(stage_of(policy, tmp_path / "b", **fields), pool)
    jax.tree.map(np.testing.assert_array_equal, plain, params)
    assert not all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(policy.params), strict=True)
    )
    rows = rows_of(tmp_path / "b")
    assert [row["step"] for row in rows if "eval/greedy/turn2/low_level" in row] == [2, 4]
    without = [{n: x for n, x in row.items() if not n.startswith("eval/")} for row in rows]
    assert json.dumps(without) == json.dumps(rows_of(tmp_path / "a"))


@pytest.mark.slow
def test_a_run_that_is_killed_has_the_rows_of_one_that_is_not(policy, pool, tmp_path, monkeypatch):
    best = {"checkpoint.best": "-eval/sampled/turn1/low_level", "rl.ahead": 1}
    grpo.train(stage_of(policy, tmp_path / "whole", **best), pool)
    finish = grpo.Loop.finish

    def killed(loop, step, *args):
        finish(loop, step, *args)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(grpo.Loop, "finish", killed)
        grpo.train(stage_of(policy, tmp_path / "killed", **best), pool)
    grpo.train(stage_of(policy, tmp_path / "killed", **best), pool)
    assert json.dumps(rows_of(tmp_path / "killed")) == json.dumps(rows_of(tmp_path / "whole"))
    assert kept_steps(str(tmp_path / "killed")) == kept_steps(str(tmp_path / "whole")) == [2, 3, 4]

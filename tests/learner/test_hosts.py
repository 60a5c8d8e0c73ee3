"""Two processes give what one gives: rollouts, evaluations, monitors, trajectories, training.

`test_distributed` shows the exchange alone, in seconds.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from mmrecoder_jax.config import load, model_config
from mmrecoder_jax.data.pipeline import prompts
from mmrecoder_jax.data.survey import BadRows
from mmrecoder_jax.learner.checkpoint import Checkpoints, load_params
from mmrecoder_jax.learner.update import from_params
from mmrecoder_jax.models.qwen2_5_vl import init_params
from mmrecoder_jax.monitoring.metrics import read_metrics
from mmrecoder_jax.rl.schedule import TIMED
from tests.conftest import train_command
from tests.learner.processes import run

pytestmark = pytest.mark.slow  # models are compiled three times


@pytest.fixture(scope="module")
def results(tmp_path_factory, policy):
    """What `hosts_main` found on one host, and on each of two; and where it wrote."""
    stage = policy.stage
    with Checkpoints(stage.workdir, 1) as checkpoints:
        state = from_params(policy.params, optax.sgd(0.1), stage.mesh, 0)
        stream = prompts(policy.charts, 2, stage.processor, BadRows(0), seed=0)
        checkpoints.save(state, iter(stream), {})
    found = {}
    for hosts in (1, 2):
        out = tmp_path_factory.mktemp(f"hosts{hosts}")
        command = [sys.executable, "-m", "tests.learner.hosts_main", stage.workdir, str(out)]
        run(command, hosts)
        found[hosts] = [json.loads((out / f"{host}.json").read_text()) for host in range(hosts)]
        found[hosts, "trajectories"] = out / "trajectories"
    return found


def test_a_charts_answers_do_not_depend_on_the_number_of_hosts(results):
    (one,) = results[1]
    assert all(part["texts"] == one["texts"] for part in results[2])
    assert [number for number, _ in one["texts"]] == [0, 1, 2, 3, 4, 5, 6]


def test_an_evaluation_is_of_all_hosts_and_counts_what_it_refused(results):
    (one,) = results[1]
    assert all(part["rows"] == one["rows"] for part in results[2])
    for row in one["rows"]:
        assert (row["charts"], row["refused"]) == (7, 1)


def test_metrics_are_of_all_hosts(results):
    (one,) = results[1]
    for part in results[2]:
        logps = {name for name in one["metrics"] if name.endswith("logp")}
        assert part["metrics"].keys() == one["metrics"].keys()
        for name, value in one["metrics"].items():
            if name == "silent_groups":
                assert value == 0.25 and part["metrics"][name] == 0.25  # one of four, of host 0
            else:
                assert part["metrics"][name] == pytest.approx(
                    value, abs=1e-5 if name in logps else 1e-12
                ), name
    assert one["metrics"]["env/executions"] == 4 + 8
    assert one["metrics"]["env_rate/tamper"] == 0.5
    rates = [one["metrics"][f"turn{turn}/oversized"] for turn in (1, 2)]
    assert max(rates) > 0, "no figure was too thin: this test would not notice it"


def test_trajectories_of_all_hosts_are_in_one_file(results):
    files = [results[hosts, "trajectories"] / "000001.jsonl" for hosts in (1, 2)]
    one, two = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert len(one) == 8
    for first, second in zip(one, two, strict=True):
        for turn, other in zip(first["turns"], second["turns"], strict=True):
            assert turn.pop("logps") == pytest.approx(other.pop("logps"), abs=2e-4)  # rounded
        assert first == second
    renders = [sorted(path.name for path in file.parent.rglob("*.png")) for file in files]
    assert renders[0] == renders[1] != []


def test_no_shape_is_a_hosts_own(results):
    """One host's scripts failed while the other's drew: the same programs served both."""
    assert len({part["programs"] for part in results[2]}) == 1


# ---------------------------------------------------------------- whole commands


BEFORE = {"sft_self_correction": "sft_chart2code", "stage1": "sft_self_correction"}


@pytest.mark.parametrize(
    "stage, hosts",
    [
        *((stage, 2) for stage in ("sft_chart2code", "sft_self_correction", "stage1", "stage2")),
        *((stage, 4) for stage in ("sft_chart2code", "stage1", "stage2")),
    ],
)
def test_several_hosts_train_what_one_trains(stage, hosts, smoke_run, tmp_path):
    """The same parameters, metrics and trajectories after three steps; the two-turn stage also
    builds its dialogues, with drafts of the policy.
    """
    flags = [
        f"--config.data.dir={smoke_run.workdir}/data",
        "--config.train.steps=3",
        "--config.env.workers=1",
        # Adam turns the rounding of a gradient near 0 into a part of the learning rate.
        "--config.optim.lr=1e-4",
    ]
    if stage != "sft_chart2code":
        before = BEFORE.get(stage, "stage1")
        flags.append(f"--config.init_from={smoke_run.workdir}/{before}")
    if stage == "sft_self_correction":
        flags.append("--config.dialogues.policy=20")
    if (stage, hosts) == ("stage2", 2):  # of each host's own rows, before it knows advantages
        flags += ["--config.rl.kl_in=reward", "--config.rl.kl=k1", "--config.rl.kl_coef=0.05"]
        # A deviation that is made of drift alone would turn rounding into advantages.
        flags += ["--config.rl.reference_every=2", "--config.rl.advantage=mean"]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    run(train_command(stage, one, *flags, f"--config.mesh.cpu_devices={hosts}"), 1)
    outputs = run(train_command(stage, two, *flags), hosts)
    assert "step 3/3" in outputs[0] and "step" not in outputs[1]
    for a, b in zip(parameters(one), parameters(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b in zip(*(metrics_of(workdir) for workdir in (one, two)), strict=True):
        assert a == {name: pytest.approx(value, rel=1e-3, abs=1e-4) for name, value in b.items()}
    (files, logps), (other_files, other_logps) = files_of(one), files_of(two)
    assert files == other_files
    # Hosts deal their own rows to their devices, so sums have another order, and files four digits.
    np.testing.assert_allclose(logps, other_logps, atol=1e-3)


@pytest.fixture(scope="module")
def mixed(smoke_run, tmp_path_factory):
    """The charts of the smoke run, every second one shrunk: its image needs the smallest bucket."""
    data = tmp_path_factory.mktemp("mixed") / "data"
    shutil.copytree(f"{smoke_run.workdir}/data", data)
    for rows in data.glob("*/charts.jsonl"):
        names = [json.loads(line)["image"] for line in rows.read_text("utf-8").splitlines()]
        for name in names[::2]:
            with Image.open(rows.parent / name) as image:
                small = image.resize((84, 56))
            (rows.parent / name).unlink()  # a link leads to the pictures of the smoke run
            small.save(rows.parent / name)
    return str(data)


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("stage", ["sft_chart2code", "stage1", "stage2"])
def test_hosts_that_fare_differently_train_what_one_trains(
    stage, hosts, smoke_run, mixed, tmp_path
):
    """Images of two sizes, an evaluation after every step, and in RL a host whose scripts all fail
    while those of the others draw.
    """
    shared = [
        f"--config.data.dir={mixed}",
        "--config.data.windows=(2,6)",
        "--config.train.steps=3",
        "--config.optim.lr=1e-4",
    ]
    if stage == "sft_chart2code":
        start = str(tmp_path / "start")
        shared += ["--config.train.eval_every=1", "--config.train.eval_batches=2"]
    else:
        start = f"{smoke_run.workdir}/{BEFORE.get(stage, 'stage1')}"
        shared += [
            *(f"--config.init_from={start}", "--config.rl.eval_every=1"),
            *("--config.rl.eval_count=5", "--config.feedback.image=render"),
            *("--config.reward.judge=none", "--config.reward.alpha=1"),
            "--config.reward.beta=0",
        ]
    codes, unlucky = tmp_path / "codes.jsonl", hosts - 1
    several, one = str(tmp_path / "several"), str(tmp_path / "one")

    def command(workdir, host, *flags):
        words = train_command(stage, workdir, *shared, *flags)
        program = [sys.executable, "-m", "tests.learner.scripted_main", str(codes), str(host)]
        return [*program, *words[3:]]

    codes.touch()
    run(command(several, unlucky), hosts)
    run(command(one, -1, f"--config.mesh.cpu_devices={hosts}"), 1)
    trained, other = parameters(one), parameters(several)
    apart = max(float(np.abs(a - b).max()) for a, b in zip(trained, other, strict=True))
    print(f"{stage} on {hosts} hosts: parameters are {apart:.1e} apart")
    assert apart <= 1e-5
    rows, others = metrics_of(one), metrics_of(several)
    for a, b in zip(rows, others, strict=True):
        assert a == {name: pytest.approx(value, rel=1e-3, abs=1e-4) for name, value in b.items()}
    held_out = [name for row in rows for name in row if name.startswith(("eval", "held_out"))]
    assert len(held_out) >= 3, "nothing was evaluated"
    if stage != "sft_chart2code":
        assert codes.read_text("utf-8"), "no script of the unlucky host was run"
        assert min(row["silent_groups"] for row in rows) < 1
        moved = max(
            float(np.abs(a - b).max()) for a, b in zip(trained, parameters(start), strict=True)
        )
        assert moved > 10 * max(apart, 1e-6), "nothing was learnt"


@pytest.mark.parametrize("stage", ["sft_chart2code", "stage1"])
def test_a_stage_goes_on_with_another_number_of_hosts(stage, smoke_run, tmp_path):
    """A step on one host, one on two, one on four, one on one again."""
    flags = [
        f"--config.data.dir={smoke_run.workdir}/data",
        "--config.env.workers=1",
        "--config.optim.lr=1e-4",
    ]
    if stage != "sft_chart2code":
        flags.append(f"--config.init_from={smoke_run.workdir}/{BEFORE[stage]}")
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    run(train_command(stage, whole, *flags, "--config.train.steps=4"), 1)
    for steps, hosts in enumerate((1, 2, 4, 1), 1):
        outputs = run(train_command(stage, parts, *flags, f"--config.train.steps={steps}"), hosts)
        assert f"step {steps}/{steps}" in outputs[0]
    for a, b in zip(parameters(whole), parameters(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b in zip(*(metrics_of(workdir) for workdir in (whole, parts)), strict=True):
        names = {"step", "loss", "reward", "grad_norm", "turn2/low_level"} & a.keys()
        assert {"step", "loss"} <= names
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name


def parameters(workdir):
    """Of the newest checkpoint, whatever mesh it was saved on."""
    abstract = jax.eval_shape(
        lambda: init_params(model_config(load("stage2", "smoke")), jax.random.key(0))
    )
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.leaves(
        load_params(
            workdir,
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract),
        )
    )


def metrics_of(workdir):
    rows = read_metrics(os.path.join(workdir, "metrics.jsonl"))
    return [
        {
            name: value
            for name, value in row.items()
            if "seconds" not in name and not name.startswith("compiles/")
            if name not in ("stage", "time", "grad_norm", *TIMED)
        }
        for row in rows
    ]


def files_of(workdir):
    """(rows of dialogues and trajectories by file name, log-probabilities that were in them)."""
    found, logps = {}, []
    for folder in ("trajectories", "dialogues"):
        for path in sorted(Path(workdir, folder).glob("*.jsonl")):
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            for turn in (turn for row in rows for turn in row.get("turns", ())):
                logps += turn.pop("logps", [])
            found[f"{folder}/{path.name}"] = rows
    return found, logps

"""Training adapters alone, and with a frozen vision tower: what is saved, what stays, resuming, and
starting from such a stage.
"""

import dataclasses
import os

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from mmrecoder_jax import grpo, sft
from mmrecoder_jax.config import ConfigError, load, lora_config, model_config
from mmrecoder_jax.data.pipeline import prompts
from mmrecoder_jax.data.survey import BadRows
from mmrecoder_jax.learner.checkpoint import Checkpoints, latest_step
from mmrecoder_jax.learner.update import from_params
from mmrecoder_jax.models.config import LoraConfig
from mmrecoder_jax.models.lora import is_adapter, merge
from mmrecoder_jax.models.trees import join, split
from mmrecoder_jax.monitoring.metrics import MetricsWriter, read_metrics
from mmrecoder_jax.prepare import find_source
from mmrecoder_jax.rl import rollout
from mmrecoder_jax.rl.policy import FixedLogps, copy_of_trained
from mmrecoder_jax.stage import Stage, build

STEPS = 4


@pytest.fixture(scope="module")
def start(policy) -> str:
    """A work directory with the untrained policy in it, and its charts."""
    with Checkpoints(policy.stage.workdir, 1) as checkpoints:
        state = from_params(policy.params, optax.sgd(0.1), policy.stage.mesh, 0)
        stream = prompts(policy.charts, 2, policy.stage.processor, BadRows(0), seed=0)
        checkpoints.save(state, iter(stream), {})
    return policy.stage.workdir


def config_of(stage: str, source: str, data: str, **sections) -> ConfigDict:
    config = load(stage, "smoke")
    config.init_from, config.data.dir = source, data
    config.data.lengths = (112,) if stage == "sft_chart2code" else (264,)
    config.data.windows = (12,)
    config.model.scan_unroll = 1  # compiles sooner
    config.train.update({"steps": STEPS, "batch_size": 4, "micro_batch_size": 4, "eval_every": 0})
    config.checkpoint.every = 2
    config.optim.update({"lr": 0.01, "warmup_steps": 0, "schedule": "constant"})
    for section, fields in sections.items():
        config[section].update(fields)
    return config


def built(config: ConfigDict, workdir) -> Stage:
    return build(config, str(workdir))


def saved_tree(workdir, step: int | None = None, item: str = "params") -> dict:
    step = latest_step(str(workdir)) if step is None else step
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(os.path.join(workdir, "checkpoints", str(step), item))


def names(tree) -> set[str]:
    return {
        "/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


LORA = {"rank": 3, "alpha": 6.0}


@pytest.fixture(scope="module")
def adapted(start, tmp_path_factory):
    """(work directory of a finished supervised stage that trained adapters, its parameters)."""
    workdir = tmp_path_factory.mktemp("adapted")
    stage = built(config_of("sft_chart2code", start, start + "/data", lora=LORA), workdir)
    return str(workdir), jax.device_get(sft.train(stage))


def test_only_adapters_are_trained_and_saved(adapted, policy):
    workdir, params = adapted
    adapters, base = split(params, is_adapter)
    assert_equal(base, policy.params)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(adapters))
    assert all(is_adapter(name) for name in names(saved_tree(workdir)))
    assert_equal(saved_tree(workdir), adapters)
    with ocp.StandardCheckpointer() as checkpointer:
        learner = checkpointer.restore(os.path.join(workdir, "checkpoints", str(STEPS), "learner"))
    moments = [x for x in jax.tree.leaves(learner["opt_state"]) if x.ndim > 1]
    assert len(moments) == 2 * len(jax.tree.leaves(adapters))
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in jax.tree.leaves(adapters))
    assert read_metrics(os.path.join(workdir, "metrics.jsonl"))[-1]["loss"] > 0


def test_resumed_adapters_are_those_of_a_run_that_was_never_interrupted(
    adapted, start, tmp_path, monkeypatch
):
    stage = built(config_of("sft_chart2code", start, start + "/data", lora=LORA), tmp_path)
    write = MetricsWriter.write

    def killed(self, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        write(self, step, *rest)

    monkeypatch.setattr(MetricsWriter, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        sft.train(stage)
    monkeypatch.undo()
    assert latest_step(str(tmp_path)) == 2
    assert_equal(sft.train(stage), adapted[1])


def test_a_later_stage_carries_the_adapters_on_or_merges_them(adapted, start, tmp_path):
    workdir, params = adapted
    same = built(
        config_of("stage1", workdir, start + "/data", lora=LORA), tmp_path / "same"
    ).initial_params()
    assert_equal(same, params)
    merged = merge(params, lora_config(LORA | {"targets": LoraConfig().targets}))
    none = built(config_of("stage1", workdir, start + "/data"), tmp_path / "none").initial_params()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), none, merged)
    other = built(
        config_of("stage1", workdir, start + "/data", lora=LORA | {"rank": 2}), tmp_path / "other"
    ).initial_params()
    adapters, base = split(other, is_adapter)
    assert_equal(base, none)
    assert not any(
        x.any() for x in jax.tree.leaves(split(adapters, lambda name: name.endswith("lora_b"))[0])
    )


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_grpo_trains_the_adapters_of_the_stage_before_with_features_in_place_of_patches(
    adapted, start, pool, tmp_path, monkeypatch, kl_in
):
    """Stage 1: sampler, update and checkpoint through the code that trains whole models; each image
    goes through the tower once. With the divergence in the reward, the reference follows as well.
    """
    workdir, params = adapted
    steps = {"loss": 2, "reward": 3}[kl_in]
    follows = {"reference_every": 2, "kl_in": kl_in} if kl_in == "reward" else {}
    fields = {
        "train": {"steps": steps, "batch_size": 2, "micro_batch_size": 4},
        "rl": {"group": 4, "response_length": 24, "kl_coef": 0.1} | follows,
    }
    config = config_of("stage1", workdir, start + "/data", lora=LORA, **fields)
    config.checkpoint.every = 1
    stage = built(config, tmp_path)
    batches, towers = [], []
    add, make = FixedLogps.add_to, rollout.RolloutEngine.__init__
    monkeypatch.setattr(FixedLogps, "add_to", lambda *args: batches.append(args[-1]) or add(*args))
    monkeypatch.setattr(
        rollout.RolloutEngine,
        "__init__",
        lambda self, *args: make(self, *args) or towers.append(self.tower),
    )
    monkeypatch.setattr(
        grpo,
        "group_advantages",
        lambda *args: (np.array([[1.0, -1.0, 0.5, -0.5]] * 2, np.float32), np.zeros(2, bool)),
    )
    end = jax.device_get(grpo.train(stage, pool))
    assert_equal(split(end, is_adapter)[1], split(params, is_adapter)[1])
    before, after = split(params, is_adapter)[0], split(end, is_adapter)[0]
    assert all(
        np.abs(a - b).max() > 0
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )
    assert all(is_adapter(name) for name in names(saved_tree(tmp_path)))
    assert len(batches) == steps and all(
        "features" in batch and "patches" not in batch for batch in batches
    )
    rows = [
        np.unique(np.asarray(batch["vision_index"]) // stage.layout.merged(12)) for batch in batches
    ]
    # images that the learner's rows point at, over all steps
    shown = sum(len(images) - (images[0] < 0) for images in rows)
    assert 0 < towers[0].encoded <= shown + steps
    metrics = read_metrics(os.path.join(tmp_path, "metrics.jsonl"))
    apart = [row["kl"] for row in metrics]
    assert apart[::2] == pytest.approx([0] * len(apart[::2]), abs=1e-6) and apart[1] > 1e-5
    if follows:
        assert metrics[1]["kl_penalty"] > 10 * apart[1] * 0.1  # a sum over a trajectory's tokens
        for step in (2, 3):
            assert_equal(saved_tree(tmp_path, step, "reference"), saved_tree(tmp_path, 2))


def test_adapters_without_weights_are_refused(start, adapted, tmp_path):
    config = config_of("sft_chart2code", "", start + "/data", lora=LORA)
    with pytest.raises(ConfigError, match=r"lora.rank=3 with an empty config.init_from"):
        find_source(config)
    with pytest.raises(ConfigError, match=r"lora.targets=\('qkv',\)"):
        model_config(config_of("sft_chart2code", start, "", lora=LORA | {"targets": ("qkv",)}))
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("checkpoints", "tokenizer"):
        (moved / name).symlink_to(os.path.join(adapted[0], name))
    with open(os.path.join(adapted[0], "config.json"), encoding="utf-8") as f:
        (moved / "config.json").write_text(f.read().replace(start, str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match="holds adapters alone, of the weights at"):
        built(
            config_of("stage1", str(moved), start + "/data", lora=LORA), tmp_path / "next"
        ).initial_params()


@pytest.mark.slow
def test_a_frozen_tower_has_neither_gradients_nor_moments_and_the_same_loss(
    policy, start, tmp_path
):
    """One supervised step: the decoder moves as it does beside a trained tower, the tower stays,
    and is in the checkpoint all the same.
    """
    ends = {}
    for frozen in (False, True):
        config = config_of(
            "sft_chart2code",
            start,
            start + "/data",
            model={"freeze_vision": frozen},
            train={"steps": 1},
        )
        config.optim.clip = 1e9
        ends[frozen] = jax.device_get(sft.train(built(config, tmp_path / str(frozen))))
    assert_equal(ends[True]["visual"], policy.params["visual"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        ends[True]["model"],
        ends[False]["model"],
    )
    assert (
        np.abs(
            ends[False]["visual"]["merger"]["mlp_2"]["kernel"]
            - policy.params["visual"]["merger"]["mlp_2"]["kernel"]
        ).max()
        > 0
    )
    losses = [
        read_metrics(os.path.join(tmp_path, str(frozen), "metrics.jsonl"))[0]["loss"]
        for frozen in (False, True)
    ]
    assert losses[0] == losses[1]
    assert names(saved_tree(tmp_path / "True")) == names(policy.params)
    with ocp.StandardCheckpointer() as checkpointer:
        learner = checkpointer.restore(
            os.path.join(tmp_path, "True", "checkpoints", "1", "learner")
        )
    moved = names(split(policy.params, lambda name: not name.startswith("visual/"))[0])
    moments = [x for x in jax.tree.leaves(learner["opt_state"]) if x.ndim]
    assert len(moments) == 2 * len(moved)


def test_a_copy_of_the_trained_shares_the_rest(policy):
    copy = copy_of_trained(policy.params, lambda name: name.startswith("model/"))
    assert (
        copy["visual"]["merger"]["mlp_0"]["kernel"]
        is policy.params["visual"]["merger"]["mlp_0"]["kernel"]
    )
    assert copy["model"]["norm"]["weight"] is not policy.params["model"]["norm"]["weight"]
    assert_equal(copy, join(policy.params, {}))
    assert dataclasses.is_dataclass(policy.stage)

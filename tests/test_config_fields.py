"""Every field of every configuration does something: a changed field changes what the stage's own
code is asked to do, or is refused.

Heavy parts are replaced by recorders, so that a whole stage "runs" in milliseconds: what is
compared is what reaches the model, the sampler, the optimizer, the environment, the judge and the
disk.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from ml_collections import ConfigDict

from mmrecoder_jax import cli, evaluation, grpo, loop, prepare, sft
from mmrecoder_jax import stage as stages
from mmrecoder_jax.checks import check_config
from mmrecoder_jax.config import STAGES, ConfigError, field_names, load, model_config, set_fields
from mmrecoder_jax.data.batching import Piece
from mmrecoder_jax.data.sources import Questions
from mmrecoder_jax.data.survey import Survey
from mmrecoder_jax.env import Execution, Status
from mmrecoder_jax.env.chartmimic import Scores
from mmrecoder_jax.learner.update import average_of
from mmrecoder_jax.models.config import preset
from mmrecoder_jax.models.published import published_config
from mmrecoder_jax.monitoring.alarms import MONITORS
from mmrecoder_jax.rl import monitors
from mmrecoder_jax.rl.judge import make as judges
from mmrecoder_jax.rl.schedule import Stats
from mmrecoder_jax.rl.trajectory import Trajectory, Turn


@pytest.fixture(scope="module", autouse=True)
def unchecked():
    """Stand-ins are not of the declared types: no annotation is checked in this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


# What each field is changed to; a stage's table is made of those fields that it has.
OTHER = {
    "size": "tiny",  # reaches reports alone
    "seed": 7,
    "init_from": "elsewhere",
    "model.preset": "3b",
    "model.dtype": "bfloat16",
    "model.param_dtype": "bfloat16",
    "model.remat": "dots",
    "model.attention": "splash",
    "model.scan_unroll": 1,
    "model.loss_chunk": 7,
    "model.freeze_vision": True,
    "lora.rank": 4,
    "lora.alpha": 3.0,
    "lora.targets": ("q_proj",),
    "processor.min_pixels": 28 * 28,
    "processor.max_pixels": 56 * 56,
    "processor.system": "Other.",
    "mesh.data": 2,
    "mesh.fsdp": 3,
    "mesh.tensor": 2,
    "mesh.cpu_devices": 2,
    "mesh.slices": 2,
    "mesh.join_seconds": 20.0,
    "mesh.silent_seconds": 30.0,
    "data.dir": "charts",
    "data.kind": "directory",
    "data.grammar": "panels",
    "data.dialogues": "dialogues",
    "data.gallery": "gallery",
    "data.instruction": "Draw.",
    "data.seed": 5,
    "data.train_count": 11,
    "data.val_count": 12,
    "data.test_count": 13,
    "data.lengths": (300,),
    "data.windows": (24,),
    "data.max_bad_rows": 3.0,
    "dialogues.policy": 3,
    "dialogues.synthetic": 5,
    "dialogues.right": 0.5,
    "dialogues.later": 0.25,
    "dialogues.min_gain": 0.3,
    "dialogues.temperature": 0.5,
    "dialogues.batch_size": 3,
    "train.steps": 9,
    "train.epochs": 3.0,
    "train.batch_size": 16,
    "train.micro_batch_size": 4,
    "train.micro_tokens": 600,
    "train.log_every": 3,
    "train.eval_every": 5,
    "train.eval_batches": 2,
    "train.single_turn_share": 0.5,
    "optim.name": "muon",
    "optim.lr": 0.5,
    "optim.b1": 0.5,
    "optim.b2": 0.5,
    "optim.weight_decay": 0.5,
    "optim.decay": "norm",
    "optim.rounding": "nearest",
    "optim.ema": 0.5,
    "optim.warmup_steps": 1,
    "optim.schedule": {"constant": "cosine", "cosine": "constant"},
    "optim.decay_share": 0.9,
    "optim.clip": 0.01,
    "optim.patch_embed_lr": 0.3,
    "optim.max_skipped": 1,
    "rl.group": 2,
    "rl.turns": 3,
    "rl.temperature": 0.5,
    "rl.prompt_length": 41,
    "rl.feedback_length": 81,
    "rl.response_length": 33,
    "rl.decode_chunk": 5,
    "rl.rollout_prompts": 2,
    "rl.rows": 6,
    "rl.ahead": 1,
    "rl.partial": 7,
    "rl.max_importance": 1.0,
    "rl.top_k": 9,
    "rl.top_p": 0.9,
    "rl.min_p": 0.1,
    "rl.stop": ("plt.show()",),
    "rl.aggregation": "sequence_mean",
    "rl.truncated": "mask",
    "rl.std_ddof": 0,
    "rl.std_eps": 0.5,
    "rl.updates_per_batch": 2,
    "rl.mini_batches": 2,
    "rl.resample": 1,
    "rl.credit": "turn",
    "rl.clip_low": 0.01,
    "rl.clip_high": 0.01,
    "rl.kl_coef": 0.5,
    "rl.kl": "k2",
    "rl.kl_in": "reward",
    "rl.reference_every": 2,
    "rl.entropy_coef": 0.5,
    "rl.objective": "cispo",
    "rl.advantage": "rloo",
    "rl.clip_dual": 1.3,
    "rl.overlong": 30,
    "rl.max_logp_gap": 0.5,
    "rl.eval_every": 2,
    "rl.eval_count": 3,
    "rl.trajectories_every": 0,
    "rl.trajectories_gb": 0.5,
    "engine.kind": "sglang",
    "engine.url": "http://localhost:9",
    "engine.key_variable": "OTHER_KEY",
    "engine.in_flight": 3,
    "engine.timeout_seconds": 3.0,
    "engine.retries": 1,
    "feedback.image": "render",
    "feedback.render": "Look.",
    "feedback.error": "Failed: {error}",
    "reward.alpha": 0.2,
    "reward.beta": 0.05,
    "reward.gamma": 0.5,
    "reward.eta": 0.5,
    "reward.mode": "official",
    "reward.judge": {"stage1": "none", "stage2": "none", "evaluate": "visual"},
    "judge.question": "differences",
    "judge.url": "http://localhost:9/v1",
    "judge.model": "other",
    "judge.key_variable": "OTHER_KEY",
    "judge.in_flight": 3,
    "judge.timeout_seconds": 3.0,
    "judge.retries": 1,
    "judge.path": "judge",
    "judge.batch_size": 3,
    "judge.prompt_length": 99,
    "judge.max_tokens": 9,
    "judge.max_failures": 2,
    "env.workers": 5,
    "env.hosts": ("127.0.0.1:7435",),
    "env.secret": __file__,
    "env.python": sys.executable,
    "env.dpi": 50,
    "env.wall_seconds": 3.0,
    "env.cpu_seconds": 3.0,
    "env.memory_mb": 99,
    "env.max_pixels": 99,
    "env.preload": ("numpy",),
    "env.cache_size": 9,
    "env.feedback_chars": 9,
    "env.replay_share": 0.5,
    "env.bubblewrap": False,
    "env.sandbox": "unsafe",
    **{f"alarms.{name}": 0.7 for name in MONITORS},
    "eval.split": "val",
    "eval.count": 3,
    "eval.batch_size": 3,
    "eval.turns": 3,
    "eval.remembered": 2,
    "eval.sampled": True,
    "eval.gallery_count": 2,
    "checkpoint.every": 2,
    "checkpoint.keep": 5,
    "checkpoint.grace_seconds": 7.0,
    "checkpoint.keep_every": 1,
    "checkpoint.best": {
        "sft_chart2code": "-held_out_loss",
        "sft_self_correction": "nothing",  # it measures nothing
        "stage1": "eval/greedy/improvement",
        "stage2": "eval/greedy/turn2/low_level",
    },
    "checkpoint.accept_changes": True,
    "log.tensorboard": True,
    "log.wandb": "project",
}
# A field that acts only beside others; {field: the values that let it act}.
CONTEXT: dict[str, dict[str, Any]] = {
    "lora.alpha": {"lora.rank": 4},
    "lora.targets": {"lora.rank": 4},
    "train.epochs": {"train.steps": 0},
    "rl.turns": {"data.lengths": (112, 500)},  # rows that hold three turns
    "rl.ahead": {"checkpoint.every": 3},  # nothing is drawn beyond a checkpoint
    "rl.partial": {"checkpoint.every": 3},
    "rl.max_importance": {"rl.partial": 7},
    "reward.beta": {"reward.alpha": 0.5},
    "reward.judge": {"reward.beta": 0.0},
    "rl.clip_low": {"rl.updates_per_batch": 2},
    "rl.clip_high": {"rl.updates_per_batch": 2},
    "rl.clip_dual": {"rl.updates_per_batch": 2},
    "optim.decay": {"optim.weight_decay": 0.5},
    "optim.decay_share": {"optim.schedule": "wsd"},
    "rl.objective": {"rl.updates_per_batch": 2},
    "rl.kl": {"rl.kl_coef": 0.5},
    "rl.kl_in": {"rl.kl_coef": 0.5},
    "rl.reference_every": {"rl.kl_coef": 0.5},
    "rl.eval_count": {"rl.eval_every": 2},
    "checkpoint.keep_every": {"checkpoint.every": 3},
    "checkpoint.best": {"rl.eval_every": 2},
    "eval.gallery_count": {"data.gallery": "gallery"},
    "eval.remembered": {"eval.turns": 4},
}
HTTP = ("url", "model", "key_variable", "in_flight", "timeout_seconds", "retries")
LOCAL = ("question", "path", "batch_size", "prompt_length", "max_tokens", "max_failures")
SERVED = ("url", "key_variable", "in_flight", "timeout_seconds", "retries")
CONTEXT |= {f"engine.{field}": {"engine.kind": "sglang"} for field in SERVED}
CONTEXT |= {f"judge.{field}": {"reward.judge": "http"} for field in HTTP}
CONTEXT |= {f"judge.{field}": {"reward.judge": "local"} for field in LOCAL}
# The events that a field must change: every place that it has to reach, not just one of them.
REACHES: dict[str, tuple[str, ...]] = {
    "seed": ("prompts", "rollout"),
    "model.loss_chunk": ("policy_logps",),
    "model.freeze_vision": ("engine",),
    "processor.max_pixels": ("processor",),
    "train.epochs": ("progress",),
    "train.log_every": ("progress",),
    "train.eval_every": ("row",),
    "train.single_turn_share": ("stream",),
    **{f"optim.{name}": ("optimizer",) for name in ("lr", "b1", "b2", "schedule", "clip")},
    "rl.group": ("rollout",),
    "rl.turns": ("rollout",),
    "rl.temperature": ("engine", "policy_logps"),
    "rl.rollout_prompts": ("rollout",),
    "rl.rows": ("rollout",),
    "rl.ahead": ("rollout", "loss"),
    "rl.partial": ("prompts", "rollout", "loss"),
    "rl.max_importance": ("loss",),
    **{f"rl.{name}": ("engine",) for name in ("top_k", "top_p", "min_p", "stop")},
    "rl.aggregation": ("update",),
    "rl.truncated": ("update",),
    "rl.std_ddof": ("update",),
    "rl.std_eps": ("update",),
    "rl.updates_per_batch": ("update", "loss"),
    "rl.clip_low": ("loss",),
    "rl.clip_high": ("loss",),
    "rl.kl_coef": ("reference", "loss"),
    "rl.kl": ("loss",),
    "rl.kl_in": ("loss", "update"),
    "rl.reference_every": ("reference",),
    "rl.entropy_coef": ("loss",),
    "rl.objective": ("loss",),
    "rl.advantage": ("update",),
    "rl.clip_dual": ("loss",),
    "rl.overlong": ("update",),
    "rl.max_logp_gap": ("limits",),
    "rl.eval_every": ("row",),
    "rl.eval_count": ("rollout",),
    "rl.trajectories_every": ("written",),
    "rl.trajectories_gb": ("kept",),
    **{f"rl.{name}": ("engine",) for name in ("prompt_length", "feedback_length", "decode_chunk")},
    "rl.response_length": ("engine",),
    **{f"engine.{name}": ("engine",) for name in ("kind", *SERVED)},
    **{f"reward.{name}": ("update",) for name in ("alpha", "beta", "gamma", "eta")},
    "reward.mode": ("engine",),
    "reward.judge": ("engine",),
    **{f"judge.{name}": ("HttpJudge",) for name in HTTP},
    **{f"judge.{name}": ("LocalJudge",) for name in LOCAL if name != "path"},
    "dialogues.min_gain": ("build_dialogues",),
    "dialogues.right": ("synthetic_drafts",),
    "dialogues.later": ("synthetic_drafts",),
    **{f"alarms.{name}": ("alarms",) for name in MONITORS},
    "eval.turns": ("rollout",),
    "eval.remembered": ("rollout",),
    "eval.sampled": ("engine",),
    "checkpoint.every": ("saved",),
    "checkpoint.keep": ("keep",),
    "checkpoint.keep_every": ("keep", "saved"),
    "checkpoint.best": ("keep",),
    "checkpoint.accept_changes": ("compare",),
    "log.tensorboard": ("log",),
    "log.wandb": ("log",),
}
# In these stages the rollout is another: an evaluation has one sample, drafts one turn.
ELSEWHERE = {
    ("evaluate", "seed"): ("rollout",),
    ("evaluate", "rl.temperature"): ("engine",),
    ("sft_chart2code", "seed"): ("stream",),
    ("sft_self_correction", "seed"): ("stream", "rollout"),
    ("sft_chart2code", "model.freeze_vision"): ("trained",),
    ("sft_self_correction", "checkpoint.best"): (),
}
LABELS = ("stage", "size")  # what a configuration is called; no setting
GROUP_SCORES = (0.1, 0.4, 0.2, 0.9, 0.3, 0.8, 0.5)


def leaves(config: ConfigDict) -> list[str]:
    """Dotted names of the fields that are no sections."""
    names = list(field_names(config))
    return [n for n in names if not any(m.startswith(n + ".") for m in names)]


class Recorder:
    """What a stage asked for, in order."""

    def __init__(self):
        self.events: list[str] = []

    def add(self, name: str, *values: Any) -> None:
        self.events.append(f"{name} {values!r}")

    def fake(self, name: str, result: Any = None):
        """A function that records its arguments and returns `result` (called, if it can be)."""

        def call(*args, **kwargs):
            self.add(name, [plain(x) for x in args], {k: plain(x) for k, x in kwargs.items()})
            return result(*args, **kwargs) if callable(result) else result

        return call


def plain(value: Any) -> Any:
    """A value that prints the same for equal content; objects without content by their type."""
    if isinstance(value, np.ndarray | jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        return np.asarray(value).round(9).tolist()
    if isinstance(value, ConfigDict):
        return value.to_dict()
    if isinstance(value, dict):
        return {name: plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    if isinstance(value, str | int | float | bool | range | None):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return type(value).__name__


class Charts:
    """As many charts as a data set has; nothing reads one."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        return SimpleNamespace(id=str(index), image=b"", code="", instruction="")

    def digest(self) -> str:
        return "digest"

    def most_pictures(self) -> int:
        return 1

    def questions(self) -> Questions:
        return Questions()


class Tokenizer:
    image_pad_id, pad_id, eos_ids = 99, 0, (2,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def forbidden_ids(self, vocab_size: int) -> list[int]:
        return [vocab_size - 1]


class Engine:
    """In place of the rollout engine: scripted trajectories of the size that was asked for."""

    def __init__(self, recorder: Recorder, sampler, processor, env, layout, spec, *rest):
        tower, judge, decoder = rest
        made = plain(sampler), plain(spec), tower is None, judge is None, plain(decoder)
        recorder.add("engine", *made)
        self.recorder, self.judge = recorder, judge
        self.layout = SimpleNamespace(ways=1)
        self.made = sampler, processor, env, layout, spec, tower
        self.decoder = decoder
        self.stats = Stats()

    def at(self, temperature) -> "Engine":
        self.recorder.add("at", temperature)
        sampler, *rest = self.made
        return Engine(self.recorder, sampler, *rest, None, self.decoder)

    def refusal(self, chart, turns) -> str:
        return ""

    def shown(self, execution) -> Execution:
        return execution

    def image_arrays(self, images, count, windows, layout) -> dict[str, np.ndarray]:
        return {"features": np.zeros((count, 1), np.float32)}

    def feedback(self, turn, chart) -> Piece:
        return Piece(np.array([5], np.int32), 0)

    def begun(self, charts, uids, **how) -> list[SimpleNamespace]:
        self.recorder.add("rollout", len(charts), list(uids), plain(how))
        return [
            SimpleNamespace(chart=chart, uid=uid, size=how["group"], rests=False, talks=[])
            for chart, uid in zip(charts, uids, strict=True)
        ]

    def run(self, params, groups, key, **how) -> None:
        how.pop("progress", None)
        meanwhile = how.pop("meanwhile", None)
        self.recorder.add("rollout", plain(key), plain(how), meanwhile is not None)
        if meanwhile is not None:
            meanwhile()
        for p, group in enumerate(groups):
            group.talks = [
                self._trajectory(group.chart, p * group.size + g, how["turns"])
                for g in range(group.size)
            ]

    def rollout(self, params, charts, uids, key, **how) -> list[list[Trajectory]]:
        how.pop("progress", None)
        self.recorder.add("rollout", len(charts), list(uids), plain(key), plain(how))
        group, turns = how.get("group", 1), how["turns"]
        return [
            [self._trajectory(chart, p * group + g, turns) for g in range(group)]
            for p, chart in enumerate(charts)
        ]

    def _trajectory(self, chart, number: int, turns: int) -> Trajectory:
        made = []
        for t in range(turns):
            score = GROUP_SCORES[(number * turns + t) % len(GROUP_SCORES)]
            made.append(
                Turn(
                    ids=np.arange(3 + number % 2 + t, dtype=np.int32) + 3,
                    logps=np.full(3 + number % 2 + t, -0.5, np.float32),
                    finished=number % 3 > 0,
                    text="",
                    execution=Execution(Status.OK if number % 4 else Status.ERROR, error="e"),
                    scores=Scores(score, score, score, score),
                    format=float(number % 2),
                )
            )
        pieces = [Piece(np.array([3, 4], np.int32), 0)]
        pieces += [Piece(turn.ids, t, logps=turn.logps) for t, turn in enumerate(made, 1)]
        return Trajectory(chart, number, tuple(pieces), tuple(made))


@pytest.fixture
def observe(monkeypatch, tmp_path):
    """`observe(config)`: the events of the whole stage, or the message that refuses it."""
    work = tmp_path / "work"
    source = tmp_path / "source"
    (source / "tokenizer").mkdir(parents=True)
    published = published_config(preset("tiny"), "float32")
    (source / "config.json").write_text(json.dumps(published))
    (tmp_path / "judge-model").mkdir()
    (tmp_path / "judge-model" / "config.json").write_text("{}")

    def run(config: ConfigDict) -> list[str]:
        recorder = Recorder()
        shutil.rmtree(work, ignore_errors=True)
        (work / "data" / "val").mkdir(parents=True)
        patch(monkeypatch, recorder)
        try:
            run_stage(config, str(work), recorder)
        except (ConfigError, ValueError) as refusal:
            recorder.add("refused", str(refusal))
        return recorder.events

    def base(stage: str, fields: dict[str, Any]) -> ConfigDict:
        config = load(stage, "smoke")
        if stage != "sft_chart2code" or "lora.rank" in fields:  # adapters need weights
            config.init_from = str(source)
        if "judge" in config:
            config.judge.path = str(tmp_path / "judge-model")
        set_fields(config, fields)
        return config

    return lambda stage, fields: run(base(stage, fields))


def patch(monkeypatch, recorder: Recorder) -> None:
    """Puts recorders in place of everything heavy."""
    fake = recorder.fake
    settings = SimpleNamespace(update=fake("jax.config"))
    monkeypatch.setattr(cli, "jax", SimpleNamespace(config=settings))
    monkeypatch.setattr(cli.distributed, "start", fake("start"))
    monkeypatch.setattr(cli.preemption, "listen", fake("listen"))
    # charts, tokenizer, dialogues
    for name in ("build_synthetic", "check_synthetic"):
        monkeypatch.setattr(prepare, name, fake(name))
    monkeypatch.setattr(prepare, "ExecutorPool", lambda config: contextlib.nullcontext(config))
    saved = SimpleNamespace(save=os.makedirs)
    monkeypatch.setattr(prepare, "train_sentencepiece", fake("train_tokenizer", saved))
    monkeypatch.setattr(prepare.self_correction, "synthetic_drafts", fake("synthetic_drafts", []))
    monkeypatch.setattr(prepare.self_correction, "build_dialogues", fake("build_dialogues"))
    # the stage's objects
    monkeypatch.setattr(stages, "load_tokenizer", fake("load_tokenizer", lambda *args: Tokenizer()))
    monkeypatch.setattr(stages.Stage, "charts", charts_of(recorder))
    monkeypatch.setattr(stages.Stage, "initial_params", fake("initial_params", {}))
    monkeypatch.setattr(stages.Stage, "write_config", lambda self: None)
    monkeypatch.setattr(stages, "policy_logps", fake("policy_logps", lambda *a: token_logps))
    monkeypatch.setattr(stages, "Sampler", lambda model, spec, mesh: spec)
    monkeypatch.setattr(stages, "FrozenTower", fake("tower", lambda *a: "tower"))
    monkeypatch.setattr(stages, "RolloutEngine", functools.partial(Engine, recorder))
    # the judge
    for name in ("HttpJudge", "LocalJudge", "VisualJudge"):
        judge = SimpleNamespace(stats=dict, name=name)
        monkeypatch.setattr(judges, name, fake(name, contextlib.nullcontext(judge)))
    monkeypatch.setattr(judges, "VerdictCache", lambda *args: None)
    sizes = model_config(load("stage2", "smoke"))
    monkeypatch.setattr(judges, "load_config", lambda path: sizes)
    monkeypatch.setattr(judges, "load_pretrained", fake("load_judge", (sizes, {})))
    monkeypatch.setattr(judges, "load_tokenizer", lambda *args: Tokenizer())
    # data, learner, log
    monkeypatch.setattr(
        sft.pipeline,
        "rows_of",
        lambda source, row, longest, widest, bad, kept=None: recorder.add(
            "rows", longest, widest, bad.allowed
        ),
    )
    all_rows = Survey(40, np.arange(40), 0, 0, 0, longest=9, widest=1, lengths_for_half=9)
    for name in ("survey_rows", "survey_prompts"):
        monkeypatch.setattr(sft.accounts, name, lambda *args, **how: all_rows)
    monkeypatch.setattr(sft, "Collate", functools.partial(FakeCollate, recorder))
    monkeypatch.setattr(sft.pipeline, "supervised", fake_stream(recorder))
    monkeypatch.setattr(sft.pipeline, "held_out", fake("held_out", [["row"]]))
    monkeypatch.setattr(sft, "DialogueDirectory", fake("dialogues", Charts()))
    monkeypatch.setattr(
        sft.pipeline, "prompts", fake("prompts", lambda *a, **k: endless(Charts(), a[1]))
    )
    monkeypatch.setattr(grpo, "FixedLogps", functools.partial(FakeFixedLogps, recorder))
    monkeypatch.setattr(
        monitors, "write_trajectories", lambda directory, step, *rows: recorder.add("written", step)
    )
    monkeypatch.setattr(loop, "Checkpoints", functools.partial(FakeCheckpoints, recorder))
    compared = fake("compare", "")
    monkeypatch.setattr(loop.resume, "compare", lambda saved, now, *how: compared(*how))
    monkeypatch.setattr(loop, "MetricsWriter", functools.partial(FakeWriter, recorder))
    monkeypatch.setattr(loop, "Alarms", functools.partial(FakeAlarms, recorder))
    monkeypatch.setattr(loop, "read_metrics", lambda path: [])
    monkeypatch.setattr(loop, "Progress", functools.partial(FakeProgress, recorder))
    nothing_compiled = contextlib.nullcontext(SimpleNamespace(taken=dict))
    monkeypatch.setattr(loop, "Compilations", lambda phase: nothing_compiled)
    monkeypatch.setattr(loop, "copy_of_trained", fake("reference", {}))
    monkeypatch.setattr(loop, "from_params", fresh_state)
    monkeypatch.setattr(loop, "Update", functools.partial(FakeUpdate, recorder))
    # evaluation
    monkeypatch.setattr(evaluation, "ChartDirectory", fake("gallery", Charts()))
    monkeypatch.setattr(monitors, "keep_below", lambda directory, most: recorder.add("kept", most))
    monkeypatch.setattr(
        evaluation,
        "write_trajectories",
        lambda directory, step, *rows: recorder.add("written", directory),
    )


def token_logps(params, batch):
    """Log-probabilities that depend on the tokens alone, without a model."""
    logps = -jnp.asarray(batch["tokens"], jnp.float32) / 10
    return logps, jnp.ones_like(logps)


def micro_batch(axes: int = 0) -> dict[str, np.ndarray]:
    """A row of two tokens, with as many leading axes more."""
    arrays = {"tokens": np.array([[1, 4]], np.int32), "weights": np.array([[0.0, 1.0]], np.float32)}
    arrays["home"] = arrays["rows"] = np.array([[0, 1]], np.int32)
    arrays["sequence"] = np.zeros((1, 2), np.int32)
    return {name: x.reshape((1,) * axes + x.shape) for name, x in arrays.items()}


def charts_of(recorder: Recorder):
    def charts(stage: stages.Stage, split: str) -> Charts:
        recorder.add("charts", split, stage.config.data.instruction)
        return Charts()

    return charts


def endless(charts: Charts, size: int):
    while True:
        yield [charts[i] for i in range(size)]


def fake_stream(recorder: Recorder):
    def supervised(datasets, shares, batch_size, **how):
        recorder.add("stream", len(datasets), shares, batch_size, plain(how))
        return iter(lambda: ["row"], None)

    return supervised


class FakeCollate:
    """Makes the same small batch of whatever rows."""

    def __init__(self, recorder, shape, layout, **how):
        recorder.add("collate", plain(shape))

    def __call__(self, rows):
        return micro_batch(axes=1) | {"advantages": np.ones((1, 1, 2), np.float32)}


class State(SimpleNamespace):
    def replace(self, **fields) -> "State":
        return State(**vars(self) | fields)


def fresh_state(params, tx, mesh, seed, trained) -> State:
    rng = jax.random.key_data(jax.random.key(seed))
    return State(step=0, params=params, rng=rng, tx=tx, opt_state=())


class FakeFixedLogps:
    """Log-probabilities before the updates: lower for some tokens, higher for others."""

    def __init__(self, recorder, logps, mesh, updates_per_batch, penalised):
        self.old, self.penalised = updates_per_batch > 1, penalised
        self.asked = 0

    def outline(self, micro):
        return micro

    def of(self, params, batch):
        self.asked += 1  # another policy each time
        shift = np.where(batch["tokens"] % 2, 0.3, -0.3).astype(np.float32)
        return -batch["tokens"].astype(np.float32) / 10 + shift * self.asked

    def add_to(self, params, reference, batch):
        shift = np.where(batch["tokens"] % 2, 0.3, -0.3).astype(np.float32)
        logps = -batch["tokens"].astype(np.float32) / 10
        batch = batch | ({"old_logps": logps + shift} if self.old else {})
        return batch | ({"ref_logps": logps + shift} if self.penalised else {})


class FakeUpdate:
    """Takes no step: records the loss of the first micro-batch and what the optimizer would do.

    The second update is skipped, as if its loss were not finite.
    """

    def __init__(self, recorder, loss, tx, schedule, mesh, trained, limits, rounding):
        self.recorder, self.loss = recorder, loss
        recorder.add("limits", dict(limits), rounding)
        names = ("visual/kernel", "model/kernel", "model/q_proj/lora_a")
        recorder.add("trained", [trained(name) for name in names])
        params = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
        state = tx.init(params)
        for step in range(4):
            grads = jax.tree.map(lambda x, step=step: x * (0.3 - 0.1 * step), params)
            updates, state = tx.update(grads, state, params)
            recorder.add("optimizer", plain(updates), plain(jnp.asarray(schedule(step + 20))))
        recorder.add("average", plain(average_of(state)))

    def compile(self, state, micro, micro_batches):
        pass

    def __call__(self, state, batch):
        micro = {name: jnp.asarray(x[0]) for name, x in batch.items()}
        loss, metrics = self.loss(state.params, micro)
        self.recorder.add("update", plain(batch["weights"]), plain(batch["advantages"]))
        self.recorder.add("loss", plain(loss))
        self.recorder.add("metrics", plain(metrics))
        return state.replace(step=state.step + 1), {
            "loss": loss,
            "skipped": float(state.step == 1),
        } | metrics


class FakeCheckpoints(contextlib.nullcontext):
    def __init__(self, recorder, workdir, keep, saved, every, goal):
        super().__init__(self)
        self.goal = goal
        recorder.add(
            "keep",
            keep,
            every,
            plain(goal),
            [saved(name) for name in ("model/kernel", "q_proj/lora_a")],
        )
        self.recorder = recorder

    def note(self):
        return 1, {"steps": 3, "run": {}}

    def restore(self, state, iterator):
        return None, []

    def is_better(self, measured):
        return self.goal.name in measured

    def save(self, state, iterator, note, measured):
        note.pop("run")  # it holds every field, so it proves nothing
        self.recorder.add("saved", note, sorted(measured))


class FakeWriter(contextlib.nullcontext):
    def __init__(self, recorder, workdir, tensorboard, wandb, config):
        super().__init__(self)  # `config` holds every field, so it proves nothing
        self.path, self.shows_pictures = workdir, False
        recorder.add("log", tensorboard, wandb)
        self.recorder = recorder

    def rewind(self, stage, step):
        pass

    def write(self, step, stage, values):
        self.recorder.add("row", step, {name: round(float(x), 6) for name, x in values.items()})


class FakeAlarms:
    def __init__(self, recorder, stage, thresholds, file, say):
        recorder.add("alarms", thresholds)

    def resume(self, rows):
        pass

    def observe(self, step, metrics):
        return []


class FakeProgress(contextlib.nullcontext):
    open_phase = "other"

    def __init__(self, recorder, stage, steps, log_every, start_step, annotate):
        super().__init__(self)
        recorder.add("progress", steps, log_every)

    def phase(self, name):
        return contextlib.nullcontext()

    def step(self, step, values, skipped, alarms):
        return {}


class Env:
    """An environment that runs nothing."""

    config = None

    def stats(self) -> dict[str, float]:
        return {}

    def submit(self, code):
        raise AssertionError("nothing is executed here")

    watch = submit


def run_stage(config: ConfigDict, work: str, recorder: Recorder) -> None:
    """What a command does with a configuration, in its order."""
    env = Env()
    cli.start_devices(config, work)
    prepare.find_source(config)
    if config.stage != "evaluate":
        check_config(config, model_config(config).vision)
    recorder.add("env", stages.env_config(config))
    prepare.ensure_charts(config, work)
    tokenizer = None if config.stage == "evaluate" else prepare.ensure_tokenizer(config, work)
    stage = stages.build(config, work, tokenizer)
    processor = stage.processor
    recorder.add("model", stage.model.config, stage.mesh.shape, plain(stage.layout))
    recorder.add("processor", processor.min_pixels, processor.max_pixels, processor.system)
    if config.stage == "evaluate":
        recorder.add("rows", evaluation.evaluate(stage, {}, env, "policy"))
    elif config.stage == "sft_chart2code":
        sft.train(stage)
    elif config.stage == "sft_self_correction":
        sft.train(stage, prepare.ensure_dialogues(stage, env))
    else:
        grpo.train(stage, env)


@pytest.mark.parametrize("stage", [*STAGES, "evaluate"])
def test_a_stage_is_observed_whole(observe, stage):
    """The recorders see a run to its end, and the same twice."""
    events = observe(stage, {})
    assert not any(event.startswith("refused") for event in events), events[-1]
    assert events == observe(stage, {})
    end = "rows" if stage == "evaluate" else "row "
    assert any(event.startswith(end) for event in events)


@pytest.mark.parametrize(
    "stage, field",
    [
        (stage, field)
        for stage in (*STAGES, "evaluate")
        for field in leaves(load(stage, "smoke"))
        if field not in LABELS
    ],
)
def test_a_changed_field_changes_what_happens_or_is_refused(observe, stage, field):
    context = {f: x for f, x in CONTEXT.get(field, {}).items() if f in leaves(load(stage, "smoke"))}
    before = observe(stage, context)
    value = OTHER[field]
    if isinstance(value, dict) and not isinstance(value, ConfigDict):
        value = value.get(stage) or value[load(stage, "smoke").optim.schedule]
    after = observe(stage, context | {field: value})
    assert after != before
    names = ELSEWHERE.get((stage, field), REACHES.get(field, ()))
    assert not names or not any(event.startswith("refused") for event in after), after[-1]
    for name in names:
        seen = [[event for event in run if event.startswith(f"{name} ")] for run in (before, after)]
        assert seen[0] != seen[1], f"{field} does not reach {name}"

"""One stage, or all of the paper in order: data, tokenizer, training, evaluation, report.

    <workdir>/data/{train,val,test,gallery}  charts (PNG, code, record); the gallery is of real ones
    <workdir>/sft_chart2code/                cold start 1: checkpoints/ tokenizer/ config.json metrics.jsonl evaluation.json
    <workdir>/sft_self_correction/           cold start 2, and the dialogues/ it learns from
    <workdir>/stage1/ stage2/                GRPO: also trajectories/
    <workdir>/report.html                    tables, curves, gallery

Every step leaves a whole directory or none and is skipped when it is there: the same command after
a kill goes on where it was.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mmrecoder_jax import grpo, runtime, sft
from mmrecoder_jax.config import STAGES
from mmrecoder_jax.data import sdists, self_correction, synthetic
from mmrecoder_jax.data.benchmarks import import_charts
from mmrecoder_jax.data.sources import build_synthetic
from mmrecoder_jax.env import ChartEnv, EnvConfig, ExecutorPool
from mmrecoder_jax.evaluation import evaluate, evaluation_sets, table_rows
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.models.tokenizer import train_sentencepiece
from mmrecoder_jax.monitoring.progress import Bar
from mmrecoder_jax.reporting.html import format_table
from mmrecoder_jax.reporting.report import write_run_report
from mmrecoder_jax.runtime import ConfigError, Runtime

SHARED = (
    "seed",
    "model",
    "lora",
    "processor",
    "mesh",
    "data",
    "feedback",
    "judge",
    "env",
    "eval",
    "log",
)


def say(text: str) -> None:
    """A line on the main host's output."""
    if distributed.is_main():
        print(text, flush=True)


def run_stage(config: ConfigDict, workdir: str, env: ChartEnv | None = None) -> Runtime:
    """Runs one training stage alone: makes what data it lacks, trains, saves. Returns its
    runtime.
    """
    runtime.find_source(config)
    if env is None:
        with ChartEnv(runtime.env_config(config)) as own:
            return run_stage(config, workdir, own)
    ensure_charts(config, workdir, env)
    tokenizer = ensure_tokenizer(config, workdir)
    built = runtime.build(config, workdir, tokenizer)
    if config.stage == "sft_chart2code":
        sft.train(built)
    elif config.stage == "sft_self_correction":
        sft.train(built, ensure_dialogues(built, env))
    else:
        grpo.train(built, env)
    return built


def run_evaluation(config: ConfigDict, workdir: str) -> None:
    """Evaluates the policy of `init_from` and prints the table."""
    runtime.find_source(config)
    with ChartEnv(runtime.env_config(config)) as env:
        ensure_charts(config, workdir, env)
        built = runtime.build(config, workdir)
        os.makedirs(workdir, exist_ok=True)
        rows = evaluate(
            built, built.initial_params(), env, os.path.basename(os.path.normpath(config.init_from))
        )
    say(format_table(table_rows(rows), list(table_rows(rows)[-1])))


def run_pipeline(config: ConfigDict, workdir: str) -> None:
    """The whole paper in order; ends with the table after every training step and the path of
    `report.html`.
    """
    started = time.monotonic()
    stages = stage_configs(config, workdir)
    rows: list[dict[str, Any]] = []
    with ChartEnv(runtime.env_config(config)) as env:
        ensure_charts(config, workdir, env)
        config.data.gallery = ensure_gallery(config, workdir)
        for stage in stages.values():
            stage.data.gallery = config.data.gallery
        for name, stage in stages.items():
            directory = os.path.join(workdir, name)
            path = os.path.join(directory, "evaluation.json")
            if not os.path.exists(path):
                say(f"== {name} ==")
                built = run_stage(stage, directory, env)
                stage.init_from = directory
                sets = evaluation_sets(built)
                if name not in ("sft_chart2code", STAGES[-1]):
                    sets.pop("gallery", None)
                evaluate(built, built.initial_params(), env, name, sets)
            with open(path, encoding="utf-8") as f:
                rows += json.load(f)
    if distributed.is_main():
        shown = table_rows(rows)
        columns = list(dict.fromkeys(column for row in shown for column in row))
        say(format_table(shown, columns))
        report = write_run_report(workdir, config, STAGES, rows)
        say(f"whole run: {(time.monotonic() - started) / 60:.1f} minutes in this process")
        say(f"report: {report}")


def stage_configs(config: ConfigDict, workdir: str) -> dict[str, ConfigDict]:
    """The stages of a pipeline as configurations of their own: the shared sections are the
    pipeline's, each starts from the one before.
    """
    stages = {}
    before = config.init_from
    for name in STAGES:
        stage = ConfigDict(config.stages[name].to_dict())
        for section in SHARED:
            value = config[section]
            stage[section] = ConfigDict(value.to_dict()) if isinstance(value, ConfigDict) else value
        stage.stage, stage.size, stage.init_from = name, config.size, before
        stage.data.dir = runtime.data_dir(config, workdir)
        stages[name] = stage
        before = os.path.join(workdir, name)
    return stages


def advancing(bar: Bar) -> Callable[[int, int], None]:
    """A builder's progress callback (done, in all; once an item) that moves a bar; what an earlier
    process built is not counted again.
    """

    def advance(count: int, total: int) -> None:
        if count > 1 and bar.done == 0:
            bar.resume(count - 1)
        bar.advance(count - bar.done)

    return advance


def on_main_host(work: Callable[[], None]) -> None:
    """Runs `work` on the main host while the others wait."""
    if distributed.is_main():
        work()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("main host work")


def ensure_charts(config: ConfigDict, workdir: str, env: ChartEnv) -> None:
    """Builds the synthetic chart directories that are missing; other kinds must exist
    (`Runtime.charts` says how).
    """
    if config.data.kind == "directory":
        return
    if config.data.kind != "synthetic":
        raise ConfigError(f"data.kind={config.data.kind!r}: use 'synthetic' or 'directory'")
    data = config.data

    def build():
        for split, count in (
            ("train", data.train_count),
            ("val", data.val_count),
            ("test", data.test_count),
        ):
            directory = os.path.join(runtime.data_dir(config, workdir), split)
            if os.path.isdir(directory):
                if not data.dir:  # ours: they must be the charts asked for
                    try:
                        build_synthetic(directory, split, count, data.seed, env)
                    except ValueError as error:
                        raise ConfigError(str(error)) from error
                continue
            with Bar(f"charts {split}", count, unit="chart") as bar:
                build_synthetic(directory, split, count, data.seed, env, advancing(bar))

    on_main_host(build)


def ensure_gallery(config: ConfigDict, workdir: str) -> str:
    """A directory of real charts: `data.gallery` where it is there, else a sample of matplotlib's
    and seaborn's examples; "" for none.

    Missing real charts end no run: it says which command gathers them and goes on.
    """
    if not config.data.gallery or os.path.isdir(config.data.gallery):
        return config.data.gallery
    remedy = f"`python scripts/build_gallery.py --out={config.data.gallery}` gathers all of them"
    directory = os.path.join(runtime.data_dir(config, workdir), "gallery")

    def build():
        if os.path.isdir(directory) or not config.data.gallery_sample:
            return
        # the house style of the toy charts is not theirs, and a few are slow
        env = EnvConfig(
            workers=config.env.workers, wall_seconds=60, cpu_seconds=40, sandbox=config.env.sandbox
        )
        with tempfile.TemporaryDirectory() as unpacked, ExecutorPool(env) as pool:
            try:
                raws, skipped, licences = sdists.collect(
                    Path(unpacked), Path(directory).with_name("sdists"), sdists.INDEX, say=say
                )
            except sdists.NotFetched as error:
                say(f"no real charts: {error}")
                return
            raws = sdists.evenly(raws, config.data.gallery_sample)
            meta = {
                "name": "gallery",
                "licence": "that of each chart's library, see LICENSE.*",
                "sample": len(raws),
            }
            with Bar("real charts", len(raws), unit="example") as bar:
                import_charts(
                    directory,
                    raws,
                    pool,
                    meta,
                    skipped,
                    licences,
                    curate=True,
                    progress=advancing(bar),
                )

    on_main_host(build)
    if os.path.isdir(directory):
        say(f"real charts: a sample in {directory}; {remedy}")
        return directory
    say(f"no real charts at data.gallery={config.data.gallery!r}: {remedy}; going on without")
    return ""


def ensure_tokenizer(config: ConfigDict, workdir: str) -> str | None:
    """Trains the tiny tokenizer where a model is trained from nothing and has none yet; returns its
    directory.
    """
    if config.init_from:
        return None
    directory = os.path.join(workdir, "tokenizer")
    if config.model.preset != "tiny":
        raise ConfigError(
            f"model.preset={config.model.preset!r} needs config.init_from: only 'tiny' is trained from nothing"
        )

    def build():
        if not os.path.isdir(directory):
            fixed = [
                config.data.instruction,
                config.feedback.render,
                *config.feedback.error.split("{error}"),
            ]
            texts = synthetic.tokenizer_texts(4000, config.data.seed, fixed)
            size = runtime.model_config(config).vocab_size
            train_sentencepiece(texts, size, synthetic.words()).save(directory)

    on_main_host(build)
    return directory


def ensure_dialogues(built: Runtime, env: ChartEnv) -> str:
    """The dialogue directory of cold start 2: `data.dialogues`, or built with the policy of
    `init_from` into the work directory.
    """
    config = built.config
    directory = config.data.dialogues or os.path.join(built.workdir, "dialogues")
    if os.path.isdir(directory):
        return directory
    if config.data.dialogues:
        raise ConfigError(
            f"no dialogues at data.dialogues={config.data.dialogues!r}; leave it empty to build them with the policy"
        )
    charts = built.charts("train")
    drafts = policy_drafts(built, env, min(config.dialogues.policy, len(charts)))
    drafts += list(
        self_correction.synthetic_drafts(charts, config.dialogues.synthetic, config.seed)
    )

    def build():
        with Bar("dialogues", len(drafts), unit="draft") as bar:
            feedback = config.feedback.to_dict()
            meta = {
                "name": "self-correction",
                "licence": "as of the charts",
                "seed": config.seed,
                "drafts": len(drafts),
            }
            meta |= {"feedback": feedback["image"]}
            self_correction.build_dialogues(
                directory,
                drafts,
                env,
                meta,
                feedback,
                config.dialogues.min_gain,
                progress=advancing(bar),
            )

    on_main_host(build)
    return directory


def policy_drafts(built: Runtime, env: ChartEnv, count: int) -> list[self_correction.Draft]:
    """First turns that the policy of `init_from` itself writes for the first `count` training
    charts.
    """
    config, charts = built.config, built.charts("train")
    if not count:
        return []
    engine = built.engine(env, config.dialogues.temperature)
    params = built.initial_params()
    key = jax.random.key(config.seed + 1)
    size = config.dialogues.batch_size
    drafts = []
    with Bar("policy answers", count, unit="chart") as bar:
        for start in range(0, count, size):
            numbers = np.arange(start, start + size) % len(charts)
            batch = [charts[int(i)] for i in numbers]
            groups = engine.rollout(params, batch, [start + i for i in range(size)], key, turns=1)
            for i, group in enumerate(groups[: count - start]):
                drafts.append(
                    self_correction.Draft(
                        f"policy-{start + i:06d}", batch[i], group[0].turns[0].text, "policy"
                    )
                )
            bar.advance(min(size, count - start))
    return drafts

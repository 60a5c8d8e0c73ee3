"""One stage, or all of the paper in order: data, tokenizer, training, evaluation, report.

    <workdir>/data/{train,val,test,gallery}  charts (PNG, code, record); the gallery's are real
    <workdir>/sft_chart2code/                cold start 1: checkpoints/ tokenizer/ config.json
                                             metrics.jsonl evaluation.json
    <workdir>/sft_self_correction/           cold start 2, and the dialogues/ it learns from
    <workdir>/stage1/ stage2/                GRPO: also trajectories/
    <workdir>/report.html report/            did it learn, curves, trajectories

Every step leaves a whole directory or none and is skipped when it is there: kill the command at any
point, and the same command resumes.
"""

import json
import os
import time
from typing import Any

from ml_collections import ConfigDict

from mmrecoder_jax import grpo, places, sft, stage
from mmrecoder_jax.checks import check_config, vanishing
from mmrecoder_jax.config import SHARED, STAGES, data_dir, load, model_config
from mmrecoder_jax.env.chart_env import ChartEnv
from mmrecoder_jax.evaluation import evaluate, evaluation_sets, table_rows
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.learner.checkpoint import steps_done
from mmrecoder_jax.learner.selfcheck import settle_attention
from mmrecoder_jax.prepare import (
    check_grammar,
    ensure_charts,
    ensure_dialogues,
    ensure_gallery,
    ensure_tokenizer,
    find_on_hub,
    find_source,
    say,
    share,
)
from mmrecoder_jax.reporting.report import PAGE, write_report
from mmrecoder_jax.reporting.tables import format_table


def run_stage(config: ConfigDict, workdir: str) -> None:
    """Runs one training stage alone: makes what data it lacks, trains, saves."""
    find_source(config)
    check_config(config, model_config(config).vision)
    if said := vanishing(config, model_config(config)):
        say(said)
    _settle_attention(config)
    with ChartEnv(stage.env_config(config)) as env:
        train_stage(config, workdir, env)
    say(f"done: {workdir}")


def train_stage(config: ConfigDict, workdir: str, env: ChartEnv) -> None:
    """Trains one stage to its end, after making what data and tokenizer it lacks."""
    ensure_charts(config, workdir)
    tokenizer = ensure_tokenizer(config, workdir)
    built = stage.build(config, workdir, tokenizer)
    if config.stage == "sft_chart2code":
        sft.train(built)
    elif config.stage == "sft_self_correction":
        sft.train(built, ensure_dialogues(built, env))
    else:
        grpo.train(built, env)


def run_pipeline(config: ConfigDict, workdir: str) -> None:
    """The whole paper in order; ends with the table after every training step and the path of
    `report.html`.
    """
    started = time.monotonic()
    find_on_hub(config)
    check_grammar(config)
    _check_stages(config, workdir)
    _settle_attention(config)
    rows: list[dict[str, Any]] = []
    ensure_charts(config, workdir)
    config.data.gallery = ensure_gallery(config, workdir)
    with ChartEnv(stage.env_config(config)) as env:
        for name, own in stage_configs(config, workdir).items():
            path = os.path.join(workdir, name, "evaluation.json")
            if not distributed.main_says(os.path.exists(path)):
                say(f"== {name} ==")
                find_source(own)
                train_stage(own, os.path.join(workdir, name), env)
                _evaluate(config, workdir, name, env)
                share(workdir)
            with open(path, encoding="utf-8") as f:
                rows += json.load(f)
    if distributed.is_main():
        say(format_table(table_rows(rows)))
        report = write_report(workdir)
        places.push(workdir)
        say(f"whole run: {(time.monotonic() - started) / 60:.1f} minutes in this process")
        say(f"report: {report}")


def has_finished(stage: str, workdir: str) -> bool:
    """Whether a run of `stage` ("pipeline" for all of them) in a work directory has come to its
    end.
    """
    if stage != "pipeline":
        done = steps_done(workdir)
        return done is not None and done[0] >= done[1]
    needed = [os.path.join(workdir, name, "evaluation.json") for name in STAGES]
    return all(map(os.path.isfile, [*needed, os.path.join(workdir, PAGE)]))


def _settle_attention(config: ConfigDict) -> None:
    if change := settle_attention(config):
        say(change)


def _check_stages(config: ConfigDict, workdir: str) -> None:
    """Checks all stages that are left before the first of them starts."""
    left = [
        own
        for name, own in stage_configs(config, workdir).items()
        if not os.path.exists(os.path.join(workdir, name, "evaluation.json"))
    ]
    for own in left:
        check_config(own, model_config(left[0]).vision)  # later sources do not exist yet


def _evaluate(config: ConfigDict, workdir: str, name: str, env: ChartEnv) -> None:
    """Evaluates the policy that a stage has just trained; real charts at both ends alone."""
    directory = os.path.join(workdir, name)
    own = part_config(config, workdir, "evaluate", init_from=directory)
    built = stage.build(own, directory)
    sets = evaluation_sets(built)
    if name not in (STAGES[0], STAGES[-1]):
        sets.pop("gallery", None)
    evaluate(built, built.initial_params(), env, name, sets)


def stage_configs(config: ConfigDict, workdir: str) -> dict[str, ConfigDict]:
    """The stages of a pipeline as configurations of their own, each starting from the one before.

    Adds up what `configs/pipeline.py` takes apart: a stage's own sections are below `stages`, those
    that it shares are the pipeline's.
    """
    stages = {}
    before = config.init_from
    for name in STAGES:
        stages[name] = part_config(config, workdir, name, init_from=before)
        before = os.path.join(workdir, name)
    return stages


def part_config(config: ConfigDict, workdir: str, name: str, init_from: str) -> ConfigDict:
    """One part of a pipeline (a stage, or "evaluate") as a configuration of its own."""
    part = load(name, config.size)
    own = config.stages[name]
    with part.unlocked():
        for section in part:
            if section in SHARED:
                for field in part[section]:
                    part[section][field] = config[section][field]
            elif section in own:
                part[section] = ConfigDict(own[section].to_dict())
    part.seed, part.init_from = config.seed, init_from
    part.data.dir = data_dir(config, workdir)
    return part

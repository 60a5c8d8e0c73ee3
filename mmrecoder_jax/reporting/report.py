"""A finished run as `report.html`: the table after every training step, curves of every stage,
trajectories to look at.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from mmrecoder_jax.data.sources import Chart, ChartDirectory
from mmrecoder_jax.env.chart_env import extract_code
from mmrecoder_jax.evaluation import table_rows
from mmrecoder_jax.monitoring.metrics import read_metrics
from mmrecoder_jax.reporting.curves import metrics_curves
from mmrecoder_jax.reporting.html import (
    Section,
    TrajectoryView,
    TurnView,
    figure_html,
    summary_table_html,
    trajectory_gallery_html,
    write_report,
)
from mmrecoder_jax.runtime import data_dir

TINY_BANNER = (
    "This is the embedded default: a model of about one million parameters, trained from nothing "
    "on toy charts in minutes on a CPU. "
    "It shows that every step of the pipeline runs. Its numbers are not the paper's and say "
    "nothing about the 7B model."
)
SHOWN = 48  # trajectories of one gallery


def write_run_report(
    workdir: str, config: ConfigDict, stages: Sequence[str], rows: Sequence[dict[str, Any]]
) -> str:
    """Writes `<workdir>/report.html` from the stages' directories and the evaluation rows; returns
    its path.
    """
    sections = [
        Section("After every training step", summary_table_html(table_rows(rows)) + _legend())
    ]
    for stage in stages:
        path = os.path.join(workdir, stage, "metrics.jsonl")
        if os.path.exists(path):
            curves = metrics_curves(read_metrics(path), stage)
            sections.append(
                Section(f"Curves: {stage}", figure_html(curves, f"metrics of {stage}, every step"))
            )
    sections += _galleries(workdir, config, stages)
    path = os.path.join(workdir, "report.html")
    write_report(
        path,
        title=f"MM-ReCoder in JAX: {config.size}",
        banner=TINY_BANNER if config.size != "paper" else "",
        facts={
            "size": config.size,
            "seed": config.seed,
            "model": config.model.preset,
            "work directory": workdir,
            "split": config.eval.split,
        },
        sections=sections,
    )
    return path


def trajectory_views(
    directory: str, charts: dict[str, Chart], limit: int = SHOWN
) -> list[TrajectoryView]:
    """What `rl.trajectory.write_trajectories` left in a directory (its newest step), with the
    targets from `charts` by id.
    """
    steps = sorted(name for name in os.listdir(directory) if name.endswith(".jsonl"))
    views = []
    with open(os.path.join(directory, steps[-1]), encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            if row["chart"] in charts and len(views) < limit:
                views.append(
                    TrajectoryView(
                        row["chart"],
                        charts[row["chart"]].image,
                        [_turn(directory, turn) for turn in row["turns"]],
                    )
                )
    return views


def _turn(directory: str, turn: dict[str, Any]) -> TurnView:
    render = None
    if turn["render"]:
        with open(os.path.join(directory, "renders", turn["render"]), "rb") as f:
            render = f.read()
    return TurnView(
        turn["response"],
        extract_code(turn["response"]),
        turn["status"],
        turn["error"],
        render,
        turn["scores"],
        turn["reward"],
    )


def _galleries(workdir: str, config: ConfigDict, stages: Sequence[str]) -> list[Section]:
    """Trajectories of the last stage on the evaluation split and on the real charts, of the first
    for comparison.
    """
    sets = {config.eval.split: os.path.join(data_dir(config, workdir), config.eval.split)}
    if config.data.gallery and os.path.isdir(config.data.gallery):
        sets["gallery"] = config.data.gallery
    sections = []
    for stage in (stages[-1], stages[0]):
        for name, source in sets.items():
            directory = os.path.join(workdir, stage, "evaluation", f"{name}-greedy")
            if os.path.isdir(directory):
                directory_charts = ChartDirectory(source)
                charts = {
                    chart.id: chart
                    for chart in (directory_charts[i] for i in range(len(directory_charts)))
                }
                title = f"Trajectories: {stage}, {'real charts' if name == 'gallery' else name + ' charts'}, greedy"
                sections.append(
                    Section(
                        title, trajectory_gallery_html(trajectory_views(directory, charts), title)
                    )
                )
    return sections


def _legend() -> str:
    return (
        "<p>Scores are percent, ChartMimic low-level (training mode), code_pass: a script that "
        "does not execute scores 0. Brackets are "
        "95 % bootstrap intervals over charts. Improvement, improved, regressed and repeat compare "
        "a turn with the first one, only over "
        "samples whose first turn executes (repeat: with the turn before).</p>"
    )

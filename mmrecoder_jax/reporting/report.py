"""A finished run as `report.html`: results after every training step, curves, trajectories."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from mmrecoder_jax.config import data_dir
from mmrecoder_jax.data.sources import Chart, ChartDirectory
from mmrecoder_jax.evaluation import table_rows
from mmrecoder_jax.monitoring.metrics import read_metrics
from mmrecoder_jax.reporting.curves import metrics_curves
from mmrecoder_jax.reporting.html import Section, figure_html, write_report
from mmrecoder_jax.reporting.tables import table_html
from mmrecoder_jax.reporting.trajectories import TrajectoryView, TurnView, trajectories_html

TINY_BANNER = (
    "This is the embedded default: a model of about one million parameters, trained from scratch "
    "on toy charts in minutes on a CPU. It shows that every step of the pipeline runs. Its numbers "
    "are not the paper's and say nothing about the 7B model."
)
LEGEND = (
    "<p>Scores are percent, ChartMimic low-level (training mode), code_pass: a script that does "
    "not execute scores 0. Brackets are 95 % bootstrap intervals over charts. Improvement, "
    "improved, regressed and repeat compare a turn with the first one, only over samples whose "
    "first turn executes (repeat: with the turn before).</p>"
)
SHOWN = 48  # trajectories per section: each brings three pictures, and the file is mailed


def write_run_report(
    workdir: str, config: ConfigDict, stages: Sequence[str], rows: Sequence[dict[str, Any]]
) -> str:
    """Writes `<workdir>/report.html` and returns its path.

    Args:
      workdir: of a pipeline; has a directory per stage.
      stages: their names, in the order in which they ran.
      rows: of all stages' `evaluation.json`.
    """
    sections = [Section("After every training step", table_html(table_rows(rows)) + LEGEND)]
    sections += _curves(workdir, stages)
    sections += _trajectories(workdir, config, stages)
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
    directory: str, charts: Mapping[str, Chart], limit: int = SHOWN
) -> list[TrajectoryView]:
    """The newest step that `rl.trajectory.write_trajectories` left in a directory.

    Args:
      charts: the targets, by id; trajectories about other charts are left out.
    """
    steps = sorted(name for name in os.listdir(directory) if name.endswith(".jsonl"))
    views: list[TrajectoryView] = []
    with open(os.path.join(directory, steps[-1]), encoding="utf-8") as f:
        for row in map(json.loads, f):
            if row["chart"] in charts and len(views) < limit:
                turns = [_turn(directory, turn) for turn in row["turns"]]
                views.append(TrajectoryView(row["chart"], charts[row["chart"]].image, turns))
    return views


def _turn(directory: str, turn: dict[str, Any]) -> TurnView:
    render = None
    if turn["render"]:
        with open(os.path.join(directory, "renders", turn["render"]), "rb") as f:
            render = f.read()
    return TurnView(
        response=turn["response"],
        status=turn["status"],
        error=turn["error"],
        render_png=render,
        scores=turn["scores"],
        reward=turn["reward"],
    )


def _curves(workdir: str, stages: Sequence[str]) -> list[Section]:
    sections = []
    for stage in stages:
        path = os.path.join(workdir, stage, "metrics.jsonl")
        if os.path.exists(path):
            curves = metrics_curves(read_metrics(path), stage)
            figure = figure_html(curves, f"metrics of {stage}, every step")
            sections.append(Section(f"Curves: {stage}", figure))
    return sections


def _trajectories(workdir: str, config: ConfigDict, stages: Sequence[str]) -> list[Section]:
    """Trajectories on the evaluation split and on the real charts.

    Those of the last stage come first, then those of the first stage for comparison.
    """
    sets = {config.eval.split: os.path.join(data_dir(config, workdir), config.eval.split)}
    if config.data.gallery and os.path.isdir(config.data.gallery):
        sets["gallery"] = config.data.gallery
    sections = []
    # The stages between look much like the last one, and each costs megabytes.
    for stage in (stages[-1], stages[0]):
        for name, source in sets.items():
            directory = os.path.join(workdir, stage, "evaluation", f"{name}-greedy")
            if os.path.isdir(directory):
                what = "real charts" if name == "gallery" else f"{name} charts"
                title = f"Trajectories: {stage}, {what}, greedy"
                charts = {chart.id: chart for chart in ChartDirectory(source)}
                views = trajectory_views(directory, charts)
                sections.append(Section(title, trajectories_html(views, title)))
    return sections

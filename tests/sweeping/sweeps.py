"""Sweeps that the tests run: stage 2 in its smoke size, its training command a stub."""

import sys
from pathlib import Path

from mmrecoder_jax.cli import with_fields
from mmrecoder_jax.config import load
from mmrecoder_jax.sweeping.axes import grid, read_axes
from mmrecoder_jax.sweeping.settings import Sweep

STUB = [sys.executable, str(Path(__file__).with_name("stub.py"))]
WORDS = ("config.reward.eta=0,0.1", "config.seed=0,1")


def sweep_in(workdir, words=WORDS, stage="stage2", **fixed):
    """(sweep, its points)"""
    config = with_fields(load(stage, "smoke"), {name: str(value) for name, value in fixed.items()})
    axes = read_axes(words, config)
    fields = tuple(axis.field for axis in axes)
    return Sweep(f"{stage}:smoke", config, fixed, fields, str(workdir)), grid(axes)

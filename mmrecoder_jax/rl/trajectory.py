"""Trajectories on disk: one JSON line each, renders as PNG files named by content, enough to look
at, to replay and to train on.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence

import numpy as np

from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.rl.rollout import Trajectory


def trajectory_row(
    trajectory: Trajectory, rewards: Sequence[float], advantage: float, images: dict[str, bytes]
) -> dict:
    """A JSON-able row; PNG bytes of renders are put into `images` under their file names."""

    def save(image: np.ndarray | None) -> str | None:
        if image is None:
            return None
        data = png_bytes(image)
        name = hashlib.sha256(data).hexdigest()[:16] + ".png"
        images[name] = data
        return name

    return {
        "chart": trajectory.chart.id,
        "uid": trajectory.uid,
        "advantage": float(advantage),
        "pieces": [{"turn": piece.turn, "ids": piece.ids.tolist()} for piece in trajectory.pieces],
        "turns": [
            {
                "response": turn.text,
                "finished": turn.finished,
                "status": str(turn.execution.status),
                "error": turn.execution.error,
                "render": save(turn.execution.image),
                "scores": dataclasses.asdict(turn.scores) | {"overall": turn.scores.overall},
                "format": turn.format,
                "reward": None if np.isnan(reward) else float(reward),
                "judge": None
                if turn.verdict is None
                else {"score": turn.verdict.score, "points": dict(turn.verdict.points)},
            }
            for turn, reward in zip(trajectory.turns, rewards, strict=True)
        ],
    }


def write_trajectories(
    directory: str, step: int, rows: Iterable[tuple[Trajectory, Sequence[float], float]]
) -> str:
    """Writes one step's trajectories to `<directory>/<step>.jsonl` and their renders to
    `<directory>/renders/`; returns the path.

    The file appears whole or not at all, and a repeated step replaces it.
    """
    os.makedirs(os.path.join(directory, "renders"), exist_ok=True)
    images: dict[str, bytes] = {}
    lines = [
        json.dumps(trajectory_row(trajectory, rewards, advantage, images))
        for trajectory, rewards, advantage in rows
    ]
    for name, data in images.items():
        path = os.path.join(directory, "renders", name)
        if not os.path.exists(path):
            _write(path, data)
    path = os.path.join(directory, f"{step:06d}.jsonl")
    _write(path, ("\n".join(lines) + "\n").encode())
    return path


def _write(path: str, data: bytes) -> None:
    with open(path + ".tmp", "wb") as f:
        f.write(data)
    os.replace(path + ".tmp", path)

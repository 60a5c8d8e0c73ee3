"""A conversation about one chart: its turns, its token ids, and how it is kept on disk.

    q            o1           f1          o2
    prompt       response 1   feedback    response 2        pieces (token ids; the only truth)
                 turn 1                   turn 2            turns (text, execution, scores, verdict)

On disk: one file of JSON lines per step, a line per trajectory; its pictures are PNG files named by
their content. Enough to look at, to sample again (`replay`) and to train on:

    <directory>/000012.jsonl
    <directory>/renders/000012/<digest>.png

A row names pictures as "000012/<digest>.png", below renders/. Rows of earlier versions name them
"<digest>.png", and lack the target, the log-probabilities, the flags and the origin.
"""

import contextlib
import dataclasses
import enum
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mmrecoder_jax.data.batching import Piece
from mmrecoder_jax.data.sources import Chart, png_bytes
from mmrecoder_jax.env.chartmimic import Scores
from mmrecoder_jax.env.execution import Execution
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.rl.judge.base import Verdict


class Mode(enum.StrEnum):
    """Where a prompt's G trajectories part: before turn 1, or before turn 2 (arXiv 2604.01600)."""

    SHARED_FIRST_TURN = "shared_first_turn"
    FULL_TRAJECTORY = "full_trajectory"


MODES = {"stage1": Mode.SHARED_FIRST_TURN, "stage2": Mode.FULL_TRAJECTORY}


@dataclasses.dataclass(frozen=True)
class Turn:
    """One response and what came of it.

    Attributes:
      ids, logps: sampled tokens and their log-probabilities under the policy that sampled them.
      finished: False where the length limit cut the response.
      text: the response, derived from `ids`.
      execution: of the code in the response.
      scores: of what was drawn, against the target; NaN where the target has no record.
      format: 1.0 where the response has the required form, else 0.0.
      verdict: the judge's; None where there is no judge or no render.
    """

    ids: Int[np.ndarray, " L"]
    logps: Float[np.ndarray, " L"]
    finished: bool
    text: str
    execution: Execution
    scores: Scores
    format: float
    verdict: Verdict | None = None

    @property
    def judge_score(self) -> float:
        """The model part of the reward: 0 where there was nothing to judge, NaN where the judge
        could not score the render.
        """
        if self.verdict is None:
            return 0.0
        return math.nan if self.verdict.score is None else self.verdict.score


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A whole conversation about one chart.

    Attributes:
      chart: the target.
      uid: what decided the trajectory's random numbers, together with the step's key.
      pieces: the token ids that the policy saw and wrote, in order.
      turns: its responses.
    """

    chart: Chart
    uid: int
    pieces: tuple[Piece, ...]
    turns: tuple[Turn, ...]


@dataclasses.dataclass(frozen=True)
class Origin:
    """What decided the tokens of a group, besides the policy's weights.

    Attributes:
      uid: of the group; with its number a member's own follows from it.
      policies: after which updates the first and the last of its tokens were written.
      key: data of the step's random key.
      mesh: sizes of the axes of the devices' mesh: (data, fsdp, tensor). They decide no token but
        where rounding does.
    """

    uid: int
    policies: tuple[int, int]
    key: tuple[int, ...]
    mesh: tuple[int, ...]


# Rewards per turn; an evaluation has plain lists.
Rewards = Sequence[float] | Float[np.ndarray, " T"]


def write_trajectories(
    directory: str,
    step: int,
    rows: Iterable[tuple[Trajectory, Rewards, float]],
    numbers: Sequence[int] | Int[np.ndarray, " rows"] | None = None,
    origins: Sequence[tuple[Origin, int]] | None = None,
) -> str:
    """Writes one step's trajectories and their pictures below a directory.

    The file `<directory>/<step>.jsonl` appears whole or not at all, and a repeated step replaces
    it. Pictures go to `<directory>/renders/<step>/`. All hosts call this together: each writes its
    pictures, and the main one the rows of all.

    Args:
      rows: this host's: (trajectory, rewards per turn, advantage).
      numbers: the order of the rows of all hosts; None: the order of `rows`.
      origins: of each row, and its number in its group; None where nothing is sampled again.

    Returns:
      The path of the JSON lines.
    """
    path = os.path.join(directory, f"{step:06d}.jsonl")
    folder = f"{step:06d}"
    with distributed.together():
        os.makedirs(os.path.join(directory, "renders", folder), exist_ok=True)
        images: dict[str, bytes] = {}
        found = [trajectory_row(*row, images, folder) for row in rows]
        for row, origin in zip(found, origins or [], strict=origins is not None):
            row["origin"] = dataclasses.asdict(origin[0]) | {"member": origin[1]}
        lines = [json.dumps(row) for row in found]
        for name, data in images.items():
            render = os.path.join(directory, "renders", name)
            if not os.path.exists(render):
                _write(render, data)
    lines = distributed.all_values(lines, range(len(lines)) if numbers is None else numbers)
    if distributed.is_main():
        _write(path, ("\n".join(lines) + "\n").encode())
    return path


def trajectory_row(
    trajectory: Trajectory,
    rewards: Rewards,
    advantage: float,
    images: dict[str, bytes],
    folder: str = "",
) -> dict[str, Any]:
    """A row of the file as plain data; PNG bytes of its pictures are put into `images` by name.

    Args:
      folder: of the pictures, in front of their names.
    """
    return {
        "chart": trajectory.chart.id,
        "target": _picture(trajectory.chart.image, images, folder),
        "uid": trajectory.uid,
        "advantage": float(advantage),
        "pieces": [{"turn": piece.turn, "ids": piece.ids.tolist()} for piece in trajectory.pieces],
        "turns": [
            _turn_row(turn, reward, images, folder)
            for turn, reward in zip(trajectory.turns, rewards, strict=True)
        ],
    }


def _picture(data: bytes, images: dict[str, bytes], folder: str) -> str:
    """The name of a PNG file, which is put into `images`."""
    name = hashlib.sha256(data).hexdigest()[:16] + ".png"
    name = f"{folder}/{name}" if folder else name
    images[name] = data
    return name


def _turn_row(turn: Turn, reward: float, images: dict[str, bytes], folder: str) -> dict[str, Any]:
    render = None
    if turn.execution.image is not None:
        render = _picture(png_bytes(turn.execution.image), images, folder)
    verdict = turn.verdict
    judge = None if verdict is None else {"score": verdict.score, "points": dict(verdict.points)}
    scores = dataclasses.asdict(turn.scores) | {"overall": turn.scores.overall}
    return {
        "response": turn.text,
        "logps": [round(float(logp), 4) for logp in turn.logps],
        "finished": turn.finished,
        "status": str(turn.execution.status),
        "error": turn.execution.error,
        "flags": [str(flag) for flag in turn.execution.flags],
        "replay": str(turn.execution.replay),
        "render": render,
        "scores": scores if turn.scores.known else None,
        "format": turn.format,
        "reward": None if np.isnan(reward) else float(reward),
        "judge": judge,
    }


def _write(path: str, data: bytes) -> None:
    # Two hosts may draw the same render. After a kill the same host writes the same name again.
    temporary = f"{path}.{distributed.host()}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(data)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise

"""Written trajectories as the page wants them: what to list, filter, sort and search them by, and
all of one.

Everything a model wrote (responses, code, errors) stays text: the page never reads it as HTML.
Pictures are PNG files that the trainer encoded from pixels, and are named, not read.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmrecoder_jax.env.response import extract_code, extract_thought
from mmrecoder_jax.reporting.escape import MAX_CHARS
from mmrecoder_jax.rl.correction import improved, regressed, same_code

MAX_TOKENS = 1000  # of a turn that a page lists
FOUND_CHARS = 80  # of an error by which trajectories are found
_PICTURE = re.compile(r"(\d+/)?[0-9a-z]+\.png")  # below renders/

FILTERS = {
    "improved": "first turn executes, last turn scores higher",
    "regressed": "first turn executes, last turn scores lower",
    "repaired": "first turn fails, last turn executes",
    "repeated": "a turn repeats the code of the turn before",
    "same picture": "a turn draws the very picture of the turn before",
    "failed": "some turn does not execute",
    "flagged": "a script tampered, forged its record, or claimed texts that nobody can see",
    "undecided": "a drawing could not be checked by a replay",
    "cut": "a response was cut at the length limit",
    "unscored": "the judge could not score a turn",
}


@dataclasses.dataclass(frozen=True)
class TurnView:
    """One turn: what was written, what became of it, what it earned.

    Attributes:
      status: of `env.execution.Status`; "ok" is success.
      error: feedback text; "" when ok.
      render: its file; None where nothing was drawn.
      scores: parts in [0, 1] by name; turns are compared by "overall".
      reward: None where no reward was computed.
      judge: the judge's score; None where there is none.
      judged: whether the judge was asked.
      flags: what speaks against the script.
      replay: what became of the replay; "" where none was asked for.
      tokens: (id, log-probability) as sampled; None where an earlier version kept none.
    """

    response: str
    status: str
    error: str
    render: Path | None
    scores: Mapping[str, float]
    reward: float | None
    format: float = 0.0
    judge: float | None = None
    judged: bool = False
    flags: tuple[str, ...] = ()
    replay: str = ""
    finished: bool = True
    tokens: tuple[tuple[int, float], ...] | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def overall(self) -> float:
        """The low-level score."""
        return self.scores["overall"]

    @property
    def code(self) -> str | None:
        """None where the response has no code block."""
        return extract_code(self.response)


@dataclasses.dataclass(frozen=True)
class TrajectoryView:
    """One target chart and the turns that redraw it.

    Attributes:
      id: "<directory>/<step>/<number>", by which `replay` finds it.
      target: its file; None where it is not at hand.
    """

    id: str
    chart: str
    target: Path | None
    turns: list[TurnView]
    advantage: float = 0.0

    def labels(self) -> list[str]:
        """The filters (`FILTERS`) that show this trajectory.

        improved, regressed: only where the first turn executes (arXiv 2604.01600 counts nothing
        else as self-correction), by the rule of `rl.correction`.
        """
        first, last = self.turns[0], self.turns[-1]
        pairs = list(itertools.pairwise(self.turns))
        tests = {
            "improved": first.ok and improved(first.overall, last.overall),
            "regressed": first.ok and regressed(first.overall, last.overall),
            "repaired": not first.ok and last.ok,
            "repeated": any(same_code(a.response, b.response) for a, b in pairs),
            # Files are named by their content.
            "same picture": any(a.render is not None and a.render == b.render for a, b in pairs),
            "failed": not all(turn.ok for turn in self.turns),
            "flagged": any(turn.flags for turn in self.turns),
            "undecided": any(turn.replay == "undecided" for turn in self.turns),
            "cut": not all(turn.finished for turn in self.turns),
            "unscored": any(turn.judged and turn.judge is None for turn in self.turns),
        }
        return [name for name, holds in tests.items() if holds]

    @property
    def improvement(self) -> float:
        """The last turn's low-level score minus the first one's."""
        return self.turns[-1].overall - self.turns[0].overall

    @property
    def disagreement(self) -> float | None:
        """The largest distance of a turn's rule score and its judge's; None without a judge."""
        found = [abs(t.judge - t.overall) for t in self.turns if t.judge is not None]
        return max(found, default=None)


Where = Callable[[Path], str]  # the address of a picture, as the page is to load it


def read_views(
    path: Path, name: str, target_of: Callable[[str], Path | None], limit: int | None = None
) -> list[TrajectoryView]:
    """The trajectories of a file that `rl.trajectory.write_trajectories` left.

    A row that is none (cut off, or of another program) is left out.

    Args:
      name: of the file in ids: "<directory>/<step>".
      target_of: finds the chart that a row of an earlier version is about, by its id.
      limit: how many at most.
    """
    views: list[TrajectoryView] = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(itertools.islice(f, limit)):
            try:
                views.append(_view(json.loads(line), path.parent, f"{name}/{number}", target_of))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
    return views


def _view(
    row: Mapping[str, Any], directory: Path, name: str, target_of: Callable[[str], Path | None]
) -> TrajectoryView:
    sampled = [piece["ids"] for piece in row.get("pieces", []) if piece["turn"]]
    ids = sampled if len(sampled) == len(row["turns"]) else [None] * len(row["turns"])
    target = _picture(directory, row["target"]) if "target" in row else target_of(row["chart"])
    turns = [_turn(directory, *pair) for pair in zip(row["turns"], ids, strict=True)]
    if not turns:
        raise ValueError("a trajectory has turns")
    return TrajectoryView(name, str(row["chart"]), target, turns, float(row.get("advantage", 0.0)))


def _turn(directory: Path, row: Mapping[str, Any], ids: list[int] | None) -> TurnView:
    judge, logps = row.get("judge"), row.get("logps")
    known = ids is not None and logps is not None and len(logps) == len(ids)
    return TurnView(
        response=str(row["response"]),
        status=str(row["status"]),
        error=str(row["error"]),
        render=_picture(directory, row["render"]),
        scores={str(part): float(score) for part, score in row["scores"].items()},
        reward=_number(row["reward"]),
        format=float(row.get("format", 0.0)),
        judge=None if judge is None else _number(judge["score"]),
        judged=judge is not None,
        flags=tuple(map(str, row.get("flags", ()))),
        replay=str(row.get("replay", "")),
        finished=bool(row.get("finished", True)),
        tokens=tuple(zip(ids, logps, strict=True)) if known and ids and logps else None,
    )


def _picture(directory: Path, name: str | None) -> Path | None:
    if name is None or not _PICTURE.fullmatch(name):
        return None
    return directory / "renders" / name


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


# ---------------------------------------------------------------- what the page is given

ENTRY = ("number", "chart", "reward", "gain", "disagreement", "advantage", "labels", "found")
ENTRY_PICTURES = ("target", "render")


def entry(view: TrajectoryView, where: Where) -> list[Any]:
    """What a trajectory is listed, sorted and found by: `ENTRY`, then `ENTRY_PICTURES`."""
    last = view.turns[-1]
    error = next((turn.error.strip() for turn in view.turns if turn.error.strip()), "")
    labels = [list(FILTERS).index(name) for name in view.labels()]
    return [
        int(view.id.rpartition("/")[2]),
        view.chart,
        _short(last.reward),
        _short(view.improvement),
        _short(view.disagreement),
        _short(view.advantage),
        labels,
        error.splitlines()[-1][:FOUND_CHARS] if error else "",
        _address(view.target, where),
        _address(last.render, where),
    ]


def detail(view: TrajectoryView, where: Where, text_of: Callable[[int], str]) -> dict[str, Any]:
    """All that the page shows of a trajectory.

    Args:
      text_of: the text of a token.
    """
    return {
        "target": _address(view.target, where),
        "turns": [_turn_detail(turn, where, text_of) for turn in view.turns],
    }


def _turn_detail(turn: TurnView, where: Where, text_of: Callable[[int], str]) -> dict[str, Any]:
    code = turn.code
    shown: dict[str, Any] = {
        "status": turn.status,
        "error": turn.error[:MAX_CHARS],
        "render": _address(turn.render, where),
        "scores": {name: _short(score) for name, score in turn.scores.items()},
        "reward": _short(turn.reward),
        "format": turn.format,
        "judge": _short(turn.judge),
        "flags": [*turn.flags, *(["undecided"] if turn.replay == "undecided" else [])],
        "finished": turn.finished,
        "code": None if code is None else code[:MAX_CHARS],
        "thought": (turn.response if code is None else extract_thought(turn.response))[:MAX_CHARS],
        "characters": len(turn.response),
    }
    if turn.tokens is not None:
        shown["tokens"] = [[text_of(i), i, logp] for i, logp in turn.tokens[:MAX_TOKENS]]
        shown["sampled"] = len(turn.tokens)
    return shown


def _address(picture: Path | None, where: Where) -> str | None:
    return None if picture is None else where(picture)


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)

"""What a work directory holds of a run, finished or not: stages, metrics, alarms, evaluations,
trajectories.

It may be of a pipeline, with a directory per stage, or of one stage. Only files are read, whatever
their state: a run may be writing them.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmrecoder_jax.config import STAGES
from mmrecoder_jax.monitoring.alarms import ALARMS_FILE
from mmrecoder_jax.monitoring.rows import Row, read_rows

_STEP = re.compile(r"\d+\.jsonl")


@dataclasses.dataclass(frozen=True)
class Written:
    """A file of trajectories.

    Attributes:
      path: of the file.
      name: "<directory>/<step>" below the work directory; with a row's number it is an id.
      group: what it belongs to, for people: "stage2", "stage2, test-greedy".
      step: of the stage; 0 for an evaluation.
      changed: when it was written, in seconds since 1970.
      size: in bytes.
    """

    path: Path
    name: str
    group: str
    step: int
    changed: float
    size: int

    @property
    def is_training(self) -> bool:
        """Whether they are rollouts of training, not of an evaluation."""
        return "," not in self.group

    @property
    def key(self) -> str:
        """A name for a file of data about it, which changes when its content does."""
        digest = f"{int(self.changed * 1000) & 0xFFFFFFFF:08x}"
        return re.sub(r"[^A-Za-z0-9-]", "_", self.name) + "_" + digest


@dataclasses.dataclass(frozen=True)
class StageFiles:
    """One stage's directory.

    Attributes:
      name: of the stage.
      below: of the directory below the work directory; "" where they are one.
    """

    name: str
    path: Path
    below: str

    def metrics(self) -> list[Row]:
        """The rows of its metrics; none where it has written none."""
        return [row for row in read_rows(self.path / "metrics.jsonl") if row["stage"] == self.name]

    def alarms(self) -> list[Row]:
        """Where its alarms began and ended."""
        return [row for row in read_rows(self.path / ALARMS_FILE) if row["stage"] == self.name]

    def evaluation(self) -> list[Row]:
        """The rows of its evaluation; none before it."""
        rows = _json(self.path / "evaluation.json")
        return rows if isinstance(rows, list) else []

    def config(self) -> dict[str, Any]:
        """Its saved configuration; empty where there is none."""
        config = _json(self.path / "config.json")
        return config if isinstance(config, dict) else {}

    def written(self) -> Iterator[Written]:
        """Its files of trajectories, evaluations first."""
        yield from self._written(self.path / "trajectories", self.name)
        root = self.path / "evaluation"
        if root.is_dir():
            for directory in sorted(root.iterdir()):
                yield from self._written(directory, f"{self.name}, {directory.name}")

    def _written(self, directory: Path, group: str) -> Iterator[Written]:
        if not directory.is_dir():
            return
        below = "/".join(filter(None, (self.below, str(directory.relative_to(self.path)))))
        for path in directory.iterdir():
            if _STEP.fullmatch(path.name):
                try:
                    state = path.stat()
                except FileNotFoundError:  # it has just been removed (`rl.kept`)
                    continue
                step = int(path.stem)
                yield Written(path, f"{below}/{step}", group, step, state.st_mtime, state.st_size)


def stages_of(workdir: Path) -> list[StageFiles]:
    """The stages of a work directory that have written something, in the paper's order, then by
    name.
    """
    found = []
    for path in [workdir, *sorted(workdir.iterdir() if workdir.is_dir() else ())]:
        if (path / "metrics.jsonl").is_file() or (path / "evaluation.json").is_file():
            below = "" if path == workdir else path.name
            name = str(StageFiles("", path, below).config().get("stage") or path.name)
            found.append(StageFiles(name, path, below))
    rank = {name: i for i, name in enumerate(STAGES)}
    return sorted(found, key=lambda stage: (rank.get(stage.name, len(rank)), stage.name))


def newest_first(stages: list[StageFiles]) -> list[Written]:
    """All files of trajectories: those of later stages first, in a stage those of later steps.

    An evaluation is later than all steps of its stage.
    """
    found = []
    for rank, stage in enumerate(stages):
        found += [(rank, not file.is_training, file.step, file) for file in stage.written()]
    found.sort(key=lambda item: (*item[:3], item[3].name), reverse=True)
    return [file for *_, file in found]


def target_finder(workdir: Path, stage_config: dict[str, Any]) -> dict[str, Path]:
    """The picture of each chart that rows of earlier versions are about, by its id."""
    data = stage_config.get("data", {}).get("dir") or ""
    roots = [workdir / "data", workdir.parent / "data", *([Path(data)] if data else [])]
    found: dict[str, Path] = {}
    for root in roots:
        for split in ("train", "val", "test", "gallery"):
            charts = root / split / "charts.jsonl"
            if charts.is_file():
                with open(charts, encoding="utf-8") as f:
                    for line in f:
                        row = json.loads(line)
                        found.setdefault(row["id"], root / split / row["image"])
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or being written
        return None

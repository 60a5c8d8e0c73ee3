"""Metrics of a run: one JSON line per step in `metrics.jsonl`, always.

TensorBoard and wandb get them too, when asked for and installed.

    {"stage": "stage1", "step": 12, "time": 1760000000.0, "loss": 0.31, "turn1/reward": 0.71}

`time` is seconds since 1970. A metric that is not finite is stored as null (strict JSON) and read
back as nan. Where names with a slash are drawn: `reporting.curves`.

The file survives kills, and a resumed stage rewinds it (`monitoring.rows`).
"""

import dataclasses
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
from PIL import Image, ImageOps

from mmrecoder_jax.monitoring.rows import Row, RowFile, read_rows

RESERVED = ("stage", "step", "time")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A trajectory to look at.

    Attributes:
      values: by the name of their column; texts are a model's, so they are hostile.
      target: uint8 `[height, width, 3]`.
      renders: likewise, of each turn; None where nothing was drawn.
    """

    values: Mapping[str, float | str]
    target: np.ndarray
    renders: Sequence[np.ndarray | None]

    def strip(self) -> np.ndarray:
        """Target and renders side by side, as high as the target; grey where nothing was drawn."""
        height, width, _ = self.target.shape
        parts = [self.target]
        for render in self.renders:
            part = np.full((height, width, 3), 128, np.uint8)
            if render is not None:
                fitted = ImageOps.contain(Image.fromarray(render), (width, height))
                part[: fitted.height, : fitted.width] = np.asarray(fitted)
            parts += [np.zeros((height, 2, 3), np.uint8), part]
        return np.concatenate(parts, axis=1)


class MetricsWriter:
    """Appends rows to `workdir/metrics.jsonl`; a context manager.

    Args:
      workdir: created when it is missing.
      tensorboard: also write event files under `workdir/tensorboard/<stage>` (needs tensorboardX).
      wandb: also log to this wandb project; "" logs nothing (needs wandb).
      config: what wandb shows as the run's configuration.

    A missing tensorboardX or wandb is reported once on stderr and the run goes on with
    `metrics.jsonl`. Event files are rewound with the rows; wandb cannot take points back, so there
    a resumed run shows the repeated steps twice.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        tensorboard: bool = False,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        self.workdir = Path(workdir)
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.path = self.workdir / "metrics.jsonl"
        self._rows = RowFile(self.path)
        self._tensorboard = _import_tensorboard(self.path) if tensorboard else None
        self._event_writers: dict[str, Any] = {}
        self._first_valid_step: dict[str, int] = {}
        self._wandb_run = self._start_wandb(wandb, config) if wandb else None
        self._wandb_stages: set[str] = set()

    def write(self, step: int, stage: str, values: Mapping[str, Any]) -> None:
        """Writes one row.

        Args:
          values: numbers or 0-d arrays by name. Reading a device array waits for it.

        Raises:
          ValueError: a value has a reserved name (stage, step, time).
        """
        for name in RESERVED:
            if name in values:
                raise ValueError(
                    f"a metric may not be called {name!r}: rows of {self.path.name} use this name; "
                    "rename the metric"
                )
        numbers = {name: float(value) for name, value in values.items()}
        row = {"stage": stage, "step": int(step), "time": round(time.time(), 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._rows.append(row)
        if self._tensorboard:
            writer = self._event_writer(self._tensorboard, stage)
            for name, value in numbers.items():
                writer.add_scalar(name, value, int(step))
        if self._wandb_run:
            if stage not in self._wandb_stages:  # every stage counts its own steps
                self._wandb_run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
                self._wandb_stages.add(stage)
            named = {f"{stage}/{name}": value for name, value in numbers.items()}
            self._wandb_run.log({f"{stage}/step": int(step)} | named)

    @property
    def shows_pictures(self) -> bool:
        """Whether TensorBoard or wandb is written."""
        return self._tensorboard is not None or self._wandb_run is not None

    def show(self, step: int, stage: str, samples: Sequence[Sample]) -> None:
        """Gives pictures and a table of trajectories to TensorBoard and wandb."""
        if self._tensorboard:
            writer = self._event_writer(self._tensorboard, stage)
            for number, sample in enumerate(samples):
                tag = f"trajectories/{number}"
                writer.add_image(tag, sample.strip(), int(step), dataformats="HWC")
            writer.add_text("trajectories", _markdown(samples), int(step))
        if self._wandb_run:
            import wandb

            columns = list(samples[0].values)
            table = wandb.Table(columns=["target and turns", *columns])
            for sample in samples:
                table.add_data(wandb.Image(sample.strip()), *sample.values.values())
            self._wandb_run.log({f"{stage}/step": int(step), f"{stage}/trajectories": table})

    def rewind(self, stage: str, step: int) -> None:
        """Drops the rows of `stage` past `step`, which a resumed run continues from."""
        self._rows.rewind(stage, step)
        self._first_valid_step[stage] = step + 1
        writer = self._event_writers.pop(stage, None)
        if writer:
            writer.close()

    def close(self) -> None:
        """Closes the file, the event writers and the wandb run."""
        self._rows.close()
        for writer in self._event_writers.values():
            writer.close()
        if self._wandb_run:
            self._wandb_run.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _event_writer(self, tensorboard: ModuleType, stage: str) -> Any:
        if stage not in self._event_writers:
            directory = str(self.workdir / "tensorboard" / stage)
            # TensorBoard hides what an older process wrote from this step on.
            purge = self._first_valid_step.get(stage)
            self._event_writers[stage] = tensorboard.SummaryWriter(directory, purge_step=purge)
        return self._event_writers[stage]

    def _start_wandb(self, project: str, config: Mapping[str, Any] | None) -> Any:
        """A wandb run; None where wandb is not installed."""
        try:
            import wandb
        except ImportError:
            _report_missing("wandb", "wandb", self.path)
            return None
        id_file = self.workdir / "wandb_id"  # a resumed run continues in the same wandb run
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        return wandb.init(
            project=project,
            dir=str(self.workdir),
            id=id_file.read_text(),
            resume="allow",
            config=dict(config or {}),
        )


def read_metrics(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a `metrics.jsonl` in the order of the file; null becomes nan.

    A cut-off last line is left out.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line that is not the last one is broken.
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            f"no metrics at {path}: give the metrics.jsonl of a work directory in which a stage "
            "has run"
        )
    return [
        {name: math.nan if value is None else value for name, value in row.items()}
        for row in read_rows(Path(path))
    ]


def _markdown(samples: Sequence[Sample]) -> str:
    """The values of samples; each in an indented block, in which Markdown has no meaning."""
    lines = []
    for number, sample in enumerate(samples):
        lines += [f"trajectory {number}", ""]
        for name, value in sample.values.items():
            text = value if isinstance(value, str) else f"{value:.3f}"
            lines += [f"    {name}: {line}" for line in text.splitlines() or [""]]
        lines.append("")
    return "\n".join(lines)


def _import_tensorboard(path: Path) -> ModuleType | None:
    try:
        import tensorboardX
    except ImportError:
        _report_missing("TensorBoard", "tensorboardX", path)
        return None
    return tensorboardX


def _report_missing(what: str, package: str, path: Path) -> None:
    """Says so and no more: a run of hours must not fail because a display is missing."""
    print(
        f"metrics: {what} was asked for but {package} is not installed (pip install {package}); "
        f"writing {path} only",
        file=sys.stderr,
    )

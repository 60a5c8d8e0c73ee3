"""Metrics of a run: one JSON line per step in `metrics.jsonl`, always; TensorBoard and wandb when
asked for and installed.

A row is `{"stage": "stage1", "step": 12, "time": 1760000000.0, "loss": 0.31, "reward/turn1":
0.71}`. `time` is seconds since
1970. A metric that is not finite is stored as null (strict JSON) and read back as nan. A name
  `panel/line` puts the metric as that
line into that panel of the report's curves.

A run may be killed at any instant. Every row is one flushed write, so a kill leaves at most one
cut-off last line; opening the file again removes it. A resumed stage calls `rewind(stage, step)`,
and the rows that the interrupted process wrote past its last checkpoint go away, so that the file
holds each step once.
"""

import json
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESERVED = ("stage", "step", "time")


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
        workdir: str | os.PathLike,
        tensorboard: bool = False,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        self.workdir = Path(workdir)
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.path = self.workdir / "metrics.jsonl"
        _replace_rows(self.path, _read_rows(self.path))
        self._file = open(self.path, "ab")  # noqa: SIM115 - closed by close()
        self._tensorboard = _import_tensorboard(self.path) if tensorboard else None
        self._event_writers: dict[str, Any] = {}
        self._first_valid_step: dict[str, int] = {}
        self._wandb_run = self._start_wandb(wandb, config) if wandb else None
        self._wandb_stages: set[str] = set()

    def write(self, step: int, stage: str, values: Mapping[str, Any]) -> None:
        """Writes one row. Values are numbers or 0-d arrays; reading a device array waits for it, so
        pass those of the step before.

        Raises ValueError when a value carries a reserved name (stage, step, time).
        """
        for name in RESERVED:
            if name in values:
                raise ValueError(
                    f"a metric may not be called {name!r}: rows of {self.path.name} use this name; rename the metric"
                )
        numbers = {name: float(value) for name, value in values.items()}
        row = {"stage": stage, "step": int(step), "time": round(time.time(), 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(_encode(row))
        self._file.flush()
        if self._tensorboard:
            writer = self._event_writer(stage)
            for name, value in numbers.items():
                writer.add_scalar(name, value, int(step))
        if self._wandb_run:
            if stage not in self._wandb_stages:  # every stage counts its own steps
                self._wandb_run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
                self._wandb_stages.add(stage)
            self._wandb_run.log(
                {f"{stage}/step": int(step)}
                | {f"{stage}/{name}": value for name, value in numbers.items()}
            )

    def rewind(self, stage: str, step: int) -> int:
        """Drops the rows of `stage` past `step` (the step a resumed run goes on from) and returns
        how many there were.
        """
        rows = _read_rows(self.path)
        kept = [row for row in rows if row["stage"] != stage or row["step"] <= step]
        if len(kept) < len(rows):
            self._file.close()
            _replace_rows(self.path, kept)
            self._file = open(self.path, "ab")  # noqa: SIM115 - closed by close()
        self._first_valid_step[stage] = step + 1
        writer = self._event_writers.pop(stage, None)
        if writer:
            writer.close()
        return len(rows) - len(kept)

    def close(self) -> None:
        """Closes the file, the event writers and the wandb run."""
        self._file.close()
        for writer in self._event_writers.values():
            writer.close()
        if self._wandb_run:
            self._wandb_run.finish()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _event_writer(self, stage: str):
        if stage not in self._event_writers:
            directory = str(self.workdir / "tensorboard" / stage)
            # TensorBoard hides what an older process wrote from this step on
            purge = self._first_valid_step.get(stage)
            self._event_writers[stage] = self._tensorboard.SummaryWriter(
                directory, purge_step=purge
            )
        return self._event_writers[stage]

    def _start_wandb(self, project: str, config: Mapping[str, Any] | None):
        try:
            import wandb
        except ImportError:
            return _report_missing("wandb", "wandb", self.path)
        id_file = self.workdir / "wandb_id"  # a resumed run goes on in the same wandb run
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        return wandb.init(
            project=project,
            dir=str(self.workdir),
            id=id_file.read_text(),
            resume="allow",
            config=dict(config or {}),
        )


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl` in the order of the file; null becomes nan. A cut-off last line
    is left out.

    Raises FileNotFoundError when there is no such file, ValueError when a line that is not the last
    one is broken.
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            f"no metrics at {path}: give the metrics.jsonl of a work directory in which a stage has run"
        )
    return [
        {name: math.nan if value is None else value for name, value in row.items()}
        for row in _read_rows(Path(path))
    ]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "stage" not in row or "step" not in row:
                raise ValueError("not a row with stage and step")
        except ValueError as error:
            if number == len(lines):
                break  # the writer was killed inside this line
            raise ValueError(
                f"{path}, line {number} is broken ({error}): {line[:80]!r}; remove this line and try again"
            ) from error
        rows.append(row)
    return rows


def _replace_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Makes the file hold exactly these rows, or leaves the old one: written beside it, then
    renamed over it.
    """
    data = b"".join(_encode(row) for row in rows)
    if path.exists() and path.read_bytes() == data:
        return
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(data)
    os.replace(beside, path)


def _encode(row: dict[str, Any]) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def _import_tensorboard(path: Path):
    try:
        import tensorboardX
    except ImportError:
        return _report_missing("TensorBoard", "tensorboardX", path)
    return tensorboardX


def _report_missing(what: str, package: str, path: Path) -> None:
    print(
        f"metrics: {what} was asked for but {package} is not installed (pip install {package}); writing {path} only",
        file=sys.stderr,
    )

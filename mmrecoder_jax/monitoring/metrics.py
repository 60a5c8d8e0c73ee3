"""Metrics of a run: one JSON line per step in `metrics.jsonl`, always.

TensorBoard and wandb get them too, when asked for and installed.

    {"stage": "stage1", "step": 12, "time": 1760000000.0, "loss": 0.31, "turn1/reward": 0.71}

`time` is seconds since 1970. A metric that is not finite is stored as null (strict JSON) and read
back as nan. Where names with a slash are drawn: `reporting.curves`.

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
from types import ModuleType
from typing import Any, Self

Row = dict[str, Any]
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
        workdir: str | os.PathLike[str],
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
        self._file.write(_encode(row))
        self._file.flush()
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

    def rewind(self, stage: str, step: int) -> None:
        """Drops the rows of `stage` past `step`, which a resumed run continues from."""
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

    def close(self) -> None:
        """Closes the file, the event writers and the wandb run."""
        self._file.close()
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
        for row in _read_rows(Path(path))
    ]


def _read_rows(path: Path) -> list[Row]:
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
                f"{path}, line {number} is broken ({error}): {line[:80]!r}; remove this line and "
                "try again"
            ) from error
        rows.append(row)
    return rows


def _replace_rows(path: Path, rows: list[Row]) -> None:
    """Makes the file hold exactly these rows, or leaves the old one."""
    data = b"".join(_encode(row) for row in rows)
    if path.exists() and path.read_bytes() == data:
        return
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(data)
    os.replace(beside, path)


def _encode(row: Row) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


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

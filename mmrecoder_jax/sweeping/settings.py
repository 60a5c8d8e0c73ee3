"""What the points of a sweep share, and where it is written: `sweep.json` of the work directory.

A second sweep in a work directory must share it, or its points would stand beside runs of other
settings in one table. More values of the same fields, more seeds and another metric are no other
settings. How the work is done (`HOW`) may differ between machines.
"""

import dataclasses
import fnmatch
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmrecoder_jax import cli, places
from mmrecoder_jax.checks import check_config
from mmrecoder_jax.config import (
    PUBLISHED,
    STAGES,
    ConfigError,
    check_output_dir,
    field_names,
    model_config,
)
from mmrecoder_jax.pipeline import stage_configs
from mmrecoder_jax.resume import changes
from mmrecoder_jax.sweeping.points import Point, text_of

SWEEP_FILE = "sweep.json"
DATA = "data"  # below the work directory: the charts that the points share
# Patterns of fields that say how the work is done.
HOW = ("env.workers", "mesh.*", "log.*", "train.log_every", "checkpoint.*", "alarms.*")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What all points share.

    Attributes:
      file: what `--config` names, with its size.
      config: of every point, but for its own values.
      fixed: fields that the command line sets for all points.
      fields: that are swept.
      workdir: of the sweep; a point has a directory of its name in it. It may be a view of a place
        in a bucket (`places`), to which the points write themselves.
    """

    file: str
    config: ConfigDict
    fixed: Mapping[str, Any]
    fields: tuple[str, ...]
    workdir: str

    def directory(self, point: Point) -> Path:
        """The work directory of a point."""
        return Path(self.workdir) / point.name

    def of_machine(self, point: Point) -> Path:
        """Where the machine that runs a point keeps its lock and what it says."""
        return places.of_machine(self.directory(point))

    def config_of(self, point: Point) -> ConfigDict:
        """The configuration that a point's run has."""
        return cli.with_fields(self.config, point.texts())

    def shares_data(self) -> bool:
        """Whether one directory of toy charts serves all points; in a bucket nobody could make it
        while others wait.
        """
        data = self.config.data
        return (
            self.config.stage != "pipeline"
            and data.kind == "synthetic"
            and not data.dir
            and not places.in_bucket(self.workdir)
            and not any(field.startswith(("data.", "env.")) for field in self.fields)
        )

    def flags(self, point: Point, shared_data: bool = True) -> list[str]:
        """The flags of a point's training command.

        Args:
          shared_data: whether it finds its charts in the sweep's own directory, where they may be.
        """
        fixed = [f"--config.{name}={text_of(value)}" for name, value in self.fixed.items()]
        if shared_data and self.shares_data():
            fixed.append(f"--config.data.dir={os.path.join(self.workdir, DATA)}")
        return [
            f"--config={self.file}",
            f"--workdir={places.shown(os.path.join(self.workdir, point.name))}",
            *fixed,
            *point.flags(),
        ]

    def note(self) -> dict[str, Any]:
        """What `sweep.json` holds, as plain JSON."""
        values = json.loads(self.config.to_json_best_effort())
        fields = {}
        for name in field_names(self.config):
            value: Any = values
            for part in name.split("."):
                value = value[part]
            if not isinstance(value, dict) and not _is_how(name) and name not in self.fields:
                fields[name] = value
        return {"config": self.file, "swept": sorted(self.fields), "fields": fields}


def _is_how(field: str) -> bool:
    # The sections of a pipeline's stages are below `stages.<stage>`.
    own = field.split(".", 2)[2] if field.startswith("stages.") else field
    return any(fnmatch.fnmatch(own, pattern) for pattern in HOW)


def check_points(sweep: Sweep, points: Sequence[Point]) -> None:
    """Checks every point as its run would before it starts.

    Raises:
      ConfigError: the first point that cannot run, with its values, the reason and the remedy.
    """
    folded: dict[str, Point] = {}
    for point in points:
        other = folded.setdefault(point.name.casefold(), point)
        if other is not point:  # only digests of the same beginning could do that
            raise ConfigError(
                f"two points would share the directory {point.name}: sweep them apart"
            )
        try:
            config = sweep.config_of(point)
            cli.check(config, (*STAGES, "pipeline"))
            _check_together(config)
        except ConfigError as error:
            said = " ".join(f"--sweep=config.{f}={text}" for f, text in point.texts().items())
            raise ConfigError(f"{said}: {error}") from error


def _check_together(config: ConfigDict) -> None:
    """Numbers that do not fit together, as far as they are known without the weights."""
    parts = [config]
    if config.stage == "pipeline":
        parts = list(stage_configs(config, "").values())
    if parts[0].model.preset == PUBLISHED:  # the sizes come with the weights
        return
    for part in parts:
        check_config(part, model_config(parts[0]).vision)


def check_workdir(sweep: Sweep) -> None:
    """Raises ConfigError for a work directory that holds something else than this sweep."""
    check_output_dir("--workdir", sweep.workdir)
    path = Path(sweep.workdir)
    where = f"--workdir={sweep.workdir!r}"
    saved = _read(path / SWEEP_FILE)
    if saved is None:
        held = [name for name in places.names(sweep.workdir) if name[0] != "."]
        if held:
            raise ConfigError(
                f"{where} holds {', '.join(held[:3])} and no {SWEEP_FILE}, so it is no sweep's: "
                "name a new directory"
            )
        return
    now = sweep.note()
    found = changes(saved | {"digests": {}}, now | {"digests": {}})
    if saved["swept"] != now["swept"]:
        found.insert(0, f"it sweeps {_listed(now)} (was {_listed(saved)})")
    if found:
        raise ConfigError(
            f"{where} holds a sweep with other settings: {', '.join(found)}; set them back, or use "
            "another --workdir"
        )


def _listed(note: Mapping[str, Any]) -> str:
    return " and ".join(f"config.{field}" for field in note["swept"])


def _read(path: Path) -> dict[str, Any] | None:
    """The note of an earlier sweep; None where there is none.

    Raises:
      ConfigError: it cannot be read.
    """
    if not path.is_file():
        return None
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(note["swept"], list) and isinstance(note["fields"], dict):
            return note
        problem = "it is of another kind"
    except (ValueError, KeyError, TypeError) as error:
        problem = str(error)
    raise ConfigError(f"{path} is no note of a sweep ({problem}): use another --workdir")


def write_note(sweep: Sweep) -> None:
    """Writes `sweep.json`, whole or not at all, where there is none."""
    path = Path(sweep.workdir) / SWEEP_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        beside = path.with_name(f"{SWEEP_FILE}.{os.getpid()}")
        beside.write_text(json.dumps(sweep.note(), indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
        places.put(path)

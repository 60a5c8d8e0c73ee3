"""Turns a published data set into a chart directory.

    python -m mmrecoder_jax.import_charts --kind=chart2code --path=chart2code_160k.json \
        --out=data/chart2code_160k/train
    python -m mmrecoder_jax.import_charts --kind=chartmimic --path=direct_600 \
        --out=data/chartmimic/test
    python -m mmrecoder_jax.import_charts --kind=plot2code --path=data/python_matplotlib/test \
        --out=data/plot2code/test
    python -m mmrecoder_jax.import_charts --kind=chartx --path=ChartX_annotation.json \
        --out=data/chartx/test

Every script is run in the sandbox, and the record of what it draws is kept with its chart. What
could not be read or did not draw is listed in skipped.jsonl beside the charts. Kill it at any
point; the same command resumes.
"""

import os
from collections.abc import Callable, Iterator

from absl import flags

from mmrecoder_jax.command import run_with_flags
from mmrecoder_jax.config import ConfigError, check_local_path, check_output
from mmrecoder_jax.data.benchmarks import (
    RawChart,
    Skipped,
    import_charts,
    read_chart2code,
    read_chartmimic,
    read_chartx,
    read_plot2code,
)
from mmrecoder_jax.env import EnvConfig, ExecutorPool
from mmrecoder_jax.monitoring.progress import Bar

READERS: dict[str, Callable[..., Iterator[RawChart]]] = {
    "chart2code": read_chart2code,
    "chartmimic": read_chartmimic,
    "plot2code": read_plot2code,
    "chartx": read_chartx,
}

_KIND = flags.DEFINE_enum(
    "kind", None, sorted(READERS), "Which data set's format is read.", required=True
)
_PATH = flags.DEFINE_string(
    "path", None, "The file or folder as published (docs/data.md).", required=True
)
_OUT = flags.DEFINE_string("out", None, "Chart directory to write.", required=True)
_LICENCE = flags.DEFINE_string("licence", "as published", "Noted in the directory.")
_WORKERS = flags.DEFINE_integer("workers", 2, "Executors; about one per core.", lower_bound=1)


def check_out(out: str, path: str) -> None:
    """Raises ConfigError where the directory to write is the input, or no local one."""
    check_output("--out", out)
    if os.path.exists(out) and os.path.exists(path) and os.path.samefile(out, path):
        raise ConfigError(f"--out={out} is the input itself: name a directory that is not there")


def main() -> None:
    check_local_path("--path", _PATH.value)
    check_out(_OUT.value, _PATH.value)
    bad: list[str] = []
    charts = list(READERS[_KIND.value](_PATH.value, bad=bad))
    if not charts:
        first = f": {bad[0]}" if bad else ""
        raise ConfigError(f"no chart in --path={_PATH.value} ({len(bad)} bad rows{first})")
    skipped = [Skipped(_PATH.value, message) for message in bad]
    meta = {"name": _KIND.value, "licence": _LICENCE.value, "path": _PATH.value}
    with (
        ExecutorPool(EnvConfig(workers=_WORKERS.value)) as pool,
        Bar(f"import {_KIND.value}", len(charts), unit="chart") as bar,
    ):
        written = import_charts(
            _OUT.value,
            charts,
            pool,
            meta,
            skipped=skipped,
            progress=lambda done, _: bar.advance(done - bar.done),
        )
    print(
        f"{len(written)} charts in {_OUT.value}, {len(bad)} bad rows; what was left out is in "
        "skipped.jsonl"
    )


if __name__ == "__main__":
    run_with_flags(main, "--kind=chartmimic --path=direct_600 --out=data/chartmimic/test")

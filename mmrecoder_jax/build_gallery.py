"""Gathers real example charts from the sources of matplotlib and seaborn, as a chart directory.

    python -m mmrecoder_jax.build_gallery --out=data/gallery

Source distributions come from a package index (`--index`; any mirror that speaks the JSON of PEP
691), or are read from files (`--sdists`). Every example is run in the environment; the directory
holds the charts that came through, `skipped.jsonl` with the reason for each that did not, and the
licences. Seaborn's examples are taken where seaborn is installed (extra `charts`).
"""

import collections
import json
import tempfile
import time
from pathlib import Path

from absl import flags

from mmrecoder_jax.command import run_with_flags
from mmrecoder_jax.config import ConfigError, check_local_path, check_output
from mmrecoder_jax.data import sdists
from mmrecoder_jax.data.benchmarks import import_charts
from mmrecoder_jax.data.sources import ChartDirectory
from mmrecoder_jax.env import EnvConfig, ExecutorPool
from mmrecoder_jax.monitoring.progress import Bar

_OUT = flags.DEFINE_string(
    "out", "data/gallery", "The chart directory to write; must not be there yet."
)
_CACHE = flags.DEFINE_string(
    "cache", "data/sdists", "Where downloaded source distributions are kept."
)
_INDEX = flags.DEFINE_string("index", sdists.INDEX, "The package index.")
_SDISTS = flags.DEFINE_list(
    "sdists", [], "Source distributions that are here already; nothing is downloaded for them."
)
_WORKERS = flags.DEFINE_integer("workers", 2, "Executors.", lower_bound=1)
_SAMPLE = flags.DEFINE_integer(
    "sample", 0, "Look at so many examples only, evenly spread; 0 is all.", lower_bound=0
)


def report(charts: ChartDirectory, seconds: float) -> None:
    """Prints how many came through, from where, and why the others did not."""
    sources = collections.Counter(chart.source.split("/")[0] for chart in charts)
    parts = ", ".join(f"{n} {name}" for name, n in sources.items())
    print(f"{len(charts)} charts in {charts.directory} ({parts}), {seconds:.0f} s")
    skipped = charts.directory / "skipped.jsonl"
    lines = skipped.read_text().splitlines()
    print(f"{len(lines)} left out, each with its reason in {skipped}:")
    reasons = collections.Counter(
        json.loads(line)["reason"].split(":")[0].partition(" as ")[0] for line in lines
    )
    for reason, count in reasons.most_common():
        print(f"  {count:5d}  {reason}")


def given_sdists(paths: list[str]) -> dict[str, Path]:
    """The source distributions that are here, by name; raises ConfigError for others."""
    known = [f"{library.root}.tar.gz" for library in sdists.LIBRARIES]
    for path in paths:
        check_local_path("--sdists", path)
        if Path(path).name not in known:
            raise ConfigError(f"--sdists={path}: no charts are taken of it; use {', '.join(known)}")
        if not Path(path).is_file():
            raise ConfigError(f"--sdists={path}: no such file")
    return {Path(path).name: Path(path) for path in paths}


def main() -> None:
    started = time.monotonic()
    check_output("--out", _OUT.value)
    check_local_path("--cache", _CACHE.value)
    out = Path(_OUT.value)
    if out.exists():
        raise ConfigError(f"{out} is there already; remove it to build it anew")
    given = given_sdists(_SDISTS.value or [])
    # Some examples are slow, and none is hostile.
    env = EnvConfig(workers=_WORKERS.value, wall_seconds=60, cpu_seconds=40)
    with tempfile.TemporaryDirectory() as directory, ExecutorPool(env) as pool:
        raws, skipped, licences = sdists.collect(
            Path(directory), Path(_CACHE.value), _INDEX.value, given
        )
        meta = {
            "name": "gallery",
            "licence": "that of each chart's library, see LICENSE.*",
            "sample": _SAMPLE.value,
        }
        raws = sdists.evenly(raws, _SAMPLE.value)
        with Bar("examples", len(raws), unit="example") as bar:
            charts = import_charts(
                out,
                raws,
                pool,
                meta,
                skipped,
                licences,
                curate=True,
                progress=lambda done, _: bar.advance(done - bar.done),
            )
    report(charts, time.monotonic() - started)


if __name__ == "__main__":
    run_with_flags(main, "--out=data/gallery")

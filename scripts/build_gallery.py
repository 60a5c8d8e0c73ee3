"""Gathers real example charts from the sources of matplotlib and seaborn, as a chart directory.

    python scripts/build_gallery.py --out=data/gallery

Source distributions come from a package index (`--index`; any mirror that speaks the JSON of PEP 691), are checked against the index's
SHA-256 and kept in `--cache`; nothing is built or installed. With `--sdists` they are read from files instead. Every example is run in
the environment; the directory holds the charts that came through, `skipped.jsonl` with the reason for each that did not, and the
licences. Seaborn's examples are taken where seaborn is installed (extra `charts`).
"""

import collections
import dataclasses
import hashlib
import importlib.util
import json
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from absl import app, flags

from mmrecoder_jax.data.benchmarks import RawChart, Skipped, import_charts
from mmrecoder_jax.data.gallery import gallery_charts
from mmrecoder_jax.data.sources import ChartDirectory
from mmrecoder_jax.env import EnvConfig, ExecutorPool

_OUT = flags.DEFINE_string("out", "data/gallery", "The chart directory to write; must not be there yet.")
_CACHE = flags.DEFINE_string("cache", "data/sdists", "Where downloaded source distributions are kept.")
_INDEX = flags.DEFINE_string("index", "https://pypi.org/simple", "The package index.")
_SDISTS = flags.DEFINE_list("sdists", [], "Source distributions that lie here already; nothing is downloaded for them.")
_WORKERS = flags.DEFINE_integer("workers", 2, "Executors.", lower_bound=1)
_LIMIT = flags.DEFINE_integer("limit", None, "Look at the first so many examples of each library only.", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Library:
    """A source distribution, the folders in it that hold examples, and its licence."""

    name: str
    version: str
    folders: tuple[str, ...]
    licence: str
    licence_files: tuple[str, ...]

    @property
    def root(self) -> str:
        return f"{self.name}-{self.version}"


LIBRARIES = (
    Library(
        "matplotlib",
        "3.8.4",
        ("galleries/examples", "galleries/plot_types", "galleries/tutorials", "galleries/users_explain"),
        "Matplotlib licence (PSF-based)",
        ("LICENSE/LICENSE",),
    ),
    Library("seaborn", "0.13.2", ("examples",), "BSD-3-Clause", ("LICENSE.md",)),
)


def fetch_sdist(library: Library, index: str, cache: Path) -> Path:
    """The library's source distribution, downloaded into `cache` unless it is there.

    Raises SystemExit with what to do where the index cannot be reached or does not have it; ValueError for a file that is not the one
    the index announced.
    """
    path = cache / f"{library.root}.tar.gz"
    if path.is_file():
        return path
    url = f"{index.rstrip('/')}/{library.name}/"
    try:
        request = urllib.request.Request(url, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            files = {file["filename"]: file for file in json.load(reply)["files"]}
        entry = files[path.name]
        with urllib.request.urlopen(urllib.request.Request(urllib.parse.urljoin(url, entry["url"])), timeout=300) as reply:
            content = reply.read()
    except (urllib.error.URLError, TimeoutError, KeyError, ValueError) as error:
        raise SystemExit(f"cannot get {path.name} from {url}: {error!r}; download it elsewhere and pass --sdists={path.name}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry["hashes"]["sha256"]:
        raise ValueError(f"{path.name} has SHA-256 {digest}, the index says {entry['hashes']['sha256']}")
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
    return path


def unpack(sdist: Path, library: Library, directory: Path) -> dict[str, str]:
    """Unpacks the examples below `directory`; returns the licence texts by the name they get in the chart directory."""
    licences = {}
    with tarfile.open(sdist) as archive:
        for member in archive:
            name = member.name.removeprefix(f"{library.root}/")
            if name in library.licence_files:
                licences[f"LICENSE.{library.name}"] = archive.extractfile(member).read().decode()
            elif name.endswith(".py") and any(name.startswith(f"{folder}/") for folder in library.folders):
                archive.extract(member, directory, filter="data")
    if len(licences) != len(library.licence_files):
        raise ValueError(f"{sdist} does not hold {', '.join(library.licence_files)}: is it the source of {library.root}?")
    return licences


def collect(libraries: tuple[Library, ...], sdists: dict[str, Path], directory: Path, limit: int | None):
    """Raw charts, what was left out, and licences, of all libraries that are installed."""
    raws, skipped, licences = [], [], {}
    for library in libraries:
        if importlib.util.find_spec(library.name) is None:
            print(f"{library.name} is not installed: its examples are left out (pip install 'mmrecoder_jax[charts]')")
            continue
        sdist = sdists.get(f"{library.root}.tar.gz") or fetch_sdist(library, _INDEX.value, Path(_CACHE.value))
        licences |= unpack(sdist, library, directory)
        found = []
        for folder in library.folders:
            found.extend(gallery_charts(directory / library.root / folder, f"{library.root}/{folder}", library.licence))
        found = found[:limit]
        raws += [item for item in found if isinstance(item, RawChart)]
        skipped += [item for item in found if isinstance(item, Skipped)]
    return raws, skipped, licences


def report(charts: ChartDirectory, seconds: float):
    """Prints how many came through, from where, and why the others did not."""
    sources = collections.Counter(charts[i].source.split("/")[0] for i in range(len(charts)))
    lines = (charts.directory / "skipped.jsonl").read_text().splitlines()
    reasons = collections.Counter(json.loads(line)["reason"].split(":")[0].partition(" as ")[0] for line in lines)
    print(f"{len(charts)} charts in {charts.directory} ({', '.join(f'{n} {name}' for name, n in sources.items())}), {seconds:.0f} s")
    print(f"{len(lines)} left out, each with its reason in {charts.directory / 'skipped.jsonl'}:")
    for reason, count in reasons.most_common():
        print(f"  {count:5d}  {reason}")


def main(argv: list[str]):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    started = time.monotonic()
    out = Path(_OUT.value)
    if out.exists():
        raise SystemExit(f"{out} is there already; remove it to build it anew")
    sdists = {Path(path).name: Path(path) for path in _SDISTS.value}

    def progress(done: int, total: int):
        if done % 25 == 0 or done == total:
            seconds = time.monotonic() - started
            print(f"{done}/{total} examples, {seconds:.0f} s, about {seconds / done * (total - done):.0f} s to go", flush=True)

    env = EnvConfig(workers=_WORKERS.value, wall_seconds=60, cpu_seconds=40)  # some examples are slow, and none is hostile
    with tempfile.TemporaryDirectory() as directory, ExecutorPool(env) as pool:
        raws, skipped, licences = collect(LIBRARIES, sdists, Path(directory), _LIMIT.value)
        meta = {"name": "gallery", "licence": "that of each chart's library, see LICENSE.*", "limit": _LIMIT.value}
        charts = import_charts(out, raws, pool, meta, skipped, licences, curate=True, progress=progress)
    report(charts, time.monotonic() - started)


if __name__ == "__main__":
    app.run(main)

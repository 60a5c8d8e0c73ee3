"""Example scripts from the source distributions of matplotlib and seaborn, as they come from a
package index.

Files come from the index's JSON (PEP 691), are checked against its SHA-256 and kept in a folder;
nothing is built or installed.
"""

import dataclasses
import hashlib
import importlib.util
import json
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from mmrecoder_jax.data.benchmarks import RawChart, Skipped
from mmrecoder_jax.data.gallery import gallery_charts

INDEX = "https://pypi.org/simple"


class NotFetched(OSError):
    """A source distribution that cannot be had; the message says from where, why, and what to
    do.
    """


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
        (
            "galleries/examples",
            "galleries/plot_types",
            "galleries/tutorials",
            "galleries/users_explain",
        ),
        "Matplotlib licence (PSF-based)",
        ("LICENSE/LICENSE",),
    ),
    Library("seaborn", "0.13.2", ("examples",), "BSD-3-Clause", ("LICENSE.md",)),
)


def fetch_sdist(library: Library, index: str, cache: Path) -> Path:
    """The library's source distribution, downloaded into `cache` unless it is there.

    Raises NotFetched where the index cannot be reached or does not have it; ValueError for a file
    that is not the one announced.
    """
    path = cache / f"{library.root}.tar.gz"
    if path.is_file():
        return path
    url = f"{index.rstrip('/')}/{library.name}/"
    try:
        request = urllib.request.Request(
            url, headers={"Accept": "application/vnd.pypi.simple.v1+json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            files = {file["filename"]: file for file in json.load(reply)["files"]}
        entry = files[path.name]
        with urllib.request.urlopen(
            urllib.request.Request(urllib.parse.urljoin(url, entry["url"])), timeout=300
        ) as reply:
            content = reply.read()
    except (OSError, KeyError, ValueError) as error:
        raise NotFetched(
            f"cannot get {path.name} from {url}: {error!r}; download it elsewhere and pass --sdists={path.name}"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry["hashes"]["sha256"]:
        raise ValueError(
            f"{path.name} has SHA-256 {digest}, the index says {entry['hashes']['sha256']}"
        )
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
    return path


def unpack(sdist: Path, library: Library, directory: Path) -> dict[str, str]:
    """Unpacks the examples below `directory`; returns the licence texts by the name they get in the
    chart directory.
    """
    licences = {}
    with tarfile.open(sdist) as archive:
        for member in archive:
            name = member.name.removeprefix(f"{library.root}/")
            if name in library.licence_files:
                licences[f"LICENSE.{library.name}"] = archive.extractfile(member).read().decode()
            elif name.endswith(".py") and any(
                name.startswith(f"{folder}/") for folder in library.folders
            ):
                archive.extract(member, directory, filter="data")
    if len(licences) != len(library.licence_files):
        raise ValueError(
            f"{sdist} does not hold {', '.join(library.licence_files)}: is it the source of {library.root}?"
        )
    return licences


def collect(
    directory: Path,
    cache: Path,
    index: str = INDEX,
    sdists: Mapping[str, Path] | None = None,
    say: Callable[[str], None] = print,
) -> tuple[list[RawChart], list[Skipped], dict[str, str]]:
    """Raw charts, what was left out, and licences (by file name), of all libraries that are
    installed.

    Args:
      directory: where the examples are unpacked.
      cache: where downloads are kept.
      sdists: source distributions that lie here already, by file name.
      say: told of a library that is not installed.
    """
    raws, skipped, licences = [], [], {}
    for library in LIBRARIES:
        if importlib.util.find_spec(library.name) is None:
            say(
                f"{library.name} is not installed: its examples are left out (pip install 'mmrecoder_jax[charts]')"
            )
            continue
        sdist = (sdists or {}).get(f"{library.root}.tar.gz") or fetch_sdist(library, index, cache)
        licences |= unpack(sdist, library, directory)
        for folder in library.folders:
            for item in gallery_charts(
                directory / library.root / folder, f"{library.root}/{folder}", library.licence
            ):
                (raws if isinstance(item, RawChart) else skipped).append(item)
    return raws, skipped, licences


def evenly(items: list, count: int) -> list:
    """`count` of the items, evenly spread (neighbours come from one file); all of them where there
    are no more, or for 0.
    """
    if not count or count >= len(items):
        return items
    return [items[i * len(items) // count] for i in range(count)]

"""Example scripts from the source distributions of matplotlib and seaborn.

Files come from a package index by its JSON (PEP 691), are checked against its SHA-256 and kept in a
folder; nothing is built or installed.
"""

import dataclasses
import hashlib
import importlib.util
import json
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from mmrecoder_jax.data.benchmarks import RawChart, Skipped
from mmrecoder_jax.data.gallery import gallery_charts

INDEX = "https://pypi.org/simple"

Item = TypeVar("Item")


class NotFetched(OSError):
    """A source distribution that cannot be had; the message says from where, why and the remedy."""


@dataclasses.dataclass(frozen=True)
class Library:
    """A source distribution, the folders in it that hold examples, and its licence."""

    name: str
    version: str
    folders: tuple[str, ...]
    licence: str
    licence_file: str

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
        "LICENSE/LICENSE",
    ),
    Library("seaborn", "0.13.2", ("examples",), "BSD-3-Clause", "LICENSE.md"),
)


def fetch_sdist(library: Library, index: str, cache: Path) -> Path:
    """The library's source distribution, downloaded into `cache` unless it is there.

    Raises:
      NotFetched: the index cannot be reached, does not have it, or hands out another file than the
        one that it announces.
    """
    path = cache / f"{library.root}.tar.gz"
    if path.is_file():
        return path
    url = f"{index.rstrip('/')}/{library.name}/"
    request = urllib.request.Request(url, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            files = {file["filename"]: file for file in json.load(reply)["files"]}
        entry = files[path.name]
        address = urllib.parse.urljoin(url, entry["url"])  # an index may give relative ones
        with urllib.request.urlopen(address, timeout=300) as reply:
            content = reply.read()
    except (OSError, KeyError, ValueError) as error:
        raise NotFetched(
            f"cannot get {path.name} from {url}: {error!r}; download it elsewhere and pass "
            f"--sdists={path.name}"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    # The code is run, if in a sandbox: a mirror must not hand out something else.
    if digest != entry["hashes"]["sha256"]:
        raise NotFetched(
            f"{path.name} has SHA-256 {digest}, {url} says {entry['hashes']['sha256']}: do not "
            "use it; take another index"
        )
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")  # a file of that name is whole, so it is not fetched again
    temporary.write_bytes(content)
    temporary.replace(path)
    return path


def unpack(sdist: Path, library: Library, directory: Path) -> dict[str, str]:
    """Unpacks the examples below `directory`.

    Returns:
      {file name in the chart directory: text} of the library's licence.

    Raises:
      NotFetched: it is no archive, or there is no licence in it, so it is something else.
    """
    licences = {}
    folders = tuple(f"{folder}/" for folder in library.folders)
    try:
        with tarfile.open(sdist) as archive:
            for member in archive:
                name = member.name.removeprefix(f"{library.root}/")
                if name == library.licence_file:
                    file = archive.extractfile(member)
                    assert file is not None, "a licence is a file"
                    licences[f"LICENSE.{library.name}"] = file.read().decode()
                elif name.endswith(".py") and name.startswith(folders):
                    # The filter refuses what would leave the directory.
                    archive.extract(member, directory, filter="data")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise NotFetched(f"{sdist} is no whole archive ({error}): download it again") from error
    if not licences:
        raise NotFetched(
            f"{sdist} does not hold {library.licence_file}: is it the source of {library.root}?"
        )
    return licences


def collect(
    directory: Path,
    cache: Path,
    index: str = INDEX,
    sdists: Mapping[str, Path] | None = None,
    say: Callable[[str], None] = print,
) -> tuple[list[RawChart], list[Skipped], dict[str, str]]:
    """The examples of all libraries that are installed, so that their code can run.

    Args:
      directory: where the examples are unpacked.
      cache: where downloads are kept.
      sdists: source distributions that are here already, by file name.
      say: told of a library that is not installed.

    Returns:
      Raw charts, what was left out, and licences by file name.
    """
    raws: list[RawChart] = []
    skipped: list[Skipped] = []
    licences: dict[str, str] = {}
    for library in LIBRARIES:
        if importlib.util.find_spec(library.name) is None:
            say(
                f"{library.name} is not installed: its examples are left out "
                "(pip install 'mmrecoder_jax[charts]')"
            )
            continue
        sdist = (sdists or {}).get(f"{library.root}.tar.gz") or fetch_sdist(library, index, cache)
        licences |= unpack(sdist, library, directory)
        for folder in library.folders:
            root, label = directory / library.root / folder, f"{library.root}/{folder}"
            for item in gallery_charts(root, label, library.licence):
                if isinstance(item, RawChart):
                    raws.append(item)
                else:
                    skipped.append(item)
    return raws, skipped, licences


def evenly(items: list[Item], count: int) -> list[Item]:
    """`count` of the items, evenly spread, because neighbours come from one file.

    All of them where there are no more, or for 0.

    >>> evenly([0, 1, 2, 3, 4, 5], 3)
    [0, 2, 4]
    """
    if not count or count >= len(items):
        return items
    return [items[i * len(items) // count] for i in range(count)]

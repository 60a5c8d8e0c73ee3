"""Places in buckets: a folder on this machine stands for an address `gs://BUCKET/PATH`.

    gs://bucket/stage2/metrics.jsonl        <-> ~/.cache/mmrecoder_jax/<digest>/stage2/metrics.jsonl
    gs://bucket/stage2/metrics.jsonl.parts/000000065536    bytes of it from there on, until it is
                                                           written whole again
    gs://bucket/stage2/trajectories/...     <-> the same below the folder
    gs://bucket/stage2/checkpoints/...      has no files here: orbax writes and reads the bucket

Whoever works with directories works in the folder (`local`), which is filled from the bucket when
it is opened: the bucket is the truth, what a killed process left here is replaced by it. `push`
writes what has changed since. A directory that the bucket does not have yet is marked while it is
written (`.uploading`), and one that is marked is no directory: so what appears whole here appears
whole there. Of a source (`init_from`) that is a work directory only what a stage starts from is
fetched. `shown` puts addresses in the place of folders, in what people read and in saved settings.

The libraries are an extra of this package (`gcs`); without an address nothing of them is loaded.
"""

import base64
import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import logging
import os
import re
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from etils import epath

SCHEME = "gs://"
CHECKPOINTS = "checkpoints"
COMMIT = "commit_success.txt"  # the last file of a checkpoint that orbax writes to a bucket
REACH_SECONDS = 20.0
HOME = "MMRECODER_CACHE"  # variable: where the folders are
_FORM = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])((?:/[^/\0\r\n]+)*)/?")
_LOCAL_ONLY = (CHECKPOINTS, "served", "lengths", ".jax_cache")  # folders that are not copied
_STARTS_FROM = re.compile(  # of a work directory
    r"(config|model|evaluation)\.json|metrics\.jsonl(\.parts/\d+)?|tokenizer/.*"
)
_MARK = ".uploading"
_PART = re.compile(r"(.*)\.parts/(\d{12})")
_PART_BYTES = 1 << 16  # shorter files are written whole
_MOST_PARTS = 64
_APPENDED = (".jsonl",)


class BucketError(OSError):
    """A bucket that cannot be used; the message has the address and the remedy."""


# ---------------------------------------------------------------- addresses


def is_address(path: str) -> bool:
    """Whether a path names a place in a bucket."""
    return path.startswith(SCHEME)


def check(name: str, address: str) -> None:
    """Raises BucketError for an address that names no folder in a bucket, and where the packages
    that read buckets are missing. Asks nobody.

    Args:
      name: the flag or field that the address is from.
    """
    found = _FORM.fullmatch(address)
    if not found or not found[2] or {".", ".."} & set(found[2].split("/")):
        raise BucketError(f"{name}={address!r}: name a folder in a bucket: gs://BUCKET/PATH")
    missing = [package for package in ("gcsfs", "google.cloud.storage") if not _installed(package)]
    if missing:
        raise BucketError(
            f"{name}={address!r}: what reads buckets is not installed ({', '.join(missing)}): pip "
            "install 'mmrecoder_jax[gcs]', or mount the bucket as a folder and give that (gcsfuse)"
        )


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


def reach(address: str) -> None:
    """Writes, reads and removes a small object at an address.

    Raises:
      BucketError: one of these cannot be done; within `REACH_SECONDS`.
    """
    path, data = f"{_plain(address)}/.probe-{uuid.uuid4().hex[:8]}", uuid.uuid4().bytes
    with _talking(address):
        _ask("_pipe_file", path, data, seconds=REACH_SECONDS)
        found = _ask("_cat_file", path, seconds=REACH_SECONDS)
        _ask("_rm_file", path, seconds=REACH_SECONDS)
    if found != data:
        raise BucketError(f"{address}: an object reads otherwise than it was written")


# ---------------------------------------------------------------- folders that stand for addresses


def local(path: str, host: int | None = None) -> str:
    """The folder that stands for an address, filled from the bucket; any other path as it is.

    Args:
      path: may be of a source with the name of a checkpoint behind it, `gs://BUCKET/DIR@best`.
      host: the number of this process, where it writes to the folder; None: it only reads.

    Raises:
      BucketError: the bucket cannot be read, or a source is not there; another process of this
        machine writes to that folder.
    """
    if not is_address(path):
        return path
    path = path.rstrip("/")
    workdir, at, step = path.rpartition("@")
    if host is None and at and "/" not in step and not _below(path) and _below(workdir):
        return f"{local(workdir)}@{step}"
    for copy in _copies:
        if copy.address == path and copy.host == host:
            return str(copy.folder)
    copy = _Copy(path, host)
    done = False
    try:
        copy.fill()
        done = True
    finally:
        if host is None or not done:
            copy.unlock()
    _copies.append(copy)
    return str(copy.folder)


def shown(text: str) -> str:
    """A text with addresses in the place of the folders that stand for them."""
    for copy in _copies:
        text = text.replace(str(copy.folder), copy.address)
    return text


def push(path: str, wait: bool = True) -> None:
    """Writes what has changed below the folder of a work directory to its bucket; does nothing for
    any other directory.

    Args:
      path: the work directory, or a directory in it.
      wait: whether all is in the bucket on return. Otherwise a thread writes it, and what cannot be
        written is left to the next time.

    Raises:
      BucketError: something cannot be written.
    """
    copy = _copy_of(path)
    if copy is None or copy.host is None:
        return
    if wait:
        copy.push()
    else:
        copy.push_soon()


def refill(path: str) -> None:
    """Reads what other hosts have written to the bucket of a work directory; does nothing for any
    other directory.
    """
    copy = _copy_of(path)
    if copy is not None and copy.host is not None:
        copy.push()
        copy.fill()


@contextlib.contextmanager
def pushed(path: str) -> Iterator[None]:
    """Around what works in a directory: at its end all is in the bucket, in whole files.

    Raises:
      BucketError: something cannot be written; but another error that ends the work is not hidden.
    """
    copy = _copy_of(path)
    try:
        yield
    except BaseException:
        if copy is not None and copy.host is not None:
            with contextlib.suppress(BucketError):
                copy.push(whole=True)
        raise
    if copy is not None and copy.host is not None:
        copy.push(whole=True)


# ---------------------------------------------------------------- checkpoints


def checkpoints(workdir: str) -> epath.Path:
    """Where the checkpoints of a work directory are: below its folder, or in the bucket."""
    copy, path = _copy_of(workdir), os.path.abspath(workdir)
    if copy is None:
        return epath.Path(path) / CHECKPOINTS
    below = os.path.relpath(path, copy.folder)
    return epath.Path(f"{copy.address}/{'' if below == '.' else below + '/'}{CHECKPOINTS}")


def has_checkpoints(workdir: str) -> bool:
    """Whether there is a directory of checkpoints, with or without any in it."""
    if _copy_of(workdir) is None:
        return os.path.isdir(os.path.join(workdir, CHECKPOINTS))
    path = checkpoints(workdir)
    with _talking(str(path)):
        return bool(path.exists())


def steps(workdir: str) -> list[int]:
    """The steps of the complete checkpoints of a work directory, oldest first.

    orbax gives an unfinished one another name on a disk; in a bucket it lacks the file `COMMIT`.
    """
    path = checkpoints(workdir)
    with _talking(str(path)):
        if not path.exists():
            return []
        found = [each for each in path.iterdir() if each.name.isdigit()]
        if is_address(str(path)):
            found = [each for each in found if (each / COMMIT).exists()]
        return sorted(int(each.name) for each in found)


def rename_checkpoint(path: epath.Path, target: epath.Path) -> None:
    """Gives a checkpoint another name; in a bucket it is no checkpoint from the first moment on."""
    if not is_address(str(path)):
        path.rename(target)
        return
    with _talking(str(path)):
        (path / COMMIT).unlink(missing_ok=True)
        for name, _ in files(path):
            _ask("_cp_file", _plain(str(path / name)), _plain(str(target / name)))
        (target / COMMIT).write_text("set aside")
        path.rmtree()


def remove_checkpoints(workdir: str) -> None:
    """Removes the checkpoints of a work directory where they are in a bucket."""
    path = checkpoints(workdir)
    if is_address(str(path)):
        with _talking(str(path)):
            for name, _ in files(path):
                _ask("_rm_file", _plain(str(path / name)))


def files(root: epath.Path | Path) -> list[tuple[str, int]]:
    """(name below it, bytes) of every file below a directory, in the order of its paths."""
    if is_address(str(root)):
        found = {name: entry["size"] for name, entry in _below(str(root)).items()}
    else:
        paths = [path for path in Path(root).rglob("*") if path.is_file()]
        found = {path.relative_to(root).as_posix(): path.stat().st_size for path in paths}
    return sorted(found.items(), key=lambda item: PurePosixPath(item[0]))


# ---------------------------------------------------------------- a copy


Stat = tuple[int, int, int]  # bytes, time of the last change in ns, inode


class _Copy:
    """A folder that stands for an address.

    Attributes:
      address: without a slash at its end.
      host: the number of the process that writes to it; None for a source.
      folder: on this machine.
    """

    def __init__(self, address: str, host: int | None):
        self.address, self.host = address, host
        role = "source" if host is None else f"host{host}"
        digest = hashlib.sha256(address.encode()).hexdigest()[:12]
        self.folder = home() / f"{digest}-{role}" / address.rpartition("/")[2]
        self._known: dict[str, Stat] = {}  # what the bucket holds
        self._parts: dict[str, list[str]] = {}  # of files that are there in parts, their objects
        self._pushing = threading.Lock()
        self._beside = ThreadPoolExecutor(1, "bucket")
        self._soon: Future[None] | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._locked = self._lock()

    def _lock(self) -> int:
        """The descriptor of a file that is locked as long as it is open: who writes, writes alone,
        and who fetches a source waits for another one that does.
        """
        descriptor = os.open(self.folder.parent / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if self.host is None else fcntl.LOCK_NB))
        except BlockingIOError as error:
            os.close(descriptor)
            raise BucketError(
                f"{self.address}: another process of this machine works there: end it first"
            ) from error
        return descriptor

    def unlock(self) -> None:
        """Lets another process write there."""
        os.close(self._locked)

    def fill(self) -> None:
        """Makes the folder hold what the bucket holds."""
        found = _below(self.address)
        if not found and self.host is None:
            raise BucketError(f"{self.address}: there is nothing in the bucket; check the path")
        marked = [f"{PurePosixPath(name).parent}/" for name in found if _is_mark(name)]
        if self.host is not None and marked:
            broken = [name for name in found if name.startswith(tuple(marked))]
            self._remove(broken)
            found = {name: entry for name, entry in found.items() if name not in broken}
        elif marked:
            raise BucketError(f"{self.address}/{marked[0]} is being written, or half of it is")
        if self.host is None and any(name.startswith(f"{CHECKPOINTS}/") for name in found):
            found = {name: found[name] for name in found if _STARTS_FROM.fullmatch(name)}
        found = {name: entry for name, entry in found.items() if not _stays_away(name)}
        self._parts = {}
        for name in sorted(found):
            if match := _PART.fullmatch(name):
                self._parts.setdefault(match[1], []).append(name)
        wanted = {name: entry for name, entry in found.items() if not _PART.fullmatch(name)}
        for name in set(self._walk()) - set(wanted):
            (self.folder / name).unlink()
        self._fetch({name: e for name, e in wanted.items() if not self._is_same(name, e)})
        self._known = {name: stat for name, stat in self._walk().items() if name in wanted}
        for name, parts in self._parts.items():
            self._append(name, parts)
            self._known.pop(name, None)

    def _is_same(self, name: str, entry: dict[str, Any]) -> bool:
        """Whether a file here is an object: by its time, which a fetched file has, or MD5."""
        try:
            stat = (self.folder / name).stat()
        except OSError:
            return False
        if stat.st_size != entry["size"] or name in self._parts:
            return False
        if stat.st_mtime_ns == _time(entry):
            return True
        with open(self.folder / name, "rb") as file:
            digest = hashlib.file_digest(file, "md5").digest()
        return base64.b64encode(digest).decode() == entry.get("md5Hash")

    def _fetch(self, wanted: dict[str, dict[str, Any]]) -> None:
        """Copies objects to files; each appears whole or not at all."""
        total = sum(entry["size"] for entry in wanted.values())
        done, told = 0, 0
        for names in _batches(sorted(wanted)):
            places = [self.folder / name for name in names]
            for place in places:
                place.parent.mkdir(parents=True, exist_ok=True)
            fetched = [f"{place}.fetched.tmp" for place in places]
            with _talking(self.address):
                _ask("_get", [self._plain(name) for name in names], fetched)
            for name, temporary, place in zip(names, fetched, places, strict=True):
                size = os.path.getsize(temporary)
                if size != wanted[name]["size"]:
                    raise BucketError(f"{self.address}/{name}: {size} bytes came: try again")
                os.utime(temporary, ns=(_time(wanted[name]),) * 2)
                os.replace(temporary, place)
                done += size
            if total > 1 << 28 and done - told > total / 20:  # of a small copy nothing is said
                told = done
                print(f"{self.address}: {done / 2**30:.1f} of {total / 2**30:.1f} GiB", flush=True)

    def _append(self, name: str, parts: list[str]) -> None:
        """Puts the parts of a file behind it, as far as they follow one another."""
        with _talking(self.address), open(self.folder / name, "ab") as file:
            for part in parts:
                if int(part[-12:]) == file.tell():
                    file.write(_ask("_cat_file", self._plain(part)))

    def push_soon(self) -> None:
        """`push` beside what runs; nothing where one is under way."""
        if self._soon is None or self._soon.done():
            self._soon = self._beside.submit(self._try_to_push)

    def _try_to_push(self) -> None:
        with contextlib.suppress(BucketError):
            self.push()

    def push(self, whole: bool = False) -> None:
        """Makes the bucket hold what the folder holds.

        Args:
          whole: leaves no file in parts.
        """
        with self._pushing, _talking(self.address):
            now = self._walk()
            changed = [name for name, stat in now.items() if self._known.get(name) != stat]
            if whole:
                changed += [name for name in self._parts if name in now and name not in changed]
            ends = [name for name in changed if not whole and self._grows(name, now[name])]
            gone = [name for name in self._known if name not in now]
            new = _topmost(changed, self._known)
            for names in _batches(new):
                marks = {self._plain(f"{name}/{_MARK}"): b"" for name in names}
                _ask("_pipe", marks)
            for names in _batches([name for name in changed if name not in ends]):
                self._put(names, now)
            for name in ends:
                self._put_end(name, now)
            self._remove([f"{name}/{_MARK}" for name in new])
            self._remove([*gone, *(part for name in gone for part in self._parts.pop(name, []))])
            for name in gone:
                del self._known[name]

    def _grows(self, name: str, stat: Stat) -> bool:
        """Whether a file has only become longer, and is so long that its end is written alone."""
        before = self._known.get(name)
        return (
            before is not None
            and name.endswith(_APPENDED)
            and before[2] == stat[2]
            and stat[0] > before[0] >= _PART_BYTES
            and len(self._parts.get(name, [])) < _MOST_PARTS
        )

    def _put(self, names: list[str], now: dict[str, Stat]) -> None:
        """Writes files as a whole, and then removes their parts."""
        contents = {}
        for name in names:
            # What is behind the size that was seen may be half a row.
            with contextlib.suppress(FileNotFoundError), open(self.folder / name, "rb") as file:
                contents[name] = file.read(now[name][0])
        _ask("_pipe", {self._plain(name): data for name, data in contents.items()})
        for name in contents:
            self._remove(self._parts.pop(name, []))
            self._known[name] = now[name]

    def _put_end(self, name: str, now: dict[str, Stat]) -> None:
        """Writes what has been appended to a file as an object of its own."""
        begin, end = self._known[name][0], now[name][0]
        with open(self.folder / name, "rb") as file:
            file.seek(begin)
            data = file.read(end - begin)
        part = f"{name}.parts/{begin:012d}"
        _ask("_pipe_file", self._plain(part), data)
        self._parts.setdefault(name, []).append(part)
        self._known[name] = now[name]

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError), _talking(self.address):
                _ask("_rm_file", self._plain(name))

    def _plain(self, name: str) -> str:
        return f"{_plain(self.address)}/{name}"

    def _walk(self) -> dict[str, Stat]:
        """What of the folder is copied."""
        found = {}
        for top, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if name not in _LOCAL_ONLY]
            below = os.path.relpath(top, self.folder)
            for name in names:
                if name.endswith(".tmp"):
                    continue
                with contextlib.suppress(FileNotFoundError):  # it has just been removed
                    stat = os.stat(os.path.join(top, name))
                    path = name if below == "." else f"{below}/{name}"
                    found[path] = stat.st_size, stat.st_mtime_ns, stat.st_ino
        return found


_copies: list[_Copy] = []


def home() -> Path:
    """The directory of the folders that stand for addresses."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get(HOME) or os.path.join(cache, "mmrecoder_jax")).absolute()


def _copy_of(path: str) -> _Copy | None:
    path = os.path.abspath(path)
    for copy in _copies:
        if path == str(copy.folder) or path.startswith(f"{copy.folder}{os.sep}"):
            return copy
    return None


def _is_mark(name: str) -> bool:
    return PurePosixPath(name).name == _MARK


def _stays_away(name: str) -> bool:
    return not set(_LOCAL_ONLY).isdisjoint(PurePosixPath(name).parts[:-1])


def _topmost(changed: list[str], known: Iterable[str]) -> list[str]:
    """The directories of changed files that no known file is in, without those inside another."""
    old = {str(parent) for name in known for parent in PurePosixPath(name).parents} | {"."}
    new = set()
    for name in changed:
        outer = [str(each) for each in PurePosixPath(name).parents if str(each) not in old]
        new.update(outer[-1:])
    return sorted(new)


def _batches(names: list[str], size: int = 64) -> Iterator[list[str]]:
    for start in range(0, len(names), size):
        yield names[start : start + size]


def _time(entry: dict[str, Any]) -> int:
    """When an object was last changed, in ns since 1970."""
    return round(entry["mtime"].timestamp() * 1e6) * 1000


# ---------------------------------------------------------------- the bucket itself


def _below(address: str) -> dict[str, dict[str, Any]]:
    """The objects below an address, by their names below it."""
    root = _plain(address) + "/"
    with _talking(address):
        found = _ask("_find", root, detail=True, update_cache=False, seconds=REACH_SECONDS * 3)
    return {
        path.removeprefix(root): entry
        for path, entry in found.items()
        if path.startswith(root) and not path.endswith("/")
    }


def _plain(address: str) -> str:
    return address.removeprefix(SCHEME).rstrip("/")


@functools.cache
def _bucket_files() -> Any:
    """The one client; listings are never remembered, since others write too."""
    # Otherwise it asks over gRPC of which kind a bucket is, a minute where nothing answers.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)  # it logs what it raises
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs")


def _ask(method: str, *args: Any, seconds: float | None = None, **kwargs: Any) -> Any:
    from fsspec import asyn

    client = _bucket_files()
    return asyn.sync(client.loop, getattr(client, method), *args, timeout=seconds, **kwargs)


def errors() -> tuple[type[Exception], ...]:
    """What the libraries raise about buckets, besides OSError and ValueError."""
    if "gcsfs" not in sys.modules:
        return ()
    import aiohttp
    import google.api_core.exceptions
    import google.auth.exceptions
    import requests.exceptions
    from gcsfs.retry import HttpError

    return (
        *(HttpError, aiohttp.ClientError, requests.exceptions.RequestException),
        *(google.auth.exceptions.GoogleAuthError, google.api_core.exceptions.GoogleAPIError),
    )


@contextlib.contextmanager
def _talking(address: str) -> Iterator[None]:
    """Around requests: what goes wrong is a BucketError."""
    try:
        yield
    except BucketError:
        raise
    except Exception as error:
        if text := reason(error):
            raise BucketError(f"{address}: {text}") from error
        raise


def reason(error: BaseException) -> str:
    """What is wrong with a bucket, and the remedy; "" for an error that is about something else."""
    lines = str(error).split("\n")
    said = f"{type(error).__name__}: {'; '.join(filter(None, lines))[:300]}"
    code = getattr(error, "code", None)
    if isinstance(error, FileNotFoundError):
        return "there is no such bucket, or it lost an object: check the address"
    if str(error).startswith("Forbidden") or code in (401, 403, "401", "403"):
        return (
            f"this account may not do that ({said}): `gcloud auth application-default login`, or "
            "give it roles/storage.objectAdmin of the bucket"
        )
    if isinstance(error, TimeoutError):
        return "the bucket does not answer: check the network"
    if isinstance(error, errors()):
        return f"the bucket cannot be used ({said}): check the network and the account"
    return ""

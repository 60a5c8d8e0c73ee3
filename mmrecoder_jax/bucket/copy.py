"""A folder of this machine that stands for an address: filled from the bucket, written to it."""

import base64
import contextlib
import fcntl
import hashlib
import os
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from mmrecoder_jax.bucket.client import BucketError, Changed, ask, below, plain, talking

CHECKPOINTS = "checkpoints"
HOME = "MMRECODER_CACHE"  # variable: where the folders are
RUNS = ".runs"  # in a view: what this machine runs
# Folders that are not copied.
_LOCAL_ONLY = (CHECKPOINTS, "served", "lengths", ".jax_cache", RUNS)
_STARTS_FROM = re.compile(  # of a work directory
    r"(config|model|evaluation)\.json|metrics\.jsonl(\.parts/\d+)?|tokenizer/.*"
)
_MARK = ".uploading"
_PART = re.compile(r"(.*)\.parts/(\d{12})")
_PART_BYTES = 1 << 16  # shorter files are written whole
_MOST_PARTS = 64
_APPENDED = (".jsonl",)
_TRIES = 5  # to read what another process changes meanwhile

Stat = tuple[int, int, int]  # bytes, time of the last change in ns, inode


class Copy:
    """A folder that stands for an address.

    Attributes:
      address: without a slash at its end.
      host: the number of the process that writes to it; None for a source.
      role: tells apart the folders of one address.
      folder: on this machine.
    """

    def __init__(self, address: str, host: int | None, role: str = ""):
        self.address, self.host = address, host
        self.role = role or ("source" if host is None else f"host{host}")
        digest = hashlib.sha256(address.encode()).hexdigest()[:12]
        self.folder = home() / f"{digest}-{self.role}" / address.rpartition("/")[2]
        self._known: dict[str, Stat] = {}  # what the bucket holds
        self._parts: dict[str, list[str]] = {}  # of files that are there in parts, their objects
        self._pushing = threading.Lock()  # while the folder and the bucket are made alike
        self._beside = ThreadPoolExecutor(1, "bucket")
        self._soon: Future[None] | None = None
        self._locked = -1  # the descriptor of a file that is locked as long as it is open
        self.folder.mkdir(parents=True, exist_ok=True)

    def lock(self) -> None:
        """Who writes, writes alone, and who fetches a source waits for another one that does.

        Raises:
          BucketError: another process writes there.
        """
        descriptor = os.open(self.folder.parent / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if self.host is None else fcntl.LOCK_NB))
        except BlockingIOError as error:
            os.close(descriptor)
            raise BucketError(
                f"{self.address}: another process of this machine works there: end it first"
            ) from error
        self._locked = descriptor

    def unlock(self) -> None:
        """Lets another process write there."""
        os.close(self._locked)

    def clear(self) -> None:
        """Removes the directories that a killed process has left half written in the bucket. The
        main process does that before any other one writes; the others leave them out meanwhile, as
        the marks go last.
        """
        found = below(self.address)
        broken = [name for name in found if name.startswith(marked_directories(found))]
        self._remove(sorted(broken, key=is_mark))

    def fill(self) -> None:
        """Makes the folder hold what the bucket holds, without what is being written there.

        Raises:
          BucketError: the bucket cannot be read; a source is not there, or not whole.
        """
        with self._pushing:  # what is half fetched would look changed or gone
            settled(self._fill)

    def _fill(self) -> None:
        found = below(self.address)
        if not found and self.host is None:
            raise BucketError(f"{self.address}: there is nothing in the bucket; check the path")
        marked = marked_directories(found)
        if marked and self.host is None:
            raise BucketError(f"{self.address}/{marked[0]} is being written, or half of it is")
        found = {name: entry for name, entry in found.items() if not name.startswith(marked)}
        if self.host is None and (roots := _work_directories(found)):
            found = {name: found[name] for name in found if _is_start(name, roots)}
        self._take({name: entry for name, entry in found.items() if not stays_away(name)})

    def _take(self, found: dict[str, dict[str, Any]], kept: Collection[str] = ()) -> None:
        """Makes the folder hold these objects.

        Args:
          kept: names of files that may be there besides.
        """
        self._parts = {}
        for name in sorted(found):
            if match := _PART.fullmatch(name):
                self._parts.setdefault(match[1], []).append(name)
        wanted = {name: entry for name, entry in found.items() if not _PART.fullmatch(name)}
        for name in set(self._walk()) - set(wanted) - set(kept):
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
        for names in batches(sorted(wanted)):
            places = [self.folder / name for name in names]
            for place in places:
                place.parent.mkdir(parents=True, exist_ok=True)
            # Threads may fetch one picture at the same time (`View.bring`).
            fetched = [f"{place}.{threading.get_ident()}.tmp" for place in places]
            with talking(self.address):
                ask("_get", [self._plain(name) for name in names], fetched)
            for name, temporary, place in zip(names, fetched, places, strict=True):
                size = os.path.getsize(temporary)
                if size != wanted[name]["size"]:
                    raise Changed(f"{self.address}/{name}: {size} bytes came: try again")
                os.utime(temporary, ns=(_time(wanted[name]),) * 2)
                os.replace(temporary, place)
                done += size
            if total > 1 << 28 and done - told > total / 20:  # of a small copy nothing is said
                told = done
                print(f"{self.address}: {done / 2**30:.1f} of {total / 2**30:.1f} GiB", flush=True)

    def _append(self, name: str, parts: list[str]) -> None:
        """Puts the parts of a file behind it, as far as they follow one another."""
        with talking(self.address), open(self.folder / name, "ab") as file:
            for part in parts:
                if int(part[-12:]) == file.tell():
                    file.write(ask("_cat_file", self._plain(part)))

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
        with self._pushing, talking(self.address):
            now = self._walk()
            changed = [name for name, stat in now.items() if self._known.get(name) != stat]
            if whole:
                changed += [name for name in self._parts if name in now and name not in changed]
            ends = [name for name in changed if not whole and self._grows(name, now[name])]
            gone = [name for name in self._known if name not in now]
            # What must be whole or absent is written by the main process.
            new = [] if self.host else _topmost(changed, self._known)
            for names in batches(new):
                marks = {self._plain(f"{name}/{_MARK}"): b"" for name in names}
                ask("_pipe", marks)
            for names in batches([name for name in changed if name not in ends]):
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
        ask("_pipe", {self._plain(name): data for name, data in contents.items()})
        for name in contents:
            self._remove(self._parts.pop(name, []))
            self._known[name] = now[name]

    def _put_end(self, name: str, now: dict[str, Stat]) -> None:
        """Writes what has been appended to a file as an object of its own."""
        begin, end = self._known[name][0], now[name][0]
        try:
            with open(self.folder / name, "rb") as file:
                file.seek(begin)
                data = file.read(end - begin)
        except FileNotFoundError:  # it has just been removed
            return
        part = f"{name}.parts/{begin:012d}"
        ask("_pipe_file", self._plain(part), data)
        self._parts.setdefault(name, []).append(part)
        self._known[name] = now[name]

    def _remove(self, names: Iterable[str]) -> None:
        """Removes objects; another process may have removed some of them."""
        for name in names:
            with contextlib.suppress(Changed), talking(self.address):
                ask("_rm_file", self._plain(name))

    def _plain(self, name: str) -> str:
        return f"{plain(self.address)}/{name}"

    def _walk(self) -> dict[str, Stat]:
        """What of the folder is copied."""
        found = {}
        for top, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if name not in _LOCAL_ONLY]
            inside = os.path.relpath(top, self.folder)
            for name in names:
                if name.endswith(".tmp"):
                    continue
                with contextlib.suppress(FileNotFoundError):  # it has just been removed
                    stat = os.stat(os.path.join(top, name))
                    path = name if inside == "." else f"{inside}/{name}"
                    found[path] = stat.st_size, stat.st_mtime_ns, stat.st_ino
        return found


def settled(read: Callable[[], None]) -> None:
    """Reads again where another process has changed or removed what is being read.

    Raises:
      Changed: it did so every time.
    """
    for _ in range(_TRIES - 1):
        with contextlib.suppress(Changed):
            read()
            return
    read()


def home() -> Path:
    """The directory of the folders that stand for addresses."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get(HOME) or os.path.join(cache, "mmrecoder_jax")).resolve()


def is_mark(name: str) -> bool:
    """Whether an object says that the directory that it is in is being written."""
    return PurePosixPath(name).name == _MARK


def marked_directories(names: Iterable[str]) -> tuple[str, ...]:
    """The directories that are being written, with a slash at the end."""
    return tuple(f"{PurePosixPath(name).parent}/" for name in names if is_mark(name))


def stays_away(name: str) -> bool:
    """Whether an object has no file in a folder that stands for an address."""
    return not set(_LOCAL_ONLY).isdisjoint(PurePosixPath(name).parts[:-1])


def _work_directories(names: Iterable[str]) -> set[str]:
    """Those that checkpoints are in, "" or with a slash at the end."""
    split = (f"/{name}".partition(f"/{CHECKPOINTS}/") for name in names)
    return {f"{before}/".removeprefix("/") for before, found, _ in split if found}


def _is_start(name: str, roots: Iterable[str]) -> bool:
    """Whether a file is what a stage starts from, of one of these work directories."""
    inside = (name.removeprefix(root) for root in roots if name.startswith(root))
    return any(_STARTS_FROM.fullmatch(each) for each in inside)


def _topmost(changed: list[str], known: Iterable[str]) -> list[str]:
    """The directories of changed files that no known file is in, without those inside another."""
    old = {str(parent) for name in known for parent in PurePosixPath(name).parents} | {"."}
    new = set()
    for name in changed:
        outer = [str(each) for each in PurePosixPath(name).parents if str(each) not in old]
        new.update(outer[-1:])
    return sorted(new)


def batches(names: list[str], size: int = 64) -> Iterator[list[str]]:
    for start in range(0, len(names), size):
        yield names[start : start + size]


def _time(entry: dict[str, Any]) -> int:
    """When an object was last changed, in ns since 1970."""
    return round(entry["mtime"].timestamp() * 1e6) * 1000

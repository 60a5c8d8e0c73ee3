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

Whoever looks at a run that others make (`view`) has a folder without checkpoints, charts and
pictures; `bring` fetches one of these, `refill` what is new, and `put` alone writes to the bucket.

The libraries are an extra of this package (`gcs`); without an address nothing of them is loaded.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from etils import epath

from mmrecoder_jax.bucket.client import (
    BucketError,
    ask,
    below,
    check,
    errors,
    is_address,
    plain,
    reach,
    reason,
    talking,
)
from mmrecoder_jax.bucket.copy import CHECKPOINTS, HOME, RUNS, Copy, home
from mmrecoder_jax.bucket.view import View

__all__ = [  # of the room `bucket`, what others need
    "HOME",
    "BucketError",
    "check",
    "errors",
    "home",
    "is_address",
    "reach",
    "reason",
]

COMMIT = "commit_success.txt"  # the last file of a checkpoint that orbax writes to a bucket
_copies: list[Copy] = []

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
    if host is None and at and "/" not in step and not below(path) and below(workdir):
        return f"{local(workdir)}@{step}"
    copy = Copy(path, host)
    for other in _copies:
        if (other.address, other.role) == (copy.address, copy.role):
            return str(other.folder)
    copy.lock()
    done = False
    try:
        if host == 0:
            copy.clear()
        copy.fill()
        done = True
    finally:
        if host is None or not done:
            copy.unlock()
    _copies.append(copy)
    return str(copy.folder)


def view(path: str, command: str, new: bool = False, alone: bool = False) -> str:
    """The folder that stands for the address of a work directory that is looked at, whose run may
    be going on elsewhere; any other path as it is. It has no checkpoints, charts and pictures
    (`bring`), and what is written there stays here (`put`).

    Args:
      command: that looks; each has a folder of its own.
      new: whether there may be nothing in the bucket yet.
      alone: whether other processes with this command wait until this one has ended.

    Raises:
      BucketError: the bucket cannot be read, or there is nothing.
    """
    if not is_address(path):
        return path
    found = View(path.rstrip("/"), command, new, alone)
    found.fill()
    _copies.append(found)
    return str(found.folder)


def bring(path: str | os.PathLike[str]) -> str:
    """Fetches a file, or a directory of charts, that a view has left out; returns where it is. Any
    other path as it is.
    """
    copy = _copy_of(str(path))
    if not isinstance(copy, View):
        return str(path)
    if copy.is_directory(path):
        return local(shown(os.path.abspath(path)))
    copy.bring(path)
    return str(path)


def put(path: str | os.PathLike[str]) -> None:
    """Writes a file, or all of a directory, of a view to the bucket, and removes there what was
    here and is gone; does nothing for any other path.

    Raises:
      BucketError: something cannot be written.
    """
    copy = _copy_of(str(path))
    if isinstance(copy, View):
        copy.put(path)


def names(path: str) -> list[str]:
    """Names of what is in a directory, of a view of what the bucket has; none where it is not
    there.
    """
    copy = _copy_of(path)
    if isinstance(copy, View):
        return sorted(copy.names(path))
    return sorted(os.listdir(path)) if os.path.isdir(path) else []


def of_machine(directory: Path) -> Path:
    """Where this machine notes what it runs in a directory: there, or, below a view, in a folder
    that is never copied.
    """
    copy = _copy_of(str(directory))
    if not isinstance(copy, View):
        return directory
    return copy.folder / RUNS / directory.relative_to(copy.folder)


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
    """Reads what others have written to the bucket of a work directory, or of a view; does nothing
    for any other directory.
    """
    copy = _copy_of(path)
    if copy is None:
        return
    if copy.host is not None:
        copy.push()
        copy.fill()
    elif isinstance(copy, View):
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
    with talking(str(path)):
        return bool(path.exists())


def steps(workdir: str) -> list[int]:
    """The steps of the complete checkpoints of a work directory, oldest first.

    orbax gives an unfinished one another name on a disk; in a bucket it lacks the file `COMMIT`.
    """
    path = checkpoints(workdir)
    with talking(str(path)):
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
    with talking(str(path)):
        (path / COMMIT).unlink(missing_ok=True)
        for name, _ in files(path):
            ask("_cp_file", plain(str(path / name)), plain(str(target / name)))
        (target / COMMIT).write_text("set aside")
        path.rmtree()


def remove_checkpoints(workdir: str) -> None:
    """Removes the checkpoints of a work directory where they are in a bucket."""
    path = checkpoints(workdir)
    if is_address(str(path)):
        with talking(str(path)):
            for name, _ in files(path):
                ask("_rm_file", plain(str(path / name)))


def files(root: epath.Path | Path) -> list[tuple[str, int]]:
    """(name below it, bytes) of every file below a directory, in the order of its paths."""
    if is_address(str(root)):
        found = {name: entry["size"] for name, entry in below(str(root)).items()}
    else:
        paths = [path for path in Path(root).rglob("*") if path.is_file()]
        found = {path.relative_to(root).as_posix(): path.stat().st_size for path in paths}
    return sorted(found.items(), key=lambda item: PurePosixPath(item[0]))


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path is below a folder that stands for an address."""
    return _copy_of(str(path)) is not None


def _copy_of(path: str) -> Copy | None:
    path = os.path.abspath(path)
    for copy in _copies:
        if path == str(copy.folder) or path.startswith(f"{copy.folder}{os.sep}"):
            return copy
    return None

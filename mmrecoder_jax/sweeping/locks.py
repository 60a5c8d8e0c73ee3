"""Whether a process works in a directory, by a lock on a file in it.

The lock belongs to the open file, which the process that works there inherits: it lasts as long as
that process, also where whoever started it has been killed.
"""

import contextlib
import fcntl
import os
from pathlib import Path

from mmrecoder_jax.config import ConfigError

LOCK_FILE = ".lock"


def take(directory: Path, name: str = LOCK_FILE) -> int | None:
    """The descriptor of the locked file, which keeps the lock while it is open; None where another
    process has it.

    Raises:
      ConfigError: the file system has no locks.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(
            f"{directory}: its file system gives no locks ({error.strerror}), without which two "
            "processes could train in one directory: mount it with them (flock), or use another "
            "--workdir"
        ) from error
    return descriptor


def note_process(descriptor: int, process: int) -> None:
    """Writes down which process works there, for people."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{process}\n".encode(), 0)


def holder(directory: Path) -> str:
    """Who holds the lock, such as "process 4711"; "" where nobody does."""
    with contextlib.suppress(FileNotFoundError), open(directory / LOCK_FILE) as f:
        try:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"process {f.read().strip() or '?'}"
    return ""

"""The folder that scripts write to: put into memory where that is allowed, and emptied after them.

A script may leave folders that are deeper than a path may be long, that nobody may list, or whose
names are no text. So no path here is longer than two names: what lies in a folder is moved into
another one, under a number, before it is emptied.
"""

import collections
import contextlib
import ctypes
import itertools
import os

from mmrecoder_jax.env.sandbox import quota

POOL_PREFIX = "mmrecoder-env-"  # of the name of a pool's folder, below which all its files are
_NEW_NAMESPACE, _NEW_USER = 0x00020000, 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER
_NO_SETUID, _NO_DEVICES, _NO_EXECUTION, _RECURSIVE, _PRIVATE = 2, 4, 8, 1 << 14, 1 << 18
_DETACH = 2


def empty(folder: str, trash: str) -> None:
    """Removes all that lies in `folder`.

    Args:
      trash: another folder on the same file system, which no script can write to; it goes too.

    Raises:
      OSError: something could not be removed.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(trash, 0o700)
    top, bin_ = os.fsencode(folder), os.fsencode(trash)  # bytes: a name need not be text
    # First what was left in the trash: later, what is moved there would be found twice.
    waiting = collections.deque([bin_, top])
    numbers = itertools.count()
    problem = None
    while waiting:
        inside = waiting.popleft()
        try:
            os.chmod(inside, 0o700)
            for name in os.listdir(inside):
                path = os.path.join(inside, name)
                if path == bin_:
                    continue
                try:
                    os.unlink(path)
                except (IsADirectoryError, PermissionError):
                    waiting.append(_move(path, bin_, numbers))
            if inside not in (top, bin_):
                os.rmdir(inside)
        except OSError as error:
            problem = error
    if problem is not None:
        raise problem
    os.rmdir(trash)


def remove(folder: str) -> None:
    """Removes `folder` and all in it, as far as that is possible; raises nothing."""
    with contextlib.suppress(OSError):
        empty(folder, os.path.join(folder, "trash"))
        os.rmdir(folder)


def _move(path: bytes, trash: bytes, numbers: "itertools.count[int]") -> bytes:
    """Moves a folder into `trash`, under a number that is free."""
    while True:
        target = os.path.join(trash, b"%d" % next(numbers))
        if not os.path.lexists(target):
            os.rename(path, target)
            return target


def move_into_memory(folder: str) -> bool:
    """Mounts a file system in memory on `folder`, which this process and its children alone see.

    Then a full disk is no matter, and nothing can outlive them. It needs root, or a user namespace
    where the host allows that. This process must have one thread.

    Returns:
      Whether it was possible. Where not, all is as it was.
    """
    if os.path.ismount(folder):  # bubblewrap has done it
        return True
    pid = os.fork()  # a trial: half of it could not be undone
    if pid == 0:
        with contextlib.suppress(BaseException):
            _mount(folder)
            os._exit(0)
        os._exit(1)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        return False
    _mount(folder)
    return True


def _mount(folder: str) -> None:
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _call("unshare", _NEW_NAMESPACE)
    else:
        _call("unshare", _NEW_NAMESPACE | _NEW_USER)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _call("mount", b"none", b"/", None, ctypes.c_ulong(_RECURSIVE | _PRIVATE), None)
    flags = ctypes.c_ulong(_NO_SETUID | _NO_DEVICES | _NO_EXECUTION)
    # The quota ends a script before this is full.
    size = b"mode=700,size=%dm" % (2 * quota.DISK_MB)
    _call("mount", b"scratch", os.fsencode(folder), b"tmpfs", flags, size)


def unmount(folder: str) -> None:
    """Undoes `move_into_memory`; what is in the folder is gone."""
    with contextlib.suppress(OSError):
        _call("umount2", os.fsencode(folder), _DETACH)


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc[name](*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")

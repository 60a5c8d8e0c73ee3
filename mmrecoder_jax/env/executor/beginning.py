"""What a zygote does before it imports anything that takes time.

It takes back what a launcher may have set, starts again without randomised addresses, and sets a
timer that looks whether the trainer lives: while libraries are imported, nobody waits for it.
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys

from mmrecoder_jax.env.sandbox import scratch

_ADDR_NO_RANDOMIZE = 0x0040000
_LOOK_SECONDS = 0.25


def begin(descriptor: int) -> None:
    """Prepares this process, and watches the trainer's socket of that number until `stop_watching`.

    Called as early as possible, as it may start the program again.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would hide how a child ended
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o022)
    for name in (resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_NOFILE):
        _, hard = resource.getrlimit(name)
        resource.setrlimit(name, (hard, hard))
    _fix_addresses()

    def look(*_: object) -> None:
        if is_gone(descriptor):
            clean_up(descriptor)
            os._exit(0)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _LOOK_SECONDS, _LOOK_SECONDS)


def stop_watching() -> None:
    """From now on, the socket is waited for."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def is_gone(descriptor: int) -> bool:
    """Whether the other end of that socket is closed."""
    poll = select.poll()
    poll.register(descriptor, select.POLLHUP)
    return bool(poll.poll(0))


def clean_up(descriptor: int) -> None:
    """Removes the files of a trainer that is gone: nobody else does.

    HOME is the pool's folder; that of a user who starts this program by hand is left alone.
    """
    directory = os.environ["HOME"]
    is_pool = os.path.basename(directory).startswith(scratch.POOL_PREFIX)
    if is_pool and is_gone(descriptor):
        with contextlib.suppress(FileNotFoundError):  # another one was faster
            scratch.unmount(os.getcwd())
        scratch.remove(directory)


def _fix_addresses() -> None:
    """Starts this program again without randomised addresses, where that is allowed.

    Constrained layouts depend on addresses in the last digits.
    """
    libc = ctypes.CDLL(None)
    current = libc.personality(ctypes.c_ulong(0xFFFFFFFF))
    if (
        current >= 0
        and not current & _ADDR_NO_RANDOMIZE
        and libc.personality(ctypes.c_ulong(current | _ADDR_NO_RANDOMIZE)) >= 0
    ):
        os.execv(sys.executable, sys.orig_argv)

"""The outer layer: an executor inside bubblewrap, where that is installed and works here.

Landlock and seccomp contain a script; bubblewrap around the whole zygote hides from it what they
leave visible: the existence and sizes of other files, and all other processes. It costs a few
milliseconds a zygote and nothing a script. It needs user namespaces, which some hosts forbid, so it
is used where a trial succeeds and never required.
"""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mmrecoder_jax.env.sandbox import confinement

_PACKAGE = Path(__file__).parents[2]
# bubblewrap waits for the signal of its child for ever where a launcher has it ignored or blocked.
_PLAIN = [
    *(sys.executable, "-I", "-S", "-c"),
    "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_DFL); "
    "signal.pthread_sigmask(signal.SIG_SETMASK, ()); os.execv(sys.argv[1], sys.argv[1:])",
]


@functools.cache
def program() -> str | None:
    """The path of a bubblewrap that works here, else None."""
    path = shutil.which("bwrap")
    if path is None:
        return None
    inner = [sys.executable, "-I", "-c", "print('works')"]
    done = subprocess.run(
        [
            *_PLAIN,
            *_command(
                path, inner, executor_reads(), ["--tmpfs", "/working", "--chdir", "/working"]
            ),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    # Not the exit status: where SIGCHLD is ignored, nobody learns it.
    return path if done.stdout == b"works\n" else None


def state() -> str:
    """In words, for the probe: works, missing, or not allowed here."""
    return "works" if program() else "not allowed here" if shutil.which("bwrap") else "missing"


def wrap(command: Sequence[str], reads: Sequence[str], directory: Path, working: Path) -> list[str]:
    """`command` inside bubblewrap, in namespaces of its own and without a network.

    What it `reads` (`executor_reads` of its interpreter) and this package are there read-only,
    `directory` (absolute) is writable, `working` is the working directory, in memory. Nothing else
    of the host exists there, no /proc either.

    An executor whose trainer died empties `directory`, but cannot remove these two from inside: the
    shell around it does, if they are empty.
    """
    path = program()
    assert path is not None, "only where a trial of bubblewrap succeeded"
    folders = ["--bind", str(directory), str(directory), "--tmpfs", str(working)]
    inner = _command(path, command, reads, [*folders, "--chdir", str(working)])
    around = 'all=$1 own=$2; shift 2; "$@"; rmdir "$own" "$all" 2>/dev/null'
    return [*_PLAIN, "/bin/sh", "-c", around, "sh", str(directory), str(working), *inner]


def _command(
    path: str, command: Sequence[str], reads: Sequence[str], folders: Sequence[str]
) -> list[str]:
    shown = [*reads, str(_PACKAGE)]
    binds = [word for name in shown for word in ("--ro-bind", name, name)]
    return [
        # Not --die-with-parent: the executor ends with its socket, and then removes its files.
        *(path, "--unshare-all", "--tmpfs", "/", *binds, "--dev", "/dev"),
        *(*folders, "--", *command),
    ]


def executor_reads() -> list[str]:
    """What an executor on this interpreter reads, outer directories first.

    Both the names it uses, which may be links (as /lib64), and what they lead to.
    """
    names = [
        sys.prefix,
        sys.exec_prefix,
        sys.base_prefix,
        sys.base_exec_prefix,
        "/usr",
        "/lib",
        "/lib64",
        "/etc/ld.so.cache",
    ]
    names += [path for path in confinement.readable_paths() if not path.startswith("/dev/")]
    resolved = [os.path.realpath(name) for name in (*names, sys.executable)]
    return sorted({name for name in (*names, *resolved) if os.path.exists(name)})

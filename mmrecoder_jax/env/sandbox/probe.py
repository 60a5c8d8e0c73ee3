"""What this host offers to contain scripts, and a trial of it.

python -m mmrecoder_jax.env.sandbox --probe
"""

import argparse
import contextlib
import errno
import json
import os
import platform
import select
import signal
import socket
import tempfile
from collections.abc import Callable

from mmrecoder_jax.env.sandbox import bubblewrap, quota
from mmrecoder_jax.env.sandbox.confinement import (
    NEWEST_ABI,
    SandboxMode,
    SandboxUnavailable,
    check,
    enter,
    has_seccomp,
    landlock_abi,
    prepare,
)

_INSIDE = "write inside"  # the one attempt that must succeed


def _trial() -> dict[str, str]:
    """Confines a fork and tries what each layer should refuse; the answer of each attempt."""
    with tempfile.TemporaryDirectory() as directory:
        confinement = prepare(SandboxMode.AUTO, None, directory, ())
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            out = enter(confinement, theirs.detach())
            attempts: dict[str, Callable[[], object]] = {
                "read /etc/passwd": lambda: os.open("/etc/passwd", os.O_RDONLY),
                "write outside": lambda: os.open("/tmp/mmrecoder-probe", os.O_WRONLY | os.O_CREAT),
                _INSIDE: lambda: os.open("inside", os.O_WRONLY | os.O_CREAT),
                "open a socket": socket.socket,
                "start a process": os.fork,
            }
            answers = {}
            for name, attempt in attempts.items():
                try:
                    if attempt() == 0 and name == "start a process":
                        os._exit(0)
                    answers[name] = "possible"
                except OSError as problem:
                    answers[name] = f"refused ({errno.errorcode.get(problem.errno or 0)})"
            os.write(out, json.dumps(answers).encode())
            _fill_the_disk()
            os.write(out, b"\n")  # it was not ended
            os._exit(0)
        theirs.close()
        with ours:
            answers = _listen(ours, pid)
        if confinement.ruleset is not None:
            os.close(confinement.ruleset)
    return answers or {"trial": "the process died"}


def _fill_the_disk() -> None:
    with open("inside", "wb", buffering=0) as file:
        for _ in range(2 * quota.DISK_MB):
            file.write(bytes(1 << 20))
            file.seek(0)


def _listen(connection: socket.socket, pid: int) -> dict[str, str]:
    """The answers of a confined process, whose writing to the disk is counted; it is reaped."""
    text, ended = b"", False
    with contextlib.suppress(EOFError), contextlib.closing(quota.Meter(connection)) as meter:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        poll.register(meter.descriptor, select.POLLIN)
        while not ended:
            ready = dict(poll.poll())
            if connection.fileno() in ready:
                received = connection.recv(1 << 16)
                text += received
                ended = not received
            elif not meter.count():
                ended = True
                os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if not text:
        return {}
    disk = "possible" if text.endswith(b"\n") else "refused (it was ended)"
    return json.loads(text) | {"write more than the quota": disk}


def main(arguments: list[str] | None = None) -> int:
    """Prints what the host offers; 0 when the default sandbox works here, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m mmrecoder_jax.env.sandbox",
        description="Sandbox of the chart environment.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        required=True,
        help="report what this host offers and try it",
    )
    parser.parse_args(arguments)
    abi = landlock_abi()
    user = "root" if os.geteuid() == 0 else "ordinary user"
    print(f"kernel     {platform.release()} {platform.machine()}, {user}")
    print(f"Landlock   {f'ABI {abi} (this program uses up to {NEWEST_ABI})' if abi else 'missing'}")
    print(f"seccomp    {'yes' if has_seccomp() else 'missing'}")
    print(f"bubblewrap {bubblewrap.state()} (an outer layer, not required)")
    try:
        check(SandboxMode.AUTO)
    except SandboxUnavailable as problem:
        print(f"verdict    {problem}")
        return 1
    answers = _trial()
    for name, answer in answers.items():
        print(f"trial      {name}: {answer}")
    contained = all((answer == "possible") == (name == _INSIDE) for name, answer in answers.items())
    if contained:
        print("verdict    scripts are contained here")
    else:
        print("verdict    a layer did not hold: do not run untrusted code here")
    return 0 if contained else 1

"""Lends the executors of this machine to trainers elsewhere.

    python -m mmrecoder_jax.env.serve --new-secret=secret             once; copy it to all machines
    python -m mmrecoder_jax.env.serve --listen=10.0.0.5:7435 --secret=secret
    python -m mmrecoder_jax.train --config.env.hosts="('10.0.0.5:7435',)" \\
        --config.env.secret=secret ...

It runs until Ctrl-C or SIGTERM, and leaves nothing behind; whoever starts it again when it ends
(systemd, Slurm, Kubernetes) need do nothing else. docs/executor_hosts.md has examples.
"""

import contextlib
import dataclasses
import os
import resource
import secrets
import signal
import socket
import sys
import threading

from mmrecoder_jax.command import Parser, ending_in_one_line
from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.env import interpreter, local
from mmrecoder_jax.env.channel import read_secret
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.host import ExecutorHost
from mmrecoder_jax.env.local import Executor
from mmrecoder_jax.env.remote import is_this_machine, parse_address
from mmrecoder_jax.env.sandbox import confinement, scratch
from mmrecoder_jax.env.sandbox.confinement import SandboxMode

_PROCESSES = 4  # by default, for each script that may run
_SECRET_BYTES = 32
_ENDS = (signal.SIGINT, signal.SIGTERM)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = Parser(prog="python -m mmrecoder_jax.env.serve", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--listen", default="127.0.0.1:7435", help="NAME:PORT to listen at (%(default)s)"
    )
    parser.add_argument("--secret", default="", help="a file; trainers need the same one")
    parser.add_argument(
        "--executors",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="how many scripts run at a time (one for each core: %(default)s)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=0,
        help="executors that may be started at a time, of all pools of all trainers, 100 MB each "
        f"({_PROCESSES} for each of --executors)",
    )
    parser.add_argument("--python", default="", help="what executors run on, as env.python")
    parser.add_argument(
        "--sandbox",
        default=SandboxMode.AUTO,
        choices=(SandboxMode.AUTO, SandboxMode.UNSAFE),
        help="as env.sandbox",
    )
    parser.add_argument("--new-secret", default="", help="makes that file, and does nothing else")
    args = parser.parse_args(argv)
    with ending_in_one_line(args.traceback):
        if args.new_secret:
            _make_secret(args.new_secret)
            return 0
        processes = args.processes or _PROCESSES * args.executors
        if args.executors < 1:
            raise ConfigError(f"--executors={args.executors}: use 1 or more")
        if processes < args.executors:
            raise ConfigError(f"--processes={processes}: use --executors={args.executors} or more")
        secret = read_secret(args.secret, "--secret")
        config = EnvConfig(workers=args.executors, python=args.python, sandbox=args.sandbox)
        python = interpreter.find(args.python, "--python")
        with _listener(args.listen, bool(secret)) as listener:
            over = threading.Event()
            for number in _ENDS:  # from now on, so that nothing is left where it starts still
                signal.signal(number, lambda *_: over.set())
            _check(config, python)
            with ExecutorHost(listener, config, python, secret, processes, _complain):
                _wait(over, listener, config, python)
    return 0


def _wait(
    over: threading.Event,
    listener: socket.socket,
    config: EnvConfig,
    python: interpreter.Interpreter,
) -> None:
    """Says that all is ready, and waits for what ends it."""
    name, port = listener.getsockname()[:2]
    address = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
    print(
        f"{address} lends executors ({config.workers}): Python {python.version}, matplotlib "
        f"{python.releases['matplotlib']}, sandbox {config.sandbox}",
        flush=True,
    )
    over.wait()
    with contextlib.suppress(OSError):  # whoever read it may have gone first
        print("ending", flush=True)


def _check(config: EnvConfig, python: interpreter.Interpreter) -> None:
    """Starts an executor, so that what does not work here is said here and now."""
    confinement.check(config.sandbox)
    local.check_limits(config)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection takes several
    directory = local.make_directory()
    executor = Executor(dataclasses.replace(config, preload=()), python, directory, 0)
    try:
        executor.start()
        executor.wait_ready()
    finally:
        executor.stop()
        scratch.remove(str(directory))


def _listener(address: str, has_secret: bool) -> socket.socket:
    """A bound socket; raises ConfigError where there is none, or anybody could use it."""
    try:
        name, port = parse_address(address)
    except ValueError as problem:
        raise ConfigError(f"--listen={address!r}: {problem}") from problem
    if not has_secret and not is_this_machine(name):
        raise ConfigError(
            f"--listen={address!r} can be reached from other machines, so it needs --secret=FILE: "
            "make one with --new-secret=FILE"
        )
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
        except OSError:
            listener.close()
            raise
    except OSError as problem:
        raise ConfigError(
            f"--listen={address!r}: {problem.strerror}: choose an address of this machine and a "
            "port that is free"
        ) from problem
    return listener


def _make_secret(file: str) -> None:
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as problem:
        raise ConfigError(f"--new-secret={file!r} exists: name a new file") from problem
    with os.fdopen(descriptor, "w") as opened:
        opened.write(secrets.token_hex(_SECRET_BYTES) + "\n")
    print(f"made {file}: copy it to every host and trainer, and let nobody else read it")


def _complain(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

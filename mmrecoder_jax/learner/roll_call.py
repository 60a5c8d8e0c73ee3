"""Which processes of a run have come, asked before JAX joins them.

    process 0        listens at the address where JAX will meet, until all have come
    every other      says its number and host name there, and waits for the answer

JAX itself waits for all of them and does not say for whom. Process 0 leaves the address before JAX
takes it. Who comes without a number that is expected (a port scanner, a process of another run) is
not heard.
"""

import contextlib
import json
import socket
import time
from collections.abc import Mapping
from typing import Any

from mmrecoder_jax.config import ConfigError

_AGAIN_SECONDS = 0.5  # between attempts to reach process 0
_LINE = 4096  # bytes of a message
_NAME = 100  # characters of a host's name
_MARGIN_SECONDS = 5.0  # that others wait longer than process 0, which knows more


class Missing(ConfigError):
    """Not all processes have come; the message says which have not."""


def wait_for_all(address: str, count: int, number: int, seconds: float) -> None:
    """Returns when all processes have said that they are there.

    Args:
      address: HOST:PORT of process 0.
      count: processes of the run.
      number: of this process.
      seconds: how long to wait.

    Raises:
      Missing: some have not come.
      OSError: process 0 cannot listen at its address.
    """
    until = time.monotonic() + seconds
    host, _, port = address.rpartition(":")
    if number:
        _report(host.strip("[]"), int(port), count, number, until, seconds)
        return
    if missing := _listen(int(port), count, until, seconds):
        raise Missing(missing)


def _who_is_missing(here: Mapping[int, str], count: int, seconds: float) -> str:
    """`waited 300 s for process 3 of 4, which has not come (...)`; "" where all have come.

    Args:
      here: host names of those that have, by number.
    """
    numbers = sorted(set(range(count)) - set(here))
    if not numbers:
        return ""
    who = ", ".join(map(str, numbers))
    have = "has" if len(numbers) == 1 else "have"
    there = ", ".join(f"{number} on {name}" for number, name in sorted(here.items()))
    return (
        f"waited {seconds:g} s for process{'es' * (len(numbers) > 1)} {who} of {count}, which "
        f"{have} not come (those that have: {there}); start all of them, each once, at about the "
        "same time"
    )


# ---------------------------------------------------------------- process 0


def _listen(port: int, count: int, until: float, seconds: float) -> str:
    """Who has not come, in words; those that have are told the same."""
    came: dict[int, socket.socket] = {}
    here = {0: socket.gethostname()}
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listener(port))
        while len(here) < count and time.monotonic() < until:
            listener.settimeout(max(0.01, min(1.0, until - time.monotonic())))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            stack.enter_context(connection)
            said = _hear(connection, 2.0)
            number = said.get("number")
            if said.get("of") == count and isinstance(number, int) and 0 < number < count:
                came[number], here[number] = connection, str(said.get("host"))[:_NAME]
        missing = _who_is_missing(here, count, seconds)
        for connection in came.values():
            with contextlib.suppress(OSError):
                _say(connection, {"missing": missing})
        for connection in came.values():
            _hear(connection, 1.0)  # the others close first: the address is free at once
    return missing


def _listener(port: int) -> socket.socket:
    """A socket at a port of every address of this machine."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


# ---------------------------------------------------------------- every other process


def _report(host: str, port: int, count: int, number: int, until: float, seconds: float) -> None:
    """Says that this process is there, again and again, until process 0 answers."""
    while True:
        left = until + _MARGIN_SECONDS - time.monotonic()
        with contextlib.suppress(OSError):
            if left <= 0:
                break
            with socket.create_connection((host, port), timeout=min(left, 5.0)) as connection:
                _say(connection, {"number": number, "of": count, "host": socket.gethostname()})
                said = _hear(connection, left)
            if "missing" in said:
                if said["missing"]:
                    raise Missing(str(said["missing"]))
                return
        time.sleep(_AGAIN_SECONDS)
    raise Missing(
        f"waited {seconds:g} s for process 0 of {count}, which does not answer at {host}:{port}; "
        "start all of them, each once, at about the same time"
    )


def _say(connection: socket.socket, message: Mapping[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _hear(connection: socket.socket, seconds: float) -> dict[str, Any]:
    """What the other side says in one line; {} where it says nothing that can be read."""
    connection.settimeout(max(seconds, 0.01))
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < _LINE:
            piece = connection.recv(_LINE)
            if not piece:
                break
            data += piece
        said = json.loads(data)
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}

"""Executor hosts without executors: an honest one, which answers at once, and all kinds of
liars.
"""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from mmrecoder_jax.env import EnvConfig, interpreter
from mmrecoder_jax.env.channel import BEAT, Channel, Refused
from mmrecoder_jax.env.likeness import CHART, likeness
from mmrecoder_jax.env.remote import PING, READY, ROOM, UNWANT, WANT

SECRET = b"0123456789abcdef"
OUTCOME = {"end": "exit", "code": 0, "seconds": 0.5, "cpu_seconds": 0.25, "replay": None}
Words = dict[str, Any]


def claim(code: str, **changes: Any) -> bytes:
    """What the process of a script says that failed with its own code as the message."""
    words = {"status": "error", "error": code, "flags": [], "record": None, "size": None}
    return json.dumps(words | changes).encode()


def honest(line: Channel, words: Words) -> None:
    """Answers a script as `claim` says."""
    line.send({"number": words["run"], "outcome": OUTCOME}, claim(words["code"]))


class StandIn:
    """A host on a port of this machine; a context manager.

    Args:
      answer: what it does with a script.
      executors: how many it lends.
      like: what it says of itself that is not so here.
      ready: what it says when it is given settings.
      has_room: whether it says that it has room for a script, but for the first one.
      chart: what its executors claim of `CHART`.
    """

    def __init__(
        self,
        answer: Callable[[Channel, Words], None] = honest,
        executors: int = 1,
        like: dict[str, str] | None = None,
        ready: Words = READY,
        secret: bytes = SECRET,
        has_room: bool = True,
        port: int = 0,
        chart: bytes = b"{}",
    ):
        self._answer, self._executors, self._ready = answer, executors, ready
        self._secret, self._has_room, self._chart = secret, has_room, chart
        self._like = likeness(EnvConfig(), interpreter.find("")) | (like or {})
        self._listener = socket.create_server(("127.0.0.1", port))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.codes: list[str] = []
        self.lines: list[Channel] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> "StandIn":
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for line in self.lines:
            line.shut()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            line = Channel(sock)
            self.lines.append(line)
            threading.Thread(target=self._serve, args=(line,), daemon=True).start()

    def _serve(self, line: Channel) -> None:
        with contextlib.suppress(OSError, EOFError, Refused), contextlib.closing(line):
            line.admit(self._secret, 5.0)
            line.receive(5.0)
            line.send({"executors": self._executors, "like": self._like})
            is_first = True
            for words in _said(line):
                if words == PING:
                    line.send(BEAT)
                elif words == WANT:
                    line.send(ROOM if self._has_room or is_first else BEAT)
                    is_first = False
                elif "settings" in words:
                    line.send(self._ready)
                elif words.get("code") == CHART.code:
                    line.send({"number": words["run"], "outcome": OUTCOME}, self._chart)
                elif words != UNWANT:
                    self.codes.append(words["code"])
                    self._answer(line, words)


def _said(line: Channel) -> Iterator[Words]:
    while True:
        yield line.receive(60.0, silence=60.0)[0]

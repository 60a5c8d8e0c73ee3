"""A judge behind any server that speaks `/v1/chat/completions` (vLLM, SGLang, llama.cpp, a
vendor's).

`ChatClient` asks one question: time-outs that end the connection, retries with growing pauses,
`Retry-After` obeyed. `HttpJudge` has many questions in flight, in threads: they wait for sockets
while the accelerator decodes. The server's key comes from an environment variable and goes into one
header; it is in no message, log or file.
"""

import base64
import contextlib
import dataclasses
import email.utils
import http.client
import json
import os
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.rl.judge.answers import PROMPT_AFTER, PROMPT_BEFORE, PROMPT_BETWEEN, verdict
from mmrecoder_jax.rl.judge.base import Answer, Judge, Verdict, VerdictCache

_REFUSED = (401, 403, 404)  # no other question will fare better
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_PAUSE = 60.0  # seconds, also of a Retry-After
_LARGEST_ANSWER = 4 << 20  # bytes


class NoAnswer(Exception):
    """A question stayed without an answer; `fatal` when every other one would, too."""

    def __init__(self, problem: str, fatal: bool = False):
        super().__init__(problem)
        self.fatal = fatal


class _Retry(Exception):
    """This attempt failed; `after` is what the server asks to wait, in seconds."""

    def __init__(self, problem: str, after: float | None = None):
        super().__init__(problem)
        self.after = after


@dataclasses.dataclass(frozen=True)
class Server:
    """Where the judge is, and how patient to be with it.

    Attributes:
      url: the address including `/v1`, e.g. "http://localhost:8000/v1".
      model: the name the server knows the judge by.
      key_variable: environment variable that holds the key; no key is sent if it is unset or empty.
      in_flight: questions asked at the same time.
      timeout_seconds: for one attempt, from connecting to the last byte.
      retries: further attempts after the first.
      max_tokens: the longest answer.
      pause_seconds: before the first retry; it doubles each time, up to a minute.
    """

    url: str
    model: str
    key_variable: str
    in_flight: int
    timeout_seconds: float
    retries: int
    max_tokens: int
    pause_seconds: float = 1.0


class _Thread(threading.local):
    """A thread's open connection."""

    connection: http.client.HTTPConnection | None = None


class ChatClient:
    """Asks a server, one question at a time in each thread; keeps a thread's connection open
    between questions.

    Raises ValueError for a URL that is none.
    """

    def __init__(self, server: Server, on_retry: Callable[[], None] = lambda: None):
        parts = urllib.parse.urlsplit(server.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"judge.url={server.url!r}: give an address like http://localhost:8000/v1"
            )
        self.server = server
        self._secure, self._host = parts.scheme == "https", parts.hostname
        self._port = parts.port
        self._path = parts.path.rstrip("/") + "/chat/completions"
        self._on_retry = on_retry
        self._closed = threading.Event()
        self._thread = _Thread()
        self._under_way: set[Callable[[], None]] = set()  # each cuts a connection
        self._lock = threading.Lock()
        key = os.environ.get(server.key_variable, "") if server.key_variable else ""
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._key = key

    def ask(self, messages: Sequence[dict[str, Any]]) -> str:
        """The text of the answer, at temperature 0. Raises NoAnswer."""
        server = self.server
        question = {
            "model": server.model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": server.max_tokens,
        }
        body = json.dumps(question).encode()
        problem = ""
        for attempt in range(server.retries + 1):
            if attempt:
                self._on_retry()
            if self._closed.is_set():
                raise NoAnswer("the judge was closed")
            try:
                return self._attempt(body)
            except _Retry as failed:
                problem = str(failed)
                pause = (
                    failed.after if failed.after is not None else server.pause_seconds * 2**attempt
                )
            if attempt < server.retries:
                self._closed.wait(min(pause, _LONGEST_PAUSE))
        raise NoAnswer(f"{problem} ({server.retries + 1} attempts)")

    def close(self) -> None:
        """Ends the attempts under way and allows no further ones."""
        self._closed.set()
        with self._lock:
            cuts = list(self._under_way)
        for cut in cuts:
            cut()

    def _attempt(self, body: bytes) -> str:
        try:
            status, after, answer = self._exchange(body)
        except (OSError, http.client.HTTPException) as problem:
            raise _Retry(f"{type(problem).__name__}: {problem}") from problem
        if status in _AGAIN:
            raise _Retry(f"HTTP {status}: {self._excerpt(answer)}", after)
        if status != 200:
            hint = (
                " (check judge.url, judge.model and the key's environment variable)"
                if status in _REFUSED
                else ""
            )
            raise NoAnswer(
                f"HTTP {status}: {self._excerpt(answer)}{hint}", fatal=status in _REFUSED
            )
        try:
            content = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as problem:
            raise _Retry(
                f"not an answer of /v1/chat/completions: {self._excerpt(answer)}"
            ) from problem
        if not isinstance(content, str):
            raise _Retry(f"an answer without text: {self._excerpt(answer)}")
        return content

    def _excerpt(self, answer: bytes) -> str:
        """The beginning of an answer for a message, without the key, which servers like to
        quote.
        """
        text = answer[:2000].decode("utf-8", "replace")
        return (text.replace(self._key, "***") if self._key else text)[:200]

    def _exchange(self, body: bytes) -> tuple[int, float | None, bytes]:
        """(status, Retry-After in seconds, body) of one request. A watchdog cuts the connection at
        the time-out.
        """
        connection, reused = self._thread.connection, True
        if connection is None:
            kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
            connection, reused = (
                kind(self._host, self._port, timeout=self.server.timeout_seconds),
                False,
            )
            self._thread.connection = connection
        late = threading.Event()

        def cut() -> None:
            late.set()
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

        watchdog = threading.Timer(self.server.timeout_seconds, cut)
        watchdog.daemon = True
        watchdog.start()
        with self._lock:
            self._under_way.add(cut)
        try:
            connection.request("POST", self._path, body, self._headers)
            response = connection.getresponse()
            answer = response.read(_LARGEST_ANSWER)
        except (OSError, http.client.HTTPException) as problem:
            connection.close()
            self._thread.connection = None
            if late.is_set():
                raise TimeoutError(
                    f"no answer within {self.server.timeout_seconds:g} seconds"
                ) from problem
            if reused and isinstance(
                problem, (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError)
            ):
                return self._exchange(body)  # the server had closed an idle connection
            raise
        finally:
            watchdog.cancel()
            with self._lock:
                self._under_way.discard(cut)
        if not response.isclosed() or response.will_close:
            connection.close()
            self._thread.connection = None
        return response.status, _retry_after(response.getheader("Retry-After")), answer


class HttpJudge(Judge):
    """A vision model behind a server. `max_failures`: see `Judge`."""

    def __init__(self, server: Server, cache: VerdictCache, max_failures: int):
        prompt = f"{PROMPT_BEFORE}\n{PROMPT_BETWEEN}\n{PROMPT_AFTER}"
        super().__init__(
            "http", f"{server.model}\n{server.max_tokens}\n{prompt}", cache, max_failures
        )
        self._client = ChatClient(server, self._count_retry)
        self._threads = ThreadPoolExecutor(server.in_flight, thread_name_prefix="judge")

    def ask(self, target: bytes, render: np.ndarray, answer: Answer) -> None:
        self._threads.submit(lambda: answer(self._judge(target, render)))

    def _judge(self, target: bytes, render: np.ndarray) -> Verdict:
        if self._is_down:
            return Verdict(None, problem="the judge is down")
        try:
            content = question(target, png_bytes(render))
            return verdict(self._client.ask([{"role": "user", "content": content}]))
        except NoAnswer as problem:
            if problem.fatal:
                self._give_up(str(problem))
            return Verdict(None, problem=str(problem))
        except Exception as problem:  # whatever it is, the trainer waits for a verdict
            return Verdict(None, problem=f"{type(problem).__name__}: {problem}")

    def close(self) -> None:
        self._client.close()
        self._threads.shutdown()
        super().close()


def question(target: bytes, render: bytes) -> list[dict[str, Any]]:
    """The user's message: both pictures (PNG bytes) as data URLs with our instructions around
    them.
    """
    return [
        {"type": "text", "text": PROMPT_BEFORE},
        {"type": "image_url", "image_url": {"url": _data_url(target)}},
        {"type": "text", "text": PROMPT_BETWEEN},
        {"type": "image_url", "image_url": {"url": _data_url(render)}},
        {"type": "text", "text": PROMPT_AFTER},
    ]


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _retry_after(value: str | None) -> float | None:
    """Seconds in a Retry-After header, which holds a number or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None

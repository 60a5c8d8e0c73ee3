"""A judge behind any server that speaks `/v1/chat/completions` (vLLM, SGLang, llama.cpp, a
vendor's).

`ChatClient` asks one question: time-outs that end the connection, retries with growing pauses,
`Retry-After` obeyed. `HttpJudge` has many questions in flight, in threads: they wait for sockets
while the accelerator decodes.

The server's key comes from an environment variable and goes into one header; it is in no message,
log or file. So a key that no header can hold is refused before a library quotes it, an address may
hold no password, and whatever a server or a proxy says is shown without any part of the key.
"""

import base64
import contextlib
import dataclasses
import email.utils
import http.client
import json
import os
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.rl.judge.answers import POINTS_QUESTION, Question, cut_off
from mmrecoder_jax.rl.judge.base import Answer, Judge, Verdict, VerdictCache

_REFUSED = (401, 403, 404)  # no other question will fare better
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_PAUSE = 60.0  # seconds, also of a Retry-After
_LARGEST_ANSWER = 4 << 20  # bytes
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_LONGEST_EXCERPT = 200  # characters of what a server says, in a message
_TELLING = 6  # characters in a row of the key that no message shows


class NoAnswer(Exception):
    """A question stayed without an answer; `fatal` when every other one would, too."""

    def __init__(self, problem: str, fatal: bool = False):
        super().__init__(problem)
        self.fatal = fatal


class AnswerCut(NoAnswer):
    """The answer was longer than `Server.max_tokens`."""


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

    Raises ConfigError for an address that is none, or a key that cannot be sent.
    """

    def __init__(self, server: Server, on_retry: Callable[[], None] = lambda: None):
        check_address("judge.url", server.url)
        check_variable("judge.key_variable", server.key_variable)
        parts = urllib.parse.urlsplit(server.url)
        self.server = server
        self._secure, self._host = parts.scheme == "https", parts.hostname or ""
        self._port = parts.port or (443 if self._secure else 80)
        self._path = parts.path.rstrip("/") + "/chat/completions"
        self._on_retry = on_retry
        self._closed = threading.Event()
        self._thread = _Thread()
        self._under_way: set[Callable[[], None]] = set()  # each cuts a connection
        self._lock = threading.Lock()
        key = read_key(server.key_variable)
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._key = key

    def ask(self, messages: Sequence[dict[str, Any]], whole: bool = False) -> str:
        """The text of the answer, at temperature 0.

        Raises:
          AnswerCut: `whole` was asked for, and the answer's limit cut it.
          NoAnswer: there is none.
        """
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
                return self._attempt(body, whole)
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

    def shown(self, text: str) -> str:
        """The beginning of a text for a message: printable, and without any part of the key, which
        servers and proxies like to quote.
        """
        text = "".join(c if c.isprintable() else " " for c in text[:2000])
        length = min(_TELLING, len(self._key))
        if length:
            telling = {self._key[i : i + length] for i in range(len(self._key) - length + 1)}
            telling = {part.casefold() for part in telling}
            starts = [i for i in range(len(text)) if text[i : i + length].casefold() in telling]
            hidden = {i + j for i in starts for j in range(length)}
            text = "".join("\0" if i in hidden else c for i, c in enumerate(text))
            text = re.sub("\0+", "***", text)
        return text[:_LONGEST_EXCERPT]

    def _attempt(self, body: bytes, whole: bool) -> str:
        try:
            status, after, answer = self._exchange(body)
        except (OSError, http.client.HTTPException) as problem:
            raise _Retry(self.shown(f"{type(problem).__name__}: {problem}")) from None
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
            choice = json.loads(answer)["choices"][0]
            text, refusal = _said(choice["message"]), choice["message"].get("refusal")
            is_cut = choice.get("finish_reason") == "length"
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise _Retry(
                f"not an answer of /v1/chat/completions: {self._excerpt(answer)}"
            ) from None
        if text is None and refusal:  # asked again, it would refuse again
            raise NoAnswer(self.shown(f"the judge refuses: {refusal}"))
        if is_cut and whole:
            raise AnswerCut(f"longer than {self.server.max_tokens} tokens")
        if text is None:
            raise _Retry(f"an answer without text: {self._excerpt(answer)}")
        return text

    def _excerpt(self, answer: bytes) -> str:
        return self.shown(answer[:8000].decode("utf-8", "replace"))

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
    """A vision model behind a server, asked `asked`. `max_failures`: see `Judge`."""

    def __init__(
        self,
        server: Server,
        cache: VerdictCache,
        max_failures: int,
        asked: Question = POINTS_QUESTION,
    ):
        super().__init__(
            asked.judge("http"),
            f"{server.model}\n{server.max_tokens}\n{asked.prompt}",
            cache,
            max_failures,
        )
        self._asked = asked
        self._client = ChatClient(server, self._count_retry)
        self._threads = ThreadPoolExecutor(server.in_flight, thread_name_prefix="judge")

    def ask(self, target: bytes, render: np.ndarray, answer: Answer) -> None:
        self._threads.submit(lambda: answer(self._judge(target, render)))

    def _judge(self, target: bytes, render: np.ndarray) -> Verdict:
        if self._is_down:
            return Verdict(None, problem="the judge is down")
        try:
            content = question(target, png_bytes(render), self._asked)
            answer = self._client.ask([{"role": "user", "content": content}], whole=True)
            found = self._asked.read(answer)
            return dataclasses.replace(found, problem=self._client.shown(found.problem))
        except AnswerCut:
            return cut_off(self._client.server.max_tokens)
        except NoAnswer as problem:
            if problem.fatal:
                self._give_up(str(problem))
            return Verdict(None, problem=str(problem))
        except Exception as problem:  # whatever it is, the trainer waits for a verdict
            return Verdict(None, problem=self._client.shown(f"{type(problem).__name__}: {problem}"))

    def close(self) -> None:
        self._client.close()
        self._threads.shutdown()
        super().close()


def check_address(field: str, value: str) -> None:
    """Raises ConfigError for an address that no server has, or that holds a secret.

    Args:
      field: the field or flag that the address is from.
    """
    if any(sign in value for sign in "@?#"):
        raise ConfigError(
            f"{field}: a user name, a password or a query in an address would be in config.json "
            "and in messages (it is not shown here); put the key into an environment variable and "
            "name that in judge.key_variable"
        )
    problem = ConfigError(f"{field}={value!r}: give an address like http://localhost:8000/v1")
    try:
        parts = urllib.parse.urlsplit(value)
        port = parts.port
    except ValueError:
        raise problem from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise problem
    if not all("!" <= sign <= "~" for sign in value):  # no request could hold it
        raise problem


def check_variable(field: str, value: str) -> None:
    """Raises ConfigError for what cannot name an environment variable, without showing it: it may
    be the key itself.

    Args:
      field: the field or flag that the name is from; an empty name is none.
    """
    if value and not _VARIABLE.fullmatch(value):
        raise ConfigError(
            f"{field}: the name of an environment variable has letters, digits and _ (this value "
            "is not shown, as it may be the key itself); put the key into a variable and name that"
        )


def read_key(variable: str) -> str:
    """The key in an environment variable, "" for none.

    Raises:
      ConfigError: no header can hold it; the message does not show it.
    """
    key = os.environ.get(variable, "") if variable else ""
    for number, sign in enumerate(key, 1):
        if not "!" <= sign <= "~":
            kind = "a line end" if sign in "\r\n" else "a space" if sign == " " else "no ASCII sign"
            raise ConfigError(
                f"judge.key_variable={variable!r}: the key in it cannot be sent: its character "
                f'{number} is {kind}; set it again, e.g. export {variable}="$(cat FILE)", which '
                "takes line ends off"
            )
    return key


def _said(message: dict[str, Any]) -> str | None:
    """The text of a message, None where there is none: `content` is a text or a list of parts.

    Parts that are no answer (what a model thought, a picture, a call) are left out.
    """
    content = message.get("content")
    if isinstance(content, list):
        parts = [{"text": part} if isinstance(part, str) else part for part in content]
        kinds = ("text", "output_text")
        texts = [part["text"] for part in parts if part.get("type", "text") in kinds]
        content = "".join(texts) if texts else None
    if content is not None and not isinstance(content, str):
        raise TypeError("the content is neither a text nor parts")
    return content


def question(
    target: bytes, render: bytes, asked: Question = POINTS_QUESTION
) -> list[dict[str, Any]]:
    """The user's message: both pictures (PNG bytes) as data URLs with our instructions around
    them.
    """
    return [
        {"type": "text", "text": asked.before},
        {"type": "image_url", "image_url": {"url": _data_url(target)}},
        {"type": "text", "text": asked.between},
        {"type": "image_url", "image_url": {"url": _data_url(render)}},
        {"type": "text", "text": asked.after},
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
    except (ValueError, OverflowError, OSError):
        return None

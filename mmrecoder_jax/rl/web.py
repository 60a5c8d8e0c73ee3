"""Questions to an HTTP server: time-outs that end the connection, retries with growing pauses,
`Retry-After` obeyed.

The server's key comes from an environment variable and goes into one header; it is in no message,
log or file. So a key that no header can hold is refused before a library quotes it, an address may
hold no password, and whatever a server or a proxy says is shown without any part of the key.
"""

import contextlib
import dataclasses
import email.utils
import http.client
import os
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import TypeVar

from mmrecoder_jax.config import ConfigError

T = TypeVar("T")

_REFUSED = (401, 403, 404)  # no other question will fare better
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_PAUSE = 60.0  # seconds, also of a Retry-After
_LARGEST_ANSWER = 4 << 20  # bytes
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_LONGEST_EXCERPT = 200  # characters of what a server says, in a message
_TELLING = 6  # characters in a row of the key that no message shows


class ServerDown(RuntimeError):
    """A server that a run cannot do without fails; the message says which, why, and what to do."""


class NoAnswer(Exception):
    """A question stayed without an answer; `fatal` when every other one would, too."""

    def __init__(self, problem: str, fatal: bool = False):
        super().__init__(problem)
        self.fatal = fatal


class BadAnswer(Exception):
    """This attempt failed, and another may not; `after` is what the server asks to wait, in
    seconds.
    """

    def __init__(self, problem: str, after: float | None = None):
        super().__init__(problem)
        self.after = after


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a server is, and how patient to be with it.

    Attributes:
      section: of the configuration, whose fields `url` and `key_variable` messages name.
      url: what stands before the path of a question.
      key_variable: environment variable that holds the key; no key is sent if it is unset or empty.
      timeout_seconds: for one attempt, from connecting to the last byte.
      retries: further attempts after the first.
      remedy: what to check where a server refuses every question.
      pause_seconds: before the first retry; it doubles each time, up to a minute.
    """

    section: str
    url: str
    key_variable: str
    timeout_seconds: float
    retries: int
    remedy: str
    pause_seconds: float = 1.0


class _Thread(threading.local):
    """A thread's open connection."""

    connection: http.client.HTTPConnection | None = None


class Client:
    """Asks a server, one question at a time in each thread; keeps a thread's connection open
    between questions.

    Raises ConfigError for an address that is none, or a key that cannot be sent.
    """

    def __init__(self, address: Address, on_retry: Callable[[], None] = lambda: None):
        check_address(f"{address.section}.url", address.url)
        variable = f"{address.section}.key_variable"
        check_variable(variable, address.key_variable)
        parts = urllib.parse.urlsplit(address.url)
        self.address = address
        self._secure, self._host = parts.scheme == "https", parts.hostname or ""
        self._port = parts.port or (443 if self._secure else 80)
        self._path = parts.path.rstrip("/")
        self._on_retry = on_retry
        self._closed = threading.Event()
        self._thread = _Thread()
        self._under_way: set[Callable[[], None]] = set()  # each cuts a connection
        self._lock = threading.Lock()
        key = read_key(address.key_variable, variable)
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._key = key

    def post(
        self,
        path: str,
        body: bytes,
        read: Callable[[bytes], T],
        begin: Callable[[], Callable[[bytes], None]] | None = None,
    ) -> T:
        """What `read` makes of the answer.

        Args:
          path: below the address, such as "/chat/completions".
          body: of the question, JSON.
          read: raises BadAnswer for what is asked again.
          begin: is called for every attempt; what it returns is given the answer line by line, as
            the lines come.

        Raises:
          NoAnswer: there is none, or the server refuses; also what else `read` raises.
        """
        address, problem = self.address, ""
        for attempt in range(address.retries + 1):
            if attempt:
                self._on_retry()
            if self._closed.is_set():
                raise NoAnswer(f"the {address.section} was closed")
            try:
                return read(self._attempt(path, body, begin and begin()))
            except BadAnswer as failed:
                problem = self._hidden(str(failed))
                pause = (
                    failed.after if failed.after is not None else address.pause_seconds * 2**attempt
                )
            if attempt < address.retries:
                self._closed.wait(min(pause, _LONGEST_PAUSE))
        raise NoAnswer(f"{problem} ({address.retries + 1} attempts)")

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
        return self._hidden(text)[:_LONGEST_EXCERPT]

    def _hidden(self, text: str) -> str:
        text = "".join(c if c.isprintable() else " " for c in text[:2000])
        length = min(_TELLING, len(self._key))
        if length:
            telling = {self._key[i : i + length] for i in range(len(self._key) - length + 1)}
            telling = {part.casefold() for part in telling}
            starts = [i for i in range(len(text)) if text[i : i + length].casefold() in telling]
            hidden = {i + j for i in starts for j in range(length)}
            text = "".join("\0" if i in hidden else c for i, c in enumerate(text))
            text = re.sub("\0+", "***", text)
        return text

    def excerpt(self, answer: bytes) -> str:
        """The beginning of an answer, as `shown`."""
        return self.shown(answer[:8000].decode("utf-8", "replace"))

    def _attempt(self, path: str, body: bytes, line: Callable[[bytes], None] | None) -> bytes:
        try:
            status, after, answer = self._exchange(path, body, line)
        except (OSError, http.client.HTTPException) as problem:
            raise BadAnswer(self.shown(f"{type(problem).__name__}: {problem}")) from None
        if status in _AGAIN:
            raise BadAnswer(f"HTTP {status}: {self.excerpt(answer)}", after)
        if status != 200:
            hint = f" ({self.address.remedy})" if status in _REFUSED else ""
            raise NoAnswer(f"HTTP {status}: {self.excerpt(answer)}{hint}", status in _REFUSED)
        return answer

    def _exchange(
        self, path: str, body: bytes, line: Callable[[bytes], None] | None
    ) -> tuple[int, float | None, bytes]:
        """(status, Retry-After in seconds, body) of one request. A watchdog cuts the connection at
        the time-out.
        """
        seconds = self.address.timeout_seconds
        connection, reused = self._thread.connection, True
        if connection is None:
            kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
            connection, reused = kind(self._host, self._port, timeout=seconds), False
            self._thread.connection = connection
        late = threading.Event()

        def cut() -> None:
            late.set()
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

        watchdog = threading.Timer(seconds, cut)
        watchdog.daemon = True
        watchdog.start()
        with self._lock:
            self._under_way.add(cut)
        try:
            connection.request("POST", self._path + path, body, self._headers)
            response = connection.getresponse()
            if line is None or response.status != 200:
                answer = response.read(_LARGEST_ANSWER)
            else:
                answer = b"".join(_lines(response, line))
        except (OSError, http.client.HTTPException) as problem:
            connection.close()
            self._thread.connection = None
            if late.is_set() or isinstance(problem, TimeoutError):  # whichever clock was first
                raise TimeoutError(f"no answer within {seconds:g} seconds") from problem
            if reused and isinstance(
                problem, (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError)
            ):
                return self._exchange(path, body, line)  # the server had closed an idle connection
            raise
        finally:
            watchdog.cancel()
            with self._lock:
                self._under_way.discard(cut)
        if not response.isclosed() or response.will_close:
            connection.close()
            self._thread.connection = None
        return response.status, _retry_after(response.getheader("Retry-After")), answer


def _lines(response: http.client.HTTPResponse, line: Callable[[bytes], None]) -> Iterator[bytes]:
    """The lines of an answer, each told to `line` when it is there."""
    left = _LARGEST_ANSWER
    while left > 0 and (found := response.readline(left)):
        left -= len(found)
        line(found)
        yield found


def check_address(
    field: str, value: str, like: str = "http://localhost:8000/v1", variable: str = ""
) -> None:
    """Raises ConfigError for an address that no server has, or that holds a secret.

    Args:
      field: the field or flag that the address is from.
      like: an address that it may be.
      variable: the field or flag that names the variable of the key; `key_variable` beside `field`
        where it is not given.
    """
    variable = variable or f"{field.rpartition('.')[0]}.key_variable"
    if any(sign in value for sign in "@?#"):
        raise ConfigError(
            f"{field}: a user name, a password or a query in an address would be in config.json "
            "and in messages (it is not shown here); put the key into an environment variable and "
            f"name that in {variable}"
        )
    problem = ConfigError(f"{field}={value!r}: give an address like {like}")
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


def read_key(variable: str, field: str) -> str:
    """The key in an environment variable, "" for none.

    Args:
      field: that names the variable.

    Raises:
      ConfigError: no header can hold it; the message does not show it.
    """
    key = os.environ.get(variable, "") if variable else ""
    for number, sign in enumerate(key, 1):
        if not "!" <= sign <= "~":
            kind = "a line end" if sign in "\r\n" else "a space" if sign == " " else "no ASCII sign"
            raise ConfigError(
                f"{field}={variable!r}: the key in it cannot be sent: its character "
                f'{number} is {kind}; set it again, e.g. export {variable}="$(cat FILE)", which '
                "takes line ends off"
            )
    return key


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

"""Executors of other machines: what a pool does with the hosts of `EnvConfig.hosts`.

    keeper ── host      asks every few seconds whether the host lives, and opens lanes when scripts
                        wait; tries again, with pauses that double, where it does not
    lane   ── host      one executor there: comes for a script, asks for room, takes the script,
                        sends it, reads the answer

Each line is a thread and a `Channel`. What is said on a lane (`env/host.py` is the other side):

    trainer: {"bubblewrap": true}           host: {"executors": 16, "like": {...}}
    trainer: {"settings": {...}}            host: BEAT ..., READY, or what "failed", or FULL
    trainer: WANT                           host: BEAT ..., ROOM
    trainer: {"run": 7, ...}, or UNWANT     host: BEAT ..., {"number": 7, "outcome": {...}} with
                                                  claim and packed pixels, or {"number": 7,
                                                  "lost": true}
    trainer: PING                           host: BEAT

A script is this side's until its answer is here and fits: where a host dies, hangs, is silent or
says what cannot be, the script goes back to the front of the backlog, and is answered once, by
whoever runs it next. Running it twice does no harm, as a result follows from the code.
"""

import contextlib
import ipaddress
import itertools
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

from mmrecoder_jax.env import channel, wire
from mmrecoder_jax.env.backlog import Backlog, Job
from mmrecoder_jax.env.channel import BEAT, Channel, Refused, longest_packed, printable, unpack
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.likeness import BUBBLEWRAP, CHART, differences, drawn
from mmrecoder_jax.env.local import (
    GRACE_SECONDS,
    MORE_PROCESSES,
    START_SECONDS,
    Answer,
    ExecutorError,
    settings,
)
from mmrecoder_jax.env.wire import End, Outcome, Request

WANT, UNWANT, ROOM = {"want": True}, {"want": False}, {"room": True}
PING, READY, FULL = {"ping": True}, {"ready": True}, {"full": True}
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds until a host is tried again
_CONNECT_SECONDS = 3.0
_GREET_SECONDS = 10.0
_TRY_SECONDS = 30.0  # for a host's first executor, when a pool starts
_PING_SECONDS = 5.0
_LOOK_SECONDS = 0.1  # between two looks whether scripts wait
_PROMPT_SECONDS = 0.2  # a host without room by then has others to serve
_FULL_SECONDS = 5.0  # until a host is asked for another executor that has none
_LANE_PING_SECONDS = 60.0  # between two words on a lane without a script
_IDLE_SECONDS = 600.0  # such a lane is closed, and its executor ends; an update takes minutes
_LONGEST_WORDS = 1 << 16  # bytes of what a host says, but for claim and pixels
_CLOSE_SECONDS = 5.0
_MOST_EXECUTORS = 4096
_WORDS = (_LONGEST_WORDS, 0, 0)
_LONG = 1e6  # seconds: as long as it says that it has no room
_UNASKED = "it says what it was not asked"
_LONGEST_FACT = 100  # characters
_MOST_FACTS = 64
_SPARE_BEATS = 10


class HostsError(ValueError):
    """Hosts that cannot be used as they are configured; the message is for users."""


class _Down(Exception):
    """A host cannot be used for now; the message says why."""


class _Full(Exception):
    """A host has all the connections that it takes."""


class Host:
    """What is known of one host. Its fields are guarded by the lock of its `Hosts`.

    Attributes:
      address: "name:port", as the user wrote it.
      is_joined: its keeper is connected.
      is_compared: its drawing is ours.
      works: it has executed something since it was set aside.
      executors: how many it lends.
      lanes, starting: connections that are open, and those of them whose executor starts.
      until: when it may be tried again, on the monotonic clock.
      full_until: when another lane may be opened.
      problem: what was wrong with it last; "" after an answer.
    """

    def __init__(self, address: str):
        self.address = address
        self.is_joined = self.is_compared = self.works = False
        self.executors = self.lanes = self.starting = 0
        self.until = self.full_until = 0.0
        self.pause = FIRST_PAUSE
        self.problem = ""
        self.was_named = False

    @property
    def is_up(self) -> bool:
        return self.is_joined and time.monotonic() >= self.until


class Hosts:
    """The hosts of one pool, and the threads that bring scripts there.

    Args:
      config: of the pool.
      secret: that the hosts know too.
      like: what they must be like (`likeness`).
      backlog: of the pool.
      accept: takes a job and the answer of the host of that address; whether the answer fits
        together. The job is settled, or back in the backlog.
      lose: takes a job that was lost.
      give_up: takes an error for all who wait, where nobody is left to run a script.
      say: shows a line to the user.
    """

    def __init__(
        self,
        config: EnvConfig,
        secret: bytes,
        like: dict[str, str],
        backlog: Backlog,
        accept: Callable[[Job, Answer, str], bool],
        lose: Callable[[Job], None],
        give_up: Callable[[ExecutorError], None],
        say: Callable[[str], None],
    ):
        self._config, self._secret, self._backlog = config, secret, backlog
        self._accept, self._lose, self._give_up, self._say = accept, lose, give_up, say
        self._like = dict(like)
        if not config.workers:  # nothing runs here: the first host says how it is there
            del self._like[BUBBLEWRAP]
        self._drawing = ""  # what all draw; "": not known yet
        self._hosts = {address: Host(address) for address in config.hosts}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._channels: set[Channel] = set()
        self._threads: list[threading.Thread] = []
        self._counts: dict[str, int] = dict.fromkeys(("hosts_lied", "hosts_lost"), 0)
        self._answers = dict.fromkeys(config.hosts, 0)
        self._numbers = itertools.count()
        self._down_since = time.monotonic()
        self._tried: list[Future[None]] = []

    def expect(self, answer: Answer) -> None:
        """Takes what an executor of this machine answers for `CHART`, before `start`."""
        if answer.outcome.end == End.EXIT:  # else a limit was in its way
            self._drawing = drawn(answer)

    def start(self) -> None:
        """Begins to connect to all of them."""
        for host in self._hosts.values():
            tried: Future[None] = Future()
            self._tried.append(tried)
            self._begin(self._keep, host, tried)

    def wait(self) -> None:
        """Waits until each was tried once; where the pool has no other executors, for one.

        Raises:
          ExecutorError: a host refuses us or is not like this machine, or none is there in time.
        """
        for tried in self._tried:
            with contextlib.suppress(TimeoutError):  # it has others to serve
                tried.result(_TRY_SECONDS)
        if self._config.workers:
            return
        deadline = time.monotonic() + START_SECONDS
        while not any(host.is_joined for host in self._hosts.values()):
            if time.monotonic() > deadline:
                raise self._nobody()
            self._closing.wait(_LOOK_SECONDS)

    def stats(self) -> dict[str, float]:
        """Counts since the start: hosts_lied, hosts_lost (scripts), host_<address> (answers).

        And hosts_up, now.
        """
        with self._lock:
            return {
                **self._counts,
                **{f"host_{address}": count for address, count in self._answers.items()},
                "hosts_up": sum(host.is_up for host in self._hosts.values()),
            }

    def lied(self, address: str, problem: str) -> None:
        """Sets a host aside whose answer was found to be wrong."""
        self._set_aside(self._hosts[address], problem, is_lie=True)

    def close(self) -> None:
        """Ends all connections."""
        self._closing.set()
        with self._lock:
            for each in self._channels:
                each.shut()
            threads = list(self._threads)
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in threads:  # one that looks up a name cannot be woken, and is left
            thread.join(max(0.0, deadline - time.monotonic()))

    # ------------------------------------------------------------------------------- the keeper

    def _keep(self, host: Host, tried: Future[None]) -> None:
        while not self._closing.is_set():
            try:
                with self._dial(host) as line:
                    self._join(host)
                    self._watch(host, line, tried)
            except Refused as problem:
                self._refuse(host, str(problem), tried)
            except (_Down, OSError, EOFError) as problem:
                self._set_aside(host, _in_words(problem))
            except ValueError as problem:
                self._set_aside(host, _in_words(problem), is_lie=True)
            host.is_joined = False
            _resolve(tried)
            self._check_that_somebody_is_left()
            self._closing.wait(max(0.0, host.until - time.monotonic()))

    def _join(self, host: Host) -> None:
        with self._lock:
            host.is_joined, host.is_compared = True, False
            is_new = not host.was_named
            host.was_named = True
        if is_new:
            self._say(f"executor host {host.address} lends executors: {host.executors}")

    def _watch(self, host: Host, line: Channel, tried: Future[None]) -> None:
        """Opens lanes as scripts wait; returns by an exception, when the host does not answer."""
        wanted = 1  # one at once: it shows whether executors start there, and draw as ours
        while not self._closing.is_set():
            _ping(line)
            self._check_that_somebody_is_left()
            due = time.monotonic() + _PING_SECONDS
            while time.monotonic() < due and not self._closing.is_set():
                if line.wait(0):  # its end, as nothing else may come
                    line.receive(channel.SILENCE_SECONDS, _WORDS)
                    raise ValueError(_UNASKED)
                with self._lock:
                    may_open = time.monotonic() >= max(host.until, host.full_until)
                    free = host.executors - host.lanes if may_open else 0
                    needed = max(self._backlog.shortage, wanted) - host.starting
                    count = max(0, min(free, needed))
                for _ in range(count):
                    self._open_lane(host, tried)
                wanted = 0 if count else wanted
                self._closing.wait(_LOOK_SECONDS)

    def _open_lane(self, host: Host, tried: Future[None]) -> None:
        with self._lock:
            host.lanes += 1
            host.starting += 1
        try:
            self._begin(self._run_lane, host, tried)
        except ExecutorError as problem:
            with self._lock:
                host.lanes -= 1
                host.starting -= 1
            raise _Down(str(problem)) from problem

    def _refuse(self, host: Host, problem: str, tried: Future[None]) -> None:
        """Sets a host aside that is not configured as it should be; an error at the start."""
        is_first = _resolve(tried, ExecutorError(_of(host, printable(problem))))
        self._set_aside(host, problem, is_said=not is_first)

    def _set_aside(
        self, host: Host, problem: str, is_lie: bool = False, is_said: bool = True
    ) -> None:
        """Leaves a host alone for a while, longer each time until it has answered; says so once."""
        if self._closing.is_set():
            return
        problem = printable(problem)
        now = time.monotonic()
        with self._lock:
            self._counts["hosts_lied"] += is_lie
            host.was_named = True
            is_new = not host.problem
            host.problem = problem
            host.works = False
            if now >= host.until:  # else another lane has just met the same
                host.until = now + host.pause
                host.pause = min(2 * host.pause, LONGEST_PAUSE)
        if is_new and is_said:
            self._say(f"{_of(host, problem)}; its scripts run elsewhere, and it is tried again")

    def _check_that_somebody_is_left(self) -> None:
        if self._config.workers or self._closing.is_set():
            return
        now = time.monotonic()
        with self._lock:
            if any(host.is_joined and host.works for host in self._hosts.values()):
                self._down_since = now
            since = max(self._down_since, self._backlog.waiting_since)
        if now > since + START_SECONDS:
            self._give_up(self._nobody())

    def _nobody(self) -> ExecutorError:
        problems = "; ".join(_of(host, host.problem) for host in self._hosts.values())
        return ExecutorError(
            f"no host of env.hosts can be used ({problems}): start `python -m "
            "mmrecoder_jax.env.serve` there, or set env.workers above 0"
        )

    # --------------------------------------------------------------------------------- the lanes

    def _run_lane(self, host: Host, tried: Future[None]) -> None:
        is_starting = True
        try:
            with self._dial(host) as line:
                self._prepare(line)
                if not host.is_compared:
                    self._compare_drawings(host, line)
                _resolve(tried)
                is_starting = False
                with self._lock:
                    host.starting -= 1
                while self._bring_one(host, line):
                    pass
        except _Full:
            host.full_until = time.monotonic() + _FULL_SECONDS
        except Refused as problem:
            self._refuse(host, str(problem), tried)
        except (_Down, OSError, EOFError) as problem:
            self._set_aside(host, _in_words(problem))
        except (ValueError, KeyError, TypeError) as problem:
            self._set_aside(host, f"it says what cannot be ({problem})", is_lie=True)
        finally:
            _resolve(tried)
            with self._lock:
                host.lanes -= 1
                host.starting -= is_starting

    def _prepare(self, line: Channel) -> None:
        """Waits for the executor at the other end."""
        line.send({"settings": settings(self._config, "").to_json()})
        words = _behind_beats(line, START_SECONDS)[0]
        if words == FULL:
            raise _Full
        if words != READY:
            raise _Down(f"an executor does not start there: {_text(words, 'failed')}")

    def _compare_drawings(self, host: Host, line: Channel) -> None:
        """Raises Refused where the executor at the other end draws another chart than all."""
        line.send(WANT)
        if _behind_beats(line, _LONG)[0] != ROOM:
            raise ValueError(_UNASKED)
        answer = self._ask(line, CHART, watched=False)
        if answer is None or answer.outcome.end != End.EXIT:
            raise _Down("an executor cannot draw a simple chart there, within the limits of env")
        with self._lock:
            self._drawing = self._drawing or drawn(answer)
            host.is_compared = host.works = self._drawing == drawn(answer)
        if not host.is_compared:
            raise Refused(
                "it draws another chart of the same script: install the same builds of the same "
                "libraries on both machines, or take it out of env.hosts"
            )

    def _bring_one(self, host: Host, line: Channel) -> bool:
        """Waits for a script and has it run there; False when this lane should end."""
        deadline = time.monotonic() + _IDLE_SECONDS
        while not self._backlog.come(_LANE_PING_SECONDS):
            if self._closing.is_set() or time.monotonic() > deadline:
                return False
            _ping(line)
        job = None
        is_counted = True
        try:
            if not host.is_up:
                return False
            line.send(WANT)
            words = BEAT
            if line.wait(_PROMPT_SECONDS):
                words = line.receive(channel.SILENCE_SECONDS, _WORDS)[0]
            if words == BEAT:  # it has no room yet: the script is left to others
                self._backlog.stay_away()
                is_counted = False
                words = _behind_beats(line, _LONG)[0]
            if words != ROOM:
                raise ValueError(_UNASKED)
            others = any(each.is_up for each in self._hosts.values() if each is not host)
            job = self._backlog.take(host.address if others else "")
        finally:
            if is_counted:
                self._backlog.stay_away()
        if job is None:
            line.send(UNWANT)
            self._closing.wait(_LOOK_SECONDS)  # what is left is for others
            return True
        try:
            answer = self._ask(line, job.request, job.watched)
        except BaseException:
            self._count_loss(job)
            raise
        if answer is None:
            self._count_loss(job)
        elif self._accept(job, answer, host.address):
            self._answered(host)
        return True

    def _ask(self, line: Channel, request: Request, watched: bool) -> Answer | None:
        """The answer for one script; None where the executor over there died."""
        number = next(self._numbers)
        line.send({"run": number, "watched": watched, **request.to_json()})
        # A script, and a replay of what it drew.
        seconds = 2 * self._config.wall_seconds + GRACE_SECONDS
        longest = 4 * self._config.max_pixels
        most = (_LONGEST_WORDS, wire.MAX_CLAIM_BYTES, longest_packed(longest))
        words, claim, packed = _behind_beats(line, seconds, most)
        if words["number"] != number:
            raise ValueError("an answer for a script that it was not asked")
        if words.get("lost") is True:
            return None
        return Answer(_outcome(words["outcome"], watched), claim, unpack(packed, longest))

    def _count_loss(self, job: Job) -> None:
        with self._lock:
            self._counts["hosts_lost"] += 1
        self._lose(job)

    def _answered(self, host: Host) -> None:
        with self._lock:
            self._answers[host.address] += 1
            is_back = bool(host.problem)
            host.problem, host.pause, host.works = "", FIRST_PAUSE, True
        if is_back:
            self._say(f"executor host {host.address} is back")

    # -------------------------------------------------------------------------------- connections

    @contextlib.contextmanager
    def _dial(self, host: Host) -> Iterator[Channel]:
        """A connection to a host that knows the secret and is like this machine.

        Raises:
          Refused: it has another secret, or is not like this machine.
          _Down: it cannot be reached, or is no executor host.
        """
        try:
            sock = socket.create_connection(parse_address(host.address), _CONNECT_SECONDS)
        except OSError as problem:
            raise _Down(f"it cannot be reached ({problem.strerror or problem})") from problem
        line = Channel(sock)
        with self._lock:
            self._channels.add(line)
        try:
            try:
                if self._closing.is_set():
                    raise _Down("the pool is closed")
                line.enter(self._secret, _GREET_SECONDS)
                line.send({"bubblewrap": self._config.bubblewrap})
                words = line.receive(_GREET_SECONDS, _WORDS)[0]
                executors, like = words["executors"], words["like"]
                if not _is_number(executors, _MOST_EXECUTORS) or not _is_texts(like):
                    raise ValueError("no executors, or no facts of them")
            except (EOFError, ValueError, KeyError, TypeError) as problem:
                raise _Down(f"no executor host of this version answers ({problem})") from problem
            self._compare(like)
            host.executors = executors
            yield line
        finally:
            with self._lock:
                self._channels.discard(line)
            line.close()

    def _compare(self, like: dict[str, str]) -> None:
        with self._lock:
            wanted = {BUBBLEWRAP: like.get(BUBBLEWRAP, ""), **self._like}
            found = differences(like, wanted)
            if not found:
                self._like = wanted
        if found:
            raise Refused(
                f"{', '.join(found)}: its results would differ; install the same on both machines, "
                "or take it out of env.hosts"
            )

    def _begin(self, work: Callable[..., None], *arguments: Any) -> None:
        """Starts a thread; raises ExecutorError where there are too many."""
        thread = threading.Thread(target=work, args=arguments, name="executor host", daemon=True)
        with self._lock:
            self._threads = [each for each in self._threads if each.is_alive()]
            try:
                thread.start()
            except RuntimeError as problem:
                raise ExecutorError(f"a thread cannot be started: {MORE_PROCESSES}") from problem
            self._threads.append(thread)


def check_hosts(hosts: Sequence[str], workers: int, secret: str) -> None:
    """Checks these fields of an `EnvConfig` together.

    Raises:
      HostsError: there is nobody to run a script, or a host needs a secret.
    """
    if not workers and not hosts:
        raise HostsError("env.workers=0 and no env.hosts: set one of them")
    for address in hosts:
        try:
            name, port = parse_address(address)
            if not port:
                raise ValueError("a host has a port above 0")
        except ValueError as problem:
            raise HostsError(f"env.hosts: {address!r}: {problem}") from problem
        if not secret and not is_this_machine(name):
            raise HostsError(
                f"env.hosts: {address!r} is another machine, which needs env.secret: name the file "
                "that `python -m mmrecoder_jax.env.serve --new-secret=FILE` makes"
            )
    if len(set(hosts)) < len(hosts):
        raise HostsError(f"env.hosts={tuple(hosts)!r} names a host twice: name each once")


def is_this_machine(name: str) -> bool:
    """Whether that name or address is of the loopback interface, for sure."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def parse_address(address: str) -> tuple[str, int]:
    """("10.0.0.5", 7435) of "10.0.0.5:7435"; ("::1", 7435) of "[::1]:7435".

    Raises:
      ValueError: it is no address; the message is for users.
    """
    name, _, port = address.rpartition(":")
    name = name.removeprefix("[").removesuffix("]") if name.startswith("[") else name
    right = name and not name.isspace() and port.isascii() and port.isdigit()
    if not right or not 0 <= int(port) < 1 << 16 or (":" in name) != address.startswith("["):
        raise ValueError("use NAME:PORT, such as 10.0.0.5:7435 or [fd00::5]:7435")
    return name, int(port)


def _ping(line: Channel) -> None:
    """Asks a host whether it lives."""
    line.send(PING)
    if line.receive(channel.SILENCE_SECONDS, _WORDS)[0] != BEAT:
        raise ValueError(_UNASKED)


def _behind_beats(
    line: Channel, seconds: float, most: tuple[int, int, int] = _WORDS
) -> tuple[dict[str, Any], bytes, bytes]:
    """The first frame that is no beat, within so many seconds; see `Channel.receive`."""
    start = time.monotonic()
    for beats in itertools.count():
        passed = time.monotonic() - start
        frame = line.receive(seconds - passed, most)
        if frame[0] != BEAT:
            return frame
        if beats > _SPARE_BEATS + 2 * passed / channel.BEAT_SECONDS:
            raise ValueError("it beats too fast")
    raise AssertionError("the loop has no end")


def _outcome(data: dict[str, Any], watched: bool) -> Outcome:
    """The facts of a run as a host states them; raises ValueError, KeyError, TypeError."""
    outcome = Outcome.from_json(data)
    times = outcome.seconds, outcome.cpu_seconds
    if not _is_number(outcome.code, 255, least=0) or not all(map(_is_time, times)):
        raise ValueError("facts that cannot be")
    if outcome.replay is not None and not watched:
        raise ValueError("a replay that was not asked for")
    return outcome


def _is_number(value: Any, most: int, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_time(value: Any) -> bool:
    right = isinstance(value, int | float) and not isinstance(value, bool)
    return right and math.isfinite(value) and value >= 0


def _is_texts(value: Any) -> bool:
    """Whether it is a few short texts by name, which may be shown."""
    if not isinstance(value, dict) or len(value) > _MOST_FACTS:
        return False
    return all(
        isinstance(text, str) and text.isprintable() and len(text) <= _LONGEST_FACT
        for text in (*value, *value.values())
    )


def _text(words: dict[str, Any], name: str) -> str:
    """A text of a host that a user may be shown."""
    return printable(str(words.get(name, "no reason was given")))


def _in_words(problem: BaseException) -> str:
    if isinstance(problem, EOFError):
        return "the connection was closed"
    if isinstance(problem, TimeoutError):
        return "it does not answer"
    return str(problem)


def _of(host: Host, problem: str) -> str:
    return f"executor host {host.address}: {problem}"


def _resolve(tried: Future[None], problem: ExecutorError | None = None) -> bool:
    """Says that a host was tried; whether this is the first to say so."""
    try:
        if problem is None:
            tried.set_result(None)
        else:
            tried.set_exception(problem)
    except InvalidStateError:
        return False
    return True

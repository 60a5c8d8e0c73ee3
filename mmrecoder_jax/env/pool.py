"""A pool of executors: scripts in, `Execution`s out, as they finish.

Each of `EnvConfig.workers` long-lived threads owns one executor of this machine (`local.py`); those
of other machines (`EnvConfig.hosts`) are reached over connections (`remote.py`). All take from one
backlog, whoever has room.

A script cannot reach its zygote, so a zygote that dies or does not answer is no fault of the script
that it ran: another one is started, and the script is run again. The same holds for a script's own
process that somebody else killed, and for a host that is lost. All have a bound, as something of
the script's own may be behind it (it fills the memory of the host), and so has starting zygotes:
where none starts for minutes, that is an error of the environment and no result of a script.
"""

import collections
import contextlib
import hashlib
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from typing import Any, Literal, Self, overload

from mmrecoder_jax.env import interpreter, local, wire
from mmrecoder_jax.env.backlog import Backlog, Job
from mmrecoder_jax.env.channel import read_secret
from mmrecoder_jax.env.execution import EnvConfig, Execution, Replay, decode, is_no_result
from mmrecoder_jax.env.likeness import CHART, likeness
from mmrecoder_jax.env.local import Answer, Executor, ExecutorError, ExecutorLost
from mmrecoder_jax.env.records import (
    Chart2CodeRecord,
    OfficialRecord,
    Plot2CodeRecord,
    Record,
)
from mmrecoder_jax.env.remote import Hosts, check_hosts
from mmrecoder_jax.env.sandbox import bubblewrap, confinement, scratch
from mmrecoder_jax.env.wire import End, Flag, Outcome, RecordKind, Request, Status

OfficialKind = Literal[
    RecordKind.OFFICIAL_RUN,
    RecordKind.OFFICIAL_TEXT,
    RecordKind.OFFICIAL_LAYOUT,
    RecordKind.OFFICIAL_TYPE,
    RecordKind.OFFICIAL_COLOR,
    RecordKind.OFFICIAL_CALLS,
]
Plot2CodeKind = Literal[RecordKind.PLOT2CODE, RecordKind.PLOT2CODE_TARGET]
# Executors that die while they run one script, and times that nobody we know kills it.
MAX_LOST = 8
_LOST_BY_HOSTS = 2  # losses after which a script runs on this machine, where executors are
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds before starting is tried again
# of the cache: the code, what was wanted of it, and whether its drawing is replayed for sure
_Key = tuple[str, RecordKind, bool]
_COUNTS = (
    *("requests", "cache_hits", "executions", "retries", "respawns"),
    *("replays", "replays_undecided", "seconds", "cpu_seconds"),
    *("latency_seconds", "wait_seconds"),
)
# each flag, and among what its rate is counted
_WHOLES = {
    Flag.TAMPER: "executions",
    Flag.HIDDEN_TEXT: "replays",
    Flag.FORGED: "replays",
}
_SHUT_DOWN = "The executors were shut down."
_UNSTABLE = (Status.TIMEOUT, Status.KILLED)  # may come out otherwise next time: not cached


def total(stats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The counts (`ExecutorPool.stats`) of several pools together."""
    if len(stats) == 1:
        return dict(stats[0])
    names = dict.fromkeys(name for own in stats for name in own if not name.startswith("rate_"))
    return _with_rates({name: sum(own.get(name, 0) for own in stats) for name in names})


def _with_rates(counts: Mapping[str, float]) -> dict[str, float]:
    return dict(counts) | {
        f"rate_{flag}": counts.get(f"flag_{flag}", 0) / max(counts[whole], 1)
        for flag, whole in _WHOLES.items()
    }


class ExecutorPool:
    """Runs scripts in `config.workers` executors, and on `config.hosts`. A context manager.

    Identical code gives an identical result, so results are kept (least recently used first out)
    and identical code that is already running is not run twice. Time-outs and killed scripts are
    not kept.

    Raises:
      SandboxUnavailable: this host cannot contain scripts as the configuration asks.
      InterpreterError: executors cannot run on `config.python`.
      ExecutorError: an executor cannot start, or a host refuses us or is not like this machine.
      HostsError, SecretError: the hosts cannot be used as they are configured.
    """

    def __init__(self, config: EnvConfig):
        if config.workers:
            confinement.check(config.sandbox)
            local.check_limits(config)
        check_hosts(config.hosts, config.workers, config.secret)
        secret = read_secret(config.secret, "env.secret")
        python = interpreter.find(config.python)
        if config.bubblewrap and config.workers:
            bubblewrap.program()  # tried before there is a folder that our death could leave
        self.config = config
        self._directory = local.make_directory()
        self._backlog = Backlog()
        self._lock = threading.Lock()
        self._cache: collections.OrderedDict[_Key, Future[Any]] = collections.OrderedDict()
        self._cache_bytes = 0
        self._stats: dict[str, float] = collections.defaultdict(float, dict.fromkeys(_COUNTS, 0))
        self._closing = threading.Event()
        self._executors = [
            Executor(config, python, self._directory, index) for index in range(config.workers)
        ]
        self._hosts = None
        if config.hosts:
            like = likeness(config, python)
            takes = self._accept, self._lose, self._give_up, _say
            self._hosts = Hosts(config, secret, like, self._backlog, *takes)
        # Each executor is started, used and replaced by one thread, which lives as long as the
        # pool.
        self._threads: list[threading.Thread] = []
        try:
            self._start_all()
        except BaseException:
            self.close()
            raise

    def _start_all(self) -> None:
        started: list[Future[None]] = [Future() for _ in self._executors]
        for index, (executor, future) in enumerate(zip(self._executors, started, strict=True)):
            thread = threading.Thread(
                target=self._serve, args=(executor, future), name=f"executor-{index}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as problem:
                raise ExecutorError(
                    f"a thread cannot be started: {local.MORE_PROCESSES}"
                ) from problem
            self._threads.append(thread)
        for future in started:
            future.result()
        if self._hosts is not None:
            self._hosts.start()
            self._hosts.wait()

    @overload
    def submit(
        self, code: str | None, kind: Literal[RecordKind.TRAINING] = ...
    ) -> Future[Execution[Record]]: ...
    @overload
    def submit(self, code: str | None, kind: OfficialKind) -> Future[Execution[OfficialRecord]]: ...
    @overload
    def submit(
        self, code: str | None, kind: Plot2CodeKind
    ) -> Future[Execution[Plot2CodeRecord]]: ...
    @overload
    def submit(
        self, code: str | None, kind: Literal[RecordKind.CHART2CODE]
    ) -> Future[Execution[Chart2CodeRecord]]: ...
    def submit(self, code: str | None, kind: RecordKind = RecordKind.TRAINING) -> Future[Any]:
        """Queues one script; `None` (no code in the response) is answered at once.

        `kind` says which record is wanted; only TRAINING also gives an image. Code that is too long
        is not run.
        """
        future: Future[Any] = Future()
        # shared by identical requests, so it cannot be cancelled
        future.set_running_or_notify_cancel()
        if code is None:
            future.set_result(
                Execution(Status.NO_CODE, error="The response holds no ```python block.")
            )
            return future
        return self._submit((code, kind, False), future)

    def watch(self, code: str) -> Future[Execution[Record]]:
        """Queues one script whose drawing is replayed for sure, whatever `replay_share` says."""
        future: Future[Execution[Record]] = Future()
        future.set_running_or_notify_cancel()
        return self._submit((code, RecordKind.TRAINING, True), future)

    def _submit(self, key: _Key, future: Future[Any]) -> Future[Any]:
        if len(key[0]) > wire.MAX_CODE_CHARACTERS:
            error = f"The script has {len(key[0])} characters: at most {wire.MAX_CODE_CHARACTERS} "
            future.set_result(Execution(Status.ERROR, error=error + "are run."))
            return future
        with self._lock:
            if self._closing.is_set():
                raise ExecutorError("the pool is closed")
            self._stats["requests"] += 1
            if key in self._cache:
                self._stats["cache_hits"] += 1
                self._cache.move_to_end(key)
                return self._cache[key]
            # Before it has run: identical code that comes meanwhile waits for the same result.
            self._cache[key] = future
            self._backlog.put(self._job(key, future))
        return future

    def _job(self, key: _Key, future: Future[Any]) -> Job:
        code, kind, watched = key
        lot = _draw_lot(code, self.config.replay_seed)
        watched |= kind == RecordKind.TRAINING and lot < self.config.replay_share
        return Job(Request(code, kind), watched, key, future)

    def run(self, codes: Iterable[str | None]) -> list[Execution[Record]]:
        """Runs all scripts and returns their results in order."""
        return [future.result() for future in [self.submit(code) for code in codes]]

    def stream(self, codes: Iterable[str | None]) -> Iterator[tuple[int, Execution[Record]]]:
        """Yields (index, result) as scripts finish."""
        indices: dict[Future[Execution[Record]], list[int]] = {}
        for index, code in enumerate(codes):
            indices.setdefault(self.submit(code), []).append(index)
        for future in as_completed(indices):
            for index in indices[future]:
                yield index, future.result()

    def stats(self) -> dict[str, float]:
        """Counts since the start.

        requests, cache_hits, executions, retries, respawns, replays, replays_undecided,
        status_<status>, flag_<flag>; summed seconds and cpu_seconds of the scripts; rate_tamper
        among the executions, rate_hidden_text and rate_forged among the replays. Summed too:
        latency_seconds from `submit` to the result and, of those, wait_seconds until an executor
        took the script. backlog is how many wait now. With hosts, what `Hosts.stats` gives.
        """
        hosts = {} if self._hosts is None else self._hosts.stats()
        with self._lock:
            return _with_rates({**self._stats, **hosts, "backlog": len(self._backlog)})

    def pids(self) -> list[int]:
        """The process ids of this machine's executors, each the leader of its process group.

        Where bubblewrap is used, it is part of that group.
        """
        return [executor.pid for executor in self._executors]

    def close(self) -> None:
        """Ends the executors; queued scripts come back as KILLED."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
        left = self._backlog.close()
        try:
            self._end(left)
        except BaseException:  # Ctrl-C or SIGTERM leaves neither processes nor files
            self._end(left)
            raise

    def _end(self, left: list[Job]) -> None:
        for executor in self._executors:
            executor.close()
        if self._hosts is not None:
            self._hosts.close()
        for thread in self._threads:
            thread.join()
        left += self._backlog.empty()
        while left:
            self._settle(left.pop(), Execution(Status.KILLED, error=_SHUT_DOWN))
        scratch.remove(str(self._directory))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _serve(self, executor: Executor, started: Future[None]) -> None:
        try:
            self._start(executor, is_first=True)
            if self._hosts is not None and executor is self._executors[0]:
                self._draw_for(self._hosts, executor)
        except BaseException as problem:
            executor.stop()
            started.set_exception(problem)
            return
        started.set_result(None)
        self._run_requests(executor)
        executor.stop()

    def _draw_for(self, hosts: Hosts, executor: Executor) -> None:
        """Shows hosts what is drawn here; where an executor fails at it, the first host does."""
        try:
            hosts.expect(executor.execute(CHART, watched=False))
        except (OSError, EOFError, ValueError):
            executor.stop()

    def _run_requests(self, executor: Executor) -> None:
        while (job := self._backlog.get()) is not None:
            try:
                execution = self._execute(executor, job)
            except BaseException as problem:  # whoever waits must learn of it
                self._fail(job, problem)
                continue
            self._settle(job, execution)

    def _start(self, executor: Executor, is_first: bool = False) -> None:
        """Starts an executor; tries again where that may help.

        Raises:
          ExecutorError: it does not start.
        """
        deadline = time.monotonic() + local.START_SECONDS
        pause = _FIRST_PAUSE
        while not self._closing.is_set():
            try:
                executor.start()
                executor.wait_ready()
                return
            except ExecutorError as problem:
                # The first one says what is wrong with the configuration; later, it was right once.
                is_final = is_first and not isinstance(problem, ExecutorLost)
                if is_final or time.monotonic() > deadline:
                    raise
            self._closing.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise ExecutorError("the pool is closed")

    def _execute(self, executor: Executor, job: Job) -> Execution[Any]:
        while True:
            try:
                if self._closing.is_set():
                    raise ExecutorError("the pool is closed")
                if not executor.is_running:
                    self._start(executor)
                    self._count("respawns")
                answer = executor.execute(job.request, job.watched)
                job.killed += self._was_killed_by_others(answer.outcome)
                if not self._was_killed_by_others(answer.outcome) or job.killed >= MAX_LOST:
                    return self._read(job, answer)
            except ExecutorError:
                if self._closing.is_set():
                    return Execution(Status.KILLED, error=_SHUT_DOWN)
                raise
            except (OSError, EOFError, ValueError):
                executor.stop()
                job.lost += 1
                if job.lost >= MAX_LOST:
                    return _given_up(job)
            self._count("retries")

    def _accept(self, job: Job, answer: Answer, host: str) -> bool:
        """Takes a host's answer; whether it fits together.

        Where it does not, the script's own process may be behind it, so somebody else is asked
        before the host is.
        """
        try:
            return self._weigh(job, answer, host)
        except BaseException as problem:  # whoever waits must learn of it
            self._fail(job, problem)
            raise

    def _weigh(self, job: Job, answer: Answer, host: str) -> bool:
        if self._was_killed_by_others(answer.outcome) and job.killed + 1 < MAX_LOST:
            job.killed += 1
            self._run_again(job, here=False)
            return True
        execution = self._read(job, answer)
        if answer.claim and is_no_result(execution) and not job.doubted:
            job.doubted = host
            self._run_again(job, here=self.config.workers > 0)
            return False
        self._settle(job, execution)
        return True

    def _lose(self, job: Job) -> None:
        """Takes a script whose host was lost."""
        job.lost += 1
        if job.lost >= MAX_LOST:
            self._settle(job, _given_up(job))
        else:
            self._run_again(job, here=self.config.workers > 0 and job.lost >= _LOST_BY_HOSTS)

    def _run_again(self, job: Job, here: bool) -> None:
        self._count("retries")
        self._backlog.put_back(job, here)

    def _give_up(self, problem: ExecutorError) -> None:
        for job in self._backlog.empty():
            self._fail(job, problem)

    def _read(self, job: Job, answer: Answer) -> Execution[Any]:
        return decode(*answer, self.config, job.request.kind)

    def _was_killed_by_others(self, outcome: Outcome) -> bool:
        """Whether a script's process was killed by somebody else.

        A script cannot do that, and no limit of ours did.
        """
        return (
            outcome.end == End.SIGNAL
            and outcome.code == signal.SIGKILL
            and outcome.cpu_seconds < self.config.cpu_seconds
        )

    def _settle(self, job: Job, execution: Execution[Any]) -> None:
        """Gives a script's result to whoever waits for it."""
        self._remember(job, execution)
        if job.doubted and not is_no_result(execution) and self._hosts is not None:
            self._hosts.lied(job.doubted, "it sent a result that is none, where there is one")
        job.future.set_result(execution)

    def _fail(self, job: Job, problem: BaseException) -> None:
        with self._lock:
            del self._cache[job.key]
        job.future.set_exception(problem)

    def _remember(self, job: Job, execution: Execution[Any]) -> None:
        """Counts a result and makes room for it in the cache, which its future is in already."""
        with self._lock:
            self._tally(execution)
            self._stats["latency_seconds"] += time.monotonic() - job.submitted
            self._stats["wait_seconds"] += job.waited
            if execution.status in _UNSTABLE:
                del self._cache[job.key]
                return
            self._cache_bytes += _image_bytes(execution)
            max_bytes = self.config.cache_mb << 20
            while len(self._cache) > self.config.cache_size or self._cache_bytes > max_bytes:
                if not self._drop_oldest():
                    break

    def _tally(self, execution: Execution[Any]) -> None:
        stats = self._stats
        stats["executions"] += 1
        stats[f"status_{execution.status}"] += 1
        stats["seconds"] += execution.seconds
        stats["cpu_seconds"] += execution.cpu_seconds
        stats["replays"] += execution.replay == Replay.DONE
        stats["replays_undecided"] += execution.replay == Replay.UNDECIDED
        for flag in execution.flags:
            stats[f"flag_{flag}"] += 1

    def _drop_oldest(self) -> bool:
        """Drops the result that was not asked for the longest; False when all are running."""
        for key, future in self._cache.items():
            if future.done():
                self._cache_bytes -= _image_bytes(future.result())
                del self._cache[key]
                return True
        return False

    def _count(self, name: str) -> None:
        with self._lock:
            self._stats[name] += 1


def _given_up(job: Job) -> Execution[Any]:
    error = f"The script brought its executor down {job.lost} times."
    return Execution(Status.KILLED, error=error)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # a closed stderr ends no thread
        print(line, file=sys.stderr, flush=True)


def _image_bytes(execution: Execution[Any]) -> int:
    return 0 if execution.image is None else execution.image.nbytes


def _draw_lot(code: str, seed: int) -> float:
    """A number in [0, 1) that depends on the code and on a seed that no script sees."""
    key = seed.to_bytes(8, signed=True)
    digest = hashlib.blake2b(code.encode(errors="replace"), digest_size=4, key=key).digest()
    return int.from_bytes(digest) / 2**32

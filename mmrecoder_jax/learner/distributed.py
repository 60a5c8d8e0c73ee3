"""Several processes run one program: joining them, rows of a host to global arrays and back, and
what hosts must agree on.

A host is a process with its own devices. All hosts call the same programs, in the same order, with
the same shapes. Whatever only one of them knows (how long its rows are, whether something failed)
they exchange first. Rows are dealt out like cards: row i of host h is row `i * hosts + h` of all.
"""

import atexit
import contextlib
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmrecoder_jax.config import ConfigError, Preempted
from mmrecoder_jax.learner import cluster, heartbeat, roll_call
from mmrecoder_jax.monitoring import progress

JOIN_SECONDS = 300.0  # that processes wait for one another at the start
SILENT_SECONDS = 100.0  # without a sign of life after which a process is lost
_JOIN_LEAST_SECONDS = 30.0  # that JAX has to join those that have come
_JOIN_MARGIN_SECONDS = 60  # after which JAX would end the process by itself
# What JAX's transports write where another process has gone.
_LOST = re.compile(
    r"Gloo|Connection (reset|closed|refused)|Socket closed|heartbeat|oordination service"
    r"|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED"
)


class OtherHost(ConfigError):
    """Another process of this run has failed; the message says which, and why where it is known."""


class _Ending:
    """How this process ends."""

    watch: heartbeat.Heartbeat | None = None  # of a run of several processes
    status: int | None = None  # of this process, once its main thread has failed


def start(seconds: float = JOIN_SECONDS, silent_seconds: float = SILENT_SECONDS) -> None:
    """Joins the other processes of this run; does nothing where this one is alone (`cluster`).

    Args:
      seconds: how long to wait for those that have not started yet.
      silent_seconds: without a sign of life of another one after which this process ends.

    Raises:
      ConfigError: there are others and they cannot be found, or they do not come.
    """
    # JAX sets this variable on machines without TPU chips, and GKE on its own.
    plan = cluster.plan(os.environ, tpu="TPU_SKIP_MDS_QUERY" not in os.environ)
    if plan.arguments is None:
        return
    who = f"all {plan.count} processes" if plan.count else "the other processes"
    late = (
        f"waited {seconds:g} s for {who} ({plan.others or 'by the metadata of this TPU'}): not all "
        "have come; start all of them, each once, at about the same time"
    )
    # JAX would catch SIGTERM, for who asks it at every step, and the process would go on.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX ends the process from C++ when its own time is over, with pages of text.
    began = time.monotonic()
    _call_the_roll(plan, seconds)
    left = max(seconds - (time.monotonic() - began), _JOIN_LEAST_SECONDS)
    watch = threading.Timer(left, _give_up, [late])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            **plan.arguments,
            initialization_timeout=math.ceil(left) + _JOIN_MARGIN_SECONDS,
            heartbeat_timeout_seconds=math.ceil(2 * silent_seconds) + _JOIN_MARGIN_SECONDS,
        )
    except Exception as error:
        if _is_unknown(error) and not plan.others:
            return  # chips of this machine alone
        if _is_unknown(error):
            raise ConfigError(
                f"{plan.others}, but JAX finds no others from here: start them all as that cluster "
                f"does, or set {cluster.THREE} ({cluster.COUNT}=1 for one process alone)"
            ) from error
        raise ConfigError(
            f"cannot join {who} ({plan.others or 'by the metadata of this TPU'}): "
            f"{first_line(error)}; start all of them, each once"
        ) from error
    finally:
        watch.cancel()
    if not is_main():
        progress.silence()  # the main host prints the same lines
    if jax.process_count() > 1:
        _watch_the_others(silent_seconds)


def _call_the_roll(plan: cluster.Plan, seconds: float) -> None:
    """Finds out who is missing, where it is known where all meet; else JAX alone waits."""
    if not plan.arguments:
        return
    address = plan.arguments["coordinator_address"]
    try:
        roll_call.wait_for_all(address, plan.count, plan.arguments["process_id"], seconds)
    except OSError as error:
        raise ConfigError(
            f"process 0 cannot listen at {cluster.ADDRESS}={address}: {error.strerror or error}; "
            "choose another port, or end who uses it"
        ) from error


def _watch_the_others(silent_seconds: float) -> None:
    """From here on this process ends where another one is lost."""
    _Ending.watch = heartbeat.Heartbeat(
        heartbeat.client(), jax.process_index(), jax.process_count(), silent_seconds, _give_up
    )
    heartbeat.before_aborting(_before_aborting)
    atexit.register(_Ending.watch.leave, "")  # runs before JAX's own, which waits for all
    _Ending.watch.meet()


def _before_aborting() -> None:
    """JAX ends this process, mostly because process 0 has ended: says the name of who has."""
    assert _Ending.watch is not None
    lost = _Ending.watch.who_is_lost()
    if _Ending.status is not None:  # the main thread says what failed, and ends the process
        time.sleep(3 * _Ending.watch.every)
        _leave(_Ending.status)
    if lost:
        _give_up(lost)
    _Ending.watch.leave("it was ended from C++ (SIGABRT)")


def _give_up(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr)
    _leave(1)


def _is_unknown(error: Exception) -> bool:
    """Whether JAX found no cluster that it knows."""
    return isinstance(error, ValueError) and "be defined" in str(error)


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of what it says, cut to 300 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Around a whole command: a process that fails leaves at once.

    Otherwise it would wait minutes for the others to end as well, while they wait for it.

    Raises:
      OtherHost: what failed was the connection to another process.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        _Ending.status = status_of(error)
        lost = not isinstance(error, ConfigError) and _LOST.search(str(error))
        who = _Ending.watch.who_is_lost() if lost and _Ending.watch else ""
        if _Ending.watch:
            _Ending.watch.leave(who or _last_words(error))
        # Runs before JAX's own, which waits for all processes.
        atexit.register(_leave, _Ending.status)
        if lost:
            raise OtherHost(
                who
                or f"process {jax.process_index()} of {jax.process_count()} waited for another one "
                "that has ended or cannot be reached: its own output says why; start all of them "
                f"again, and they go on from the last checkpoint ({first_line(error)})"
            ) from error
        raise


def _last_words(error: BaseException) -> str:
    """What the others are told of an error; "" where all of them end alike."""
    if isinstance(error, Preempted) or (isinstance(error, SystemExit) and not error.code):
        return ""
    return str(error) if isinstance(error, ConfigError) else first_line(error)


def status_of(error: BaseException) -> int:
    """What a process ends with because of an error: what the error itself says, or 1."""
    status = getattr(error, "status", 1)
    return status if isinstance(status, int) else 1


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around work that a host does alone: where one host fails in it, all of them raise.

    Otherwise the others would wait for it in their next program. All hosts enter together, and
    nothing inside is collective. On a single host it does nothing.

    Raises:
      OtherHost: another host failed.
    """
    if jax.process_count() == 1:
        yield
        return
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    texts = gather_texts("" if failure is None else str(failure) or type(failure).__name__)
    if failure is not None:
        raise failure
    for host, text in enumerate(texts):
        if text:
            raise OtherHost(f"process {host} of {len(texts)}: {text}")


def is_main() -> bool:
    """Whether this is the one host that prints and writes shared files."""
    return jax.process_index() == 0


def host() -> int:
    """The number of this host."""
    return jax.process_index()


def own_share(items: Sequence[Any]) -> Sequence[Any]:
    """This host's part of what all hosts hold; see the top of this module."""
    return items[jax.process_index() :: jax.process_count()]


def own_numbers(count: int) -> np.ndarray:
    """Where this host's `count` rows are among those of all hosts."""
    return jax.process_index() + jax.process_count() * np.arange(count)


def to_global(tree: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Host-local NumPy arrays -> global arrays, cut over the mesh's `data` and `fsdp` axes.

    Args:
      tree: this host's rows.
      axis: the dimension that is cut; the others are whole on every device.

    Raises:
      ValueError: the mesh does not divide the rows of all hosts.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]

    def one(x: Any) -> jax.Array:
        x = np.asarray(x)
        if (x.shape[axis] * jax.process_count()) % ways:
            raise ValueError(
                f"{x.shape[axis] * jax.process_count()} rows cannot be split over "
                f"data*fsdp={ways} devices: choose batch sizes that the mesh divides"
            )
        spec = PartitionSpec(*[None] * axis, ("data", "fsdp"))
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x)

    return jax.tree.map(one, tree)


def to_host(x: jax.Array) -> np.ndarray:
    """This host's rows, in order, of a global array whose axis 0 is cut over devices."""
    if jax.process_count() == 1:
        return np.asarray(x)
    pieces: dict[int, jax.Array] = {}
    # devices along other axes hold copies of the same rows: the first one counts
    for shard in x.addressable_shards:
        pieces.setdefault(shard.index[0].start or 0, shard.data)
    return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])


# ---------------------------------------------------------------- what all hosts know


def gather(values: np.ndarray) -> np.ndarray:
    """`[hosts, ...]`: an array of each host, all of one shape and type; exact for every type."""
    values = np.ascontiguousarray(values)
    hosts = jax.process_count()
    if hosts == 1 or not values.size:
        return np.stack([values] * hosts)
    # As bytes: on the devices, numbers of 64 bits would lose half of them.
    raw = values.reshape(-1).view(np.uint8)
    found = np.ascontiguousarray(multihost_utils.process_allgather(raw))
    return found.view(values.dtype).reshape(hosts, *values.shape)


def global_sum(values: np.ndarray) -> np.ndarray:
    """The sum over hosts of a small array; free on a single host."""
    return gather(np.asarray(values)).sum(axis=0)


def global_max(values: np.ndarray) -> np.ndarray:
    """The elementwise maximum over hosts of a small array; free on a single host."""
    return gather(np.asarray(values)).max(axis=0)


def main_says(value: bool) -> bool:
    """The main host's answer, for all: two hosts may see a directory at different moments."""
    return bool(gather(np.array([value]))[0, 0])


def gather_texts(text: str) -> list[str]:
    """A text of each host, of any length."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = gather(np.array([len(data)]))[:, 0]
    if not lengths.any():
        return [""] * len(lengths)
    # A power of two, or every length would be a program of its own.
    padded = np.zeros(1 << int(lengths.max() - 1).bit_length(), np.uint8)
    padded[: len(data)] = data
    return [
        row[:length].tobytes().decode() for row, length in zip(gather(padded), lengths, strict=True)
    ]


def gather_json(value: Any) -> list[Any]:
    """A value of each host that JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    return [json.loads(text) for text in gather_texts(json.dumps(value))]


def all_rows(rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The rows of all hosts in the order of their numbers.

    Args:
      rows: this host's; hosts may have different counts.
      numbers: of this host's rows (`own_numbers`); a negative one marks a row to leave out.
    """
    counts = gather(np.array([len(rows)]))[:, 0]
    padded = np.zeros((int(counts.max()), *rows.shape[1:]), rows.dtype)
    order = np.full(len(padded), -1)
    padded[: len(rows)], order[: len(rows)] = rows, numbers
    found, order = np.concatenate(gather(padded)), np.concatenate(gather(order))
    by_number = np.argsort(order, kind="stable")
    return found[by_number[order[by_number] >= 0]]


def all_values(values: Sequence[Any], numbers: Sequence[int] | np.ndarray) -> list[Any]:
    """The values of all hosts in the order of their numbers, as `all_rows`; JSON can hold each."""
    own = [[int(number), value] for number, value in zip(numbers, values, strict=True)]
    found = [pair for pairs in gather_json(own) for pair in pairs if pair[0] >= 0]
    return [value for _, value in sorted(found, key=lambda pair: pair[0])]

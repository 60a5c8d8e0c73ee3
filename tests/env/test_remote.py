"""Hosts that die, hang, lie and come back, as a pool meets them."""

import itertools
import math
import re
import socket
import threading
import time

import pytest

from mmrecoder_jax.env import EnvConfig, ExecutorPool, Status, channel, remote
from mmrecoder_jax.env.channel import BEAT, pack
from mmrecoder_jax.env.local import ExecutorError
from mmrecoder_jax.env.remote import FULL, HostsError
from mmrecoder_jax.env.wire import MAX_CLAIM_BYTES
from tests.env.stand_in_hosts import OUTCOME, SECRET, StandIn, claim, honest


@pytest.fixture
def pool_of(tmp_path):
    """`pool_of(host, ...)`: a pool that has no executors but theirs."""
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET + b"\n")

    def make(*hosts, **fields):
        addresses = tuple(host if isinstance(host, str) else host.address for host in hosts)
        fields = {"workers": 0, "secret": str(secret), "wall_seconds": 20.0} | fields
        return ExecutorPool(EnvConfig(hosts=addresses, **fields))

    return make


def until(happened, seconds=20.0):
    """Waits until that is true."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def answering(shift=0, outcome=(), claimed=None, pixels=b"", **words):
    """A host whose answers are right but for these."""

    def answer(line, asked):
        said = {"number": asked["run"] + shift, "outcome": OUTCOME | dict(outcome)} | words
        line.send(said, claim(asked["code"]) if claimed is None else claimed, pixels)

    return answer


def twice(line, asked):
    honest(line, asked)
    honest(line, asked)


def beating(line, asked):
    for _ in range(1000):
        line.send(BEAT)
    honest(line, asked)


# What cannot be, by what is wrong with it.
LIES = {
    "another script's": answering(shift=1),
    "no number": answering(number=None),
    "twice": twice,
    "too large a claim": answering(claimed=b" " * (MAX_CLAIM_BYTES + 1)),
    "too large a frame": answering(pixels=bytes(4_100_000)),
    "too large a picture": answering(pixels=pack(bytes(4_000_001))),
    "a cut picture": answering(pixels=pack(bytes(4_000_000))[:-1]),
    "no picture": answering(pixels=b"RGBA"),
    "no outcome": lambda line, asked: line.send({"number": asked["run"], "outcome": [1]}),
    "an unknown end": answering(outcome={"end": "victory"}),
    "a code that is none": answering(outcome={"code": "0"}),
    "times that are none": answering(outcome={"seconds": math.nan}),
    "times before the start": answering(outcome={"cpu_seconds": -1.0}),
    "a replay that nobody wanted": answering(outcome={"replay": 0}),
    "beats without an end": beating,
    # Well said, but the claim does not hold together: found when another host is asked.
    "no claim": answering(claimed=b"{"),
    "a picture of another size": answering(
        claimed=claim("", status="ok", size=[2, 2]), pixels=pack(bytes(12))
    ),
    "a record of another kind": answering(claimed=claim("", record={"texts": 3})),
    "a status that none can claim": answering(claimed=claim("", status="timeout")),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_host_is_counted_and_set_aside_and_changes_no_result(pool_of, capsys, lie):
    codes = [f"x = {i}" for i in range(400)]
    with (
        StandIn(LIES[lie]) as liar,
        StandIn() as other,
        pool_of(liar, other, replay_share=0.0, max_pixels=1_000_000) as pool,
    ):
        executions = []
        until(lambda: pool.stats()["hosts_up"] == 2)
        for start in range(0, len(codes), 8):
            executions += pool.run(codes[start : start + 8])
            if pool.stats()["hosts_lied"]:
                break
        stats = pool.stats()
    assert [(each.status, each.error) for each in executions] == [
        ("error", code) for code, _ in zip(codes, executions, strict=False)
    ]
    assert stats["executions"] == stats["status_error"] == len(executions)
    assert stats["hosts_lied"] >= 1 and stats["hosts_up"] == 1
    said = capsys.readouterr().err
    assert said.count(f"executor host {liar.address}: ") == 1, said
    assert f"executor host {other.address}: " not in said


def test_nonsense_of_the_script_itself_is_no_lie_of_a_host(pool_of):
    garbage = answering(claimed=b"{")
    with (
        StandIn(garbage) as first,
        StandIn(garbage) as second,
        pool_of(first, second) as pool,
    ):
        (execution,) = pool.run(["x = 1"])
        stats = pool.stats()
    assert execution.status == Status.KILLED and "before it gave a result" in execution.error
    assert (stats["hosts_lied"], stats["retries"], stats["executions"]) == (0, 1, 1)
    assert len(first.codes) + len(second.codes) == 2, "it was not run a second time"


def test_a_host_that_goes_in_the_middle_loses_no_script(pool_of, capsys):
    def goes(line, asked):
        line.shut()

    with StandIn(goes) as bad, StandIn() as good, pool_of(bad, good) as pool:
        for number in range(400):
            (execution,) = pool.run([f"x = {number}"])
            assert execution.error == f"x = {number}"
            if bad.codes:
                break
        stats = pool.stats()
    assert stats["retries"] == stats["hosts_lost"] >= 1 and stats["hosts_lied"] == 0
    assert stats["executions"] == number + 1 == stats[f"host_{good.address}"]
    assert stats[f"host_{bad.address}"] == 0
    assert (
        capsys.readouterr().err.count("the connection was closed; its scripts run elsewhere") == 1
    )


def test_a_host_that_hangs_is_left_after_some_silence(pool_of, monkeypatch):
    monkeypatch.setattr(channel, "SILENCE_SECONDS", 0.3)
    asked = threading.Semaphore(0)

    def first_hangs(line, words):
        if len(host.codes) == 1:
            asked.acquire(timeout=20)
        else:
            honest(line, words)

    with StandIn(first_hangs) as host, pool_of(host) as pool:
        future = pool.submit("x = 1")
        assert future.result(20).error == "x = 1"
        asked.release()
        assert host.codes == ["x = 1"] * 2
        assert pool.stats()["hosts_lost"] == pool.stats()["executions"] == 1


def test_a_slow_host_that_says_that_it_works_is_waited_for(pool_of, monkeypatch):
    monkeypatch.setattr(channel, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(channel, "BEAT_SECONDS", 0.1)

    def slow(line, asked):
        for _ in range(8):
            time.sleep(0.1)
            line.send(BEAT)
        honest(line, asked)

    with StandIn(slow) as host, pool_of(host) as pool:
        assert pool.run(["x = 1"])[0].error == "x = 1"
        assert pool.stats()["retries"] == 0
        assert pool.stats()["latency_seconds"] >= 0.8 > pool.stats()["wait_seconds"] > 0


def test_a_host_that_beats_and_never_answers_is_left(pool_of, monkeypatch):
    monkeypatch.setattr(remote, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(channel, "BEAT_SECONDS", 0.05)

    def never(line, asked):
        for _ in range(100):
            time.sleep(0.05)
            line.send(BEAT)

    with StandIn(never) as host, pool_of(host, wall_seconds=0.1) as pool:
        pool.submit("x = 1")
        until(lambda: pool.stats()["hosts_lost"] >= 1)


def test_a_host_without_room_keeps_no_script(pool_of):
    with StandIn(has_room=False) as busy, StandIn() as free, pool_of(busy, free) as pool:
        until(lambda: pool.stats()["hosts_up"] == 2)
        codes = [f"x = {i}" for i in range(40)]
        assert [each.error for each in pool.run(codes)] == codes
        assert busy.codes == [] and sorted(free.codes) == sorted(codes)
        assert pool.stats()["hosts_lied"] == 0 and pool.stats()["hosts_up"] == 2


def test_a_script_that_every_host_dies_of_is_given_up(pool_of):
    def lost(line, asked):
        line.send({"number": asked["run"], "lost": True})

    with StandIn(lost) as host, pool_of(host) as pool:
        execution = pool.submit("x = 1").result(20)
        assert execution.status == Status.KILLED
        assert execution.error == "The script brought its executor down 8 times."
        assert host.codes == ["x = 1"] * 8 and pool.stats()["hosts_up"] == 1


def test_a_script_that_somebody_killed_over_there_is_run_again(pool_of):
    killed = answering(outcome={"end": "signal", "code": 9}, claimed=b"")

    def first_killed(line, asked):
        (killed if len(host.codes) == 1 else honest)(line, asked)

    with StandIn(first_killed) as host, pool_of(host) as pool:
        assert pool.run(["x = 1"])[0].error == "x = 1" and len(host.codes) == 2
        assert pool.stats()["retries"] == 1


def test_a_host_that_comes_back_is_used_again(pool_of, monkeypatch, capsys):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.05)
    with StandIn() as good, StandIn() as early, pool_of(early, good) as pool:
        until(lambda: pool.stats()["hosts_up"] == 2)
        early.__exit__()
        until(lambda: pool.stats()["hosts_up"] == 1)
        with StandIn(port=int(early.address.rpartition(":")[2])) as late:
            until(lambda: pool.stats()["hosts_up"] == 2)
            for number in range(4000):
                pool.run([f"x = {number}"])
                if late.codes:
                    break
            assert late.codes
    said = [line for line in capsys.readouterr().err.splitlines() if early.address in line]
    assert len(said) == 3 and said[1].endswith("it is tried again") and said[2].endswith("is back")


def test_another_secret_is_refused_at_the_start(pool_of, capsys):
    with (
        StandIn(secret=b"another secret of 32 characters!") as host,
        pytest.raises(ExecutorError) as refused,
    ):
        pool_of(host)
    assert capsys.readouterr().err == ""
    assert str(refused.value) == f"executor host {host.address}: it has another secret"
    assert SECRET.decode() not in str(refused.value)


def test_a_host_with_other_releases_is_refused_with_both(pool_of):
    with (
        StandIn(like={"matplotlib": "3.8.4", "sandbox": "unsafe"}) as host,
        pytest.raises(ExecutorError, match=r"matplotlib is 3\.8\.4 there and .* here, sandbox is"),
    ):
        pool_of(host)


def test_a_host_that_draws_otherwise_is_refused(pool_of):
    with (
        StandIn() as first,
        StandIn(chart=b'{"another": 1}') as second,
        pytest.raises(ExecutorError, match="it draws another chart of the same script"),
    ):
        pool_of(first, second)


def test_hosts_must_be_alike_where_nothing_runs_here(pool_of):
    with (
        StandIn(like={"bubblewrap": "one way"}) as first,
        StandIn(like={"bubblewrap": "the other"}) as second,
        pytest.raises(ExecutorError, match="bubblewrap is"),
    ):
        pool_of(first, second)


def test_what_is_no_executor_host_is_left_alone(pool_of, capsys):
    def speak(listener):
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock:
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)

    with socket.create_server(("127.0.0.1", 0)) as listener, StandIn() as good:
        threading.Thread(target=speak, args=(listener,), daemon=True).start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pool_of(address, good) as pool:
            assert pool.run(["x = 1"])[0].error == "x = 1"
        listener.shutdown(socket.SHUT_RDWR)
    assert f"{address}: no executor host of this version answers" in capsys.readouterr().err


def test_without_any_host_the_pool_says_which_are_missing(pool_of, monkeypatch):
    monkeypatch.setattr(remote, "START_SECONDS", 0.2)
    with StandIn() as host:
        address = host.address
    with pytest.raises(ExecutorError) as missing:
        pool_of(address)
    assert f"{address}: it cannot be reached (Connection refused)" in str(missing.value)
    assert "mmrecoder_jax.env.serve" in str(missing.value)


def test_who_waits_for_a_script_learns_that_no_host_is_left(pool_of, monkeypatch):
    monkeypatch.setattr(remote, "START_SECONDS", 0.3)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.05)
    with StandIn(lambda line, _: line.shut()) as host, pool_of(host) as pool:
        until(lambda: pool.stats()["hosts_up"])
        host.__exit__()
        future = pool.submit("x = 1")
        with pytest.raises(ExecutorError, match=r"no host of env\.hosts can be used"):
            future.result(20)
        assert pool.stats()["backlog"] == 0


def test_a_host_that_is_away_for_a_moment_is_waited_for(pool_of, monkeypatch):
    monkeypatch.setattr(remote, "START_SECONDS", 1.0)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(remote, "_PING_SECONDS", 0.1)
    with StandIn() as early, pool_of(early) as pool:
        until(lambda: pool.stats()["hosts_up"])
        early.__exit__()
        time.sleep(1.2)  # nobody waits for it
        future = pool.submit("x = 1")
        time.sleep(0.3)
        with StandIn(port=int(early.address.rpartition(":")[2])):
            assert future.result(20).error == "x = 1"


def test_a_host_that_was_away_while_no_script_was_there_is_as_before(pool_of, monkeypatch):
    monkeypatch.setattr(remote, "START_SECONDS", 0.5)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(remote, "_PING_SECONDS", 0.1)
    with StandIn() as early, pool_of(early) as pool:
        early.__exit__()
        until(lambda: not pool.stats()["hosts_up"])
        with StandIn(port=int(early.address.rpartition(":")[2]), has_room=False) as late:
            until(lambda: pool.stats()["hosts_up"])
            future = pool.submit("x = 1")
            time.sleep(1.0)  # it has no room, which is no reason to give up
            assert not future.done() and late.codes == []


def test_a_host_that_starts_no_executor_is_as_good_as_none(pool_of, monkeypatch):
    monkeypatch.setattr(remote, "START_SECONDS", 0.3)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(remote, "_PING_SECONDS", 0.1)
    with (
        StandIn(ready={"failed": "no memory"}) as host,
        pool_of(host) as pool,
        pytest.raises(ExecutorError, match=r"does not start there: no memory\): start"),
    ):
        pool.submit("x = 1").result(20)


def test_a_host_with_all_the_executors_that_it_starts_is_no_problem(pool_of, capsys):
    with StandIn(ready=FULL) as full, StandIn() as good, pool_of(full, good) as pool:
        until(lambda: pool.stats()["hosts_up"] == 2)
        assert pool.run(["x = 1"])[0].error == "x = 1" and pool.stats()["hosts_up"] == 2
    assert "tried again" not in capsys.readouterr().err


def test_an_executor_that_does_not_start_there_is_said(pool_of, capsys):
    with (
        StandIn(ready={"failed": "no \x1b[31mmemory"}) as host,
        StandIn() as good,
        pool_of(host, good) as pool,
    ):
        until(lambda: pool.stats()["hosts_up"] == 1)
        assert pool.run(["x = 1"])[0].error == "x = 1"
    assert "an executor does not start there: no  [31mmemory" in capsys.readouterr().err


def test_a_pool_that_closes_waits_for_no_host(pool_of):
    with StandIn(lambda *_: time.sleep(30)) as host:
        pool = pool_of(host)
        futures = [pool.submit(f"x = {i}") for i in range(3)]
        until(lambda: host.codes)
        start = time.monotonic()
        pool.close()
        assert time.monotonic() - start < 5
        assert {future.result(0).status for future in futures} == {Status.KILLED}


def test_identical_scripts_run_once_and_replays_are_asked_of_hosts(pool_of):
    def replayed(line, asked):
        found = {"replay": 0} if asked["watched"] else {}
        drawn = claim("", status="ok", size=[1, 1])
        answering(outcome=found, claimed=drawn, pixels=pack(bytes(4)))(line, asked)

    with StandIn(replayed) as host, pool_of(host, replay_share=0.0) as pool:
        first, again, watched = pool.submit("x"), pool.submit("x"), pool.watch("x")
        assert first is again and first.result(20).image.shape == (1, 1, 3)
        assert (first.result().replay, watched.result(20).replay) == ("", "done")
        assert host.codes == ["x", "x"] and pool.stats()["replays"] == 1


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"hosts": ()}, "env.workers=0 and no env.hosts"),
        ({"hosts": ("nowhere",)}, "'nowhere': use NAME:PORT"),
        ({"hosts": ("a:70000",)}, "'a:70000': use NAME:PORT"),
        ({"hosts": ("127.0.0.1:0",)}, "'127.0.0.1:0': a host has a port above 0"),
        ({"hosts": ("::1:5",)}, "'::1:5': use NAME:PORT"),
        ({"hosts": ("10.0.0.5:7435",)}, "another machine, which needs env.secret"),
        ({"hosts": ("[::1]:1", "[::1]:1")}, "names a host twice"),
    ],
)
def test_hosts_that_cannot_be_are_refused_before_anything_starts(fields, problem):
    with pytest.raises(HostsError, match=re.escape(problem)):
        ExecutorPool(EnvConfig(workers=0, **fields))


def test_addresses():
    assert remote.parse_address("[fd00::5]:7435") == ("fd00::5", 7435)
    assert remote.parse_address("host-1.example:1") == ("host-1.example", 1)
    names = ("localhost", "127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::", "10.0.0.5", "example")
    assert [*map(remote.is_this_machine, names)] == [True] * 4 + [False] * 4


def test_a_host_must_draw_as_the_executors_of_this_machine(pool_of):
    with (
        StandIn() as host,
        pytest.raises(ExecutorError, match="it draws another chart of the same script"),
    ):
        pool_of(host, workers=1, preload=())


def test_executors_of_this_machine_do_what_hosts_do_not(pool_of, monkeypatch, capsys):
    """One host is not there, one goes with every script, one sends results that are none."""
    monkeypatch.setattr(remote, "drawn", lambda answer: "as here")
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.05)
    with StandIn() as gone:
        pass
    with (
        StandIn(lambda line, _: line.shut()) as leaving,
        StandIn(answering(claimed=b"{")) as lying,
        pool_of(gone, leaving, lying, workers=1, preload=()) as pool,
    ):
        for number in itertools.count():
            codes = [f"import time\ntime.sleep(0.05)\nx = {number}, {i}" for i in range(6)]
            assert {each.status for each in pool.run(codes)} == {"no_figure"}
            if leaving.codes and lying.codes and pool.stats()["hosts_lied"]:
                break
        stats = pool.stats()
        assert stats["executions"] == stats["requests"] and stats["hosts_lost"] >= 1
    said = capsys.readouterr().err
    assert said.count(f"{gone.address}: it cannot be reached (Connection refused)") == 1, said


def test_executors_over_there_stay_for_a_while_without_a_script(pool_of, monkeypatch):
    monkeypatch.setattr(remote, "_LANE_PING_SECONDS", 0.05)
    monkeypatch.setattr(remote, "_IDLE_SECONDS", 0.6)
    with StandIn() as host, pool_of(host) as pool:
        pool.run(["x = 1"])
        time.sleep(0.2)
        pool.run(["x = 2"])
        assert len(host.lines) == 2, "of the keeper, and of the executor"
        time.sleep(0.9)
        assert pool.run(["x = 3"])[0].error == "x = 3"
        assert len(host.lines) == 3, "an executor was kept that nobody needs"

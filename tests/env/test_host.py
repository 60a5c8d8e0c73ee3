"""The host's side of a connection: what a trainer may ask for, and how trainers share executors."""

import contextlib
import dataclasses
import itertools
import socket
import time
from typing import ClassVar

import pytest

from mmrecoder_jax.env import EnvConfig, ExecutorPool, Status, interpreter, local
from mmrecoder_jax.env import host as hosts
from mmrecoder_jax.env.channel import BEAT, Channel, Refused
from mmrecoder_jax.env.host import ExecutorHost, config_of
from mmrecoder_jax.env.local import ExecutorError, settings
from mmrecoder_jax.env.remote import FULL, PING, READY, ROOM, UNWANT, WANT
from mmrecoder_jax.env.sandbox.confinement import SandboxMode
from mmrecoder_jax.env.wire import End, Outcome
from tests.env import attacks
from tests.env.test_remote import until

SECRET = b"the secret of this host"
SMALL = EnvConfig(workers=0, preload=(), wall_seconds=10, replay_share=0.0)


@contextlib.contextmanager
def serving(executors=1, processes=2):
    """An `ExecutorHost` of this process: its address, and what it said."""
    listener = socket.create_server(("127.0.0.1", 0))
    said = []
    config = EnvConfig(workers=executors)
    with ExecutorHost(listener, config, interpreter.find(""), SECRET, processes, said.append):
        yield f"127.0.0.1:{listener.getsockname()[1]}", said


class Quick(local.Executor):
    """An executor without a process, which says how long it ran each script."""

    times: ClassVar[list] = []
    is_running = True

    def start(self) -> None:
        if "not_a_setting" in self._config.rc_params:
            raise ExecutorError("not_a_setting")

    def wait_ready(self) -> None:
        pass

    def execute(self, request, watched):
        begin = time.monotonic()
        time.sleep(0.02)
        self.times.append((begin, time.monotonic(), id(self)))
        return local.Answer(Outcome(End.EXIT, 0, 0.1, 0.1), b"", b"")


@pytest.fixture(scope="module")
def quick():
    """A host whose executors are such: its address, and what it said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosts, "Executor", Quick)
        with serving() as found:
            yield found


@contextlib.contextmanager
def line_to(address, secret=SECRET):
    name, _, port = address.rpartition(":")
    with contextlib.closing(Channel(socket.create_connection((name, int(port))))) as line:
        line.enter(secret, 5.0)
        line.send({"bubblewrap": False})
        words = line.receive()[0]
        assert words["executors"] == 1 and words["like"]["bubblewrap"] == "not used"
        yield line
        line.shut()


def word(line):
    """The next word that is no beat."""
    while (words := line.receive(60.0, (1 << 16, 1 << 20, 1 << 24))[0]) == BEAT:
        pass
    return words


def prepared(line, **changes):
    line.send({"settings": settings(SMALL, "").to_json() | changes})
    return word(line)


def test_a_conversation(quick):
    address, _ = quick
    with line_to(address) as line:
        line.send(PING)
        assert line.receive()[0] == BEAT
        assert prepared(line) == READY
        line.send(WANT)
        assert word(line) == ROOM
        line.send(UNWANT)
        line.send(WANT)
        assert word(line) == ROOM
        line.send({"run": 7, "watched": False, "code": "x = 1", "kind": "training"})
        answer = word(line)
        assert answer["number"] == 7 and answer["outcome"]["end"] == "exit"


BAD = {
    "words that it does not know": {"open": "/etc/passwd"},
    "a script before settings": WANT,
    "settings of another version": {"settings": {"directory": "/"}},
    "settings that are none": {"settings": [1]},
}
NOT_SETTINGS = {
    "another sandbox": {"sandbox": "unsafe"},
    "too many pixels": {"max_pixels": 1 << 40},
    "no seconds": {"wall_seconds": float("nan")},
    "no numbers": {"memory_mb": "2048"},
    "no modules": {"preload": [1]},
    "no style": {"rc_params": [1]},
    "no truth": {"partial": 1},
}


@pytest.mark.parametrize("case", [*BAD, *NOT_SETTINGS])
def test_a_trainer_that_says_what_cannot_be_is_left_and_no_other(quick, case):
    address, said = quick
    with line_to(address) as line:
        if case in BAD:
            line.send(BAD[case])
        else:
            line.send({"settings": settings(SMALL, "").to_json() | NOT_SETTINGS[case]})
        with pytest.raises((EOFError, ConnectionError)):
            word(line)
    until(lambda: any("it is no trainer of this version" in line for line in said))
    with line_to(address) as line:
        line.send(PING)
        assert line.receive()[0] == BEAT


@pytest.mark.parametrize(
    "script",
    [
        {"run": "1", "watched": False, "code": "x", "kind": "training"},
        {"run": 1, "watched": 1, "code": "x", "kind": "training"},
        {"run": 1, "watched": False, "code": 5, "kind": "training"},
        {"run": 1, "watched": False, "code": "#" * ((1 << 19) + 1), "kind": "training"},
        {"run": 1, "watched": False, "code": "x", "kind": "everything"},
        {"run": 1},
    ],
)
def test_a_script_that_cannot_be_frees_its_room(quick, script):
    address, _ = quick
    with line_to(address) as line:
        assert prepared(line) == READY
        line.send(WANT)
        assert word(line) == ROOM
        line.send(script)
        with pytest.raises((EOFError, ConnectionError)):
            word(line)


def test_another_secret_is_said_here_and_there(quick):
    address, said = quick
    with pytest.raises(Refused), line_to(address, b"another secret of a trainer"):
        pass
    until(lambda: "127.0.0.1: it does not know the secret" in said)
    assert not any("another secret of" in line or SECRET.decode() in line for line in said)


def test_settings_that_no_executor_starts_with_are_said_to_the_trainer(quick):
    address, said = quick
    with line_to(address) as line:
        answer = prepared(line, rc_params={"not_a_setting": 1})
    assert "not_a_setting" in answer["failed"]
    until(lambda: any("not_a_setting" in line for line in said))


def test_executors_have_a_bound_for_all_trainers_together(quick):
    address, _ = quick
    with line_to(address) as first, line_to(address) as second, line_to(address) as third:
        assert prepared(first) == prepared(second) == READY
        assert prepared(third) == FULL
    until(lambda: _is_ready(address))


def _is_ready(address):
    with line_to(address) as line:
        return prepared(line) == READY


def test_pools_share_the_room_and_no_executor(quick, tmp_path):
    address, _ = quick
    Quick.times.clear()
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    config = dataclasses.replace(SMALL, hosts=(address,), secret=str(secret))
    with ExecutorPool(config) as one, ExecutorPool(config) as other:
        futures = [pool.submit(f"x = {i}") for i in range(9) for pool in (one, other)]
        assert {future.result(60).status for future in futures} == {Status.KILLED}
    assert len(Quick.times) >= 18 and len({executor for *_, executor in Quick.times}) == 2
    assert all(end <= begin for (_, end, _), (begin, _, _) in itertools.pairwise(Quick.times))


def test_a_trainer_that_goes_takes_its_executor_and_script_along(tmp_path, monkeypatch):
    monkeypatch.setattr(local.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(hosts, "Executor", local.Executor)
    with serving() as (address, _):
        with line_to(address) as line:
            assert prepared(line, wall_seconds=60.0, cpu_seconds=60.0) == READY
            line.send(WANT)
            assert word(line) == ROOM
            line.send({"run": 1, "watched": False, "code": "while True: pass", "kind": "training"})
            assert line.receive()[0] == BEAT
            assert attacks.processes_of(str(tmp_path)) > 0
        until(lambda: attacks.processes_of(str(tmp_path)) == 0)
    assert list(tmp_path.iterdir()) == []


def test_settings_become_those_of_the_host_but_for_limits_and_style():
    here = EnvConfig(workers=3, python="python", sandbox=SandboxMode.AUTO)
    asked = dataclasses.replace(SMALL, dpi=50, rc_params={"a": 1}, partial=True, landlock_abi=2)
    got = config_of(settings(asked, "/etc"), here, is_wrapped=False)
    assert (got.workers, got.python, got.dpi, got.rc_params) == (3, "python", 50, {"a": 1})
    assert (got.partial, got.landlock_abi, got.bubblewrap) == (True, 2, False)
    assert got.wall_seconds == 10 and got.preload == ()

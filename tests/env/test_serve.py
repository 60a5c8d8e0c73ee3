"""`env.serve` as users run it: processes that are killed, stopped and started again."""

import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from mmrecoder_jax.env import EnvConfig, ExecutorPool, channel, remote, serve
from tests.env import attacks
from tests.env.test_remote import until

BAR = """\
import matplotlib.pyplot as plt
fig, ax = plt.subplots(figsize=(2, 1))
ax.bar(['a', 'b'], [1, {}], color='red')
"""
NAP = "import time\ntime.sleep(0.5)\nx = {}"
SMALL = {"preload": (), "wall_seconds": 20.0}


class Served:
    """An `env.serve` process, which can be started again."""

    def __init__(self, folder, secret):
        self.folder, self._secret = folder, secret
        self.address = "127.0.0.1:0"
        folder.mkdir()
        self.begin()

    def begin(self):
        command = [sys.executable, "-m", "mmrecoder_jax.env.serve", "--executors=1"]
        command += [f"--listen={self.address}", f"--secret={self._secret}"]
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"TMPDIR": str(self.folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self):
        self.address = self.process.stdout.readline().partition(" ")[0]
        assert self.address.startswith("127.0.0.1:"), self.address + self.process.stdout.read()

    def start(self):
        self.begin()
        self.wait()

    def left(self):
        """Files and other processes of it."""
        return [*self.folder.iterdir(), *["process"] * attacks.processes_of(str(self.folder))]

    def end(self, number):
        """Sends a signal; the exit status, and what was said since the start."""
        self.process.send_signal(number)
        said = self.process.stdout.read()
        return self.process.wait(30), said


@pytest.fixture
def secret(tmp_path):
    file = tmp_path / "secret"
    serve.main([f"--new-secret={file}"])
    return file


@pytest.fixture
def served(tmp_path, secret):
    """Two hosts with one executor each."""
    hosts = [Served(tmp_path / name, secret) for name in ("one", "two")]
    for host in hosts:
        host.wait()
    yield hosts
    for host in hosts:
        with contextlib.suppress(ProcessLookupError):
            host.process.kill()
        host.process.communicate()


@pytest.fixture
def impatient(monkeypatch):
    """A pool that notices soon that a host hangs, and soon tries it again."""
    monkeypatch.setattr(channel, "SILENCE_SECONDS", 2.5)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.2)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.5)


@pytest.fixture
def of_both(served, secret, impatient):
    """A pool that runs nothing itself."""
    addresses = tuple(host.address for host in served)
    with ExecutorPool(EnvConfig(workers=0, hosts=addresses, secret=str(secret), **SMALL)) as pool:
        yield pool


def test_hosts_that_are_killed_and_started_again_lose_nothing(served, of_both, pool, capsys):
    one, two = served
    codes = [BAR.format(2), "raise ValueError('no')", "import os\nos._exit(0)", "open('/etc/x')"]
    naps = [of_both.submit(NAP.format(i)) for i in range(6)]
    until(lambda: min(_answers(of_both, one), _answers(of_both, two)) >= 1)
    time.sleep(0.2)  # each has its second one
    one.process.kill()
    assert {nap.result(60).status for nap in naps} == {"no_figure"}
    until(lambda: one.left() == [])
    _check(of_both.run(codes), pool.run(codes))

    one.process.communicate()
    one.start()
    until(lambda: of_both.stats()["hosts_up"] == 2)
    before = _answers(of_both, one)
    for number in itertools.count():
        of_both.run([NAP.format(f"{number}, {i}") for i in range(2)])
        if _answers(of_both, one) > before:
            break
    stats = of_both.stats()
    assert stats["hosts_lost"] == stats["retries"] == 1 and stats["hosts_lied"] == 0
    assert (
        stats["executions"] == stats["requests"] == _answers(of_both, one) + _answers(of_both, two)
    )
    said = capsys.readouterr().err
    assert said.count(f"executor host {one.address}: ") == 1, said
    assert f"executor host {one.address} is back" in said
    for host, number in ((one, signal.SIGTERM), (two, signal.SIGINT)):
        assert host.end(number) == (0, "ending\n") and host.left() == []


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.9, 1.2, 1.5])
def test_a_host_that_ends_while_it_starts_leaves_nothing(tmp_path, seconds):
    command = [sys.executable, "-m", "mmrecoder_jax.env.serve", "--listen=127.0.0.1:0"]
    process = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)})
    time.sleep(seconds)
    process.terminate()
    assert process.wait(30) in (0, -signal.SIGTERM)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_host_that_is_stopped_is_left_and_taken_back(served, of_both, capsys):
    one, two = served
    naps = [of_both.submit(NAP.format(i)) for i in range(6)]
    until(lambda: min(_answers(of_both, one), _answers(of_both, two)) >= 1)
    time.sleep(0.2)
    two.process.send_signal(signal.SIGSTOP)
    assert {nap.result(60).status for nap in naps} == {"no_figure"}
    until(lambda: of_both.stats()["hosts_up"] == 1)
    two.process.send_signal(signal.SIGCONT)
    until(lambda: of_both.stats()["hosts_up"] == 2)
    assert of_both.stats()["hosts_lost"] == 1 and of_both.stats()["executions"] == 6
    assert capsys.readouterr().err.count(f"{two.address}: it does not answer; its scripts") == 1


def _answers(pool, host):
    return pool.stats()[f"host_{host.address}"]


def _check(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.status, mine.error, mine.record) == (
            theirs.status,
            theirs.error,
            theirs.record,
        )
        assert (mine.image is None) == (theirs.image is None)
        assert mine.image is None or np.array_equal(mine.image, theirs.image)


def test_a_port_is_of_one_host():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        assert _refused(f"--listen={address}") == (
            f"error: --listen={address!r}: Address already in use: choose an address of this "
            "machine and a port that is free"
        )


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--listen=0.0.0.0:0"], "can be reached from other machines, so it needs --secret=FILE"),
        (["--listen=[::]:0"], "can be reached from other machines, so it needs --secret=FILE"),
        (["--listen=7435"], "--listen='7435': use NAME:PORT"),
        (["--listen=127.0.0.1:port"], "use NAME:PORT"),
        (["--listen=no.such.host.invalid:1", "--secret={secret}"], "choose an address of this"),
        (["--secret=missing"], "--secret='missing' cannot be read (No such file or directory)"),
        (["--executors=0"], "--executors=0: use 1 or more"),
        (["--executors=3", "--processes=2"], "--processes=2: use --executors=3 or more"),
        (["--python=missing"], "--python='missing' does not exist"),
        (["--sandbox=none"], "invalid choice: 'none'"),
        (["--new-secret={secret}"], "exists: name a new file"),
        (["--secrets=x"], "did you mean --secret?"),
    ],
)
def test_what_cannot_be_is_one_line(flags, problem, secret, monkeypatch):
    monkeypatch.setattr(serve, "_wait", lambda *_: None)  # where it is not refused
    found = _refused(*(flag.replace("{secret}", str(secret)) for flag in flags))
    assert found.startswith("error: ") and problem in found and "\n" not in found


def _refused(*flags):
    with pytest.raises(SystemExit) as ended:
        serve.main(list(flags))
    return str(ended.value)


def test_a_new_secret_is_for_its_user_alone(tmp_path, capsys):
    file = tmp_path / "secret"
    assert serve.main([f"--new-secret={file}"]) == 0
    assert file.stat().st_mode & 0o777 == 0o600
    made = channel.read_secret(str(file), "--secret")
    assert len(made) == 64 and made.decode() not in capsys.readouterr().out


@pytest.mark.slow
def test_under_fire_no_script_is_lost_or_comes_out_otherwise(served, secret, impatient):
    """150 scripts, while every two seconds a host is killed and started again, or stopped."""
    kinds = [BAR, NAP, "raise ValueError({})", "import os\nos._exit({} % 3)"]
    codes = [kinds[i % len(kinds)].format(i) for i in range(150)]
    with ExecutorPool(EnvConfig(workers=2, **SMALL)) as pool:
        expected = pool.run(codes)
    config = EnvConfig(
        workers=1, hosts=tuple(host.address for host in served), secret=str(secret), **SMALL
    )
    over = threading.Event()

    def fire():
        chance = random.Random(0)
        while not over.wait(2.0):
            host = chance.choice(served)
            if chance.random() < 0.5:
                host.process.kill()
                host.process.communicate()
                host.start()
            else:
                host.process.send_signal(signal.SIGSTOP)
                time.sleep(chance.uniform(0.5, 4.0))
                host.process.send_signal(signal.SIGCONT)

    thread = threading.Thread(target=fire)
    thread.start()
    try:
        with ExecutorPool(config) as pool:
            _check(pool.run(codes), expected)
            assert pool.stats()["executions"] == len(codes)
    finally:
        over.set()
        thread.join()

"""The quota: a real process under its filter, counted by a real meter (test_attacks passes it)."""

import contextlib
import os
import select
import signal
import socket
from collections.abc import Callable

import pytest

from mmrecoder_jax.env.sandbox import confinement, quota


def counted(work: Callable[[], object], folder) -> tuple[bool, int, int]:
    """Runs `work` in a confined fork: whether it came to its end, its files, its megabytes left."""
    inside = confinement.prepare("seccomp", None, str(folder), ())
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            confinement.enter(inside, theirs.detach())
            work()
            os.write(3, b"end")
        os._exit(0)
    theirs.close()
    fits, said = True, b""
    with ours, contextlib.closing(quota.Meter(ours)) as meter:
        while fits:
            ready = select.select([ours, meter.descriptor], [], [])[0]
            if ours not in ready:
                fits = meter.count()
            elif piece := ours.recv(100):
                said += piece
            else:
                break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return fits and said == b"end", meter.created, meter.left >> 20


def write(megabytes: int, name: str = "f") -> None:
    with open(name, "wb", buffering=0) as file:
        for _ in range(megabytes):
            file.write(bytes(1 << 20))


def test_what_is_written_is_counted(tmp_path):
    assert counted(lambda: write(9), tmp_path) == (True, 1, 54)
    assert counted(lambda: write(63), tmp_path) == (True, 1, 0)
    assert counted(lambda: write(65), tmp_path)[0] is False


def test_what_is_allocated_is_counted(tmp_path):
    def allocate() -> None:
        os.posix_fallocate(os.open("f", os.O_RDWR | os.O_CREAT), 0, 9 << 20)

    assert counted(allocate, tmp_path) == (True, 1, 54)


def test_files_and_folders_are_counted(tmp_path):
    def make(files: int, folders: int) -> Callable[[], None]:
        def work() -> None:
            for number in range(files):
                os.close(os.open(f"f{number}", os.O_CREAT | os.O_RDWR))
            for number in range(folders):
                os.mkdir(f"d{number}")

        return work

    assert counted(make(1000, 300), tmp_path) == (True, 1300, 37)
    (tmp_path / "second").mkdir()
    assert counted(make(0, 1100), tmp_path / "second")[0] is False


@pytest.mark.parametrize("descriptor", [0, 1, 2, 3])
def test_the_first_descriptors_cannot_become_files(tmp_path, descriptor):
    def hide() -> None:
        file = os.open("f", os.O_RDWR | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(descriptor)
        assert os.dup(file) > 3
        assert os.fstat(descriptor).st_ino != os.fstat(file).st_ino

    assert counted(hide, tmp_path)[0] is True


def test_a_process_that_dies_unconfined_is_noticed():
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(EOFError, match="before it was confined"):
        quota.Meter(ours)

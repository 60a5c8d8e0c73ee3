"""The list of system calls and the program made of it, without running it (test_attacks does)."""

import struct

import pytest

from mmrecoder_jax.env.sandbox import syscalls

ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def verdict(machine: str, number: int, *arguments: int, arch: int | None = None) -> int:
    """What the kernel would do with a call: the instructions that the program uses, in Python."""
    data = struct.pack("<IIQ6Q", number, arch or ARCH[machine], 0, *(*arguments, *[0] * 6)[:6])
    code = list(struct.iter_unpack("<HBBI", syscalls.program(machine)))
    at = accumulator = 0
    while True:
        op, true, false, value = code[at]
        at += 1
        if op == 0x06:
            return value
        if op == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif op == 0x54:
            accumulator &= value
        else:
            tests = {0x15: accumulator == value, 0x35: accumulator >= value}
            at += true if tests.get(op, bool(accumulator & value)) else false


@pytest.mark.parametrize("machine", ARCH)
def test_what_is_on_the_list_is_allowed_and_nothing_else(machine):
    known = syscalls.numbers(machine)
    checked = {"open", "openat", "fcntl", "ioctl", "clone", "prlimit64", "clone3", "openat2"}
    for name in known.keys() - checked:
        assert verdict(machine, known[name]) == ALLOW, name
    for number in set(range(600)) - set(known.values()):
        assert verdict(machine, number) == EPERM, number


@pytest.mark.parametrize("machine", ARCH)
def test_arguments_are_looked_at(machine):
    call = syscalls.numbers(machine)
    assert verdict(machine, call["openat"], 0, 0, 0o101) == ALLOW  # O_WRONLY | O_CREAT
    assert verdict(machine, call["openat"], 0, 0, 0o1001) == ALLOW  # O_WRONLY | O_TRUNC
    assert verdict(machine, call["openat"], 0, 0, 0o1000) == EPERM  # O_RDONLY | O_TRUNC
    assert verdict(machine, call["openat"], 0, 0, 0o3) == EPERM  # access mode 3
    assert verdict(machine, call["fcntl"], 0, 1) == ALLOW  # F_GETFD
    assert verdict(machine, call["fcntl"], 0, 6) == EPERM  # F_SETLK
    assert verdict(machine, call["clone"], 0x7D0F00) == ALLOW  # a thread
    assert verdict(machine, call["clone"], 17) == EPERM  # a process
    assert verdict(machine, call["clone3"]) == ENOSYS
    assert verdict(machine, call["prlimit64"], 0, 7, 0) == ALLOW  # reading one's own limits
    assert verdict(machine, call["prlimit64"], 1, 7, 0) == EPERM
    assert verdict(machine, call["prlimit64"], 0, 7, 1 << 40) == EPERM


def test_calls_of_another_architecture_end_the_process():
    assert verdict("x86_64", 0, arch=0x40000003) == KILL  # i386, as by int 0x80
    assert verdict("x86_64", 0x40000000) == EPERM  # x32


def test_an_unknown_processor_is_named():
    with pytest.raises(syscalls.UnsupportedMachine, match="'riscv64'"):
        syscalls.program("riscv64")

"""The list of system calls and the program made of it, without running it (test_attacks does)."""

import struct

import pytest

from mmrecoder_jax.env.sandbox import syscalls

ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
ASK, IN_VAIN = 0x7FC00000, 0x00050000
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def verdict(
    machine: str, number: int, *arguments: int, arch: int | None = None, make=syscalls.program
) -> int:
    """What the kernel would do with a call: the instructions that the program uses, in Python."""
    data = struct.pack("<IIQ6Q", number, arch or ARCH[machine], 0, *(*arguments, *[0] * 6)[:6])
    code = list(struct.iter_unpack("<HBBI", make(machine)))
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
    checked |= {"close", "close_range", "dup2", "dup3"}
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


@pytest.mark.parametrize("machine", ARCH)
def test_the_first_descriptors_stay_what_they_are(machine):
    call = syscalls.numbers(machine)
    for name in ("close", "close_range"):
        assert [verdict(machine, call[name], fd) for fd in (0, 3, 4)] == [IN_VAIN, IN_VAIN, ALLOW]
    for name in {"dup2", "dup3"} & call.keys():
        assert verdict(machine, call[name], 7, 3) == IN_VAIN
        assert verdict(machine, call[name], 3, 7) == ALLOW


@pytest.mark.parametrize("machine", ARCH)
def test_files_cannot_be_written_through_memory(machine):
    mmap = syscalls.numbers(machine)["mmap"]
    assert verdict(machine, mmap, 0, 9, 1, 0x01, 5) == EPERM  # MAP_SHARED
    assert verdict(machine, mmap, 0, 9, 1, 0x03, 5) == EPERM  # MAP_SHARED_VALIDATE
    assert verdict(machine, mmap, 0, 9, 1, 0x02, 5) == ALLOW  # MAP_PRIVATE
    assert verdict(machine, mmap, 0, 9, 3, 0x21) == ALLOW  # MAP_SHARED | MAP_ANONYMOUS


@pytest.mark.parametrize("machine", ARCH)
def test_what_takes_up_room_is_asked_for_and_nothing_else(machine):
    call = syscalls.numbers(machine)
    asked = {
        "write": (4,),
        "pwrite64": (4,),
        "fallocate": (4,),
        "mkdir": (),
        "mkdirat": (),
        "open": (0, 0o101),
        "openat": (0, 0, 0o101),
    }
    for name, number in call.items():
        wanted = ASK if name in asked else ALLOW
        assert verdict(machine, number, *asked.get(name, ()), make=syscalls.asking) == wanted, name
    temporary = 0o20000002  # O_TMPFILE, without the flags that differ between processors
    assert verdict(machine, call["openat"], 0, 0, temporary, make=syscalls.asking) == ASK
    assert verdict(machine, call["openat"], 0, 0, 0o1, make=syscalls.asking) == ALLOW
    assert verdict(machine, call["write"], 3, make=syscalls.asking) == ALLOW  # the result


def test_no_call_that_writes_what_cannot_be_counted_is_known():
    unknown = "writev pwritev pwritev2 sendfile splice tee copy_file_range link symlink rename"
    known = syscalls.numbers("x86_64").keys() & set(unknown.split())
    assert known == {"rename"}  # takes no room


def test_calls_of_another_architecture_end_the_process():
    assert verdict("x86_64", 0, arch=0x40000003) == KILL  # i386, as by int 0x80
    assert verdict("x86_64", 0x40000000) == EPERM  # x32


def test_an_unknown_processor_is_named():
    with pytest.raises(syscalls.UnsupportedMachine, match="'riscv64'"):
        syscalls.program("riscv64")

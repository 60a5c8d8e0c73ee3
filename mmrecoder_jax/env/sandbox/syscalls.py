"""The system calls that a plotting script may make, and the seccomp programs for them.

`program` is a default-deny list: what is not here fails with EPERM, which the script sees as a
PermissionError. Without fork, exec, sockets and signals a script stays one process that can
compute, use threads, and handle the files that Landlock leaves it.

`asking` stops a script where it takes up room on the disk, until that is counted (`quota.py`). So
that everything is, some usual calls are missing: writev and its kin and sendfile, of which the
arguments do not tell how much they write (libraries use others where these fail), and mappings of
files that are shared. The first four descriptors are /dev/null and the result, where writing is
free: closing them, or putting another file there, has no effect.
"""

import errno
import os
import platform
import struct

# name, number on x86_64, number on aarch64 ("-": does not exist there)
_TABLE = """
read 0 63, write 1 64, readv 19 65, pread64 17 67, pwrite64 18 68, preadv 295 69, preadv2 327 286,
lseek 8 62, close 3 57, close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -,
pipe2 293 59, stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291, access 21 -,
faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78, getdents 78 -,
getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50, mkdir 83 -, mkdirat 258 34, rmdir 84 -,
unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276, ftruncate 77 46,
fallocate 285 47, fsync 74 82, fdatasync 75 83, fadvise64 221 223, umask 95 166, mmap 9 222,
mprotect 10 226, munmap 11 215, mremap 25 216, brk 12 214, madvise 28 233, mincore 27 232,
msync 26 227, futex 202 98, futex_waitv 449 449, set_robust_list 273 99, get_robust_list 274 100,
rseq 334 293, set_tid_address 218 96, sched_yield 24 124, sched_getaffinity 204 123,
sched_getparam 143 121, sched_getscheduler 145 120, sched_get_priority_max 146 125,
sched_get_priority_min 147 126, getcpu 309 168, exit 60 93, exit_group 231 94, rt_sigaction 13 134,
rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137,
sigaltstack 131 132, restart_syscall 219 128, clock_gettime 228 113, clock_getres 229 114,
clock_nanosleep 230 115, gettimeofday 96 169, time 201 -, times 100 153, nanosleep 35 101,
getitimer 36 102, getpid 39 172, gettid 186 178, getppid 110 173, getuid 102 174, geteuid 107 175,
getgid 104 176, getegid 108 177, getresuid 118 148, getresgid 120 150, getgroups 115 158,
getpgrp 111 -, getpgid 121 155, getsid 124 156, uname 63 160, sysinfo 99 179, getrusage 98 165,
getrlimit 97 163, getrandom 318 278, membarrier 324 283, poll 7 -, ppoll 271 73, select 23 -,
pselect6 270 72, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -,
epoll_pwait 281 22, eventfd 284 -, eventfd2 290 19, open 2 -, openat 257 56, fcntl 72 25,
ioctl 16 29, clone 56 220, clone3 435 435, openat2 437 437, prlimit64 302 261
"""
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000

_LOAD, _JUMP_EQ, _JUMP_GE, _JUMP_SET, _RETURN, _AND = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54
_ALLOW, _ASK, _KILL, _ERRNO = 0x7FFF0000, 0x7FC00000, 0x80000000, 0x00050000
_NUMBER, _ARCH = 0, 4  # offsets in struct seccomp_data; argument i is at 16 + 8 * i, low word first

# What is counted, and which argument says how many bytes.
WRITES = {"write": 2, "pwrite64": 2, "fallocate": 3}
FOLDERS = ("mkdir", "mkdirat")
_O_ACCMODE, _O_TRUNC = 0o3, 0o1000
_CREATES = os.O_CREAT | (os.O_TMPFILE & ~os.O_DIRECTORY)
_MAP_SHARED, _MAP_ANONYMOUS = 0x01, 0x20
_FIRST_FREE = 4  # descriptor
_THREAD_FLAGS = 0x7D0F00  # what pthread_create asks for (glibc, musl); no other clone
_CLONE_THREAD = 0x10000
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: no locks, owners, leases, pipe sizes
_FCNTL = (0, 1, 2, 3, 4, 1030)
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)


class UnsupportedMachine(RuntimeError):
    """The list is not known for this processor."""


def numbers(machine: str) -> dict[str, int]:
    """The numbers of the allowed calls by name on "x86_64" or "aarch64".

    Raises:
      UnsupportedMachine: another machine type.
    """
    if machine not in _AUDIT_ARCH:
        raise UnsupportedMachine(
            f"no list of system calls for {machine!r}; known: {', '.join(_AUDIT_ARCH)}"
        )
    column = 1 + list(_AUDIT_ARCH).index(machine)
    rows = (entry.split() for entry in _TABLE.replace("\n", " ").split(","))
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


_Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, value


def program(machine: str | None = None) -> bytes:
    """The list as a BPF program, an array of struct sock_filter, for `machine`: by default this
    one's type.

    Raises:
      UnsupportedMachine: no list for this machine type.
    """
    machine = machine or platform.machine()
    deny, missing = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
    in_vain = _ERRNO  # error 0: nothing is done, and success reported
    checks = {
        # Landlock before ABI 3 does not see O_TRUNC, nor access mode 3: only files opened for
        # writing may be truncated.
        "open": _open_check(1),
        "openat": _open_check(2),
        "fcntl": _one_of(1, _FCNTL),
        "ioctl": _one_of(1, _IOCTL),
        "clone": [
            (_LOAD, 0, 0, 16),
            (_JUMP_SET, 1, 0, ~_THREAD_FLAGS & 0xFFFFFFFF),
            (_JUMP_SET, 1, 0, _CLONE_THREAD),
            *_verdicts(),
        ],
        # Reading one's own limits; as root, or for another process, setting them would matter.
        "prlimit64": [*_zero(16), *_zero(32), *_zero(36), (_RETURN, 0, 0, _ALLOW)],
        # C libraries fall back to calls whose arguments can be looked at.
        "clone3": [(_RETURN, 0, 0, missing)],
        "openat2": [(_RETURN, 0, 0, missing)],
        "mmap": [
            (_LOAD, 0, 0, 16 + 8 * 3),
            (_JUMP_SET, 2, 0, _MAP_ANONYMOUS),
            (_JUMP_SET, 0, 1, _MAP_SHARED),
            *_verdicts(),
        ],
        "close": _from(_FIRST_FREE, 0, _ALLOW, in_vain),
        "close_range": _from(_FIRST_FREE, 0, _ALLOW, in_vain),
        "dup2": _from(_FIRST_FREE, 1, _ALLOW, in_vain),
        "dup3": _from(_FIRST_FREE, 1, _ALLOW, in_vain),
    }
    bodies = {name: checks.get(name, [(_RETURN, 0, 0, _ALLOW)]) for name in numbers(machine)}
    return _assemble(machine, bodies, deny)


def asking(machine: str | None = None) -> bytes:
    """The BPF program that has calls counted which take up room on the disk; it allows the others.

    Raises:
      UnsupportedMachine: no list for this machine type.
    """
    machine = machine or platform.machine()
    bodies = {name: _from(_FIRST_FREE, 0, _ASK, _ALLOW) for name in WRITES}
    for name, flags in (("open", 1), ("openat", 2)):
        bodies[name] = [
            (_LOAD, 0, 0, 16 + 8 * flags),
            (_JUMP_SET, 0, 1, _CREATES),
            (_RETURN, 0, 0, _ASK),
            (_RETURN, 0, 0, _ALLOW),
        ]
    bodies |= {name: [(_RETURN, 0, 0, _ASK)] for name in FOLDERS}
    known = numbers(machine)
    return _assemble(machine, {name: bodies[name] for name in bodies if name in known}, _ALLOW)


def _assemble(machine: str, bodies: dict[str, list[_Instruction]], otherwise: int) -> bytes:
    """A program that reads the number of a call and jumps over the bodies of others to its own:

    arch != ours: kill;  x32: refuse;  number == 0: allow;  number == 2: look at the flags; ...
    """
    code = [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_EQ, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    code += [(_JUMP_GE, 0, 1, _X32_BIT), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    calls = numbers(machine)
    for name, body in bodies.items():
        code += [(_JUMP_EQ, 0, len(body), calls[name]), *body]
    code.append((_RETURN, 0, 0, otherwise))
    return b"".join(struct.pack("<HBBI", op, true, false, value) for op, true, false, value in code)


def _from(least: int, argument: int, verdict: int, below: int) -> list[_Instruction]:
    """`verdict` where the argument is `least` or more."""
    return [
        (_LOAD, 0, 0, 16 + 8 * argument),
        (_JUMP_GE, 0, 1, least),
        (_RETURN, 0, 0, verdict),
        (_RETURN, 0, 0, below),
    ]


def _verdicts() -> list[_Instruction]:
    """Falls into a refusal; one instruction further on is a permission."""
    return [(_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ALLOW)]


def _zero(offset: int) -> list[_Instruction]:
    return [(_LOAD, 0, 0, offset), (_JUMP_EQ, 1, 0, 0), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]


def _one_of(argument: int, values: tuple[int, ...]) -> list[_Instruction]:
    jumps = [(_JUMP_EQ, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [(_LOAD, 0, 0, 16 + 8 * argument), *jumps, *_verdicts()]


def _open_check(argument: int) -> list[_Instruction]:
    return [
        (_LOAD, 0, 0, 16 + 8 * argument),
        (_AND, 0, 0, _O_ACCMODE | _O_TRUNC),
        (_JUMP_EQ, 3, 0, _O_TRUNC),
        (_JUMP_EQ, 2, 0, _O_ACCMODE),
        (_JUMP_EQ, 1, 0, _O_ACCMODE | _O_TRUNC),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]

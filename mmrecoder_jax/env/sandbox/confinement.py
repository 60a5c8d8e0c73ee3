"""What keeps a hostile script inside: Linux's own unprivileged means.

The trainer checks that this host has them (`check`), the zygote builds them once (`prepare`), and
every child enters them between fork and script (`enter`). Layers, in the order they are entered
(docs/environment.md says what each stops, and what none does):

    session     own session, death with the zygote, no inherited descriptors, stdin and output to
                /dev/null, private working directory
    limits      address space, CPU time, file size, open files, no core dumps; all capabilities
                dropped but those to read files
    Landlock    reads only under the interpreter, its libraries and matplotlib's files; writes only
                in the working directory
    quota       what is written to disk is counted call by call (`quota.py`)
    seccomp     a default-deny list of system calls (`syscalls.py`)

Landlock and seccomp complete each other: without the first every file of the user is open, without
the second signals, sockets, chmod and truncation are. Where either is missing the environment
refuses to start, unless it is told `sandbox="unsafe"`.
"""

import ctypes
import dataclasses
import enum
import os
import platform
import resource
import signal
import site
import struct
import sys
import sysconfig
from collections.abc import Iterable

from mmrecoder_jax.env.sandbox import quota, syscalls


class SandboxMode(enum.StrEnum):
    """Which layers contain a script."""

    AUTO = "auto"  # all of them, or the environment does not start
    UNSAFE = "unsafe"  # none: a script can do whatever this user can
    # One layer alone, to see what the other one stops.
    LANDLOCK = "landlock"
    SECCOMP = "seccomp"

    @property
    def landlock(self) -> bool:
        return self in (SandboxMode.AUTO, SandboxMode.LANDLOCK)

    @property
    def seccomp(self) -> bool:
        return self in (SandboxMode.AUTO, SandboxMode.SECCOMP)


NEWEST_ABI = 6  # of Landlock, as far as this file knows its rights

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_SECCOMP_SET_MODE_FILTER, _SECCOMP_GET_ACTION_AVAIL = 1, 2
_FILTER_SPEC_ALLOW, _FILTER_NEW_LISTENER = 4, 8

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_READ = _READ_FILE | _READ_DIR
_WORK = (
    _READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _REFER | _TRUNCATE
)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class SandboxUnavailable(RuntimeError):
    """This host lacks a layer that the configuration asks for."""


@dataclasses.dataclass(frozen=True)
class Confinement:
    """What a zygote has built for its children to enter.

    Attributes:
      ruleset: descriptor of the Landlock rules, None without that layer.
      program: the seccomp program, None without that layer.
      asking: the one that has the disk's use counted; None as `program`.
      directory: working directory of the child, the only place it can write to.
      limits: (resource, soft, hard) triples.
      owner: the process that forks the children.
    """

    ruleset: int | None
    program: ctypes.Array[ctypes.c_char] | None
    asking: ctypes.Array[ctypes.c_char] | None
    directory: str
    limits: tuple[tuple[int, int, int], ...]
    owner: int


def landlock_abi() -> int:
    """The Landlock ABI of this kernel, 0 when there is none."""
    return max(
        0,
        _libc.syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint32(1)),
    )


def has_seccomp() -> bool:
    """Whether this kernel and processor take our filter."""
    number = _SECCOMP.get(platform.machine())
    if number is None:
        return False
    # SECCOMP_RET_ERRNO and SECCOMP_RET_USER_NOTIF, which our filters answer with
    return not any(
        _libc.syscall(
            ctypes.c_long(number),
            ctypes.c_uint(_SECCOMP_GET_ACTION_AVAIL),
            ctypes.c_uint(0),
            ctypes.byref(ctypes.c_uint32(action)),
        )
        for action in (0x00050000, 0x7FC00000)
    )


def check(sandbox: str) -> SandboxMode:
    """The mode of that name, where this host has its layers.

    Raises:
      ValueError: there is no such mode.
      SandboxUnavailable: this host lacks a layer.
    """
    if sandbox not in tuple(SandboxMode):
        raise ValueError(f"sandbox={sandbox!r}: choose one of {', '.join(SandboxMode)}")
    mode = SandboxMode(sandbox)
    missing = []
    if mode.landlock and not landlock_abi():
        missing.append(
            "Landlock (Linux 5.13 or newer, with landlock in the list of security modules)"
        )
    if mode.seccomp and not has_seccomp():
        missing.append("seccomp filters (Linux on x86_64 or aarch64)")
    if missing:
        raise SandboxUnavailable(
            f"this host lacks {' and '.join(missing)}, so model-written code cannot be contained. "
            "Run on another host, or accept that scripts can do whatever this user can: "
            'sandbox="unsafe" (--config.env.sandbox=unsafe).'
        )
    return mode


def prepare(
    sandbox: str,
    newest_abi: int | None,
    directory: str,
    limits: Iterable[tuple[int, int, int]],
) -> Confinement:
    """Builds the confinement of a zygote's children, once.

    Args:
      sandbox: a `SandboxMode`.
      newest_abi: use no newer Landlock ABI; None: the kernel's.
      directory: the child's working directory.
      limits: (resource, soft, hard) triples.

    Raises:
      SandboxUnavailable: a layer is missing.
    """
    mode = check(sandbox)
    ruleset = program = asking = None
    if mode.landlock:
        abi = min(landlock_abi(), NEWEST_ABI, newest_abi or NEWEST_ABI)
        ruleset = _ruleset(abi, directory, readable_paths())
    if mode.seccomp:
        program, asking = map(_buffer, (syscalls.program(), syscalls.asking()))
    return Confinement(ruleset, program, asking, directory, tuple(limits), os.getpid())


def enter(confinement: Confinement, keep: int) -> int:
    """Confines the calling process for good. It must be a fresh fork of a single-threaded process.

    Args:
      confinement: from `prepare`.
      keep: the one descriptor that stays open, a socket. With a quota, the first that is sent over
        it is what a `quota.Meter` needs; until there is one, nothing can be written.

    Returns:
      Its new number, 3.
    """
    os.setsid()
    _check(
        _libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0), "PR_SET_PDEATHSIG"
    )
    if os.getppid() != confinement.owner:
        raise ProcessLookupError("the zygote died before its child could be tied to it")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.chdir(confinement.directory)
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    if confinement.ruleset is not None:
        _check(
            _libc.syscall(
                ctypes.c_long(_RESTRICT_SELF), ctypes.c_int(confinement.ruleset), ctypes.c_uint32(0)
            ),
            "landlock_restrict_self",
        )
    os.dup2(keep, 3)
    os.closerange(4, 1 << 16)
    for name, soft, hard in confinement.limits:
        resource.setrlimit(name, (soft, hard))
    if confinement.program is not None and confinement.asking is not None:
        quota.hand_over(3, _load_filter(confinement.asking, _FILTER_NEW_LISTENER))
        _drop_capabilities()
        _load_filter(confinement.program)
    return 3


def readable_paths() -> list[str]:
    """What a script may read: the interpreter, its libraries, time zones, matplotlib's own files.

    Directories that an editable install or PYTHONPATH adds to `sys.path` are left out: a project's
    checkout may hold data.
    """
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    # In a virtual environment the standard library is that of the base installation.
    base = {
        "base": sys.base_prefix,
        "platbase": sys.base_exec_prefix,
        "installed_base": sys.base_prefix,
    }
    paths = [sysconfig.get_path(name) for name in names]
    paths += [sysconfig.get_path(name, vars=base) for name in names]
    paths += site.getsitepackages() + (
        [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    )
    paths += [
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        "/usr/local/lib",
        "/usr/share/zoneinfo",
        "/etc/localtime",
        "/etc/ld.so.cache",
    ]
    paths += [
        "/dev/null",
        "/dev/zero",
        "/dev/urandom",
        "/dev/random",
        os.environ.get("MPLCONFIGDIR", ""),
    ]
    return sorted({os.path.realpath(path) for path in paths if path and os.path.exists(path)})


def _ruleset(abi: int, directory: str, readable: Iterable[str]) -> int:
    """A Landlock ruleset: `readable` may be read, `directory` also written.

    Newer ABIs also handle TCP, abstract sockets and signals: none of them is allowed.
    """
    handled = (1 << 13) - 1  # every right of ABI 1
    for newer, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        handled |= right if abi >= newer else 0
    attributes = struct.pack("<Q", handled)
    if abi >= 4:
        attributes += struct.pack("<Q", 3)  # TCP bind and connect
    if abi >= 6:
        attributes += struct.pack("<Q", 3)  # abstract Unix sockets, signals
    ruleset = _libc.syscall(
        ctypes.c_long(_CREATE_RULESET),
        attributes,
        ctypes.c_size_t(len(attributes)),
        ctypes.c_uint32(0),
    )
    _check(ruleset, "landlock_create_ruleset")
    for path in readable:
        _allow(ruleset, path, _READ if os.path.isdir(path) else _READ_FILE)
    _allow(ruleset, os.devnull, _READ_FILE | _WRITE_FILE)
    _allow(ruleset, directory, _WORK & handled)
    return ruleset


def _allow(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("<Qi", rights, descriptor)
        result = _libc.syscall(
            ctypes.c_long(_ADD_RULE),
            ctypes.c_int(ruleset),
            ctypes.c_int(1),
            rule,
            ctypes.c_uint32(0),
        )
        _check(result, f"landlock_add_rule for {path}")
    finally:
        os.close(descriptor)


def _drop_capabilities() -> None:
    """Root keeps only the two capabilities to read files; others have none to lose.

    A package may lie in another user's folder, which root's interpreter has to read.
    """
    header = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    reading = 1 << 1 | 1 << 2 if os.geteuid() == 0 else 0  # DAC_OVERRIDE, DAC_READ_SEARCH
    data = struct.pack("<6I", reading, reading, 0, 0, 0, 0)
    number = ctypes.c_long(_CAPSET[platform.machine()])
    if _libc.syscall(number, header, data) and _libc.syscall(number, header, bytes(24)):
        raise OSError(ctypes.get_errno(), "capset")


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _load_filter(program: ctypes.Array[ctypes.c_char], flags: int = 0) -> int:
    described = _Program(len(program) // 8, ctypes.addressof(program))
    number = ctypes.c_long(_SECCOMP[platform.machine()])
    # Without SPEC_ALLOW older kernels slow the process down to guard secrets in it: it has none.
    flags |= _FILTER_SPEC_ALLOW
    operation = ctypes.c_uint(_SECCOMP_SET_MODE_FILTER)
    result = _libc.syscall(number, operation, ctypes.c_uint(flags), ctypes.byref(described))
    _check(result, "seccomp")
    return result


def _buffer(code: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(code, len(code))


def _check(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")

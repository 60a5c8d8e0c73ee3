"""What a script may write to disk, counted call by call.

Looking at the disk now and then can be fooled: by folders that cannot be listed or whose paths are
too long, by files without a name, by renaming while somebody looks. So nobody looks. The kernel
stops a script at every system call that may take up room, tells the zygote (a seccomp user
notification, for which `syscalls.asking` is the filter), and goes on when the zygote has counted:

    write, pwrite64, fallocate        the bytes that the call names, and two blocks, as they may
                                      begin and end inside one
    open with O_CREAT or O_TMPFILE    two blocks: a file, and room for its name
    mkdir                             sixteen: a disk may need milliseconds to remove a folder

All of these are plain arguments, which no thread can change after they were read. Calls whose bytes
are not among their arguments do not exist for a script (`syscalls.py`). What a script removes is
not given back to it. /dev/null and the result, which have the first four descriptors for good, are
free.
"""

import contextlib
import fcntl
import os
import platform
import socket
import struct

from mmrecoder_jax.env.sandbox import syscalls

DISK_MB = 64
_TWO_BLOCKS, _FOLDER = 2 << 12, 16 << 12
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND
_CONTINUE = 1
_NOTICE = struct.Struct("<Q2IiIQ6Q")  # id; process, flags; number, architecture, address, arguments
_ANSWER = struct.Struct("<QqiI")  # id, value, error, flags


class Meter:
    """Counts what one script writes.

    Attributes:
      descriptor: can be read when a call waits to be counted.
      created: how many files and folders the script asked for.
      left: bytes that it may still write.
    """

    def __init__(self, connection: socket.socket):
        """Takes the descriptor that `hand_over` has sent; raises EOFError where none comes."""
        _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
        if not descriptors:
            raise EOFError("the process ended before it was confined")
        (self.descriptor,) = descriptors
        self.created = 0
        self.left = DISK_MB << 20
        numbers = syscalls.numbers(platform.machine())
        self._writes = {numbers[name]: at for name, at in syscalls.WRITES.items()}
        self._folders = {numbers[name] for name in syscalls.FOLDERS if name in numbers}

    def count(self) -> bool:
        """Counts the call that waits, and lets it go on; False where it would pass the limit.

        Such a call is left waiting: its process must be killed.
        """
        notice = bytearray(_NOTICE.size)
        with contextlib.suppress(OSError):  # its process is gone
            fcntl.ioctl(self.descriptor, _RECEIVE, notice)
            name, _, _, number, _, _, *arguments = _NOTICE.unpack(notice)
            self.left -= _FOLDER if number in self._folders else _TWO_BLOCKS
            if number in self._writes:
                self.left -= arguments[self._writes[number]]
            else:
                self.created += 1
            if self.left < 0:
                return False
            fcntl.ioctl(self.descriptor, _SEND, _ANSWER.pack(name, 0, 0, _CONTINUE))
        return True

    def close(self) -> None:
        os.close(self.descriptor)


def hand_over(connection: int, listener: int) -> None:
    """Sends the descriptor that the filter gave to whoever makes a `Meter` of it, and closes it."""
    sender = socket.socket(fileno=connection)
    socket.send_fds(sender, [b"\0"], [listener])
    sender.detach()
    os.close(listener)

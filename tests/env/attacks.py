"""Hostile scripts, and the world they are let loose on.

As a program it prints {attack: what it achieved} as JSON, so that another user can run it.
"""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

from mmrecoder_jax.env import EnvConfig, Execution, ExecutorPool

TOKEN = "hf_CanaryTokenThatMustNotLeak"

# Each must have no effect on the world. What it learns it puts into its error text, or the word WON
# where it did what it must not. $NAME is filled in by the world.
QUIET = {
    # --- secrets
    "read_environ": "import os; raise ValueError(str(dict(os.environ)))",
    "read_trainer_environ": "raise ValueError(open('/proc/$TRAINER/environ').read())",
    "read_parent_environ": (
        "import os; raise ValueError(open(f'/proc/{os.getppid()}/environ').read())"
    ),
    "read_trainer_memory": (
        "f = open('/proc/$TRAINER/mem', 'rb'); f.seek(0x400000); f.read(10); raise ValueError(WON)"
    ),
    "read_secret_file": "raise ValueError(open('$SECRET').read())",
    "read_secret_by_numpy": (
        "import numpy; raise ValueError(str(numpy.fromfile('$SECRET', 'S1').tobytes()))"
    ),
    "read_secret_by_symlink": (
        "import os; os.symlink('$SECRET', 'here'); raise ValueError(open('here').read())"
    ),
    "read_secret_by_hardlink": (
        "import os; os.link('$SECRET', 'here'); raise ValueError(open('here').read())"
    ),
    "read_secret_by_chdir": (
        "import os; os.chdir('$VICTIM_DIR'); raise ValueError(open('secret').read())"
    ),
    "read_secret_by_proc_root": "raise ValueError(open('/proc/self/root$SECRET').read())",
    "read_secret_by_mmap": (
        "import mmap, os; raise ValueError(mmap.mmap(os.open('$SECRET', 0), 0, prot=1).read())"
    ),
    "read_secret_by_ctypes": (
        "import ctypes; c = ctypes.CDLL(None); fd = c.open(b'$SECRET', 0); "
        "b = ctypes.create_string_buffer(99); c.read(fd, b, 99)\n"
        "raise ValueError(b.value)"
    ),
    "read_secret_by_openat2": (
        "import ctypes, struct; c = ctypes.CDLL(None); how = struct.pack('QQQ', 0, 0, 0); "
        "b = ctypes.create_string_buffer(99)\n"
        "fd = c.syscall(437, -100, b'$SECRET', how, 24); c.read(fd, b, 99); "
        "raise ValueError(b.value)"
    ),
    "read_secret_by_image": (
        "import matplotlib.pyplot as plt; raise ValueError(plt.imread('$SECRET'))"
    ),
    "list_secret_dir": (
        "import os; raise ValueError(WON if 'secret' in os.listdir('$VICTIM_DIR') else '')"
    ),
    "read_passwd": "raise ValueError(WON if 'root' in open('/etc/passwd').read() else '')",
    "read_home": "import os; raise ValueError(WON if os.listdir('$REAL_HOME') is not None else '')",
    "read_sibling_log": "import glob; [open(p).read() for p in ['$LOG']]; raise ValueError(WON)",
    "read_inherited_descriptors": (
        "import os\n"
        "for fd in range(3, 300):\n"
        "    if fd == 3: continue\n"
        "    try: os.fstat(fd)\n"
        "    except OSError: continue\n"
        "    raise ValueError(WON)"
    ),
    "read_disk": "open('/dev/vda', 'rb'); raise ValueError(WON)",
    "scan_memory": (
        "import gc; "
        "raise ValueError([o for o in gc.get_objects() if isinstance(o, (str, "
        "bytes)) and 'Canary' in str(o)])"
    ),
    # --- network and other channels
    "tcp": "import socket; s = socket.create_connection(('127.0.0.1', $TCP), 1); s.send(b'x')",
    "tcp_by_urllib": (
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:$TCP/', timeout=1)"
    ),
    "tcp_by_syscall": (
        "import ctypes, struct; c = ctypes.CDLL(None); fd = c.socket(2, 1, 0)\n"
        "c.connect(fd, struct.pack('<H', 2) + struct.pack('>H', $TCP) + bytes([127, 0, 0, "
        "1]) + bytes(8), 16); "
        "c.write(fd, b'x', 1)"
    ),
    "udp": (
        "import socket; "
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', $UDP))"
    ),
    "abstract_socket": (
        "import socket; "
        "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', '\\0$ABSTRACT')"
    ),
    "path_socket": (
        "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', '$UNIX')"
    ),
    "fifo": "import os; fd = os.open('$FIFO', os.O_WRONLY | os.O_NONBLOCK); os.write(fd, b'x')",
    "shared_memory": (
        "import ctypes; c = ctypes.CDLL(None); assert c.shmget(0x5eed, 4096, 0o1666) >= 0; "
        "raise ValueError(WON)"
    ),
    "shm_file": (
        "from multiprocessing import shared_memory; "
        "shared_memory.SharedMemory('canary$TRAINER', True, 10); raise ValueError(WON)"
    ),
    "message_queue": (
        "import ctypes; c = ctypes.CDLL(None); assert c.msgget(0x5eed, 0o1666) >= 0; "
        "raise ValueError(WON)"
    ),
    "keyring": (
        "import ctypes; c = ctypes.CDLL(None); assert c.syscall(250, 0, -4, 1) >= 0; "
        "raise ValueError(WON)"
    ),
    # --- files of others
    "overwrite": "open('$VICTIM', 'w').write('x')",
    "append": "open('$VICTIM', 'a').write('x')",
    "remove": "import os; os.remove('$VICTIM')",
    "rename": "import os; os.rename('$VICTIM', '$VICTIM.gone')",
    "replace": "import os; open('x', 'w').close(); os.replace('x', '$VICTIM')",
    "truncate": "import os; os.truncate('$VICTIM', 0)",
    "truncate_readonly": "import os; os.open('$READABLE', os.O_RDONLY | os.O_TRUNC)",
    "truncate_mode_3": "import os; os.open('$VICTIM', 3 | os.O_TRUNC)",
    "truncate_path_mode": "import os; os.open('$READABLE', os.O_PATH | os.O_TRUNC | 3)",
    "creat_by_ctypes": "import ctypes; ctypes.CDLL(None).creat(b'$VICTIM', 0o600)",
    "chmod": "import os; os.chmod('$VICTIM', 0o777)",
    "fchmod": "import os; os.fchmod(os.open('$READABLE', os.O_RDONLY), 0o777)",
    "chown": "import os; os.chown('$VICTIM', 12345, 12345)",
    "utime": "import os; os.utime('$VICTIM', (1, 1))",
    "xattr": "import os; os.setxattr('$VICTIM', 'user.x', b'1'); raise ValueError(WON)",
    "symlink_out": "import os; os.symlink('x', '$VICTIM_DIR/link')",
    "mkdir_out": "import os; os.mkdir('$VICTIM_DIR/folder')",
    "write_tmp": "open('$VICTIM_DIR/../mmrecoder-canary-$TRAINER', 'w')",
    "write_dev_shm": "open('/dev/shm/mmrecoder-canary-$TRAINER', 'w')",
    "write_site_packages": (
        "import numpy, os; open(os.path.dirname(numpy.__file__) + '/canary.py', 'w')"
    ),
    "write_font_cache": "open('$READABLE', 'a').write('x')",
    "leave_working_directory": "open('../canary', 'w')",
    "rename_working_directory": "import os; os.rename(os.getcwd(), os.getcwd() + 'x')",
    "mknod": "import os; os.mknod('x', 0o600 | 0o020000, os.makedev(1, 1)); raise ValueError(WON)",
    "mount": (
        "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'.', b'tmpfs', 0, None) == 0; "
        "raise ValueError(WON)"
    ),
    "chroot": "import os; os.chroot('.'); raise ValueError(WON)",
    "lock": "import fcntl; fcntl.flock(open('$READABLE'), fcntl.LOCK_EX); raise ValueError(WON)",
    "lease": "import fcntl; fcntl.fcntl(open('$READABLE'), 1024, 0); raise ValueError(WON)",
    # --- processes
    "kill_victim": "import os; os.kill($BYSTANDER, 9)",
    "kill_trainer": "import os; os.kill($TRAINER, 12)",
    "kill_parent": "import os; os.kill(os.getppid(), 9)",
    "kill_group": "import os; os.kill(-1, 9)",
    "kill_by_pidfd": "import os, signal; signal.pidfd_send_signal(os.pidfd_open($BYSTANDER), 9)",
    "kill_by_sigqueue": "import ctypes; ctypes.CDLL(None).sigqueue($BYSTANDER, 9, 0)",
    "kill_by_tkill": "import ctypes; ctypes.CDLL(None).syscall(200, $BYSTANDER, 9)",
    "limits_of_victim": (
        "import resource; resource.prlimit($BYSTANDER, resource.RLIMIT_NOFILE, (7, 7))"
    ),
    "limits_of_self": (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n"
        "raise ValueError(WON if resource.getrlimit(resource.RLIMIT_AS)[0] == -1 else '')"
    ),
    "renice_victim": "import os; os.setpriority(os.PRIO_PROCESS, $BYSTANDER, 19)",
    "affinity_of_victim": (
        "import os; os.sched_setaffinity($BYSTANDER, [max(os.sched_getaffinity(0))])"
    ),
    "ptrace": (
        "import ctypes; assert ctypes.CDLL(None).ptrace(16, $BYSTANDER, 0, 0) == 0; "
        "raise ValueError(WON)"
    ),
    "vm_read": (
        "import ctypes; c = ctypes.CDLL(None); b = ctypes.create_string_buffer(16)\n"
        "class V(ctypes.Structure): _fields_ = [('b', ctypes.c_void_p), ('n', "
        "ctypes.c_size_t)]\n"
        "assert c.process_vm_readv($BYSTANDER, ctypes.byref(V(ctypes.addressof(b), 8)), 1, "
        "ctypes.byref(V(id(None), 8)), 1, 0) == 8; "
        "raise ValueError(WON)"
    ),
    "fork": (
        "import os\n"
        "if os.fork() == 0:\n"
        "    os.setsid(); import time; time.sleep(60)\n"
        "raise ValueError(WON)"
    ),
    "fork_by_clone": (
        "import ctypes; assert ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0) == -1 or 1 / 0\n"
        "raise ValueError('fine')"
    ),
    "daemon": (
        "import subprocess; subprocess.Popen(['sleep', '61'], start_new_session=True); "
        "raise ValueError(WON)"
    ),
    "system": "import os; os.system('touch $VICTIM_DIR/by_system')",
    "exec": "import os; os.execv('/bin/sh', ['sh', '-c', 'touch $VICTIM_DIR/by_exec'])",
    "posix_spawn": (
        "import os; os.posix_spawn('/bin/sh', ['sh', '-c', 'touch $VICTIM_DIR/by_spawn'], {})"
    ),
    "multiprocessing": (
        "import multiprocessing as m; m.Pool(2).map(abs, [1]); raise ValueError(WON)"
    ),
    "latex": (
        "import matplotlib.pyplot as plt; plt.rcParams['text.usetex'] = True; plt.title('x'); "
        "plt.savefig('x.png')"
    ),
    "new_namespace": (
        "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0; raise ValueError(WON)"
    ),
    "become_root": "import os; os.setuid(0); os.setuid(12345); raise ValueError(WON)",
    "io_uring": (
        "import ctypes; b = bytes(120); assert ctypes.CDLL(None).syscall(425, 1, b) >= 0; "
        "raise ValueError(WON)"
    ),
    "memfd": "import os; os.memfd_create('x'); raise ValueError(WON)",
    "userfaultfd": (
        "import ctypes; assert ctypes.CDLL(None).syscall(323, 1) >= 0; raise ValueError(WON)"
    ),
    "bpf": (
        "import ctypes; assert ctypes.CDLL(None).syscall(321, 0, bytes(72), 72) >= 0; "
        "raise ValueError(WON)"
    ),
    "x32": (
        "import ctypes; assert ctypes.CDLL(None).syscall(0x40000000 | 39) <= 0; "
        "raise ValueError('fine')"
    ),
    "loosen_filter": (
        "import ctypes; assert ctypes.CDLL(None).prctl(22, 0, 0, 0, 0) == 0; raise ValueError(WON)"
    ),
    "outlive": "import os; os.setsid(); raise ValueError(WON)",
    # --- more ways to memory, descriptors and files of others
    "read_zygote_memory": (
        "import os; f = open(f'/proc/{os.getppid()}/mem', 'rb'); f.seek(id(None)); f.read(9); "
        "raise ValueError(WON)"
    ),
    "write_own_memory_file": "f = open('/proc/self/mem', 'r+b'); raise ValueError(WON)",
    "list_processes": "import os; raise ValueError(WON if os.listdir('/proc') else '')",
    "list_zygote_descriptors": (
        "import os; raise ValueError(WON if os.listdir(f'/proc/{os.getppid()}/fd') else '')"
    ),
    "list_dev_shm": (
        "import os; raise ValueError(WON if os.listdir('/dev/shm') is not None else '')"
    ),
    "list_sys": "import os; raise ValueError(WON if os.listdir('/sys/class') else '')",
    "list_pool": "import os; raise ValueError(WON if os.listdir('../..') else '')",
    "read_sibling_work": (
        "import glob, os; raise ValueError(WON if os.listdir('$SIBLING') is not None else '')"
    ),
    "write_sibling_work": "open('$SIBLING/canary', 'w')",
    "core_pattern": "open('/proc/sys/kernel/core_pattern', 'a'); raise ValueError(WON)",
    "join_cgroup": "open('/sys/fs/cgroup/cgroup.procs', 'a'); raise ValueError(WON)",
    "terminal": "open('/dev/tty'); raise ValueError(WON)",
    "take_descriptor_of_zygote": (
        "import ctypes, os; c = ctypes.CDLL(None); fd = c.syscall(434, os.getppid(), 0); "
        "assert c.syscall(438, fd, 0, 0) >= 0\n"
        "raise ValueError(WON)"
    ),
    "open_by_handle": (
        "import ctypes; c = ctypes.CDLL(None); "
        "b = ctypes.create_string_buffer(b'\\x80\\0\\0\\0', 140); m = ctypes.c_int()\n"
        "assert c.name_to_handle_at(-100, b'$SECRET', b, ctypes.byref(m), 0) == 0; "
        "raise ValueError(WON)"
    ),
    "inotify": (
        "import ctypes; assert ctypes.CDLL(None).inotify_init1(0) >= 0; raise ValueError(WON)"
    ),
    "fanotify": (
        "import ctypes; assert ctypes.CDLL(None).syscall(300, 0, 0) >= 0; raise ValueError(WON)"
    ),
    "perf_event": (
        "import ctypes; assert ctypes.CDLL(None).syscall(298, bytes(128), 0, -1, -1, 0) >= 0; "
        "raise ValueError(WON)"
    ),
    "secret_memory": (
        "import ctypes; assert ctypes.CDLL(None).syscall(447, 0) >= 0; raise ValueError(WON)"
    ),
    "open_tree": (
        "import ctypes; assert ctypes.CDLL(None).syscall(428, -100, b'/', 1) >= 0; "
        "raise ValueError(WON)"
    ),
    "pivot_root": (
        "import ctypes; assert ctypes.CDLL(None).syscall(155, b'.', b'.') == 0; "
        "raise ValueError(WON)"
    ),
    # --- more ways to processes
    "stop_zygote": "import os, signal; os.kill(os.getppid(), signal.SIGSTOP)",
    "signal_zygote_by_tgkill": (
        "import ctypes, os; p = os.getppid(); ctypes.CDLL(None).syscall(234, p, p, 9)"
    ),
    "trace_zygote": (
        "import ctypes, os; assert ctypes.CDLL(None).ptrace(0x4206, os.getppid(), 0, 0) == 0; "
        "raise ValueError(WON)"
    ),
    "be_traced": (
        "import ctypes; assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0; raise ValueError(WON)"
    ),
    "write_zygote_memory": (
        "import ctypes, os; c = ctypes.CDLL(None); b = ctypes.create_string_buffer(16)\n"
        "class V(ctypes.Structure): _fields_ = [('b', ctypes.c_void_p), ('n', "
        "ctypes.c_size_t)]\n"
        "assert c.process_vm_writev(os.getppid(), ctypes.byref(V(ctypes.addressof(b), 8)), 1, "
        "ctypes.byref(V(id(None), 8)), 1, 0) == 8; "
        "raise ValueError(WON)"
    ),
    "vfork": (
        "import ctypes; c = ctypes.CDLL(None); assert c.syscall(58) == -1 or c._exit(0); "
        "raise ValueError('fine')"
    ),
    "double_fork": (
        "import os\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0: os.setsid(); import time; time.sleep(60)\n"
        "raise ValueError(WON)"
    ),
    "fork_by_clone3": (
        "import ctypes, struct; b = struct.pack('11Q', 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0)\n"
        "assert ctypes.CDLL(None).syscall(435, b, 88) == -1; raise ValueError('fine')"
    ),
    "namespace_by_clone": (
        "import ctypes; assert ctypes.CDLL(None).syscall(56, 0x10010000, 0, 0, 0, 0) == -1; "
        "raise ValueError('fine')"
    ),
    "new_limits_by_syscall": (
        "import ctypes, struct; "
        "assert ctypes.CDLL(None).syscall(302, 0, 9, struct.pack('QQ', 2**64 - 1, 2**64 - 1), "
        "None) == 0\n"
        "raise ValueError(WON)"
    ),
    "real_time_priority": (
        "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)); "
        "raise ValueError(WON)"
    ),
    "nice": "import os; os.nice(-1); raise ValueError(WON)",
    "interval_timer_for_zygote": (
        "import ctypes; assert ctypes.CDLL(None).syscall(222, 0, 0, bytes(8)) == 0; "
        "raise ValueError(WON)"
    ),
    "int_0x80": (
        "import ctypes, mmap\n"
        "m = mmap.mmap(-1, 4096, prot=7); m.write(bytes.fromhex('b814000000cd80c3'))\n"
        "f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\n"
        "raise ValueError(WON if f() > 0 else '')"
    ),
    "x32_open": (
        "import ctypes; assert ctypes.CDLL(None).syscall(0x40000002, b'$SECRET', 0) < 0; "
        "raise ValueError('fine')"
    ),
    "every_system_call": (
        "import ctypes; c = ctypes.CDLL(None)\n"
        "for n in range(550):\n"
        "    if n not in (15, 34, 60, 130, 231, 11, 12, 25): c.syscall(n, 0, 0, 0, 0, 0, 0)"
    ),
    # --- the machine
    "reboot": (
        "import ctypes; assert ctypes.CDLL(None).reboot(0x89ABCDEF) == 0; raise ValueError(WON)"
    ),
    "set_clock": (
        "import time; time.clock_settime(time.CLOCK_REALTIME, time.time()); raise ValueError(WON)"
    ),
    "host_name": (
        "import os, socket; socket.sethostname(os.uname().nodename); raise ValueError(WON)"
    ),
    "kernel_log": (
        "import ctypes; assert ctypes.CDLL(None).klogctl(10, None, 0) >= 0; raise ValueError(WON)"
    ),
}

_FORGE = (
    "import os, struct, json; c = json.dumps(dict(status='ok', error='', record=None, size={size}, "
    "flags=[])).encode()\n"
    "os.write(3, struct.pack('<II', len(c), {count}) + c + bytes({count})); os._exit(0)"
)

# Ways to write far more than the 64 MB that are allowed, each unseen by who looks at the folder now
# and then.
_FILL = (
    "import ctypes, mmap, os, threading, time\n"
    "def fill(fd, mb=60): os.posix_fallocate(fd, 0, mb << 20)\n"
    "def write(fd, mb=60):\n"
    "    for _ in range(mb): os.write(fd, bytes(1 << 20))\n"
    "def new(name): return os.open(name, os.O_RDWR | os.O_CREAT)\n"
)
HOARDERS = {
    "drip_on_result_pipe": (
        "def drip():\n"
        "    while True: os.write(3, b'\\0'); time.sleep(.01)\n"
        "threading.Thread(target=drip, daemon=True).start()\n"
        "for i in range(24): fill(new(f'f{i}')); time.sleep(.05)"
    ),
    "deep_folder": (
        "for i in range(25): os.mkdir('d' * 200); os.chdir('d' * 200)\n"
        "for i in range(24): fill(new(f'f{i}'))"
    ),
    "unlinked": "for i in range(24): fd = new(f'f{i}'); os.unlink(f'f{i}'); fill(fd)",
    "unlinked_and_closed": "for i in range(99): fd = new('f'); write(fd, 9); os.unlink('f')",
    "unlisted_folder": (
        "os.mkdir('x'); fds = [new(f'x/{i}') for i in range(9)]; os.umask(0)\n"
        "os.mkdir('y', 0)\n"
        "for i in range(24): os.mkdir(f'z{i}', 0o300); fill(new(f'z{i}/f'))"
    ),
    "hidden_by_renames": (
        "os.mkdir('a'); os.mkdir('b')\n"
        "def rename():\n"
        "    while True:\n"
        "        os.rename('a', 'c'); os.rename('b', 'a'); os.rename('c', 'b')\n"
        "threading.Thread(target=rename, daemon=True).start()\n"
        "for i in range(999):\n"
        "    try: write(new(f'a/{i}'), 9)\n"
        "    except FileNotFoundError: 0"
    ),
    "without_a_name": "for i in range(24): write(os.open('.', os.O_TMPFILE | os.O_RDWR))",
    "one_byte_a_block": (
        "for i in range(24):\n"
        "    fd = new(f'f{i}')\n"
        "    for k in range(15000): os.pwrite(fd, b'x', k << 12)"
    ),
    "by_threads": (
        "fds = [new(f'f{i}') for i in range(8)]\n"
        "threads = [threading.Thread(target=write, args=[fd]) for fd in fds]\n"
        "for t in threads: t.start()\n"
        "for t in threads: t.join()"
    ),
    "by_standard_output": (
        "for i in range(24): os.dup2(new(f'f{i}'), 1); os.dup2(new(f'g{i}'), 3)\n"
        "for fd in os.listdir('.'): write(new(fd), 9)"
    ),
    "in_place_of_the_result": (
        "import os\nos.close(3); os.close(1)\nfor i in range(24): write(new(f'f{i}'))"
    ),
    "files": "for i in range(10 ** 5): new(f'f{i}'); os.close(4)",
    "long_names": "for i in range(10 ** 5): os.close(new(f'{i:0255}'))",
    "names_that_are_no_text": "for i in range(10 ** 5): os.close(new(b'\\xff%d' % i))",
    "folders": "for i in range(10 ** 5): os.mkdir(f'd{i}')",
    "folders_in_folders": "for i in range(10 ** 5): os.mkdir('d'); os.chdir('d')",
    "rewritten": "fd = new('f')\nfor i in range(99): os.lseek(fd, 0, 0); write(fd, 9)",
}
HOARDERS = {f"hoard_{name}": _FILL + code for name, code in HOARDERS.items()}
# What must not be possible at all, as it could not be counted.
_UNCOUNTED = {
    "shared_mapping": (
        "fd = new('f'); os.ftruncate(fd, 60 << 20); m = mmap.mmap(fd, 60 << 20)\n"
        "for k in range(0, 60 << 20, 4096): m[k] = 1"
    ),
    "sendfile": (
        "fd = new('f'); write(fd, 9)\nfor i in range(99): os.sendfile(new('g'), fd, 0, 9 << 20)"
    ),
    "copy_file_range": (
        "fd = new('f'); write(fd, 9)\n"
        "for i in range(99): os.copy_file_range(fd, new(f'g{i}'), 9 << 20, 0)"
    ),
    "writev": "for i in range(24): os.writev(new(f'f{i}'), [bytes(60 << 20)])",
    "pwritev": "for i in range(24): os.pwritev(new(f'f{i}'), [bytes(60 << 20)], 0)",
    "splice": "r, w = os.pipe(); os.write(w, b'x' * 999); os.splice(r, new('f'), 999)",
    "reflink": "import fcntl; fcntl.ioctl(new('g'), 0x40049409, new('f'))",
    "hard_names": "new('f')\nfor i in range(10 ** 5): os.link('f', f'{i}')",
    "symbolic_names": "for i in range(10 ** 5): os.symlink('x' * 999, f'{i}')",
    "attributes": "os.setxattr(new('f'), 'user.x', bytes(60000))",
}
# A folder that is hard to empty; each script is in order, and so is the next one.
MESSES = {
    "names_of_the_cleaner": (
        "for i in range(9): os.makedirs(f'\x7f{i}/d/e'); os.makedirs(f'{i}/0/1')"
    ),
    "trash": "os.makedirs('trash/0/trash'); new('trash/1')",
    "bytes": "os.makedirs(b'\\xff/\\xfe'); new(b'\\xff/\\n')",
    "modes": "os.makedirs('a/b', 0o700); new('a/b/f'); os.mkdir('a/c', 0); os.mkdir('d', 0o100)",
    "depth": "for i in range(900): os.mkdir('d' * 200); os.chdir('d' * 200)",
    "many": "for i in range(5000): os.close(new(f'{i}'))",
    "moved_script": "os.rename('script.py', 'elsewhere')",
    "folder_in_place_of_the_script": "os.unlink('script.py'); os.makedirs('script.py/x')",
}
MESSES = {f"mess_{name}": _FILL + code for name, code in MESSES.items()}
_RAW = (
    "import json, os, struct\n"
    "def raw(claim, pixels, display=b''):\n"
    "    data = struct.pack('<II', len(claim), len(pixels)) + claim + pixels + display\n"
    "    while data: data = data[os.write(3, data):]\n"
    "    os._exit(0)\n"
    "def ok(size): return json.dumps(dict(status='ok', error='', record=None, size=size, "
    "flags=[])).encode()\n"
)

# Each must be ended by a limit, or end by itself without a result, and leave the executor fit. The
# statuses that are right.
HEAVY = {
    **{name: (code, "killed") for name, code in HOARDERS.items()},
    **{f"uncounted_{name}": (_FILL + code, "error") for name, code in _UNCOUNTED.items()},
    **{name: (code, "no_figure") for name, code in MESSES.items()},
    "frame_too_many_pixels": (_RAW + "raw(ok([2000, 2001]), bytes(4 * 2000 * 2001))", "killed"),
    "frame_long_claim": (_RAW + "raw(b' ' * 2 ** 20 + ok(None), b'')", "killed"),
    "frame_long_display_list": (_RAW + "raw(ok([1, 1]), bytes(4), bytes(20 << 20))", "killed"),
    "frame_by_and_by": (_RAW + "os.write(3, b'x'); os.write(3, b'x'); raw(b'', b'')", "killed"),
    "loop": ("while True: pass", "timeout"),
    "sleep": ("import time; time.sleep(1000)", "timeout"),
    "ignore_signals": (
        "import signal\n"
        "for s in range(1, 64):\n"
        "    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "while True: pass",
        "timeout",
    ),
    "catch_everything": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "timeout",
    ),
    "regex": ("import re; re.match('(a+)+$', 'a' * 40 + 'b')", "timeout"),
    "big_power": ("x = 9 ** 9 ** 9", "timeout killed"),
    "recursion": (
        "import sys; sys.setrecursionlimit(10 ** 9)\ndef f(n): return f(n + 1) + 1\nf(0)",
        "killed error timeout",
    ),
    "save_forever": (
        "import matplotlib.pyplot as plt\nwhile True: plt.plot([1]); plt.savefig('a.png')",
        "timeout",
    ),
    "figures_forever": (
        "import matplotlib.pyplot as plt\nwhile True: plt.figure().canvas.draw()",
        "timeout killed",
    ),
    "many_points": (
        "import numpy as np, matplotlib.pyplot as plt\nplt.scatter(*np.random.rand(2, 10 ** 8))",
        "killed timeout",
    ),
    "threads_forever": (
        "import threading, time\n"
        "while True:\n"
        "    try: threading.Thread(target=time.sleep, args=(9,)).start()\n"
        "    except RuntimeError: 0",
        "timeout killed",
    ),
    "bytes_100_gb": ("x = bytes(10 ** 11)", "killed"),
    "array_75_gb": ("import numpy as np; x = np.ones(10 ** 10)", "killed error"),
    "grow": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "killed timeout"),
    "double": ("x = 'x'\nwhile True: x += x", "killed timeout"),
    "big_file": ("f = open('f', 'wb')\nwhile True: f.write(bytes(1 << 20))", "killed error"),
    "many_files": (
        "import time\nfor i in range(10 ** 6):\n    open(str(i), 'w').close()\ntime.sleep(9)",
        "killed timeout",
    ),
    "sparse_file": ("open('f', 'wb').truncate(1 << 40)", "killed error"),
    "big_figure": ("import matplotlib.pyplot as plt; plt.figure(figsize=(10000, 10000))", "error"),
    "long_figure": (
        "import matplotlib.pyplot as plt; plt.text(0, 9e5, 'x'); "
        "plt.savefig('x.png', bbox_inches='tight')",
        "error killed",
    ),
    "big_dpi": (
        "import matplotlib.pyplot as plt; plt.figure(dpi=10 ** 6); "
        "plt.savefig('x.png', dpi=10 ** 6)",
        "ok",
    ),
    "print_forever": ("while True: print('x' * 10 ** 6)", "timeout"),
    "read_input": ("input()", "error"),
    "exit_hard": ("import os; os._exit(0)", "killed"),
    "segfault": ("import ctypes; ctypes.string_at(0)", "killed"),
    "abort": ("import os; os.abort()", "killed"),
    "exit_hook": (
        "import atexit, time; atexit.register(time.sleep, 99); "
        "import matplotlib.pyplot as plt; plt.plot([1])",
        "ok",
    ),
    "threads_left": (
        "import threading, time; threading.Thread(target=time.sleep, args=(99,)).start()\n"
        "import matplotlib.pyplot as plt; plt.plot([1])",
        "ok",
    ),
    "close_all": ("import os; os.closerange(0, 999)", "no_figure"),
    "deep_folders": (
        "import os, time\n"
        "for i in range(995):\n"
        "    os.mkdir('d' * 200); os.chdir('d' * 200)\n"
        "open('f', 'w').close()\n"
        "time.sleep(0.1)",
        "no_figure killed error",
    ),
    "unreadable_folder": (
        "import os\nos.mkdir('x', 0o300)\nopen('x/f', 'w').close()\nos.mkdir('y', 0)",
        "no_figure",
    ),
    "threads_and_hooks_left": (
        "import atexit, gc, threading, weakref\n"
        "def again(*_):\n"
        "    while True: pass\n"
        "atexit.register(again)\n"
        "gc.callbacks.append(again)\n"
        "threading.Thread(target=again).start()\n"
        "class D:\n"
        "    def __del__(self): again()\n"
        "d = D(); d.d = d",
        "no_figure timeout",
    ),
    "close_all_and_loop": ("import os; os.closerange(0, 999)\nwhile True: pass", "timeout"),
    "evil_message": (
        "class E(Exception):\n    def __str__(self): raise KeyError\nraise E",
        "error",
    ),
    "endless_message": (
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
        "timeout",
    ),
    "surrogates": ("raise ValueError('\\ud800' * 10)", "error"),
    "long_message": ("raise ValueError('x' * 10 ** 8)", "error timeout"),
    "nul": ("x = '\\0'\0", "error"),
    "not_python": ("def (:", "error"),
    "deep_source": ("(" * 5000 + ")" * 5000, "error killed"),
    "flood_result": ("import os\nwhile True: os.write(3, bytes(1 << 20))", "timeout killed"),
    "forge_noise": ("import os; os.write(3, os.urandom(1000)); os._exit(0)", "killed"),
    "forge_huge_length": (
        "import os, struct; "
        "os.write(3, struct.pack('<III', 2 ** 32 - 1, 2 ** 32 - 1, 2 ** 32 - 1)); os._exit(0)",
        "killed",
    ),
    "forge_shape": (
        "import os, struct, json; "
        "c = json.dumps(dict(status='ok', error='', record=None, size=[10 ** 9, 10 ** 9], "
        "flags=[])).encode()\n"
        "os.write(3, struct.pack('<III', len(c), 4, 0) + c + bytes(4)); os._exit(0)",
        "killed",
    ),
    "forge_deep_json": (
        "import os, struct; c = b'[' * 60000; "
        "os.write(3, struct.pack('<III', len(c), 0, 0) + c); os._exit(0)",
        "killed",
    ),
    "forge_negative_size": (_FORGE.format(size="[-2, -2]", count=16), "killed"),
    "forge_nan_size": (_FORGE.format(size="[float('nan'), 1]", count=4), "killed"),
    "forge_many_digits": (
        "import os, struct; c = b'{\"status\": ' + b'9' * 10 ** 6 + b'}'; "
        "os.write(3, struct.pack('<III', len(c), 0, 0) + c); os._exit(0)",
        "killed",
    ),
    "forge_display_list": (
        _FORGE.format(size="[2, 2]", count=16).replace("bytes(16)", "bytes(25)"),
        "ok",
    ),
    "patched_json": ("import json; json.dumps = lambda x: 1 / 0", "killed error"),
}

# With a layer off these must succeed, or the attack tests nothing: (layers left on, newest Landlock
# ABI) to names.
CONTROLS = {
    ("seccomp", None): (
        "read_secret_file read_secret_by_ctypes read_passwd list_secret_dir overwrite append "
        "remove rename mkdir_out list_processes list_pool read_sibling_work write_sibling_work"
    ),
    ("landlock", 2): (
        "udp tcp chmod fchmod utime truncate_readonly limits_of_victim renice_victim kill_victim "
        "fork memfd lock lease inotify double_fork be_traced int_0x80"
    ),
    ("unsafe", None): "read_secret_file system overwrite truncate rename",
}
# Those that an older Landlock alone would let through.
OLD_LANDLOCK = """
    read_secret_file read_secret_by_hardlink read_passwd tcp abstract_socket overwrite remove rename
    replace truncate truncate_readonly truncate_mode_3 truncate_path_mode creat_by_ctypes fchmod
    kill_victim kill_by_pidfd write_font_cache rename_working_directory
"""


@dataclasses.dataclass
class World:
    """Things outside the sandbox that an attack could read, change or reach, and how to tell."""

    directory: Path
    pool: ExecutorPool

    def __enter__(self) -> "World":
        self.directory.chmod(0o755)
        (self.directory / "secret").write_text(TOKEN)
        self.victim = self.directory / "victim"
        self.victim.write_text("untouched")
        self.shared = directory_of(self.pool)
        self.readable = self.shared / "matplotlib" / "canary"
        self.readable.write_text("untouched")
        # What another executor's working directory would be.
        self.sibling = self.shared / "sibling" / "work"
        self.sibling.mkdir(parents=True, exist_ok=True)
        (self.sibling.parent / "log").touch()
        os.mkfifo(self.directory / "fifo")
        self.fifo = os.open(self.directory / "fifo", os.O_RDWR | os.O_NONBLOCK)
        self.sockets = [socket.socket(*kind) for kind in ((2, 1), (2, 2), (1, 2), (1, 2))]
        tcp, udp, abstract, path = self.sockets
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        udp.bind(("127.0.0.1", 0))
        abstract.bind(f"\0canary{os.getpid()}")
        path.bind(str(self.directory / "socket"))
        self._start_bystander()
        self.names = {
            "$TRAINER": os.getpid(),
            "$BYSTANDER": self.bystander.pid,
            "$SECRET": self.directory / "secret",
            "$VICTIM_DIR": self.directory,
            "$VICTIM": self.victim,
            "$READABLE": self.readable,
            "$FIFO": self.directory / "fifo",
            "$LOG": self.sibling.parent / "log",
            "$SIBLING": self.sibling,
            "$REAL_HOME": Path.home(),
            "$TCP": tcp.getsockname()[1],
            "$UDP": udp.getsockname()[1],
            "$ABSTRACT": f"canary{os.getpid()}",
            "$UNIX": self.directory / "socket",
        }
        self.before = self._look()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bystander.kill()
        self.bystander.wait()
        os.close(self.fifo)
        for each in self.sockets:
            each.close()

    def attack(self, name: str) -> list[str]:
        """Runs one of QUIET and says what it achieved; empty: contained."""
        code = QUIET[name]
        for key in sorted(self.names, key=len, reverse=True):
            code = code.replace(key, str(self.names[key]))
        code = code.replace("WON", "'won'.upper()")  # an error shows the source line too
        result = self.pool.submit(code).result()
        if "kill" in name:
            time.sleep(0.3)  # a signal takes its time
        return self.judge(result)

    def judge(self, result: Execution) -> list[str]:
        achieved = ["learned the secret"] if TOKEN in result.error or "WON" in result.error else []
        now = self._look()
        achieved += [f"changed {key}" for key, value in now.items() if value != self.before[key]]
        for each in self.sockets:
            each.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                stream = each.type == socket.SOCK_STREAM
                achieved.append(f"reached a socket: {each.accept() if stream else each.recv(9)}")
        with contextlib.suppress(BlockingIOError):
            achieved.append(f"wrote to a pipe: {os.read(self.fifo, 9)}")
        if achieved:
            self._repair()
        return achieved

    def _look(self) -> dict[str, object]:
        """Everything an attack could change, as comparable values."""
        files = {}
        for path in [*sorted(self.directory.rglob("*")), self.readable]:
            state = path.lstat()
            content = path.read_text() if path in (self.victim, self.readable) else ""
            files[path.name] = (
                state.st_mode,
                state.st_uid,
                state.st_mtime_ns,
                state.st_size,
                content,
            )
        strays = [
            self.directory.parent / f"mmrecoder-canary-{os.getpid()}",
            Path(f"/dev/shm/mmrecoder-canary-{os.getpid()}"),
        ]
        pid = self.bystander.pid
        return {
            "files": files,
            "new files": [str(path) for path in strays if path.exists()]
            + sorted(p.name for p in self.shared.glob("*/*"))
            + sorted(p.name for p in self.sibling.iterdir()),
            "bystander": self.bystander.poll(),
            "its limits": None
            if self.bystander.poll()
            else resource.prlimit(pid, resource.RLIMIT_NOFILE),
            "its affinity": None if self.bystander.poll() else os.sched_getaffinity(pid),
            "its priority": None if self.bystander.poll() else os.getpriority(os.PRIO_PROCESS, pid),
            "processes": processes_of(str(self.shared)),
            "executor": self.pool.stats()["respawns"],
        }

    def _start_bystander(self) -> None:
        self.bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3000)"])
        time.sleep(0.3)

    def _repair(self) -> None:
        """Makes the world as it was, for the next attack."""
        self.__exit__()
        for path in list(self.directory.iterdir()):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self.__enter__()


def directory_of(pool: ExecutorPool) -> Path:
    """The folder that the executors of a pool share, which is their home."""
    environ = Path(f"/proc/{pool.pids()[0]}/environ").read_text()
    return Path(next(entry[5:] for entry in environ.split("\0") if entry.startswith("HOME=")))


def left_behind(pool: ExecutorPool) -> list[str]:
    """What lies in the working directories of a pool, as its executors see them."""
    shared = directory_of(pool)
    roots = [Path(f"/proc/{pid}/root{shared}") for pid in pool.pids()]
    return [str(path) for root in roots for path in root.glob("*/work/*")]


def processes_of(mark: str) -> int:
    """How many processes have `mark` in their environment.

    That is what a zygote or its children started, wherever it went.
    """
    count = 0
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            count += mark.encode() in environ.read_bytes()
    return count


def config(
    sandbox: str = "auto", abi: int | None = None, workers: int = 1, bubblewrap: bool = False
) -> EnvConfig:
    layers = {"sandbox": sandbox, "landlock_abi": abi, "bubblewrap": bubblewrap}
    return EnvConfig(
        workers=workers,
        preload=(),
        wall_seconds=3,
        cpu_seconds=2,
        memory_mb=1024,
        cache_size=0,
        **layers,
    )


def achieved(
    names: Iterable[str], sandbox: str = "auto", abi: int | None = None, bubblewrap: bool = False
) -> dict[str, list[str]]:
    """What each of the named QUIET attacks achieves under these layers.

    With a layer off only CONTROLS are run: the rest do harm.
    """
    names = tuple(names)
    if sandbox != "auto" and not set(names) <= set(CONTROLS[sandbox, abi].split()):
        raise ValueError(f"these are not run with sandbox={sandbox!r}: {names}")
    layers = config(sandbox, abi, bubblewrap=bubblewrap)
    with (
        mock.patch.dict(os.environ, HF_TOKEN=TOKEN),
        tempfile.TemporaryDirectory() as directory,
        ExecutorPool(layers) as pool,
        World(Path(directory), pool) as world,
    ):
        return {name: world.attack(name) for name in names}


def limited(pool: ExecutorPool) -> dict[str, Execution]:
    """How each of HEAVY ends."""
    return dict(zip(HEAVY, pool.run([code for code, _ in HEAVY.values()]), strict=True))


if __name__ == "__main__":  # as an ordinary user: see test_attacks
    answer = {"uid": os.getuid()}
    if sys.argv[1:] == ["heavy"]:
        with ExecutorPool(config(workers=2)) as pool:
            answer["statuses"] = {name: result.status for name, result in limited(pool).items()}
            answer["respawns"] = pool.stats()["respawns"]
    else:
        answer["achieved"] = achieved(QUIET)
    print(json.dumps(answer))

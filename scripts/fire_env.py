"""Runs scripts while their executors are killed and stopped and the disk is full.

    python scripts/fire_env.py [--count 500] [--workers 2] [--every 3] [--full-disk]

The same mix of scripts (charts, errors, scripts that save files and read them again, time-outs,
scripts that are killed, scripts that fill the disk) runs twice: in peace, then under fire. Every
few seconds one executor is killed, or stopped for a while, with a rest now and then in which the
longest script ends: the pool gives up one that is hit too often. With --full-disk (root only) all
files of the pool are on a small disk of its own without a free byte. Then it prints

    lost      scripts without a result
    wrong     results that are not those of the run in peace: status, error, record, every pixel
    left      processes and files that are there when both pools are closed

and exits with 1 where one of them is not 0.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from mmrecoder_jax.env import EnvConfig, Execution, ExecutorPool
from mmrecoder_jax.env.pool import MAX_LOST

CHART = """\
import numpy as np
import matplotlib.pyplot as plt
fig, ax = plt.subplots(figsize=(3, 2))
ax.{kind}(np.arange(1, 6), np.arange(1, 6) * {number} % 7)
ax.set_title('chart {number}')
"""
WALL_SECONDS = 20  # of a script; four in a hundred use up this or the two seconds of a core
BURST = MAX_LOST - 1  # blows before a rest
REST = 2.0 * WALL_SECONDS  # a script that was hit last, and its new executor on a busy machine
# How many of a hundred, and the code; {number} makes each another one.
MIX = (
    (30, CHART.replace("{kind}", "bar")),
    (25, CHART.replace("{kind}", "plot")),
    (10, CHART.replace("{kind}", "plot") + "plt.savefig('a.png')\nassert len(plt.imread('a.png'))"),
    (10, "open('f', 'w').write('{number}' * 9999)\nraise ValueError(len(open('f').read()))"),
    (10, "import numpy as np\nnp.zeros(3)[{number} + 3]"),
    (2, "while {number} + 1: pass"),
    (1, "import time\ntime.sleep(99 + {number})"),
    (4, "import ctypes\nctypes.string_at({number} * 0)"),
    (3, "import os\nos._exit({number} % 9)"),
    (2, "x = bytes(10 ** 10 + {number})"),
    (3, "for i in range(24): open(f'{number}-{i}', 'wb').write(bytes(9 << 20))"),
)


def scripts(count: int) -> list[str]:
    """The mix, in an order of its own."""
    templates = [template for share, template in MIX for _ in range(share)]
    random.Random(0).shuffle(templates)
    return [templates[i % len(templates)].replace("{number}", str(i)) for i in range(count)]


class Fire:
    """Kills and stops executors of a pool, one at a time, until it is left. A context manager."""

    def __init__(self, pool: ExecutorPool, every: float):
        self.done: Counter[str] = Counter()
        self._pool, self._every = pool, every
        self._random = random.Random(1)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Fire":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._every):
            kind = self._random.choice(("kill", "stop", "kill its script"))
            with contextlib.suppress(OSError, RuntimeError):  # it is gone, or starts just now
                pid = self._random.choice(self._pool.pids())
                if kind == "kill":
                    os.killpg(pid, signal.SIGKILL)
                elif kind == "stop":
                    os.killpg(pid, signal.SIGSTOP)
                    self._over.wait(self._random.uniform(0.2, 2.5))
                    os.killpg(pid, signal.SIGCONT)
                else:
                    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                    os.kill(int(children[0]), signal.SIGKILL) if children else None
                self.done[kind] += 1
                if self.done.total() % BURST == 0:
                    self._over.wait(REST)


def alike(a: Execution, b: Execution) -> bool:
    """Whether two results are the same but for their times."""
    same_image = (a.image is None) == (b.image is None) and (
        a.image is None or a.image.tobytes() == b.image.tobytes()
    )
    return same_image and (a.status, a.error, a.record) == (b.status, b.error, b.record)


@contextlib.contextmanager
def temporary_disk(full: bool):
    """A folder for temporary files; with `full` on a small disk of its own, in memory."""
    with tempfile.TemporaryDirectory(prefix="fire-") as folder:
        if full:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=4m,mode=1777", "fire", folder], check=True
            )
        try:
            yield Path(folder)
        finally:
            if full:
                subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> None:
    """Leaves no free byte."""
    with contextlib.suppress(OSError), open(folder / "ballast", "wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))


def processes(mark: str) -> list[int]:
    """The processes whose environment names `mark`."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in environ.read_bytes():
                found.append(int(environ.parent.name))
    return [pid for pid in found if pid != os.getpid()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--every", type=float, default=3.0, help="seconds from one blow to the next"
    )
    parser.add_argument("--full-disk", action="store_true")
    args = parser.parse_args()
    config = EnvConfig(
        workers=args.workers,
        preload=("numpy", "matplotlib"),
        wall_seconds=WALL_SECONDS,
        cpu_seconds=2,
        memory_mb=1024,
        cache_size=0,
        replay_share=0.2,
    )
    codes = scripts(args.count)
    with ExecutorPool(config) as pool:
        wanted = pool.run(codes)
    with temporary_disk(args.full_disk) as folder:
        tempfile.tempdir = str(folder)
        start = time.monotonic()
        with ExecutorPool(config) as pool:
            if args.full_disk:
                fill(folder)
            with Fire(pool, args.every) as fire:
                futures = [pool.submit(code) for code in codes]
                got = [None if future.exception() else future.result() for future in futures]
            stats = pool.stats()
        seconds = time.monotonic() - start
        (folder / "ballast").unlink(missing_ok=True)
        left = [str(path) for path in folder.rglob("*")] + processes(str(folder))
    lost = [code for code, result in zip(codes, got, strict=True) if result is None]
    wrong = [
        (code, a, b)
        for code, a, b in zip(codes, wanted, got, strict=True)
        if b is not None and not alike(a, b)
    ]
    for code, a, b in wrong:
        print(f"--- wrong:\n{code}")
        print(f"in peace:   {a.status} {a.error}")
        print(f"under fire: {b.status} {b.error}")
    print(f"{len(codes)} scripts in {seconds:.0f} s: {dict(Counter(r.status for r in got if r))}")
    print(
        f"blows {dict(fire.done)}, retries {stats['retries']:.0f}, respawns {stats['respawns']:.0f}"
    )
    print(f"lost {len(lost)}, wrong {len(wrong)}, left {len(left)} {left[:5]}")
    sys.exit(bool(lost or wrong or left))


if __name__ == "__main__":
    main()

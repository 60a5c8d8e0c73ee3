"""What scripts/faults.py works with: runs that can be broken and compared, and what they share.

A run has a directory of its own, with `work` for its work directory, `tmp` for its TMPDIR, and the
output, errors and stacks of each of its processes.
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mmrecoder_jax.learner.checkpoint import latest_step
from mmrecoder_jax.monitoring.metrics import read_metrics
from mmrecoder_jax.places import COMMIT
from mmrecoder_jax.rl.schedule import TIMED
from tests.buckets import Cloud

ROOT = Path(__file__).parents[1]
STEPS = 8
PATIENCE = 600.0  # seconds that anything may take
GONE_SECONDS = 20.0  # in which the processes of a killed run must be gone
PHASES = ("rollout", "execution", "update", "save")
# Metrics of the process, not of the run.
UNEQUAL = ("time", "seconds/", "env/", "env_", "judge/", "compiles/", *TIMED)
_LIBC = ctypes.CDLL(None)
_SITE = """\
import faulthandler, os, signal
if "FAULTS_STACKS" in os.environ:
    # Of the thread that gets the signal alone: the stacks of threads that run are not safe to read.
    faulthandler.register(signal.SIGUSR1, open(os.environ["FAULTS_STACKS"], "a"), all_threads=False)
"""


@dataclasses.dataclass
class Row:
    """What came of one broken run.

    Attributes:
      fault: its name; number: which of them.
      moments: where each fault hit, or what was damaged.
      ends: exit status and last line of errors of each process that the fault ended.
      seconds: the longest time from a fault to the end of the process.
      differences: from the uninterrupted run; none where it is equal.
      left: files and processes that stayed behind.
      bytes: of parameters compared.
      skipped: why nothing was tried.
    """

    fault: str
    number: int
    moments: list[str] = dataclasses.field(default_factory=list)
    ends: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    differences: list[str] = dataclasses.field(default_factory=list)
    left: list[str] = dataclasses.field(default_factory=list)
    bytes: int = 0
    skipped: str = ""


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def until(condition: Callable[[], Any], seconds: float = PATIENCE, pause: float = 0.02) -> bool:
    """Waits; whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True


# ---------------------------------------------------------------- processes


class Run:
    """One run in a directory of its own: `work` is its work directory, `tmp` its TMPDIR.

    Args:
      lab: what all runs share.
      name: of the directory.
    """

    def __init__(self, lab: "Lab", name: str):
        self.lab, self.path = lab, lab.where / "runs" / name
        shutil.rmtree(self.path, ignore_errors=True)
        self.tmp = self.path / "tmp"
        self.tmp.mkdir(parents=True)
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def work(self) -> Path:
        """The files of its work directory on this machine."""
        return self.path / "work"

    def address(self) -> str:
        """What it takes as its work directory."""
        return str(self.work)

    def environment(self) -> dict[str, str]:
        """Of its processes, besides the lab's."""
        return {}

    def result(self) -> Path:
        """The whole work directory of a run that has ended."""
        return self.work

    def command(self) -> list[str]:
        fields = {
            "data.dir": self.lab.where / "data",
            "init_from": self.lab.where / "init",
            "train.steps": STEPS,
            "checkpoint.every": 1,
            "train.batch_size": 2,  # prompts, so 8 trajectories of two turns
            "rl.response_length": 72,  # whole scripts, so that there is something to execute
            "model.scan_unroll": 1,  # a restart traces less
            "env.workers": 1,
        }
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        return train("stage2", self.address(), *flags)

    def start(
        self, hosts: int = 1, before: Sequence[str] = (), only: int | None = None, port: int = 0
    ) -> None:
        """Starts the run's processes, or one of them.

        Args:
          before: words before the command.
          only: the one host to start, at this port of host 0.
        """
        if hosts > 1:
            self.port = port or free_port()
        for host in range(hosts) if only is None else [only]:
            env = self.lab.environment() | self.environment()
            env |= {
                "TMPDIR": str(self.tmp),
                "PYTHONPATH": f"{self.lab.where / 'site'}:{ROOT}",
                "FAULTS_STACKS": str(self.path / f"stacks{host}"),
            }
            if hosts > 1:
                env |= {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{self.port}",
                    "JAX_NUM_PROCESSES": str(hosts),
                    "JAX_PROCESS_ID": str(host),
                }
            # A session of its own, so that Ctrl-C can be sent to it as a terminal does.
            with self.file("out", host).open("wb") as out, self.file("err", host).open("wb") as err:
                process = subprocess.Popen(
                    [*before, *self.command()],
                    cwd=ROOT,
                    env=env,
                    stdout=out,
                    stderr=err,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            self.processes.append(process)

    def file(self, kind: str, host: int = 0) -> Path:
        return self.path / f"{kind}{host}"

    def rows(self) -> int:
        """Rows of metrics; of a run that still writes, too."""
        path = self.work / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        try:
            names = os.listdir(self.work / "checkpoints")
        except FileNotFoundError:
            return False
        return any("tmp" in name for name in names)

    def reach(self, step: int, part: float) -> None:
        """Waits until so much of a step has passed.

        Raises:
          RuntimeError: the run has ended before.
        """
        usual = self.lab.step_seconds()

        def there() -> bool:
            if any(process.poll() is not None for process in self.processes):
                raise RuntimeError(f"{self.path}: ended before step {step}: {self.endings()}")
            return self.rows() >= step - 1

        until(there)
        if "step" not in self.file("out").read_text():  # the first step of a process compiles
            until(lambda: there() and self.phase() in PHASES, pause=0.5)
        time.sleep(part * usual)

    def phase(self, host: int = 0) -> str:
        """Where the process is: one of PHASES, or "start", "other"."""
        if not self.file("out", host).exists() or not self.file("out", host).stat().st_size:
            return "start"  # no handler is there yet
        stacks = self.file("stacks", host)
        size = stacks.stat().st_size if stacks.exists() else 0
        pid = self.processes[host].pid
        _LIBC.tgkill(pid, pid, signal.SIGUSR1)  # to the main thread, whose number is the process's

        def dump() -> str:
            with stacks.open("rb") as f:
                f.seek(size)
                return f.read().decode()

        # The first call of the main thread ends the dump.
        until(lambda: "_run_module_as_main" in dump(), seconds=2.0, pause=0.001)
        return phase_of(dump())

    def moment(self) -> str:
        """Step and phase, for people."""
        phase, saving = self.phase(), self.saving()
        return f"step {self.rows() + 1}: {phase}{', a save under way' * saving}"

    def stop(self, how: signal.Signals = signal.SIGKILL, seconds: float = PATIENCE) -> float:
        """Sends a signal to every process that runs; how long they took to end."""
        begun = time.monotonic()
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(how)
        self.wait(seconds)
        return time.monotonic() - begun

    def wait(self, seconds: float = PATIENCE) -> bool:
        """Waits for all processes; whether they ended in time. Those that did not are killed."""
        ended = until(lambda: all(p.poll() is not None for p in self.processes), seconds, 0.1)
        for process in self.processes:
            process.kill()
            process.wait()
        return ended

    def endings(self) -> list[str]:
        """Exit status and errors of each process."""
        return [
            ending(process.poll(), self.file("err", host).read_text(errors="replace"))
            for host, process in enumerate(self.processes)
        ]

    def still_there(self) -> list[str]:
        """Processes of this run that live `GONE_SECONDS` after its own have ended."""
        if until(lambda: not processes_in(self.path), GONE_SECONDS, 0.1):
            return []
        return [f"process {line}" for line in processes_in(self.path)]

    def finish(self, row: Row, hosts: int = 1, late: float = 0.0) -> Row:
        """Goes on with the run until it is done; adds to the row how it compares.

        Args:
          late: seconds that process 1 starts after process 0.
        """
        row.left += self.still_there()
        self.processes.clear()
        if late:
            self.start(hosts, only=0)
            time.sleep(late)
            self.start(hosts, only=1, port=self.port)
        else:
            self.start(hosts)
        self.wait()
        bad = [text for text in self.endings() if not text.startswith("status 0")]
        if bad:
            row.differences.append(f"the same command did not go on: {'; '.join(bad)}")
            return row
        row.left += self.still_there()
        whole, work = self.lab.whole(hosts), self.result()
        row.differences += differences(whole, work)
        row.bytes = sum(size for _, size in arrays(whole, "params").values())
        row.left += [f"file {name}" for name in sorted(files(self.tmp))]
        row.left += [f"file {name}" for name in sorted(files(work) - files(whole))]
        return row


class BucketRun(Run):
    """A run whose work directory is in a bucket of a stand-in for Cloud Storage.

    Args:
      cloud: the server.
    """

    def __init__(self, lab: "Lab", name: str, cloud: Cloud):
        super().__init__(lab, name)
        self.cloud = cloud

    @property
    def work(self) -> Path:
        folders = (self.path / "machine").glob("*-host0/work")
        return next(folders, self.path / "machine" / "none")

    def address(self) -> str:
        return "gs://bucket/work"

    def environment(self) -> dict[str, str]:
        return self.cloud.variables | {"MMRECODER_CACHE": str(self.path / "machine")}

    def saving(self) -> bool:
        names = self.cloud.below("work/checkpoints/")
        steps = {name.partition("/")[0] for name in names}
        return any(f"{step}/{COMMIT}" not in names for step in steps)

    def leave(self) -> None:
        """Forgets all that its machine has of it: the next start is one of another machine."""
        shutil.rmtree(self.path / "machine", ignore_errors=True)

    def result(self) -> Path:
        target = self.path / "fetched"
        for name, data in self.cloud.below("work/").items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(data)
        for step in (target / "checkpoints").iterdir():
            (step / COMMIT).unlink()  # on a disk the name of a checkpoint says that it is complete
        return target


def train(config: str, workdir: Path | str, *flags: str) -> list[str]:
    """The training command of a configuration in its smoke size."""
    program = [sys.executable, "-m", "mmrecoder_jax.train"]
    return [*program, f"--config=configs/{config}.py:smoke", f"--workdir={workdir}", *flags]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ending(status: int | None, errors: str) -> str:
    """How a process ended, in a line.

    >>> ending(1, "error: no space left")
    'status 1: error: no space left'
    """
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("error:")]
    said = (ours or lines or [""])[-1]
    more = f" ({len(lines) - 1} more lines of errors)" if len(lines) > 1 else ""
    return f"status {status}" + (f": {said[:400]}{more}" if said else "")


def processes_in(path: Path) -> list[str]:
    """Processes whose command line or working directory names the path, except this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                continue
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(path) in words or os.readlink(entry / "cwd").startswith(str(path)):
                found.append(f"{entry.name} {words[:80]}")
    return found


def phase_of(stack: str) -> str:
    """The phase that the stack of the thread that trains shows (`faulthandler`)."""
    frames = re.findall(r'File ".*?([\w.]+)/([\w.]+)", line \d+ in (\S+)', stack)
    inside = {(file, function) for _, file, function in frames}
    if ("grpo.py", "train") not in inside or ("loop.py", "__enter__") in inside:
        return "start"
    if ("checkpoint.py", "save") in inside or ("checkpoint.py", "__exit__") in inside:
        return "save"
    if ("loop.py", "update") in inside:
        return "update"
    if ("schedule.py", "_await") in inside:
        return "execution"
    return "rollout" if ("rollout.py", "rollout") in inside else "other"


# ---------------------------------------------------------------- comparing


def arrays(workdir: Path, item: str) -> dict[str, tuple[str, int]]:
    """(SHA-256, bytes) of every array of the newest checkpoint's item, by path."""
    path = workdir / "checkpoints" / str(latest_step(str(workdir))) / item
    with ocp.PyTreeCheckpointer() as checkpointer:
        wanted = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            checkpointer.metadata(path).item_metadata.tree,
        )
        tree = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=wanted))
    return {
        jax.tree_util.keystr(name): (hashlib.sha256(x.tobytes()).hexdigest(), x.nbytes)
        for name, x in jax.tree_util.tree_leaves_with_path(jax.tree.map(np.asarray, tree))
    }


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rows without what belongs to a process; NaN as None, so that rows can be compared."""
    return [
        {
            name: None if value != value else value
            for name, value in row.items()
            if not name.startswith(UNEQUAL)
        }
        for row in read_metrics(workdir / "metrics.jsonl")
    ]


def files(directory: Path) -> set[str]:
    """Names of files below a directory; of a checkpoint, its step alone."""
    names = {str(path.relative_to(directory)) for path in directory.rglob("*")}
    inside = re.compile(r"checkpoints/[^/]+/|lengths(/|$)")  # lengths are kept by a machine alone
    return {name for name in names if not inside.match(name)}


def differences(whole: Path, other: Path) -> list[str]:
    """What differs in a finished run from the uninterrupted one, a phrase for each kind."""
    found = []
    for item, name in (("params", "parameters"), ("learner", "the optimizer")):
        one, two = arrays(whole, item), arrays(other, item)
        unequal = [path for path in one if one[path] != two.get(path)]
        if unequal or len(one) != len(two):
            found.append(f"{len(unequal)} of {len(one)} arrays of {name}")
    one, two = metrics(whole), metrics(other)
    steps = [row["step"] for row in two]
    if steps != [row["step"] for row in one]:
        found.append(f"rows of metrics are of the steps {steps}")
    elif one != two:
        names = {name for a, b in zip(one, two, strict=True) for name in a if a[name] != b[name]}
        found.append(f"metrics {', '.join(sorted(names))}")
    texts = [
        {path.name: path.read_bytes() for path in (run / "trajectories").glob("*.jsonl")}
        for run in (whole, other)
    ]
    if texts[0] != texts[1]:
        found.append("trajectories")
    lost = files(whole) - files(other)
    if lost:
        found.append(f"no {', '.join(sorted(lost))}")
    return found


# ---------------------------------------------------------------- what all runs share


class Lab:
    """Data, first weights, uninterrupted runs, and the rows that are there.

    Args:
      where: keeps them.
      jsonl: the rows.
      seed: of all random moments.
    """

    def __init__(self, where: Path, jsonl: Path, seed: int):
        self.where, self.jsonl, self.seed = where.resolve(), jsonl, seed
        (self.where / "site").mkdir(parents=True, exist_ok=True)
        (self.where / "site" / "sitecustomize.py").write_text(_SITE)

    def environment(self) -> dict[str, str]:
        """Of every process: one cache of compiled programs, so that a restart is quick."""
        return os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.where / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def prepare(self) -> None:
        """Makes the charts and a policy that writes scripts."""
        if latest_step(str(self.where / "init")) == 120:
            return
        say("makes charts and first weights")
        flags = (f"--config.data.dir={self.where / 'data'}", "--config.train.steps=120")
        subprocess.run(
            train("sft_chart2code", self.where / "init", *flags),
            cwd=ROOT,
            env=self.environment(),
            stdout=subprocess.DEVNULL,
            check=True,
        )

    @functools.cache  # noqa: B019 - one lab
    def whole(self, hosts: int = 1) -> Path:
        """The work directory of a finished uninterrupted run."""
        target = self.where / f"whole{hosts}"
        if not target.exists():
            self.prepare()
            say(f"uninterrupted run, {hosts} process(es)")
            run = Run(self, f"whole{hosts}")
            run.start(hosts)
            run.wait()
            if any(not text.startswith("status 0") for text in run.endings()):
                raise RuntimeError(f"the uninterrupted run failed: {run.endings()}")
            run.work.rename(target)
            shutil.rmtree(run.path)
        return target

    def half(self) -> Path:
        """The work directory of a run that was killed when two steps were left."""
        target = self.where / "half"
        if not target.exists():
            run = Run(self, "half")
            run.start()
            until(lambda: latest_step(str(run.work)) == STEPS - 2)
            run.stop()
            run.work.rename(target)
            shutil.rmtree(run.path)
        return target

    def step_seconds(self) -> float:
        """A usual step of the uninterrupted run."""
        rows = read_metrics(self.whole() / "metrics.jsonl")
        return sorted(row["seconds/step"] for row in rows)[len(rows) // 2]

    def random(self, fault: str, number: int) -> random.Random:
        return random.Random(f"{self.seed} {fault} {number}")

    def moments(self, fault: str, runs: int, each: int, number: int) -> list[tuple[int, float]]:
        """(step, part of it) of the faults of one run, of `runs * each` that are drawn together.

        A run takes every `runs`-th of them, so that a process gets past its first step.
        """
        draw = self.random(fault, -1)
        drawn = sorted((draw.randint(1, STEPS), draw.random()) for _ in range(runs * each))
        return drawn[number::runs]

r"""What running a script in the environment costs, as ratios measured in one run.

    python scripts/bench_env.py [--repeats 4] [--rounds 6] [--dpi 100] [--size "6.4, 4.8"] \
        [--preload numpy,matplotlib] [--own-settings]

Four ways to turn the same scripts into pixels, interleaved, so that other load on the machine hits
them alike:

    bound     exec and draw in one warm process, no isolation, no fresh state: what the drawing
              itself costs
    record    the same with the recorder's hooks on: what the drawing and its description cost
    env       the environment: fork, sandbox, capture, record; CPU of the script's process and of
              its zygote
    cold      `python script.py`, new for each script

CPU milliseconds per execution are user and system time, of the best repeat; then executions per
second with 1 and 2 workers. The figure size and font size are the executor's house style; with
--own-settings each script sets them itself, so that nothing prepared before the fork fits it.
"""

import argparse
import contextlib
import dataclasses
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from mmrecoder_jax.env import EnvConfig, ExecutorPool

HEAD = "import numpy as np\nimport matplotlib.pyplot as plt\n"
SCRIPTS = (
    """\
fig, ax = plt.subplots()
ax.bar(['a', 'b', 'c', 'd'], [3, 4, 5, 6], color='red')
ax.set_title('Sales')
ax.set_xlabel('month')
""",
    """\
fig, ax = plt.subplots()
for k in range(3):
    ax.plot(np.arange(20), np.sin(np.arange(20) / 3 + k), label=f'{k}')
ax.legend()
""",
    """\
fig, ax = plt.subplots()
ax.scatter(*np.random.rand(2, 60), c='green', s=12)
ax.grid(True)
ax.set_ylabel('value')
""",
    """\
fig, ax = plt.subplots()
ax.pie([3, 2, 5], labels=['x', 'y', 'z'], autopct='%d%%')
ax.set_title('Parts')
""",
    """\
fig, axs = plt.subplots(1, 2)
axs[0].hist(np.random.randn(200), bins=12)
axs[1].imshow(np.random.rand(6, 6))
plt.tight_layout()
""",
)


def style(size: str, dpi: int) -> dict[str, Any]:
    """The rc settings of all charts."""
    return {
        "figure.figsize": tuple(map(float, size.split(","))),
        "font.size": 8,
        "figure.dpi": dpi,
        "savefig.dpi": dpi,
    }


def scripts(repeat: int, settings: dict[str, Any] | None = None) -> list[str]:
    """The scripts, different in each repeat so that no result comes from the cache.

    With `settings`, they set these first.
    """
    head = HEAD + (f"plt.rcParams.update({settings})\n" if settings else "")
    return [head + body + f"# {repeat}\n" for body in SCRIPTS]


def in_process(codes: list[str], dpi: int) -> float:
    """Seconds of CPU to execute and draw, in this process."""
    import io

    import matplotlib.pyplot as plt

    start = time.process_time()
    for code in codes:
        exec(compile(code, "script.py", "exec"), {"__name__": "__main__"})
        plt.gcf().savefig(io.BytesIO(), dpi=dpi, format="rgba")  # plt.savefig draws twice
        plt.close("all")
    return time.process_time() - start


def bound_worker(
    dpi: int, settings: dict[str, Any], own: dict[str, Any] | None, recorded: bool
) -> None:
    """Serves the two in-process ways: reads a repeat's number, answers with CPU seconds."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update(settings)
    if recorded:
        from mmrecoder_jax.env.child import recorder

        recorder.install()
    in_process(scripts(-1, own), dpi)
    for line in sys.stdin:
        if recorded:
            recorder.start()
        print(in_process(scripts(int(line), own), dpi), flush=True)


def environment(pool: ExecutorPool, codes: list[str]) -> float:
    """Seconds of CPU of the executors for these scripts: their own clocks before and after."""
    before = sum(map(_cpu, pool.pids()))
    for execution in pool.run(codes):
        if not execution.ok:
            raise RuntimeError(f"a benchmark script failed: {execution.error}")
    return sum(map(_cpu, pool.pids())) - before


def cold(codes: list[str], dpi: int, folder: Path) -> float:
    """Seconds of CPU of a new interpreter for each script."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for code in codes:
        (folder / "script.py").write_text(code + f"plt.savefig('out.png', dpi={dpi})\n")
        subprocess.run(
            [sys.executable, "script.py"],
            cwd=folder,
            check=True,
            env={**os.environ, "MPLBACKEND": "agg"},
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _cpu(pid: int) -> float:
    """CPU seconds of an executor's process group, children that have ended included.

    They are counted in ticks of 10 ms.
    """
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rsplit(")", 1)[1].split()
            ticks += sum(map(int, fields[11:15])) if int(fields[2]) == pid else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument(
        "--rounds", type=int, default=6, help="passes over the scripts in one measurement"
    )
    parser.add_argument("--dpi", type=int, default=100)
    parser.add_argument("--size", default="6.4, 4.8", help="inches")
    parser.add_argument("--preload", default=",".join(EnvConfig().preload))
    parser.add_argument("--sandbox", default="auto")
    parser.add_argument("--own-settings", action="store_true")
    parser.add_argument("--bound-worker", choices=["plain", "recorded"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = style(args.size, args.dpi)
    own = settings if args.own_settings else None
    if args.bound_worker:
        bound_worker(args.dpi, settings, own, args.bound_worker == "recorded")
        return

    config = EnvConfig(
        workers=1,
        dpi=args.dpi,
        rc_params={} if own else settings,
        preload=tuple(args.preload.split(",")),
        cache_size=0,
        sandbox=args.sandbox,
        wall_seconds=120,
    )
    _print_costs(_measure(config, settings, args))
    for count in (1, 2):
        with ExecutorPool(dataclasses.replace(config, workers=count)) as pool:
            codes = [code for step in range(args.rounds) for code in scripts(10_000 + step, own)]
            start = time.monotonic()
            pool.run(codes)
            rate = len(codes) / (time.monotonic() - start)
            print(f"{count} worker{'s' * (count > 1)}: {rate:.1f} executions/s")


def _start_worker(args: argparse.Namespace, mode: str) -> subprocess.Popen[str]:
    """This program as one of the two in-process ways."""
    flags = ["--dpi", str(args.dpi), "--size", args.size, *["--own-settings"] * args.own_settings]
    return subprocess.Popen(
        [sys.executable, __file__, *flags, "--bound-worker", mode],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _measure(
    config: EnvConfig, settings: dict[str, Any], args: argparse.Namespace
) -> dict[str, list[float]]:
    """CPU milliseconds per execution of each way, one number per repeat."""
    own = settings if args.own_settings else None
    workers = {"bound": _start_worker(args, "plain"), "record": _start_worker(args, "recorded")}
    times: dict[str, list[float]] = {"bound": [], "record": [], "env": [], "cold": []}
    with ExecutorPool(config) as pool, tempfile.TemporaryDirectory() as folder:
        environment(pool, scripts(-1, own))
        for repeat in range(args.repeats):
            total = dict.fromkeys(times, 0.0)
            for step in range(args.rounds):
                number = repeat * args.rounds + step
                for name, worker in workers.items():
                    assert worker.stdin and worker.stdout, "both are pipes"
                    worker.stdin.write(f"{number}\n")
                    worker.stdin.flush()
                    total[name] += float(worker.stdout.readline())
                total["env"] += environment(pool, scripts(number, own))
            total["cold"] = cold(scripts(repeat, settings), args.dpi, Path(folder)) * args.rounds
            for name, seconds in total.items():
                times[name].append(1000 * seconds / (len(SCRIPTS) * args.rounds))
    for worker in workers.values():
        worker.communicate()  # closes its input, which ends it
    return times


def _print_costs(times: dict[str, list[float]]) -> None:
    bound, record, cold_start = (min(times[name]) for name in ("bound", "record", "cold"))
    title = "CPU ms per execution (best of repeats, all)"
    print(f"{'':<17}{title:<47} x bound    x record    x cold")
    for name, values in times.items():
        listed = " ".join(f"{value:.0f}" for value in values)
        best = min(values)
        ratios = f"{best / bound:>10.2f} {best / record:>11.2f} {best / cold_start:>9.2f}"
        print(f"{name:<10} {best:>8.1f}   ({listed}){'':<{max(1, 30 - len(listed))}}{ratios}")


if __name__ == "__main__":
    main()

"""Strong scaling of executions: the same scripts on more executors, here and on hosts, in one run.

    python scripts/bench_hosts.py [--repeats 3] [--scripts 40] [--nap 0] [--most 2]

A host is an `env.serve` process of this machine with one executor, so what is measured is what the
connection costs, not a network. Each line is a number of executors in this process's pool and a
number of hosts; the ways are interleaved, and the best repeat of each counts:

    x one         scripts per second, as a ratio to one executor here
    efficiency    that ratio per executor
    ms here       CPU milliseconds per script of this process: queues, checks and copies of results

With `--nap` each script sleeps so many seconds besides: then executors beyond the cores are worth
something, as on other machines.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench_env import HEAD, SCRIPTS

from mmrecoder_jax.env import EnvConfig, ExecutorPool, serve


@contextlib.contextmanager
def host(secret: str) -> Iterator[str]:
    """An executor host with one executor; its address."""
    command = [sys.executable, "-m", "mmrecoder_jax.env.serve", "--listen=127.0.0.1:0"]
    command += [f"--secret={secret}", "--executors=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().partition(" ")[0]
        finally:
            process.terminate()
            process.wait()


def measure(pool: ExecutorPool, number: int, args: argparse.Namespace) -> tuple[float, float]:
    """Scripts per second, and CPU seconds of this process per script."""
    nap = f"import time\ntime.sleep({args.nap})\n" if args.nap else ""
    bodies = [SCRIPTS[i % len(SCRIPTS)] for i in range(args.scripts)]
    codes = [f"{nap}{HEAD}{body}# {number} {i}\n" for i, body in enumerate(bodies)]
    start, cpu = time.monotonic(), time.process_time()
    for execution in pool.run(codes):
        if not execution.ok:
            raise RuntimeError(f"a benchmark script failed: {execution.error}")
    rate = len(codes) / (time.monotonic() - start)
    return rate, (time.process_time() - cpu) / len(codes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scripts", type=int, default=40, help="in one measurement")
    parser.add_argument("--nap", type=float, default=0.0, help="seconds that each script sleeps")
    parser.add_argument("--most", type=int, default=2, help="executors of one kind")
    args = parser.parse_args()
    counts = [2**power for power in range(args.most.bit_length()) if 2**power <= args.most]
    ways = [(n, 0) for n in counts] + [(0, n) for n in counts] + [(n, n) for n in counts]
    rates: dict[tuple[int, int], list[tuple[float, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as exits:
        secret = f"{folder}/secret"
        serve.main([f"--new-secret={secret}"])
        hosts = [exits.enter_context(host(secret)) for _ in range(max(counts))]
        pools = {
            (here, there): exits.enter_context(
                ExecutorPool(
                    EnvConfig(
                        workers=here,
                        hosts=tuple(hosts[:there]),
                        secret=secret,
                        preload=("numpy", "matplotlib"),
                        cache_size=0,
                        wall_seconds=120,
                    )
                )
            )
            for here, there in ways
        }
        for way, pool in pools.items():  # opens connections, and warms up
            measure(pool, -1 - ways.index(way), args)
        for repeat in range(args.repeats):
            for way, pool in pools.items():
                rates[way].append(measure(pool, repeat * len(ways) + ways.index(way), args))
    one = max(rate for rate, _ in rates[1, 0])
    print(f"{'here':>5}{'hosts':>6}{'x one':>8}{'efficiency':>12}{'ms here':>9}")
    for (here, there), found in rates.items():
        best = max(rate for rate, _ in found) / one
        cpu = 1000 * min(seconds for _, seconds in found)
        print(f"{here:>5}{there:>6}{best:>8.2f}{best / (here + there):>12.2f}{cpu:>9.2f}")


if __name__ == "__main__":
    main()

"""What a reward costs: ratios measured in one run.

Each is the smallest of interleaved repetitions in CPU time.

    python scripts/bench_reward.py

    reward      one generated script in a warm executor with its record, plus the score against a
                cached target
    bare        the same script in the same warm executor, without the recorder
    official    one pair by the official mode, target not cached
    cold        eight new interpreters, as ChartMimic's evaluator starts for one pair

Goals: reward / bare <= 1.15 and reward / cold <= 1/40.
"""

import argparse
import dataclasses
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from mmrecoder_jax.benchmarks import selftest
from mmrecoder_jax.benchmarks.chartmimic_official import official_pair
from mmrecoder_jax.env.chartmimic import score
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.pool import ExecutorPool
from mmrecoder_jax.env.pools import Pools
from mmrecoder_jax.env.records import Record

# Puts matplotlib's own functions back in the fork, as the script's first act: what is left is the
# executor without the recorder.
_WITHOUT_RECORDER = "import sys\nsys.modules['mmrecoder_jax.env.child.recorder'].remove()\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=5)
    repetitions = parser.parse_args().repetitions
    config = EnvConfig(workers=1, cache_size=0, preload=("numpy", "matplotlib"))
    with ExecutorPool(config) as pool:
        for name, code in selftest.charts().items():
            _measure(pool, name, code, repetitions)


def _measure(pool: ExecutorPool, name: str, code: str, repetitions: int) -> None:
    target = pool.submit(code).result().record
    assert target is not None, f"the self-test's chart {name!r} runs"

    def execute(script: str) -> float:
        return pool.submit(script).result().cpu_seconds

    def reward() -> float:
        start = time.thread_time()
        execution = pool.submit(code).result()
        score(execution.record, target)
        return execution.cpu_seconds + time.thread_time() - start

    def official() -> float:
        before = pool.stats()["cpu_seconds"]
        official_pair(Pools(pool, pool), name, code, code)
        return pool.stats()["cpu_seconds"] - before

    measures: dict[str, Callable[[], float]] = {
        "reward": reward,
        "bare": lambda: execute(_WITHOUT_RECORDER + code),
        "official": official,
    }
    best = dict.fromkeys(measures, float("inf"))
    for _ in range(repetitions):
        for key, measure in measures.items():
            best[key] = min(best[key], measure())
    cold = min(_cold(code) for _ in range(2))
    cost = min(_timed(lambda: score(target, _other(target))) for _ in range(50))
    reward_ms, bare_ms, official_ms = (1e3 * best[key] for key in ("reward", "bare", "official"))
    print(
        f"{name:<8} reward {reward_ms:6.0f} ms  bare {bare_ms:6.0f} ms  "
        f"ratio {reward_ms / bare_ms:.2f}   official pair {official_ms:6.0f} ms   "
        f"cold x 8 {8e3 * cold:6.0f} ms  1/{8e3 * cold / reward_ms:.0f}   "
        f"score alone {1e6 * cost:.0f} us"
    )


def _cold(code: str) -> float:
    """CPU seconds of one new interpreter that runs the script and saves a PDF."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as directory:
        script = "import matplotlib\nmatplotlib.use('agg')\n" + code + "\nplt.savefig('out.pdf')\n"
        subprocess.run(
            [sys.executable, "-c", script], cwd=directory, check=True, stderr=subprocess.DEVNULL
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _other(record: Record) -> Record:
    """The record with other colours, so that the assignment is really made."""
    return dataclasses.replace(record, colors=tuple(entry[:-1] + "8" for entry in record.colors))


if __name__ == "__main__":
    main()

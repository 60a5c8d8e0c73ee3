"""A step of decoding on this device: milliseconds, and its share of the memory limit.

    python scripts/bench_decode.py [--preset 3b] [--rows 64 256] [--slots 1024 4608] [--group 1 8]

Random weights of a published shape in bfloat16, the rollout's own program. A row has `--prompt`
valid slots in a prefix that a group shares and writes its response behind them, in a cache of so
many slots. The limit is what must be read: every weight of the decoder, and the valid keys and
values, a shared prefix once, at the bandwidth of a copy on the same device in the same run.

Prints a line per size: the median of `--repetitions` chunks; then what empty slots cost, the same
rows and valid slots in the larger cache beside the smaller one. Programs are compiled side by side.
`--kernels` prints what a step spends its time in (on a GPU), by a trace of one chunk.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import glob
import gzip
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from mmrecoder_jax.models.config import PRESETS
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL, init_params
from mmrecoder_jax.models.sharding import make_mesh
from mmrecoder_jax.rl.sampler import Places, Plan, Sampler, SamplerSpec, SamplerState

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured: rows of groups in a cache of so many slots."""

    rows: int
    slots: int
    group: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="3b", choices=sorted(PRESETS))
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--slots", type=int, nargs="+", default=[1024, 4608])
    parser.add_argument("--group", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--kernels", action="store_true")
    args = parser.parse_args()
    config = dataclasses.replace(PRESETS[args.preset], dtype="bfloat16", param_dtype="bfloat16")
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    model = Qwen25VL(config)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.preset}", flush=True)
    params = jax.jit(lambda: init_params(config, KEY))()
    weights = Sampler(model, SamplerSpec(1, (), (0,), 0, 1.0, 1), mesh).weights(params)
    del params
    programs: dict[Size, concurrent.futures.Future[Any]] = {}
    samplers: dict[Size, Sampler] = {}
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for rows in args.rows:
            for slots in args.slots:
                for group in args.group:
                    size = Size(rows, slots, group)
                    spec = SamplerSpec(slots - args.prompt, (), (0,), 0, 1.0, args.chunk)
                    samplers[size] = Sampler(model, spec, mesh)
                    lowered = _lower(samplers[size], weights, size, args.prompt)
                    programs[size] = pool.submit(lowered.compile)
        for program in programs.values():
            program.result()
    print(f"compiled {len(programs)} programs in {time.perf_counter() - began:.0f} s", flush=True)
    bandwidth = _copy_bandwidth()
    print(f"copy {bandwidth / 1e9:.0f} GB/s", flush=True)
    found = {}
    for size, program in programs.items():
        sampler = samplers[size]
        state = _state(sampler, size, args.prompt)
        plan = _plan(size)
        seconds = []
        for repetition in range(args.repetitions + 1):
            start = time.perf_counter()
            state = program.result()(weights, state, plan, KEY)
            jax.block_until_ready(state.live)
            if repetition:
                seconds.append((time.perf_counter() - start) / args.chunk)
            state = state.replace(  # the same valid slots in every repetition
                lengths=jnp.zeros_like(state.lengths),
                count=jnp.zeros_like(state.count),
                live=jnp.ones_like(state.live),
            )
        step = statistics.median(seconds)
        found[size] = step
        weight = sum(x.nbytes for x in jax.tree.leaves(weights))
        token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
        valid = size.rows // size.group * args.prompt + size.rows * args.chunk / 2
        limit = (weight + valid * token) / bandwidth
        memory = program.result().memory_analysis()
        print(
            f"rows {size.rows:4} slots {size.slots:5} group {size.group}: {1e3 * step:7.2f} ms a "
            f"step, {size.rows / step:7.0f} tokens/s, {100 * limit / step:5.1f} % of the limit "
            f"({1e3 * limit:.2f} ms), cache {_bytes((state.prefix, state.own)) / 2**30:.2f} GiB, "
            f"temporary {memory.temp_size_in_bytes / 2**30:.2f} GiB",
            flush=True,
        )
        if args.kernels:
            _kernels(program.result(), weights, state, plan, args.chunk)
        del state
    for size, step in found.items():
        small = dataclasses.replace(size, slots=min(args.slots))
        if small != size:
            print(
                f"rows {size.rows} group {size.group}: {size.slots} slots cost "
                f"{step / found[small]:.2f} of {small.slots}"
            )


def _lower(sampler: Sampler, weights: Any, size: Size, prompt: int) -> jax.stages.Lowered:
    state = sampler.abstract_state(_places(sampler, size, prompt))
    bounds = sampler.bounds((prompt, 0), (prompt, sampler.spec.response_length))
    return sampler.lower("decode", weights, state, _plan(size), KEY, bounds=bounds)


def _places(sampler: Sampler, size: Size, prompt: int) -> Places:
    return Places(size.rows, size.rows // size.group, sampler.spec.response_length, prompt)


def _plan(size: Size) -> Plan[np.ndarray]:
    rows = np.arange(size.rows, dtype=np.int32)
    return Plan(
        start=np.zeros(size.rows, bool),
        prefix=rows // size.group,
        members=rows.reshape(-1, size.group),
        place=rows,
        uid=rows.astype(np.uint32),
        turn=np.ones(size.rows, np.int32),
        limit=np.full(size.rows, 2**30, np.int32),
    )


def _state(sampler: Sampler, size: Size, prompt: int) -> SamplerState[jax.Array]:
    """As prefill and start leave it; keys and values are random."""
    state = sampler.begin(_places(sampler, size, prompt))
    random = jax.jit(
        lambda tree: jax.tree.map(lambda x: jax.random.normal(KEY, x.shape, x.dtype), tree)
    )
    full = jnp.full(size.rows // size.group, prompt, jnp.int32)
    return state.replace(
        prefix=random(state.prefix),
        prefix_lengths=full,
        prefix_positions=full + 0,  # an array of its own: both are donated
        positions=jnp.full(size.rows, prompt, jnp.int32),
        logits=random(state.logits),
        live=jnp.ones(size.rows, bool),
    )


def _copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    x = jnp.ones(2**29 if jax.default_backend() != "cpu" else 2**24, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    copy(x).block_until_ready()
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        copy(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * x.nbytes / min(seconds)


def _bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _kernels(program: Any, weights: Any, state: Any, plan: Any, chunk: int) -> None:
    """What the device did, by the name of the kernel, from a trace."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(program(weights, state, plan, KEY))
        traces = glob.glob(directory + "/**/*.trace.json.gz", recursive=True)
        with gzip.open(traces[0]) as f:
            events = json.load(f)["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    spent: collections.Counter[str] = collections.Counter()
    for event in events:
        on_device = "GPU" in names.get(event.get("pid"), "") and "hlo_op" in event.get("args", {})
        if event.get("ph") == "X" and on_device:
            spent[event["name"][:60]] += event["dur"]
    print(f"    {sum(spent.values()) / 1e3 / chunk:7.3f} ms a step in kernels")
    for name, microseconds in spent.most_common(16):
        print(f"    {microseconds / 1e3 / chunk:7.3f} {name}")


if __name__ == "__main__":
    main()

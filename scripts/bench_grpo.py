"""GRPO updates beside those of another checkout of this project, on this machine.

    git worktree add ../before 9be6082
    python scripts/bench_grpo.py --against=../before [--stage stage1] [--preset tiny] [--layers 0]
                                 [--prompts 8] [--group 8] [--lengths 40 80 72] [--pairs 5]

Both take the same trajectories (`update_worker.py`): a prompt, a first turn, feedback with an image
and a second turn, of `--lengths` tokens: prompt, feedback, longest turn. A pair is one update of
each, alternating; printed are both medians and the median of the pairs' ratios, and how many bytes
the compiled program needs beside its arguments. Loss and gradients must agree.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", required=True, help="another checkout, such as a worktree")
    parser.add_argument("--stage", default="stage1", choices=("stage1", "stage2"))
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--layers", type=int, default=0, help="of the decoder; 0: all")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs=3, default=[40, 80, 72])
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    with contextlib.ExitStack() as exits:
        workers = [
            exits.enter_context(worker(args, Path(checkout)))
            for checkout in (Path(__file__).parents[1], args.against)
        ]
        mine, theirs = (told(one) for one in workers)
        for name in ("loss", "grad_norm", "logp"):
            if abs(mine[name] - theirs[name]) > 1e-4 * max(1.0, abs(theirs[name])):
                sys.exit(f"error: {name} is {mine[name]}, of the other checkout {theirs[name]}")
        pairs = []
        for pair in range(args.pairs):
            seconds = [asked(one)["seconds"] for one in workers]
            pairs.append(seconds)
            print(f"pair {pair + 1}: {seconds[0]:.2f} s, before {seconds[1]:.2f} s", flush=True)
    medians = [statistics.median(x) for x in zip(*pairs, strict=True)]
    ratio = statistics.median(b / a for a, b in pairs)
    print(
        f"{args.stage}, {args.preset}, {args.prompts} prompts, groups of {args.group}: "
        f"{medians[0]:.2f} s, before {medians[1]:.2f} s: {ratio:.2f} times as fast; "
        f"token slots {mine['slots']:.0f} of {theirs['slots']:.0f}; "
        f"memory {mine['bytes'] / 2**20:.0f} of {theirs['bytes'] / 2**20:.0f} MiB "
        f"({mine['bytes'] / theirs['bytes']:.2f})"
    )


@contextlib.contextmanager
def worker(args: argparse.Namespace, checkout: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of a checkout."""
    script = Path(__file__).with_name("update_worker.py")
    names = ("stage", "preset", "layers", "prompts", "group")
    flags = [f"--{name}={getattr(args, name)}" for name in names]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, str(script), *flags, "--lengths", *map(str, args.lengths)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next thing that a worker says."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    sys.exit(f"error: the worker ended with status {process.wait()}: its output above says why")


def asked(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What one more update took."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return told(process)


if __name__ == "__main__":
    main()

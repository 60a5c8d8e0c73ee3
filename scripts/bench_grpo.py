"""GRPO updates beside those of another checkout of this project, on this machine.

    git worktree add ../before 9be6082
    python scripts/bench_grpo.py --against=../before [--stage stage1] [--preset tiny] [--layers 0]
                                 [--prompts 8] [--group 8] [--lengths 40 80 72] [--pairs 5]

Both take the same trajectories (`update_worker.py`): a prompt, a first turn, feedback with an image
and a second turn, of `--lengths` tokens: prompt, feedback, longest turn. A pair is one update of
each, alternating; printed are both medians and the median of the pairs' ratios, and how many bytes
the compiled program needs beside its arguments. Loss and gradients must agree.

    python -m venv trl && trl/bin/pip install trl==1.16.0 transformers==5.24.0 torch pillow
    python scripts/bench_grpo.py --trl=trl/bin/python [--steps 6] [--pairs 3]

Whole steps beside TRL's GRPOTrainer instead, both from the policy in the box: ours are those of
`configs/stage2.py:tiny` (8 prompts, G = 8, two turns, scripts executed, scored and fed back), TRL's
have one turn and execute nothing (`trl_worker.py`). A pair is a process of each, alternating, whose
first two steps are left out; compared are the seconds per sampled token.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BOX = ROOT / "mmrecoder_jax" / "boxed"
PHASE = "seconds/"  # what the metrics of a phase's time begin with


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    other = parser.add_mutually_exclusive_group(required=True)
    other.add_argument("--against", help="another checkout, such as a worktree")
    other.add_argument("--trl", help="a Python that has trl")
    parser.add_argument("--stage", default="stage1", choices=("stage1", "stage2"))
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--layers", type=int, default=0, help="of the decoder; 0: all")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs=3, default=[40, 80, 72])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of a process, with --trl")
    args = parser.parse_args()
    if args.trl:
        beside_trl(args)
        return
    with contextlib.ExitStack() as exits:
        workers = [
            exits.enter_context(worker(args, Path(checkout))) for checkout in (ROOT, args.against)
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
    medians, ratio = of_pairs(pairs)
    print(
        f"{args.stage}, {args.preset}, {args.prompts} prompts, groups of {args.group}: "
        f"{medians[0]:.2f} s, before {medians[1]:.2f} s: {ratio:.2f} times as fast; "
        f"token slots {mine['slots']:.0f} of {theirs['slots']:.0f}; "
        f"memory {mine['bytes'] / 2**20:.0f} of {theirs['bytes'] / 2**20:.0f} MiB "
        f"({mine['bytes'] / theirs['bytes']:.2f})"
    )


def of_pairs(pairs: Sequence[Sequence[float]]) -> tuple[list[float], float]:
    """Both medians, and the median of how many times the second is the first."""
    medians = [statistics.median(x) for x in zip(*pairs, strict=True)]
    return medians, statistics.median(b / a for a, b in pairs)


def beside_trl(args: argparse.Namespace) -> None:
    """Prints what whole steps take per sampled token, ours and TRL's."""
    with tempfile.TemporaryDirectory() as scratch:
        our_steps(scratch, "first", args.steps)  # draws the charts, and compiles every program
        policy = f"{scratch}/policy"
        export = ["--workdir", f"{scratch}/first", "--out", policy, "--dtype=float32"]
        lines_of([sys.executable, "-m", "mmrecoder_jax.export", *export])
        worker = [args.trl, str(Path(__file__).with_name("trl_worker.py")), f"--model={policy}"]
        worker += [f"--charts={scratch}/data/train", f"--steps={args.steps}"]
        worker += ["--prompts=8", "--group=8", f"--response={boxed('rl.response_length')}"]
        pairs, versions = [], ""
        for pair in range(1, args.pairs + 1):
            ours = our_steps(scratch, f"pair{pair}", args.steps)
            mine = per_token(ours)
            versions, *steps = (line for line in lines_of(worker) if line.startswith('{"'))
            theirs = per_token([json.loads(step) for step in steps])
            pairs.append((mine, theirs))
            print(f"pair {pair}: {mine:.3f} ms a token, TRL {theirs:.3f}", flush=True)
            print(f"    ours: {shares(ours)}", flush=True)
    medians, ratio = of_pairs(pairs)
    print(
        f"{medians[0]:.3f} ms a sampled token, TRL {medians[1]:.3f}: {ratio:.2f} times as fast "
        f"({versions})"
    )


def boxed(name: str) -> Any:
    """A field of how the policy in the box is asked."""
    return json.loads((BOX / "mmrecoder.json").read_text())[name]


def our_steps(scratch: str, name: str, steps: int) -> list[dict[str, float]]:
    """Seconds, those of each phase, and sampled tokens of the steps of one process, from the policy
    in the box.
    """
    workdir = f"{scratch}/{name}"
    command = [
        *(sys.executable, "-m", "mmrecoder_jax.train", "--config=configs/stage2.py:tiny"),
        *(f"--workdir={workdir}", f"--config.init_from={BOX}"),
        *(f"--config.{name}={boxed(name)}" for name in ("data.grammar", "rl.response_length")),
        *(f"--config.data.dir={scratch}/data", "--config.data.train_count=200"),
        *("--config.data.val_count=2", "--config.data.test_count=2"),
        *("--config.train.batch_size=8", "--config.train.micro_batch_size=64"),
        *(f"--config.train.steps={steps}", "--config.checkpoint.every=1000"),
    ]
    lines_of(command, JAX_COMPILATION_CACHE_DIR=f"{scratch}/cache")
    rows = [json.loads(x) for x in Path(workdir, "metrics.jsonl").read_text().splitlines()]
    answers = 8 * 8
    return [
        {name: value for name, value in row.items() if name.startswith(PHASE)}
        | {
            "seconds": row["seconds/step"],
            "tokens": answers * (row["turn1/tokens"] + row["turn2/tokens"]),
        }
        for row in rows
    ]


def shares(steps: Sequence[dict[str, float]]) -> str:
    """The phases of a step and their shares of its time, the longest first; without the first two
    steps.
    """
    totals = {
        name.removeprefix(PHASE): sum(step.get(name, 0.0) for step in steps[2:])
        for name in steps[-1]
        if name.startswith(PHASE)
    }
    whole = totals.pop("step")
    longest = sorted(totals, key=totals.__getitem__, reverse=True)
    return ", ".join(f"{name} {100 * totals[name] / whole:.0f} %" for name in longest)


def per_token(steps: Sequence[dict[str, float]]) -> float:
    """Milliseconds per sampled token: the median of the steps but the first two."""
    return statistics.median(1000 * step["seconds"] / step["tokens"] for step in steps[2:])


def lines_of(command: Sequence[str], **environment: str) -> list[str]:
    """What a command writes; ends this one where it fails."""
    paths = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | paths | environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(f"error: {' '.join(command[:3])} ended with status {done.returncode}")
    return done.stdout.splitlines()


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

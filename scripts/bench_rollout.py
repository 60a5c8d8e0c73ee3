"""Sampled tokens a second beside `transformers.generate`, on this machine.

    python scripts/bench_rollout.py [--preset tiny] [--layers 0] [--rows 64] [--prompts 128]
                                    [--lengths 20 400] [--pairs 5]

Both sides hold the same random float32 weights, read the same prompts of 40 tokens with an image of
168 x 112 pixels, and write responses of the same lengths: all equal, or spread evenly (`--lengths`,
in an order that is shuffled once); a response is cut there, as a random policy ends none. Ours is
one rollout (`rl.schedule.Run`) over `rows` rows, which refills them; the reference (extra `parity`)
answers `rows` prompts after the other. A pair is one run of each, alternating; printed are both
medians and the median of the pairs' ratios.

    python scripts/bench_rollout.py --against=DIR [--stage stage2] [--turns 4] [--prompts 8]
                                    [--group 8] [--response 400] [--pairs 5]

Beside another checkout of this project instead: rollouts of whole conversations of a random tiny
policy, whose responses end by chance (1 to 400 tokens); a script takes 50 ms, two at one time.

    python scripts/bench_rollout.py --against=DIR --trained=runs/tiny [--steps 8] [--pairs 5]

The same with whole steps of `configs/stage2.py:tiny`, from the cold start 2 of a finished pipeline:
scripts are executed, and the policy is updated. The first two steps of a process are left out.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from mmrecoder_jax.data.batching import Piece, VisionLayout, pad_prompts
from mmrecoder_jax.data.sources import Chart
from mmrecoder_jax.env.chartmimic import Scores
from mmrecoder_jax.env.execution import Execution, Status
from mmrecoder_jax.env.records import Record
from mmrecoder_jax.models.config import PRESETS, ModelConfig
from mmrecoder_jax.models.processor import window_patches
from mmrecoder_jax.models.published import published_config
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL
from mmrecoder_jax.models.sharding import make_mesh
from mmrecoder_jax.models.weights import from_tensors
from mmrecoder_jax.rl.conversations import Group
from mmrecoder_jax.rl.sampler import Response, Sampler, SamplerSpec
from mmrecoder_jax.rl.schedule import Bucket, RolloutSpec, Run, Size
from mmrecoder_jax.rl.trajectory import Turn

PROMPT, HEIGHT, WIDTH = 40, 112, 168
END, IMAGE_ID = 0, 1
CHART = Chart("a", b"", "", Record(), "", "", "")


class Exchange:
    """A conversation with nobody: scripts are not run, and feedback is a picture of noise."""

    tower = None

    def __init__(self, sampler: Sampler, layout: VisionLayout):
        self.sampler, self.layout = sampler, layout
        self.spec = RolloutSpec(PROMPT, PROMPT, (6,), {"image": "render"}, "training")

    def shown(self, execution: Execution, chart: Chart) -> Execution:
        return execution

    def submit(self, response: Response) -> Future[Execution]:
        done: Future[Execution] = Future()
        done.set_result(Execution(Status.NO_CODE))
        return done

    def question(self, chart: Chart, execution: Execution) -> None:
        return None

    def scored(self, chart: Chart, response: Response, execution: Execution) -> Turn:
        finished = response.finished
        return Turn(response.ids, response.logps, finished, "", execution, Scores(), 0.0)

    def feedback(self, turn: Turn, chart: Chart) -> Piece:
        return _prompt(self.sampler.model.config, len(turn.ids))

    def pad(
        self,
        params: Any,
        pieces: Sequence[Piece],
        before: Sequence[Sequence[Piece]],
        bucket: Bucket,
    ) -> dict[str, np.ndarray]:
        places = len(pieces) * bucket.shown
        return pad_prompts(pieces, before, bucket.length, 6, places, self.layout)


class _NoPhases:
    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="tiny", choices=sorted(PRESETS))
    parser.add_argument("--layers", type=int, default=0, help="of the decoder; 0: all")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--lengths", type=int, nargs="+", default=[20, 400])
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--against", help="another checkout, to be measured beside this one")
    parser.add_argument("--stage", default="stage2", choices=("stage1", "stage2"))
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--response", type=int, default=400)
    parser.add_argument("--trained", help="work directory of a pipeline: whole RL steps from there")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    if args.trained:
        _steps(args)
        return
    if args.against:
        _against(args)
        return
    config = _sizes(args.preset, args.layers)
    rng = np.random.default_rng(0)
    least, most = args.lengths[0], args.lengths[-1]
    lengths = np.linspace(least, most, args.prompts).round().astype(int)
    rng.shuffle(lengths)
    reference, tensors = _reference(config, args.rows)
    ours = runner(config, from_tensors(tensors, config), args.rows, lengths, args.chunk)
    seconds: list[tuple[float, float]] = []
    for pair in range(args.pairs + 1):
        times = []
        for side in (ours, lambda: reference(lengths)):
            start = time.perf_counter()
            tokens = side()
            times.append(time.perf_counter() - start)
            assert tokens == lengths.sum(), (tokens, lengths.sum())
        if pair:  # the first compiles
            seconds.append((times[0], times[1]))
            print(f"pair {pair}: {times[0]:.2f} s, transformers {times[1]:.2f} s", flush=True)
    mine, theirs = (statistics.median(x) for x in zip(*seconds, strict=True))
    ratio = statistics.median(b / a for a, b in seconds)
    print(
        f"{args.preset}, {args.rows} rows, {args.prompts} prompts, {least} to {most} tokens: "
        f"{lengths.sum() / mine:.0f} tokens/s, transformers {lengths.sum() / theirs:.0f}: "
        f"{ratio:.2f} times as many"
    )


def _against(args: argparse.Namespace) -> None:
    here = Path(__file__).parents[1]
    with contextlib.ExitStack() as exits:
        workdir = exits.enter_context(tempfile.TemporaryDirectory())
        flags = [f"--{name}={getattr(args, name)}" for name in ("group", "turns", "response")]
        flags += [f"--prompts={min(args.prompts, 8)}", f"--stage={args.stage}"]
        workers = [
            exits.enter_context(_worker(Path(checkout), [*flags, f"--workdir={workdir}/{name}"]))
            for name, checkout in (("this", here), ("that", args.against))
        ]
        seconds = []
        for pair in range(args.pairs + 1):
            mine, theirs = (_ask(worker, max(pair, 1)) for worker in workers)
            if pair:  # the first compiles
                rates = [each["tokens"] / each["seconds"] for each in (mine, theirs)]
                seconds.append(rates)
                print(
                    f"pair {pair}: {mine['seconds']:.2f} s, {theirs['seconds']:.2f} s; "
                    f"{mine['tokens']} and {theirs['tokens']} tokens",
                    flush=True,
                )
    rates = [statistics.median(x) for x in zip(*seconds, strict=True)]
    ratio = statistics.median(a / b for a, b in seconds)
    print(
        f"{args.stage}, {args.turns} turns, up to {args.response} tokens: {rates[0]:.0f} tokens/s, "
        f"before {rates[1]:.0f}: {ratio:.2f} times as many"
    )


def _steps(args: argparse.Namespace) -> None:
    here = Path(__file__).parents[1]
    checkouts = {"this": here, "that": Path(args.against)}
    pairs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for pair in range(args.pairs):
            seconds = {}
            for name, checkout in checkouts.items():
                rows = _train(args, checkout.resolve(), Path(scratch) / name, f"{pair}")
                seconds[name] = statistics.median(row["seconds/step"] for row in rows)
                split = {
                    phase.removeprefix("seconds/"): statistics.median(
                        row.get(phase, 0.0) / row["seconds/step"] for row in rows
                    )
                    for phase in rows[0]
                    if phase.startswith("seconds/") and phase != "seconds/step"
                }
                idle = [row["rollout/idle"] for row in rows if "rollout/idle" in row]
                shares = ", ".join(f"{phase} {share:.0%}" for phase, share in split.items())
                text = f"; rollout idle {statistics.median(idle):.0%}" if idle else ""
                print(f"pair {pair + 1}, {name}: {seconds[name]:.2f} s a step ({shares}{text})")
            pairs.append(seconds)
    mine, theirs = (statistics.median(60 / each[name] for each in pairs) for name in checkouts)
    ratio = statistics.median(each["that"] / each["this"] for each in pairs)
    print(f"{mine:.1f} RL steps a minute, before {theirs:.1f}: {ratio:.2f} times as many")


def _train(
    args: argparse.Namespace, checkout: Path, scratch: Path, name: str
) -> list[dict[str, float]]:
    """The rows of metrics of one process."""
    workdir, trained = scratch / name, Path(args.trained).resolve()
    saved = json.loads((trained / "sft_self_correction" / "config.json").read_text())
    asked = [  # as the policy was trained, whatever a checkout's defaults are
        f"--config.{section}.{field}={saved[section][field]}"
        for section, field in (
            *(("data", f"{split}_count") for split in ("train", "val", "test")),
            *(("feedback", "image"), ("rl", "response_length")),
            *([("data", "grammar")] if saved["data"].get("grammar", "words") != "words" else []),
        )
    ]
    command = [
        *(sys.executable, "-m", "mmrecoder_jax.train", "--config=configs/stage2.py:tiny"),
        *(f"--workdir={workdir}", f"--config.init_from={trained / 'sft_self_correction'}"),
        *(f"--config.data.dir={trained / 'data'}", f"--config.train.steps={args.steps}"),
        *("--config.checkpoint.every=1000", "--config.train.batch_size=8", *asked),
        *("--config.reward.judge=none", "--config.reward.beta=0", "--config.reward.alpha=0.9"),
    ]
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "cache"),
    }
    subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][2:]


def _worker(checkout: Path, flags: Sequence[str]) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("rollout_worker.py")
    environment = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, str(script), *flags],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _ask(worker: subprocess.Popen[str], seed: int) -> dict[str, float]:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(f"{seed}\n")
    worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError(f"the worker ended with {worker.wait()}")


def _sizes(preset: str, layers: int) -> ModelConfig:
    config = dataclasses.replace(PRESETS[preset], dtype="float32", remat="none")
    if layers:
        vision = dataclasses.replace(config.vision, depth=2, fullatt_block_indexes=(1,))
        config = dataclasses.replace(config, num_layers=layers, vision=vision, vocab_size=8192)
    return config


def runner(
    config: ModelConfig,
    params: Any,
    rows: int,
    lengths: np.ndarray,
    chunk: int,
    turns: int = 1,
    room: int = 1,
) -> Callable[[], int]:
    """One rollout by our sampler; returns how many tokens it sampled.

    Args:
      lengths: of the responses, one per prompt; the same on every turn.
      room: responses could be so many times as long.
    """
    mesh = make_mesh(devices=jax.devices()[:1])
    spec = SamplerSpec(int(lengths.max()) * room, (IMAGE_ID, END), (END,), END, 1.0, chunk)
    layout = VisionLayout.of(config, IMAGE_ID, END, 1)
    exchange = Exchange(Sampler(Qwen25VL(config), spec, mesh), layout)
    pieces = [_prompt(config, number) for number in range(len(lengths))]

    def run() -> int:
        groups = [
            Group(CHART, uid, 1, 1, piece, limit=int(limit))
            for uid, (piece, limit) in enumerate(zip(pieces, lengths, strict=True))
        ]
        size = Size(prompts=rows, rows=rows)
        Run(exchange, params, jax.random.key(0), groups, turns, size, _NoPhases()).go()
        return sum(len(u.ids) for group in groups for talk in group.talks for u in talk.turns)

    return run


def _prompt(config: ModelConfig, number: int) -> Piece:
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    image = window_patches(pixels, config.vision)
    ids = rng.integers(10, config.vocab_size, PROMPT).astype(np.int32)
    ids[4 : 4 + len(image.slots)] = IMAGE_ID
    return Piece(ids, 0, (image,))


def _reference(
    config: ModelConfig, rows: int
) -> tuple[Callable[[np.ndarray], int], dict[str, np.ndarray]]:
    import torch
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        StoppingCriteria,
        StoppingCriteriaList,
    )

    published = Qwen2_5_VLConfig.from_dict(
        published_config(config, "float32", {"image_token_id": IMAGE_ID})
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(published).eval()
    tensors = {name: x.detach().numpy().copy() for name, x in model.named_parameters()}
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    patches = HEIGHT // 14 * (WIDTH // 14)

    class Limits(StoppingCriteria):
        """Ends each row after its own number of tokens."""

        def __init__(self, limits: np.ndarray):
            self.limits = torch.tensor(limits + PROMPT)

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return self.limits <= input_ids.shape[1]

    @torch.inference_mode()
    def run(lengths: np.ndarray) -> int:
        written = 0
        for first in range(0, len(lengths), rows):
            limits = lengths[first : first + rows]
            ids = torch.tensor(
                np.stack([_prompt(config, first + i).ids for i in range(len(limits))])
            ).long()
            pixels = torch.randn(len(limits) * patches, 3 * 2 * 14 * 14)
            grid = torch.tensor([[1, HEIGHT // 14, WIDTH // 14]] * len(limits))
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                image_grid_thw=grid,
                mm_token_type_ids=(ids == IMAGE_ID).long(),
                max_new_tokens=int(limits.max()),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                stopping_criteria=StoppingCriteriaList([Limits(limits)]),
            )
            assert out.shape[1] == PROMPT + limits.max()
            written += int(limits.sum())
        return written

    return run, tensors


if __name__ == "__main__":
    main()

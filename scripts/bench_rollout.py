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
IMAGE_ID = 1
CHART = Chart("a", b"", "", Record(), "", "", "")


class Exchange:
    """A conversation of one turn with nobody: scripts are not run."""

    def __init__(self, sampler: Sampler, layout: VisionLayout):
        self.sampler, self.layout = sampler, layout
        self.spec = RolloutSpec(PROMPT, 0, (6,), {}, "training")

    def shown(self, execution: Execution) -> Execution:
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
        raise AssertionError("there is one turn")

    def pad(
        self,
        params: Any,
        pieces: Sequence[Piece],
        before: Sequence[Sequence[Piece]],
        bucket: Bucket,
    ) -> dict[str, np.ndarray]:
        return pad_prompts(pieces, before, bucket.length, 6, len(pieces), self.layout)


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
    args = parser.parse_args()
    if args.against:
        _against(args)
        return
    config = _sizes(args.preset, args.layers)
    rng = np.random.default_rng(0)
    least, most = args.lengths[0], args.lengths[-1]
    lengths = np.linspace(least, most, args.prompts).round().astype(int)
    rng.shuffle(lengths)
    reference, tensors = _reference(config, args.rows)
    ours = _ours(config, tensors, args.rows, lengths, args.chunk)
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


def _ours(
    config: ModelConfig,
    tensors: dict[str, np.ndarray],
    rows: int,
    lengths: np.ndarray,
    chunk: int,
) -> Callable[[], int]:
    mesh = make_mesh(devices=jax.devices()[:1])
    params = from_tensors(tensors, config)
    longest = int(lengths.max())
    spec = SamplerSpec(longest, (IMAGE_ID,), (0,), 0, 1.0, chunk)
    layout = VisionLayout.of(config, IMAGE_ID, 0, 1)
    exchange = Exchange(Sampler(Qwen25VL(config), spec, mesh), layout)
    pieces = [_prompt(config, number) for number in range(len(lengths))]

    def run() -> int:
        groups = [
            Group(CHART, uid, 1, 1, piece, limit=int(limit))
            for uid, (piece, limit) in enumerate(zip(pieces, lengths, strict=True))
        ]
        size = Size(prompts=rows, rows=rows)
        Run(exchange, params, jax.random.key(0), groups, 1, size, _NoPhases()).go()
        return sum(len(talk.turns[0].ids) for group in groups for talk in group.talks)

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

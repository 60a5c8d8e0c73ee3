"""Updates of one checkout, for `bench_grpo.py`: it measures two beside each other.

Makes groups of conversations of two turns, random tokens with an image in the prompt and one in the
feedback, and answers each line that it reads with the seconds of one update. The first line it
writes has what does not change: loss, norm of the gradients, token slots, bytes that the program
needs beside its arguments. It uses of the package only what older commits have too.
"""

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

import jax
import numpy as np

from mmrecoder_jax import grpo
from mmrecoder_jax.config import load
from mmrecoder_jax.data.batching import BatchShape, Collate, Piece, TokenRow, VisionLayout
from mmrecoder_jax.learner.distributed import to_global
from mmrecoder_jax.learner.update import Update, from_params, make_optimizer
from mmrecoder_jax.models.config import PRESETS
from mmrecoder_jax.models.processor import window_patches
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL, init_params
from mmrecoder_jax.models.sharding import make_mesh
from mmrecoder_jax.rl.policy import policy_logps

PAD, IMAGE_ID = 0, 1
HEIGHT, WIDTH = 112, 168


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--layers", type=int, required=True, help="0: as many as the preset has")
    parser.add_argument("--prompts", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--stage", choices=("stage1", "stage2"), required=True)
    parser.add_argument("--lengths", type=int, nargs=3, required=True)
    args = parser.parse_args()
    model = dataclasses.replace(PRESETS[args.preset], dtype="float32", scan_unroll=1)
    if args.layers:
        vision = dataclasses.replace(model.vision, depth=2, fullatt_block_indexes=(1,))
        model = dataclasses.replace(model, num_layers=args.layers, vision=vision, vocab_size=8192)
    config = load(args.stage, "tiny")
    rows = [row for prompt in range(args.prompts) for row in group_of(args, model, prompt)]
    mesh = make_mesh(devices=jax.devices()[:1])
    layout = VisionLayout.of(model, IMAGE_ID, PAD, 1)
    longest = -(-max(row.length for row in rows) // 8) * 8
    images = args.prompts * (2 if args.stage == "stage1" else 1 + args.group)
    shape = BatchShape(len(rows), (longest,), (6,), images, sampled=True)
    batch = Collate(shape, layout, max_tokens=args.lengths[2])(rows)
    logps = policy_logps(Qwen25VL(model), (IMAGE_ID,), 1.0, config.model.loss_chunk)
    optimizer, schedule = make_optimizer(config.optim, 1000)
    state = from_params(init_params(model, jax.random.key(0)), optimizer, mesh, 0)
    update = Update(grpo.make_loss(config, logps), optimizer, schedule, mesh)
    micro = to_global({name: x[0] for name, x in batch.items()}, mesh)

    def shapes(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
        )

    lowered = update.lower("whole", shapes(state), shapes(micro))
    needs = lowered.compile().memory_analysis().temp_size_in_bytes
    state, metrics = update(state, batch)
    said = {name: float(metrics[name]) for name in ("loss", "grad_norm", "logp")}
    print(json.dumps(said | {"slots": batch["tokens"].size, "bytes": needs}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        state, metrics = update(state, batch)
        jax.block_until_ready((state, metrics))
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


def group_of(args: argparse.Namespace, model: Any, prompt: int) -> list[TokenRow]:
    """The rows of one group."""
    rng = np.random.default_rng(prompt)
    shown, fed_back, most = args.lengths

    def picture(length: int) -> Piece:
        image = window_patches(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8), model.vision)
        ids = rng.integers(10, model.vocab_size, length).astype(np.int32)
        ids[4 : 4 + len(image.slots)] = IMAGE_ID
        return Piece(ids, 0, (image,))

    def answer(turn: int) -> Piece:
        ids = rng.integers(10, model.vocab_size, rng.integers(most * 3 // 4, most + 1))
        return Piece(ids.astype(np.int32), turn, logps=np.zeros(len(ids), np.float32))

    shares = args.stage == "stage1"
    common = [picture(shown)] + ([answer(1), picture(fed_back)] if shares else [])
    rows = []
    for member in range(args.group):
        own = [answer(2)] if shares else [answer(1), picture(fed_back), answer(2)]
        turns = (2,) if shares else (1, 2)
        rows.append(TokenRow((*common, *own), turns, float(member) - (args.group - 1) / 2))
    return rows


if __name__ == "__main__":
    main()

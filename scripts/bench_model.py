"""One supervised update of a model of the 3B's widths on a CPU, beside the reference.

    python scripts/bench_model.py
    python scripts/bench_model.py --layers=2 --vocab=8192 --tokens=128 --steps=3

The reference is transformers on torch (extra `parity`). Both sides start from the same float32
weights and take the same AdamW steps on the same row (one image, then text). Steps alternate, so
that other work on the machine meets both. The decoder has the true widths and `layers` layers; the
tower has its true widths and two layers; the vocabulary is cut to `vocab` rows (151,936 would take
10 GB more for both sides).
"""

import dataclasses
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from mmrecoder_jax.command import run_with_flags
from mmrecoder_jax.config import load
from mmrecoder_jax.learner.update import Update, from_params, make_optimizer
from mmrecoder_jax.models.config import ModelConfig, preset
from mmrecoder_jax.models.processor import ImagePatches, rope_positions, window_patches
from mmrecoder_jax.models.published import published_config
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL, init_params
from mmrecoder_jax.models.sharding import make_mesh
from mmrecoder_jax.models.weights import from_tensors
from mmrecoder_jax.rl.policy import policy_logps
from mmrecoder_jax.sft import make_loss

Step = Callable[[], float]  # takes one step and returns the loss before it
IMAGE_ID = 1
SIDE = 168  # pixels of the image: 36 visual tokens
LOSS_CHUNK = 512  # as configured: tokens per row projected to logits at a time

_LAYERS = flags.DEFINE_integer("layers", 2, "Layers of the decoder.", lower_bound=1)
_VOCAB = flags.DEFINE_integer("vocab", 8192, "Rows of the vocabulary.", lower_bound=256)
_TOKENS = flags.DEFINE_integer(
    "tokens", 128, "Tokens of the row, the image's 36 included.", lower_bound=64
)
_STEPS = flags.DEFINE_integer(
    "steps", 3, "Timed updates per side, after one that is not counted.", lower_bound=1
)


def import_seconds(modules: str) -> float:
    """What a new interpreter takes to import them."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)
    return time.perf_counter() - started


def sizes() -> ModelConfig:
    """The 3B preset, shortened, float32 throughout, nothing recomputed."""
    whole = preset("3b")
    vision = dataclasses.replace(whole.vision, depth=2, fullatt_block_indexes=(1,))
    return dataclasses.replace(
        whole,
        num_layers=_LAYERS.value,
        vocab_size=_VOCAB.value,
        vision=vision,
        dtype="float32",
        remat="none",
    )


def row(config: ModelConfig) -> tuple[np.ndarray, ImagePatches]:
    """(token ids with the image's placeholders behind the first ten, the image)."""
    rng = np.random.default_rng(0)
    image = window_patches(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8), config.vision)
    ids = rng.integers(2, config.vocab_size, _TOKENS.value)
    ids[10 : 10 + len(image.slots)] = IMAGE_ID
    return ids, image


def trained(name: str) -> bool:
    """All but the patch embedding.

    The reference keeps it in two halves, whose sum Adam moves twice as far as our one kernel.
    """
    return "patch_embed" not in name


def our_side(
    config: ModelConfig, optim: ConfigDict, tensors: dict[str, np.ndarray]
) -> tuple[Step, float, int]:
    """(one step; seconds that fresh weights take; how many parameters there are)."""
    ids, image = row(config)
    started = time.perf_counter()
    jax.block_until_ready(init_params(config, jax.random.key(0)))
    init_seconds = time.perf_counter() - started
    index = np.full(len(ids), -1, np.int32)
    index[ids == IMAGE_ID] = image.slots
    batch = {
        "tokens": ids[None].astype(np.int32),
        "positions": rope_positions(ids, [image.grid], IMAGE_ID)[None],
        "segment_ids": np.ones((1, len(ids)), np.int32),
        "vision_index": index[None],
        "patches": image.patches[None],
        "patch_positions": image.position[None],
        "patch_valid": image.valid[None],
    }
    batch["weights"] = np.full((1, len(ids)), 1 / (len(ids) - 1), np.float32)
    logps = policy_logps(Qwen25VL(config), forbidden=(), temperature=1.0, chunk=LOSS_CHUNK)
    mesh = make_mesh(devices=jax.devices()[:1])
    tx, schedule = make_optimizer(optim, 100)
    update = Update(make_loss(logps), tx, schedule, mesh, trained)
    state = from_params(from_tensors(tensors, config), tx, mesh, 0, trained)
    batch = {name: x[None] for name, x in batch.items()}

    def step() -> float:
        nonlocal state
        state, metrics = update(state, batch)
        return float(metrics["loss"])

    return step, init_seconds, sum(x.size for x in jax.tree.leaves(state.params))


def reference_side(
    config: ModelConfig, optim: ConfigDict
) -> tuple[Step, float, dict[str, np.ndarray]]:
    """(one step; seconds that fresh weights take; the weights under their published names)."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    started = time.perf_counter()
    published = Qwen2_5_VLConfig.from_dict(
        published_config(config, "float32", {"image_token_id": IMAGE_ID})
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(published).train()
    init_seconds = time.perf_counter() - started
    model.model.visual.patch_embed.requires_grad_(False)  # see `trained`
    names = {name: x.detach().numpy().copy() for name, x in model.named_parameters()}
    ids, image = row(config)
    cells = image.patches.reshape(-1, 4, 3, 1, 14, 14)[image.slots].repeat(2, axis=3)
    tokens = torch.from_numpy(ids[None])
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == IMAGE_ID).int(),
        "pixel_values": torch.from_numpy(cells.reshape(4 * len(image.slots), -1)),
        "image_grid_thw": torch.tensor([[1, *(2 * n for n in image.grid)]]),
    }
    parameters = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=optim.lr, betas=(optim.b1, optim.b2), weight_decay=optim.weight_decay
    )

    def step() -> float:
        optimizer.zero_grad()
        logits = model(**inputs, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float(), tokens[0, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, optim.clip)
        optimizer.step()
        return loss.item()

    return step, init_seconds, names


def main() -> None:
    config = sizes()
    optim = load("sft_chart2code", "paper").optim
    optim.warmup_steps = 0
    if importlib.util.find_spec("torch") is None:
        sys.exit("error: the reference needs torch: pip install -e '.[parity]'")
    our_import = import_seconds("mmrecoder_jax.models.qwen2_5_vl, mmrecoder_jax.learner.update")
    their_import = import_seconds("torch, transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    theirs, their_init, tensors = reference_side(config, optim)
    ours, our_init, count = our_side(config, optim, tensors)
    del tensors
    print(
        f"{count / 1e6:.0f} M parameters, float32: decoder of {_LAYERS.value} layers, tower of 2, "
        f"{_VOCAB.value} rows of vocabulary;"
    )
    print(
        f"one row of {_TOKENS.value} tokens, 36 of them visual; {jax.default_backend()}, "
        f"jax {jax.__version__}"
    )
    seconds: tuple[list[float], list[float]] = ([], [])
    losses: tuple[list[float], list[float]] = ([], [])
    for _ in range(_STEPS.value + 1):
        for side, step in enumerate((ours, theirs)):
            started = time.perf_counter()
            losses[side].append(step())
            seconds[side].append(time.perf_counter() - started)
    (our_first, *our_steps), (their_first, *their_steps) = seconds
    our_step, their_step = float(np.median(our_steps)), float(np.median(their_steps))
    print("                     ours    reference")
    print(f"import (s)      {our_import:9.1f}    {their_import:9.1f}")
    print(f"init (s)        {our_init:9.1f}    {their_init:9.1f}")
    print(f"first step (s)  {our_first:9.1f}    {their_first:9.1f}    ours with compilation")
    print(
        f"step (s)        {our_step:9.2f}    {their_step:9.2f}    "
        f"median of {_STEPS.value}, alternating"
    )
    print(f"step time, ours / reference: {our_step / their_step:.2f}")
    first, last = (abs(losses[0][i] - losses[1][i]) for i in (0, -1))
    print(
        f"loss {losses[0][0]:.4f} -> {losses[0][-1]:.4f}; the sides differ by {first:.1e} before "
        f"the first step, {last:.1e} at last"
    )


if __name__ == "__main__":
    run_with_flags(main, "--steps=3")

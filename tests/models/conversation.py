"""What the model tests share: a toy tokenizer and conversations with images, ready for the model
and padded.
"""

import re

import numpy as np

from mmrecoder_jax.models.config import ModelConfig, VisionConfig
from mmrecoder_jax.models.processor import ImagePatches, Processor, Segment, rope_positions

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)

PIXELS = 28 * 28, 400 * 28 * 28  # bounds of an image's area


class ByteTokenizer:
    """Bytes, and six special tokens behind them."""

    image_pad_id = 256 + SPECIALS.index("<|image_pad|>")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, SPECIALS)) + ")", text):
            ids += [256 + SPECIALS.index(part)] if part in SPECIALS else part.encode()
        return ids

    def decode(self, ids, skip_special: bool = True) -> str:
        out = b""
        for i in ids:
            out += bytes([i]) if i < 256 else b"" if skip_special else SPECIALS[i - 256].encode()
        return out.decode()


def small_config(**changes) -> ModelConfig:
    """Two groups of vision layers, grouped-query attention, float32: small enough to compile in
    seconds.
    """
    vision = VisionConfig(
        hidden_size=32,
        depth=4,
        num_heads=2,
        intermediate_size=40,
        out_hidden_size=48,
        fullatt_block_indexes=(1, 3),
        window_size=56,
    )
    fields = dict(
        vocab_size=300,
        hidden_size=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=80,
        vision=vision,
        head_dim=12,
        mrope_section=(1, 2, 3),
        dtype="float32",
        remat="none",
    )
    return ModelConfig(**{**fields, **changes})


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth coloured noise, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 7), -(-width // 7), 3))
    return np.kron(coarse, np.ones((7, 7, 1))).astype(np.uint8)[:height, :width]


def pictures(sizes: list[tuple[int, int]], seed: int) -> list[np.ndarray]:
    return [picture(*size, seed=100 * seed + i) for i, size in enumerate(sizes)]


def conversation(config: ModelConfig, sizes: list[tuple[int, int]], seed: int = 0) -> Segment:
    """A first prompt and then feedback turns, one image of each size (height, width) in pixels,
    with responses between.
    """
    processor = Processor(ByteTokenizer(), config.vision, *PIXELS, system=None)
    rng = np.random.default_rng(seed)
    images = [processor.image(pixels) for pixels in pictures(sizes, seed)]
    parts = (
        [processor.first_prompt("draw", images[0])]
        if images
        else [processor.feedback_prompt("no image", (), closed=True)]
    )
    for image in images[1:]:
        answer = bytes(rng.integers(97, 123, 5)).decode()
        parts += [
            Segment(processor.response(answer)),
            processor.feedback_prompt("again", (image,), closed=True),
        ]
    parts.append(Segment(processor.response("the end")))
    return Segment(
        np.concatenate([part.ids for part in parts]),
        tuple(image for part in parts for image in part.images),
    )


def stack_images(
    images: list[ImagePatches], windows: int = 0
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], list[np.ndarray]]:
    """Images padded to equal window counts -> (patches, position, valid), and the rows of each
    image's cells among the features.
    """
    windows = max(windows, *(len(image.valid) for image in images))

    def pad(x):
        return np.pad(x, [(0, windows - len(x))] + [(0, 0)] * (x.ndim - 1))

    arrays = tuple(
        np.stack([pad(getattr(image, name)) for image in images])
        for name in ("patches", "position", "valid")
    )
    rows = windows * images[0].valid.shape[1] // 4
    return arrays, [i * rows + image.slots for i, image in enumerate(images)]


def model_inputs(
    segments: list[Segment], length: int, left: bool = False, rows: list[np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Conversations padded to `length`: tokens, positions, segment_ids, vision_index. `rows` as
    `stack_images` gives them.
    """
    tokens = np.zeros((len(segments), length), np.int32)
    positions = np.zeros((len(segments), 3, length), np.int32)
    segment_ids, vision_index = np.zeros_like(tokens), np.full_like(tokens, -1)
    rows = list(rows or [])
    for b, segment in enumerate(segments):
        n = len(segment.ids)
        place = slice(length - n, length) if left else slice(0, n)
        tokens[b, place] = segment.ids
        positions[b, :, place] = rope_positions(
            segment.ids, segment.grids, ByteTokenizer.image_pad_id
        )
        segment_ids[b, place] = 1
        mine = [rows.pop(0) for _ in segment.images]
        if mine:
            vision_index[b, place][segment.ids == ByteTokenizer.image_pad_id] = np.concatenate(mine)
    return dict(
        tokens=tokens, positions=positions, segment_ids=segment_ids, vision_index=vision_index
    )

"""Parity with the reference implementation: the cases, random weights that both sides make from tensor names, and our side of them.

`python -m tests.models.reference` (torch) writes what the reference answers to golden/parity.npz, and the table in docs/parity.md.
"""

import dataclasses
import functools
import pathlib
import zlib

import jax
import numpy as np

from mmrecoder_jax.models import weights
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL, init_params
from tests.models.conversation import ByteTokenizer, conversation, model_inputs, small_config, stack_images

CONFIG = small_config()
GOLDEN = pathlib.Path(__file__).parent / "golden" / "parity.npz"
ATOL = 2e-5  # on logits of scale 3; the smallest of the mistakes in test_golden moves them more
IMAGE_TOKEN = ByteTokenizer.image_pad_id
LENGTH, IMAGES, WINDOWS, ROWS = 192, 4, 9, 2  # every case is padded to these: one compilation


@dataclasses.dataclass(frozen=True)
class Case:
    """Conversations (image sizes (height, width) of each), and the side they are padded on."""

    conversations: tuple[tuple[tuple[int, int], ...], ...]
    left: bool = False

    @property
    def segments(self):
        return [conversation(CONFIG, list(sizes), seed) for seed, sizes in enumerate(self.conversations)]


CASES = {
    "text only": Case(((),)),
    "one image": Case((((56, 112),),)),
    "grid that windows do not divide": Case((((84, 140),),)),
    "one window": Case((((28, 56),),)),
    "images of several sizes in several turns": Case((((84, 56), (56, 56), (84, 84)),)),
    "right-padded batch": Case((((56, 84), (112, 56)), ((84, 84),))),
    "left-padded batch": Case((((56, 84), (112, 56)), ((84, 84),)), left=True),
}


def random_tensors(config=CONFIG) -> dict[str, np.ndarray]:
    """Every published tensor (hub names), drawn from a seed that is its name; no bias is zero, no norm is one."""
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    tensors = {}
    for entry in weights.entries(config):
        leaf = functools.reduce(lambda tree, key: tree[key], entry.path, abstract)
        shape = entry.turn.to_published(np.zeros(leaf.shape[len(entry.place) :], np.float32)).shape
        x = np.random.default_rng(zlib.crc32(entry.name.encode())).standard_normal(shape, np.float32)
        if entry.name.endswith("bias"):
            x *= 0.2
        elif len(shape) == 1:
            x = 1 + 0.2 * x
        elif "embed" in entry.name:  # both towers begin small, where the epsilon of a norm shows
            x *= 0.02 if entry.name.startswith("model") else 0.02 * np.prod(shape[1:]) ** -0.5
        else:
            x *= np.prod(shape[1:]) ** -0.5
        tensors[entry.name] = x
    return tensors


def inputs_of(case: Case, windows: int = WINDOWS):
    """((patches, position, valid) or None, model inputs), padded to the common sizes."""
    segments = case.segments
    images = [image for segment in segments for image in segment.images]
    arrays, rows = (None, []) if not images else stack_images(images, windows)
    if arrays:
        arrays = tuple(np.concatenate([x, np.zeros((IMAGES - len(x), *x.shape[1:]), x.dtype)]) for x in arrays)
    inputs = model_inputs(segments, LENGTH, case.left, rows)
    fill = {"vision_index": -1}
    return arrays, {name: _rows(x, fill.get(name, 0)) for name, x in inputs.items()}


def our_side(params, arrays, inputs, config=CONFIG):
    """(features or None, logits [B, L, V])."""
    apply = functools.partial(Qwen25VL(config).apply, {"params": params})
    features = None if arrays is None else apply(*arrays, method="encode_images")
    return features, apply(apply(**inputs, vision_features=features), method="logits")


def compact(case: Case, features, logits) -> dict[str, np.ndarray]:
    """What is compared: the features of real cells, image after image in raster order, and the logits of real tokens, row after row."""
    segments = case.segments
    images = [image for segment in segments for image in segment.images]
    rows = stack_images(images, WINDOWS)[1] if images else []
    real = model_inputs(segments, LENGTH, case.left, rows)["segment_ids"]
    out = {"logits": np.concatenate([np.asarray(logits)[b][real[b] > 0] for b in range(len(segments))])}
    if images:
        out["features"] = np.asarray(features)[np.concatenate(rows)]
    return out


def thin(answers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows that the golden file keeps."""
    return {what: x[:: {"logits": 11, "features": 5}[what]] for what, x in answers.items()}


def _rows(x: np.ndarray, fill: int) -> np.ndarray:
    return np.concatenate([x, np.full((ROWS - len(x), *x.shape[1:]), fill, x.dtype)])

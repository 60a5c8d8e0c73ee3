"""Parity with the reference implementation: the cases, random weights that both sides make from
tensor names, and our side of them.

`python -m tests.models.reference` (torch) writes what the reference answers to golden/parity.npz,
and the table in docs/parity.md.
"""

import dataclasses
import functools
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mmrecoder_jax.models import weights
from mmrecoder_jax.models.decoding import Rows, decode_step, decoding_weights, empty_cache
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL, init_params, no_past
from tests.models.conversation import (
    ByteTokenizer,
    conversation,
    model_inputs,
    small_config,
    stack_images,
)

CONFIG = small_config()
GOLDEN = pathlib.Path(__file__).parent / "golden" / "parity.npz"
ATOL = 2e-5  # on logits of scale 3; the smallest of the mistakes in test_golden moves them more
IMAGE_TOKEN = ByteTokenizer.image_pad_id
GRADIENT_RTOL = (
    1e-5  # of the norm of a tensor's gradient; float32 on both sides is within 4e-6 of float64
)
NEW = 8  # tokens of a greedy continuation
LENGTH, IMAGES, WINDOWS, ROWS = 192, 4, 9, 2  # every case is padded to these: one compilation


@dataclasses.dataclass(frozen=True)
class Case:
    """Conversations (image sizes (height, width) of each), and the side they are padded on."""

    conversations: tuple[tuple[tuple[int, int], ...], ...]
    left: bool = False

    @property
    def segments(self):
        return [
            conversation(CONFIG, list(sizes), seed) for seed, sizes in enumerate(self.conversations)
        ]


CASES = {
    "text only": Case(((),)),
    "one image": Case((((56, 112),),)),
    "grid that windows do not divide": Case((((84, 140),),)),
    "tall image": Case((((168, 56),),)),
    "one window": Case((((56, 56),),)),
    "images of several sizes in several turns": Case((((84, 56), (56, 56), (84, 84)),)),
    "right-padded batch": Case((((56, 84), (112, 56)), ((84, 84),))),
    "left-padded batch": Case((((56, 84), (112, 56)), ((84, 84),)), left=True),
}


def random_tensors(config=CONFIG) -> dict[str, np.ndarray]:
    """Every published tensor (hub names), drawn from a seed that is its name; no bias is zero, no
    norm is one.
    """
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    tensors = {}
    for entry in weights.entries(config):
        leaf = functools.reduce(lambda tree, key: tree[key], entry.path, abstract)
        ours = np.zeros(leaf.shape[len(entry.place) :], np.float32)
        shape = entry.conversion.to_published(ours).shape
        x = np.random.default_rng(zlib.crc32(entry.name.encode())).standard_normal(
            shape, np.float32
        )
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
        arrays = tuple(
            np.concatenate([x, np.zeros((IMAGES - len(x), *x.shape[1:]), x.dtype)]) for x in arrays
        )
    inputs = model_inputs(segments, LENGTH, case.left, rows)
    fill = {"vision_index": -1}
    return arrays, {name: _rows(x, fill.get(name, 0)) for name, x in inputs.items()}


def our_side(params, arrays, inputs, config=CONFIG):
    """(features or None, logits [B, L, V])."""
    arrays, inputs = jax.tree.map(jnp.asarray, (arrays, inputs))
    apply = functools.partial(Qwen25VL(config).apply, {"params": params})
    features = None if arrays is None else apply(*arrays, method="encode_images")
    return features, apply(apply(**inputs, vision_features=features), method="logits")


def our_gradients(params, arrays, inputs):
    """Gradient of the mean log-probability of the real tokens, each given those before it."""

    def value(params):
        logps = jax.nn.log_softmax(our_side(params, arrays, inputs)[1][:, :-1])
        logps = jnp.take_along_axis(logps, inputs["tokens"][:, 1:, None], -1)[..., 0]
        real = inputs["segment_ids"] > 0
        return jnp.mean(logps, where=real[:, 1:] & real[:, :-1])

    return jax.grad(value)(params)


def gradient_error(ours, theirs) -> float:
    """The norm of a tensor's difference over the norm of its gradient; the largest such over all
    tensors.

    The bias of a key adds the same score to every key of a query, and nothing changes but by
    rotation: its gradient is tiny. Hence the floor of 1e-3 below each norm (the largest are above
    1).
    """
    errors = jax.tree.map(
        lambda a, b: float(np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-3)), ours, theirs
    )
    return max(jax.tree.leaves(errors))


@functools.partial(jax.jit, static_argnames="config")
def _extend(params, tokens, positions, vision_index, features, lengths, past, valid, config):
    """(logits of these tokens, their keys and values)."""
    net, variables = Qwen25VL(config), {"params": params}
    hidden, kept = net.apply(
        variables, tokens, positions, vision_index, features, lengths, past, valid, method="extend"
    )
    return net.apply(variables, hidden, method="logits"), kept


@functools.partial(jax.jit, static_argnames="config")
def _step(params, token, position, live, prefix, held, own, written, config):
    """(logits, own keys and values) of one token a row behind a prefix of its own."""
    rows = jnp.arange(len(token))
    where = Rows(rows[:, None], rows, held, written)
    layers = [{name: x[i] for name, x in prefix.items()} for i in range(config.num_layers)]
    bounds = (prefix["k"].shape[3], 64), (own[0]["k"].shape[2], 2)
    weights = decoding_weights(params, config)
    return decode_step(Qwen25VL(config), weights, token, position, live, layers, own, where, bounds)


def _from_the_left(inputs) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(the real tokens of rows, padded on the right to LENGTH; how many there are)."""
    real = inputs["segment_ids"] > 0
    count = real.sum(1)
    moved = {}
    for name in ("tokens", "positions", "vision_index"):
        rows = [x[..., r] for x, r in zip(inputs[name], real, strict=True)]
        pad = [[(0, 0)] * (x.ndim - 1) + [(0, LENGTH - x.shape[-1])] for x in rows]
        fill = -1 if name == "vision_index" else 0
        moved[name] = np.stack(
            [np.pad(x, p, constant_values=fill) for x, p in zip(rows, pad, strict=True)]
        )
    return moved, count


def by_pieces(params, features, inputs, config=CONFIG):
    """Logits [B, L, V] by the programs of rollouts: a first prompt of 20 tokens, the next turn's
    prompt, the last three tokens of each row one by one.
    """
    moved, count = _from_the_left(inputs)
    first = np.minimum(count, 20)
    rest = np.maximum(count - 23, 0)
    each = np.arange(ROWS)

    def cut(start, stop):
        names = ("tokens", "positions", "vision_index")
        return [moved[name][..., start:stop] for name in names]

    logits, kept = _extend(params, *cut(0, 20), features, first, *no_past(config, ROWS), config)
    valid = np.arange(20) < first[:, None]
    more, behind = _extend(params, *cut(20, LENGTH), features, rest, kept, valid, config)
    logits = np.concatenate([logits, more], 1)
    prefix = {name: np.concatenate([kept[name], behind[name]], 3) for name in kept}
    own = empty_cache(config, ROWS, 3)
    for step in range(3):
        at = np.clip(first + rest + step, 0, LENGTH - 1)
        out, own = _step(
            params,
            moved["tokens"][each, at],
            moved["positions"][each, 0, at],
            at < count,
            prefix,
            first + rest,
            own,
            np.full(ROWS, step),
            config,
        )
        logits[each, at] = out
    whole = np.zeros((ROWS, LENGTH, logits.shape[-1]), np.float32)
    for row, real in enumerate(inputs["segment_ids"] > 0):
        whole[row, real] = logits[row, : count[row]]
    return whole


def greedy(params, features, inputs, config=CONFIG) -> np.ndarray:
    """The NEW most likely next tokens [B, NEW] behind each row, by the programs of rollouts."""
    moved, count = _from_the_left(inputs)
    parts = [moved[name] for name in ("tokens", "positions", "vision_index")]
    out, prefix = _extend(params, *parts, features, count, *no_past(config, ROWS), config)
    each, last = np.arange(ROWS), np.maximum(count - 1, 0)
    tokens = [np.argmax(np.asarray(out)[each, last], -1)]
    position = moved["positions"][each, :, last].max(-1)
    own = empty_cache(config, ROWS, NEW)
    for i in range(1, NEW):
        out, own = _step(
            params,
            tokens[-1],
            position + i,
            np.ones(ROWS, bool),
            prefix,
            count,
            own,
            np.full(ROWS, i - 1),
            config,
        )
        tokens.append(np.argmax(out, -1))
    return np.stack(tokens, 1)


def packed(case: Case, inputs) -> tuple[dict[str, np.ndarray], int]:
    """(all conversations of a case, twice over, behind one another in one row of 2 * LENGTH tokens;
    how many tokens they are).
    """
    real = [inputs["segment_ids"][b] > 0 for b in range(len(case.segments))] * 2
    row = {
        name: np.concatenate([x[b % len(case.segments)][..., r] for b, r in enumerate(real)], -1)[
            None
        ]
        for name, x in inputs.items()
    }
    row["segment_ids"] = np.repeat(np.arange(len(real)) + 1, [r.sum() for r in real])[None].astype(
        np.int32
    )
    count = row["tokens"].shape[-1]
    fill = {"vision_index": -1}
    pad = 2 * LENGTH - count
    return {
        name: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)], constant_values=fill.get(name, 0))
        for name, x in row.items()
    }, count


def no_features(config=CONFIG) -> np.ndarray:
    """In place of the features where there is no image, so that the same programs serve."""
    return np.zeros(
        (IMAGES * WINDOWS * config.vision.window_patches // 4, config.hidden_size), np.float32
    )


def compact(case: Case, features, logits) -> dict[str, np.ndarray]:
    """What is compared: the features of real cells, image after image in raster order, and the
    logits of real tokens, row after row.
    """
    segments = case.segments
    images = [image for segment in segments for image in segment.images]
    rows = stack_images(images, WINDOWS)[1] if images else []
    real = model_inputs(segments, LENGTH, case.left, rows)["segment_ids"]
    out = {
        "logits": np.concatenate([np.asarray(logits)[b][real[b] > 0] for b in range(len(segments))])
    }
    if images:
        out["features"] = np.asarray(features)[np.concatenate(rows)]
    return out


def thin(answers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows that the golden file keeps."""
    return {what: x[:: {"logits": 11, "features": 5}[what]] for what, x in answers.items()}


def _rows(x: np.ndarray, fill: int) -> np.ndarray:
    return np.concatenate([x, np.full((ROWS - len(x), *x.shape[1:]), fill, x.dtype)])

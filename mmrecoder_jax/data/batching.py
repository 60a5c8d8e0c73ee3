"""Token rows -> padded micro-batches, the same for supervised dialogues and for sampled
trajectories.

A row is a list of pieces: what the model was shown (turn 0) and what it wrote (turn 1, 2, ...).
Token ids are the only truth: a sampled response arrives here as the ids that were sampled and
leaves as the same ids.

    piece      prompt          response 1   feedback      response 2
    turn       0 0 0 0 0 0     1 1 1 1      0 0 0 0 0     2 2 2
    stage 1    . . . . . .     . . . .      . . . . .     x x x       loss on turn 2 only
    stage 2    . . . . . .     x x x x      . . . . .     x x x       loss on both turns, never on prompt or feedback

A micro-batch (one leading axis M more in a batch):

    tokens, segment_ids, turns, vision_index   int32 [B, L]     segment 0 is padding; vision_index -1 is text, else a row of the
    positions                                  int32 [B, 3, L]  merged features of the images in the row's own part
    weights                                    float32 [B, L]   loss mask divided by the global denominator
    advantages                                 float32 [B]
    patches [I, W, S, C], patch_positions [I, W, S, 2], patch_valid [I, W, S]
        or, where the vision tower is frozen, its features [I, W * (S // 4), D]

Rows and images are cut over the devices of the batch axes, into `VisionLayout.ways` parts each. A
row finds its images in its own part, where each distinct image stands once, however many rows show
it. Shapes are bucketed: L, W and I come from short lists.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Self

import numpy as np
from jaxtyping import Int

from mmrecoder_jax.models.config import ModelConfig
from mmrecoder_jax.models.processor import ImagePatches, Segment, rope_positions


@dataclasses.dataclass(frozen=True)
class VisionLayout:
    """What batching must know of the model: the ids of the image placeholder and of padding, S and
    C of a window of patches. And of the mesh: the number of parts into which this host's rows are
    cut.

    Patches travel in the type that the model computes in: half the bytes in bfloat16, and the same
    numbers.
    """

    image_id: int
    pad_id: int
    window_patches: int
    patch_dim: int
    merge_patches: int = 4
    patch_dtype: str = "float32"
    ways: int = 1

    @classmethod
    def of(cls, model: ModelConfig, image_id: int, pad_id: int, ways: int) -> Self:
        """The layout for a model whose batches are cut into `ways` parts per host."""
        vision = model.vision
        return cls(
            image_id,
            pad_id,
            vision.window_patches,
            vision.patch_dim,
            vision.merge_patches,
            model.dtype,
            ways,
        )

    def merged(self, windows: int) -> int:
        """Merged vision features an image of `windows` windows occupies."""
        return windows * self.window_patches // self.merge_patches


@dataclasses.dataclass(frozen=True)
class Piece:
    """Token ids of one side of the conversation; `turn` is 0 for prompt and feedback, t for the
    response of turn t.
    """

    ids: Int[np.ndarray, " L"]
    turn: int
    images: tuple[ImagePatches, ...] = ()

    @classmethod
    def shown(cls, segment: Segment) -> Self:
        """A prompt or feedback segment of the processor."""
        return cls(segment.ids, 0, segment.images)


@dataclasses.dataclass(frozen=True)
class TokenRow:
    """One row of a learner batch before padding. `loss_turns` names the turns that are trained
    on.
    """

    pieces: tuple[Piece, ...]
    loss_turns: tuple[int, ...]
    advantage: float = 0.0

    @property
    def length(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def images(self) -> tuple[ImagePatches, ...]:
        return tuple(image for piece in self.pieces for image in piece.images)

    def loss_tokens(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces if piece.turn in self.loss_turns)


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The static shape of a micro-batch: rows B, buckets for L and W, and how many images I it may
    hold in all its parts together.
    """

    rows: int
    lengths: tuple[int, ...]
    windows: tuple[int, ...]
    images: int


def bucket(size: int, buckets: Sequence[int], what: str) -> int:
    """The smallest bucket that holds `size`; ValueError names the field to raise."""
    for candidate in sorted(buckets):
        if size <= candidate:
            return candidate
    raise ValueError(
        f"{what} of {size} exceeds the largest bucket {max(buckets)}: raise it in the config"
    )


def loss_weights(
    rows: Sequence[TokenRow],
    aggregation: str,
    max_tokens: int,
    total_tokens: float,
    total_rows: float,
) -> list[float]:
    """What each loss token of each row weighs, so that the loss is a plain sum.

    `token_mean`: every token of the global batch alike (1 / total_tokens). `sequence_mean`: every
    row alike, its tokens sharing (1 / (row tokens * total_rows)). `constant`: 1 / (max_tokens *
    total_rows), no dependence on response length. The totals are those of the whole batch over all
    micro-batches and hosts; a row without loss tokens counts in neither.
    """
    if aggregation == "token_mean":
        return [1.0 / max(total_tokens, 1.0)] * len(rows)
    if aggregation == "sequence_mean":
        return [1.0 / (max(row.loss_tokens(), 1) * max(total_rows, 1.0)) for row in rows]
    if aggregation == "constant":
        return [1.0 / (max_tokens * max(total_rows, 1.0))] * len(rows)
    raise ValueError(
        f"aggregation={aggregation!r}: use 'token_mean', 'sequence_mean' or 'constant'"
    )


def pad_images(
    images: Sequence[ImagePatches | None], count: int, windows: int, layout: VisionLayout
) -> dict[str, np.ndarray]:
    """Stacks images of at most `windows` windows into `[count, windows, S, ...]`; None and the rest
    are padding with `valid` False.
    """
    shape = (count, windows, layout.window_patches)
    patches = np.zeros((*shape, layout.patch_dim), layout.patch_dtype)
    positions = np.zeros((*shape, 2), np.int32)
    valid = np.zeros(shape, bool)
    for i, image in enumerate(images):
        if image is None:
            continue
        n = image.patches.shape[0]
        patches[i, :n], positions[i, :n], valid[i, :n] = image.patches, image.position, image.valid
    return {"patches": patches, "patch_positions": positions, "patch_valid": valid}


# Images, places, windows an image, layout -> the arrays of a batch that stand for the images:
# `pad_images`, or features in its stead.
ImageArrays = Callable[
    [Sequence[ImagePatches | None], int, int, VisionLayout], dict[str, np.ndarray]
]


def place_images(
    rows: Sequence[Sequence[ImagePatches]],
    count: int,
    places: int,
    windows: int,
    layout: VisionLayout,
) -> tuple[list[ImagePatches | None], list[dict[int, int]]]:
    """Where the images of `rows` stand among `places`: (place -> image or None, for each row: id of
    its image -> first merged feature).

    `count` rows make the batch (`rows` may be fewer, the last are padding); rows and places are cut
    into `layout.ways` equal parts. Raises ValueError where they cannot be, or where a part has more
    distinct images than places.
    """
    if count % layout.ways or places % layout.ways:
        raise ValueError(
            f"{count} rows and {places} images of a host cannot be cut over its {layout.ways} devices of data*fsdp: "
            "choose batch sizes that the mesh divides"
        )
    own_rows, own_places = count // layout.ways, places // layout.ways
    placed: list[ImagePatches | None] = []
    offsets = []
    for way in range(layout.ways):
        part = rows[way * own_rows : (way + 1) * own_rows]
        distinct = list({id(image): image for images in part for image in images}.values())
        if len(distinct) > own_places:
            raise ValueError(
                f"{len(distinct)} distinct images exceed the {own_places} places of a device's part of a micro-batch"
            )
        offsets += [
            {id(image): i * layout.merged(windows) for i, image in enumerate(distinct)}
        ] * len(part)
        placed += [*distinct, *[None] * (own_places - len(distinct))]
    return placed, offsets


def row_arrays(
    pieces: Iterable[Piece], length: int, offsets: dict[int, int], layout: VisionLayout
) -> dict[str, np.ndarray]:
    """One row padded to `length`: tokens, turns, positions `[3, length]`, vision_index.

    `offsets[id(image)]` is the row of the merged features where an image begins.
    """
    pieces = list(pieces)
    ids = np.concatenate([piece.ids for piece in pieces]).astype(np.int32)
    images = [image for piece in pieces for image in piece.images]
    n = len(ids)
    tokens = np.full(length, layout.pad_id, np.int32)
    tokens[:n] = ids
    turns = np.zeros(length, np.int32)
    turns[:n] = np.concatenate([np.full(len(piece.ids), piece.turn) for piece in pieces])
    positions = np.zeros((3, length), np.int32)
    positions[:, :n] = rope_positions(ids, [image.grid for image in images], layout.image_id)
    vision_index = np.full(length, -1, np.int32)
    where = np.flatnonzero(ids == layout.image_id)
    slots = [offsets[id(image)] + image.slots for image in images]
    if slots:
        vision_index[where] = np.concatenate(slots)
    return {
        "tokens": tokens,
        "turns": turns,
        "positions": positions,
        "vision_index": vision_index,
        "length": n,
    }


def micro_batch(
    rows: Sequence[TokenRow],
    weights: Sequence[float],
    shape: BatchShape,
    length: int,
    windows: int,
    layout: VisionLayout,
    image_arrays: ImageArrays = pad_images,
) -> dict[str, np.ndarray]:
    """One micro-batch of exactly `shape.rows` rows (fewer are padded with empty rows that weigh
    nothing).
    """
    images, offsets = place_images(
        [row.images for row in rows], shape.rows, shape.images, windows, layout
    )
    batch = {
        "tokens": np.full((shape.rows, length), layout.pad_id, np.int32),
        "segment_ids": np.zeros((shape.rows, length), np.int32),
        "turns": np.zeros((shape.rows, length), np.int32),
        "vision_index": np.full((shape.rows, length), -1, np.int32),
        "positions": np.zeros((shape.rows, 3, length), np.int32),
        "weights": np.zeros((shape.rows, length), np.float32),
        "advantages": np.zeros(shape.rows, np.float32),
    }
    for b, (row, weight) in enumerate(zip(rows, weights, strict=True)):
        arrays = row_arrays(row.pieces, length, offsets[b], layout)
        for name in ("tokens", "turns", "vision_index", "positions"):
            batch[name][b] = arrays[name]
        batch["segment_ids"][b, : arrays["length"]] = 1
        batch["weights"][b] = np.isin(arrays["turns"], row.loss_turns) * np.float32(weight)
        batch["advantages"][b] = row.advantage
    return batch | image_arrays(images, shape.images, windows, layout)


class Collate:
    """Rows of a whole update -> arrays with a leading micro-batch axis M; the `batch_fn` of the
    grain pipelines.

    `totals` maps (loss tokens, rows with loss) of this host to those of all hosts; `largest` does
    so for (length, windows), so that every host builds the same shapes. Both are the identity on
    one host. `image_arrays` makes the arrays of a micro-batch's images.
    """

    def __init__(
        self,
        shape: BatchShape,
        layout: VisionLayout,
        *,
        aggregation: str = "token_mean",
        max_tokens: int = 1,
        totals=np.asarray,
        largest=np.asarray,
        image_arrays: ImageArrays = pad_images,
    ):
        self.shape, self.layout, self.image_arrays = shape, layout, image_arrays
        self.aggregation, self.max_tokens = aggregation, max_tokens
        self.totals, self.largest = totals, largest

    def __call__(self, rows: Sequence[TokenRow]) -> dict[str, np.ndarray]:
        rows = list(rows)
        counts = [row.loss_tokens() for row in rows]
        total_tokens, total_rows = self.totals(
            np.array([sum(counts), sum(count > 0 for count in counts)], np.float64)
        )
        length, windows = self.largest(
            np.array(
                [
                    max(row.length for row in rows),
                    max((i.patches.shape[0] for row in rows for i in row.images), default=0),
                ]
            )
        )
        length = bucket(int(length), self.shape.lengths, "a row length (data.lengths)")
        windows = bucket(int(windows), self.shape.windows, "an image's windows (data.windows)")
        weights = loss_weights(
            rows, self.aggregation, self.max_tokens, float(total_tokens), float(total_rows)
        )
        size = self.shape.rows
        return stack(
            [
                micro_batch(
                    rows[i : i + size],
                    weights[i : i + size],
                    self.shape,
                    length,
                    windows,
                    self.layout,
                    self.image_arrays,
                )
                for i in range(0, len(rows), size)
            ]
        )


def stack(batches: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stacks equal dictionaries of arrays along a new first axis."""
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def pad_prompts(
    pieces: Sequence[Piece],
    starts: Sequence[Sequence[Piece]],
    length: int,
    windows: int,
    images: int,
    layout: VisionLayout,
    image_arrays: ImageArrays = pad_images,
) -> dict[str, np.ndarray]:
    """What the sampler prefills: one shown piece per row, right-padded to `length`.

    `starts[b]` are the pieces that row b already holds (M-RoPE positions go on after them; they
    have the prefix property). Returns tokens, vision_index `[B, L]`, positions `[B, 3, L]`,
    `lengths` `[B]` and what `image_arrays` gives for the images.
    """
    placed, offsets = place_images(
        [piece.images for piece in pieces], len(pieces), images, windows, layout
    )
    batch = {"tokens": [], "vision_index": [], "positions": [], "lengths": []}
    for piece, before, own in zip(pieces, starts, offsets, strict=True):
        held = sum(len(p.ids) for p in before)
        offsets_before = {id(image): 0 for p in before for image in p.images}
        arrays = row_arrays([*before, piece], held + length, offsets_before | own, layout)
        batch["tokens"].append(arrays["tokens"][held:])
        batch["vision_index"].append(arrays["vision_index"][held:])
        batch["positions"].append(arrays["positions"][:, held:])
        batch["lengths"].append(len(piece.ids))
    packed = {
        name: np.stack([np.asarray(x, np.int32) for x in values]) for name, values in batch.items()
    }
    return packed | image_arrays(placed, images, windows, layout)

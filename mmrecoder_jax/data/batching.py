"""Token rows -> micro-batches, the same for supervised dialogues and for sampled trajectories.

A row is a list of pieces: what the model was shown (turn 0) and what it wrote (turn 1, 2, ...).
Token ids are the only truth: a sampled response arrives here as the ids that were sampled and
leaves as the same ids.

    piece      prompt        response 1   feedback    response 2
    turn       0 0 0 0 0 0   1 1 1 1      0 0 0 0 0   2 2 2
    stage 1    . . . . . .   . . . .      . . . . .   x x x        loss on turn 2 only
    stage 2    . . . . . .   x x x x      . . . . .   x x x        loss on both turns, never on
                                                                   prompt or feedback

Every distinct token stands once. Rows that begin with the same pieces (a group's prompt; in stage 1
its first turn and feedback too) have those tokens in common, and nothing is padded but the end of a
device's part. Only attention sees rows: it gathers its queries, keys and values by `rows`, and
gives what it found back by `home`. So whatever computes attention knows nothing of this.

    two rows    a b c d     a b e
    tokens      a b c d e .                    T = 6
    parent      - 0 1 2 1 -                    what a token is predicted from
    rows        0 1 2 3     0 1 4 .            L = 4
    home        0 1 2 3 6 -                    the first place of a token in `rows`

A micro-batch (a batch has one more leading axis M):

    tokens             int32 [P, T]       of P parts, one per device of the batch axes
    parent             int32 [P, T]       a slot of the same part, or -1
    home               int32 [P, T]       row * L + place, rows counted in the part; -1: padding
    rows               int32 [B, L]       slots in the row's part; -1: padding
    vision_index       int32 [P, T]       -1 is text, else a row of the merged features of the
                                          images in the same part
    positions          int32 [P, 3, T]    M-RoPE: time, row, column
    weights            float32 [P, T]     loss mask divided by the global denominator
    advantages         float32 [P, T]     of the row whose loss a token carries
    sequence           int32 [P, T]       that row, counted in the part
    patches            [I, W, N, C]       with `patch_positions` [I, W, N, 2] and `patch_valid`
                                          [I, W, N]; or, where the vision tower is frozen, its
                                          features [I, W * (N // 4), D]
    numbers            int32 [B]          of each row among those of the batch, where
                                          `BatchShape.numbered`; -1: padding

Rows and images are cut over the devices of the batch axes, into `VisionLayout.ways` parts each, so
that all parts have about as many tokens (`data.dealing`). A row finds its images in its own part,
where each distinct image stands once, however many rows show it. Shapes are bucketed: T, L, W and I
come from short lists, because every new shape is a compilation.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Self

import numpy as np
from jaxtyping import Bool, Float, Int

from mmrecoder_jax.data.dealing import Room, Unit, deal, fewest_micro_batches
from mmrecoder_jax.models.config import ModelConfig
from mmrecoder_jax.models.processor import ImagePatches, Segment, rope_positions

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class VisionLayout:
    """What batching must know of the model and of the mesh.

    Attributes:
      image_id, pad_id: token ids of the image placeholder and of padding.
      window_patches, patch_dim: N and C.
      merge_patches: patches that become one visual token.
      patch_dtype: patches travel in the type that the model computes in: half the bytes in
        bfloat16, and the same numbers.
      ways: parts into which this host's rows are cut, one per device of the batch axes.
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
        """Merged features of an image of so many windows."""
        return windows * self.window_patches // self.merge_patches


@dataclasses.dataclass(frozen=True)
class Piece:
    """Token ids of one side of the conversation.

    Attributes:
      turn: 0 for prompt and feedback, t for the response of turn t.
      images: that the ids have placeholders for, in order.
      logps: log-probabilities under the policy that sampled them; None where they were not sampled.
    """

    ids: Int[np.ndarray, " L"]
    turn: int
    images: tuple[ImagePatches, ...] = ()
    logps: Float[np.ndarray, " L"] | None = None

    @classmethod
    def shown(cls, segment: Segment) -> Self:
        """A prompt or feedback segment of the processor."""
        return cls(segment.ids, 0, segment.images)


@dataclasses.dataclass(frozen=True)
class TokenRow:
    """One row of a learner batch before padding.

    Attributes:
      loss_turns: the turns that are trained on.
      advantage: of the trajectory.
      turn_advantages: of each turn, in place of it; (): one for all.
    """

    pieces: tuple[Piece, ...]
    loss_turns: tuple[int, ...]
    advantage: float = 0.0
    turn_advantages: tuple[float, ...] = ()

    @property
    def length(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def images(self) -> tuple[ImagePatches, ...]:
        return tuple(image for piece in self.pieces for image in piece.images)

    def loss_tokens(self) -> int:
        """How many tokens carry loss."""
        return sum(len(piece.ids) for piece in self.pieces if piece.turn in self.loss_turns)


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The static shape of a micro-batch.

    Attributes:
      rows: B.
      lengths, windows: buckets for L and W.
      images: I, over all parts together.
      sampled: whether rows carry the log-probabilities that their sampler had.
      numbered: whether rows say which ones they are (`slots_of_rows`).
      tokens: distinct ones that a part can have; 0: as many as its rows have places.
      budget: distinct tokens of a part, for which micro-batches are as many as it takes (T is
        always this); 0: they are as few as `rows` allows, and T follows from what they hold.
    """

    rows: int
    lengths: tuple[int, ...]
    windows: tuple[int, ...]
    images: int
    sampled: bool = False
    tokens: int = 0
    budget: int = 0
    numbered: bool = False


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of a micro-batch's arrays, each from its buckets.

    Attributes:
      tokens: T.
      length: L.
      windows: W.
    """

    tokens: int
    length: int
    windows: int


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

        rows of 1 and 3 loss tokens, max_tokens = 8      row 1    row 2
        token_mean      1 / total tokens                 1/4      1/4
        sequence_mean   1 / (row's tokens * rows)        1/2      1/6
        constant        1 / (max_tokens * rows)          1/16     1/16

    Args:
      total_tokens, total_rows: of the whole batch over all micro-batches and hosts; a row without
        loss tokens counts in neither.

    Raises:
      ValueError: an aggregation that does not exist.
    """
    # At least 1: a batch whose every turn is masked weighs nothing, and its loss is 0, not NaN.
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
) -> Arrays:
    """Stacks images of at most `windows` windows into `[count, windows, N, ...]`.

    None, and what is missing up to `count`, is padding with `patch_valid` False.
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


# (images, places, windows per image, layout) -> the arrays of a batch that stand for the images:
# `pad_images`, or features in their stead (`rl.vision_features`).
ImageArrays = Callable[[Sequence[ImagePatches | None], int, int, VisionLayout], Arrays]


def place_images(
    rows: Sequence[Sequence[ImagePatches]],
    count: int,
    places: int,
    windows: int,
    layout: VisionLayout,
) -> tuple[list[ImagePatches | None], list[dict[int, int]]]:
    """Gives the images of `rows` their places in the batch.

    Rows and places are cut into `layout.ways` equal parts, and an image stands once in each part
    that shows it. With 2 ways, 4 places and 4 rows that show a, a, b, a:

        places     a .          | b a                        part of device 0 | of device 1
        offsets    {a:0} {a:0}  | {b:0, a:m} {b:0, a:m}      m merged features per image

    Args:
      rows: images per row.
      count: rows in the batch; where `rows` are fewer, the last ones are padding.

    Returns:
      (image or None per place; per row, `id(image)` -> its first merged feature in the part).

    Raises:
      ValueError: parts that cannot be equal, or more distinct images than places in one.
    """
    if count % layout.ways or places % layout.ways:
        raise ValueError(
            f"{count} rows and {places} images of a host cannot be cut over its {layout.ways} "
            "devices of data*fsdp: choose batch sizes that the mesh divides"
        )
    own_rows, own_places = count // layout.ways, places // layout.ways
    placed: list[ImagePatches | None] = []
    offsets: list[dict[int, int]] = []
    for way in range(layout.ways):
        part = rows[way * own_rows : (way + 1) * own_rows]
        # By identity: the processor gives the same picture as the same object, and comparing pixels
        # would cost more than the copy that it saves.
        distinct = list({id(image): image for images in part for image in images}.values())
        if len(distinct) > own_places:
            raise ValueError(
                f"{len(distinct)} distinct images exceed the {own_places} places of a device's "
                "part of a micro-batch"
            )
        merged = layout.merged(windows)
        offsets += [{id(image): i * merged for i, image in enumerate(distinct)}] * len(part)
        placed += [*distinct, *[None] * (own_places - len(distinct))]
    return placed, offsets


def row_arrays(
    pieces: Iterable[Piece], length: int, offsets: dict[int, int], layout: VisionLayout
) -> Arrays:
    """One row padded to `length`: tokens, vision_index `[L]` and positions `[3, L]`.

    Args:
      offsets: `id(image)` -> the row of the merged features where the image begins.
    """
    pieces = list(pieces)
    ids = np.concatenate([piece.ids for piece in pieces]).astype(np.int32)
    images = [image for piece in pieces for image in piece.images]
    n = len(ids)
    tokens = np.full(length, layout.pad_id, np.int32)
    tokens[:n] = ids
    positions = np.zeros((3, length), np.int32)
    positions[:, :n] = rope_positions(ids, [image.grid for image in images], layout.image_id)
    vision_index = np.full(length, -1, np.int32)
    where = np.flatnonzero(ids == layout.image_id)
    slots = [offsets[id(image)] + image.slots for image in images]
    if slots:
        vision_index[where] = np.concatenate(slots)
    return {"tokens": tokens, "positions": positions, "vision_index": vision_index}


def sampler_logps(pieces: Iterable[Piece]) -> Float[np.ndarray, " L"]:
    """The log-probabilities that a row's tokens were sampled with; 0 for those that were not."""
    return np.concatenate(
        [np.zeros(len(p.ids), np.float32) if p.logps is None else p.logps for p in pieces]
    )


_NOWHERE = -2  # a node that no piece follows


class DistinctTokens:
    """Slots for the tokens of rows, in which what rows have in common stands once.

    Rows share the pieces that they begin with, where those are the same objects (as the rollout's
    are) and carry no loss in either.

    Attributes:
      count: slots given so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._nodes: dict[tuple[int, int], tuple[int, int]] = {}  # -> (its number, first slot)
        self._numbers = itertools.count()

    def add(self, row: TokenRow) -> tuple[Int[np.ndarray, " L"], Bool[np.ndarray, " L"]]:
        """(slot of each token of a row, whether the token is new)."""
        node, slots, new = -1, [], []
        for piece in row.pieces:
            shown = piece.turn not in row.loss_turns
            known = self._nodes.get((node, id(piece))) if shown else None
            if known is None:
                first, found = self.count, (next(self._numbers), self.count)
                self.count += len(piece.ids)
                if shown:
                    self._nodes[node, id(piece)] = found
                node = found[0]
            else:
                node, first = known
            slots.append(np.arange(first, first + len(piece.ids), dtype=np.int32))
            new.append(np.full(len(piece.ids), known is None))
        return np.concatenate(slots), np.concatenate(new)

    def cost(self, row: TokenRow) -> int:
        """How many slots `add` would give to a row."""
        node, cost = -1, 0
        for piece in row.pieces:
            known = self._nodes.get((node, id(piece))) if piece.turn not in row.loss_turns else None
            node = _NOWHERE if known is None else known[0]
            cost += len(piece.ids) * (known is None)
        return cost


def distinct_tokens(rows: Iterable[TokenRow]) -> int:
    """How many tokens some rows have, those in common counted once."""
    found = DistinctTokens()
    for row in rows:
        found.add(row)
    return found.count


def micro_batch(
    parts: Sequence[Sequence[tuple[int, TokenRow, float]]],
    shape: BatchShape,
    size: Size,
    layout: VisionLayout,
    image_arrays: ImageArrays = pad_images,
) -> Arrays:
    """One micro-batch.

    Args:
      parts: of each device of the batch axes, at most `shape.rows / layout.ways` rows with their
        numbers, and what a loss token of each weighs (`loss_weights`).
    """
    own = shape.rows // layout.ways
    shown = [row.images for part in parts for row in filled([row for _, row, _ in part], own)]
    images, offsets = place_images(shown, shape.rows, shape.images, size.windows, layout)
    one = (layout.ways, size.tokens)
    batch = {
        "tokens": np.full(one, layout.pad_id, np.int32),
        "parent": np.full(one, -1, np.int32),
        "home": np.full(one, -1, np.int32),
        "vision_index": np.full(one, -1, np.int32),
        "positions": np.zeros((layout.ways, 3, size.tokens), np.int32),
        "weights": np.zeros(one, np.float32),
        "advantages": np.zeros(one, np.float32),
        "sequence": np.zeros(one, np.int32),
        "rows": np.full((shape.rows, size.length), -1, np.int32),
    }
    if shape.sampled:
        batch["sampler_logps"] = np.zeros(one, np.float32)
    if shape.numbered:
        batch["numbers"] = np.full(shape.rows, -1, np.int32)
    for p, part in enumerate(parts):
        slots_of = DistinctTokens()
        for r, (number, row, weight) in enumerate(part):
            slots, new = slots_of.add(row)
            batch["rows"][p * own + r, : row.length] = slots
            here = p, slots[new]
            arrays = row_arrays(row.pieces, row.length, offsets[p * own + r], layout)
            arrays["parent"] = np.concatenate([[-1], slots[:-1]])
            arrays["home"] = r * size.length + np.arange(row.length)
            if shape.sampled:
                arrays["sampler_logps"] = sampler_logps(row.pieces)
            for name, values in arrays.items():
                batch[name][p, ..., slots[new]] = values[..., new].T
            batch["weights"][here] = loss_mask(row)[new] * np.float32(weight)
            batch["advantages"][here] = advantages(row)[new]
            batch["sequence"][here] = r
            if shape.numbered:
                batch["numbers"][p * own + r] = number
    return batch | image_arrays(images, shape.images, size.windows, layout)


def slots_of_rows(batch: Arrays) -> Iterator[tuple[int, tuple[int, int], Int[np.ndarray, " L"]]]:
    """(its number, its micro-batch and part, the slots of its tokens) for every row of a batch.

    Args:
      batch: arrays `[M, ...]` of this host, `numbered`.
    """
    own = batch["rows"].shape[1] // batch["tokens"].shape[1]
    for m, r in np.argwhere(batch["numbers"] >= 0).tolist():
        slots = batch["rows"][m, r]
        yield int(batch["numbers"][m, r]), (m, r // own), slots[slots >= 0]


def turns_of(row: TokenRow) -> Int[np.ndarray, " L"]:
    """The turn of each token of a row; 0 where it was shown."""
    return np.concatenate([np.full(len(piece.ids), piece.turn) for piece in row.pieces])


def with_advantages(
    batch: Arrays, rows: Sequence[TokenRow], turns: Float[np.ndarray, "rows T"]
) -> Arrays:
    """A batch whose loss tokens have other advantages.

    Args:
      batch: arrays `[M, ...]` of this host, `numbered`.
      rows: that it was made of, without those that rest.
      turns: the advantages of their turns.
    """
    found = np.zeros_like(batch["advantages"])
    for number, part, slots in slots_of_rows(batch):
        if number < len(rows):
            learnt = loss_mask(rows[number])
            found[*part, slots[learnt]] = turns[number, turns_of(rows[number])[learnt] - 1]
    return batch | {"advantages": found}


def filled(rows: Sequence[TokenRow], count: int) -> list[TokenRow]:
    """The rows, and behind them as many without tokens as are missing."""
    return [*rows, *[TokenRow((), ())] * (count - len(rows))]


def loss_mask(row: TokenRow) -> Bool[np.ndarray, " L"]:
    """Whether each token of a row carries loss."""
    return np.concatenate(
        [np.full(len(piece.ids), piece.turn in row.loss_turns) for piece in row.pieces]
    )


def advantages(row: TokenRow) -> Float[np.ndarray, " L"]:
    """The advantage of each token of a row: its turn's, or the trajectory's."""

    def of(turn: int) -> float:
        return row.turn_advantages[turn - 1] if turn and row.turn_advantages else row.advantage

    return np.concatenate(
        [np.full(len(piece.ids), of(piece.turn), np.float32) for piece in row.pieces]
    )


def units_of(rows: Sequence[TokenRow], most: int) -> list[Unit]:
    """Rows that stay together: adjacent ones that begin with the same piece, in equal units of at
    most so many rows, of which whole ones fill `most`.
    """
    units = []
    for _, run in itertools.groupby(range(len(rows)), lambda i: id(rows[i].pieces[0])):
        numbers = tuple(run)
        each = math.gcd(len(numbers), most)
        for first in range(0, len(numbers), each):
            part = numbers[first : first + each]
            some = [rows[i] for i in part]
            images = {id(image) for row in some for image in row.images}
            units.append(Unit(part, distinct_tokens(some), len(images)))
    return units


def whole_groups(rows: Sequence[TokenRow], ways: int, room: Room) -> tuple[list[Unit], int]:
    """(units, how many micro-batches of `ways` parts they make): whole groups, or pieces of them
    where a part has fewer places for images; 0 where it has none for the images of a row.
    """
    most = room.rows
    while most:
        units = units_of(rows, most)
        if max(unit.images for unit in units) <= room.images:
            return units, fewest_micro_batches(units, ways, room)
        most //= 2
    return [], 0


def filled_parts(rows: Sequence[TokenRow], room: Room, budget: int) -> list[list[int]]:
    """Numbers of rows, part after part, each filled up to its budget of tokens: a group that begins
    in one may end in the next, where what it has in common is computed again.

    Args:
      rows: none has more tokens, or images, than a part.
    """
    parts: list[list[int]] = []
    held, images = DistinctTokens(), set[int]()
    for i, row in enumerate(rows):
        more = images | {id(image) for image in row.images}
        fits = held.count + held.cost(row) <= budget and len(more) <= room.images
        if not parts or not fits or len(parts[-1]) == room.rows:
            parts.append([])
            held, more = DistinctTokens(), {id(image) for image in row.images}
        held.add(row)
        images = more
        parts[-1].append(i)
    return parts


def token_bucket(count: int, most: int) -> int:
    """T for so many distinct tokens: up to a sixteenth more, where they are not few.

    >>> [token_bucket(count, 10_000) for count in (1, 600, 2300, 9100, 9900)]
    [2048, 2048, 2560, 9216, 10000]
    """
    # few tokens cost little, and a program as much as for many
    few = 2048 if count <= 2048 else 512
    step = few if count < 4096 else 2 ** (count.bit_length() - 5)
    return max(count, min(-(-max(count, 1) // step) * step, most))


class Collate:
    """Rows of a whole update -> arrays with a leading micro-batch axis M.

    The `batch_fn` of the grain pipelines.

    Args:
      aggregation, max_tokens: see `loss_weights`.
      totals: (loss tokens, rows with loss) of this host -> those of all hosts; the identity on one
        host.
      largest: sizes of this host -> the largest of all hosts, so that every host builds the same
        shapes; the identity on one host.
      image_arrays: makes the arrays of a micro-batch's images.
    """

    def __init__(
        self,
        shape: BatchShape,
        layout: VisionLayout,
        *,
        aggregation: str = "token_mean",
        max_tokens: int = 1,
        totals: Callable[[np.ndarray], np.ndarray] = np.asarray,
        largest: Callable[[np.ndarray], np.ndarray] = np.asarray,
        image_arrays: ImageArrays = pad_images,
    ):
        self.shape, self.layout, self.image_arrays = shape, layout, image_arrays
        self.aggregation, self.max_tokens = aggregation, max_tokens
        self.totals, self.largest = totals, largest

    def __call__(self, rows: Sequence[TokenRow]) -> Arrays:
        rows = list(rows)
        counts = [row.loss_tokens() for row in rows]
        own = [sum(counts), sum(count > 0 for count in counts)]
        # float64, so that counts of all hosts add up exactly.
        total_tokens, total_rows = self.totals(np.array(own, np.float64))
        weights = loss_weights(
            rows, self.aggregation, self.max_tokens, float(total_tokens), float(total_rows)
        )
        dealt, size = self._dealt(rows)
        return stack(
            [
                micro_batch(
                    [[(i, rows[i], weights[i]) for i in part] for part in parts],
                    self.shape,
                    size,
                    self.layout,
                    self.image_arrays,
                )
                for parts in dealt
            ]
        )

    def _dealt(self, rows: Sequence[TokenRow]) -> tuple[list[list[list[int]]], Size]:
        """(numbers of the rows by micro-batch and part, sizes of the arrays); hosts agree on how
        many micro-batches there are, and on sizes.
        """
        shape, ways = self.shape, self.layout.ways
        room = Room(shape.rows // ways, shape.images // ways)
        longest = max(row.length for row in rows)
        shown = max(len({id(image) for image in row.images}) for row in rows)
        widest = max((i.patches.shape[0] for row in rows for i in row.images), default=0)
        units: list[Unit] = []
        parts: list[list[int]] = []
        count = 0  # where a row has no room, which is said below
        if shown <= room.images and not shape.budget:
            units, count = whole_groups(rows, ways, room)
        elif shown <= room.images and longest <= shape.budget:
            parts = filled_parts(rows, room, shape.budget)
            count = -(-len(parts) // ways)
        own = np.array([longest, widest, shown, count])
        longest, widest, shown, count = (int(x) for x in self.largest(own))
        if shape.budget and longest > shape.budget:
            raise ValueError(
                f"a row of {longest} tokens exceeds train.micro_tokens={shape.budget}: raise it, "
                "or leave longer rows out with data.lengths"
            )
        if shown > room.images:
            raise ValueError(
                f"{shown} distinct images of a row exceed the {room.images} places of a device's "
                "part of a micro-batch"
            )
        if shape.budget:
            parts += [[] for _ in range(count * ways - len(parts))]
        else:
            dealt = deal(units, count * ways, room)
            assert dealt is not None  # they fit into no more parts than these
            parts = [sorted(i for unit in part for i in unit.numbers) for part in dealt]
        fullest = max(distinct_tokens(rows[i] for i in part) for part in parts)
        size = self._size(longest, widest, int(self.largest(np.array([fullest]))[0]))
        return [parts[m * ways : (m + 1) * ways] for m in range(count)], size

    def outline(self, length: int, windows: int) -> Arrays:
        """A micro-batch without rows, as large as one with rows and images of these sizes, and as
        many tokens as a part can have.
        """
        size = self._size(length, windows, self.shape.budget or self.most_tokens)
        return micro_batch([], self.shape, size, self.layout, self.image_arrays)

    @property
    def most_tokens(self) -> int:
        """Distinct tokens that a part can have."""
        places = self.shape.rows // self.layout.ways * max(self.shape.lengths)
        return min(self.shape.tokens or places, places)

    def _size(self, longest: int, widest: int, fullest: int) -> Size:
        return Size(
            max(fullest, self.shape.budget or token_bucket(fullest, self.most_tokens)),
            bucket(longest, self.shape.lengths, "a row length (data.lengths)"),
            bucket(widest, self.shape.windows, "an image's windows (data.windows)"),
        )


def stack(batches: Sequence[Mapping[str, np.ndarray]]) -> Arrays:
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
) -> Arrays:
    """What the sampler prefills: one shown piece per row, right-padded to `length`.

    M-RoPE positions continue after the pieces that a row already holds; a beginning's positions do
    not change when more follows, so what the cache holds stays right.

        holds    prompt t [ image of 2 x 2 cells ] t, response r r r
        time     0 1 1 1 1 3 4 5 6                                 the image takes positions 1 and 2
        piece    f f f -> 7 8 9

    Args:
      starts: per row, the pieces that it already holds.

    Returns:
      tokens, vision_index `[B, L]`, positions `[B, 3, L]`, lengths `[B]`, and what `image_arrays`
      gives for the images.
    """
    placed, offsets = place_images(
        [piece.images for piece in pieces], len(pieces), images, windows, layout
    )
    rows = []
    for piece, before, own in zip(pieces, starts, offsets, strict=True):
        held = sum(len(p.ids) for p in before)
        # Images shown before are in the cache: nobody reads where their features would be.
        offsets_before = {id(image): 0 for p in before for image in p.images}
        arrays = row_arrays([*before, piece], held + length, offsets_before | own, layout)
        row = {name: values[..., held:] for name, values in arrays.items()}
        rows.append(row | {"lengths": np.array(len(piece.ids), np.int32)})
    return stack(rows) | image_arrays(placed, images, windows, layout)

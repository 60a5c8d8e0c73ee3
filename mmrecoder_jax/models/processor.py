"""Chart images and chat text -> windowed patches, token ids and M-RoPE positions.

The numbers equal those of the published processor (`Qwen2VLImageProcessor`, the Qwen2.5-VL chat
template, `get_rope_index`); the layout is ours. A still image fills both temporal slices of a patch
with the same pixels, so one slice is kept (C = 588 instead of 1176). Patches come in window order
with every window padded to N patches, so that window attention is a plain batched matmul on the
device:

    merged grid 3 x 3,           W = 4 windows              which cells of the
    windows of 2 x 2 cells                                  second window are valid
        a b | c                  [a b d e] [c . f .]        [1 0 1 0]
        d e | f                  [g h . .] [i . . .]
        ----+--
        g h | i

NumPy and Pillow only: the data pipeline runs this in processes without JAX.
"""

import dataclasses
import hashlib
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from mmrecoder_jax.images import decode, size_of, to_rgb
from mmrecoder_jax.models.config import MEAN, STD, VisionConfig

MAX_ASPECT = 200  # the published processor refuses thinner images

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
_SPECIAL = re.compile(r"<\|(?=[a-z_]+\|>)")


@runtime_checkable
class Tokenizer(Protocol):
    """What the processor needs of a tokenizer."""

    image_pad_id: int

    def encode(self, text: str) -> list[int]:
        """Token ids; the string of a special token becomes that token's id."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImagePatches:
    """One image as the vision tower reads it.

    Attributes:
      patches: normalised pixels of each patch in (channel, row, column) order; zero where invalid.
      position: (row, column) of the patch on the patch grid; zero where invalid.
      valid: False for the padding of windows that the image does not fill.
      grid: (h, w) of the merged grid, on which one cell becomes one visual token.
      slots: for each cell (raster order), the row of the tower's output `[W * (N // 4), D]`.
    """

    patches: Float[np.ndarray, "W N C"]
    position: Int[np.ndarray, "W N 2"]
    valid: Bool[np.ndarray, "W N"]
    grid: tuple[int, int]
    slots: Int[np.ndarray, " cells"]


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """A piece of a conversation: token ids, and the images in it in order."""

    ids: Int[np.ndarray, " L"]
    images: tuple[ImagePatches, ...] = ()

    @property
    def grids(self) -> list[tuple[int, int]]:
        """The merged grid of each image."""
        return [image.grid for image in self.images]


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size (height, width) to which an image is resized.

    Both are multiples of `factor`, the area is between the bounds, and the aspect is kept. This is
    the published rule, except where that raises or exceeds `max_pixels`: images thinner than 1:200
    count as 1:200, a thin image whose short side cannot shrink below one cell loses length, and a
    small image does not overshoot when it grows.

    >>> smart_resize(100, 150, 28, 56 * 56, 1280 * 28 * 28)
    (112, 140)
    """
    most = max_pixels // factor**2
    height, width = (
        max(height, math.ceil(width / MAX_ASPECT)),
        max(width, math.ceil(height / MAX_ASPECT)),
    )
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor)
        columns = math.ceil(width * grow / factor)
    if rows * columns > most:
        rows, columns = (rows, most // rows) if rows < columns else (most // columns, columns)
    return rows * factor, columns * factor


def window_patches(
    pixels: UInt8[np.ndarray, "height width 3"], vision: VisionConfig
) -> ImagePatches:
    """Pixels, whose sides are multiples of a merged cell -> patches in padded windows."""
    patch, merge = vision.patch_size, vision.spatial_merge_size
    side = vision.window_size // (patch * merge)  # cells along a window
    h, w = pixels.shape[0] // (patch * merge), pixels.shape[1] // (patch * merge)
    nh, nw = -(-h // side), -(-w // side)

    def windows(x: np.ndarray) -> np.ndarray:
        """`[h * merge, w * merge, ...]` per patch -> `[W, N, ...]`, padded with zeros."""
        rest = x.shape[2:]
        padded = np.zeros((nh * side * merge, nw * side * merge, *rest), x.dtype)
        padded[: x.shape[0], : x.shape[1]] = x
        cells = padded.reshape(nh, side, merge, nw, side, merge, *rest)
        # window row, window column, cell row, cell column, patch row, patch column
        order = 0, 3, 1, 4, 2, 5
        cells = cells.transpose(*order, *range(6, cells.ndim))
        return cells.reshape(nh * nw, (side * merge) ** 2, *rest)

    # 256 levels are normalised once, in the float32 steps of the reference, to equal it exactly
    levels = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    tables = [
        (levels - np.float32(mean)) / np.float32(std) for mean, std in zip(MEAN, STD, strict=True)
    ]
    planes = np.stack([table[pixels[..., channel]] for channel, table in enumerate(tables)])
    patches = planes.reshape(len(planes), h * merge, patch, w * merge, patch).transpose(
        1, 3, 0, 2, 4
    )
    row, column = np.indices((h * merge, w * merge), dtype=np.int32)
    cell_row, cell_column = np.indices((h, w), dtype=np.int32).reshape(2, -1)
    window = (cell_row // side) * nw + cell_column // side
    return ImagePatches(
        patches=windows(patches.reshape(h * merge, w * merge, -1)),
        position=windows(np.stack([row, column], -1)),
        valid=windows(np.ones((h * merge, w * merge), bool)),
        grid=(h, w),
        slots=(window * side**2 + (cell_row % side) * side + cell_column % side).astype(np.int32),
    )


def pixels_of(image: ImagePatches, vision: VisionConfig) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels that `window_patches` made patches of, exactly."""
    side, merge, channels = vision.patch_size, vision.spatial_merge_size, len(MEAN)
    rows, columns = (cells * merge for cells in image.grid)
    patches = image.patches[image.valid].reshape(-1, channels, side, side).transpose(0, 2, 3, 1)
    levels = np.rint((patches * np.array(STD) + np.array(MEAN)) * 255)
    pixels = np.zeros((rows, side, columns, side, channels), np.uint8)
    row, column = image.position[image.valid].T
    pixels[row, :, column] = levels
    return pixels.reshape(rows * side, columns * side, channels)


def rope_positions(
    ids: Int[np.ndarray, " L"] | Sequence[int],
    grids: Sequence[tuple[int, int]],
    image_token_id: int,
    start: int = 0,
) -> Int[np.ndarray, "3 L"]:
    """M-RoPE positions (time, row, column): `get_rope_index` of the reference, for still images.

    Text advances all three axes together. The cells of an image share one time; their rows and
    columns count from it; the text after it continues behind the longer side. With a 2 x 3 image
    (`#`):

        ids     a  b  #  #  #  #  #  #  c  d
        time    0  1  2  2  2  2  2  2  5  6
        row     0  1  2  2  2  3  3  3  5  6
        column  0  1  2  3  4  2  3  4  5  6

    The positions of a prefix are a prefix of the positions, so a conversation is continued with
    `start` = last position + 1.

    Args:
      grids: (h, w) of the merged grid of each image, in order.
      image_token_id: the id of `<|image_pad|>`.
      start: position of the first token.

    Raises:
      ValueError: the placeholders in `ids` are not those of `grids`.
    """
    ids = np.asarray(ids)
    places = np.flatnonzero(ids == image_token_id)
    if len(places) != sum(h * w for h, w in grids):
        raise ValueError(
            f"{len(places)} image placeholders in the tokens, but images {list(grids)} fill "
            f"{sum(h * w for h, w in grids)}"
        )
    step = np.ones(len(ids), np.int64)  # how far each token moves the position of the next
    step[places] = 0
    offset = np.zeros((3, len(ids)), np.int64)
    taken = 0
    for h, w in grids:
        cells = places[taken : taken + h * w]
        taken += h * w
        if cells[-1] - cells[0] + 1 != h * w:
            raise ValueError(
                f"the {h * w} placeholders of a {h} x {w} image are interrupted at token {cells[0]}"
            )
        offset[1, cells], offset[2, cells] = np.divmod(np.arange(h * w), w)
        step[cells[-1]] = max(h, w)
    base = start + np.concatenate([[0], np.cumsum(step)[:-1]]) if len(ids) else np.zeros(0)
    return (base + offset).astype(np.int32)


class Processor:
    """Turns images into patches and turns of a conversation into token ids.

    Args:
      tokenizer: see `Tokenizer`.
      vision: sizes of the vision tower.
      min_pixels, max_pixels: bounds for the area of an image after resizing. A visual token is
        28 x 28 pixels.
      system: the system message; None leaves the system turn out.
      cache_bytes: how many bytes of patches are kept for images that come again.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vision: VisionConfig,
        min_pixels: int,
        max_pixels: int,
        system: str | None,
        cache_bytes: int = 256 * 2**20,
    ):
        self.factor = vision.patch_size * vision.spatial_merge_size
        if not self.factor**2 <= min_pixels <= max_pixels:
            raise ValueError(
                f"min_pixels={min_pixels}, max_pixels={max_pixels}: "
                f"need {self.factor**2} <= min_pixels <= max_pixels"
            )
        self.tokenizer, self.vision, self.system = tokenizer, vision, system
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self._cache: OrderedDict[bytes, ImagePatches] = OrderedDict()
        self._room = cache_bytes
        self._lock = threading.Lock()

    def image(self, png: bytes | np.ndarray | Image.Image) -> ImagePatches:
        """The patches of an encoded image, of uint8 pixels `[height, width, 3]` or a Pillow image.

        Equal bytes or pixels give the same object while it is cached, so that later stages can tell
        by identity that they have seen an image.

        Raises:
          BadImage: the bytes are no image.
          ValueError: the array is not uint8 `[height, width, 3]`.
        """
        if isinstance(png, Image.Image):
            return self._patches(png)
        if isinstance(png, np.ndarray):
            if png.dtype != np.uint8 or png.ndim != 3 or png.shape[2] != 3 or not png.size:
                raise ValueError(
                    f"pixels must be uint8 [height, width, 3], got {png.dtype} {list(png.shape)}"
                )
            key = hashlib.sha1(f"{png.shape}".encode() + png.tobytes()).digest()
        else:
            key = hashlib.sha1(png).digest()
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        patches = self._patches(
            Image.fromarray(png) if isinstance(png, np.ndarray) else decode(png)
        )
        with self._lock:
            if key not in self._cache:
                self._cache[key] = patches
                self._room -= patches.patches.nbytes
            while self._room < 0:
                self._room += self._cache.popitem(last=False)[1].patches.nbytes
        return patches

    def outline(self, png: bytes) -> ImagePatches:
        """What `image` gives, without its content: zeros of the right shapes that hold no memory.

        The head of the image alone is read. For counting tokens and windows.

        Raises:
          BadImage: the bytes do not begin as an image.
        """
        return self.outline_of_size(*size_of(png))

    def outline_of_size(self, width: int, height: int) -> ImagePatches:
        """The outline of an image of so many pixels."""
        height, width = smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
        h, w = height // self.factor, width // self.factor
        side = self.vision.window_size // self.factor  # cells along a window
        shape = (-(-h // side) * -(-w // side), self.vision.window_patches)

        def zeros(*sizes: int, dtype: type) -> np.ndarray:
            return np.broadcast_to(dtype(0), sizes)

        return ImagePatches(
            patches=zeros(*shape, self.vision.patch_dim, dtype=np.float32),
            position=zeros(*shape, 2, dtype=np.int32),
            valid=zeros(*shape, dtype=np.bool_),
            grid=(h, w),
            slots=zeros(h * w, dtype=np.int32),
        )

    def first_prompt(
        self, instruction: str, image: ImagePatches, more: Sequence[ImagePatches] = ()
    ) -> Segment:
        """The conversation up to the beginning of the first response.

        Args:
          image, more: shown before the instruction, one behind the other.
        """
        system = "" if self.system is None else f"{IM_START}system\n{_plain(self.system)}{IM_END}\n"
        return self._user(system, instruction, (image, *more))

    def feedback_prompt(self, text: str, images: Sequence[ImagePatches], closed: bool) -> Segment:
        """What follows a response: the end of its turn, and the feedback as the user's turn.

        Args:
          images: shown before the text, one behind the other.
          closed: the response ended its turn itself.
        """
        return self._user("\n" if closed else f"{IM_END}\n", text, images)

    def response(self, text: str) -> Int[np.ndarray, " L"]:
        """Token ids of a response, including `<|im_end|>`."""
        return np.asarray(self.tokenizer.encode(_plain(text) + IM_END), np.int32)

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " L"]) -> str:
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special=True)

    def _user(self, before: str, text: str, images: Sequence[ImagePatches]) -> Segment:
        """`before`, then a user turn, then the opening of the assistant's."""
        ids: list[int] = []
        words = f"{before}{IM_START}user\n"
        for image in images:
            ids += self.tokenizer.encode(words + VISION_START)
            ids += [self.tokenizer.image_pad_id] * len(image.slots)
            words = VISION_END
        ids += self.tokenizer.encode(f"{words}{_plain(text)}{IM_END}\n{IM_START}assistant\n")
        return Segment(np.asarray(ids, np.int32), tuple(images))

    def _patches(self, image: Image.Image) -> ImagePatches:
        image = to_rgb(image)
        height, width = smart_resize(
            image.height, image.width, self.factor, self.min_pixels, self.max_pixels
        )
        return window_patches(
            np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)), self.vision
        )


def _plain(text: str) -> str:
    """Makes special tokens plain: `<|im_end|>` -> `< |im_end|>`.

    Text from outside must neither open turns nor place images.
    """
    return _SPECIAL.sub("< |", text)

"""Pictures of anyone as charts to redraw: files, folders, the standard input.

Nobody knows the code of such a chart, so it has no record, and turns about it have no scores.
"""

import dataclasses
import hashlib
import io
import os
import stat
import sys
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.data.sources import Chart, png_bytes
from mmrecoder_jax.images import BadImage, Encoded, decode, to_rgb

STDIN = "-"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # in a folder
MOST_BYTES = 256 << 20  # of a file
# Larger pictures are shrunk: no policy sees more, and differences are taken at the chart's size.
MOST_PIXELS = 4_000_000
# `images.decode` refuses what Pillow only warns of.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclasses.dataclass(frozen=True)
class Found:
    """A picture that was named, or found in a folder.

    Attributes:
      path: "-" is the standard input.
    """

    path: str

    @property
    def name(self) -> str:
        """What its folder of drawings is called: the file's name without its ending."""
        stem = os.path.splitext(os.path.basename(self.path))[0]
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in stem)[:80].strip(".-")
        return "stdin" if self.path == STDIN else name or "chart"


def find(paths: Sequence[str]) -> list[Found]:
    """The pictures that paths name, in their order; of a folder, those in it, by name.

    What is no picture is found as well and refused when it is read, except in a folder.

    Raises:
      ConfigError: a folder without pictures, or nothing named at all.
    """
    found: list[str] = []
    for path in paths:
        if path == STDIN or not os.path.isdir(path):
            found.append(path)
            continue
        inside = sorted(name for name in os.listdir(path) if name.lower().endswith(SUFFIXES))
        if not inside:
            raise ConfigError(
                f"{path}: a folder without pictures ({', '.join(SUFFIXES)}); name another one"
            )
        found += [os.path.join(path, name) for name in inside]
    if found.count(STDIN) > 1:
        raise ConfigError("the standard input (-) is named twice: it can be read once")
    return [Found(path) for path in dict.fromkeys(found)]


def read(found: Found, instruction: str, stdin: io.BufferedIOBase | None = None) -> Chart:
    """The chart in a picture.

    Raises:
      BadImage: it cannot be read; the message names the file.
    """
    if found.path == STDIN:
        name = "the standard input"
        data = (stdin or sys.stdin.buffer).read(MOST_BYTES + 1)
    else:
        name, data = found.path, _bytes(found.path)
    if len(data) > MOST_BYTES:
        raise BadImage(f"{name} cannot be read: it is larger than {MOST_BYTES >> 20} MiB")
    return chart_of(data, found.name, instruction, name)


def chart_of(
    picture: Encoded | Image.Image | np.ndarray, name: str, instruction: str, source: str = ""
) -> Chart:
    """A chart of a picture: encoded, a path, an open one of Pillow, or pixels `[height, width,
    3]`, `[height, width, 4]` or `[height, width]`.

    Args:
      name: the chart's id.
      source: where it comes from, which messages name; `name` by default.

    Raises:
      BadImage: it cannot be read.
    """
    source = source or name
    if isinstance(picture, np.ndarray):
        picture = _of_pixels(picture, source)
    rgb = to_rgb(picture, source) if isinstance(picture, Image.Image) else decode(picture, source)
    return Chart(
        id=name,
        image=png_bytes(_shrunk(rgb)),
        code="",
        record=None,
        instruction=instruction,
        source=source,
        licence="",
    )


def digest(chart: Chart) -> str:
    """Another text for another picture."""
    return hashlib.sha256(chart.image).hexdigest()[:16]


def _bytes(path: str) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadImage(f"{path} cannot be read: it is no file")
        with open(path, "rb") as file:
            return file.read(MOST_BYTES + 1)
    except OSError as error:
        raise BadImage(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise BadImage(f"{path!r} cannot be read: {error}") from error


def _of_pixels(pixels: np.ndarray, name: str) -> Image.Image:
    try:
        return Image.fromarray(pixels)
    except (TypeError, ValueError, KeyError) as error:
        raise BadImage(
            f"{name} cannot be read: pixels of type {pixels.dtype} and shape {list(pixels.shape)} "
            "are no picture; give uint8 [height, width, 3]"
        ) from error


def _shrunk(image: Image.Image) -> Image.Image:
    pixels = image.width * image.height
    if pixels <= MOST_PIXELS:
        return image
    ratio = (MOST_PIXELS / pixels) ** 0.5
    size = max(1, int(image.width * ratio)), max(1, int(image.height * ratio))
    return image.resize(size, Image.Resampling.BOX)

"""The one decoder of images: any encoded picture -> RGB pixels, or one error that says why not.

Pillow's own `convert("RGB")` clips 16-bit grey to white, drops the alpha channel and shows whatever
colour is below it, and ignores the orientation that a camera notes. Its failures have a dozen types
(`SyntaxError` for a broken PNG, `ValueError` for a large text chunk, `DecompressionBombError`,
`struct.error`, ...). Here each of them is a `BadImage`.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

# Pillow warns from here on and refuses twice as many; as RGB they are 270 MB.
MAX_PIXELS = 89_478_485
_SIDEWAYS = range(5, 9)  # EXIF orientations whose width is the height

T = TypeVar("T")
Encoded = bytes | str | os.PathLike[str]


class BadImage(ValueError):
    """An image that cannot be read; the message names it and says why."""


def decode(source: Encoded, name: str | None = None) -> Image.Image:
    """The first frame of an encoded image as RGB, upright, transparency on white.

    Args:
      source: the bytes of a file, or its path.
      name: what messages call it; the path, or the number of bytes, by default.

    Raises:
      BadImage: it cannot be read, whatever the reason.
    """

    def read() -> Image.Image:
        with _open(source) as image:
            image.load()
            return _rgb(image)

    return _named(read, name or _name(source))


def size_of(source: Encoded, name: str | None = None) -> tuple[int, int]:
    """(width, height) of what `decode` gives, from the head of the file alone.

    Raises:
      BadImage: the head cannot be read.
    """

    def read() -> tuple[int, int]:
        with _open(source) as image:
            width, height = image.size
            return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)

    return _named(read, name or _name(source))


def to_rgb(image: Image.Image, name: str = "a picture") -> Image.Image:
    """An open Pillow image of any mode -> RGB, upright, transparent pixels on white.

    Grey of 16 and 32 bits and float is scaled to 8 bits (`_eight_bits`), not clipped.

    Raises:
      BadImage: it cannot be read or has a mode that is unknown.
    """
    return _named(lambda: _rgb(image), name)


def _named(read: Callable[[], T], name: str) -> T:
    try:
        return read()
    except UnidentifiedImageError as error:  # its own words name an object in memory
        raise BadImage(f"{name} cannot be read: it begins as no image") from error
    # Whatever it is: Pillow's parsers let errors of many types through, MemoryError among them.
    except Exception as error:
        reason = str(error).partition("\n")[0] or "no reason given"
        raise BadImage(f"{name} cannot be read: {type(error).__name__}: {reason}") from error


def _name(source: Encoded) -> str:
    return f"an image of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def _open(source: Encoded) -> Image.Image:
    # Read here: Pillow keeps a path's file open, and an empty file deserves its own words.
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    if not data:
        raise ValueError("it is empty")
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    if not width * height:
        raise ValueError(f"it has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a broken note about a picture does not make the picture unreadable
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    key = image.info.get("transparency")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        grey = _eight_bits(image)
        if isinstance(key, int):  # the grey value that is transparent, in the file's own bits
            grey = np.where(np.asarray(image) == key, np.uint8(255), grey)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # it is one only where the image is changed in place
        return converted
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    if {"A", "a"} & set(image.getbands()) or key is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Grey of 16 or 32 bits or float, `[height, width]`, scaled to uint8.

    The range is that of the mode for 16 bits. Modes I and F do not say theirs: a PNG in mode I has
    16 bits; elsewhere it is the smallest of these that holds the values, and where none does, the
    values' own.

        F                   0..1   0..255   0..65535   own minimum .. own maximum
        I                          0..255   0..65535   0..2**31-1, own minimum .. own maximum
    """
    values = np.asarray(image, np.float64)
    values = np.where(np.isfinite(values), values, np.nan)
    if np.isnan(values).all():
        return np.full(values.shape, 255, np.uint8)  # nothing was measured: paper
    low, high = 0.0, float(np.nanmax(values))
    if image.mode.startswith("I;") or (image.mode == "I" and image.format == "PNG"):
        top = 65535.0
    elif float(np.nanmin(values)) < 0:
        low, top = float(np.nanmin(values)), max(high, float(np.nanmin(values)) + 1)
    else:
        tops = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0, 2.0**31 - 1)
        top = next((top for top in tops if high <= top), high)
    # 65535 -> 255 by the high byte, as the values of an 8-bit copy of the file would be.
    scaled = (values - low) * (255 / (top - low))
    return np.where(np.isnan(scaled), 255, np.clip(scaled, 0, 255)).astype(np.uint8)

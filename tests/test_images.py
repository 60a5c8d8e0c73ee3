"""The decoder of images: modes by hand, and every failure as one error that names the image."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mmrecoder_jax.images import BadImage, decode, size_of, to_rgb

RAMP = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (4, 1))
LEVELS = np.tile(np.arange(256), (4, 1))


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def grey(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image).astype(int)
    assert pixels.shape[-1] == 3 and (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(RAMP), "PNG"),
        encoded(Image.fromarray(RAMP), "TIFF"),
        encoded(Image.fromarray(RAMP.astype(">u2")), "TIFF"),
        encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
        encoded(Image.fromarray((LEVELS * (2**31 // 256)).astype(np.int32)), "TIFF"),
        encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        encoded(Image.fromarray(RAMP.astype(np.float32) / 65535), "TIFF"),
        encoded(Image.fromarray(LEVELS.astype(np.float32)), "TIFF"),
        encoded(Image.fromarray(LEVELS.astype(np.int32)), "TIFF"),
        encoded(Image.fromarray(LEVELS.astype(np.float32) - 128), "TIFF"),
    ],
)
def test_deep_grey_is_scaled(data):
    assert abs(grey(decode(data)) - LEVELS).max() <= 1


def test_a_dark_picture_of_16_bits_stays_dark():
    assert grey(decode(encoded(Image.fromarray(RAMP // 300), "PNG"))).max() == 0


def test_what_is_no_number_is_paper():
    values = np.array([[np.nan, np.inf, 0.0, 1.0]], np.float32)
    assert grey(decode(encoded(Image.fromarray(values), "TIFF"))).tolist() == [[255, 255, 0, 255]]
    assert grey(to_rgb(Image.fromarray(np.full((1, 1), np.nan, np.float32)))).tolist() == [[255]]


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "RGBX"]
)
def test_every_mode_gives_rgb(mode):
    found = to_rgb(Image.new(mode, (3, 2)))
    assert found.mode == "RGB" and found.size == (3, 2)


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_transparency_is_paper(mode):
    assert to_rgb(Image.new(mode, (1, 1))).getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_colour_is_paper():
    key = {"L": 7, "RGB": (1, 2, 3), "P": 0, "I;16": 700}
    for mode, colour in key.items():
        image = Image.new(mode, (1, 1), colour)
        data = encoded(image, "PNG", transparency=colour)
        assert decode(data).getpixel((0, 0)) == (255, 255, 255), mode


def test_cmyk_jpeg():
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert np.allclose(np.asarray(decode(data)), (255, 0, 0), atol=3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(Image.new("RGB", (6, 4)), "JPEG", exif=exif)
    found = decode(data)
    assert found.size == size_of(data) == ((6, 4) if orientation < 5 else (4, 6))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_note_of_a_picture_is_ignored():
    data = encoded(Image.new("RGB", (6, 4)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(data).size == size_of(data) == (6, 4)


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).getpixel((0, 0)) == (255, 0, 0)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, idat: bytes, before: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    ends = chunk(b"IHDR", head) + before + chunk(b"IDAT", idat) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + ends


WHOLE = encoded(Image.fromarray(np.eye(40) > 0), "PNG")
BROKEN = {
    "empty": b"",
    "text": b"<html>404</html>",
    "truncated": WHOLE[:60],
    "checksum": WHOLE[:50] + bytes([WHOLE[50] ^ 255]) + WHOLE[51:],
    "chunk": WHOLE[:33] + b"\0\0\0\5\1\2\3\4hello" + b"\0" * 20,
    "long text": png(4, 3, b"", chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (3 << 20)))),
    "bomb": png(20000, 20000, zlib.compress(b"\0" * 1000)),
    "large": png(9500, 9500, zlib.compress(b"\0" * 1000)),
    "sides": png(1 << 30, 1 << 30, b"x"),
    "no pixels": png(0, 0, zlib.compress(b"")),
    "data": png(40, 30, b"no deflate at all"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_every_failure_names_the_image(data, tmp_path):
    path = tmp_path / "chart.png"
    path.write_bytes(data)
    with pytest.raises(BadImage, match=r"chart\.png cannot be read: \w+.+"):
        decode(path)
    with pytest.raises(BadImage, match="row 7 cannot be read"):
        decode(data, "row 7")


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "none.png", tmp_path, "a\0b"):
        with pytest.raises(BadImage, match="cannot be read"):
            decode(path)
        with pytest.raises(BadImage, match="cannot be read"):
            size_of(path)

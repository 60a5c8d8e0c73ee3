"""Pictures of anyone: every kind is read, or refused in one line."""

import io

import numpy as np
import pytest
from PIL import Image

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.drawing import pictures
from mmrecoder_jax.drawing.pictures import Found, chart_of, digest, find, read
from mmrecoder_jax.images import BadImage, decode

RED = (200, 30, 30)


def pixels_of(chart):
    return np.asarray(decode(chart.image))


def saved(path, image, **options):
    image.save(path, **options)
    return read(Found(str(path)), "Redraw.")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff"])
def test_kinds_of_files(tmp_path, kind):
    chart = saved(tmp_path / f"chart.{kind}", Image.new("RGB", (30, 20), RED))
    assert chart.id == "chart" and chart.record is None and chart.instruction == "Redraw."
    found = pixels_of(chart).astype(int)
    assert found.shape == (20, 30, 3) and np.abs(found - RED).max() < 12


def test_modes(tmp_path):
    clear = Image.new("RGBA", (30, 20), (*RED, 0))
    assert (pixels_of(saved(tmp_path / "clear.png", clear)) == 255).all()
    palette = Image.new("RGB", (30, 20), RED).quantize(4)
    assert palette.mode == "P"
    assert np.abs(pixels_of(saved(tmp_path / "p.png", palette)).astype(int) - RED).max() < 8
    deep = Image.fromarray(np.full((20, 30), 32896, np.uint16))
    assert (pixels_of(saved(tmp_path / "deep.png", deep)) == 128).all()
    inks = Image.new("CMYK", (30, 20), (0, 255, 255, 0))
    assert pixels_of(saved(tmp_path / "cmyk.jpg", inks)).reshape(-1, 3).mean(0)[0] > 150
    turned = Image.Exif()
    turned[274] = 6
    sideways = saved(tmp_path / "turned.jpg", Image.new("RGB", (30, 20)), exif=turned)
    assert pixels_of(sideways).shape == (30, 20, 3)


def test_a_large_picture_is_shrunk_and_a_tiny_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_PIXELS", 600)
    chart = saved(tmp_path / "large.png", Image.new("RGB", (120, 20), RED))
    height, width, _ = pixels_of(chart).shape
    assert height * width <= 600 and abs(width / height - 6) < 0.7
    assert pixels_of(saved(tmp_path / "dot.png", Image.new("RGB", (1, 1)))).shape == (1, 1, 3)


def test_a_hundred_megapixels_are_refused_before_they_are_read(tmp_path):
    path = tmp_path / "huge.png"
    Image.new("1", (10000, 10000)).save(path)
    with pytest.raises(BadImage, match=r"huge\.png cannot be read: .*10000 x 10000 pixels"):
        read(Found(str(path)), "")


@pytest.mark.parametrize(
    "name, data, reason",
    [
        ("a.png", b"", "it is empty"),
        ("b.png", b"<html>", "it begins as no image"),
        ("c.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it begins as no image"),
        ("missing.png", None, "No such file"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(tmp_path, name, data, reason):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(BadImage, match=f"{name} cannot be read: .*{reason}") as caught:
        read(Found(str(path)), "")
    assert "\n" not in str(caught.value)


def test_a_pipe_and_a_folder_are_no_files(tmp_path):
    for path in ("/dev/zero", str(tmp_path)):
        with pytest.raises(BadImage, match="it is no file"):
            read(Found(path), "")


def test_a_cut_picture_is_refused(tmp_path):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:2000])
    with pytest.raises(BadImage, match=r"cut\.png cannot be read"):
        read(Found(str(tmp_path / "cut.png")), "")


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_BYTES", 1 << 20)
    path = tmp_path / "long.png"
    path.write_bytes(bytes(3 << 20))
    with pytest.raises(BadImage, match="larger than 1 MiB"):
        read(Found(str(path)), "")


def test_the_standard_input():
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), RED).save(buffer, "PNG")
    buffer.seek(0)
    chart = read(Found("-"), "", buffer)
    assert chart.id == "stdin" and pixels_of(chart).shape == (20, 30, 3)
    with pytest.raises(BadImage, match=r"the standard input cannot be read: .*it is empty"):
        read(Found("-"), "", io.BytesIO())


def test_what_a_folder_holds(tmp_path):
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    found = [one.path for one in find([str(tmp_path), "z.png", str(tmp_path / "a.jpg")])]
    assert found == [str(tmp_path / "a.jpg"), str(tmp_path / "b.PNG"), "z.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: a folder without pictures"):
        find([str(tmp_path / "empty")])
    with pytest.raises(ConfigError, match="named twice"):
        find(["-", "-"])


@pytest.mark.parametrize(
    "path, name",
    [
        ("charts/my chart (1).png", "my-chart--1"),
        ("---.png", "chart"),
        ("-", "stdin"),
        ("a/../../etc/.hidden.png", "hidden"),
        ("Umsätze.png", "Umsätze"),
    ],
)
def test_names_of_folders_stay_inside(path, name):
    assert Found(path).name == name


def test_pixels_and_open_pictures():
    pixels = np.full((20, 30, 3), RED, np.uint8)
    assert digest(chart_of(pixels, "a", "")) == digest(chart_of(Image.fromarray(pixels), "b", ""))
    grey = chart_of(np.full((20, 30), 7, np.uint8), "a", "")
    assert (pixels_of(grey) == 7).all() and digest(grey) != digest(chart_of(pixels, "a", ""))
    with pytest.raises(BadImage, match=r"complex128 and shape \[2, 2\]"):
        chart_of(np.zeros((2, 2), complex), "a", "")

"""The similarity for machines without a judge."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.rl.judge.base import VerdictCache
from mmrecoder_jax.rl.judge.visual import VisualJudge, similarity


def chart(color="blue", heights=(40, 70, 55), size=(168, 112)):
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for i, height in enumerate(heights):
        draw.rectangle([20 + 45 * i, 100 - height, 50 + 45 * i, 100], fill=color)
    draw.line([10, 100, 160, 100], fill="black")
    return np.asarray(image)


def test_similarity_orders_pictures_as_one_would():
    target = chart()
    assert similarity(target, target) == 1.0
    assert similarity(target, np.full_like(target, 255)) == 0.0
    moved, recolored, other = chart(heights=(45, 70, 55)), chart("red"), chart("red", (90, 10, 90))
    assert (
        1
        > similarity(target, moved)
        > similarity(target, recolored)
        > similarity(target, other)
        > 0
    )
    assert similarity(target, chart(size=(84, 112))) < similarity(target, moved)


def test_similarity_is_symmetric_and_deterministic():
    a, b = chart(), chart("red", (10, 20, 30))
    assert similarity(a, b) == similarity(a, b) == pytest.approx(similarity(b, a))


def test_the_visual_judge_has_no_dimensions():
    target = chart()
    with VisualJudge(VerdictCache()) as judge:
        found = judge.submit(png_bytes(target), chart("red")).result()
        assert judge.name == "visual"
        assert judge.submit(png_bytes(target), target).result().score == 1.0
    assert found.points == {} and found.score == similarity(target, chart("red"))


def test_a_target_that_is_no_image_gets_an_answer():
    with VisualJudge(VerdictCache()) as judge:
        found = judge.submit(b"<html>", np.zeros((8, 8, 3), np.uint8)).result(timeout=30)
    assert found.score is None and found.of_pair and "cannot be read" in found.problem

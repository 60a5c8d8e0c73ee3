import io

import numpy as np
import pytest
from PIL import Image

from mmrecoder_jax.env import ChartEnv, EnvConfig, Execution, Record, Status
from mmrecoder_jax.env.chart_env import FeedbackImage, feedback_images, feedback_text, oversized
from mmrecoder_jax.env.response import response_text


def test_feedback_text():
    templates = {"render": "Look.", "error": "It failed:\n{error}\nFix it."}
    assert feedback_text(Execution(Status.OK), templates) == "Look."
    assert (
        feedback_text(Execution(Status.ERROR, error="a {error} b"), templates)
        == "It failed:\na {error} b\nFix it."
    )


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_feedback_shows_the_render_or_where_it_differs_or_both():
    target = np.full((4, 6, 3), 255, np.uint8)
    target[1, 2] = (255, 0, 0)
    render = np.full((4, 6, 3), 255, np.uint8)
    render[3, 5] = (10, 20, 30)
    execution = Execution(Status.OK, image=render)
    (shown,) = feedback_images(execution, png(target), "render")
    assert shown is render
    (difference,) = feedback_images(execution, png(target), "difference")
    first, second = feedback_images(execution, png(target), "both")
    assert first is render and (second == difference).all()
    assert [kind.pictures for kind in FeedbackImage] == [1, 1, 2, 1]
    assert difference[1, 2].tolist() == [255, 0, 0] and difference[3, 5].tolist() == [10, 20, 30]
    difference[1, 2] = difference[3, 5] = 255
    assert (difference == 255).all()


def test_a_signed_difference_says_what_is_lacking_and_what_is_too_much():
    target = np.full((2, 3, 3), 255, np.uint8)
    render = target.copy()
    target[0, 0] = (255, 0, 100)
    render[1, 2] = (255, 0, 103)
    (signed,) = feedback_images(Execution(Status.OK, image=render), png(target), "signed")
    assert signed[0, 0].tolist() == [128, 0, 50]  # the target has less green and blue
    assert signed[1, 2].tolist() == [128, 255, 204]  # the render has
    signed[0, 0] = signed[1, 2] = 128
    assert (signed == 128).all()


def test_a_render_of_another_size_is_compared_in_the_size_of_the_target():
    target = np.full((4, 6, 3), 200, np.uint8)
    (difference,) = feedback_images(
        Execution(Status.OK, image=np.full((9, 5, 3), 150, np.uint8)), png(target), "difference"
    )
    assert difference.shape == (4, 6, 3) and (difference == 205).all()


def test_nothing_drawn_shows_nothing():
    failed = Execution(Status.ERROR, error="x")
    assert [feedback_images(failed, b"", kind) for kind in FeedbackImage] == [()] * 4


def test_unknown_feedback_image_names_the_kinds():
    with pytest.raises(ValueError, match=r"'diff'.*render, difference, both, signed"):
        feedback_images(
            Execution(Status.OK, image=np.zeros((2, 2, 3), np.uint8)),
            png(np.zeros((2, 2, 3), np.uint8)),
            "diff",
        )


def test_responses_are_executed():
    with ChartEnv(EnvConfig(workers=1, preload=())) as env:
        results = env.execute([response_text("bars", "x = 1"), "no code"])
    assert [r.status for r in results] == [Status.NO_FIGURE, Status.NO_CODE]


def test_a_figure_that_cannot_be_shown_is_a_failure_in_words():
    drawn = Execution(Status.OK, image=np.zeros((80, 12000, 3), np.uint8), record=Record())
    failed = oversized(drawn)
    assert (failed.status, failed.ok) == (Status.OVERSIZED, False)
    assert failed.image is None and failed.record is None
    assert failed.error.startswith("The figure is 12000 x 80 pixels") and "\n" not in failed.error
    templates = {"render": "Look.", "error": "It failed: {error}"}
    assert feedback_text(failed, templates).startswith("It failed: The figure is 12000")

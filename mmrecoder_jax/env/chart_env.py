"""The environment as the policy meets it: responses are run and answered with feedback."""

import dataclasses
import enum
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image

from mmrecoder_jax.env.execution import Execution
from mmrecoder_jax.env.pool import ExecutorPool
from mmrecoder_jax.env.records import Record
from mmrecoder_jax.env.response import extract_code
from mmrecoder_jax.env.wire import Status
from mmrecoder_jax.images import decode


class FeedbackImage(enum.StrEnum):
    """What the policy is shown of its last turn."""

    RENDER = "render"  # the paper's feedback
    # 255 - |target - render|: white where the render is right, in the target's size (a render of
    # another size is resized to it)
    DIFFERENCE = "difference"
    BOTH = "both"  # the render, then the difference
    # 128 + (target - render) / 2 per channel: grey where the render is right, and elsewhere what it
    # lacks or has too much of
    SIGNED = "signed"

    @property
    def pictures(self) -> int:
        """How many pictures the feedback on a render shows."""
        return 2 if self is FeedbackImage.BOTH else 1

    @property
    def description(self) -> str:
        """What the policy is shown, as it follows "The picture is"."""
        match self:
            case FeedbackImage.RENDER:
                return "the render itself."
            case FeedbackImage.DIFFERENCE:
                return (
                    "of the target's size: white where the render equals the target, dark where it "
                    "differs."
                )
            case FeedbackImage.BOTH:
                return "the render, and behind it the difference to the target."
            case FeedbackImage.SIGNED:
                return (
                    "of the target's size: grey (128) where the render equals the target, and "
                    "elsewhere 128 + (target - render) / 2 in each channel."
                )


def feedback_text(execution: Execution, templates: Mapping[str, str]) -> str:
    """The text part of a turn's feedback.

    Args:
      execution: of the previous turn.
      templates: "render" for a script that drew a figure, "error" for any other; "{error}" in the
        latter is replaced by the error text.
    """
    if execution.ok:
        return templates["render"]
    return templates["error"].replace("{error}", execution.error)


def feedback_images(execution: Execution, target: bytes, kind: str) -> tuple[np.ndarray, ...]:
    """The pictures of a turn's feedback, uint8 [H, W, 3] each; none where the script drew nothing.

    Args:
      execution: of the previous turn, with pixels.
      target: the chart to redraw, as an encoded image. It is what the policy was shown: no target
        code or record enters the feedback.
      kind: one of `FeedbackImage`.

    Raises:
      ValueError: `kind` is unknown, or the target is no image (`BadImage`).
    """
    render = execution.image
    if not execution.ok or render is None:
        return ()
    if kind == FeedbackImage.RENDER:
        return (render,)
    if kind not in tuple(FeedbackImage):
        raise ValueError(f"feedback.image={kind!r}: use one of {', '.join(FeedbackImage)}")
    if kind == FeedbackImage.SIGNED:
        return (_signed_difference(render, target),)
    difference = _difference(render, target)
    return (render, difference) if kind == FeedbackImage.BOTH else (difference,)


def _difference(render: np.ndarray, target: bytes) -> np.ndarray:
    return (255 - np.abs(_lacking(render, target))).astype(np.uint8)


def _signed_difference(render: np.ndarray, target: bytes) -> np.ndarray:
    return (128 + _lacking(render, target) // 2).astype(np.uint8)


def _lacking(render: np.ndarray, target: bytes) -> np.ndarray:
    """Target minus render, int16 from -255 to 255, in the target's size."""
    wanted = np.asarray(decode(target), np.int16)
    if render.shape != wanted.shape:
        height, width, _ = wanted.shape
        resized = Image.fromarray(render).resize((width, height), Image.Resampling.BICUBIC)
        render = np.asarray(resized)
    return wanted - render


def oversized(execution: Execution[Record]) -> Execution[Record]:
    """What an execution becomes whose figure cannot be shown to the policy: a failure, in words."""
    assert execution.image is not None
    height, width, _ = execution.image.shape
    error = (
        f"The figure is {width} x {height} pixels: it is too large or too thin to be looked at. "
        "Draw a figure of usual size and proportions."
    )
    return dataclasses.replace(
        execution, status=Status.OVERSIZED, image=None, record=None, error=error
    )


class ChartEnv(ExecutorPool):
    """An `ExecutorPool` that takes responses instead of code.

    with ChartEnv(EnvConfig(workers=2)) as env:
        first, second = env.execute([response_a, response_b])
    """

    def execute(self, responses: Iterable[str]) -> list[Execution[Record]]:
        """Runs the code of each response; NO_CODE where there is none."""
        return self.run([extract_code(response) for response in responses])
